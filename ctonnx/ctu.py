"""The op `ctonnx::CTU`: its names, its formula in float64 and the same as an ONNX function.

Source of the formula: Hu, Gamba, Balestriero, "Curvature Tuning", arXiv 2502.07783, with the
epsilon of its authors' code. `custom_ops/ctu_math.h` is the same in C++.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike
from onnx import FunctionProto, NodeProto, TensorProto, helper

from .errors import UsageError

DOMAIN = "ctonnx"
OP_TYPE = "CTU"
VERSION = 1

# The op, and those that call it: `kinked_function`.
OPS = (OP_TYPE, "CTUMax", "CTUMin", "CTUClip", "CTUHardSigmoid")
EPSILON = 1e-6

# Default c: the two smooth versions of ReLU in equal parts.
COEFF = 0.5

FLOATING: tuple[int, ...] = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
)

# The numeric contract: the largest error / max(1, |Y|) by the type of X, for |X| up to 1e4, in the
# kernels and, for beta from 0.3 on, in `function`. Half types add one rounding.
BOUNDS: dict[int, float] = {**dict.fromkeys(FLOATING, 2.5e-7), TensorProto.DOUBLE: 4e-15}
FALLBACK_FROM_BETA = 0.3
LOW_FALLBACK_BOUNDS: dict[int, float] = {
    **dict.fromkeys(FLOATING, 4e-7),
    TensorProto.DOUBLE: 4e-15,
}


def check_unit_interval(name: str, value: object) -> float:
    """Return `value` as float, or raise UsageError when it is not a number in [0, 1]."""
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number in [0, 1], got {value!r}") from None
    if not 0.0 <= number <= 1.0:
        raise UsageError(f"{name} must lie in [0, 1], got {number!r}")
    return number


def ctu(
    x: ArrayLike, beta: ArrayLike, coeff: ArrayLike = COEFF, slope: ArrayLike = 0.0
) -> np.ndarray:
    """The CT unit in float64: the oracle that every implementation is tested against.

    Args:
        x: array of any shape, the pre-activation.
        beta, coeff: scalars or arrays that broadcast to `x`, in [0, 1].
        slope: slope of the negative side, scalar or array that broadcasts to `x`.

    Returns:
        float64 array of the shape of `x`:
        P(x) + sgn(1-a) * s * r(|1-a| * |x| / s), with s = 1 - beta + 1e-6, a = slope,
        P(x) = x where x >= 0 and a * x elsewhere, and
        r(u) = (1-c) * log1p(exp(-u)) - c * u * sigmoid(-beta * u).

    >>> float(ctu(-1.0, beta=1.0))
    0.0
    >>> round(float(ctu(-1.0, beta=0.85)), 6)
    -0.001629
    """
    x, beta, coeff, slope = (np.asarray(v, np.float64) for v in (x, beta, coeff, slope))
    s = 1.0 - beta + EPSILON
    gap = 1.0 - slope
    with np.errstate(over="ignore", invalid="ignore"):
        distance = np.abs(gap) * np.abs(x)
        log_term = (1.0 - coeff) * s * np.log1p(np.exp(-distance / s))
        gate_term = coeff * distance / (1.0 + np.exp(beta / s * distance))
        correction = np.where(np.isinf(x), 0.0, np.sign(gap) * (log_term - gate_term))
        negative = np.where(slope == 0.0, 0.0, slope * x)
    # NaN < 0 is false, so NaN passes through.
    return np.where(x < 0.0, negative, x) + correction


class _Body:
    """The nodes of a function body, each of which makes one tensor."""

    def __init__(self, opset: int):
        self.opset = opset
        self.nodes = []

    def op(
        self,
        op_type: str,
        *inputs: str,
        output: str | None = None,
        domain: str | None = None,
        **attributes,
    ) -> str:
        """Append a node, and return the name of its output."""
        output = output or f"v{len(self.nodes)}"
        if self.opset < 7 and not domain and len(inputs) == 2:
            # The second input is the smaller one throughout.
            attributes["broadcast"] = 1
        if self.opset < 6 and op_type == "Cast":
            attributes["to"] = TensorProto.DataType.Name(attributes["to"])
        node = helper.make_node(op_type, inputs, [output], domain=domain, **attributes)
        self.nodes.append(node)
        return output

    def constant(self, value: float, dtype: int) -> str:
        return self.op("Constant", value=helper.make_tensor("", dtype, [], [value]))


def function(opset: int, dtypes: Iterable[int], sloped: bool) -> FunctionProto:
    """The op as a model-local function of standard ops, for where no kernel is registered.

    Args:
        opset: the model's own opset of the default domain. Before 7 only scalar parameters
            broadcast.
        dtypes: the TensorProto element types of the function's X over all call sites, UNDEFINED
            for one that is not known. float16 and bfloat16 are computed in float32; an unknown
            type, or more than one, needs opset 15 (CastLike).
        sloped: whether the call sites pass the input `slope`.

    Returns:
        FunctionProto (X, beta, coeff[, slope]) -> Y. Its error against the exact formula is that of
        BOUNDS for beta >= 0.3, and of LOW_FALLBACK_BOUNDS below.
    """
    # Less is the only comparison used: jaxonnxruntime has no other.
    dtypes = set(dtypes)
    compute = TensorProto.DOUBLE if TensorProto.DOUBLE in dtypes else TensorProto.FLOAT
    body = _Body(opset)
    op = body.op

    def constant(value):
        return body.constant(value, compute)

    def computed(name, types):
        return name if types == {compute} else op("Cast", name, to=compute)

    x = computed("X", dtypes)
    beta = computed("beta", {TensorProto.FLOAT})
    coeff = computed("coeff", {TensorProto.FLOAT})
    one = constant(1.0)
    s = op("Add", op("Sub", one, beta), constant(EPSILON))
    inverse = op("Div", one, s)
    distance = op("Abs", x)
    original = op("Relu", x)
    if sloped:
        slope = computed("slope", dtypes)
        gap = op("Sub", one, slope)
        # A gap of 0 becomes one too small to matter: 0 * inf would be NaN.
        distance = op("Mul", distance, op("Add", op("Abs", gap), constant(1e-30)))
        # Relu rather than PRelu, which runtimes have for fewer types.
        negative = op("Mul", op("Relu", op("Neg", x)), slope)
        zero = constant(0.0)
        if opset >= 9:
            # Once more, for slope 0 and X = -inf.
            negative = op("Where", op("Less", zero, op("Abs", slope)), negative, zero)
        original = op("Sub", original, negative)
    # inf / inf would be NaN, so the gate's distance stays finite; the log term carries NaN.
    largest = float(np.finfo(np.float32).max)
    if opset >= 9:
        beyond = op("Less", constant(largest), distance)
        finite = op("Where", beyond, constant(0.0), distance)
    else:
        finite = op("Clip", distance, max=largest)
    decay = op("Exp", op("Neg", op("Mul", distance, inverse)))
    log_term = op("Mul", op("Log", op("Add", decay, one)), op("Mul", op("Sub", one, coeff), s))
    growth = op("Exp", op("Mul", finite, op("Mul", beta, inverse)))
    gate_term = op("Div", op("Mul", finite, coeff), op("Add", growth, one))
    correction = op("Sub", log_term, gate_term)
    if sloped:
        above, below = op("Less", zero, gap), op("Less", gap, zero)
        sign = op("Sub", op("Cast", above, to=compute), op("Cast", below, to=compute))
        correction = op("Mul", correction, sign)
    if dtypes == {compute}:
        op("Add", original, correction, output="Y")
    elif len(dtypes) == 1 and TensorProto.UNDEFINED not in dtypes:
        op("Cast", op("Add", original, correction), output="Y", to=next(iter(dtypes)))
    else:
        op("CastLike", op("Add", original, correction), "X", output="Y")
    return helper.make_function(
        DOMAIN,
        OP_TYPE,
        ["X", "beta", "coeff", "slope"] if sloped else ["X", "beta", "coeff"],
        ["Y"],
        body.nodes,
        [helper.make_opsetid("", opset)],
        doc_string="Curvature Tuning unit (arXiv 2502.07783) of beta and c in [0, 1].",
    )


def kinked_function(op_type: str, opset: int, sloped: bool) -> FunctionProto:
    """One of our ops that call `ctonnx::CTU`, as a model-local function.

    `rewriting.activations` has their formulas.

    Args:
        op_type: one of OPS, but for CTU itself.
        opset: of the default domain.
        sloped: whether the function of `ctonnx::CTU` in the same model takes a slope.

    Returns:
        FunctionProto (X, beta, coeff, operands) -> Y.
    """
    body = _Body(opset)
    op = body.op

    def kink(x, bound):
        below = op("Neg", op("Abs", op("Sub", x, bound)))
        slope = [op("Sub", bound, bound)] if sloped else []  # 0, in X's element type
        return op(OP_TYPE, below, "beta", "coeff", *slope, domain=DOMAIN)

    # Before opset 8 Max and Min did not broadcast.
    def at_least(x, lo):
        return op("Max", x, lo) if opset >= 8 else op("Add", op("Relu", op("Sub", x, lo)), lo)

    def at_most(x, hi):
        if opset >= 8:
            return op("Min", x, hi)
        return op("Add", op("Neg", op("Relu", op("Neg", op("Sub", x, hi)))), hi)

    if op_type == "CTUMax":
        operands = ["lo"]
        op("Add", at_least("X", "lo"), kink("X", "lo"), output="Y")
    elif op_type == "CTUMin":
        operands = ["hi"]
        op("Sub", at_most("X", "hi"), kink("X", "hi"), output="Y")
    elif op_type == "CTUClip":
        operands = ["lo", "hi"]
        clipped = at_most(at_least("X", "lo"), "hi")
        op("Sub", op("Add", clipped, kink("X", "lo")), kink("X", "hi"), output="Y")
    else:
        operands = ["alpha", "offset", "lo", "hi"]
        line = op("Add", op("Mul", "X", "alpha"), "offset")
        op("CTUClip", line, "beta", "coeff", "lo", "hi", output="Y", domain=DOMAIN)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)]
    inputs = ["X", "beta", "coeff", *operands]
    return helper.make_function(DOMAIN, op_type, inputs, ["Y"], body.nodes, imports)


def is_ctu(proto: NodeProto | FunctionProto) -> bool:
    """Whether a NodeProto, or FunctionProto, is an op of ours: CTU or one that calls it."""
    name = proto.name if isinstance(proto, FunctionProto) else proto.op_type
    return proto.domain == DOMAIN and name in OPS
