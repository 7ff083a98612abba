"""Which ONNX nodes the CTU can steer, how, and why it leaves the others alone."""

from onnx import NodeProto, TensorProto, helper

from .ctu import FLOATING

# op type -> the slope of its negative side: a number, or the name of an input of the node.
# X is input 0. The CTU of that slope is the op's smooth version, and the op itself at beta = 1.
STEERABLE = {
    "Relu": lambda node: 0.0,
    "LeakyRelu": lambda node: _attribute(node, "alpha", 0.01),
    "PRelu": lambda node: node.input[1],
}

_SMOOTH = "it is not piecewise affine: there is no kink between two lines to bend"
_LATER = "piecewise affine, but not supported yet"

LEFT_ALONE = {
    **dict.fromkeys(
        (
            "Celu",
            "Elu",
            "Gelu",
            "HardSwish",
            "Mish",
            "Selu",
            "Sigmoid",
            "Softplus",
            "Softsign",
            "Swish",
            "Tanh",
        ),
        _SMOOTH,
    ),
    "Clip": _LATER,
    "HardSigmoid": _LATER,
    "ThresholdedRelu": "it jumps at its threshold: the CTU bends kinks, not jumps",
}

_CONTRIB = {("com.microsoft", op): _SMOOTH for op in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")}

_RECURRENT = ("RNN", "GRU", "LSTM")

DEFAULT_DOMAINS = ("", "ai.onnx")


def slope_of(node):
    """The slope of a steerable node: float, or the name of the input that holds it."""
    return STEERABLE[node.op_type](node)


def refusal(node, dtypes):
    """Judge a NodeProto whose X has the element types `dtypes` (empty where unknown).

    Returns:
        None where `node` is no activation at all, "" where it can be steered, and otherwise the
        reason why it cannot.
    """
    if (node.domain, node.op_type) in _CONTRIB:
        return _CONTRIB[node.domain, node.op_type]
    # Its blocked layout has a domain of its own, com.microsoft.nchwc.
    if node.domain.startswith("com.microsoft") and "Relu" in str(
        _attribute(node, "activation", "")
    ):
        return f"fused into {node.op_type} by ONNX Runtime: patch the model from before that"
    if node.domain not in DEFAULT_DOMAINS:
        return None
    if node.op_type in _RECURRENT and "Relu" in str(_attribute(node, "activations", "")):
        return f"it is part of {node.op_type}"
    if node.op_type in LEFT_ALONE:
        return LEFT_ALONE[node.op_type]
    if node.op_type not in STEERABLE:
        return None
    needed = 2 if node.op_type == "PRelu" else 1
    if len(node.input) < needed or not all(node.input[:needed]):
        return "it lacks an input"
    if any(attribute.ref_attr_name for attribute in node.attribute):
        return "its slope is an attribute of the function around it"
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        return "it holds a graph, which no activation does"
    wrong = set(dtypes) - set(FLOATING)
    if wrong:
        return f"its tensor is {_type_name(wrong.pop())}, not floating-point"
    return ""


def _type_name(dtype):
    known = dtype in TensorProto.DataType.values()
    return TensorProto.DataType.Name(dtype).lower() if known else f"of the unknown type {dtype}"


def _attribute(node: NodeProto, name, default):
    for attribute in node.attribute:
        if attribute.name == name and not attribute.ref_attr_name:
            value = helper.get_attribute_value(attribute)
            return value.decode() if isinstance(value, bytes) else value
    return default
