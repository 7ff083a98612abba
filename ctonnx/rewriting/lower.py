"""Lowering to primitives: every CTU becomes the standard ops of its function."""

from onnx import ModelProto, checker, inliner

from .. import ctu
from ..errors import ModelError
from ..model.graph import keep, scopes
from . import activations, records


def to_primitives(model: ModelProto) -> None:
    """Replace every CTU by its function's nodes, in place, and mark the nodes of an activation.

    Raises:
        ModelError: onnx cannot inline the functions.
    """
    ours = [function for function in model.functions if ctu.is_ctu(function)]
    op_types = {}
    for scope in scopes(model):
        for node in scope.graph.node:
            if scope.function is not None and ctu.is_ctu(scope.function):
                if node.op_type in activations.STEERABLE:
                    records.mark_lowered(node, "")
            elif ctu.is_ctu(node):
                op_types[scope.path, node.output[0]] = records.original_op(node)
    try:
        inlined = inliner.inline_selected_functions(model, [(f.domain, f.name) for f in ours])
    except (RuntimeError, checker.ValidationError) as error:
        raise ModelError(f"cannot be lowered to primitives: {error}") from None
    model.CopyFrom(inlined)
    for scope in scopes(model):
        for node in scope.graph.node:
            op_type = op_types.get((scope.path, node.output[0] if node.output else ""))
            if op_type is not None:
                records.mark_lowered(node, op_type)
    for owner in (model, *model.functions):
        keep(owner.opset_import, lambda entry: entry.domain != ctu.DOMAIN)
