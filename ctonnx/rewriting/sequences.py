"""SequenceMap as the Loop that it stands for, where its body holds steered activations.

ONNX Runtime makes that Loop itself. But first it puts the functions that the body calls in place,
and then loses names of theirs, so that the model does not load (microsoft/onnxruntime#22100).
"""

from collections.abc import Iterable, Mapping, MutableSequence

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from ..errors import ModelError
from ..model.graph import (
    DEFAULT_DOMAINS,
    Scope,
    functions_of,
    keep,
    key_of,
    nested_scopes,
    node_label,
    put,
    readers,
    reads,
    scopes,
)
from ..model.inference import typed_scopes
from ..model.names import FreshNames
from . import records


def to_loops(
    model: ModelProto, parameters: Iterable[str], fresh_name: FreshNames
) -> tuple[int, int]:
    """Make a Loop, in place, of each SequenceMap whose body calls a function with `parameters`.

    Args:
        parameters: the tensors that steering has added.
        fresh_name: gives names for tensors.

    Returns:
        how many became Loops, and how many stay, as it is not known which of their inputs are
        sequences, or of which type their outputs are.
    """
    parameters, functions = set(parameters), functions_of(model)
    everywhere = list(scopes(model))
    found = [
        (scope, node)
        for scope in everywhere
        for node in scope.graph.node
        if node.op_type == "SequenceMap"
        and node.domain in DEFAULT_DOMAINS
        and any(
            key_of(inner) in functions and not parameters.isdisjoint(inner.input)
            for inside in nested_scopes(Scope("", _body(node)))
            for inner in inside.graph.node
        )
    ]
    if found:
        typed_scopes(model, everywhere)
    made = sum(_to_loop(scope, node, fresh_name) for scope, node in found)
    return made, len(found) - made


def from_loops(everywhere: list[Scope], converted: bool) -> bool:
    """Make the SequenceMaps of their Loops again, in place; whether there are any.

    Args:
        everywhere: the typed Scopes of a model.
        converted: whether another tool may have changed types.

    Raises:
        ModelError: another tool has changed such a Loop, or a record is damaged.
    """
    found = [
        (scope, node)
        for scope in everywhere
        for node in scope.graph.node
        if records.is_recorded(node) and is_loop(records.original_node(node))
    ]
    types = {id(scope.graph): scope.types for scope in everywhere if converted}
    for scope, node in found:
        if not _from_loop(scope, node, types.get(id(_body(node)), {})):
            raise ModelError(
                f"the Loop {node_label(node)!r} was a SequenceMap, and another tool has changed "
                "it: cannot undo: go back to the original"
            )
    return bool(found)


def is_loop(before: NodeProto) -> bool:
    """Whether a record is that of a SequenceMap that became a Loop."""
    return before.op_type == "SequenceMap"


def _body(node: NodeProto) -> GraphProto:
    return next((a.g for a in node.attribute if a.name == "body"), GraphProto())


def _insert(nodes: MutableSequence[NodeProto], at: int, new: list[NodeProto]) -> None:
    # In place: references to the other nodes stay valid.
    for node in reversed(new):
        nodes.insert(at, node)


