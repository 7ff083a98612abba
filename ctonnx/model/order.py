"""The order of nodes. ONNX asks for one in which they can run; ONNX Runtime takes any, but in
subgraphs and functions."""

import heapq

from onnx import FunctionProto, GraphProto, ModelProto

from ..errors import ModelError
from .graph import node_label, put, reads, scopes


def sort_nodes(model: ModelProto) -> list[list[int]]:
    """Bring the nodes of a model, of its subgraphs and functions into an order to run in.

    Nothing changes where they are in such an order. Elsewhere the new one is close to the old one.

    Returns:
        what `restore_order` takes: empty where nothing changed.

    Raises:
        ModelError: nodes depend on themselves.
    """
    orders, changed = [], False
    for scope in scopes(model):
        order = _running_order(scope.graph)
        orders.append(order)
        # Before the walk goes on into its subgraphs.
        changed |= _arrange(scope.graph, order)
    return orders if changed else []


def restore_order(model: ModelProto, orders: list[list[int]]) -> None:
    """Undo `sort_nodes`, which gave `orders`, in a model with the same nodes."""
    # Subgraphs first, as they are copied along with the node that holds them.
    for scope, order in reversed(list(zip(scopes(model), orders, strict=False))):
        places = [0] * len(order)
        for place, index in enumerate(order):
            places[index] = place
        _arrange(scope.graph, places)


def _running_order(graph: GraphProto | FunctionProto) -> list[int]:
    """The indices of the nodes in an order in which they can run."""
    nodes = list(graph.node)
    producer: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for name in filter(None, node.output):
            producer.setdefault(name, i)
    needs = [{producer[name] for name in reads(node) if name in producer} for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for i, needed in enumerate(needs):
        for j in needed:
            readers[j].append(i)
    # Of the nodes that can run next, the one that comes first in the model.
    missing = [len(needed) for needed in needs]
    ready = [i for i, count in enumerate(missing) if not count]
    order = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for reader in readers[i]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        i, seen = next(i for i, count in enumerate(missing) if count), set()
        while i not in seen:
            seen.add(i)
            i = min(j for j in needs[i] if missing[j])
        raise ModelError(
            f"node {node_label(nodes[i])!r} depends on its own output: break the cycle"
        )
    return order


def _arrange(graph: GraphProto | FunctionProto, order: list[int]) -> bool:
    """Bring nodes into an order of indices; gives whether that is another one."""
    if order == list(range(len(order))):
        return False
    put(graph.node, [graph.node[i] for i in order])
    return True
