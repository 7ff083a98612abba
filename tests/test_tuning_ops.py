"""The differentiable run, op by op: values on onnx's node tests, and gradients against finite
differences."""

from collections import Counter

import numpy as np
import onnx.parser
import pytest
from conftest import backend_cases

from ctonnx import ctu
from ctonnx.errors import ModelError, UsageError

pytest.importorskip("torch")
import torch

from ctonnx.tuning.network import Network
from ctonnx.tuning.ops import CUTTING, GRADIENTS

# Node tests that differ, for a reason.
DIFFER = {
    "test_batchnorm_example_training_mode": "a model in training mode is refused",
    "test_batchnorm_epsilon_training_mode": "a model in training mode is refused",
    "test_reduce_max_empty_set": "nothing to take the maximum of",
    "test_reduce_min_empty_set": "nothing to take the minimum of",
    "test_resize_downsample_scales_cubic_align_corners": "ONNX Runtime gives another value too",
    "test_resize_downsample_scales_linear_align_corners": "ONNX Runtime gives another value too",
    **dict.fromkeys(
        (f"test_training_dropout{suffix}" for suffix in ("", "_default", "_default_mask", "_mask")),
        "a dropout in training mode is refused",
    ),
    **dict.fromkeys(
        ("test_training_dropout_zero_ratio", "test_training_dropout_zero_ratio_mask"),
        "a dropout in training mode is refused",
    ),
}

# Ops whose node tests lie at kinks, where finite differences tell nothing, or take long: their
# gradients are checked on the models below.
UNSMOOTH = ("Abs", "Clip", "MaxPool", "Pow", "ReduceMax", "ReduceMin")

# The most numbers of a case whose gradient is checked.
MOST = 70


KNOWN = ("bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")


def is_float(array):
    return isinstance(array, np.ndarray) and array.dtype.kind == "f"


def node_tests():
    """The cases of ops with a gradient, of floating-point inputs that PyTorch knows."""
    for case in backend_cases("node"):
        (node, *others) = case.model.graph.node
        values = (*case.inputs.values(), *case.outputs.values())
        known = all(isinstance(v, np.ndarray) and v.dtype.name in KNOWN for v in values)
        if others or (node.domain, node.op_type) not in GRADIENTS or not known:
            continue
        if any(map(is_float, case.inputs.values())):
            yield case


CASES = list(node_tests())


def network_of(model, floats, dtype):
    names = [value.name for value in model.graph.output if value.name]
    initialized = onnx.ModelProto()
    initialized.CopyFrom(model)
    return Network(initialized, names, floats, dtype=dtype)


def run(network, case, tensors):
    others = {name: value for name, value in case.inputs.items() if name not in tensors}
    feeds = {name: network._kept(value) for name, value in others.items()}
    return network._evaluator.run(network.outputs, {**feeds, **tensors})


@pytest.fixture
def without_path_check(monkeypatch):
    """Node tests have outputs that no gradient reaches."""
    monkeypatch.setattr(Network, "_check_path", lambda *arguments: None)


def test_every_op_has_a_node_test_or_one_here():
    tested = {(case.model.graph.node[0].domain, case.model.graph.node[0].op_type) for case in CASES}
    # The node tests of Equal compare whole numbers.
    assert set(GRADIENTS) - tested == {*MODELS, ("", "Equal")}


def test_values_equal_those_of_onnx(without_path_check):
    compared, failed = Counter(), {}
    for case in CASES:
        node = case.model.graph.node[0]
        try:
            network = network_of(case.model, [], torch.float32)
            for name, value in zip(network.outputs, run(network, case, {}), strict=True):
                want, got = case.outputs[name], np.asarray(value)
                tolerance = 2e-2 if want.dtype == np.float16 else 1e-4
                np.testing.assert_allclose(
                    got, want.astype(got.dtype), rtol=tolerance, atol=tolerance
                )
            compared[node.op_type] += 1
        except Exception as error:
            failed[case.name] = repr(error)
    assert set(failed) - set(DIFFER) == set(), failed
    assert set(DIFFER) <= set(failed)
    assert sum(compared.values()) > 400


