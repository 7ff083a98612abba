"""Walking a model: its graph, subgraphs and model-local functions."""

from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, MutableSequence
from dataclasses import dataclass, field
from functools import cached_property

from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

from .. import ctu
from ..errors import ModelError

# The two names of the domain of the standard ops.
DEFAULT_DOMAINS = ("", "ai.onnx")

# Domain, name and overload of a function.
Key = tuple[str, str, str]


@dataclass
class Scope:
    """A list of nodes that share names: the main graph, a subgraph of If, Loop or Scan, or a
    model-local function.

    `path` is "" for the main graph, "node.attribute" chained with "/" for a subgraph, and
    "domain::name" for a function. `function` is the function around a subgraph, or the scope's own,
    and `parent` the scope whose names a subgraph sees. `inputs_vary` is False where initializers
    under the names of inputs are constants.

    `types` maps a tensor's name to the set of its TensorProto element types: several where calls of
    a function differ, and none for a sequence; unknown ones are missing. `shapes` maps it to its
    dimensions, each a number, a symbol or None; to None where calls differ. Names of `parent` are
    looked up in it, as copies of them would take quadratic time.
    """

    path: str
    graph: GraphProto | FunctionProto
    function: FunctionProto | None = None
    parent: "Scope | None" = None
    inputs_vary: bool = True
    types: ChainMap[str, set[int]] = field(init=False)
    shapes: ChainMap[str, list[int | str | None] | None] = field(init=False)

    def __post_init__(self):
        self.types = self.parent.types.new_child() if self.parent else ChainMap()
        self.shapes = self.parent.shapes.new_child() if self.parent else ChainMap()

    def lies_in_a_file(self, name: str) -> bool:
        """Whether nodes see under `name` an initializer of one number that lies in a file."""
        if name in self._in_files:
            return True
        return bool(self.parent and self.parent.lies_in_a_file(name))

    def constant(self, name: str) -> float | None:
        """The number that nodes see under `name`, where that is a scalar constant, or None."""
        seen = set()
        while name in self._casts and name not in seen:
            seen.add(name)
            name = self._casts[name]
        if self.inputs_vary and name in self._inputs:
            return None
        if name in self._constants:
            return self._constants[name]
        return self.parent.constant(name) if self.parent else None

    @property
    def is_ours(self) -> bool:
        """Whether it lies in the function of an op of ours."""
        return self.function is not None and ctu.is_ctu(self.function)

    @cached_property
    def _inputs(self) -> set[str]:
        if isinstance(self.graph, FunctionProto):
            return set(self.graph.input)
        return {value.name for value in self.graph.input}

    @cached_property
    def _casts(self) -> dict[str, str]:
        """Tensors that are others, at most in another floating-point type."""
        return {
            node.output[0]: node.input[0]
            for node in self.graph.node
            if node.op_type in ("Cast", "CastLike", "Identity")
            and node.domain in DEFAULT_DOMAINS
            and any(node.input[:1])
            and any(node.output[:1])
            and all(a.type == AttributeProto.INT and a.i in ctu.FLOATING for a in node.attribute)
        }

    @cached_property
    def _in_files(self) -> set[str]:
        tensors = self.graph.initializer if isinstance(self.graph, GraphProto) else ()
        external = TensorProto.EXTERNAL
        return {t.name for t in tensors if t.data_location == external and t.dims in ([], [1])}

    @cached_property
    def _constants(self) -> dict[str, float]:
        numbers = {}
        if isinstance(self.graph, GraphProto):
            numbers.update((tensor.name, _number(tensor)) for tensor in self.graph.initializer)
        for node in self.graph.node:
            if node.op_type == "Constant" and node.output:
                for attribute in node.attribute:
                    numbers[node.output[0]] = _number_of_attribute(attribute)
        return {name: number for name, number in numbers.items() if number is not None}


def _number(tensor: TensorProto) -> float | None:
    # A tensor with more dimensions could change the shape of what it is combined with.
    if tensor.dims not in ([], [1]) or tensor.data_location == TensorProto.EXTERNAL:
        return None
    try:
        return float(numpy_helper.to_array(tensor).item())
    except (KeyError, TypeError, ValueError):
        return None  # A string, an unknown type, or a tensor without its data.


def _number_of_attribute(attribute: AttributeProto) -> float | None:
    if attribute.ref_attr_name:
        return None
    if attribute.type == AttributeProto.TENSOR:
        return _number(attribute.t)
    if attribute.type in (AttributeProto.FLOAT, AttributeProto.INT):
        return float(helper.get_attribute_value(attribute))
    return None


def scopes(model: ModelProto) -> Iterator[Scope]:
    """Yield every Scope of a model, parents before children: the one loop over graph, subgraphs
    and functions. `inference.typed_scopes` fills in their types."""
    # Before IR 4 initializers were inputs too, and constant all the same.
    yield from nested_scopes(Scope("", model.graph, inputs_vary=model.ir_version >= 4))
    for function in model.functions:
        yield from nested_scopes(Scope(f"{function.domain}::{function.name}", function, function))