def _to_loop(scope: Scope, node: NodeProto, fresh_name: FreshNames) -> bool:
    """Make a Loop of one SequenceMap, unless something is missing for that."""
    body = _body(node)
    dtypes = [value.type.tensor_type.elem_type for value in body.output]
    others = [scope.types.get(name) for name in node.input[1:]]
    fits = len(node.input) == len(body.input) and len(node.output) == len(body.output)
    if not fits or not any(node.input[:1]) or not all(dtypes) or None in others:
        return False
    records.record_sequence_map(node, body)

    step, going, still = map(fresh_name, ("step", "going", "still"))
    inputs = [
        helper.make_tensor_value_info(step, TensorProto.INT64, []),
        helper.make_tensor_value_info(going, TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info(still, TensorProto.BOOL, [])]
    heads, tails = [helper.make_node("Identity", [going], [still])], []
    for place, (name, value) in enumerate(zip(node.input, body.input, strict=True)):
        if place and others[place - 1]:
            head = helper.make_node("Identity", [name], [value.name])
        else:
            head = helper.make_node("SequenceAt", [name, step], [value.name])
        records.mark_element(head, place)
        heads.append(head)
    around = [helper.make_node("SequenceLength", node.input[:1], [fresh_name("length")])]
    for value, dtype in zip(body.output, dtypes, strict=True):
        none, some, more = (fresh_name(f"{value.name}_{part}") for part in ("none", "some", "more"))
        around.append(helper.make_node("SequenceEmpty", [], [none], dtype=dtype))
        inputs.append(helper.make_tensor_sequence_value_info(some, dtype, None))
        outputs.append(helper.make_tensor_sequence_value_info(more, dtype, None))
        tails.append(helper.make_node("SequenceInsert", [some, value.name], [more]))

    _insert(body.node, 0, heads)
    body.node.extend(tails)
    put(body.input, inputs)
    put(body.output, outputs)
    length, *empty = (other.output[0] for other in around)
    node.op_type, node.input[:] = "Loop", [length, "", *empty]
    at = next(i for i, other in enumerate(scope.graph.node) if other is node)
    _insert(scope.graph.node, at, around)
    return True


def _from_loop(scope: Scope, node: NodeProto, types: Mapping[str, set[int]]) -> bool:
    """Make the SequenceMap of one Loop, unless that is not as `_to_loop` has made it.

    Args:
        types: tensor in the body -> its element types, where it may have others than recorded.
    """
    before = records.original_node(node)
    body, was = _body(node), _body(before)
    carried = len(was.output)
    sizes = len(node.input), len(body.input), len(body.output)
    if not was.input or node.op_type != "Loop" or sizes != (carried + 2, carried + 2, carried + 1):
        return False
    length, condition, *empty = node.input
    step, going, *some = (value.name for value in body.input)
    still, *more = (value.name for value in body.output)
    outside = {name: other for other in scope.graph.node for name in other.output}
    inside = {name: other for other in body.node for name in other.output}
    placed = {records.element_place(other): other for other in body.node}
    none = NodeProto()
    heads = [placed.get(str(place), none) for place in range(len(was.input))]
    tails = [inside.get(name, none) for name in more]
    goes_on, around = inside.get(still), [outside.get(name) for name in (length, *empty)]
    as_made = (
        not condition
        and _is(goes_on, "Identity", going)
        and all(_is(h, "SequenceAt", None, step) or _is(h, "Identity", None) for h in heads)
        and all(_is(t, "SequenceInsert", s, None) for t, s in zip(tails, some, strict=True))
        and _is(around[0], "SequenceLength", heads[0].input[0])
        and all(_is(other, "SequenceEmpty") for other in around[1:])
    )
    if not as_made:
        return False

    ours = {id(other) for other in (goes_on, *heads, *tails)}
    inner = set().union(*(reads(other) for other in body.node if id(other) not in ours))
    if not inner.isdisjoint({step, going, still, *some, *more}):
        return False

    names = [*(head.output[0] for head in heads), *(tail.input[1] for tail in tails)]
    for value, name in zip((*was.input, *was.output), names, strict=True):
        value.name = name
        dtypes = types.get(name, ())
        if len(dtypes) == 1:
            (value.type.tensor_type.elem_type,) = dtypes
    keep(body.node, lambda other: id(other) not in ours)
    put(body.input, was.input)
    put(body.output, was.output)
    node.op_type, node.input[:] = before.op_type, [head.input[0] for head in heads]
    records.drop_record(node)
    counts, gone = readers(scope), {id(other) for other in around}
    keep(
        scope.graph.node,
        lambda other: id(other) not in gone or any(counts[name] for name in other.output),
    )
    return True


def _is(node: NodeProto | None, op_type: str, *inputs: str | None) -> bool:
    """Whether a node is of a type, and has one output and these inputs, None for any."""
    return (
        node is not None
        and node.op_type == op_type
        and len(node.input) == len(inputs)
        and len(node.output) == 1
        and all(name in (None, own) for name, own in zip(inputs, node.input, strict=True))
    )
