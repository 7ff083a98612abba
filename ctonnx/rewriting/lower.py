"""Lowering to primitives: every CTU becomes the standard ops of its function."""

from collections.abc import Mapping

from onnx import ModelProto, NodeProto, checker, inliner

from .. import ctu
from ..errors import ModelError
from ..model.graph import Scope, keep, scopes
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
            if scope.is_ours:
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


# What the correction of a CTU's function is the difference of, from its last op back: terms with
# log(1 + exp(-u)) and u / (1 + exp(v)), between two bounds with the quotient and the difference of
# two of these. See ctu.function and ctu.kinked_function.
_TERMS = ("Sub", "Mul", "Log", "Add", "Exp"), ("Sub", "Div", "Add", "Exp")
_TERMS_BETWEEN = (
    ("Sub", "Mul", "Log", "Div", "Add", "Exp"),
    ("Sub", "Mul", "Sub", "Div", "Add", "Exp"),
)


def holds_unit(scope: Scope) -> bool:
    """Whether nodes of a Scope are those of a CTU's function, whatever inlined it.

    Tools that drop all metadata leave no other trace. Constants may have been folded.
    """
    producers = {name: node for node in scope.graph.node for name in node.output if name}
    return any(node.op_type == "Add" and _ends_unit(node, producers) for node in scope.graph.node)


def _ends_unit(add: NodeProto, producers: Mapping[str, NodeProto]) -> bool:
    def comes_from(name, *ops):
        node = producers.get(name)
        while node is not None and node.op_type == "Cast" and node.input:
            node = producers.get(node.input[0])
        if node is None or node.op_type != ops[0]:
            return False
        return not ops[1:] or any(comes_from(name, *ops[1:]) for name in node.input)

    def corrects(name, terms, *sign):  # With a slope the correction has a sign.
        return all(comes_from(name, *sign, *ops) for ops in terms)

    def ends(x, correction):
        if corrects(correction, _TERMS_BETWEEN):
            return True
        original = comes_from(x, "Relu") or comes_from(x, "Sub", "Relu")
        return original and (corrects(correction, _TERMS) or corrects(correction, _TERMS, "Mul"))

    return len(add.input) == 2 and (ends(*add.input) or ends(*reversed(add.input)))
