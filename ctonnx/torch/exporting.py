"""PyTorch models with CT units to ONNX, by either of PyTorch's exporters.

An exporter writes `torch.ops.ctonnx.ctu` as a node of ours with whatever computes its beta and c.
These are evaluated, the node becomes the activation that it stands for, and `rewrite.steer` steers
it again: the file is what `ctonnx patch` would have written, and can be changed and undone alike.
"""

import io
import warnings

import numpy as np
import onnx
import torch
from onnx import GraphProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from .. import ctu
from ..errors import ModelError, NothingToDo, UsageError
from ..model import files, graph
from ..optional import require
from ..rewriting import rewrite

# Where Clip has its bounds as inputs.
_MIN_OPSET = 11


def export(model, args=(), path=None, *, dynamo=True, force=False, **options):
    """Export a model with CT units, or one that is steered, to ONNX.

    What torch.onnx.export raises besides the errors below passes through.

    Args:
        model: nn.Module or torch.export.ExportedProgram.
        args: its example arguments, as for torch.onnx.export.
        path: where to write; an existing file is kept unless `force`.
        dynamo: use PyTorch's newer exporter, or the one that traces TorchScript.
        options: for torch.onnx.export: input_names, dynamic_shapes, opset_version (11 or newer) ...

    Returns:
        The Path written, or an onnx.ModelProto where `path` is None.

    Raises:
        UsageError: an existing output, a beta or c that depends on the input, or bounds that CTU
            does not take.
        NothingToDo: the model holds no CT unit.
        ModelError: it is too large for one file.
        MissingDependency: onnxscript is missing, which the newer exporter needs.
    """
    if path is not None:
        path = files.check_output(path, force)
    if isinstance(args, torch.Tensor):
        args = (args,)
    proto = exported(model, args, dynamo, options)
    resteer(proto)
    return proto if path is None else files.save(proto, path, force)


def exported(model, args, dynamo, options):
    """The ModelProto as the exporter writes it, with nodes of our ops."""
    if options.get("opset_version", _MIN_OPSET) < _MIN_OPSET:
        raise UsageError(f"opset_version must be {_MIN_OPSET} or newer")
    if dynamo:
        require("onnxscript")
        table = {torch.ops.ctonnx.ctu.default: _translation()}
        table |= options.pop("custom_translation_table", None) or {}
        options = {"verbose": False, **options}
        program = torch.onnx.export(
            model, args, dynamo=True, custom_translation_table=table, **options
        )
        return program.model_proto
    torch.onnx.register_custom_op_symbolic("ctonnx::ctu", _symbolic, _MIN_OPSET)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # It is chosen knowingly.
        warnings.filterwarnings("ignore", ".*legacy TorchScript", DeprecationWarning)
        domains = {ctu.DOMAIN: ctu.VERSION, **(options.pop("custom_opsets", None) or {})}
        torch.onnx.export(model, args, buffer, dynamo=False, custom_opsets=domains, **options)
    return onnx.load_from_string(buffer.getvalue())


def _op_type(lower, upper):
    if lower is None and upper is None:
        return ctu.OP_TYPE
    return "CTUMin" if lower is None else "CTUMax" if upper is None else "CTUClip"


def _translation():
    """What the newer exporter writes for `torch.ops.ctonnx.ctu`."""
    import onnxscript

    opset, standard = onnxscript.values.Opset(ctu.DOMAIN, ctu.VERSION), onnxscript.opset18
    parameter, schema = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema
    types = [("T", [f"tensor({name})" for name in ("float", "double", "float16", "bfloat16")], "")]
    # Of any type: T' of a beta in float64 is not that of X.
    types += [(f"T{i}", types[0][1], "") for i in range(1, 5)]

    def op(op_type, inputs):
        held = [parameter(f"i{i}", f"T{i}" if i else "T") for i in range(len(inputs))]
        outputs = [parameter("Y", "T")]
        used = types[: len(inputs)]
        declared = schema(
            op_type, ctu.DOMAIN, 1, inputs=held, outputs=outputs, type_constraints=used
        )
        return onnxscript.values.Op(opset, op_type, declared)(*inputs)

    def translate(x, beta, coeff, slope=None, lower=None, upper=None):
        inputs = [x, beta, coeff]
        if slope is not None:
            inputs.append(slope)
        for bound in (lower, upper):
            if bound is not None:
                inputs.append(standard.Constant(value=helper.make_tensor("", x.dtype, [], [bound])))
        return op(_op_type(lower, upper), inputs)

    return translate


