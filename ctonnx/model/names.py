"""Names of tensors, and fresh ones."""

from onnx import FunctionProto

from .graph import scopes


def names(model):
    """Every name of a tensor anywhere in the model."""
    found = set()
    for scope in scopes(model):
        body = scope.graph
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
    """`base`, or `base` with a number that makes it differ from all of `taken`: the first such
    number where those before it are taken in order."""
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
    """Names that nothing in a ModelProto has, each given out once."""

    def __init__(self, model):
        self._taken = names(model)

    def __call__(self, base):
        """`base`, or `base` with a number."""
        name = unique_name(base, self._taken)
        self._taken.add(name)
        return name
