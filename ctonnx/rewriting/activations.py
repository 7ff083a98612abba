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
large X and without its NaN for an infinite one. They are ops of ours as well, each with a kernel
and a model-local function: see ctu.kinked_function.

Two nodes that bound X from below and from above, such as Min(Relu(X), hi), are the Clip that they
compute.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, helper

from .. import ctu
from ..model.graph import DEFAULT_DOMAINS, Scope, keep

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


def _relu(node: NodeProto, scope: Scope) -> Judgement:
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


def _leaky_relu(node: NodeProto, scope: Scope) -> Judgement:
    return Steering(ctu.OP_TYPE, node.input[0], tuple(_attributes(node)))


def _prelu(node: NodeProto, scope: Scope) -> Judgement:
    # A single number broadcasts at every opset.
    slope = scope.constant(node.input[1])
    return Steering(ctu.OP_TYPE, node.input[0], (node.input[1] if slope is None else slope,))


def _clip(node: NodeProto, scope: Scope) -> Judgement:
    bounds = _attributes(node)
    operands = list(bounds)
    for index, name in enumerate(node.input[1:3]):
        if name:
            bounds[index], operands[index] = scope.constant(name), name
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


def _with_zero(node: NodeProto, scope: Scope) -> Judgement:
    """Max or Min is an activation against 0 alone; elsewhere it is arithmetic, and not reported."""
    for zero, x in _orders(node):
        if scope.constant(zero) == 0:
            if not keeps_shape(scope, x, zero):
                return Steering(f"CTU{node.op_type}", x, (zero,))
            if node.op_type == "Max":
                return Steering(ctu.OP_TYPE, x)
            return Steering("CTUMin", x, (0.0,))
    if any(scope.lies_in_a_file(bound) for bound, _ in _orders(node)):
        return "its bound lies in another file, which is not at hand: give the model's path"
    return None


def _orders(node: NodeProto) -> Iterator[tuple[str, str]]:
    """The inputs of a Max or Min of two, in both orders: one of them may be a bound."""
    if len(node.input) == 2:
        first, second = node.input
        yield from ((first, second), (second, first))


def keeps_shape(scope: Scope, x: str, bound: str | float) -> bool:
    """Whether x surely keeps its shape in Max or Min with a bound of one number, which may have a
    dimension more."""
    if not isinstance(bound, str) or scope.shapes.get(bound) == []:
        return True
    return bool(scope.shapes.get(x))


@dataclass(frozen=True)
class _Bound:
    """A node that bounds x from one side, by `operand`, as in Steering, which has the `value`.
    `alone` tells whether it is an activation by itself."""

    x: str
    operand: str | float
    value: float
    upper: bool
    alone: bool


def _one_bound(node: NodeProto, scope: Scope) -> _Bound | None:
    """What a node bounds, where it bounds one tensor by one constant and does nothing else."""
    if node.domain not in DEFAULT_DOMAINS or _unusual(node) or not any(node.output[:1]):
        return None
    if node.op_type in ("Max", "Min"):
        for bound, x in _orders(node):
            value = scope.constant(bound)
            if value is not None and x:
                return _Bound(x, bound, value, node.op_type == "Min", alone=value == 0)
    elif node.op_type in ("Relu", "Clip") and any(node.input[:1]):
        steering = STEERABLE[node.op_type](node, scope)
        if not isinstance(steering, Steering) or steering.op_type == "CTUClip":
            return None
        operand = (*steering.operands, 0.0)[0]
        value = scope.constant(operand) if isinstance(operand, str) else operand
        if value is not None:
            return _Bound(steering.x, operand, value, steering.op_type == "CTUMin", alone=True)
    return None


def as_clip(inner: NodeProto, outer: NodeProto, scope: Scope) -> Steering | None:
    """The Clip that two nodes make up, where `outer` reads what `inner` gives; or None.

    Its X is that of `inner`, and its bounds are finite and may be those of a Clip. Two activations,
    such as two Clips with a bound each, stay two.
    """
    below, above = _one_bound(inner, scope), _one_bound(outer, scope)
    if below is None or above is None or above.x != inner.output[0]:
        return None
    if below.alone and above.alone:
        return None
    x = below.x
    if below.upper:
        below, above = above, below
    if below.upper or not above.upper:
        return None
    bounds = below.value, above.value
    if bounds_that_bend(*bounds) != bounds:
        return None
    return Steering("CTUClip", x, (below.operand, above.operand))


