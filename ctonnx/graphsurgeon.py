"""`Graph.ctu` for onnx-graphsurgeon: importing this module registers it.

>>> import onnx_graphsurgeon as gs, ctonnx.graphsurgeon  # doctest: +SKIP
>>> y = graph.ctu(x, beta=0.85)  # doctest: +SKIP
"""

import hashlib

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter, get_numpy_type
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.util.misc import is_dynamic_dimension

from . import ctu as op
from .errors import ModelError, UsageError
from .model.graph import DEFAULT_DOMAINS
from .model.names import unique_name

# Before it, parameters per channel would not broadcast.
_MIN_OPSET = 7


@gs.Graph.register()
def ctu(self, x, beta, coeff=0.5, slope=None, output=None, name=None):
    """Append a CT unit to this Graph: main graph, body of a node, or Function.

    The model-local function that computes it where the op library is missing joins
    `graph.functions`; a body built by hand has functions of its own, which graphsurgeon exports
    only where they are among those of the main graph too. The exporter imports the op's domain. As
    after every node that is appended, sort the graph before it is exported: `graph.toposort()`, and
    `graph.toposort(mode="nodes")` where it holds bodies, as the full sort of functions and bodies
    together recurses without end.

    Args:
        x: gs.Tensor, the pre-activation: float32, float16, bfloat16 or double, of any shape. Where
            it declares no type, it is taken to be of the nearest one before it, or float32.
        beta, coeff: in [0, 1]: float, array or gs.Constant, which are stored as float32, or a
            float32 gs.Variable; a scalar, or broadcastable to `x` (per channel: [C, 1, 1]).
        slope: slope of the negative side, likewise, but of the type of `x`; 0 where None.
        output: gs.Variable to compute, taken over from the node that does so now, which
            `graph.cleanup()` then removes; a new one where None.
        name: the node's name; a free one made from that of `x` where None.

    Returns:
        gs.Variable of the type and shape of `x`, the output.

    Raises:
        UsageError: a value outside [0, 1], a parameter of another type or a shape that does not
            broadcast to `x`, an `x` that is not floating-point, a second element type in a graph
            older than opset 15, or the first slope of a patched graph in a body or Function.
        ModelError: the graph is older than opset 7.
    """
    if not isinstance(x, gs.Tensor):
        raise UsageError(f"x must be a graphsurgeon tensor, got {type(x).__name__}")
    dtype = _type_of(x)
    if dtype not in op.FLOATING:
        found = TensorProto.DataType.Name(dtype).lower()
        raise UsageError(f"{x.name!r} is {found}, not floating-point")
    inputs = [x, _parameter(self, "beta", beta, TensorProto.FLOAT, x.shape)]
    inputs.append(_parameter(self, "coeff", coeff, TensorProto.FLOAT, x.shape))
    negative = _parameter(self, "slope", 0.0 if slope is None else slope, dtype, x.shape)
    if _fit_function(self, dtype, slope is not None):
        inputs.append(negative)
    # Names of the graphs around a body are out of sight, but not what else they make of `x`.
    taken = {*self.tensors(), *(t.name for node in x.outputs for t in node.outputs)}
    label = f"{x.name}_ctu"
    if output is None:
        output = gs.Variable(unique_name(label, taken))
    output.inputs.clear()
    if output.dtype is None:
        # NumPy lacks bfloat16, which graphsurgeon has as the number of the element type.
        known = get_numpy_type(dtype)
        output.dtype = dtype if known is None else known
    if output.shape is None:
        output.shape = x.shape
    return self.layer(
        op=op.OP_TYPE,
        domain=op.DOMAIN,
        name=name or unique_name(label, {node.name for node in self.nodes}),
        inputs=inputs,
        outputs=[output],
    )[0]


def _type_of(tensor):
    """The TensorProto element type of a tensor: what it declares, or else the nearest before it."""
    pending, seen = [tensor], set()
    for near in pending:
        dtype = None if near.dtype is None else dtype_to_onnx(near.dtype)
        if dtype is not None and (near is tensor or dtype in op.FLOATING):
            return dtype
        for node in near.inputs:
            if node.op == "Cast":
                return dtype_to_onnx(node.attrs["to"])
            if id(node) not in seen:
                seen.add(id(node))
                pending.extend(node.inputs)
    return TensorProto.FLOAT


def _parameter(graph, role, value, dtype, shape):
    """The gs.Tensor of an argument of `ctu`, checked; `shape` is that of X, or None."""
    if isinstance(value, gs.Variable):
        if value.dtype is not None and dtype_to_onnx(value.dtype) != dtype:
            wanted = TensorProto.DataType.Name(dtype).lower()
            raise UsageError(f"{role} must be {wanted}, and {value.name!r} is {value.dtype}")
        tensor = value
    else:
        tensor = _constant(graph, role, value, dtype)
    if not _broadcasts(tensor.shape, shape):
        raise UsageError(f"{role} of shape {list(tensor.shape)} does not broadcast to {shape}")
    return tensor


