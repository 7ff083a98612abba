"""Walking a model, and the element types of the tensors in it."""

from collections import Counter, defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, helper, shape_inference

from .errors import ModelError

_INFERENCE_ERRORS = (
    shape_inference.InferenceError,
    onnx.checker.ValidationError,
    RuntimeError,
    ValueError,
)

# How deep functions may call each other, which is onnx's own limit, and how often.
_MAX_DEPTH = 100
_MAX_CALLS = 1_000_000


@dataclass
class Scope:
    """A body of nodes: the graph, an If/Loop/Scan body, or a model-local function.

    `path` is "" for the graph, "node.attribute" chained with "/" for a body inside it, and
    "domain::name" for a function. `function` is the function that encloses the body, if any, and
    `parent` the scope whose names the body sees.
    `types` maps a tensor's name to the set of its TensorProto element types; a function called
    with several types has several, and an unknown one is missing.
    """

    path: str
    body: GraphProto | FunctionProto
    function: FunctionProto | None = None
    parent: "Scope | None" = None
    types: dict = field(default_factory=dict)


def node_label(node):
    """What a node is called: its name, or that of its first output."""
    return node.name or next(filter(None, node.output), node.op_type)


def scopes(model):
    """Every Scope of a ModelProto, parents before children: the one loop over graph, subgraphs and
    functions. Types are not filled in; see `typed_scopes`.

    Raises:
        ModelError: a name in the model is not UTF-8.
    """
    for proto in (*model.opset_import, *model.functions):
        _check_text(proto.domain)
    _check_text(*(entry.key for entry in model.metadata_props))
    yield from _scopes(Scope("", model.graph))
    for function in model.functions:
        _check_text(function.name, function.overload, *function.attribute)
        yield from _scopes(Scope(f"{function.domain}::{function.name}", function, function))


def _check_text(*texts):
    # What is not UTF-8 comes as bytes, which are no key or name to work with.
    if any(isinstance(text, bytes) for text in texts):
        raise ModelError("a name in the model is not UTF-8")


def _check_names(body):
    """Raise ModelError where a name in `body` is not UTF-8."""
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
    _check_names(scope.body)
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


def names(model):
    """Every name of a tensor anywhere in the model."""
    found = set()
    for scope in scopes(model):
        body = scope.body
        if isinstance(body, FunctionProto):
            found.update(body.input, body.output)
        else:
            for values in (body.input, body.output, body.value_info, body.initializer):
                found.update(value.name for value in values)
            found.update(tensor.values.name for tensor in body.sparse_initializer)
        for node in body.node:
            found.update(node.input, node.output)
    return found


def unique_name(base, taken):
    """`base`, or `base` with the first number that makes it differ from all of `taken`."""
    name, number = base, 1
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    return name


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
            for name, types in mirror.types.items():
                target.types.setdefault(name, set()).update(types)
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
                    functions=model.functions,
                )
            ),
        )
    return found


def _inferred(model):
    """The scopes of the model's graph, bodies included, with the types that inference finds."""
    # Where inference fails, what the model itself declares is all that is known.
    with suppress(*_INFERENCE_ERRORS):
        model = shape_inference.infer_shapes(model)
    result = list(_scopes(Scope("", model.graph)))
    for scope in result:
        graph = scope.body
        scope.types = dict(scope.parent.types) if scope.parent else {}
        for tensor in graph.initializer:
            scope.types[tensor.name] = {tensor.data_type}
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type:
                scope.types[value.name] = {value.type.tensor_type.elem_type}
    return result


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
