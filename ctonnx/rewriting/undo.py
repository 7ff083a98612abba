"""Undoing `steer`, also after other tools have changed the steered model.

A node's record holds what the node was, with the names that its inputs had then. Other tools
rename tensors, put nodes in between and convert types, so X, slope and bounds are those that the
CTU reads now. An old name counts only for a constant that the CTU does not read, such as the zero
of a Max. Of the model itself only what steering added goes away: parameters that nothing else
reads, functions and the import.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from google.protobuf.message import Message
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, defs, shape_inference

from .. import ctu
from ..errors import ModelError
from ..model.graph import (
    Scope,
    keep,
    key_of,
    node_label,
    opset_of,
    root_of,
    scopes,
)
from ..model.inference import INFERENCE_ERRORS, typed_scopes, without_weights
from . import activations, records
from .leftovers import GONE, Nodes, drop_gone, restore_inputs
from .parameters import BETA_SLOT
from .renamed import give_back_names
from .sequences import from_loops, is_loop

_GO_BACK = "go back to the original"

# Which of a Clip's inputs an op of ours has as its operands, in order.
_BOUNDS = {ctu.OP_TYPE: (), "CTUMax": (1,), "CTUMin": (2,), "CTUClip": (1, 2)}


def unsteer(model: ModelProto) -> None:
    """Undo steering in place: every CTU, or none where one cannot be undone.

    Args:
        model: a ModelProto with CTUs.

    Raises:
        ModelError: a CTU has no record of what it replaced, a record is damaged, or another tool
            has changed the model so that the result would not be the original. The model is
            unchanged.
    """
    result = _light(model)
    give_back_names(result, whatever_they_do=True)
    undo = _Undo(result)
    undo.run()
    fault = _fault(result) if undo.touched else None
    if fault is not None:
        before = _light(model)
        give_back_names(before, whatever_they_do=True)
        for scope in scopes(before):
            _stand_in([node for node in scope.graph.node if ctu.is_ctu(node)])
        if undo.looped or _fault(before) is None:
            raise ModelError(f"cannot undo: the result is invalid ({fault}): {_GO_BACK}")
    if result.ir_version != model.ir_version:
        model.ir_version = result.ir_version
    for name in ("functions", "opset_import", "metadata_props"):
        _replace(model, result, name)
    for name in ("node", "input", "value_info"):
        _replace(model.graph, result.graph, name)
    keep(model.graph.initializer, lambda tensor: tensor.name not in undo.dropped)


def _replace(target: Message, source: Message, name: str) -> None:
    """Give a repeated field the elements that it has in another message."""
    target.ClearField(name)
    getattr(target, name).extend(getattr(source, name))


def _light(model: ModelProto) -> ModelProto:
    """A copy of a model, in which large initializers keep only type and shape."""
    light = without_weights(model)
    light.metadata_props.extend(model.metadata_props)
    light.graph.sparse_initializer.extend(model.graph.sparse_initializer)
    return light


def _stand_in(nodes: list[NodeProto]) -> None:
    """Make Relus of CTUs, in place: inference knows these whatever the CTUs' parameters are."""
    for node in nodes:
        node.op_type, node.domain = "Relu", ""
        del node.input[1:], node.attribute[:]


def _fault(model: ModelProto) -> str | None:
    """What is wrong with the types in a model, or None."""
    try:
        shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except INFERENCE_ERRORS as error:
        return " ".join(str(error).split())[:200]
    return None


@dataclass
class _Site:
    """A CTU in its place: `before` is its record, `op` its op type, `inputs` those it has now."""

    scope: Scope
    node: NodeProto
    before: NodeProto
    op: str
    inputs: list[str]

    @property
    def x(self) -> str:
        return self.inputs[0]

    @property
    def label(self) -> str:
        return f"CTU {node_label(self.node)!r}"

    def operand(self, index: int) -> str:
        if len(self.inputs) < 4 + index:
            raise ModelError(f"{self.label} lacks an input: cannot undo: {_GO_BACK}")
        return self.inputs[3 + index]


