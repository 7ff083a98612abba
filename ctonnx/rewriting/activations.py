"""Which ONNX nodes the CTU can steer, how it expresses each, and why it leaves the others alone.

CTU0 below is the op `ctonnx::CTU` without a slope. A piecewise-affine activation is lines joined at
kinks, and CTU0(-|d|) is what smoothing adds at a kink where two lines differ by d = X - bound:

    Relu                    CTU0(X)
    LeakyRelu, PRelu        CTU(X) with their slope
    Max(X, lo)              Max(X, lo) + CTU0(-|X - lo|)
    Min(X, hi)              Min(X, hi) - CTU0(-|X - hi|)
    Clip(X, lo, hi)         Clip(X, lo, hi) + CTU0(-|X - lo|) - CTU0(-|X - hi|)
    HardSigmoid             the Clip of alpha * X + beta to [0, 1]

The last four equal lo + CTU0(X - lo) - CTU0(X - hi) and the like, without its cancellation for a
large X and without its NaN for an infinite one. They are ops of ours as well, each with a
model-local function that calls `ctonnx::CTU`: see ctu.kinked_function.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper

from .. import ctu
from ..model.graph import DEFAULT_DOMAINS, keep

# Ops that ONNX Runtime's optimiser writes with an activation in their attributes.
FUSED = {
    ("com.microsoft", "FusedConv"),
    ("com.microsoft", "FusedGemm"),
    ("com.microsoft", "NhwcFusedConv"),
    ("com.microsoft.nchwc", "Conv"),
}


@dataclass(frozen=True)
class Steering:
    """What a node becomes: an op of ours with inputs x, beta, coeff and `operands`.

    Operands are names of tensors, or numbers that become initializers of X's element type.
    """

    op_type: str
    x: str
    operands: tuple[str | float, ...] = ()

    @property
    def sloped(self) -> bool:
        return self.op_type == ctu.OP_TYPE and bool(self.operands)


# A Steering, the reason why a node is left alone, or None for a node that is no activation.
Judgement = Steering | str | None

# Gives the value of a tensor by name where that is a scalar constant, or None.
Constant = Callable[[str], float | None]


def _relu(node: NodeProto, constant: Constant) -> Judgement:
    return Steering(ctu.OP_TYPE, node.input[0])


# The attributes of activations in the order of `activation_params`, and their float32 defaults.
_ATTRIBUTES = {
    "LeakyRelu": {"alpha": float(np.float32(0.01))},
    "HardSigmoid": {"alpha": float(np.float32(0.2)), "beta": 0.5},
    "Clip": {"min": None, "max": None},
}


def _attributes(node: NodeProto) -> list:
    """The values of a node's attributes, in order."""
    return [attribute(node, *item) for item in _ATTRIBUTES[node.op_type].items()]


def _leaky_relu(node: NodeProto, constant: Constant) -> Judgement:
    return Steering(ctu.OP_TYPE, node.input[0], tuple(_attributes(node)))


def _prelu(node: NodeProto, constant: Constant) -> Judgement:
    # A single number broadcasts at every opset.
    slope = constant(node.input[1])
    return Steering(ctu.OP_TYPE, node.input[0], (node.input[1] if slope is None else slope,))


def _clip(node: NodeProto, constant: Constant) -> Judgement:
    bounds = _attributes(node)
    operands = list(bounds)
    for index, name in enumerate(node.input[1:3]):
        if name:
            bounds[index], operands[index] = constant(name), name
            if bounds[index] is None:
                return "its bounds are computed at run time, or lie in another file"
    x, bending = node.input[0], bounds_that_bend(*bounds)
    if isinstance(bending, str):
        return bending
    lo, hi = bending
    if hi is None:
        return Steering(ctu.OP_TYPE, x) if lo == 0 else Steering("CTUMax", x, (operands[0],))
    if lo is None:
        return Steering("CTUMin", x, (operands[1],))
    return Steering("CTUClip", x, tuple(operands))


