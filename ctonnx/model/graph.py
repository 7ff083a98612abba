"""Walking a model, and the element types of the tensors in it."""

from collections import ChainMap, Counter, defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter

import onnx
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    TensorProto,
    helper,
    numpy_helper,
    shape_inference,
)

from ..errors import ModelError

_INFERENCE_ERRORS = (
    shape_inference.InferenceError,
    onnx.checker.ValidationError,
    RuntimeError,
    ValueError,
)

# The two names of the domain of the standard ops.
DEFAULT_DOMAINS = ("", "ai.onnx")

# How deep functions may call each other, which is onnx's own limit, and how often.
_MAX_DEPTH = 100
_MAX_CALLS = 1_000_000


@dataclass
class Scope:
    """A body of nodes: the graph, an If/Loop/Scan body, or a model-local function.

    `path` is "" for the graph, "node.attribute" chained with "/" for a body inside it, and
    "domain::name" for a function. `function` is the function that encloses the body, if any, and
    `parent` the scope whose names the body sees. `inputs_vary` is False where initializers of the
    body's inputs' names are constants.
    `types` maps a tensor's name to the set of its TensorProto element types; a function called
    with several types has several, and an unknown one is missing. `shapes` maps it to its
    dimensions, a number, a symbol or None each; None where calls differ. Names of `parent` are
    found through it, for copies of them would take quadratic time.
    """

    path: str
    body: GraphProto | FunctionProto
    function: FunctionProto | None = None
    parent: "Scope | None" = None
    inputs_vary: bool = True
    types: ChainMap = field(init=False)
    shapes: ChainMap = field(init=False)

    def __post_init__(self):
        self.types = self.parent.types.new_child() if self.parent else ChainMap()
        self.shapes = self.parent.shapes.new_child() if self.parent else ChainMap()

    def constant(self, name):
        """The number that the body sees under `name`, where that is a scalar constant, or None."""
        if self.inputs_vary and name in self._inputs:
            return None
        if name in self._constants:
            return self._constants[name]
        return self.parent.constant(name) if self.parent else None

    @cached_property
    def _inputs(self):
        return {getattr(value, "name", value) for value in self.body.input}

    @cached_property
    def _constants(self):
        found = {}
        if isinstance(self.body, GraphProto):
            found.update((tensor.name, _number(tensor)) for tensor in self.body.initializer)
        for node in self.body.node:
            if node.op_type == "Constant" and node.output:
                for attribute in node.attribute:
                    found[node.output[0]] = _number_of_attribute(attribute)
        return {name: number for name, number in found.items() if number is not None}


def _number(tensor):
    # Of more dimensions, it could change the shape of what it is combined with.
    if tensor.dims not in ([], [1]) or tensor.data_location == TensorProto.EXTERNAL:
        return None
    try:
        return float(numpy_helper.to_array(tensor).item())
    except (KeyError, TypeError, ValueError):
        return None  # A string, a type unknown, or a tensor without its data.


def _number_of_attribute(attribute):
    if attribute.ref_attr_name:
        return None
    if attribute.type == AttributeProto.TENSOR:
        return _number(attribute.t)
    if attribute.type in (AttributeProto.FLOAT, AttributeProto.INT):
        return float(helper.get_attribute_value(attribute))
    return None


def keep(repeated, wanted):
    """Drop the elements of a repeated field for which the function `wanted` is false."""
    for i in reversed(range(len(repeated))):
        if not wanted(repeated[i]):
            del repeated[i]


def node_label(node):
    """What a node is called: its name, or that of its first output."""
    return node.name or next(filter(None, node.output), node.op_type)


def scopes(model):
    """Every Scope of a ModelProto, parents before children: the one loop over graph, subgraphs and
    functions. Types are not filled in; see `typed_scopes`."""
    # Until IR 4 initializers were inputs too, and constant all the same.
    yield from _scopes(Scope("", model.graph, inputs_vary=model.ir_version >= 4))
    for function in model.functions:
        yield from _scopes(Scope(f"{function.domain}::{function.name}", function, function))


def _check_text(*texts):
    # What is not UTF-8 comes as bytes, which are no key or name to work with.
    if any(isinstance(text, bytes) for text in texts):
        raise ModelError("a name in the model is not UTF-8")


def check_names(model):
    """Raise ModelError where a name in the model is not UTF-8."""
    for proto in (*model.opset_import, *model.functions):
        _check_text(proto.domain)
    _check_text(*(entry.key for entry in model.metadata_props))
    for function in model.functions:
        _check_text(function.name, function.overload, *function.attribute)
    for scope in scopes(model):
        _check_names(scope.body)


def _check_names(body):
    _check_text(body.name)
    if isinstance(body, FunctionProto):
        _check_text(*body.input, *body.output, *(entry.domain for entry in body.opset_import))
    else:
        for values in (body.input, body.output, body.value_info, body.initializer):
            _check_text(*(value.name for value in values))
        _check_text(*(tensor.values.name for tensor in body.sparse_initializer))
    for node in body.node:
        _check_text(node.name, node.op_type, node.domain, node.overload, *node.input, *node.output)
        _check_text(*(attribute.name for attribute in node.attribute))
        _check_text(*(entry.key for entry in node.metadata_props))


def _scopes(scope):
    yield scope
    for node in scope.body.node:
        for attribute in node.attribute:
            prefix = f"{scope.path}/" if scope.path else ""
            path = f"{prefix}{node_label(node)}.{attribute.name}"
            if attribute.type == AttributeProto.GRAPH:
                yield from _scopes(Scope(path, attribute.g, scope.function, scope))
            for i, graph in enumerate(attribute.graphs):
                yield from _scopes(Scope(f"{path}[{i}]", graph, scope.function, scope))


