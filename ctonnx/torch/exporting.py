"""PyTorch models with CT units to ONNX, by either of PyTorch's exporters.

An exporter writes `torch.ops.ctonnx.ctu` as a node of ours, and other nodes that compute its beta
and c. `resteer` evaluates these, turns the node into the activation that it stands for, and steers
that by `steer`: the file is what `ctonnx patch` would have written, and can be changed and
undone in the same way.
"""

import io
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from .. import ctu
from ..errors import ModelError, NothingToDo, UsageError
from ..model import files, graph
from ..optional import require
from ..rewriting.find import Activation
from ..rewriting.steer import NO_BETA, Report, steer
from .steering import half_steered, is_steered_whole, refuse_half_steered

# The first opset whose Clip has its bounds as inputs.
_MIN_OPSET = 11


def export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: torch.Tensor | tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    dynamo: bool = True,
    force: bool = False,
    **options: Any,
) -> Path | str | ModelProto:
    """Export a model that has CT units, or that is steered, to ONNX.

    Exceptions of torch.onnx.export itself pass through.

    Args:
        model: nn.Module or torch.export.ExportedProgram.
        args: example arguments, as for torch.onnx.export.
        path: where to write, "-" for standard output; an existing file stays unless `force`.
        dynamo: use PyTorch's newer exporter; otherwise the one that traces TorchScript.
        options: for torch.onnx.export: input_names, dynamic_shapes, opset_version (11 or newer) ...

    Returns:
        The Path written ("-" as it is), or an onnx.ModelProto where `path` is None.

    Raises:
        UsageError: the output exists, a beta or c depends on the input, or CTU does not take the
            bounds; the model is steered, and has activations that `steer` does not reach.
        NothingToDo: the model has no CT unit.
        ModelError: the model is too large for one file.
        MissingDependency: onnxscript, which the newer exporter needs, is not installed.
    """
    if path is not None:
        path = files.check_output(path, force)
    if isinstance(args, torch.Tensor):
        args = (args,)
    with refuse_half_steered(model):
        proto = run_exporter(model, args, dynamo, options)
    report = resteer(proto)
    if isinstance(model, torch.nn.Module) and is_steered_whole(model):
        refuse_unsteered(report)
    return proto if path is None else files.save(proto, path, force)


def run_exporter(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    dynamo: bool,
    options: dict[str, Any],
) -> ModelProto:
    """Run PyTorch's exporter: a ModelProto with nodes of our ops, as `resteer` takes it."""
    if options.get("opset_version", _MIN_OPSET) < _MIN_OPSET:
        raise UsageError(f"opset_version must be {_MIN_OPSET} or newer")
    if dynamo:
        require("onnxscript")
        table = {torch.ops.ctonnx.ctu.default: _translation()}
        table |= options.pop("custom_translation_table", None) or {}
        options = {"verbose": False, **options}
        program = torch.onnx.export(
            model,
            args,
            dynamo=True,
            custom_translation_table=table,
            **options,
        )
        assert program is not None  # as without dynamo
        return program.model_proto
    torch.onnx.register_custom_op_symbolic(  # pyright: ignore[reportPrivateImportUsage]
        "ctonnx::ctu", _symbolic, _MIN_OPSET
    )
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The caller chose the legacy exporter.
        warnings.filterwarnings("ignore", ".*legacy TorchScript", DeprecationWarning)
        domains = {ctu.DOMAIN: ctu.VERSION, **(options.pop("custom_opsets", None) or {})}
        torch.onnx.export(
            model,
            args,
            buffer,  # pyright: ignore[reportArgumentType]  the legacy exporter takes a buffer
            dynamo=False,
            custom_opsets=domains,
            **options,
        )
    return onnx.load_from_string(buffer.getvalue())


def refuse_unsteered(report: Report) -> None:
    """Raise UsageError where the export of a steered model has activations without a unit.

    Clip, Max and Min are none: `steer` leaves them where they are arithmetic.
    """
    relus = ("Relu", "LeakyRelu", "PRelu", "HardSigmoid")
    left = [a.path for a in report.skipped if a.op in relus and a.reason == NO_BETA]
    if left:
        raise half_steered(", ".join(left))


def _op_type(lower: float | None, upper: float | None) -> str:
    if lower is None and upper is None:
        return ctu.OP_TYPE
    if lower is None:
        return "CTUMin"
    return "CTUMax" if upper is None else "CTUClip"


def _translation() -> Callable:
    """What translates `torch.ops.ctonnx.ctu` for the newer exporter."""
    from onnxscript import opset18, values

    opset = values.Opset(ctu.DOMAIN, ctu.VERSION)
    parameter, schema = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema
    floating = [f"tensor({name})" for name in ("float", "double", "float16", "bfloat16")]

    def op(op_type, inputs):
        # Each input has a type of its own, as beta need not have that of X.
        types = ["T", *(f"T{i}" for i in range(1, len(inputs)))]
        declaration = schema(
            op_type,
            ctu.DOMAIN,
            ctu.VERSION,
            inputs=[parameter(f"i{i}", name) for i, name in enumerate(types)],
            outputs=[parameter("Y", "T")],
            type_constraints=[(name, floating, "") for name in types],
        )
        return values.Op(opset, op_type, declaration)(*inputs)

    def translate(x, beta, coeff, slope=None, lower=None, upper=None):
        inputs = [x, beta, coeff]
        if slope is not None:
            inputs.append(slope)
        for bound in (lower, upper):
            if bound is not None:
                inputs.append(opset18.Constant(value=helper.make_tensor("", x.dtype, [], [bound])))
        return op(_op_type(lower, upper), inputs)

    return translate