def bounds_that_bend(lo: float | None, hi: float | None) -> tuple[float | None, float | None] | str:
    """The bounds of a Clip, with None for those that bound nothing; or the reason why the Clip is
    left alone."""
    lo, hi = (None if b is None or bounds_nothing(b) else b for b in (lo, hi))
    if lo is None and hi is None:
        return "it has no bounds"
    if lo is not None and hi is not None and not lo < hi:
        return "its bounds leave no room between them"
    if lo is not None and 0 < lo < 1e-3:
        return f"it guards against numbers under {lo:g}, which is arithmetic"
    return lo, hi


def bounds_nothing(bound: float) -> bool:
    """Whether a bound of a Clip is as good as none: exporters write the largest number then."""
    return not abs(bound) <= 3.4e38


def _max(node: NodeProto, constant: Constant) -> Judgement:
    return _with_zero(node, constant, lambda x: Steering(ctu.OP_TYPE, x))


def _min(node: NodeProto, constant: Constant) -> Judgement:
    return _with_zero(node, constant, lambda x: Steering("CTUMin", x, (0.0,)))


def _with_zero(
    node: NodeProto, constant: Constant, steering: Callable[[str], Steering]
) -> Judgement:
    """Max or Min is an activation against 0 alone; elsewhere it is arithmetic, and not reported."""
    for zero, x in (node.input, reversed(node.input)) if len(node.input) == 2 else ():
        if constant(zero) == 0:
            return steering(x)
    return None


def _hard_sigmoid(node: NodeProto, constant: Constant) -> Judgement:
    return Steering("CTUHardSigmoid", node.input[0], (*_attributes(node), 0.0, 1.0))


# op type -> what judges a node of that type.
STEERABLE = {
    "Relu": _relu,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "Max": _max,
    "Min": _min,
}

_SMOOTH = "already smooth: nothing to steer"
_JUMPS = "it jumps, and the CTU smooths kinks alone"
_SMOOTH_OPS = "Celu Elu Gelu HardSwish Mish Selu Sigmoid Softplus Softsign Swish Tanh"
_CONTRIB_SMOOTH_OPS = "BiasGelu FastGelu Gelu QuickGelu"
_QUANTIZED_OPS = "QLinearLeakyRelu QLinearSigmoid"

# (domain, op type) -> the reason.
LEFT_ALONE = {
    **{("", op): _SMOOTH for op in _SMOOTH_OPS.split()},
    **{("com.microsoft", op): _SMOOTH for op in _CONTRIB_SMOOTH_OPS.split()},
    **{("com.microsoft", op): "it computes on integers" for op in _QUANTIZED_OPS.split()},
    ("", "ThresholdedRelu"): _JUMPS,
    ("", "Shrink"): _JUMPS,
}

_RECURRENT = ("RNN", "GRU", "LSTM")

# Ops that quantize their output -> the position of its zero point. QuantizeLinear quantizes the
# output of another op: where that is an affine one, clipping at 0 comes from a Relu.
_QUANTIZING = {
    "QuantizeLinear": 2,
    "QLinearAdd": 7,
    "QLinearConv": 7,
    "QLinearMatMul": 7,
    "QGemm": 8,
}
_AFFINE = {"Add", "BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul", "Sub", "Sum"}
_LOWEST: dict[int, int] = {
    TensorProto.UINT8: 0,
    TensorProto.INT8: -(1 << 7),
    TensorProto.UINT16: 0,
    TensorProto.INT16: -(1 << 15),
}
_TAKEN_IN = "its range starts at 0, as quantization absorbed a Relu: steer before quantizing"


