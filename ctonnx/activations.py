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
model-local function that calls `ctonnx::CTU`: `function` makes it.
"""

from dataclasses import dataclass

from onnx import NodeProto, TensorProto, helper

from . import ctu

DEFAULT_DOMAINS = ("", "ai.onnx")

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
    def sloped(self):
        return self.op_type == ctu.OP_TYPE and bool(self.operands)


def _relu(node, constant):
    return Steering(ctu.OP_TYPE, node.input[0])


def _leaky_relu(node, constant):
    return Steering(ctu.OP_TYPE, node.input[0], (attribute(node, "alpha", 0.01),))


def _prelu(node, constant):
    return Steering(ctu.OP_TYPE, node.input[0], (node.input[1],))


def _clip(node, constant):
    bounds = []
    for index, name in (1, "min"), (2, "max"):
        operand = value = attribute(node, name, None)
        if len(node.input) > index and node.input[index]:
            operand, value = node.input[index], constant(node.input[index])
            if value is None:
                return "its bounds are computed at run time: taken as arithmetic"
        # Exporters write a bound that is not there as the largest number.
        bounds.append(None if value is None or abs(value) > 3.4e38 else (value, operand))
    return _between(node.input[0], *bounds)


def _between(x, lo, hi):
    """The Steering of Clip; a bound is None or a pair (value, operand)."""
    if lo is None and hi is None:
        return "it has no bounds"
    if lo and hi and not lo[0] < hi[0]:
        return "its bounds leave no room between them"
    if hi is None and 0 < lo[0] < 1e-3:
        return f"it guards against numbers under {lo[0]:g}: taken as arithmetic"
    if hi is None:
        return Steering(ctu.OP_TYPE, x) if lo[0] == 0 else Steering("CTUMax", x, (lo[1],))
    if lo is None:
        return Steering("CTUMin", x, (hi[1],))
    return Steering("CTUClip", x, (lo[1], hi[1]))


def _max(node, constant):
    return _with_zero(node, constant, lambda x, zero: Steering(ctu.OP_TYPE, x))


def _min(node, constant):
    return _with_zero(node, constant, lambda x, zero: Steering("CTUMin", x, (zero,)))


def _with_zero(node, constant, steering):
    """Only against 0 is Max or Min an activation; elsewhere it is arithmetic, and not reported."""
    for zero, x in (node.input, reversed(node.input)) if len(node.input) == 2 else ():
        if constant(zero) == 0:
            return steering(x, zero)
    return None


def _hard_sigmoid(node, constant):
    alpha, offset = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
    return Steering("CTUHardSigmoid", node.input[0], (alpha, offset, 0.0, 1.0))


# op type -> function of (node, constant) that gives its Steering, the reason why there is none, or
# None where the node is no activation. `constant` gives the value of a scalar constant, or None.
STEERABLE = {
    "Relu": _relu,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Clip": _clip,
    "HardSigmoid": _hard_sigmoid,
    "Max": _max,
    "Min": _min,
}

_SMOOTH = "it is not piecewise affine: there is no kink between two lines to bend"
_JUMPS = "it jumps: the CTU bends kinks, not jumps"
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


def judge(node, dtypes, constant):
    """Judge a NodeProto.

    Args:
        dtypes: the element types of its tensor, empty where they are not known.
        constant: function from a tensor's name to its value where it is a scalar constant.

    Returns:
        Steering, the reason why there is none, or None where the node is no activation.
    """
    domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
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


def _type_name(dtype):
    known = dtype in TensorProto.DataType.values()
    return TensorProto.DataType.Name(dtype).lower() if known else f"of the unknown type {dtype}"


def unfused(node):
    """The activation inside a fused node, as a NodeProto of its own without input; None if none."""
    if (node.domain, node.op_type) not in FUSED:
        return None
    op_type = attribute(node, "activation", "")
    if op_type not in STEERABLE:
        return None
    names = {"LeakyRelu": ["alpha"], "Clip": ["min", "max"], "HardSigmoid": ["alpha", "beta"]}
    values = attribute(node, "activation_params", [])
    parameters = dict(zip(names.get(op_type, []), values, strict=False))
    return helper.make_node(op_type, [node.output[0]], [node.output[0]], **parameters)


def take_out(node, output):
    """Remove the activation that is fused into a node, which then computes `output`."""
    node.output[0] = output
    kept = [held for held in node.attribute if not held.name.startswith("activation")]
    del node.attribute[:]
    node.attribute.extend(kept)
    if node.op_type == "FusedGemm":
        node.op_type, node.domain = "Gemm", ""


def function(op_type, opset, sloped):
    """One of our ops other than CTU as a model-local function (X, beta, coeff, operands) -> Y.

    Args:
        opset: of the default domain, at least 8.
        sloped: whether the function of `ctonnx::CTU` in the same model takes a slope.
    """
    nodes = []

    def op(op_type, *inputs, output=None, domain=""):
        output = output or f"v{len(nodes)}"
        nodes.append(helper.make_node(op_type, inputs, [output], domain=domain))
        return output

    def kink(bound):
        below = op("Neg", op("Abs", op("Sub", "X", bound)))
        slope = [op("Sub", bound, bound)] if sloped else []  # 0, in X's element type
        return op(ctu.OP_TYPE, below, "beta", "coeff", *slope, domain=ctu.DOMAIN)

    if op_type == "CTUMax":
        operands = ["lo"]
        op("Add", op("Max", "X", "lo"), kink("lo"), output="Y")
    elif op_type == "CTUMin":
        operands = ["hi"]
        op("Sub", op("Min", "X", "hi"), kink("hi"), output="Y")
    elif op_type == "CTUClip":
        operands = ["lo", "hi"]
        clipped = op("Min", op("Max", "X", "lo"), "hi")
        op("Sub", op("Add", clipped, kink("lo")), kink("hi"), output="Y")
    else:
        operands = ["alpha", "offset", "lo", "hi"]
        line = op("Add", op("Mul", "X", "alpha"), "offset")
        op("CTUClip", line, "beta", "coeff", "lo", "hi", output="Y", domain=ctu.DOMAIN)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(ctu.DOMAIN, ctu.VERSION)]
    return helper.make_function(
        ctu.DOMAIN, op_type, ["X", "beta", "coeff", *operands], ["Y"], nodes, imports
    )


def attribute(node: NodeProto, name, default):
    """The value of a node's attribute; `default` where it has none, or refers to a function's."""
    for held in node.attribute:
        if held.name == name and not held.ref_attr_name:
            value = helper.get_attribute_value(held)
            return value.decode() if isinstance(value, bytes) else value
    return default


def _holds_relu(node, name):
    return any(b"Relu" in value for value in attribute(node, name, []))
