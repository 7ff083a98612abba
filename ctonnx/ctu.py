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

# The op, and those with kinks elsewhere than at 0: `kinked_function`.
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

    # Before opset 8 Max and Min did not broadcast.
    def at_least(self, x: str, lo: str) -> str:
        if self.opset >= 8:
            return self.op("Max", x, lo)
        return self.op("Add", self.op("Relu", self.op("Sub", x, lo)), lo)

    def at_most(self, x: str, hi: str) -> str:
        if self.opset >= 8:
            return self.op("Min", x, hi)
        below = self.op("Relu", self.op("Neg", self.op("Sub", x, hi)))
        return self.op("Add", self.op("Neg", below), hi)

    def widened(self, name: str, dtypes: set[int], compute: int) -> str:
        """A tensor of one of `dtypes`, in the type `compute`."""
        return name if dtypes == {compute} else self.op("Cast", name, to=compute)

    def narrowed(self, name: str, dtypes: set[int]) -> str:
        """Make Y of a tensor, in the type of X, which is one of `dtypes`."""
        if len(dtypes) == 1 and TensorProto.UNDEFINED not in dtypes:
            return self.op("Cast", name, output="Y", to=next(iter(dtypes)))
        return self.op("CastLike", name, "X", output="Y")


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
    dtypes = set(dtypes)
    compute = _compute_type(dtypes)
    body = _Body(opset)
    x = body.widened("X", dtypes, compute)
    beta = body.widened("beta", {TensorProto.FLOAT}, compute)
    coeff = body.widened("coeff", {TensorProto.FLOAT}, compute)
    slope = body.widened("slope", dtypes, compute) if sloped else None
    original, correction = _unit(body, compute, x, beta, coeff, slope)
    if dtypes == {compute}:
        body.op("Add", original, correction, output="Y")
    else:
        body.narrowed(body.op("Add", original, correction), dtypes)
    return helper.make_function(
        DOMAIN,
        OP_TYPE,
        ["X", "beta", "coeff", "slope"] if sloped else ["X", "beta", "coeff"],
        ["Y"],
        body.nodes,
        [helper.make_opsetid("", opset)],
        doc_string="Curvature Tuning unit (arXiv 2502.07783) of beta and c in [0, 1].",
    )


def _compute_type(dtypes: set[int]) -> int:
    """The element type that a function of several element types computes in."""
    return TensorProto.DOUBLE if TensorProto.DOUBLE in dtypes else TensorProto.FLOAT


def _unit(
    body: _Body, compute: int, x: str, beta: str, coeff: str, slope: str | None = None
) -> tuple[str, str]:
    """Append the CT unit of tensors of the type `compute`; the names of P(x) and of what is added
    to it."""
    # Less is the only comparison used: jaxonnxruntime has no other.
    op, opset = body.op, body.opset

    def constant(value):
        return body.constant(value, compute)

    one = constant(1.0)
    s = op("Add", op("Sub", one, beta), constant(EPSILON))
    inverse = op("Div", one, s)
    distance = op("Abs", x)
    original = op("Relu", x)
    if slope is not None:
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
    if slope is not None:
        above, below = op("Less", zero, gap), op("Less", gap, zero)
        sign = op("Sub", op("Cast", above, to=compute), op("Cast", below, to=compute))
        correction = op("Mul", correction, sign)
    return original, correction


def _between(
    body: _Body, compute: int, x: str, beta: str, coeff: str, lo: str, hi: str
) -> tuple[str, str]:
    """As `_unit` for x between two bounds: the names of the clipped x and of what is added to it,
    k(x - lo) - k(x - hi) with the correction k of a unit. The two logarithms are one."""
    op = body.op
    one = body.constant(1.0, compute)
    s = op("Add", op("Sub", one, beta), body.constant(EPSILON, compute))
    inverse = op("Div", one, s)
    falling, rising = op("Neg", inverse), op("Mul", beta, inverse)
    # At infinity the gates' terms cancel, as inf / inf would not; the log term carries NaN.
    largest = float(np.finfo(np.float32).max)
    decays, gates = [], []
    for bound in lo, hi:
        distance = op("Abs", op("Sub", x, bound))
        decays.append(op("Add", op("Exp", op("Mul", distance, falling)), one))
        if body.opset >= 8:
            finite = op("Min", distance, body.constant(largest, compute))
        else:
            finite = op("Clip", distance, max=largest)
        growth = op("Add", op("Exp", op("Mul", finite, rising)), one)
        gates.append(op("Div", finite, growth))
    log_term = op("Mul", op("Log", op("Div", *decays)), op("Mul", op("Sub", one, coeff), s))
    correction = op("Sub", log_term, op("Mul", op("Sub", *gates), coeff))
    # Before opset 12 Clip is for float32 alone.
    if body.opset >= 12:
        return op("Clip", x, lo, hi), correction
    return body.at_most(body.at_least(x, lo), hi), correction


def kinked_function(op_type: str, opset: int, dtypes: Iterable[int]) -> FunctionProto:
    """One of our ops with kinks elsewhere than at 0, as a model-local function of standard ops.

    `rewriting.activations` has their formulas, and custom_ops/ctu_math.h their contract.

    Args:
        op_type: one of OPS, but for CTU itself.
        opset, dtypes: as for `function`.

    Returns:
        FunctionProto (X, beta, coeff, operands) -> Y.
    """
    dtypes = set(dtypes)
    compute = _compute_type(dtypes)
    body = _Body(opset)
    op = body.op
    operands = {
        "CTUMax": ["lo"],
        "CTUMin": ["hi"],
        "CTUClip": ["lo", "hi"],
        "CTUHardSigmoid": ["alpha", "offset", "lo", "hi"],
    }[op_type]
    wide = {name: body.widened(name, dtypes, compute) for name in ("X", *operands)}
    beta, coeff = (body.widened(n, {TensorProto.FLOAT}, compute) for n in ("beta", "coeff"))
    x, y = wide["X"], "Y" if dtypes == {compute} else None
    if op_type == "CTUMax":
        unit = op("Add", *_unit(body, compute, op("Sub", x, wide["lo"]), beta, coeff))
        y = op("Add", unit, wide["lo"], output=y)
    elif op_type == "CTUMin":
        below = op("Neg", op("Sub", x, wide["hi"]))
        unit = op("Add", *_unit(body, compute, below, beta, coeff))
        y = op("Add", op("Neg", unit), wide["hi"], output=y)
    else:
        if op_type == "CTUHardSigmoid":
            x = op("Add", op("Mul", x, wide["alpha"]), wide["offset"])
        parts = _between(body, compute, x, beta, coeff, wide["lo"], wide["hi"])
        y = op("Add", *parts, output=y)
    if dtypes != {compute}:
        body.narrowed(y, dtypes)
    imports = [helper.make_opsetid("", opset)]
    inputs = ["X", "beta", "coeff", *operands]
    return helper.make_function(DOMAIN, op_type, inputs, ["Y"], body.nodes, imports)


def is_ctu(proto: NodeProto | FunctionProto) -> bool:
    """Whether a NodeProto, or FunctionProto, is an op of ours."""
    name = proto.name if isinstance(proto, FunctionProto) else proto.op_type
    return proto.domain == DOMAIN and name in OPS
