"""Validation accepts right and rejects wrong kernels, functions, files and outputs."""

import shutil
import subprocess

import numpy as np
import pytest
from conftest import DIGITS, ROOT, op_model, parsed
from onnx import helper
from test_rewrite import SEQUENCES

from ctonnx.check import validate
from ctonnx.errors import (
    CheckFailed,
    InputFileError,
    MissingDependency,
    ModelError,
    NothingToDo,
    UsageError,
)
from ctonnx.model import files
from ctonnx.ort import library, runs
from ctonnx.rewriting.steer import Selection, steer
from ctonnx.rewriting.steered import SteeredModel

ORIGINAL = DIGITS / "digits.onnx"


def broken(tmp_path, damage):
    """Steer the sample at 0.85, damage the model, and return the result of the check."""
    model = files.load(ORIGINAL)
    report = steer(model, 0.85)
    damage(model)
    path = tmp_path / "digits.ct.onnx"
    path.write_bytes(model.SerializeToString())
    return validate.check_steered(ORIGINAL, path, report, 0.85, "portable")


def test_check_passes_on_the_sample(tmp_path):
    results = broken(tmp_path, lambda model: None)
    assert len(results) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits.ct.onnx"]


def test_check_fails_on_a_wrong_function(tmp_path):
    def swap(model):
        (node,) = [n for n in model.functions[-1].node if n.op_type == "Log"]
        node.op_type = "Exp"

    with pytest.raises(CheckFailed, match=r"op library vs\. fallback: output 'logits'"):
        broken(tmp_path, swap)


def test_check_fails_where_beta_one_is_not_the_original(tmp_path):
    def unlink(model):
        node = next(n for n in model.graph.node if n.op_type == "CTU")
        node.op_type, node.domain = "Identity", ""
        del node.input[1:]

    with pytest.raises(CheckFailed, match="at beta 1 against the original: output 'logits'"):
        broken(tmp_path, unlink)


def test_a_model_that_does_not_load_is_an_error():
    with pytest.raises(ModelError, match="cannot load"):
        validate.Model(op_model(function=False).SerializeToString(), library=False)


def test_random_inputs_fit_what_the_model_takes():
    """Sizes are tried in turn for symbolic dimensions; dimensions named like a batch are 1."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, m] x, int64[batch] i, bool[3] b, float16[2, batch] h)
        => (float[batch, 2] y, int64[batch] j, bool[3] k, float16[2, batch] l)
        <float[8, 2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}>
        { y = MatMul(x, w)  j = Identity(i)  k = Not(b)  l = Neg(h) }"""
    inputs = runs.random_inputs(validate.Model(parsed(text).SerializeToString()))
    shapes = {name: value.shape for name, value in inputs.items()}
    assert shapes == {"x": (1, 8), "i": (1,), "b": (3,), "h": (2, 1)}


def test_a_model_that_runs_on_no_random_input_is_an_error():
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, m] x) => (float[n, 1] y) <float[5, 1] w = {1, 2, 3, 4, 5}>
        { y = MatMul(x, w) }"""
    with pytest.raises(CheckFailed, match="found no random input"):
        runs.random_inputs(validate.Model(parsed(text).SerializeToString()))


def test_random_inputs_that_would_fill_the_memory_are_not_drawn():
    """Neither of the sizes tried for symbolic dimensions, nor of those that a model declares."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, a, b, c, d] x) => (float[7] y) <int64[1] k = {7}>
        { y = Reshape(x, k) }"""
    opened, sizes = validate.Model(parsed(text).SerializeToString()), []
    run = opened.run
    opened.run = lambda inputs: [sizes.append(inputs["x"].shape[1]), run(inputs)][1]
    with pytest.raises(CheckFailed, match="found no random input"):
        runs.random_inputs(opened)
    assert sizes == [8, 32, 64, 2, 1]
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1000000, 1000000] x) => (float[1000000, 1000000] y) { y = Neg(x) }"""
    with pytest.raises(CheckFailed, match="1000000x1000000, are too large"):
        runs.random_inputs(validate.Model(parsed(text).SerializeToString()))
    ones = ", ".join(100 * "1")
    with pytest.raises(CheckFailed, match="1x1x1, are too large"):
        runs.random_inputs(
            validate.Model(parsed(text.replace("1000000, 1000000", ones)).SerializeToString())
        )


