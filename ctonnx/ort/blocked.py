"""Sessions that keep ONNX Runtime's blocked layout around the CTU, for speed on the CPU.

ONNX Runtime runs a convolution, the residual sum behind it and its ReLU as one node in a blocked
layout (NCHWc). A custom op in place of the ReLU breaks that up: each has its tensor reordered out
of the layout and back into it. Yet a CTU of scalar parameters is elementwise: it fits any layout.

The rule: each CTU becomes a stand-in, an op that ONNX Runtime fuses as it fuses Relu and that the
model has nowhere else, one op for each set of parameters; ONNX Runtime optimises that model; each
stand-in, fused or not, becomes the CTU with its parameters. Nothing else can be mistaken for a CTU,
not even a Relu that was not steered. The result serves if as many CTUs come out as went in, and if
it agrees with the plain session in two runs on a random input.

It is refused, and the plain session serves, where
- the session is to run on another provider than the CPU's, or the options lower the optimisation
  level or write the optimised model to a file;
- the model has no CTU or no convolution, or ONNX Runtime lays out nothing in blocks;
- a parameter is not a scalar input or initializer of the graph, or no op is left to stand in;
- a CTU is part of a Clip, a HardSigmoid or the like;
- a CTU is inside a model-local function, which ONNX Runtime copies to its calls;
- the model computes in half precision, or is too large to be held several times;
- ONNX Runtime changed the number of stand-ins, by folding, merging or decomposing;
- the comparison fails, no random input runs, or none changes an output.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper

from .. import ctu
from ..errors import CtonnxError, first_line
from ..model import files
from ..model.external import check_external_data, read_external_data
from ..model.graph import DEFAULT_DOMAINS, keep, node_label, scopes
from ..model.names import FreshNames
from ..rewriting import activations
from . import library
from .compare import compare
from .runs import Model, random_trial

# Elementwise, and fused into Conv and Gemm wherever Relu is. Relu comes last, for ONNX Runtime
# removes it before QuantizeLinear and Clip.
_STAND_INS = ("Tanh", "Sigmoid", "Relu")

_BLOCKED = "com.microsoft.nchwc"

# The Azure provider, which CPU wheels list as available, takes only nodes of its own domain.
_CPU = {"AzureExecutionProvider", "CPUExecutionProvider"}

# Bytes of a model, which is in memory about four times while the session opens.
_LARGEST = 256 << 20

# The comparison feeds this to parameters that are inputs: it is far from ReLU, so that a lost CTU
# shows.
_PROBE = np.array([0.85], np.float32)

_QUIET = {"log_severity_level": 4, "enable_profiling": False}


class _Refused(CtonnxError):
    """The model or the options do not fit; the message is the reason."""


def open_session(
    path: str | PathLike | bytes, providers: Sequence | None, options: Any
) -> tuple[Any, str | None]:
    """Open an InferenceSession in the blocked layout, if that is sound.

    Args:
        path: the model's path, or its bytes.
        providers: execution providers, as for InferenceSession.
        options: SessionOptions with the op library registered; some values change while this runs.

    Returns:
        (session, None), or (None, reason) where the plain session is to serve.
    """
    try:
        return _open(path, providers, options), None
    except CtonnxError as error:
        return None, str(error)
    except OSError as error:  # The optimised model goes through a temporary file.
        return None, f"a file cannot be written or read: {error.strerror}"
    except Exception as error:
        if not library.raised_by_onnxruntime(error):
            raise
        return None, first_line(error)


def _open(path: str | PathLike | bytes, providers: Sequence | None, options: Any) -> Any:
    level = library.import_onnxruntime().GraphOptimizationLevel
    _check(providers, options, level)
    model = _read(path)
    parameters, count = _put_stand_ins(model)
    _load_weights(model, path)
    optimised = _optimise(model, providers, options)
    if bake(optimised, model, parameters) != count:
        raise _Refused("ONNX Runtime folded, merged or decomposed some stand-ins")
    baked = optimised.SerializeToString()
    del model, optimised
    # At BASIC nothing is laid out a second time.
    with _changed(options, graph_optimization_level=level.ORT_ENABLE_BASIC):
        session = library.open_session(baked, options, providers)
    with _changed(options, **_QUIET):
        plain = library.open_session(path, options, providers)
    _verify(plain, session, {name for group in parameters.values() for name in group})
    return session


def _check(providers: Sequence | None, options: Any, level: Any) -> None:
    """Refuse providers and options that the blocked layout cannot serve."""
    if library.has_providers(options):
        raise _Refused("the session options hold providers")
    others = {*library.provider_names(providers)} - _CPU
    if others:
        raise _Refused(f"runs on {min(others)}, not on the CPU alone")
    if options.optimized_model_filepath:
        raise _Refused("the session options want the optimised model in a file")
    if options.graph_optimization_level != level.ORT_ENABLE_ALL:
        raise _Refused("the session options lower the optimisation level")


def _read(path: str | PathLike | bytes) -> ModelProto:
    if not isinstance(path, bytes):
        if Path(path).is_file():
            _check_size(Path(path).stat().st_size)
        return files.load(path)
    _check_size(len(path))
    try:
        return ModelProto.FromString(path)
    except DecodeError:
        raise _Refused("the bytes are no ONNX model") from None


def _put_stand_ins(model: ModelProto) -> tuple[dict[str, tuple[str, ...]], Counter]:
    """Replace the CTUs of a ModelProto by stand-ins, in place.

    Returns:
        dict from a stand-in's op type to the inputs behind X of its CTUs, and a Counter of the
        stand-ins by op type.
    """
    keep(model.functions, lambda function: not ctu.is_ctu(function))
    nodes = [(scope, node) for scope in scopes(model) for node in scope.graph.node]
    sites = [node for _, node in nodes if ctu.is_ctu(node)]
    if not sites:
        raise _Refused("the model holds no CTU")
    if any(scope.function and ctu.is_ctu(node) for scope, node in nodes):
        raise _Refused("a CTU is inside a model-local function")
    if any(node.op_type != ctu.OP_TYPE for node in sites):
        raise _Refused("a CTU is part of a Clip or the like")
    if all(node.op_type != "Conv" for _, node in nodes):
        raise _Refused("the model holds no convolution")
    if {t.data_type for t in model.graph.initializer} & {TensorProto.FLOAT16, TensorProto.BFLOAT16}:
        raise _Refused("the model computes in half precision")

    shapes = _parameter_shapes(model)
    taken = {_activation(node) for _, node in nodes}
    free = [op for op in _STAND_INS if op not in taken]
    stand_ins = {}
    for node in sites:
        group = tuple(filter(None, node.input[1:]))
        if any(shapes.get(name) not in ([], [1]) for name in group):
            raise _Refused(f"the parameters of {node_label(node)!r} are not all scalars")
        if group not in stand_ins:
            if not free:
                raise _Refused("no op is left to stand in for the CTU")
            stand_ins[group] = free.pop(0)
        node.op_type, node.domain = stand_ins[group], ""
        del node.input[1:]
    return {op: group for group, op in stand_ins.items()}, Counter(n.op_type for n in sites)


def _parameter_shapes(model: ModelProto) -> dict[str, list[int] | None]:
    """The dimensions of the graph's initializers and inputs, None where an input has no shape."""
    shapes = {}
    shapes.update((tensor.name, list(tensor.dims)) for tensor in model.graph.initializer)
    for value in model.graph.input:
        kind = value.type.tensor_type
        dims = [dim.dim_value for dim in kind.shape.dim]
        shapes[value.name] = dims if kind.HasField("shape") else None
    return shapes


