"""Undoing `steer`: each node gets back what its record holds."""

from onnx import FunctionProto, ModelProto

from .. import ctu
from ..model.graph import Scope, keep, scopes
from . import records


def unsteer(model: ModelProto, steered: list[Scope]) -> None:
    """Undo steering in place, node for node and attribute for attribute.

    Args:
        model: a ModelProto with CTUs.
        steered: its Scopes that hold CTUs.

    Raises:
        ModelError: a CTU has no record of what it replaced, or a record is damaged.
    """
    parameters, inserted = set(), False
    for scope in steered:
        for node in scope.graph.node:
            if ctu.is_ctu(node):
                parameters.update(node.input[1:])
                records.restore_node(node)
                parameters.difference_update(node.input)
                if not node.input:  # It was fused into the node before it.
                    node.ClearField("op_type")
                    inserted = True
    for scope in scopes(model):
        # A PRelu's slope belongs to the model: what restored nodes use is no parameter of ours.
        if isinstance(scope.graph, FunctionProto):
            keep(scope.graph.input, lambda name: name not in parameters)
        for node in scope.graph.node:
            if records.is_recorded(node):
                records.restore_node(node)
                parameters.difference_update(node.input)
        if inserted:
            keep(scope.graph.node, lambda node: node.op_type)
    keep(model.functions, lambda function: not ctu.is_ctu(function))
    metadata = records.Metadata(model)
    before = metadata.original()
    if not before.opset_import:
        keep(model.opset_import, lambda entry: entry.domain != ctu.DOMAIN)
    for function in model.functions:
        keep(function.opset_import, lambda entry: entry.domain != ctu.DOMAIN)
    keep(model.graph.initializer, lambda tensor: tensor.name not in parameters)
    keep(model.graph.input, lambda value: value.name not in parameters)
    if before.ir_version:
        model.ir_version = before.ir_version
    if before.graph.input:
        del model.graph.input[:]
        model.graph.input.extend(before.graph.input)
    metadata.clear()