def _constant(graph, role, value, dtype):
    """A gs.Constant of an array, a number or another Constant: one that `graph` has, or a new one.

    Its name tells its value: graphsurgeon takes constants of one name in a graph and its bodies for
    the same.
    """
    try:
        array = np.asarray(value.values if isinstance(value, gs.Constant) else value, np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"{role} must be numbers or a tensor, got {value!r}") from None
    if role == "slope" and not np.isfinite(array).all():
        raise UsageError("slope must be finite")
    for number in array.flat if role != "slope" else ():
        op.check_unit_interval(role, number)
    if isinstance(value, gs.Constant) and dtype_to_onnx(value.dtype) == dtype:
        return value
    digest = hashlib.sha256(repr((array.shape, array.tobytes())).encode()).hexdigest()[:12]
    label = f"ctu_{role}_{digest if array.ndim else repr(float(array))}"
    if dtype != TensorProto.FLOAT:
        label += f"_{TensorProto.DataType.Name(dtype).lower()}"
    tensors = graph.tensors()
    proto = helper.make_tensor("", dtype, array.shape, array.ravel())
    values = numpy_helper.to_array(proto)
    held = tensors.get(label)
    if isinstance(held, gs.Constant) and np.array_equal(held.values, values):
        return held
    return gs.Constant(unique_name(label, tensors), LazyValues(proto))


def _broadcasts(shape, target):
    if shape is None or target is None or tuple(shape) in ((), (1,)):
        return True
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(
        a == b or a == 1 or is_dynamic_dimension(a) or is_dynamic_dimension(b) for a, b in pairs
    )


def _fit_function(graph, dtype, sloped):
    """Make the op's function serve one more call, and tell whether calls pass a slope.

    They all do, for a body cannot see whether others need it; but in a graph that `ctonnx.patch`
    steered without, only once one is asked for.
    """
    functions, key = graph.functions, (op.DOMAIN, op.OP_TYPE)
    old = next((function for function in functions if function.unique_id == key), None)
    types = _types_served(old) if old else set()
    had_slope = old is not None and len(old.inputs) == 4
    any_type = TensorProto.UNDEFINED in types and dtype != TensorProto.DOUBLE
    if old and (dtype in types or any_type) and had_slope >= sloped:
        return had_slope
    # Of an imported graph the exporter writes the imports, whatever its `opset` has become.
    imports = [e.version for e in graph.import_domains or () if e.domain in DEFAULT_DOMAINS]
    opset = (imports or [graph.opset])[0]
    if opset < _MIN_OPSET:
        raise ModelError(f"the graph's opset is {opset}, the CTU needs {_MIN_OPSET} or newer")
    # Imported main graphs, which patched ones are, have an IR version; bodies and functions do not.
    if old and sloped and not had_slope and graph.ir_version is None:
        raise UsageError(
            "the CTUs around this body pass no slope, and are out of its sight: call ctu with a "
            "slope on the main graph first"
        )
    types.add(dtype)
    if len(types) > 1 and opset < 15:
        raise UsageError("CTUs of several element types in one graph need opset 15")
    sloped = sloped or had_slope or not old
    new = OnnxImporter.import_function(op.function(opset, types, sloped))
    # In front, for graphsurgeon wants functions sorted, and this one calls none.
    graph.functions = [new, *(function for function in functions if function is not old)]
    owners = (graph, *functions) if sloped and not had_slope else ()
    for body in (b for owner in owners for b in (owner, *owner.subgraphs(recursive=True))):
        for node in body.nodes:
            if (node.domain, node.op) == key and len(node.inputs) == 3:
                node.inputs.append(_constant(body, "slope", 0.0, _type_of(node.inputs[0])))
    if graph.ir_version is not None:
        graph.ir_version = max(graph.ir_version, 8)  # which functions came with
    return sloped


def _types_served(function):
    """The element types of X that a gs.Function of the op is for, UNDEFINED for any."""
    last = function.outputs[0].inputs[0]
    if last.op == "Cast":
        return {dtype_to_onnx(last.attrs["to"])}
    casts = {node.attrs["to"] for node in function.nodes if node.op == "Cast"}
    compute = TensorProto.DOUBLE if TensorProto.DOUBLE in casts else TensorProto.FLOAT
    return {compute} if last.op == "Add" else {compute, TensorProto.UNDEFINED}