def _load_weights(model: ModelProto, path: str | PathLike | bytes) -> None:
    """Read a model's external data into it, as ONNX Runtime optimises it from bytes."""
    if isinstance(path, bytes):
        return
    folder = Path(path).parent
    data = check_external_data(model, folder).values()
    _check_size(model.ByteSize() + sum(file.stat().st_size for file in data))
    read_external_data(model, folder)


def _check_size(size: int) -> None:
    if size > _LARGEST:
        raise _Refused(f"the model is larger than {_LARGEST >> 20} MiB")


def _optimise(model: ModelProto, providers: Sequence | None, options: Any) -> ModelProto:
    """The model after ONNX Runtime's optimisation."""
    with tempfile.TemporaryDirectory(prefix="ctonnx-") as folder:
        file = Path(folder, "model.onnx")
        with _changed(options, optimized_model_filepath=str(file), **_QUIET):
            library.open_session(model.SerializeToString(), options, providers)
        # The file has the weights that nodes compute, too.
        _check_size(file.stat().st_size)
        optimised = files.load(file)
    if all(node.domain != _BLOCKED for scope in scopes(optimised) for node in scope.graph.node):
        raise _Refused("ONNX Runtime lays out nothing in blocks")
    return optimised


def bake(
    optimised: ModelProto, model: ModelProto, parameters: dict[str, tuple[str, ...]]
) -> Counter:
    """Put CTUs where the stand-ins are, in place.

    Args:
        optimised: `model` after ONNX Runtime's optimisation.
        model: the ModelProto with stand-ins, which still has the CTUs' parameters.
        parameters: op type of a stand-in -> the inputs behind X of its CTUs.

    Returns:
        Counter of the CTUs by the op type of their stand-in.
    """
    graph, fresh, count = optimised.graph, FreshNames(optimised), Counter()
    used = {name for group in parameters.values() for name in group}
    # ONNX Runtime dropped the parameters, as nothing used them.
    missing = used - {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(t for t in model.graph.initializer if t.name in missing)

    # ONNX Runtime accepts a value of any shape where a scalar is declared. One per channel would be
    # wrong in this layout, so the guard refuses it.
    scalar = {name: name for name in used}
    guards = []
    one = fresh("one")
    for name in sorted(used.intersection(value.name for value in graph.input)):
        scalar[name] = fresh(f"{name}_scalar")
        guards.append(helper.make_node("Reshape", [name, one], [scalar[name]]))
    if guards:
        graph.initializer.append(helper.make_tensor(one, TensorProto.INT64, [1], [1]))

    # Innermost subgraphs first, as a subgraph is copied along with its node.
    for scope in reversed(list(scopes(optimised))):
        nodes = []
        for node in scope.graph.node:
            nodes.append(node)
            op = _activation(node)
            if op not in parameters:
                continue
            count[op] += 1
            if (node.domain, node.op_type) in activations.FUSED:
                node, fused = NodeProto(output=node.output), node
                activations.take_out(fused, fresh(f"{node.output[0]}_before_ctu"))
                node.input.append(fused.output[0])
                nodes.append(node)
            node.op_type, node.domain = ctu.OP_TYPE, ctu.DOMAIN
            node.input.extend(scalar[name] for name in parameters[op])
        del scope.graph.node[:]
        scope.graph.node.extend(guards + nodes if scope.path == "" else nodes)
    return count


def _activation(node: NodeProto) -> str | None:
    """The standard op that a node is, or that is fused into it as its activation."""
    if (node.domain, node.op_type) in activations.FUSED:
        return activations.attribute(node, "activation", None, AttributeProto.STRING)
    return node.op_type if node.domain in DEFAULT_DOMAINS else None


def _verify(plain: Any, session: Any, parameters: set[str]) -> None:
    """Refuse a session that differs from the plain one in its interface, or in a run."""
    feeds = {}
    for kind in "inputs", "overridable_initializers", "outputs":
        values = [getattr(s, f"get_{kind}")() for s in (plain, session)]
        expected, actual = ([(v.name, v.type, v.shape) for v in side] for side in values)
        if expected != actual:
            raise _Refused(f"its {kind} differ from the plain session's")
        feeds.update((v.name, _PROBE) for v in values[0] if v.name in parameters)
    trial = random_trial(Model.of(plain), given=feeds, wanted=any)
    model = Model.of(session)
    # ONNX Runtime plans its memory in the first run: a plan that is wrong shows in the second.
    for _ in range(2):
        results = compare(trial.outputs, model.run(trial.inputs), response=trial.response())
        for result in results:
            if not result.ok and not result.inconclusive:
                raise _Refused(f"its output {result.name!r} {result.reason}")
        if all(result.inconclusive for result in results):
            raise _Refused(f"its output {results[0].name!r} {results[0].reason}")


@contextmanager
def _changed(options: Any, **values: Any) -> Iterator[None]:
    """Give SessionOptions other values for as long as the block lasts."""
    before = {name: getattr(options, name) for name in values}
    try:
        for name, value in values.items():
            setattr(options, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(options, name, value)