def _symbolic(g, x, beta, coeff, slope, lower, upper):
    """Translate `torch.ops.ctonnx.ctu` for the TorchScript exporter."""
    from torch.onnx import JitScalarType  # pyright: ignore[reportPrivateImportUsage]
    from torch.onnx.symbolic_helper import (
        _is_none,  # pyright: ignore[reportPrivateImportUsage]
        _parse_arg,  # pyright: ignore[reportPrivateImportUsage]
    )

    bounds: list[Any] = [
        None if _is_none(bound) else _parse_arg(bound, "f") for bound in (lower, upper)
    ]
    inputs = [x, beta, coeff] + ([] if _is_none(slope) else [slope])
    dtype = JitScalarType.from_value(x).dtype()
    for bound in bounds:
        if bound is not None:
            inputs.append(g.op("Constant", value_t=torch.tensor(bound, dtype=dtype)))
    return g.op(f"{ctu.DOMAIN}::{_op_type(*bounds)}", *inputs).setType(x.type())


# --- from the exporter's nodes to steered activations


def resteer(model: ModelProto) -> Report:
    """Turn the nodes of our ops in an exporter's ModelProto into what `steer` writes.

    Returns:
        Report.

    Raises:
        As `export`.
    """
    params: dict[str, dict[str, np.ndarray]] = {}
    parameters: set[str] = set()
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    for scope in graph.scopes(model):
        constant = partial(_constant, scope, opset=opset)
        for node in scope.graph.node:
            if not ctu.is_ctu(node):
                continue
            unit = Activation(graph.node_label(node), node.op_type, scope.path, "steered")
            if unit.path in params:
                raise ModelError(f"the exporter gave two activations the name {unit.path!r}")
            beta, coeff = (_squeeze(constant(name)) for name in node.input[1:3])
            params[unit.path] = {"beta": beta, "coeff": coeff}
            parameters.update(node.input[1:])
            _make_activation(node, constant)
    if not params:
        raise NothingToDo("the model has no CT unit: steer it, or use ctonnx.torch.CTU in it")
    _drop_unused(model, parameters)
    graph.keep(model.opset_import, lambda entry: entry.domain != ctu.DOMAIN)
    # It raises where it would not steer one of `params`.
    return steer(model, params=params)


def _make_activation(node: NodeProto, constant: Callable[[str], np.ndarray]) -> None:
    """Turn a node of our ops into the activation that it stands for."""
    kind, (x, _, _, *operands) = node.op_type, node.input
    node.ClearField("domain")
    if kind != ctu.OP_TYPE:
        node.op_type = "Clip"
        if kind == "CTUMin":
            operands.insert(0, "")
    elif not operands:
        node.op_type = "Relu"
    elif constant(operands[0]).ndim:
        node.op_type = "PRelu"
    else:
        node.op_type = "LeakyRelu"
        slope = float(constant(operands.pop()))
        node.attribute.append(helper.make_attribute("alpha", slope))
    del node.input[:]
    node.input.extend([x, *operands])


def _constant(scope: graph.Scope | None, name: str, opset: int) -> np.ndarray:
    """The value of the tensor that a scope knows as `name`.

    Raises:
        UsageError: it depends on the model's inputs.
    """
    while scope is not None:
        if isinstance(scope.graph, GraphProto):
            for tensor in scope.graph.initializer:
                if tensor.name == name:
                    return numpy_helper.to_array(tensor)
        for node in scope.graph.node:
            if name in node.output:
                inputs = {key: _constant(scope, key, opset) for key in node.input if key}
                return _run_node(node, name, inputs, opset)
        scope = scope.parent
    raise UsageError("a CT unit's beta, c or slope depends on the input: it must be constant")


def _run_node(
    node: NodeProto,
    output: str,
    inputs: dict[str, np.ndarray],
    opset: int,
) -> np.ndarray:
    """Compute one output of one node."""
    declare = helper.make_tensor_value_info
    declared = [
        declare(key, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for key, array in inputs.items()
    ]
    body = helper.make_graph([node], "one", declared, [declare(output, TensorProto.FLOAT, None)])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)])
    (value,) = ReferenceEvaluator(model).run([output], inputs)
    return np.asarray(value)


def _squeeze(array: np.ndarray) -> np.ndarray:
    """Remove leading dimensions of 1: all of them from one number, else down to two dimensions."""
    if array.size == 1:
        return array.reshape(())
    # steer takes a one-dimensional array for channels; here it is the last dimension.
    array = array.reshape(-1, array.shape[-1]) if array.ndim < 2 else array
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    return array


def _drop_unused(model: ModelProto, names: set[str]) -> None:
    """Remove the tensors of these names that nothing uses, and what computes nothing else."""
    while names:
        scopes = list(graph.scopes(model))
        used = {name for scope in scopes for node in scope.graph.node for name in node.input}
        graphs = [scope.graph for scope in scopes if isinstance(scope.graph, GraphProto)]
        used.update(value.name for body in graphs for value in body.output)
        unused, names = names - used, set()

        def is_needed(node, unused=unused, used=used):
            return unused.isdisjoint(node.output) or not used.isdisjoint(node.output)

        for scope in scopes:
            for node in scope.graph.node:
                if not is_needed(node):
                    names.update(node.input)
            graph.keep(scope.graph.node, is_needed)
        for body in graphs:
            for values in body.initializer, body.value_info:
                graph.keep(values, lambda value, unused=unused: value.name not in unused)