def key_of(proto):
    """Domain, name and overload: what ties a call (NodeProto) to its FunctionProto."""
    name = proto.name if isinstance(proto, FunctionProto) else proto.op_type
    return proto.domain, name, proto.overload


def functions_of(model):
    """The model-local functions by `key_of`.

    Raises:
        ModelError: two are of the same name.
    """
    functions = {key_of(function): function for function in model.functions}
    if len(functions) != len(model.functions):
        raise ModelError("the model holds two functions of one name")
    return functions


def _check_calls(by_function):
    """Raise ModelError where functions call themselves, or each other so often or so deep that a
    small file keeps onnx's inference, which follows every call, busy for hours.

    Args:
        by_function: the Scopes of each function by `key_of`, and those of the graph by ().
    """
    calls = {
        key: Counter(key_of(node) for scope in inside for node in scope.body.node)
        for key, inside in by_function.items()
    }
    depth, total = {}, {}
    try:
        for key in TopologicalSorter(calls).static_order():
            made = calls.get(key, {})
            depth[key] = 1 + max((depth[callee] for callee in made), default=0)
            # An op that is no function is not followed.
            total[key] = sum(n * (1 + total[c]) for c, n in made.items() if c in by_function)
    except CycleError as error:
        name = "::".join(error.args[1][0][:2])
        raise ModelError(f"the model's function {name} calls itself") from None
    if max(depth.values(), default=0) > _MAX_DEPTH or max(total.values(), default=0) > _MAX_CALLS:
        raise ModelError("the model's functions call each other too often, or too deep")


def typed_scopes(model):
    """The list of `scopes(model)` with `types` filled in as far as onnx's inference knows them.

    Raises:
        ModelError: two functions are of the same name, or they call each other beyond all bounds.
    """
    found = list(scopes(model))
    functions = functions_of(model)
    by_function = defaultdict(list)
    for scope in found:
        if scope.function is not None:
            by_function[key_of(scope.function)].append(scope)

    graph_scopes = [s for s in found if s.function is None]
    _check_calls({(): graph_scopes, **by_function})
    pending, seen = deque(), set()

    def collect(targets, inferred):
        """Merge the types of an inferred graph into the scopes that mirror its structure."""
        for target, mirror in zip(targets, inferred, strict=True):
            for name, types in mirror.types.maps[0].items():
                target.types.maps[0].setdefault(name, set()).update(types)
            held = target.shapes.maps[0]
            for name, shape in mirror.shapes.maps[0].items():
                # Calls of one function may differ: then nothing is known of it.
                held[name] = shape if held.get(name, shape) == shape else None
            for node in mirror.body.node:
                key = key_of(node)
                if key in functions:
                    arguments = tuple(frozenset(mirror.types.get(n, ())) for n in node.input)
                    if (key, arguments) not in seen:
                        seen.add((key, arguments))
                        pending.append((key, arguments))

    collect(graph_scopes, _inferred(_without_weights(model)))
    while pending:
        key, arguments = pending.popleft()
        function = functions[key]
        inputs = [
            helper.make_tensor_value_info(name, next(iter(types)), None)
            for name, types in zip(function.input, arguments, strict=False)
            if len(types) == 1
        ]
        graph = GraphProto(name=function.name, node=function.node, input=inputs)
        collect(
            by_function[key],
            _inferred(
                ModelProto(
                    ir_version=model.ir_version,
                    opset_import=function.opset_import,
                    graph=graph,
                    functions=_called(function, functions),
                )
            ),
        )
    return found


def _called(function, functions):
    """The FunctionProtos that `function` calls, directly or not."""
    found, pending = {}, [function]
    while pending:
        for scope in _scopes(Scope("", pending.pop())):
            for key in map(key_of, scope.body.node):
                if key in functions and key not in found:
                    found[key] = functions[key]
                    pending.append(functions[key])
    return found.values()


def _inferred(model):
    """The scopes of the model's graph, bodies included, with the types that inference finds."""
    # Where inference fails, what the model itself declares is all that is known.
    with suppress(*_INFERENCE_ERRORS):
        model = shape_inference.infer_shapes(model)
    result = list(_scopes(Scope("", model.graph)))
    for scope in result:
        graph = scope.body
        for tensor in graph.initializer:
            scope.types[tensor.name] = {tensor.data_type}
            scope.shapes[tensor.name] = list(tensor.dims)
        for value in (*graph.input, *graph.output, *graph.value_info):
            kind = value.type.tensor_type
            if kind.elem_type:
                scope.types[value.name] = {kind.elem_type}
            if kind.HasField("shape"):
                scope.shapes[value.name] = [_dimension(dim) for dim in kind.shape.dim]
    return result


def _dimension(dim):
    # Inference invents symbols for dimensions that have none; one that is not UTF-8 comes as bytes.
    symbol = dim.dim_param
    if symbol and isinstance(symbol, str) and not symbol.startswith("unk__"):
        return symbol
    return dim.dim_value if dim.HasField("dim_value") else None


def _without_weights(model):
    """A copy of the model for inference: large initializers keep their type and shape only."""
    light = ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    graph = model.graph
    light.graph.MergeFrom(
        GraphProto(
            name=graph.name,
            node=graph.node,
            input=graph.input,
            output=graph.output,
            value_info=graph.value_info,
        )
    )
    for tensor in graph.initializer:
        if tensor.ByteSize() <= 1024:
            light.graph.initializer.append(tensor)
        else:
            light.graph.initializer.add(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims
            )
    return light
