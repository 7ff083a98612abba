"""What ends an output of a model, and with that what its numbers mean: logits or probabilities.

The graph tells, and no numbers: rounded probabilities need not sum to 1, and logits may.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto

from .graph import DEFAULT_DOMAINS

PROBABILITIES, LOG_PROBABILITIES, LOGITS = "probabilities", "log-probabilities", "logits"

_PROBABILITY_OPS = {
    "Softmax": "Softmax",
    "Sigmoid": "Sigmoid",
    "com.microsoft::QLinearSoftmax": "Softmax",
    "com.microsoft::QLinearSigmoid": "Sigmoid",
}

# Ops that leave probabilities what they are, up to a common factor.
_PASSED_OVER = {
    *("AveragePool", "Cast", "CastLike", "Clip", "DequantizeLinear", "Dropout", "Expand"),
    *("Flatten", "Gather", "GlobalAveragePool", "Identity", "LpNormalization", "Pad"),
    *("QuantizeLinear", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "Resize", "Slice"),
    *("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Upsample"),
    *("ai.onnx.ml::Normalizer", "com.microsoft::DequantizeLinear"),
    "com.microsoft::QuantizeLinear",
}

# Ops of several operands, each of them probabilities or a constant.
_COMBINED = {"Add", "Concat", "Max", "Mean", "Min", "Mul", "Sum"}

# The longest path from an output that is followed.
_LONGEST = 100


@dataclass(frozen=True)
class Ending:
    """How an output ends.

    Attributes:
        kind: PROBABILITIES, LOG_PROBABILITIES or LOGITS.
        op: the op that turns logits into these, such as "Softmax"; None for logits.
    """

    kind: str = LOGITS
    op: str | None = None


def ending_of(model: ModelProto, output: str) -> Ending:
    """How the output named `output` of a model's graph ends."""
    functions = {(f.domain, f.name): f for f in model.functions}
    graph = model.graph
    return _Scope(graph.node, _constants(graph), functions).ending(output)


def _constants(graph: GraphProto) -> set[str]:
    names = {tensor.name for tensor in graph.initializer}
    return names | {tensor.values.name for tensor in graph.sparse_initializer}


@dataclass
class _Scope:
    """The nodes of a graph or function.

    `outer` maps the names that other scopes produce, the inputs of a function and what a subgraph
    captures, to a scope and the name there; a name that it lacks is found in `around`.
    """

    nodes: Iterable[NodeProto]
    constants: set[str]
    functions: Mapping[tuple[str, str], FunctionProto]
    outer: Mapping[str, tuple["_Scope", str]] = field(default_factory=dict)
    around: "_Scope | None" = None

    def __post_init__(self) -> None:
        self._producer = {name: node for node in self.nodes for name in node.output if name}
        self._endings: dict[str, Ending] = {}
        for node in self.nodes:
            subgraphs = any(a.type == AttributeProto.GRAPH for a in node.attribute)
            if not subgraphs and all(not n or self._is_constant(n) for n in node.input):
                self.constants.update(filter(None, node.output))

    def _is_constant(self, name: str) -> bool:
        if name in self.constants:
            return True
        if name in self.outer:
            scope, there = self.outer[name]
            return scope._is_constant(there)
        around = self.around
        return name not in self._producer and around is not None and around._is_constant(name)

    def ending(self, name: str, length: int = 0) -> Ending:
        """The Ending of a tensor; `length` is that of the path followed so far."""
        if name not in self._endings:
            self._endings[name] = Ending()  # Where a cycle leads back here.
            self._endings[name] = self._found(name, length + 1)
        return self._endings[name]

    def _found(self, name: str, length: int) -> Ending:
        node = self._producer.get(name)
        if length > _LONGEST:
            return Ending()
        if node is not None:
            return self._of_node(node, name, length)
        if name in self.outer:
            scope, there = self.outer[name]
            return scope.ending(there, length)
        return Ending() if self.around is None else self.around.ending(name, length)

    def _of_node(self, node: NodeProto, name: str, length: int) -> Ending:
        at = list(node.output).index(name)
        function = self.functions.get((node.domain, node.op_type))
        if function is not None:
            return self._of_call(node, function, at, length)
        op = node.op_type if node.domain in DEFAULT_DOMAINS else f"{node.domain}::{node.op_type}"
        if op in _PROBABILITY_OPS:
            return Ending(PROBABILITIES, _PROBABILITY_OPS[op])
        if op == "LogSoftmax":
            return Ending(LOG_PROBABILITIES, op)
        if op == "If":
            return self._of_branches(node, at, length)
        varying = [n for n in node.input if n and not self._is_constant(n)]
        if not varying:
            return Ending()
        if op in ("Log", "Exp"):
            inner = self.ending(node.input[0], length)
            if op == "Log" and inner.kind == PROBABILITIES:
                return Ending(LOG_PROBABILITIES, "LogSoftmax" if inner.op == "Softmax" else op)
            if op == "Exp" and inner.kind == LOG_PROBABILITIES:
                return Ending(PROBABILITIES, "Softmax" if inner.op == "LogSoftmax" else op)
            return Ending()
        if op == "Div" and self._is_share(node):
            return Ending(PROBABILITIES, "Softmax" if self._is_exp(node.input[0]) else op)
        complement = op == "Sub" and varying == [*node.input[1:]]
        if op in _PASSED_OVER or (op == "Div" and varying == [node.input[0]]):
            return self.ending(node.input[0], length)
        if op in _COMBINED or complement:
            endings = [self.ending(operand, length) for operand in varying]
            if all(ending.kind == PROBABILITIES for ending in endings):
                return endings[0]
        return Ending()

    def _is_share(self, node: NodeProto) -> bool:
        """Whether a Div divides a tensor by its own sum, as a Softmax in primitives does."""
        total = self._producer.get(node.input[1])
        return (
            total is not None
            and total.op_type in ("ReduceSum", "ReduceL1")
            and total.input[0] == node.input[0]
        )

    def _is_exp(self, name: str) -> bool:
        node = self._producer.get(name)
        return node is not None and node.op_type == "Exp"

    def _of_call(self, node: NodeProto, function: FunctionProto, at: int, length: int) -> Ending:
        given = dict(zip(function.input, node.input, strict=False))
        outer = {inner: (self, name) for inner, name in given.items() if name}
        inside = _Scope(function.node, set(), self.functions, outer)
        return inside.ending(function.output[at], length)

    def _of_branches(self, node: NodeProto, at: int, length: int) -> Ending:
        endings = {
            _Scope(a.g.node, _constants(a.g), self.functions, around=self).ending(
                a.g.output[at].name, length
            )
            for a in node.attribute
            if a.type == AttributeProto.GRAPH
        }
        return endings.pop() if len(endings) == 1 else Ending()