def _hard_sigmoid(node: NodeProto, scope: Scope) -> Judgement:
    return Steering("CTUHardSigmoid", node.input[0], (*_attributes(node), 0.0, 1.0))


# op type -> what judges a node of that type.
STEERABLE = {
    "Relu": _relu,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "Max": _with_zero,
    "Min": _with_zero,
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

# The attributes that name the activations inside an op, and what their absence stands for.
_PARTS = ("activation", "activations", "activation_type")
_DEFAULT_PARTS = {("com.microsoft", op): "relu" for op in ("MoE", "QMoE", "ShardedMoE")}
# In the names of activations with a kink, without case and "_".
_KINKED = ("relu", "clip", "hardsigmoid")

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


def clips_at_zero(node: NodeProto, scope: Scope, producers: Mapping[str, NodeProto]) -> str | None:
    """The reason why the Relu that quantization absorbed into a node's range cannot be steered;
    None where there is none: the range goes below 0, or the input comes from no affine op.

    Args:
        producers: output name -> node, of the nodes around.
    """
    if node.op_type not in _QUANTIZING or node.domain not in (*DEFAULT_DOMAINS, "com.microsoft"):
        return None
    position = _QUANTIZING[node.op_type]
    x, name = (*node.input[:1], "")[0], (*node.input[position : position + 1], "")[0]
    producer = producers.get(x)
    affine = producer is not None and producer.op_type in _AFFINE
    if node.op_type == "QuantizeLinear" and not affine:
        return None
    zero = scope.constant(name) if name else 0
    dtypes = scope.types.get(name or (*node.output, "")[0], {TensorProto.UINT8})
    lowest = {_LOWEST[dtype] for dtype in dtypes if dtype in _LOWEST}
    return _TAKEN_IN if zero in lowest else None


def judge(node: NodeProto, dtypes: Iterable[int], scope: Scope) -> Judgement:
    """Judge a node.

    Args:
        dtypes: the element types of its tensor, none where they are unknown.
        scope: the typed Scope around it.

    Returns:
        Steering, the reason why the node is left alone, or None for a node that is no activation.
    """
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
    if not node.output or not node.output[0]:
        return None
    if (domain, node.op_type) in LEFT_ALONE:
        return LEFT_ALONE[domain, node.op_type]
    if domain or node.op_type not in STEERABLE:
        return f"it is part of {node.op_type}" if _has_kinked_part(node) else None
    needed = 2 if node.op_type == "PRelu" else 1
    if len(node.input) < needed or not all(node.input[:needed]):
        return "it lacks an input"
    if any(a.ref_attr_name for a in node.attribute):
        return "it has an attribute of the function around it"
    if _unusual(node):
        return "it has a subgraph, which no activation has"
    steering = STEERABLE[node.op_type](node, scope)
    if not isinstance(steering, Steering):
        return steering
    wrong = set(dtypes) - set(ctu.FLOATING)
    if wrong:
        # Max and Min of integers, and Clip, are arithmetic on sizes and indices.
        if "Relu" not in node.op_type:
            return None
        return f"its tensor is {_type_name(wrong.pop())}, not floating-point"
    return steering


def _unusual(node: NodeProto) -> bool:
    """Whether a node has an attribute that an activation cannot have, or that calls give it."""
    return any(a.ref_attr_name or a.HasField("g") or a.graphs for a in node.attribute)


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


def pass_on(node: NodeProto, x: str) -> None:
    """Let a node that bounds `x`, or has a bound fused into it, give it without that bound."""
    if unfused(node) is not None:
        take_out(node, node.output[0])
        return
    node.op_type = "Identity"
    del node.attribute[:], node.input[:]
    node.input.append(x)


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


def _has_kinked_part(node: NodeProto) -> bool:
    """Whether an attribute names an activation with a kink that `unfused` cannot take out, as those
    of RNN and MoE."""
    if (node.domain, node.op_type) in FUSED:
        return False
    parts = []
    for name in _PARTS:
        parts.append(attribute(node, name, "", AttributeProto.STRING))
        values = attribute(node, name, [], AttributeProto.STRINGS)
        parts.extend(value.decode(errors="replace") for value in values)
    if not any(parts):
        parts = [_DEFAULT_PARTS.get((node.domain, node.op_type), "")]
    parts = [part.lower().replace("_", "") for part in parts]
    return any(kinked in part for part in parts for kinked in _KINKED)
