"""The element types and shapes of tensors, by onnx's inference, through subgraphs and functions."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter

import onnx
from onnx import FunctionProto, GraphProto, ModelProto, helper, shape_inference

from ..errors import ModelError
from .bounds import bound_inference
from .graph import Key, Scope, functions_of, key_of, nested_scopes, root_of
from .order import restore_order, sort_nodes

INFERENCE_ERRORS = (
    shape_inference.InferenceError,
    onnx.checker.ValidationError,
    RuntimeError,
    ValueError,
)

_CONVERTING = {"Cast", "CastLike", "DequantizeLinear", "Identity", "QuantizeLinear"}

# Bounds on how deep functions call each other, which is onnx's own, and on the nodes that inference
# visits when it follows every call: a million take 4 s.
_MAX_DEPTH = 100
_MAX_NODES = 1_000_000


def typed_scopes(model: ModelProto, scopes: list[Scope]) -> list[Scope]:
    """Fill in `types` and `shapes` of a model's `scopes`, as far as inference knows them.

    Returns:
        `scopes`.

    Raises:
        ModelError: two functions share a name, functions call each other beyond all bounds, or
            nodes depend on themselves.
    """
    functions = functions_of(model)
    by_function = check_calls(model, scopes)
    pending, seen = deque(), set()

    def collect(targets, inferred):
        """Merge the types of an inferred graph into the scopes that mirror its structure."""
        for target, mirror in zip(targets, inferred, strict=True):
            _merge(target, mirror)
            for node in mirror.graph.node:
                key = key_of(node)
                if key in functions:
                    arguments = tuple(frozenset(mirror.types.get(n, ())) for n in node.input)
                    if (key, arguments) not in seen:
                        seen.add((key, arguments))
                        pending.append((key, arguments))

    collect(by_function[None], _inferred(without_weights(model)))
    while pending:
        key, arguments = pending.popleft()
        call = _as_model(functions[key], arguments, model.ir_version, functions)
        collect(by_function[key], _inferred(call))
    return scopes


def computed_types(scopes: Iterable[Scope]) -> set[int]:
    """The element types of what the nodes of typed scopes read, but for those that only convert."""
    return {
        dtype
        for scope in scopes
        for node in scope.graph.node
        if node.op_type not in _CONVERTING
        for name in node.input
        for dtype in scope.types.get(name, ())
    }


def _merge(target: Scope, mirror: Scope) -> None:
    """Add the types and shapes of `mirror`, an inferred copy, to those of `target`."""
    for name, types in mirror.types.maps[0].items():
        target.types.maps[0].setdefault(name, set()).update(types)
    shapes = target.shapes.maps[0]
    for name, shape in mirror.shapes.maps[0].items():
        # Calls of one function may differ: then its shape is unknown.
        shapes[name] = shape if shapes.get(name, shape) == shape else None


def _as_model(
    function: FunctionProto,
    arguments: tuple[frozenset[int], ...],
    ir_version: int,
    functions: dict[Key, FunctionProto],
) -> ModelProto:
    """A call of a function, with the element types of its arguments, as a model of its own."""
    inputs = [
        helper.make_tensor_value_info(name, next(iter(types)), None)
        for name, types in zip(function.input, arguments, strict=False)
        if len(types) == 1
    ]
    return ModelProto(
        ir_version=ir_version,
        opset_import=function.opset_import,
        graph=GraphProto(name=function.name, node=function.node, input=inputs),
        functions=_called(function, functions),
    )


def check_calls(model: ModelProto, scopes: list[Scope]) -> dict[Key | None, list[Scope]]:
    """Refuse functions that call themselves, or each other so often or so deep that a small file
    keeps onnx's inference, which follows every call, busy for hours.

    Returns:
        the Scopes of each function by `key_of`, and those of the main graph by None.

    Raises:
        ModelError: two functions share a name, or the calls are beyond all bounds.
    """
    functions_of(model)  # refuses two of one name
    by_function = defaultdict(list)
    for scope in scopes:
        by_function[root_of(scope)].append(scope)
    calls = {
        key: Counter(key_of(node) for scope in inside for node in scope.graph.node)
        for key, inside in by_function.items()
    }
    depth, total = {}, {}
    try:
        for key in TopologicalSorter(calls).static_order():
            callees = calls.get(key, {})
            depth[key] = 1 + max((depth[callee] for callee in callees), default=0)
            # An op that is no function is one node.
            total[key] = sum(n * (1 + total.get(c, 0)) for c, n in callees.items())
    except CycleError as error:
        name = "::".join(error.args[1][0][:2])
        raise ModelError(f"the model's function {name} calls itself") from None
    # Inference starts from the graph, and from each function again. Its own nodes are few.
    visited = sum(total.values()) - sum(sum(nodes.values()) for nodes in calls.values())
    if max(depth.values(), default=0) > _MAX_DEPTH or visited > _MAX_NODES:
        raise ModelError("the model's functions call each other too often, or too deep")
    return by_function


def _called(
    function: FunctionProto, functions: dict[Key, FunctionProto]
) -> Iterable[FunctionProto]:
    """The functions that `function` calls, directly or not."""
    callees, pending = {}, [function]
    while pending:
        for scope in nested_scopes(Scope("", pending.pop())):
            for key in map(key_of, scope.graph.node):
                if key in functions and key not in callees:
                    callees[key] = functions[key]
                    pending.append(functions[key])
    return callees.values()


def _inferred(model: ModelProto) -> list[Scope]:
    """The Scopes of the main graph and its subgraphs, with the types that inference finds.

    `model` is a copy, which changes.
    """
    # Inference goes by the order of the nodes; the scopes to fill in have that of the model.
    orders = sort_nodes(model)
    bound_inference(model)
    # Where inference fails, by whatever exception of C++, what the model declares is known.
    with suppress(Exception):
        model = shape_inference.infer_shapes(model)
    restore_order(model, orders)
    result = list(nested_scopes(Scope("", model.graph)))
    for scope in result:
        graph = scope.graph
        assert isinstance(graph, GraphProto)  # inference has inlined no function
        for tensor in graph.initializer:
            scope.types[tensor.name] = {tensor.data_type}
            scope.shapes[tensor.name] = list(tensor.dims)
        for value in (*graph.input, *graph.output, *graph.value_info):
            kind = value.type.tensor_type
            if kind.elem_type:
                scope.types[value.name] = {kind.elem_type}
            elif value.type.HasField("sequence_type"):
                scope.types[value.name] = set()
            if kind.HasField("shape"):
                scope.shapes[value.name] = [_dimension(dim) for dim in kind.shape.dim]
    return result


def _dimension(dim) -> int | str | None:
    # Inference invents symbols for unknown dimensions; one that is not UTF-8 comes as bytes.
    symbol = dim.dim_param
    if symbol and isinstance(symbol, str) and not symbol.startswith("unk__"):
        return symbol
    return dim.dim_value if dim.HasField("dim_value") else None


def without_weights(model: ModelProto) -> ModelProto:
    """A copy of a model for inference, in which large initializers keep only type and shape."""
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