def nested_scopes(scope: Scope) -> Iterator[Scope]:
    """Yield a Scope and those of the subgraphs in it."""
    yield scope
    for node in scope.graph.node:
        for attribute in node.attribute:
            if attribute.type != AttributeProto.GRAPH and not attribute.graphs:
                continue
            prefix = f"{scope.path}/" if scope.path else ""
            path = f"{prefix}{node_label(node)}.{attribute.name}"
            if attribute.type == AttributeProto.GRAPH:
                yield from nested_scopes(Scope(path, attribute.g, scope.function, scope))
            for i, graph in enumerate(attribute.graphs):
                yield from nested_scopes(Scope(f"{path}[{i}]", graph, scope.function, scope))


def reads(node: NodeProto) -> set[str]:
    """The names of the tensors that a node reads, in its subgraphs too."""
    names = set(filter(None, node.input))
    for subgraph in _subgraphs(node):
        names |= _captured(subgraph)
    return names


def readers(scope: Scope) -> Counter[str]:
    """How many nodes, and outputs of the scope, read each tensor."""
    graph = scope.graph
    if isinstance(graph, FunctionProto):
        counts = Counter(graph.output)
    else:
        counts = Counter(value.name for value in graph.output)
    for node in graph.node:
        counts.update(reads(node))
    return counts


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        else:
            yield from attribute.graphs


def _captured(subgraph: GraphProto) -> set[str]:
    """The names of the tensors that a subgraph reads from the graph around it."""
    own = {value.name for value in (*subgraph.input, *subgraph.initializer)}
    own.update(tensor.values.name for tensor in subgraph.sparse_initializer)
    names = {value.name for value in subgraph.output}
    for node in subgraph.node:
        names |= reads(node)
        own.update(node.output)
    return names - own


def node_label(node: NodeProto) -> str:
    """The name of a node, or that of its first output."""
    return node.name or next(filter(None, node.output), node.op_type)


def key_of(proto: NodeProto | FunctionProto) -> Key:
    """What ties a call, a NodeProto, to its FunctionProto."""
    name = proto.name if isinstance(proto, FunctionProto) else proto.op_type
    return proto.domain, name, proto.overload


def root_of(scope: Scope) -> Key | None:
    """The function around a Scope, None for those of the main graph."""
    return None if scope.function is None else key_of(scope.function)


def opset_of(owner: ModelProto | FunctionProto) -> int:
    """The opset of the standard ops that a model or function imports, 0 for none."""
    imports = (entry for entry in owner.opset_import if entry.domain in DEFAULT_DOMAINS)
    return max((entry.version for entry in imports), default=0)


def functions_of(model: ModelProto) -> dict[Key, FunctionProto]:
    """The model-local functions by `key_of`.

    Raises:
        ModelError: two functions share a name.
    """
    functions = {key_of(function): function for function in model.functions}
    if len(functions) != len(model.functions):
        raise ModelError("the model holds two functions of one name")
    return functions


def keep(repeated: MutableSequence, wanted: Callable) -> None:
    """Drop the elements of a repeated protobuf field for which `wanted` is false."""
    for i in reversed(range(len(repeated))):
        if not wanted(repeated[i]):
            del repeated[i]


def put(repeated: MutableSequence, elements: Iterable) -> None:
    """Replace the elements of a repeated protobuf field, by copies of some of its own too."""
    elements = list(elements)
    del repeated[:]
    repeated.extend(elements)


def check_names(model: ModelProto, scopes: Iterable[Scope]) -> None:
    """Refuse a model with a name that is not UTF-8, in the model itself or in its `scopes`.

    Raises:
        ModelError: there is one.
    """
    for proto in (*model.opset_import, *model.functions):
        check_text(proto.domain)
    check_text(*(entry.key for entry in model.metadata_props))
    for function in model.functions:
        check_text(function.name, function.overload, *function.attribute)
    for scope in scopes:
        _check_names(scope.graph)


def _check_names(graph: GraphProto | FunctionProto) -> None:
    check_text(graph.name)
    if isinstance(graph, FunctionProto):
        check_text(*graph.input, *graph.output, *(entry.domain for entry in graph.opset_import))
    else:
        for values in (graph.input, graph.output, graph.value_info, graph.initializer):
            check_text(*(value.name for value in values))
        check_text(*(tensor.values.name for tensor in graph.sparse_initializer))
    for node in graph.node:
        check_text(node.name, node.op_type, node.domain, node.overload, *node.input, *node.output)
        check_text(*(attribute.name for attribute in node.attribute))
        check_text(*(entry.key for entry in node.metadata_props))


def check_text(*texts: object) -> None:
    """Refuse names that are not UTF-8.

    Raises:
        ModelError: there is one.
    """
    # Protobuf gives text that is not UTF-8 as bytes, which serve as no key or name.
    if any(isinstance(text, bytes) for text in texts):
        raise ModelError("a name in the model is not UTF-8")
