"""A model whose β is an input and whose branches, where the data always take the same, are inlined.

The statistics of a layer are those of a tensor in the main graph, so that the model can be cut
there. The flat model is only run: what is corrected are the tensors of the model itself.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

from onnx import GraphProto, ModelProto, NodeProto, helper

from ..model.graph import Scope, scopes
from ..model.names import FreshNames
from ..model.order import sort_nodes
from ..rewriting.parameters import make_inputs
from .linear import is_layer

# Marks a node of the flat model with the place of its original in the walk of the model.
_PLACE = "ctonnx.place"

# Gives, for names of conditions, the value of each that is the same for all data.
Conditions = Callable[[ModelProto, Sequence[str]], dict[str, bool]]


class Flat:
    """A flat copy of a model.

    Args:
        model: the ModelProto. It is not changed.
        inside: its scopes.
        parameters: the names of the initializers and inputs that hold β, and c where it changes.
        conditions: called with the copy and names of conditions.

    Attributes:
        model: the copy, a ModelProto in running order, whose `parameters` are inputs that must be
            fed.
    """

    def __init__(
        self,
        model: ModelProto,
        inside: Sequence[Scope],
        parameters: Collection[str],
        conditions: Conditions,
    ):
        self._places = [
            (scope, node) for scope in inside if not scope.is_ours for node in scope.graph.node
        ]
        self.model = ModelProto()
        self.model.CopyFrom(model)
        copies = [n for s in scopes(self.model) if not s.is_ours for n in s.graph.node]
        for place, node in enumerate(copies):
            node.metadata_props.add(key=_PLACE, value=str(place))
        sort_nodes(self.model)
        # Of any shape: a parameter per channel may be compared with one for all.
        make_inputs(self.model.graph, parameters, shape=None)
        self._fresh = FreshNames(self.model)
        self._stuck: set[str] = set()
        while self._inline(conditions):
            pass
        self._shown = {self._place(node) for node in self.model.graph.node}

    def origin(self, node: NodeProto) -> tuple[Scope, NodeProto]:
        """The Scope and node of the model that a node of the flat graph is a copy of."""
        return self._places[self._place(node)]

    def find(self, node: NodeProto) -> tuple[Scope, NodeProto] | None:
        """As `origin`, None for a node that only the flat graph has."""
        place = self._place(node)
        return None if place < 0 else self._places[place]

    def hidden(self) -> Iterator[tuple[Scope, NodeProto]]:
        """The nodes of the model that are in a subgraph or function of the flat one."""
        for place, (scope, node) in enumerate(self._places):
            if place not in self._shown and (scope.parent or scope.function):
                yield scope, node

    def reason(self, scope: Scope) -> str:
        """Why the layers of a Scope are left alone."""
        if scope.function is not None:
            return f"it is in the function {scope.function.name}"
        return f"it is in {scope.path}, which does not run exactly once for every sample"

    def _place(self, node: NodeProto) -> int:
        marks = [entry.value for entry in node.metadata_props if entry.key == _PLACE]
        return int(marks[0]) if marks else -1

    def _inline(self, conditions: Conditions) -> bool:
        """Inline the branches of each If that holds a linear layer; false where there is none."""
        graph = self.model.graph
        nodes = [
            node
            for node in graph.node
            if node.op_type == "If" and node.output[0] not in self._stuck and self._holds(node)
        ]
        if not nodes:
            return False
        taken = conditions(self.model, sorted({node.input[0] for node in nodes}))
        wanted = {}
        for node in nodes:
            if node.input[0] in taken:
                wanted[node.output[0]] = taken[node.input[0]]
            else:
                self._stuck.add(node.output[0])
        result = []
        for node in graph.node:
            key = node.output[0] if node.output else ""
            if node.op_type == "If" and key in wanted:
                result += self._branch(node, "then_branch" if wanted[key] else "else_branch")
            else:
                result.append(node)
        result = [_copy(node) for node in result]
        del graph.node[:]
        graph.node.extend(result)
        return True

    def _holds(self, node: NodeProto) -> bool:
        graphs = [a.g for a in node.attribute if a.HasField("g")]
        return any(
            is_layer(inner) or self._holds(inner) for graph in graphs for inner in graph.node
        )

    def _branch(self, node: NodeProto, name: str) -> list[NodeProto]:
        """The nodes of a branch, under names of their own, and what gives the outputs theirs."""
        (branch,) = [a.g for a in node.attribute if a.name == name]
        own = [t.name for t in branch.initializer]
        own += [t.values.name for t in branch.sparse_initializer]
        own += [output for inner in branch.node for output in inner.output if output]
        names = {old: self._fresh(old) for old in own}
        _rename(branch, names)
        graph = self.model.graph
        graph.initializer.extend(branch.initializer)
        graph.sparse_initializer.extend(branch.sparse_initializer)
        graph.value_info.extend(branch.value_info)
        results = zip(branch.output, node.output, strict=True)
        ends = [
            helper.make_node("Identity", [names.get(inner.name, inner.name)], [outer])
            for inner, outer in results
            if outer
        ]
        return [*branch.node, *ends]


def _rename(graph: GraphProto, names: dict[str, str]) -> None:
    """Rename tensors in a subgraph, and where the subgraphs in it read them."""
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for tensor in graph.sparse_initializer:
        tensor.values.name = names.get(tensor.values.name, tensor.values.name)
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                own = {v.name for v in (*attribute.g.input, *attribute.g.initializer)}
                own.update(output for inner in attribute.g.node for output in inner.output)
                _rename(attribute.g, {k: v for k, v in names.items() if k not in own})
                for value in attribute.g.output:
                    if value.name not in own:
                        value.name = names.get(value.name, value.name)


def _copy(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    return copy
