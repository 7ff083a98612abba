"""What onnx's shape inference must not be given: it trusts a model, so that one of a hundred bytes
could take gigabytes, or end the process."""

import math
from collections.abc import Iterable, Iterator

from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
)

from .graph import DEFAULT_DOMAINS, Key, Scope, functions_of, key_of, nested_scopes, put, scopes
from .names import FreshNames

# No tensor of a real model has more dimensions.
_MAX_RANK = 64

# The inputs of standard ops that are shapes: inference makes as many dimensions as they declare.
_SHAPES = {"ConstantOfShape": {0}, "Expand": {1}, "Reshape": {1}}


def bound_inference(model: ModelProto) -> None:
    """Change a copy of a model so that inference ends soon, and finds the same in a real model.

    Negative sizes become unknown, and nodes that would end the process become harmless ones. A
    shape passes a Slice of `_MAX_RANK` elements, unless it is a constant that is no longer.

    Args:
        model: a ModelProto whose functions do not call themselves.

    Raises:
        ModelError: two functions share a name.
    """
    for scope in scopes(model):
        _forget_negative_sizes(scope.graph)
        for node in scope.graph.node:
            if node.domain in DEFAULT_DOMAINS:
                _correct(node)
    _Shapes(model).bound()


def _forget_negative_sizes(graph: GraphProto | FunctionProto) -> None:
    if isinstance(graph, FunctionProto):
        return
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0:
                dim.ClearField("dim_value")


def _correct(node: NodeProto) -> None:
    """Change a standard node where onnx takes an attribute for an index, or the type of an input
    for known."""
    for attribute in node.attribute:
        if node.op_type == "Split" and attribute.name == "num_outputs":
            attribute.CopyFrom(helper.make_attribute("num_outputs", len(node.output)))
        elif node.op_type == "GatherND" and attribute.name == "batch_dims":
            attribute.i = max(attribute.i, 0)
        elif node.op_type == "EyeLike" and attribute.name == "dtype":
            attribute.name, node.op_type = "to", "Cast"  # of the same type and shape
    if node.op_type == "LayerNormalization":
        # The axis is an index into the shapes of the other outputs, statistics for training.
        del node.output[1:]
    elif node.op_type == "RegexFullMatch":
        node.op_type = "IsNaN"  # of the same type and shape


class _Shapes:
    """The inputs of nodes that are shapes, in a model and its functions."""

    def __init__(self, model: ModelProto):
        self._model = model
        self._functions = functions_of(model)
        self._of_functions: dict[Key, set[int]] = {}
        self._fresh = FreshNames(model)

    def bound(self) -> None:
        for key in self._functions:
            self._of(key)
        self._bound(self._model.graph, self._model.opset_import, set())

    def _of(self, key: Key) -> set[int]:
        """The indices of the inputs that are shapes, of an op or function."""
        if key not in self._functions:
            domain, op_type, _ = key
            return _SHAPES.get(op_type, set()) if domain in DEFAULT_DOMAINS else set()
        if key not in self._of_functions:
            function = self._functions[key]
            names = self._bound(function, function.opset_import, set(function.input))
            self._of_functions[key] = {i for i, n in enumerate(function.input) if n in names}
        return self._of_functions[key]

    def _bound(
        self, graph: GraphProto | FunctionProto, imports: Iterable, parameters: set[str]
    ) -> set[str]:
        """Bound the shapes in a graph and its subgraphs.

        Args:
            parameters: the names of a function's inputs, which its calls bound.

        Returns:
            Those of `parameters` that are shapes.
        """
        inside = list(nested_scopes(Scope("", graph)))
        constants, assigned = _short_constants(inside)
        parameters = parameters - assigned - constants
        versions = {entry.domain: entry.version for entry in imports}
        used = set()
        # Innermost subgraphs first, as a subgraph is copied along with its node.
        for scope in reversed(inside):
            nodes = []
            for node in scope.graph.node:
                for i in self._of(key_of(node)):
                    name = node.input[i] if i < len(node.input) else ""
                    if name in parameters:
                        used.add(name)
                    elif name and name not in constants:
                        node.input[i] = self._fresh("shape")
                        nodes.extend(self._first(name, node.input[i], versions))
                nodes.append(node)
            if len(nodes) > len(scope.graph.node):
                put(scope.graph.node, nodes)
        return used

    def _first(self, name: str, output: str, versions: dict[str, int]) -> Iterator[NodeProto]:
        """The nodes that give the first elements of a shape; none where there are no standard ops,
        and the output is unknown."""
        domain = next((d for d in DEFAULT_DOMAINS if d in versions), None)
        if domain is None:
            return
        if versions[domain] < 10:
            node = helper.make_node("Slice", [name], [output], domain=domain)
            node.attribute.append(helper.make_attribute("starts", [0]))
            node.attribute.append(helper.make_attribute("ends", [_MAX_RANK]))
            yield node
            return
        inputs = [name]
        for number in 0, _MAX_RANK:
            value = helper.make_tensor("", TensorProto.INT64, [1], [number])
            inputs.append(self._fresh("number"))
            yield helper.make_node("Constant", [], inputs[-1:], domain=domain, value=value)
        yield helper.make_node("Slice", inputs, [output], domain=domain)


def _short_constants(inside: Iterable[Scope]) -> tuple[set[str], set[str]]:
    """The names in some scopes that stand for a constant no longer than a shape and for nothing
    else, and the names that stand for something else."""
    short, others = set(), set()
    for scope in inside:
        graph = scope.graph
        if isinstance(graph, GraphProto):
            for tensor in graph.initializer:
                (short if _is_short(tensor) else others).add(tensor.name)
            others.update(tensor.values.name for tensor in graph.sparse_initializer)
            for value in (*graph.input, *graph.output, *graph.value_info):
                dims = value.type.tensor_type.shape.dim
                if any(dim.dim_value > _MAX_RANK for dim in dims):
                    others.add(value.name)
            if scope.parent is not None:
                others.update(value.name for value in graph.input)
        for node in graph.node:
            constant = node.op_type == "Constant" and all(map(_is_short_value, node.attribute))
            (short if constant else others).update(node.output)
    return short - others, others


def _is_short(tensor: TensorProto) -> bool:
    return 0 <= math.prod(tensor.dims) <= _MAX_RANK and min(tensor.dims, default=0) >= 0


def _is_short_value(attribute: AttributeProto) -> bool:
    return len(attribute.ints) <= _MAX_RANK and _is_short(attribute.t)
