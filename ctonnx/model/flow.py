"""Data flow in a model's graph: which nodes depend on which tensors, and cutting out parts.

A node reads its inputs and the tensors that its subgraphs capture from the graph around them.
Model-local functions capture nothing.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper

from .graph import Scope, reads, scopes
from .inference import typed_scopes

# Ops that give other values in every run.
_RANDOM = {
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}

# Ops that take long enough to be worth a session of their own.
_HEAVY = {
    "Attention",
    "Conv",
    "ConvInteger",
    "ConvTranspose",
    "Einsum",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "GRU",
    "Gemm",
    "If",
    "LSTM",
    "Loop",
    "MatMul",
    "MatMulInteger",
    "MultiHeadAttention",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
    "RNN",
    "Scan",
}


class Flow:
    """The nodes of a GraphProto in order, with the tensors that they read and produce.

    `nodes` are the nodes and `reads` the names that each of them reads; `producer` maps a tensor's
    name to the index of the node that produces it. `constants` are the names of the initializers
    and of all tensors that depend on nothing else.
    """

    def __init__(self, graph: GraphProto):
        self.nodes = list(graph.node)
        self.reads = [reads(node) for node in self.nodes]
        self.producer = {
            name: i for i, node in enumerate(self.nodes) for name in node.output if name
        }
        self.constants = {tensor.name for tensor in graph.initializer}
        self.constants.update(tensor.values.name for tensor in graph.sparse_initializer)
        for node, names in zip(self.nodes, self.reads, strict=True):
            if names <= self.constants and node.op_type not in _RANDOM:
                self.constants.update(filter(None, node.output))

    def reached_from(self, names: Iterable[str]) -> set[str]:
        """`names`, and the names of all tensors that depend on them."""
        reached = set(names)
        for node, inputs in zip(self.nodes, self.reads, strict=True):
            if not reached.isdisjoint(inputs):
                reached.update(filter(None, node.output))
        return reached

    def needed_for(self, names: Iterable[str], available: Collection[str] = ()) -> list[int]:
        """The indices, ascending, of the nodes that have to run to compute the tensors `names`.

        Args:
            available: names of tensors that need not be computed, beside the graph's inputs and
                initializers.
        """
        wanted, needed = set(names).difference(available), []
        for i in reversed(range(len(self.nodes))):
            if not wanted.isdisjoint(self.nodes[i].output):
                needed.append(i)
                wanted |= self.reads[i].difference(available)
        return needed[::-1]


def reached_by_values(
    graph: GraphProto, inputs: Iterable[str], stops: Collection[str] = ()
) -> set[str]:
    """The names of the tensors that depend on the values of `inputs`, and not on their sizes. The
    nodes may be in any order.

    Args:
        stops: op types behind which nothing is reached.
    """
    readers = defaultdict(list)
    for node in graph.node:
        for name in reads(node) if node.op_type not in ("Shape", "Size", *stops) else ():
            readers[name].append(node)
    reached = set(inputs)
    pending = list(reached)
    while pending:
        for node in readers.pop(pending.pop(), ()):
            new = set(filter(None, node.output)) - reached
            reached |= new
            pending += new
    return reached


def cut(
    model: ModelProto, outputs: Sequence[str], inputs: Sequence[ValueInfoProto] = ()
) -> ModelProto:
    """The part of a model that computes the tensors `outputs`, as a model of its own.

    Args:
        inputs: tensors inside the graph that become inputs of the part.
    """
    graph, flow = model.graph, Flow(model.graph)
    available = {value.name for value in inputs}
    indices = flow.needed_for(outputs, available)
    read = set(outputs).union(*(flow.reads[i] for i in indices))
    produced = {name for i in indices for name in flow.nodes[i].output}
    part = ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    part.graph.name = graph.name
    part.graph.node.extend(flow.nodes[i] for i in indices)
    part.graph.initializer.extend(t for t in graph.initializer if t.name in read)
    part.graph.sparse_initializer.extend(
        t for t in graph.sparse_initializer if t.values.name in read
    )
    part.graph.input.extend(v for v in graph.input if v.name in read)
    part.graph.input.extend(inputs)
    part.graph.output.extend(ValueInfoProto(name=name) for name in outputs)
    inner = (produced | read).difference(outputs, available)
    part.graph.value_info.extend(v for v in graph.value_info if v.name in inner)
    return part


def split(
    model: ModelProto, output: str, varying: Iterable[str]
) -> tuple[ModelProto, ModelProto] | None:
    """Split a model where it begins to depend on the inputs `varying`.

    The first part can then run once for many values of these inputs.

    Returns:
        two models: the part that does not depend on `varying`, and the rest, which computes the
        tensor `output` from the outputs of the first part and the model's inputs. None where an
        op is random, where the element type of a tensor between the parts is not known, and where
        the first part has no op that takes long.
    """
    if any(map(_is_random, scopes(model))):
        return None
    flow = Flow(model.graph)
    changing = flow.reached_from(varying)
    fixed = flow.constants.union(value.name for value in model.graph.input)
    between = {
        name
        for i in flow.needed_for([output])
        if not changing.isdisjoint(flow.nodes[i].output)
        for name in flow.reads[i] - changing - fixed
    }
    shared = [flow.nodes[i] for i in flow.needed_for(between)]
    if not any(node.op_type in _HEAVY for node in shared):
        return None
    scope = typed_scopes(model, list(scopes(model)))[0]
    inputs = []
    for name in sorted(between):
        types = scope.types.get(name, set())
        if len(types) != 1:
            return None
        (element_type,) = types
        inputs.append(helper.make_tensor_value_info(name, element_type, scope.shapes.get(name)))
    return cut(model, sorted(between)), cut(model, [output], inputs)


def _is_random(scope: Scope) -> bool:
    return any(
        node.op_type in _RANDOM or (node.op_type == "Dropout" and _may_train(scope, node))
        for node in scope.graph.node
    )


def _may_train(scope: Scope, node: NodeProto) -> bool:
    """Whether the input `training_mode` of a Dropout may be true."""
    return any(node.input[2:3]) and scope.constant(node.input[2]) != 0
