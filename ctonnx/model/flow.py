"""What depends on what in a model's graph, and taking parts out of it.

A node reads its inputs and what its bodies see of the graph around them. Functions see nothing.
"""

from itertools import chain

from onnx import AttributeProto, ModelProto, ValueInfoProto, helper

from .graph import scopes, typed_scopes

# Run again they give something else.
_RANDOM = {
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
    *("Multinomial", "Bernoulli"),
}

# What costs enough to be worth a session of its own.
_HEAVY = {
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "Attention"),
    *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "If", "Loop", "Scan"),
    *("FusedConv", "FusedGemm", "FusedMatMul", "MultiHeadAttention", "QGemm"),
}


def reads(node):
    """The names of the tensors that a node reads."""
    bodies = (
        [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
        for attribute in node.attribute
    )
    seen = (_seen_by(body) for body in chain.from_iterable(bodies))
    return set(filter(None, node.input)).union(*seen)


def _seen_by(body):
    """The names of the graph around it that a body reads."""
    own = {value.name for value in (*body.input, *body.initializer)}
    own.update(tensor.values.name for tensor in body.sparse_initializer)
    found = {value.name for value in body.output}
    for node in body.node:
        found |= reads(node)
        own.update(node.output)
    return found - own


class Flow:
    """The nodes of a GraphProto, in order, with what they read and make."""

    def __init__(self, graph):
        self.nodes = list(graph.node)
        self.reads = [reads(node) for node in self.nodes]
        self.producer = {
            name: i for i, node in enumerate(self.nodes) for name in node.output if name
        }
        held = {tensor.name for tensor in graph.initializer}
        held.update(tensor.values.name for tensor in graph.sparse_initializer)
        self.constants = set(held)
        for node, read in zip(self.nodes, self.reads, strict=True):
            if read <= self.constants and node.op_type not in _RANDOM:
                self.constants.update(filter(None, node.output))

    def reached_from(self, names):
        """`names`, and those of all tensors that depend on them."""
        reached = set(names)
        for node, read in zip(self.nodes, self.reads, strict=True):
            if not reached.isdisjoint(read):
                reached.update(filter(None, node.output))
        return reached

    def needed_for(self, names, given=()):
        """The indices, ascending, of the nodes that make `names` of the tensors `given`, the
        graph's inputs and initializers."""
        wanted, needed = set(names).difference(given), []
        for i in reversed(range(len(self.nodes))):
            if not wanted.isdisjoint(self.nodes[i].output):
                needed.append(i)
                wanted |= self.reads[i].difference(given)
        return needed[::-1]


def cut(model, outputs, given=()):
    """A ModelProto of the part of `model` that makes the tensors `outputs`.

    Args:
        given: ValueInfoProtos of tensors that become inputs.
    """
    graph, flow = model.graph, Flow(model.graph)
    names = {value.name for value in given}
    nodes = [flow.nodes[i] for i in flow.needed_for(outputs, names)]
    read = set(outputs).union(*map(reads, nodes))
    made = {name for node in nodes for name in node.output}
    part = ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    part.graph.name = graph.name
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(t for t in graph.initializer if t.name in read)
    part.graph.sparse_initializer.extend(
        t for t in graph.sparse_initializer if t.values.name in read
    )
    part.graph.input.extend(v for v in graph.input if v.name in read)
    part.graph.input.extend(given)
    part.graph.output.extend(ValueInfoProto(name=name) for name in outputs)
    kept = (made | read).difference(outputs, names)
    part.graph.value_info.extend(v for v in graph.value_info if v.name in kept)
    return part


def split(model, output, varying):
    """The part of a ModelProto that does not depend on the inputs `varying`, and the rest.

    Returns:
        two ModelProtos; the second makes the tensor `output` of what the first gives, beside the
        model's inputs and constants. None where one run of the first for many of the second would
        not be sound, or not worth it: where something is random, where the type of a tensor in
        between is not known, and where the first holds nothing that takes time.
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
    scope = typed_scopes(model)[0]
    given = []
    for name in sorted(between):
        types = scope.types.get(name, ())
        if len(types) != 1:
            return None
        given.append(helper.make_tensor_value_info(name, *types, scope.shapes.get(name)))
    return cut(model, sorted(between)), cut(model, [output], given)


def _is_random(scope):
    for node in scope.body.node:
        if node.op_type in _RANDOM:
            return True
        if (
            node.op_type == "Dropout"
            and any(node.input[2:3])
            and scope.constant(node.input[2]) != 0
        ):
            return True
    return False