def clips_at_zero(
    node: NodeProto,
    types: Mapping[str, set[int]],
    constant: Constant,
    producers: Mapping[str, str],
) -> str | None:
    """The reason why the Relu that quantization absorbed into a node's range cannot be steered;
    None where there is none: the range goes below 0, or the input comes from no affine op.

    Args:
        types: element types by tensor name, as Scope.types.
        constant: gives the value of a scalar constant by name, or None.
        producers: output name -> op type of the nodes around.
    """
    if node.op_type not in _QUANTIZING or node.domain not in (*DEFAULT_DOMAINS, "com.microsoft"):
        return None
    position = _QUANTIZING[node.op_type]
    x, name = (*node.input[:1], "")[0], (*node.input[position : position + 1], "")[0]
    if node.op_type == "QuantizeLinear" and producers.get(x) not in _AFFINE:
        return None
    zero = constant(name) if name else 0
    dtypes = types.get(name or (*node.output, "")[0], {TensorProto.UINT8})
    lowest = {_LOWEST[dtype] for dtype in dtypes if dtype in _LOWEST}
    return _TAKEN_IN if zero in lowest else None


def judge(node: NodeProto, dtypes: Iterable[int], constant: Constant) -> Judgement:
    """Judge a node.

    Args:
        dtypes: the element types of its tensor, none where they are unknown.
        constant: gives the value of a scalar constant by name, or None.

    Returns:
        Steering, the reason why the node is left alone, or None for a node that is no activation.
    """
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    if not node.output or not node.output[0]:
        return None
    if (domain, node.op_type) in LEFT_ALONE:
        return LEFT_ALONE[domain, node.op_type]
    if not domain and node.op_type in _RECURRENT:
        return f"it is part of {node.op_type}" if _holds_relu(node, "activations") else None
    if domain or node.op_type not in STEERABLE:
        return None
    needed = 2 if node.op_type == "PRelu" else 1
    if len(node.input) < needed or not all(node.input[:needed]):
        return "it lacks an input"
    if any(a.ref_attr_name for a in node.attribute):
        return "it has an attribute of the function around it"
    if any(a.HasField("g") or a.graphs for a in node.attribute):
        return "it has a subgraph, which no activation has"
    steering = STEERABLE[node.op_type](node, constant)
    if not isinstance(steering, Steering):
        return steering
    wrong = set(dtypes) - set(ctu.FLOATING)
    if wrong:
        # Max and Min of integers, and Clip, are arithmetic on sizes and indices.
        if "Relu" not in node.op_type:
            return None
        return f"its tensor is {_type_name(wrong.pop())}, not floating-point"
    return steering


def _type_name(dtype: int) -> str:
    try:
        return TensorProto.DataType.Name(dtype).lower()
    except ValueError:
        return f"of the unknown type {dtype}"


def unfused(node: NodeProto) -> NodeProto | None:
    """The activation inside a fused node as a node of its own, or None where there is none."""
    if (node.domain, node.op_type) not in FUSED or not node.output:
        return None
    op_type = attribute(node, "activation", "", AttributeProto.STRING)
    if not op_type:
        return None
    names = _ATTRIBUTES.get(op_type, {})
    # FusedGemm has an attribute for each, the others one list.
    numbers = attribute(node, "activation_params", [], AttributeProto.FLOATS)
    values = dict(zip(names, numbers, strict=False))
    values |= {name: attribute(node, f"activation_{name}", values.get(name)) for name in names}
    values = {name: value for name, value in values.items() if value is not None}
    return helper.make_node(op_type, [node.output[0]], [node.output[0]], **values)


def take_out(node: NodeProto, output: str) -> None:
    """Remove the activation that is fused into a node, which then computes `output`."""
    node.output[0] = output
    keep(node.attribute, lambda attribute: not attribute.name.startswith("activation"))
    if node.op_type == "FusedGemm":
        node.op_type, node.domain = "Gemm", ""


def attribute(node: NodeProto, name: str, default: Any, kind: int = AttributeProto.FLOAT) -> Any:
    """The value of a node's attribute of an AttributeProto type; `default` where there is none, or
    where it refers to the function around it."""
    for proto in node.attribute:
        if proto.name == name and proto.type == kind and not proto.ref_attr_name:
            value = helper.get_attribute_value(proto)
            if kind == AttributeProto.STRING:
                return value.decode(errors="replace")
            return value
    return default


def _holds_relu(node: NodeProto, name: str) -> bool:
    return any(b"Relu" in value for value in attribute(node, name, [], AttributeProto.STRINGS))