class _Undo:
    """The undoing of one model, in place.

    `dropped` are the names of the parameters removed. `touched` tells whether CTUs read other
    tensors, or of other types, than steering gave them. Where they do not, even what is invalid
    goes back as it was. `looped` tells whether SequenceMaps had become Loops.
    """

    def __init__(self, model: ModelProto):
        self._model = model
        self._scopes = [scope for scope in scopes(model) if not scope.is_ours]
        self._nodes = Nodes(self._scopes)
        self._tensors: dict[int, set[str]] = {}
        self.touched = self.looped = False
        self.dropped: set[str] = set()

    def run(self) -> None:
        metadata = records.Metadata(self._model)
        before = metadata.original()
        sites = list(self._sites())
        others = self._recorded()
        types = {tensor.name: tensor.data_type for tensor in self._model.graph.initializer}
        self.touched = any(_is_touched(site, types) for site in sites)
        _check_opset(self._model, sites)
        _stand_in([site.node for site in sites])
        keep(self._model.functions, lambda function: not ctu.is_ctu(function))
        typed_scopes(self._model, self._scopes)
        self.looped = from_loops(self._scopes, self.touched)

        reads = self._nodes.reads()
        hosts = {
            (id(scope.graph), node.output[0]): (node, before)
            for scope, node, before in others
            if before.output and node.output
        }
        for site in sites:
            if site.before.input:
                self._restore(site)
            elif reads[root_of(site.scope)][site.x] == 1:
                self._fuse(site, hosts)
            else:
                raise _taken_apart(site)
        for scope in self._scopes:
            drop_gone(scope)
        self._restore_absorbed(others)
        self._drop_parameters(sites)
        self._restore_calls(others)
        self._restore_imports(before)
        restore_inputs(self._model, before, self.touched)
        metadata.clear()

    # --- reading

    def _sites(self) -> Iterator[_Site]:
        for scope in self._scopes:
            for node in scope.graph.node:
                if records.lowered_op(node) is not None:
                    raise ModelError(
                        f"some activations were lowered to primitives: cannot undo: {_GO_BACK}"
                    )
                if ctu.is_ctu(node):
                    before = records.original_node(node)
                    if not node.input:
                        raise ModelError(f"CTU {node_label(node)!r} has no input: cannot undo")
                    yield _Site(scope, node, before, node.op_type, list(node.input))

    def _recorded(self) -> list[tuple[Scope, NodeProto, NodeProto]]:
        """The nodes that are no CTUs but have a record, and their records; without the Loops that
        were SequenceMaps."""
        recorded = [
            (scope, node, records.original_node(node))
            for scope in self._scopes
            for node in scope.graph.node
            if records.is_recorded(node) and not ctu.is_ctu(node)
        ]
        return [one for one in recorded if not is_loop(one[2])]

    def _value(self, scope: Scope, name: str) -> float | None:
        """The number that `name` is, where that is a scalar constant in all calls."""
        number = scope.constant(name)
        if number is not None or scope.function is None or name not in scope.function.input:
            return number
        index = list(scope.function.input).index(name)
        values = {
            self._value(caller, call.input[index]) if index < len(call.input) else None
            for caller, call in self._nodes.calls[key_of(scope.function)]
        }
        return values.pop() if len(values) == 1 else None

    def _find(self, site: _Site, old: str, is_it: Callable[[float], bool]) -> str | None:
        """The name today of a constant that was `old`, for which `is_it`, of the type of X; None
        where there is none."""
        names = [old]
        for before in site.before.input:
            # A tool that put a prefix or suffix on X's name put it on that of the constant too.
            if before and site.x.endswith(before):
                names.append(site.x.removesuffix(before) + old)
            elif before and site.x.startswith(before):
                names.append(old + site.x.removeprefix(before))
        for name in names:
            number = site.scope.constant(name)
            types = [site.scope.types.get(n) for n in (name, site.x)]
            fits = not self.touched or not all(types) or types[0] == types[1]
            if number is not None and is_it(number) and fits:
                return name
        return None

    def _visible(self, scope: Scope | None, name: str) -> bool:
        """Whether the nodes of a Scope see a tensor of that name."""
        while scope is not None:
            if id(scope) not in self._tensors:
                self._tensors[id(scope)] = _tensors(scope)
            if name in self._tensors[id(scope)]:
                return True
            scope = scope.parent
        return False

    # --- nodes

    def _restore(self, site: _Site) -> None:
        restored = self._original(site)
        known = {*site.inputs, ""}
        for name in restored.input:
            if self.touched and name not in known and not self._visible(site.scope, name):
                raise ModelError(
                    f"{site.label} replaced a {restored.op_type} of {name!r}, which is no longer "
                    f"there: cannot undo: {_GO_BACK}"
                )
        _put_back(site.node, restored)

    def _original(self, site: _Site) -> NodeProto:
        """What the record of a CTU holds, with the inputs of today."""
        restored = NodeProto()
        restored.CopyFrom(site.before)
        names = list(site.before.input)
        if _is_pair(site):
            # Its two nodes go back as they were, or not at all.
            if self.touched:
                raise _changed_pair(restored.op_type)
        elif restored.op_type in ("Max", "Min") and len(names) == 2:
            names = self._against_zero(site)
        elif restored.op_type == "Clip":
            names = self._clip(site)
        else:
            names[0] = site.x
            if restored.op_type == "PRelu":
                names[1] = self._slope(site)
        if names is None:
            # The zero has lost its name. Relu is the same.
            return NodeProto(op_type="Relu", input=[site.x])
        restored.input[:] = names
        return restored

    def _against_zero(self, site: _Site) -> list[str] | None:
        """The inputs of a Max or Min, None for a Max whose zero is not found."""
        names = list(site.before.input)
        for place in sorted((0, 1), key=lambda place: names[1 - place] != site.x):
            zero = self._find(site, names[place], lambda number: number == 0)
            if zero is not None:
                names[place], names[1 - place] = zero, site.x
                return names
        return [site.x, site.operand(0)] if site.before.op_type == "Min" else None

    def _slope(self, site: _Site) -> str:
        """The slope of a PRelu: the CTU's, or by its own name where that still is the same."""
        old, present = site.before.input[1], site.operand(0)
        value = None if old == present else self._value(site.scope, present)
        # Not a number is not equal to itself.
        found = self._find(site, old, lambda number: not self.touched or number == value)
        return found or present

    def _clip(self, site: _Site) -> list[str] | None:
        """The inputs of a Clip, None where it is a Relu whose zero is not found."""
        names = [site.x, *site.before.input[1:3]]
        bounds = _BOUNDS[site.op]
        for place, old in enumerate(names[1:], start=1):
            if not old:
                continue
            if place in bounds:
                names[place] = site.operand(bounds.index(place))
            elif site.op == ctu.OP_TYPE and place == 1:
                zero = self._find(site, old, lambda number: number == 0)
                if zero is None:
                    return None
                names[place] = zero
            else:
                names[place] = self._find(site, old, activations.bounds_nothing) or ""
        if list(site.before.input[1:3]) != names[1:]:
            while not names[-1]:
                names.pop()
        return [*names, *site.before.input[3:]]

    def _fuse(self, site: _Site, hosts: dict[tuple, tuple[NodeProto, NodeProto]]) -> None:
        """Put an activation back into the node that it was fused into.

        Args:
            hosts: the scope's graph by id and an output -> the node that it was fused into, and its
                record.
        """
        if (id(site.scope.graph), site.x) not in hosts:
            raise _taken_apart(site)
        host, before = hosts[id(site.scope.graph), site.x]
        bare = NodeProto(op_type=before.op_type, domain=before.domain, output=[""])
        activations.take_out(bare, "")
        if (host.op_type, host.domain) != (bare.op_type, bare.domain):
            raise ModelError(
                f"{site.label} was part of {before.op_type} {node_label(host)!r}, which another "
                f"tool has made {host.op_type}: cannot undo: {_GO_BACK}"
            )
        present = {a.name: a for a in host.attribute}
        attributes = [
            present.pop(a.name, a)
            for a in before.attribute
            if a.name in present or a.name.startswith("activation")
        ]
        restored = NodeProto(attribute=[*attributes, *present.values()])
        for changed in ("op_type", "domain"):
            if before.HasField(changed):
                setattr(restored, changed, getattr(before, changed))
        for changed in ("op_type", "domain", "attribute"):
            host.ClearField(changed)
        host.MergeFrom(restored)
        host.output[0] = site.node.output[0]
        records.drop_record(host)
        site.node.op_type = GONE

    def _restore_absorbed(self, others: list[tuple[Scope, NodeProto, NodeProto]]) -> None:
        """Restore the nodes whose bound the CTU behind them took over."""
        for _, node, before in others:
            if not records.is_recorded(node) or before.output or not _is_absorbed(node, before):
                continue
            if self.touched:
                raise _changed_pair(before.op_type)
            _put_back(node, before)

    def _restore_calls(self, others: list[tuple[Scope, NodeProto, NodeProto]]) -> None:
        """Drop the records of what passed parameters to functions, which has none any more."""
        for _, node, before in others:
            if not records.is_recorded(node):
                continue
            if before.output:
                raise ModelError(
                    f"the activation of {before.op_type} {node_label(node)!r} is not the CTU "
                    f"behind it any more: cannot undo: {_GO_BACK}"
                )
            while len(node.input) > len(before.input) and not node.input[-1]:
                del node.input[-1]
            records.drop_record(node)

    # --- the rest of the model

    def _drop_parameters(self, sites: list[_Site]) -> None:
        """Remove the parameters of CTUs where nothing else reads them."""
        ours, betas = defaultdict(set), defaultdict(set)
        for site in sites:
            root = root_of(site.scope)
            ours[root].update(site.inputs[1:])
            betas[root].update(site.inputs[BETA_SLOT : BETA_SLOT + 1])
        self._nodes.drop_unread(ours)
        graph = self._model.graph
        self._nodes.check_inlined(betas, {value.name for value in graph.input})
        reads = self._nodes.reads()[None]
        unread = {name for name in ours[None] if not reads[name]}
        self.dropped = unread & {tensor.name for tensor in graph.initializer}
        keep(graph.initializer, lambda tensor: tensor.name not in unread)
        keep(graph.input, lambda value: value.name not in unread)
        keep(graph.value_info, lambda value: value.name not in unread)

    def _restore_imports(self, before: ModelProto) -> None:
        for owner in (*self._model.functions, self._model):
            if owner is not self._model or not before.opset_import:
                keep(owner.opset_import, lambda entry: entry.domain != ctu.DOMAIN)