# --- the whole validation


def steered(folder, change=None, beta=0.85, **options):
    """The sample, steered and changed, as a file."""
    model = files.load(ORIGINAL)
    steer(model, beta, **options)
    if change is not None:
        change(model)
    path = folder / "digits.ct.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def failed(result):
    return {run.name for run in result.runs if not run.ok}


WITH, WITHOUT = "CPUExecutionProvider with the op library", "CPUExecutionProvider without it"
BLOCKED = "CPUExecutionProvider in the blocked layout"
ALONE = "each CTU by itself, "


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {WITH, WITHOUT, BLOCKED, ALONE + WITH, ALONE + WITHOUT}),
        ({"lowering": "op"}, {WITH, BLOCKED, ALONE + WITH}),
        ({"lowering": "primitives"}, {"CPUExecutionProvider"}),
        ({"lowering": "primitives", "beta_as": "required-input"}, {"CPUExecutionProvider"}),
        ({"beta_as": "input"}, {WITH, WITHOUT, BLOCKED, ALONE + WITH, ALONE + WITHOUT}),
        ({"beta_as": "required-input"}, {WITH, WITHOUT, BLOCKED, ALONE + WITH, ALONE + WITHOUT}),
    ],
    ids=lambda v: "-".join(v.values()) or "defaults" if type(v) is dict else "",
)
def test_output_of_patch_passes(tmp_path, options, names):
    pytest.importorskip("torch")
    path = steered(tmp_path, **options)
    result = validate.validate(path)
    assert result.ok
    assert {run.name for run in result.runs} == names
    if options == {"lowering": "primitives"}:
        with pytest.raises(NothingToDo, match="holds no CTU"):
            validate.validate(path, against=ORIGINAL)
    else:
        result = validate.validate(path, against=ORIGINAL)
        assert result.ok
        assert {run.name for run in result.runs} == {n for n in names if not n.startswith(ALONE)}
    assert [p.name for p in tmp_path.iterdir()] == ["digits.ct.onnx"]


@pytest.fixture(scope="module")
def wrong_library(tmp_path_factory):
    """A function that builds the op library with changes: file -> (old text, new text)."""

    def build(changes):
        if shutil.which("g++") is None:
            pytest.skip("g++ is not installed")
        folder = tmp_path_factory.mktemp("wrong")
        shutil.copytree(ROOT / "custom_ops", folder, dirs_exist_ok=True)
        for name, (old, new) in changes.items():
            text = (folder / name).read_text()
            assert text.count(old) == 1
            (folder / name).write_text(text.replace(old, new))
        sources = [path.name for path in folder.glob("*.cc")]
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-psabi", *sources]
        command += ["-DCTONNX_LEVEL=portable", "-o", "wrong.so"]
        subprocess.run(command, cwd=folder, check=True)
        return str(folder / "wrong.so")

    return build


SWAPPED = {
    "ctu_math.h": ("    const double s = ", "    coeff = 1 - coeff;\n    const double s = "),
    "ctu_table.h": ("coeff = parameters.coeff", "coeff = 1 - parameters.coeff"),
}
NO_EPSILON = {"ctu_math.h": (" + 1e-6;", ";"), "ctu_table.h": (" + 1e-6)", ")")}


@pytest.mark.parametrize(
    ("changes", "seen_in_outputs"),
    # A missing epsilon is too small a change for the outputs; runs of single CTUs show it.
    [pytest.param(SWAPPED, True, id="swapped"), pytest.param(NO_EPSILON, False, id="no-epsilon")],
)
def test_a_wrong_kernel_fails(tmp_path, monkeypatch, wrong_library, changes, seen_in_outputs):
    pytest.importorskip("torch")
    wrong = wrong_library(changes)
    monkeypatch.setattr(library, "get_library_path", lambda: wrong)
    if not seen_in_outputs:  # c = 0.5 hides a swap with 1 - c
        assert failed(validate.validate(steered(tmp_path))) == {ALONE + WITH}
    result = validate.validate(steered(tmp_path, coeff=0.3))
    assert failed(result) == {ALONE + WITH, *((WITH, BLOCKED) if seen_in_outputs else ())}
    if seen_in_outputs:
        assert {run.name: run.diverges for run in result.runs}[WITH] == "node_relu"