def _symbolic(g, x, beta, coeff, slope, lower, upper):
    """What the TorchScript exporter writes for it."""
    from torch.onnx import JitScalarType
    from torch.onnx.symbolic_helper import _is_none, _parse_arg

    bounds = [None if _is_none(bound) else _parse_arg(bound, "f") for bound in (lower, upper)]
    inputs = [x, beta, coeff] + ([] if _is_none(slope) else [slope])
    dtype = JitScalarType.from_value(x).dtype()
    for bound in bounds:
        if bound is not None:
            inputs.append(g.op("Constant", value_t=torch.tensor(bound, dtype=dtype)))
    return g.op(f"{ctu.DOMAIN}::{_op_type(*bounds)}", *inputs).setType(x.type())


# --- from the exporter's nodes to ours


def resteer(model):
    """Make the nodes of our ops in an exporter's ModelProto what `rewrite.steer` makes them.

    Returns:
        rewrite.Report.

    Raises:
        As `export`.
    """
    given, released = {}, set()
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    for scope in graph.scopes(model):
        for node in scope.body.node:
            if not ctu.is_ctu(node):
                continue
            pair = [_least(_constant(scope, name, opset)) for name in node.input[1:3]]
            unit = rewrite.Activation(graph.node_label(node), node.op_type, scope.path, "steered")
            if unit.path in given:
                raise ModelError(f"the exporter gave two activations the name {unit.path!r}")
            given[unit.path] = dict(zip(("beta", "coeff"), pair, strict=True))
            released.update(node.input[1:])
            _restore(node, lambda name, scope=scope: _constant(scope, name, opset))
    if not given:
        raise NothingToDo("the model holds no CT unit: steer it, or use ctonnx.torch.CTU in it")
    _drop_unused(model, released)
    rewrite.keep(model.opset_import, lambda entry: entry.domain != ctu.DOMAIN)
    # It refuses to pass over one that is given.
    return rewrite.steer(model, params=given)


def _restore(node, constant):
    """Make a node of ours the activation that it steers."""
    kind, (x, _, _, *operands) = node.op_type, node.input
    node.ClearField("domain")
    if kind != ctu.OP_TYPE:
        node.op_type = "Clip"
        operands = [*[""] * (kind == "CTUMin"), *operands]
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


def _constant(scope, name, opset):
    """The array that a Scope sees under `name`.

    Raises:
        UsageError: it depends on the model's inputs.
    """
    while scope is not None:
        if isinstance(scope.body, GraphProto):
            for tensor in scope.body.initializer:
                if tensor.name == name:
                    return numpy_helper.to_array(tensor)
        for node in scope.body.node:
            if name in node.output:
                feeds = {key: _constant(scope, key, opset) for key in node.input if key}
                return _run(node, name, feeds, opset)
        scope = scope.parent
    raise UsageError("a CT unit's beta, c or slope depends on the input: it must be constant")


def _run(node, name, feeds, opset):
    value = helper.make_tensor_value_info
    inputs = [
        value(key, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for key, array in feeds.items()
    ]
    body = helper.make_graph([node], "one", inputs, [value(name, TensorProto.FLOAT, None)])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)])
    return np.asarray(ReferenceEvaluator(model).run([name], feeds)[0])


def _least(array):
    """Without leading dimensions of 1: a number has none left, other arrays at least two."""
    if array.size == 1:
        return array.reshape(())
    # One dimension alone would be taken for channels.
    array = array.reshape(-1, array.shape[-1]) if array.ndim < 2 else array
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    return array


def _drop_unused(model, released):
    """Remove what computed `released`, names of tensors, as far as nothing else uses it."""
    while released:
        found = list(graph.scopes(model))
        used = {name for scope in found for node in scope.body.node for name in node.input}
        graphs = [scope.body for scope in found if isinstance(scope.body, GraphProto)]
        used.update(value.name for body in graphs for value in body.output)
        unused, released = released - used, set()

        def needed(node, unused=unused, used=used):
            return unused.isdisjoint(node.output) or not used.isdisjoint(node.output)

        for scope in found:
            for node in scope.body.node:
                if not needed(node):
                    released.update(node.input)
            rewrite.keep(scope.body.node, needed)
        for body in graphs:
            for values in body.initializer, body.value_info:
                rewrite.keep(values, lambda value, unused=unused: value.name not in unused)