def _is_touched(site: _Site, types: dict[str, int]) -> bool:
    """Whether a CTU reads other tensors than steering gave it, or a converted beta or c.

    Args:
        types: initializer of the main graph -> its element type.
    """
    if any(types.get(name, TensorProto.FLOAT) != TensorProto.FLOAT for name in site.inputs[1:3]):
        return True
    names = list(site.before.input)
    if not names:
        return False  # It was fused: `_fuse` looks where it is.
    if _is_pair(site):
        return site.x not in names and not _reads_through(site, names)
    if site.x not in (names if site.before.op_type in ("Max", "Min") else names[:1]):
        return True
    bounds = _BOUNDS.get(site.op, ()) if site.before.op_type == "Clip" else ()
    return any(
        place < len(names) and names[place] and names[place] not in site.inputs[3:]
        for place in bounds
    )


def _tensors(scope: Scope) -> set[str]:
    """The names of a Scope's tensors, without those of its parent."""
    graph = scope.graph
    if isinstance(graph, FunctionProto):
        names = set(graph.input)
    else:
        names = {value.name for value in (*graph.input, *graph.initializer)}
        names.update(tensor.values.name for tensor in graph.sparse_initializer)
    return names.union(*(node.output for node in graph.node))


def _reads_through(site: _Site, names: list[str]) -> bool:
    """Whether a CTU reads what the node reads that makes one of the tensors `names`, as where
    others read that tensor too."""
    return any(
        site.x in node.input and not set(names).isdisjoint(node.output)
        for node in site.scope.graph.node
    )


