"""Names of tensors, and fresh ones."""

from collections.abc import Callable, Container

from onnx import FunctionProto, ModelProto

from .graph import scopes


def names(model: ModelProto) -> set[str]:
    """Every name of a tensor anywhere in the model."""
    tensors = set()
    for scope in scopes(model):
        graph = scope.graph
        if isinstance(graph, FunctionProto):
            tensors.update(graph.input, graph.output)
        else:
            for values in (graph.input, graph.output, graph.value_info, graph.initializer):
                tensors.update(value.name for value in values)
            tensors.update(tensor.values.name for tensor in graph.sparse_initializer)
        for node in graph.node:
            tensors.update(node.input, node.output)
    return tensors


def node_names(model: ModelProto) -> set[str]:
    """Every name of a node anywhere in the model."""
    return {node.name for scope in scopes(model) for node in scope.graph.node}


def unique_name(base: str, taken: Container[str]) -> str:
    """`base`, or where that is taken `base` with the first free number, if the taken ones have no
    gap."""
    if base not in taken:
        return base
    # Doubling, then halving: one by one, thousands of names would take quadratic time.
    used, free = 0, 1
    while f"{base}_{free}" in taken:
        used, free = free, 2 * free
    while free - used > 1:
        middle = (used + free) // 2
        if f"{base}_{middle}" in taken:
            used = middle
        else:
            free = middle
    return f"{base}_{free}"


class FreshNames:
    """Names that no tensor in a ModelProto has, or no node with `node_names`, each given out
    once."""

    def __init__(self, model: ModelProto, names_of: Callable[[ModelProto], set[str]] = names):
        self._taken = names_of(model)

    def __call__(self, base: str) -> str:
        """`base`, or `base` with a number."""
        name = unique_name(base, self._taken)
        self._taken.add(name)
        return name
