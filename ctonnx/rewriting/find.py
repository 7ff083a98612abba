"""Finding activations: which nodes are activations, which are steered, and why others are not."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from .. import ctu
from ..model.graph import DEFAULT_DOMAINS, Scope, node_label, readers
from . import activations, records

# Characters of the scopes that PyTorch's exporter writes to a node.
_LONGEST_SCOPES = 10_000


@dataclass(frozen=True)
class Activation:
    """One activation of a model, as `inspect` and `patch` report it.

    `scope` is the subgraph or function that holds it, "" for the main graph. `status` is
    "steerable", "steered" or "skipped", the last with a `reason`. `beta` and `coeff` are those of a
    steered one: a number, nested lists where they differ per channel, and None where they are fed
    at run time. `shape` is that of its tensor as far as inference knows it, and `module` the path
    of the PyTorch module that it comes from, where the exporter wrote that down.
    """

    name: str
    op: str
    scope: str
    status: str
    reason: str | None = None
    beta: float | list | None = None
    coeff: float | list | None = None
    shape: list[int | str | None] | None = None
    module: str | None = None

    @property
    def path(self) -> str:
        """`scope/name`, which is unique in a model whose nodes have unique names."""
        return f"{self.scope}/{self.name}" if self.scope else self.name


@dataclass(frozen=True)
class Site:
    """An activation in its place.

    `dtypes` holds the element types of its tensor, none where they are unknown. `steering` is what
    a steerable one becomes. `inner` is the activation as a node of its own where it is fused into
    `node`. `absorbed` is another node whose bound the steered one takes over, such as the Relu of
    Min(Relu(X), 6), and the tensor that it bounds.
    """

    activation: Activation
    node: NodeProto
    scope: Scope
    dtypes: set[int]
    steering: activations.Steering | None = None
    inner: NodeProto | None = None
    absorbed: tuple[NodeProto, str] | None = None

    @property
    def becomes(self) -> activations.Steering:
        """The `steering` of a steerable site."""
        assert self.steering is not None
        return self.steering


def survey(scopes: list[Scope], values: dict[str, float | list | None]) -> Iterator[Site]:
    """Yield a Site for every activation in typed Scopes.

    Args:
        scopes: of the whole model, as inference.typed_scopes gives them.
        values: initializer -> its value, of those that hold a beta or coeff.
    """
    for scope in scopes:
        if scope.is_ours:
            continue
        producers = {name: node for node in scope.graph.node for name in node.output if name}
        pairs = _pairs(scope, producers)
        absorbed = {id(pair.absorbed[0]) for pair in pairs.values() if pair.absorbed}
        for node in scope.graph.node:
            if id(node) in absorbed:
                continue
            inner = activations.unfused(node)
            # X, bounds, slope and Y share one element type: the first that is known.
            types = (scope.types.get(name) for name in (*node.input, *node.output))
            dtypes = next(filter(None, types), set())
            pair = pairs.get(id(node))
            if pair is not None:
                judgement = _activation(node, node.op_type, scope, "steerable"), pair.steering
            else:
                judgement = _judge(node, inner, dtypes, scope, values, producers)
            if judgement is None:
                continue
            activation, steering = judgement
            activation = replace(
                activation,
                shape=scope.shapes.get((*node.output, "")[0]),
                module=_module(node),
            )
            together = None if pair is None else pair.absorbed
            yield Site(activation, node, scope, dtypes, steering, inner, together)


@dataclass(frozen=True)
class _Pair:
    """The Steering of a node that is a Clip together with the one before it. `absorbed` is as in
    Site, None where other nodes read that one too."""

    steering: activations.Steering
    absorbed: tuple[NodeProto, str] | None


def _pairs(scope: Scope, producers: Mapping[str, NodeProto]) -> dict[int, _Pair]:
    """The pairs of nodes that make up a Clip, by the id of the second."""
    pairs, members = {}, set()
    counts = None
    for node in scope.graph.node:
        if node.op_type not in ("Max", "Min", "Clip", "Relu") or id(node) in members:
            continue
        for name in node.input[:2]:
            first = producers.get(name)
            if first is None or id(first) in members or records.lowered_op(node) is not None:
                continue
            bounding = activations.unfused(first) or first
            steering = activations.as_clip(bounding, node, scope)
            if steering is None or not scope.types.get(name, set()) <= set(ctu.FLOATING):
                continue
            if counts is None:
                counts = readers(scope)
            alone = counts[name] == 1
            fused = bounding is not first
            if fused and not alone:
                continue  # X is no tensor of its own.
            x = steering.x
            if alone and _keeps_shape(bounding, x, scope):
                steering = replace(steering, x=name)
                pairs[id(node)] = _Pair(steering, (first, x))
            else:
                pairs[id(node)] = _Pair(steering, None)
            members.update((id(first), id(node)))
            break
    return pairs


def _keeps_shape(node: NodeProto, x: str, scope: Scope) -> bool:
    """Whether a node that bounds x by a constant surely gives the shape of x."""
    bounds = node.input if node.op_type in ("Max", "Min") else ()
    return all(activations.keeps_shape(scope, x, bound) for bound in bounds if bound != x)


def _activation(node, op, scope, status, **fields) -> Activation:
    return Activation(node_label(node), op, scope.path, status, **fields)


def _judge(node, inner, dtypes, scope, values, producers):
    """The Activation that a node is, and its Steering; None for any other node."""
    if ctu.is_ctu(node):
        # A CTU of another tool may lack its parameters.
        beta, coeff = (*(values.get(name) for name in node.input[1:3]), None, None)[:2]
        op = records.original_op(node)
        return _activation(node, op, scope, "steered", beta=beta, coeff=coeff), None
    lowered = records.lowered_op(node)
    if lowered is not None:
        return (_activation(node, lowered, scope, "steered"), None) if lowered else None
    judgement = activations.judge(inner or node, dtypes, scope)
    if judgement is None:
        judgement = activations.clips_at_zero(node, scope, producers)
    if judgement is None:
        return None
    if node.overload and node.domain in DEFAULT_DOMAINS:
        judgement = "it names an overload, and a standard op has none"
    op = (inner or node).op_type
    if isinstance(judgement, str):
        return _activation(node, op, scope, "skipped", reason=judgement), None
    return _activation(node, op, scope, "steerable"), judgement


def _module(node: NodeProto) -> str | None:
    """The PyTorch module that a node comes from: its exporter writes the scopes around it."""
    text = records.get(node, "pkg.torch.onnx.name_scopes") or ""
    # Python's parser takes deep nesting for its own stack's end, or its memory's.
    if len(text) > _LONGEST_SCOPES:
        return None
    try:
        names = ast.literal_eval(text)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return None  # The key is missing, or another exporter's.
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return next(filter(None, reversed(names[:-1])), None)


def decimal(tensor: TensorProto) -> float | list | None:
    """The numbers of a float32 tensor, with the fewest digits that tell two float32 apart.

    None for a tensor that is none of ours: of another type, external, or damaged.
    """
    if tensor.data_type != TensorProto.FLOAT or tensor.data_location == TensorProto.EXTERNAL:
        return None
    try:
        array = numpy_helper.to_array(tensor)
    except ValueError:
        return None
    return np.reshape([float(str(value)) for value in array.ravel()], array.shape).tolist()
