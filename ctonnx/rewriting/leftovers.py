"""What is left of steering once its nodes are undone: parameters, inputs and the IR version."""

from collections import Counter, defaultdict

from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from ..errors import ModelError
from ..model.graph import Key, Scope, keep, key_of, node_label, put, root_of
from .records import is_recorded

# What steering raises an IR version to.
_RAISED_IR = (4, 8)

# The op type of a node that is to be removed.
GONE = "ctonnx.gone"

# Root of a scope -> names of tensors that its nodes see.
Names = dict[Key | None, set[str]]


class Nodes:
    """The nodes of a model by their root: a function by its key, or the main graph by None.

    `calls` maps the key of a function to its calls, each in its Scope.

    Args:
        scopes: of the model, but for those in functions of our ops.
    """

    def __init__(self, scopes: list[Scope]):
        self.calls: dict[Key, list[tuple[Scope, NodeProto]]] = defaultdict(list)
        self._roots: dict[Key | None, list[Scope]] = defaultdict(list)
        for scope in scopes:
            self._roots[root_of(scope)].append(scope)
            for node in scope.graph.node:
                self.calls[key_of(node)].append((scope, node))

    def reads(self) -> dict[Key | None, Counter[str]]:
        """How often each name is read, by root."""
        return {root: _reads(scopes) for root, scopes in self._roots.items()}

    def drop_unread(self, ours: Names) -> None:
        """Remove what computes the tensors `ours`, or passes them to functions, where nothing else
        reads them. `ours` gets what that read."""
        while self._drop_unread(ours):
            pass

    def _drop_unread(self, ours: Names) -> bool:
        changed = False
        for root, names in list(ours.items()):
            reads = _reads(self._roots[root])
            unread = {name for name in names if name and not reads[name]}
            for scope in self._roots[root]:
                for node in scope.graph.node:
                    if not unread.isdisjoint(node.output) and not any(
                        reads[name] for name in node.output
                    ):
                        ours[root].update(node.input)
                        node.op_type, changed = GONE, True
                drop_gone(scope)
            function = self._roots[root][0].function if root is not None else None
            if function is None:
                continue
            for i in reversed(range(len(function.input))):
                if function.input[i] not in unread:
                    continue
                behind = len(function.input) - i
                changed = True
                calls = self.calls[key_of(function)]
                if not calls:  # The graph has it under the same name, for nothing.
                    ours[None].add(function.input[i])
                del function.input[i]
                for caller, call in calls:
                    # Steering put them last, also in a call with too many inputs.
                    at = len(call.input) - behind if is_recorded(call) else i
                    if 0 <= at < len(call.input):
                        ours[root_of(caller)].add(call.input[at])
                        del call.input[at]
        return changed

    def check_inlined(self, betas: Names, inputs: set[str]) -> None:
        """Refuse a model in which another tool has inlined some of the CTUs.

        Args:
            betas: the betas of the other CTUs.
            inputs: the inputs of the main graph.

        Raises:
            ModelError: something else reads a beta.
        """
        for root, names in betas.items():
            for scope in self._roots[root]:
                for node in scope.graph.node:
                    read = names.intersection(node.input)
                    if not read:
                        continue
                    # The formula begins with 1 - beta. ONNX Runtime shares constants with other
                    # nodes, but no inputs.
                    formula = node.op_type == "Sub" and scope.constant(node.input[0]) == 1
                    if formula or (root is None and not read.isdisjoint(inputs)):
                        raise ModelError(
                            f"{node.op_type} {node_label(node)!r} reads {min(read)!r} too, as "
                            "another tool has inlined some CTUs: cannot undo: go back to the "
                            "original"
                        )


def restore_inputs(model: ModelProto, before: ModelProto, touched: bool) -> None:
    """Restore the IR version, and before 4 the initializers among the inputs, where the model
    still is what it was; else a newer version is none the worse.

    Args:
        model: changed in place.
        before: what the record of the model holds.
        touched: whether another tool may have changed the types of initializers.
    """
    as_input = _as_input if touched else lambda tensor, value: value
    graph = model.graph
    if not before.ir_version or model.ir_version not in _RAISED_IR:
        return
    inputs = {value.name: value for value in graph.input}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    old = [value.name for value in before.graph.input]
    if not all(name in inputs or name in constants for name in old):
        return
    if old:
        unchanged = {value.SerializeToString(deterministic=True) for value in graph.input}
        restored = []
        for value in before.graph.input:
            if value.SerializeToString(deterministic=True) not in unchanged:
                name = value.name
                value = inputs[name] if name in inputs else as_input(constants[name], value)
            restored.append(value)
        restored += [value for value in graph.input if value.name not in set(old)]
        put(graph.input, restored)
    model.ir_version = before.ir_version


def drop_gone(scope: Scope) -> None:
    """Remove the nodes of the type GONE."""
    keep(scope.graph.node, lambda node: node.op_type != GONE)


def _as_input(tensor: TensorProto, before: ValueInfoProto) -> ValueInfoProto:
    """The input of an initializer: as it was, unless another tool has changed the type."""
    if tensor.data_type == before.type.tensor_type.elem_type:
        return before
    return helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))


def _reads(scopes: list[Scope]) -> Counter[str]:
    """How often each name is read in the Scopes, as an output too."""
    counts = Counter()
    for scope in scopes:
        graph = scope.graph
        counts.update(graph.output if isinstance(graph, FunctionProto) else ())
        counts.update(() if isinstance(graph, FunctionProto) else (v.name for v in graph.output))
        for node in graph.node:
            counts.update(node.input)
    return counts