def smooth_cases():
    """One case of each op and set of attributes that is small enough."""
    for case in CASES:
        node = case.model.graph.node[0]
        floats = {name: v for name, v in case.inputs.items() if is_float(v)}
        size = sum(v.size for v in floats.values())
        if case.name in DIFFER or node.op_type in (*CUTTING, *UNSMOOTH) or not 0 < size <= MOST:
            continue
        usual = all(v.dtype != np.float16 and np.isfinite(v).all() for v in floats.values())
        if not usual:
            continue
        yield case, floats


def test_gradients_equal_finite_differences(without_path_check):
    checked, wrong = Counter(), {}
    for case, floats in smooth_cases():
        node = case.model.graph.node[0]
        # Statistics, sizes and scales are constants, and get no gradient.
        count = {"BatchNormalization": 3, "Resize": 1, "Upsample": 1, "Clip": 1, "Pad": 1}
        slots = list(node.input)[: count.get(node.op_type)]
        names = [name for name in floats if name in slots]
        network = network_of(case.model, names, torch.float64)

        def outputs(*tensors, network=network, case=case, names=names):
            values = run(network, case, dict(zip(names, tensors, strict=True)))
            found = tuple(v for v in values if isinstance(v, torch.Tensor) and v.requires_grad)
            assert found, case.name
            return found

        # Away from kinks at whole numbers.
        aside = np.random.default_rng(0)
        tensors = [
            torch.tensor(floats[name] + aside.uniform(0.01, 0.02, floats[name].shape))
            for name in names
        ]
        try:
            leaves = [tensor.requires_grad_() for tensor in tensors]
            checked[node.op_type] += torch.autograd.gradcheck(outputs, leaves)
        except Exception as error:
            wrong[case.name] = repr(error)[:500]
    assert not wrong, wrong
    unchecked = {op for _, op in GRADIENTS} - set(checked) - set(CUTTING) - set(UNSMOOTH)
    assert unchecked <= {op for _, op in MODELS} | set(ALSO), unchecked


def model(signature, body, domains="", more=""):
    text = f'<ir_version: 9, opset_import: ["": 18{domains}]{more}> m {signature} {{ {body} }}'
    return onnx.parser.parse_model(text)