def test_a_wrong_function_fails(tmp_path):
    pytest.importorskip("torch")

    def swap(model):
        (node,) = [n for n in model.functions[-1].node if n.op_type == "Log"]
        node.op_type = "Exp"

    def no_epsilon(model):
        for node in model.functions[-1].node:
            if (
                node.op_type == "Constant"
                and abs(helper.get_node_attr_value(node, "value").float_data[0] - 1e-6) < 1e-9
            ):
                node.attribute[0].t.float_data[0] = 0.0

    assert failed(validate.validate(steered(tmp_path, swap))) == {WITHOUT, ALONE + WITHOUT}
    assert failed(validate.validate(steered(tmp_path, no_epsilon))) == {ALONE + WITHOUT}


CLIPPED = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 4] x) => (float[n, 4] y)
    <float lo = {0.0}, float hi = {6.0}, float[4] w = {1.5, -2.0, 1.0, 0.5},
     float some = {0.25}, float more = {0.75}, float least = {-3.402823e38}>
    { a = Mul(x, w)  b = Clip(a, lo, hi)  c = HardSigmoid(b)  d = Clip(c, some)
      y = Clip(d, least, more) }"""


@pytest.mark.parametrize("op_type", ["CTUClip", "CTUMax", "CTUMin", "CTUHardSigmoid"])
def test_a_wrong_function_of_a_clip_fails(tmp_path, op_type):
    """The reference does not rely on the functions in the model."""
    pytest.importorskip("torch")
    model = parsed(CLIPPED)
    steer(model, 0.85)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert validate.validate(path).ok
    (function,) = [f for f in model.functions if f.name == op_type]
    last = function.node[-1]
    last.op_type = "Identity"
    del last.input[1:]
    path.write_bytes(model.SerializeToString())
    assert any(name.startswith(ALONE) for name in failed(validate.validate(path)))


def test_inputs_have_more_than_one_element_along_each_axis(tmp_path):
    """After a normalization over a single pixel, all weights would give the same output."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 2, h, w] x) => (float[n, 2, h, w] y)
        <float[2] one = {1.0, 1.0}, float[2] zero = {0.0, 0.0}, float[2, 1, 1] k = {1.0, 3.0}>
        { a = Add(x, k)  b = Relu(a)  y = InstanceNormalization(b, one, zero) }"""
    for name, model in (("a", parsed(text)), ("b", parsed(text.replace("1.0, 3.0", "5.0, -3.0")))):
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    changed = files.load(tmp_path / "b.onnx")
    steer(changed, 0.85)
    (tmp_path / "c.onnx").write_bytes(changed.SerializeToString())
    result = validate.validate(tmp_path / "c.onnx", against=tmp_path / "a.onnx")
    assert not result.ok
    assert result.inputs == {"x": [1, 2, 8, 8]}


def test_each_session_is_opened_once(tmp_path, monkeypatch):
    """One session for each way to run the model or the CTUs; the blocked layout takes three.

    Its three are the one that optimises, its own, and the plain one to compare with.
    """
    pytest.importorskip("torch")
    path, opened = steered(tmp_path), []
    open_session = library.open_session

    def count(*arguments):
        opened.append(arguments)
        return open_session(*arguments)

    for module in library, runs:
        monkeypatch.setattr(module, "open_session", count)
    names = {run.name for run in validate.validate(path).runs}
    assert len(opened) == 2 + 2 + 3 * (BLOCKED in names)


def test_notes_list_what_is_not_compared(tmp_path):
    pytest.importorskip("torch")
    text = """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
        g (float[3] x) => (float[3] y, float[m] e)
        <int64[1] none = {0}> { y = f.twice(x)  n = Identity(none)  e = Expand(y, n) }
        <domain: "f", opset_import: ["" : 17]> twice (v) => (z) { u = Relu(v)  z = Add(u, u) }"""
    model = parsed(text.replace("Expand(y, n)", "Slice(y, none, none)"))
    steer(model, 0.85)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    result = validate.validate(path)
    assert result.ok
    assert result.notes == [
        "output 'e' is empty: not compared",
        "1 CTUs were not run by themselves: see ctonnx.check.units",
    ]
    result = validate.validate(steered(tmp_path, lowering="primitives"))
    assert result.notes == ["the model holds no CTU: a float64 run computes the same standard ops"]


def test_the_first_activation_to_differ_is_named(tmp_path):
    """A weight of the steered file is changed after the third activation."""

    def change(model):
        ctus = [i for i, n in enumerate(model.graph.node) if n.op_type == "CTU"]
        conv = next(n for n in model.graph.node[ctus[2] :] if n.op_type == "Conv")
        (weight,) = [t for t in model.graph.initializer if t.name == conv.input[1]]
        weight.raw_data = bytes(len(weight.raw_data))

    path = steered(tmp_path, change)
    result = validate.validate(path, against=ORIGINAL)
    assert not result.ok
    names = [a.name for a in SteeredModel(files.load(path)).activations]
    assert {run.diverges for run in result.runs if run.name != BLOCKED} == {names[3]}


def test_a_missing_output_and_nan_fail(tmp_path):
    path = steered(tmp_path)
    more = files.load(ORIGINAL)
    more.graph.output.add().CopyFrom(more.graph.output[0])
    more.graph.output[1].name = next(n.output[0] for n in more.graph.node if n.op_type == "Relu")
    (tmp_path / "more.onnx").write_bytes(more.SerializeToString())
    result = validate.validate(path, against=tmp_path / "more.onnx")
    assert "missing" in str([o.reason for run in result.runs for o in run.outputs])
    assert len(failed(result)) == 3

    image = np.load(DIGITS / "digits_test.npz")["image"][:4]
    np.savez(tmp_path / "inputs.npz", image=image)
    assert validate.validate(path, against=ORIGINAL, inputs=tmp_path / "inputs.npz").ok
    image[2] = np.nan
    np.savez(tmp_path / "inputs.npz", image=image)
    result = validate.validate(path, against=ORIGINAL, inputs=tmp_path / "inputs.npz")
    assert len(failed(result)) == 3
    assert result.notes == ["input 'image' holds NaN or infinity"]


def test_activations_inside_a_sequence_map(tmp_path):
    pytest.importorskip("torch")
    original, path, model = tmp_path / "a.onnx", tmp_path / "b.onnx", parsed(SEQUENCES)
    original.write_bytes(model.SerializeToString())
    report = steer(model, 0.85)
    path.write_bytes(model.SerializeToString())
    validate.check_steered(original, path, report, 0.85, "portable")
    for result in validate.validate(path), validate.validate(path, against=original):
        assert result.ok
        assert {WITH, WITHOUT} <= {run.name for run in result.runs}
    (function,) = [f for f in model.functions if f.name == "CTU"]
    next(n for n in function.node if n.op_type == "Log").op_type = "Exp"
    path.write_bytes(model.SerializeToString())
    assert failed(validate.validate(path)) == {WITHOUT, ALONE + WITHOUT}


def test_every_kind_of_site(tmp_path):
    """A subgraph, a function, a Clip, slopes per channel and another element type."""
    pytest.importorskip("torch")
    text = """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
        g (float[2, 3] x, bool go) => (float[2, 3] y, float16[2, 3] h, float[2, 3] w)
        <float[3] slopes = {0.1, -0.5, 1.5}, float lo = {0.0}>
        { r = PRelu(x, slopes)  hi = Constant<value = float {6.0}>()  c = Clip(r, lo, hi)
          y = If(go) <then_branch = t () => (float[2, 3] a) { a = Relu(r) },
                      else_branch = e () => (float[2, 3] b) { b = Relu(c) }>
          q = Cast<to = 10>(x)  h = Relu(q)  w = f.twice(x) }
        <domain: "f", opset_import: ["" : 17]> twice (v) => (z) { u = Relu(v)  z = Add(u, u) }"""
    model = parsed(text)
    report = steer(model, 0.85, 0.3)
    assert len(report.replaced) == 6
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    result = validate.validate(path)
    assert result.ok
    # The CTU in the function is not run by itself; those in the two subgraphs are alike.
    assert [len(run.outputs) for run in result.runs] == [3, 3, 4, 4]


def test_inputs_and_shapes_that_do_not_fit(tmp_path):
    path = steered(tmp_path, beta_as="required-input")
    cases = [
        ({"shapes": {"picture": [1]}}, "no input 'picture': choose among image"),
        ({"shapes": {"image": [1, 8, 8]}}, "'image' is batchx1x8x8, got 1x8x8"),
        ({"shapes": {"image": [1, 3, 8, 8]}}, "'image' is batchx1x8x8, got 1x3x8x8"),
        ({"inputs": {"beta": 1.0}}, "no array for input 'image'"),
        ({"inputs": {"image": np.full((1, 1, 8, 8), 1e300)}}, "holds numbers that float32 cannot"),
        ({"shapes": {"image": [1, 1, 8, 8]}, "inputs": {"image": 0}}, "is for random inputs"),
        ({"providers": []}, "must name at least one"),
        ({"inputs": {"image": np.array("a"), "beta": 0.5}}, "'image' is <U1, the model takes"),
    ]
    for options, message in cases:
        if "inputs" in options:
            np.savez(tmp_path / "inputs.npz", **options["inputs"])
            options = options | {"inputs": tmp_path / "inputs.npz"}
        with pytest.raises(UsageError, match=message):
            validate.validate(path, against=ORIGINAL, **options)
    result = validate.validate(path, against=ORIGINAL, shapes={"image": [5, 1, 8, 8]})
    assert result.ok
    assert result.inputs == {"image": [5, 1, 8, 8], "beta": []}
    np.savez(tmp_path / "inputs.npz", image=np.zeros((1, 3, 3), np.float32))
    with pytest.raises(UsageError, match="'image' is batchx1x8x8, got 1x3x3"):
        validate.validate(path, against=ORIGINAL, inputs=tmp_path / "inputs.npz")
    # The comparison is at beta 1, whatever beta the file has.
    image = np.load(DIGITS / "digits_test.npz")["image"][:4]
    np.savez(tmp_path / "inputs.npz", image=image, beta=0.5)
    for beta_as in ("input", "required-input"):
        path = steered(tmp_path, beta_as=beta_as)
        assert validate.validate(path, against=ORIGINAL, inputs=tmp_path / "inputs.npz").ok
    other = parsed(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[4] q) => (float[4] y) { y = Neg(q) }"""
    )
    (tmp_path / "other.onnx").write_bytes(other.SerializeToString())
    with pytest.raises(UsageError, match="takes an input 'q', which the model has not"):
        validate.validate(path, against=tmp_path / "other.onnx")
    with pytest.raises(ModelError, match=r"mnist\.onnx: does not run on the model's inputs: is it"):
        validate.validate(path, against=ROOT / "samples" / "sweep" / "mnist.onnx")
    with pytest.raises(UsageError, match="is steered itself"):
        validate.validate(path, against=path)
    np.savez(tmp_path / "inputs.npz", image=image, beta=5.0, label=np.arange(4))
    # Other arrays of the file are ignored.
    result = validate.validate(path, against=ORIGINAL, inputs=tmp_path / "inputs.npz")
    assert result.ok
    assert result.notes == [f"{tmp_path / 'inputs.npz'}: 'label' is no input of the model: ignored"]
    with pytest.raises(MissingDependency, match="NoProvider is not available"):
        validate.validate(path, against=ORIGINAL, providers=["NoProvider"])
    (tmp_path / "inputs.npz").write_bytes(b"no archive")
    with pytest.raises(InputFileError, match="cannot be read as an"):
        validate.validate(path, against=ORIGINAL, inputs=tmp_path / "inputs.npz")


