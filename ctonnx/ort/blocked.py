"""Sessions that keep ONNX Runtime's blocked layout around the CTU, for speed on the CPU.

ONNX Runtime runs a convolution, the residual sum behind it and its ReLU as one node in a blocked
layout (NCHWc). A custom op in place of the ReLU breaks that up: each has its tensor reordered out
of the layout and back into it. Yet a CTU is elementwise: with scalar parameters it fits any layout,
and with parameters per channel the blocked one once these are laid out likewise.

The rule: each CTU becomes a stand-in, an op that ONNX Runtime fuses as it fuses Relu and that the
model has nowhere else; ONNX Runtime optimises that model; each stand-in, fused or not, becomes the
CTU with its parameters, which the names that ONNX Runtime keeps tell. Nothing else can be mistaken
for a CTU, not even a Relu that was not steered. The result serves if every CTU that went in comes
out, and if it agrees with the plain session in two runs on a random input.

It is refused, and the plain session serves, where
- the session is to run on another provider than the CPU's, or the options lower the optimisation
  level or write the optimised model to a file;
- the model has no CTU or no convolution, or ONNX Runtime lays out nothing in blocks;
- a parameter is neither a scalar nor a constant with one value for each channel, or no op is left
  to stand in;
- a CTU is inside a model-local function, which ONNX Runtime copies to its calls;
- the model computes in half precision, or is too large to be held several times;
- ONNX Runtime changed the number of stand-ins, by folding, merging or decomposing, or their names;
- the comparison fails, no random input runs, or none changes an output.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .. import ctu
from ..errors import CtonnxError, first_line
from ..model import files
from ..model.external import check_external_data, read_external_data
from ..model.graph import DEFAULT_DOMAINS, keep, node_label, scopes
from ..model.names import FreshNames, node_names
from ..rewriting import activations
from . import library
from .compare import compare
from .runs import AT_RANDOM, Model, random_trial, session_options

# Elementwise, and fused into Conv and Gemm wherever Relu is. Relu comes last, for ONNX Runtime
# removes it before QuantizeLinear and Clip.
_STAND_INS = ("Tanh", "Sigmoid", "Relu")

# The domain of ops in the blocked layout. ONNX Runtime names such a node after the tensor that it
# computes in the plain one.
_BLOCKED = "com.microsoft.nchwc"
_SUFFIX = "_nchwc"

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
    sites = _put_stand_ins(model)
    _load_weights(model, path)
    optimised = _optimise(model, providers, options)
    bake(optimised, model, sites)
    baked = optimised.SerializeToString()
    del model, optimised
    # At BASIC nothing is laid out a second time.
    with _changed(options, graph_optimization_level=level.ORT_ENABLE_BASIC):
        session = library.open_session(baked, options, providers)
    with _changed(options, **_QUIET):
        plain = library.open_session(path, options, providers)
    _verify(plain, session, sites.parameters)
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


@dataclass(frozen=True)
class Ctu:
    """What a stand-in stands for: the op type, and the inputs behind X."""

    op_type: str
    inputs: tuple[str, ...]


class Sites:
    """The stand-ins of a model, all of one op type, and the CTUs that they stand for.

    `count` is their number, and `parameters` the names of the inputs behind X.
    """

    def __init__(self, op_type: str):
        self.op_type = op_type
        self.count = 0
        self._ctus: set[Ctu] = set()
        # By the name of the node, and of the tensor that it gives; None for one of several CTUs.
        self._by_node: dict[str, Ctu] = {}
        self._by_tensor: dict[str, Ctu | None] = {}
        # Tensor -> what the one node that reads it gives; None for several readers.
        self._next: dict[str, str | None] = {}

    @property
    def parameters(self) -> set[str]:
        return {name for site in self._ctus for name in site.inputs}

    def add(self, node: NodeProto, site: Ctu) -> None:
        output = node.output[0]
        self.count += 1
        self._ctus.add(site)
        self._by_node[node.name] = site
        self._by_tensor[output] = None if self._by_tensor.get(output, site) != site else site

    def follow(self, node: NodeProto) -> None:
        """Take note of what a node reads."""
        for name in node.input:
            self._next[name] = None if name in self._next else next(iter(node.output), None)

    def find(self, node: NodeProto) -> Ctu:
        """The CTU of a node of the optimised model that is a stand-in, or has one fused into it.

        Raises:
            _Refused: the names do not tell.
        """
        if len(self._ctus) == 1:
            return next(iter(self._ctus))
        site = None
        if (node.domain, node.op_type) not in activations.FUSED:
            site = self._by_node.get(node.name)
        else:
            # Its own tensor, or that of the convolution: a sum may come between.
            tensor = node.output[0]
            if node.domain == _BLOCKED:
                tensor = node.name.removesuffix(_SUFFIX)
            for _ in range(3):
                if tensor is None or tensor in self._by_tensor:
                    site = self._by_tensor.get(tensor or "")
                    break
                tensor = self._next.get(tensor)
        if site is None:
            raise _Refused(f"the names do not tell which CTU {node_label(node)!r} is")
        return site


def _put_stand_ins(model: ModelProto) -> Sites:
    """Replace the CTUs of a ModelProto by stand-ins, in place."""
    keep(model.functions, lambda function: not ctu.is_ctu(function))
    nodes = [(scope, node) for scope in scopes(model) for node in scope.graph.node]
    ctus = [node for _, node in nodes if ctu.is_ctu(node)]
    if not ctus:
        raise _Refused("the model holds no CTU")
    if any(scope.function and ctu.is_ctu(node) for scope, node in nodes):
        raise _Refused("a CTU is inside a model-local function")
    if all(node.op_type != "Conv" for _, node in nodes):
        raise _Refused("the model holds no convolution")
    if {t.data_type for t in model.graph.initializer} & {TensorProto.FLOAT16, TensorProto.BFLOAT16}:
        raise _Refused("the model computes in half precision")

    _hoist_constants(model, {name for node in ctus for name in node.input[1:]})
    shapes, inputs = _parameter_shapes(model), {value.name for value in model.graph.input}
    taken = {_activation(node) for _, node in nodes}
    op_type = next((op for op in _STAND_INS if op not in taken), None)
    if op_type is None:
        raise _Refused("no op is left to stand in for the CTU")
    sites, fresh, used = Sites(op_type), FreshNames(model, node_names), set()
    for node in ctus:
        group = tuple(filter(None, node.input[1:]))
        for name in group:
            if shapes.get(name) not in ([], [1]) and (name in inputs or name not in shapes):
                raise _Refused(f"a parameter of {node_label(node)!r} is no constant, and no scalar")
        if not node.name or node.name in used:
            node.name = fresh(node_label(node))
        used.add(node.name)
        sites.add(node, Ctu(node.op_type, group))
        node.op_type, node.domain = op_type, ""
        del node.input[1:]
    for _, node in nodes:
        sites.follow(node)
    return sites


def _hoist_constants(model: ModelProto, names: set[str]) -> None:
    """Make initializers of the Constant nodes of the main graph that give tensors under `names`."""
    for node in model.graph.node:
        if (
            node.op_type == "Constant"
            and node.domain in DEFAULT_DOMAINS
            and node.output[0] in names
        ):
            for attribute in node.attribute:
                if attribute.name == "value":
                    model.graph.initializer.append(attribute.t)
                elif attribute.name == "value_float":
                    number = np.array(attribute.f, np.float32)
                    model.graph.initializer.append(numpy_helper.from_array(number))
                else:
                    continue
                model.graph.initializer[-1].name = node.output[0]
    hoisted = {tensor.name for tensor in model.graph.initializer} & names
    keep(model.graph.node, lambda n: n.op_type != "Constant" or n.output[0] not in hoisted)


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
    if data:
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


def bake(optimised: ModelProto, model: ModelProto, sites: Sites) -> None:
    """Put CTUs where the stand-ins are, in place.

    Args:
        optimised: `model` after ONNX Runtime's optimisation.
        model: the ModelProto with stand-ins, which still has the CTUs' parameters.
        sites: its stand-ins.

    Raises:
        _Refused: there are more or fewer than there were, or their names do not tell them apart.
    """
    graph, fresh, count = optimised.graph, FreshNames(optimised), 0
    used = sites.parameters
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in used}
    # ONNX Runtime dropped the parameters, as nothing used them.
    missing = used - {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(t for name, t in tensors.items() if name in missing)

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

    in_blocks = _tensors_in_blocks(optimised)
    laid_out: dict[str, str] = {}

    def in_layout(name):
        """A parameter as the kernel reads it beside a tensor in blocks."""
        if name not in tensors or tensors[name].dims in ([], [1]):
            return scalar[name]
        if name not in laid_out:
            laid_out[name] = fresh(f"{name}_in_blocks")
            array = _in_blocks(name, numpy_helper.to_array(tensors[name]))
            graph.initializer.append(numpy_helper.from_array(array, laid_out[name]))
        return laid_out[name]

    # Innermost subgraphs first, as a subgraph is copied along with its node.
    for scope in reversed(list(scopes(optimised))):
        nodes = []
        for node in scope.graph.node:
            nodes.append(node)
            if _activation(node) != sites.op_type:
                continue
            count += 1
            site, blocked = sites.find(node), node.output[0] in in_blocks
            if (node.domain, node.op_type) in activations.FUSED:
                node, fused = NodeProto(output=node.output), node
                activations.take_out(fused, fresh(f"{node.output[0]}_before_ctu"))
                node.input.append(fused.output[0])
                nodes.append(node)
            node.op_type, node.domain = site.op_type, ctu.DOMAIN
            inputs = [(in_layout if blocked else scalar.__getitem__)(name) for name in site.inputs]
            if any(name in laid_out.values() for name in inputs):
                node.attribute.append(helper.make_attribute("block", _block()))
            node.input.extend(inputs)
        del scope.graph.node[:]
        scope.graph.node.extend(guards + nodes if scope.path == "" else nodes)
    if count != sites.count:
        raise _Refused("ONNX Runtime folded, merged or decomposed some stand-ins")


def _tensors_in_blocks(model: ModelProto) -> set[str]:
    """The tensors of a model that are in the blocked layout: what an op of its domain gives, and
    what is computed from that elementwise, up to the op that reorders it."""
    found = set()
    for scope in scopes(model):
        for node in scope.graph.node:
            inside = node.domain == _BLOCKED or not found.isdisjoint(node.input)
            if inside and node.op_type != "ReorderOutput":
                found.update(node.output)
    return found


def _in_blocks(name: str, parameter: np.ndarray) -> np.ndarray:
    """A parameter [C, 1, 1] or [1, C, 1, 1] as [blocks, 1, 1, block], the last value repeated for
    the channels that ONNX Runtime adds."""
    if parameter.ndim not in (3, 4) or parameter.shape[-3] != parameter.size:
        raise _Refused(f"{name!r} is no scalar, and not one for each channel")
    block, values = _block(), parameter.ravel()
    return np.pad(values, (0, -values.size % block), mode="edge").reshape(-1, 1, 1, block)


@cache
def _block() -> int:
    """The channels of a block: what ONNX Runtime rounds the number of filters up to."""
    shapes = {"x": [1, 32, 8, 8], "y": [1, 4, 8, 8]}
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n, dims in shapes.items())
    weights = numpy_helper.from_array(np.ones((4, 32, 1, 1), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])], "g", [x], [y], [weights]
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    optimised = _optimise(model, ["CPUExecutionProvider"], session_options(library=False))
    return next(tensor.dims[0] for tensor in optimised.graph.initializer if len(tensor.dims) == 4)


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
    trial = random_trial(Model.of(plain), given=feeds, wanted=any, ways=AT_RANDOM)
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