CONTRIB = ', "com.microsoft": 1'
OURS = ', "ctonnx": 1'
UNIT = "(float[2,3,4,4] x, float[1,3,1,1] beta, float[1,3,1,1] coeff"
# Op -> a model of it; every input named here gets a gradient, where it is no bound.
MODELS = {
    ("", "GlobalLpPool"): model("(float[2,3,4,4] x) => (float y)", "y = GlobalLpPool <p = 3> (x)"),
    ("com.microsoft", "BiasGelu"): model(
        "(float[2,3] x, float[3] b) => (float y)", "y = com.microsoft.BiasGelu (x, b)", CONTRIB
    ),
    ("com.microsoft", "FastGelu"): model(
        "(float[2,3] x, float[3] b) => (float y)", "y = com.microsoft.FastGelu (x, b)", CONTRIB
    ),
    ("com.microsoft", "FusedConv"): model(
        "(float[2,3,5,5] x, float[4,3,3,3] w) => (float y)",
        'y = com.microsoft.FusedConv <activation = "Sigmoid"> (x, w)',
        CONTRIB,
    ),
    ("com.microsoft", "FusedGemm"): model(
        "(float[2,3] x, float[3,4] w) => (float y)",
        'y = com.microsoft.FusedGemm <activation = "Tanh"> (x, w)',
        CONTRIB,
    ),
    ("com.microsoft", "FusedMatMul"): model(
        "(float[2,3] x, float[4,3] w) => (float y)",
        "y = com.microsoft.FusedMatMul <transB = 1> (x, w)",
        CONTRIB,
    ),
    ("com.microsoft", "Gelu"): model(
        "(float[2,3] x) => (float y)", "y = com.microsoft.Gelu (x)", CONTRIB
    ),
    ("com.microsoft", "QuickGelu"): model(
        "(float[2,3] x) => (float y)", "y = com.microsoft.QuickGelu (x)", CONTRIB
    ),
    ("com.microsoft", "SkipLayerNormalization"): model(
        "(float[2,3,4] x, float[2,3,4] s, float[4] g) => (float y)",
        "y = com.microsoft.SkipLayerNormalization (x, s, g)",
        CONTRIB,
    ),
    ("ctonnx", "CTU"): model(
        f"{UNIT}, float[3,1,1] slope) => (float y)", "y = ctonnx.CTU (x, beta, coeff, slope)", OURS
    ),
    ("ctonnx", "CTUMax"): model(
        f"{UNIT}) => (float y) <float lo = {{-0.3}}>",
        "y = ctonnx.CTUMax (x, beta, coeff, lo)",
        OURS,
    ),
    ("ctonnx", "CTUMin"): model(
        f"{UNIT}) => (float y) <float hi = {{0.4}}>", "y = ctonnx.CTUMin (x, beta, coeff, hi)", OURS
    ),
    ("ctonnx", "CTUClip"): model(
        f"{UNIT}) => (float y) <float lo = {{-0.2}}, float hi = {{0.5}}>",
        "y = ctonnx.CTUClip (x, beta, coeff, lo, hi)",
        OURS,
    ),
    ("ctonnx", "CTUHardSigmoid"): model(
        f"{UNIT}) => (float y) <float a = {{0.3}}, float b = {{0.4}}, float lo = {{0}}, "
        "float hi = {1}>",
        "y = ctonnx.CTUHardSigmoid (x, beta, coeff, a, b, lo, hi)",
        OURS,
    ),
}
# Ops whose node tests are large, or lie at kinks.
ALSO = {
    "BatchNormalization": model(
        "(float[4,3,2] x, float[3] s, float[3] b) => (float y) "
        "<float[3] m = {0.1, 0.2, -0.3}, float[3] v = {0.5, 1, 2}>",
        "y = BatchNormalization (x, s, b, m, v)",
    ),
    "Cast": model("(float[2,3] x) => (float y)", "y = Cast <to = 11> (x)"),
    "CastLike": model("(float[2,3] x, float[1] t) => (float y)", "y = CastLike (x, t)"),
    "Erf": model("(float[2,3] x) => (float y)", "y = Erf (x)"),
    "Flatten": model("(float[2,3,2] x) => (float y)", "y = Flatten (x)"),
    "LRN": model("(float[1,4,2,2] x) => (float y)", "y = LRN <size = 3> (x)"),
    "Mish": model("(float[2,3] x) => (float y)", "y = Mish (x)"),
    "Slice": model(
        "(float[4,5] x) => (float y) <int64[2] b = {3, 1}, int64[2] e = {-9, 4}, "
        "int64[2] a = {0, 1}, int64[2] s = {-2, 1}>",
        "y = Slice (x, b, e, a, s)",
    ),
    "Abs": model("(float[2,3] x) => (float y)", "y = Abs (x)"),
    "Clip": model("(float[4,3] x) => (float y) <float lo = {-0.5}>", "y = Clip (x, lo)"),
    "MaxPool": model(
        "(float[1,2,6,6] x) => (float y)",
        "y = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (x)",
    ),
    "MaxPool with indices": model(
        "(float[1,2,6,6] x) => (float y, int64 i)", "y, i = MaxPool <kernel_shape = [2, 2]> (x)"
    ),
    "Pow": model("(float[2,3] x) => (float y) <float p = {3}>", "y = Pow (x, p)"),
    "ReduceMax": model("(float[2,3] x) => (float y)", "y = ReduceMax (x)"),
    "ReduceMin": model("(float[2,3] x) => (float y)", "y = ReduceMin (x)"),
    "Resize": model(
        "(float[1,2,3,3] x) => (float y) <float[4] s = {1, 1, 2, 1.5}>",
        'y = Resize <mode = "linear"> (x, , s)',
    ),
}