def test_a_beta_of_several_numbers_is_refused(tmp_path):
    pytest.importorskip("torch")
    image = np.load(DIGITS / "digits_test.npz")["image"][:4]
    np.savez(tmp_path / "inputs.npz", image=image, beta=[0.5, 0.6, 0.7])
    with pytest.raises(UsageError, match=r"'beta' is one number, got \[3\]"):
        validate.validate(steered(tmp_path, beta_as="input"), inputs=tmp_path / "inputs.npz")


NETWORKS = """
import torch
from torch import nn
from ctonnx.torch import trainable

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Flatten(),
        nn.Linear(64, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3),
    )

def other_weights():
    model = net()
    nn.init.zeros_(model[3].weight)
    return model

def more_outputs():
    class Two(nn.Module):
        inner = net()
        def forward(self, x):
            return self.inner(x), x
    return Two()

def tuned():
    model = trainable(net(), torch.zeros(1, 1, 8, 8))
    for name, parameter in model.named_parameters():
        if "_raw" in name:
            nn.init.normal_(parameter)
    return model
"""


def test_comparison_with_a_pytorch_model(tmp_path, monkeypatch):
    """The PyTorch model is steered alike. An activation that is not fails, and is named."""
    pytest.importorskip("onnxscript")
    from ctonnx.torch import by_name

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "networks_to_compare.py").write_text(NETWORKS)
    name = "networks_to_compare:{}".format
    path = tmp_path / "net.ct.onnx"
    by_name.export_model(name("net"), [[1, 1, 8, 8]], path, beta=0.85, coeff=0.3)
    result = validate.validate(path, module=name("net"))
    assert result.ok
    assert result.against == "networks_to_compare:net in PyTorch"

    result = validate.validate(path, module=name("other_weights"))
    assert not result.ok
    assert result.notes == [
        "1 weights are not those of networks_to_compare:other_weights, such as '3.weight': does it "
        "load what was exported?"
    ]
    result = validate.validate(path, module=name("more_outputs"))
    assert [o.reason for o in result.runs[0].outputs] == [None, "missing in one of the runs"]

    original = files.load(path)
    SteeredModel(original).unsteer()
    names = [a.name for a in SteeredModel(original).activations if a.status == "steerable"]
    for beta_as in ("initializer", "required-input"):
        model = files.load(path)
        SteeredModel(model).unsteer()
        steer(model, 0.85, 0.3, selection=Selection(exclude=f"^{names[1]}$"), beta_as=beta_as)
        path.write_bytes(model.SerializeToString())
        result = validate.validate(path, module=name("net"))
        assert failed(result) == {WITH, WITHOUT, BLOCKED}
        assert {run.diverges for run in result.runs} == {names[1]}
        assert result.notes == [f"not steered, though it could be: {names[1]}"]

    by_name.export_model(name("tuned"), [[1, 1, 8, 8]], path, force=True)
    assert validate.validate(path, module=name("tuned")).ok
    with pytest.raises(UsageError, match="do not share one beta"):
        validate.validate(path, module=name("net"))
    with pytest.raises(UsageError, match="give one"):
        validate.validate(path, module=name("net"), against=path)