def _is_pair(site: _Site) -> bool:
    """Whether a CTU stands for two nodes that bound its X from one side each."""
    if site.op != "CTUClip":
        return False
    if site.before.op_type == "Clip":
        bounds = len(list(filter(None, site.before.input[1:3])))
        bounds += sum(a.name in ("min", "max") for a in site.before.attribute)
        return bounds < 2
    return site.before.op_type in ("Max", "Min", "Relu")


def _is_absorbed(node: NodeProto, before: NodeProto) -> bool:
    """Whether steering changed more of a node than the parameters that it passes to a function."""
    return node.op_type != before.op_type or list(node.attribute) != list(before.attribute)


def _changed_pair(op_type: str) -> ModelError:
    return ModelError(
        f"a {op_type} was steered together with the node beside it, and another tool has changed "
        f"the model: cannot undo: {_GO_BACK}"
    )


def _put_back(node: NodeProto, original: NodeProto) -> None:
    """Make a node what it was before it was steered."""
    for changed in ("op_type", "domain", "input", "attribute"):
        node.ClearField(changed)
    node.MergeFrom(original)
    records.drop_record(node)


def _taken_apart(site: _Site) -> ModelError:
    return ModelError(
        f"{site.label} was part of the node before it, and another tool has put something in "
        f"between: cannot undo: {_GO_BACK}"
    )


def _check_opset(model: ModelProto, sites: list[_Site]) -> None:
    """Refuse records with attributes that another tool's newer opset does not have."""
    # Our functions keep the opset that the model had when it was steered.
    steered_at = {opset_of(function) for function in model.functions if ctu.is_ctu(function)}
    opset = opset_of(model)
    if not steered_at or opset in steered_at:
        return
    for site in sites:
        if site.scope.function is not None:
            continue
        with suppress(defs.SchemaError):
            schema = defs.get_schema(site.before.op_type, opset, "")
            unknown = {a.name for a in site.before.attribute} - schema.attributes.keys()
            if unknown:
                raise ModelError(
                    f"{site.label} replaced a {site.before.op_type} with {min(unknown)!r}, which "
                    f"opset {opset} does not have: cannot undo: {_GO_BACK}"
                )