@pytest.mark.parametrize(
    "each", [*MODELS.values(), *ALSO.values()], ids=[*(op for _, op in MODELS), *ALSO]
)
def test_gradients_of_other_ops(each):
    rng = np.random.default_rng(0)
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in each.graph.input
    }
    tensors = {
        name: torch.from_numpy(
            rng.normal(size=shape) if len(name) == 1 else rng.uniform(0.1, 0.9, shape)
        )
        for name, shape in shapes.items()
    }
    network = Network(each, ["y"], set(shapes), dtype=torch.float64)

    def output(*values):
        return network._evaluator.run(["y"], dict(zip(shapes, values, strict=True)))[0]

    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(output, leaves)


@pytest.mark.parametrize("op", [op for domain, op in MODELS if domain == ctu.DOMAIN])
def test_our_ops_equal_the_paper_formula(op):
    """That of the reference run, which has another form."""
    from ctonnx.check.reference import Reference

    each = MODELS[ctu.DOMAIN, op]
    rng = np.random.default_rng(1)
    feeds = {
        value.name: rng.uniform(0.05, 0.95, [d.dim_value for d in value.type.tensor_type.shape.dim])
        for value in each.graph.input
    }
    feeds["x"] = rng.normal(scale=2, size=feeds["x"].shape)
    network = Network(each, ["y"], set(feeds) - {"x"}, dtype=torch.float64)
    trained = {name: torch.from_numpy(v) for name, v in feeds.items() if name != "x"}
    got = network.run({"x": feeds["x"]}, trained)["y"].numpy()
    np.testing.assert_allclose(got, Reference(each).run(feeds)["y"], rtol=1e-12, atol=1e-12)


def test_an_op_without_gradient_on_the_path_is_named():
    each = model(
        "(float[2,3] x, float[3] b) => (float y)", "a = Add (x, b) r = Round (a) y = Mul (r, r)"
    )
    with pytest.raises(UsageError, match=r"Round 'r' has no gradient here, and lies between"):
        Network(each, ["y"], ["b"])
    # In front of what is trained it does not matter.
    each = model("(float[2,3] x, float[3] b) => (float y)", "r = Round (x) y = Add (r, b)")
    x = np.float32([[0.4, 1.6, 2.4]])
    y = Network(each, ["y"], ["b"]).run({"x": x}, {"b": torch.ones(3)})["y"]
    np.testing.assert_array_equal(y, [[1, 3, 3]])


def test_sizes_and_conditions_pass_no_gradient_and_are_no_obstacle():
    each = model(
        "(float[2,3] x, float[3] b) => (float y)",
        "a = Add (x, b) s = Shape (a) z = ConstantOfShape (s) c = Greater (a, z) "
        "w = Where (c, a, z) y = Reshape (w, s)",
    )
    b = torch.tensor([0.5, -9.0, 0.5], requires_grad=True)
    Network(each, ["y"], ["b"]).run({"x": np.ones((2, 3), np.float32)}, {"b": b})[
        "y"
    ].sum().backward()
    assert b.grad is not None
    assert b.grad.tolist() == [2, 0, 2]


def test_an_output_that_only_a_condition_reaches_is_refused():
    each = model(
        "(float[2,3] x, float[3] b) => (float y)",
        "a = Add (x, b) c = Greater (a, x) y = Cast <to = 1> (c)",
    )
    with pytest.raises(UsageError, match="training would change nothing there"):
        Network(each, ["y"], ["b"])


def test_what_fails_is_named_without_the_remedy_of_validate():
    each = model("(float[2,3] x, float[4] b) => (float y)", "y = Add (x, b)")
    with pytest.raises(ModelError, match=r"the run failed at Add 'y': .*size of tensor") as caught:
        Network(each, ["y"], ["b"]).run({"x": np.ones((2, 3), np.float32)}, {"b": torch.ones(4)})
    assert "--against" not in str(caught.value)
