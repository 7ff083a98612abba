"""`Graph.ctu` for onnx-graphsurgeon: importing this module registers it.

>>> import onnx_graphsurgeon as gs, ctonnx.graphsurgeon  # doctest: +SKIP
>>> y = graph.ctu(x, beta=0.85)  # doctest: +SKIP
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
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

# Before opset 7 parameters per channel would not broadcast.
_MIN_OPSET = 7

Tensor = gs.Variable | gs.Constant

# What a beta, c or slope can be passed as.
Parameter = npt.ArrayLike | Tensor


@gs.Graph.register()
def ctu(
    self: gs.Graph,
    x: Tensor,
    beta: Parameter,
    coeff: Parameter = 0.5,
    slope: Parameter | None = None,
    output: gs.Variable | None = None,
    name: str | None = None,
) -> gs.Variable:
    """Append a CT unit to this Graph: main graph, subgraph of a node, or Function.

    The model-local function that computes the unit without the op library joins
    `graph.functions`; a subgraph built by hand has functions of its own, which graphsurgeon exports
    only if the main graph has them too. The exporter imports the op's domain. As after any appended
    node, sort the graph before you export it: `graph.toposort()`, or
    `graph.toposort(mode="nodes")` where it has subgraphs, as the full sort of functions and
    subgraphs together recurses without end.

    Args:
        x: the pre-activation: float32, float16, bfloat16 or double, of any shape. If it declares no
            type, the nearest one before it counts, or float32.
        beta, coeff: in [0, 1]: float, array or gs.Constant, which are stored as float32, or a
            float32 gs.Variable; a scalar, or broadcastable to `x` (per channel: [C, 1, 1]).
        slope: slope of the negative side, likewise, but of the type of `x`; 0 where None.
        output: tensor to compute, in place of the node that computes it now, which
            `graph.cleanup()` then removes; a new one where None.
        name: the node's name; where None a free one, made from that of `x`.

    Returns:
        The output, of the type and shape of `x`.

    Raises:
        UsageError: a value outside [0, 1], a parameter of another type or a shape that does not
            broadcast to `x`, an `x` that is not floating-point, a second element type in a graph
            older than opset 15, or the first slope of a patched graph in a subgraph or Function.
        ModelError: the graph is older than opset 7.
    """
    if not isinstance(x, Tensor):
        raise UsageError(f"x must be a graphsurgeon tensor, got {type(x).__name__}")
    dtype = _type_of(x)
    if dtype not in op.FLOATING:
        raise UsageError(f"{x.name!r} is {_type_name(dtype)}, not floating-point")
    inputs = [x, _parameter(self, "beta", beta, TensorProto.FLOAT, x.shape)]
    inputs.append(_parameter(self, "coeff", coeff, TensorProto.FLOAT, x.shape))
    negative = _parameter(self, "slope", 0.0 if slope is None else slope, dtype, x.shape)
    if _fit_function(self, dtype, slope is not None):
        inputs.append(negative)
    # A subgraph cannot see the names of the graphs around it, but those of other results of `x`.
    taken = {*self.tensors(), *(t.name for node in x.outputs for t in node.outputs)}
    label = f"{x.name}_ctu"
    if output is None:
        output = gs.Variable(unique_name(label, taken))
    output.inputs.clear()
    if output.dtype is None:
        # graphsurgeon represents bfloat16, which NumPy lacks, by the number of the element type.
        numpy_type = get_numpy_type(dtype)
        output.dtype = dtype if numpy_type is None else numpy_type
    if output.shape is None:
        output.shape = x.shape
    return self.layer(
        op=op.OP_TYPE,
        domain=op.DOMAIN,
        name=name or unique_name(label, {node.name for node in self.nodes}),
        inputs=inputs,
        outputs=[output],
    )[0]


def _type_name(dtype: int) -> str:
    return TensorProto.DataType.Name(dtype).lower()


def _type_of(tensor: Tensor) -> int:
    """The TensorProto element type that a tensor declares, or else the nearest before it."""
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


def _parameter(
    graph: gs.Graph,
    role: str,
    value: Parameter,
    dtype: int,
    shape: Sequence[int | str] | None,
) -> Tensor:
    """The tensor of a checked argument of `ctu`; `shape` is that of X, or None."""
    if isinstance(value, gs.Variable):
        if value.dtype is not None and dtype_to_onnx(value.dtype) != dtype:
            raise UsageError(
                f"{role} must be {_type_name(dtype)}, and {value.name!r} is {value.dtype}"
            )
        tensor = value
    else:
        tensor = _constant(graph, role, value, dtype)
    if not _broadcasts(tensor.shape, shape):
        raise UsageError(
            f"{role} of shape {list(tensor.shape or ())} does not broadcast to {shape}"
        )
    return tensor


def _constant(graph: gs.Graph, role: str, value: Parameter, dtype: int) -> gs.Constant:
    """A gs.Constant of an array, a number or another Constant: one that `graph` has, or a new one.

    Its name depends on its value, as graphsurgeon takes constants of one name in a graph and its
    subgraphs for one constant.
    """
    try:
        numbers = value.values if isinstance(value, gs.Constant) else value
        array = np.asarray(numbers, np.float64)
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
        label += f"_{_type_name(dtype)}"
    tensors = graph.tensors()
    proto = helper.make_tensor("", dtype, array.shape, array.ravel())
    values = numpy_helper.to_array(proto)
    existing = tensors.get(label)
    if isinstance(existing, gs.Constant) and np.array_equal(existing.values, values):
        return existing
    return gs.Constant(unique_name(label, tensors), LazyValues(proto))


def _broadcasts(shape: Sequence[int | str] | None, target: Sequence[int | str] | None) -> bool:
    """Whether one shape may broadcast to the other, as far as both are known."""
    if shape is None or target is None or tuple(shape) in ((), (1,)):
        return True
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(
        a == b or a == 1 or is_dynamic_dimension(a) or is_dynamic_dimension(b) for a, b in pairs
    )


def _fit_function(graph: gs.Graph, dtype: int, sloped: bool) -> bool:
    """Make the op's function serve one more call, for an X of `dtype`.

    All calls pass a slope, as a subgraph cannot see whether others need one; but in a graph that
    `ctonnx.patch` steered without slopes, only once a call needs one.

    Returns:
        Whether the call must pass a slope.
    """
    functions, key = graph.functions, (op.DOMAIN, op.OP_TYPE)
    old = next((function for function in functions if function.unique_id == key), None)
    types = _types_served(old) if old else set()
    had_slope = old is not None and len(old.inputs) == 4
    any_type = TensorProto.UNDEFINED in types and dtype != TensorProto.DOUBLE
    if old and (dtype in types or any_type) and had_slope >= sloped:
        return had_slope
    # For an imported graph the exporter writes its imports, not its `opset`.
    imports = [e.version for e in graph.import_domains or () if e.domain in DEFAULT_DOMAINS]
    opset = (imports or [graph.opset])[0]
    if opset < _MIN_OPSET:
        raise ModelError(f"the graph's opset is {opset}, the CTU needs {_MIN_OPSET} or newer")
    # Imported main graphs, as patched ones are, have an IR version; subgraphs and functions do not.
    if old and sloped and not had_slope and graph.ir_version is None:
        raise UsageError(
            "the model's other CTUs pass no slope, and cannot be changed from a subgraph or "
            "Function: call ctu with a slope on the main graph first"
        )
    types.add(dtype)
    if len(types) > 1 and opset < 15:
        raise UsageError("CTUs of several element types in one graph need opset 15")
    sloped = sloped or had_slope or not old
    new = OnnxImporter.import_function(op.function(opset, types, sloped))
    # In front, as graphsurgeon needs functions sorted, and this one calls none.
    graph.functions = [new, *(function for function in functions if function is not old)]
    owners = (graph, *functions) if sloped and not had_slope else ()
    for owner in owners:
        for subgraph in (owner, *owner.subgraphs(recursive=True)):
            for node in subgraph.nodes:
                if (node.domain, node.op) == key and len(node.inputs) == 3:
                    node.inputs.append(_constant(subgraph, "slope", 0.0, _type_of(node.inputs[0])))
    if graph.ir_version is not None:
        graph.ir_version = max(graph.ir_version, 8)  # the first with functions
    return sloped


def _types_served(function: gs.Function) -> set[int]:
    """The element types of X that a gs.Function of the op serves, UNDEFINED for any."""
    last = function.outputs[0].inputs[0]  # pyright: ignore[reportAttributeAccessIssue]
    if last.op == "Cast":
        return {dtype_to_onnx(last.attrs["to"])}
    casts = {node.attrs["to"] for node in function.nodes if node.op == "Cast"}
    compute = TensorProto.DOUBLE if TensorProto.DOUBLE in casts else TensorProto.FLOAT
    return {compute} if last.op == "Add" else {compute, TensorProto.UNDEFINED}
