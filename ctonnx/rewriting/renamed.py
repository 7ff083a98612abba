"""CTUs that another tool has renamed along with their functions: `m_CTU`.

`onnx.compose` does so where it puts a prefix on the names of a model. ONNX Runtime has a kernel for
`ctonnx::CTU` alone, so such a CTU runs through its function.
"""

from onnx import FunctionProto, ModelProto

from .. import ctu
from ..model.graph import keep, scopes


def give_back_names(model: ModelProto, whatever_they_do: bool = False) -> set[str]:
    """Give CTUs in a model that another tool renamed their names back, in place, if their functions
    are the same but for the prefix.

    Args:
        whatever_they_do: also where they are not, as the functions are to be removed.

    Returns:
        the names that CTUs had.
    """
    ours = [function for function in model.functions if _op(function.domain, function.name)]
    renamed = {function.name for function in ours if not ctu.is_ctu(function)}
    if not renamed:
        return set()
    ops = {function.name: _op(function.domain, function.name) for function in ours}
    bodies: dict[str, bytes] = {}
    copies = []
    for function in ours:
        copy = FunctionProto()
        copy.CopyFrom(function)
        for named in (copy, *copy.node):
            _rename(named, ops)
        data = copy.SerializeToString(deterministic=True)
        if copy.name not in bodies:
            bodies[copy.name] = data
            copies.append(copy)
        elif bodies[copy.name] != data and not whatever_they_do:
            return set()
    for scope in scopes(model):
        for node in scope.graph.node:
            _rename(node, ops)
    keep(
        model.functions, lambda function: function.name not in ops or function.domain != ctu.DOMAIN
    )
    model.functions.extend(copies)
    return renamed


def are_left(model: ModelProto) -> bool:
    """Whether CTUs still have the name that another tool gave them."""
    return any(_op(f.domain, f.name) and not ctu.is_ctu(f) for f in model.functions)


def _op(domain: str, name: str) -> str | None:
    """The op of ours that has this name, with or without a prefix."""
    if domain != ctu.DOMAIN:
        return None
    return next((op for op in ctu.OPS if name.endswith(op)), None)


def _rename(proto, ops):
    if proto.domain != ctu.DOMAIN:
        return
    field = "name" if isinstance(proto, FunctionProto) else "op_type"
    name = ops.get(getattr(proto, field))
    if name is not None:
        setattr(proto, field, name)