def test_an_invalid_beta_in_the_inputs_is_refused(tmp_path):
    pytest.importorskip("torch")
    path = steered(tmp_path, beta_as="required-input")
    image = np.load(DIGITS / "digits_test.npz")["image"][:4]
    for beta in (5.0, np.nan):
        np.savez(tmp_path / "inputs.npz", image=image, beta=beta)
        with pytest.raises(UsageError, match="beta must lie in"):
            validate.validate(path, inputs=tmp_path / "inputs.npz")


def test_beta_comes_from_the_inputs_if_the_model_does_not_record_it(tmp_path):
    """Other tools drop metadata. Validation then asks for the beta to feed."""
    pytest.importorskip("torch")
    image = np.load(DIGITS / "digits_test.npz")["image"][:4]
    np.savez(tmp_path / "inputs.npz", image=image, beta=0.7)
    for value in (None, "per activation"):

        def forget(model, value=value):
            (entry,) = [e for e in model.metadata_props if e.key == "ctonnx.beta"]
            if value is None:
                model.metadata_props.remove(entry)
            else:
                entry.value = value

        path = steered(tmp_path, forget, beta_as="required-input")
        with pytest.raises(UsageError, match="does not tell which beta to feed"):
            validate.validate(path)
        assert validate.validate(path, inputs=tmp_path / "inputs.npz").ok
