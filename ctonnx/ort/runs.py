"""Running models in order to compare them: ONNX Runtime on one thread, and inputs to feed."""

import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
from onnx import ModelProto, ValueInfoProto

from ..errors import CheckFailed, InputFileError, MissingDependency, ModelError, UsageError
from ..model import files
from ..model.external import has_external_data
from ..model.values import arrays, cast
from .compare import Response
from .library import errors_as, import_onnxruntime, open_session, register

CPU = "CPUExecutionProvider"

# Sizes for symbolic dimensions, tried in turn until the model runs. With one element along every
# axis a normalisation or an attention tells nothing: 1 comes last.
_SIZES = (8, 32, 64, 224, 256, 512, 2, 1)

# Elements of all inputs: of a size chosen here, and of one that the model or the user asks for.
_MOST_CHOSEN, _MOST_GIVEN = 1 << 24, 1 << 30
_MOST_DIMENSIONS = 32

# Those that are tried too where the outputs hardly respond to the inputs of a smaller size.
_MORE_SIZES = (32, 64)

# Spread and offset of random floats: normal ones, then those of images, larger and smaller ones.
_RANGES = ((1.0, 0.0), (0.25, 0.5), (50.0, 128.0), (10.0, 0.0), (0.1, 0.0))

# The change of the inputs that an output must show, and how much of it, as parts of the largest
# value: noise of 5 % on all weights changes it by more.
TWENTIETH = 0.05
MOVES = 5e-3

# Sigmoids and softmaxes are rounded to about 1e-7: larger outputs tell more.
LARGE = 1e-4

# What counts as no change: in a saturated softmax numbers of 1e-30 change.
_STILL = 1e-9

# The ways in which the inputs of a run change: by a factor, by a sum, and at random.
_WAYS = (0, 1, 2, 3)
AT_RANDOM = (2,)

# By default CUDA computes convolutions and matrix products in TF32, which differs by 1e-3.
# https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#use_tf32
_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}

_NUMPY_NAMES = {"float": "float32", "double": "float64"}

Arrays = dict[str, np.ndarray]


class Model:
    """A model in ONNX Runtime, on one thread of the CPU or on another execution provider.

    `inputs` and `optional_inputs` are onnxruntime.NodeArg, the latter those with a default.

    Args:
        path: path of a model, or its bytes.
        library: whether to register the op library.
        provider: the execution provider; ops that it lacks run on the CPU.

    Raises:
        MissingDependency: the provider is not available, or does not start.
        ModelError: ONNX Runtime does not load the model.
    """

    def __init__(self, path: str | PathLike | bytes, library: bool = False, provider: str = CPU):
        options = session_options(library)
        providers = [(provider, _OPTIONS.get(provider, {}))]
        with errors_as(ModelError, "ONNX Runtime cannot load the model"):
            session = open_session(path, options, providers)
        if provider not in session.get_providers():
            raise MissingDependency(f"{provider} does not start here, `ctonnx doctor` tells more")
        self._use(session)

    def _use(self, session: Any) -> None:
        self._session = session
        self.inputs = session.get_inputs()
        self.optional_inputs = session.get_overridable_initializers()
        self.names = {i.name for i in self.inputs}

    @classmethod
    def of(cls, session: Any) -> Self:
        """The Model of an InferenceSession that is open already."""
        model = cls.__new__(cls)
        model._use(session)
        return model

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Output name -> array for `inputs`, input name -> array; values.arrays has the names of
        what a sequence holds.

        Raises:
            ModelError: the model does not run on them.
        """
        names = [output.name for output in self._session.get_outputs()]
        with errors_as(ModelError, "ONNX Runtime cannot run the model"):
            outputs = self._session.run(names, inputs)
        return arrays(zip(names, outputs, strict=True))


def session_options(library: bool, threads: int = 1) -> Any:
    """The onnxruntime.SessionOptions for some threads and no messages.

    Args:
        library: whether to register the op library.
    """
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library:
        register(options)
    return options


def with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy of a model whose outputs are the tensors `names`."""
    copy = files.own(model)
    del copy.graph.output[:]
    # ONNX Runtime infers their types.
    copy.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return copy


def variant(path: Path, model: ModelProto) -> AbstractContextManager[Path | bytes]:
    """A context of what ONNX Runtime opens as `model`, a changed copy of the one at `path`: its
    bytes, or a file beside `path` where the model has external data there.

    Raises:
        UsageError: the folder of `path` cannot be written to.
    """
    data = model.SerializeToString()
    return beside(data, path.parent) if has_external_data(model) else nullcontext(data)


@contextmanager
def beside(data: bytes, folder: str | PathLike) -> Iterator[Path]:
    """A context of a file with `data`, a model, in `folder`.

    Raises:
        UsageError: the folder cannot be written to.
    """
    path = None
    try:
        try:
            descriptor, path = tempfile.mkstemp(".onnx", ".ctonnx-", folder)
            with open(descriptor, "wb") as stream:
                stream.write(data)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be written to: {error.strerror}") from None
        # Closed, as Windows opens no file a second time.
        yield Path(path)
    finally:
        if path is not None:
            os.unlink(path)


def load_inputs(
    path: str | PathLike, model: Model, optional: Collection[str], notes: list[str]
) -> Arrays:
    """The inputs of a model from an .npz file with an array for each, by name.

    Args:
        optional: names of inputs that the file need not have.
        notes: a list that takes a line for each array that is no input.

    Raises:
        InputFileError: the file cannot be read.
        UsageError: an input is missing, of another shape, or of another kind of numbers.
    """
    inputs = read_arrays(path)
    kinds = {i.name: i.type for i in (*model.inputs, *model.optional_inputs)}
    wanted = ", ".join(f"{i.name} {_by_x(i.shape)}" for i in model.inputs)
    for name in sorted(model.names - inputs.keys() - set(optional)):
        raise UsageError(f"{path}: holds no array for input {name!r}, the model takes {wanted}")
    for name in sorted(inputs.keys() - kinds.keys()):
        notes.append(f"{path}: {name!r} is no input of the model: ignored")
        del inputs[name]
    for name, array in inputs.items():
        dtype = _dtype(kinds[name])
        if dtype is None:
            raise UsageError(f"{path}: {name!r} is {kinds[name]}, for which there is no array")
        inputs[name] = cast(f"{path}: {name!r}", array, dtype)
    shapes = {i.name: inputs[i.name].shape for i in model.inputs if i.name in inputs}
    _check_shapes(str(path), shapes, model.inputs)
    return inputs


def read_arrays(path: str | PathLike) -> Arrays:
    """The arrays in an .npz file, by name.

    Raises:
        InputFileError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive}
    except FileNotFoundError:
        raise InputFileError(f"{path}: no such file") from None
    except Exception:  # NumPy and zipfile raise whatever they like for a damaged file.
        raise InputFileError(
            f"{path}: cannot be read as an .npz file, as numpy.savez writes"
        ) from None


# From inputs to outputs.
Compute = Callable[[Arrays], Arrays]


class Trial:
    """A model's run on some inputs, and how its outputs respond to others.

    Args:
        run: gives the outputs for inputs, as Model.run.
        inputs: input name -> array.
        fixed: names of inputs that stay as they are.
        ways: those in which the others change, each of which takes a run.
    """

    def __init__(
        self,
        run: Compute,
        inputs: Arrays,
        fixed: Collection[str] = (),
        ways: Sequence[int] = _WAYS,
    ):
        self.run, self.inputs, self._ways = run, inputs, ways
        self._free = sorted(inputs.keys() - set(fixed))
        self.floats = {n: inputs[n] for n in self._free if inputs[n].dtype.kind == "f"}
        self._nudged: dict[float, Arrays] = {}

    @cached_property
    def outputs(self) -> Arrays:
        return self.run(self.inputs)

    def response(self) -> Response:
        return Response(self.moves, self.nudged)

    @cached_property
    def moves(self) -> dict[str, float]:
        """What a change of the inputs by a twentieth of their largest value changes of each output
        at most. One of integers counts by a twentieth; what is no floating-point number need but
        change, if only with other inputs altogether."""
        moves = {n: max(changes, default=0.0) for n, changes in self._changes.items()}

        def measure(outputs, floats):
            for name, before in self.outputs.items():
                if floats or not is_floating(before):
                    other = TWENTIETH * change(before, outputs.get(name))
                    moves[name] = max(moves[name], other)

        integers = [n for n in self._free if self.inputs[n].dtype.kind in "iub"]
        rest = [] if all(map(is_floating, self.outputs.values())) else self._free
        for names, floats in (integers, True), (rest, False):
            rng = np.random.default_rng(0)
            others = {name: _other(rng, self.inputs[name]) for name in names}
            with suppress(ModelError):  # They may be sizes or indices.
                if others:
                    measure(self.run({**self.inputs, **others}), floats)
        return moves

    @cached_property
    def stepwise(self) -> set[str]:
        """The outputs that some change of the floating-point inputs by a twentieth leaves as they
        are; without those of integers, if there are others."""
        floats = {name for name, value in self.outputs.items() if is_floating(value)}
        return {
            name
            for name, changes in self._changes.items()
            if min(changes, default=np.inf) <= _STILL * scale(self.outputs[name])
            and name in (floats or self.outputs)
        }

    @cached_property
    def _changes(self) -> dict[str, list[float]]:
        """What each change of the floating-point inputs by a twentieth changes of each output."""
        nudged = list(self._nudges(TWENTIETH))
        return {
            name: [change(before, after.get(name)) for after in nudged]
            for name, before in self.outputs.items()
        }

    def draw(self, seed: int) -> Arrays:
        """Inputs with other random floats, of each range in turn but the smallest, where the
        rounding of biases would count."""
        *ranges, _ = _RANGES
        rng, (spread, offset) = np.random.default_rng(seed), ranges[seed % len(ranges)]
        drawn = {
            name: np.asarray(rng.normal(size=value.shape) * spread + offset, value.dtype)
            for name, value in self.floats.items()
        }
        return {**self.inputs, **drawn}

    def nudged(self, relative: float) -> Arrays:
        """The largest change of each element of the outputs where the inputs change by `relative`,
        a part of their largest value: ten times that for a tenth, so that the rounding inside the
        model counts ten times. What changes its shape is left out."""
        if relative not in self._nudged:
            changes = {}
            for outputs in self._nudges(relative / 10):
                for name, before in self.outputs.items():
                    after = outputs.get(name)
                    if is_floating(before) and after is not None and after.shape == before.shape:
                        larger = 10 * _difference(before, after)
                        changes[name] = np.maximum(changes.get(name, 0.0), larger)
            self._nudged[relative] = changes
        return self._nudged[relative]

    def _nudges(self, relative: float) -> Iterator[Arrays]:
        """The outputs for inputs that differ by a part of their largest value, in several ways."""
        for way in self._ways if self.floats else ():
            rng = np.random.default_rng(way)
            nudged = {n: _nudge(rng, value, relative, way) for n, value in self.floats.items()}
            with suppress(ModelError):
                yield self.run({**self.inputs, **nudged})

    def telling(self) -> list[bool]:
        """Whether each output changes with the inputs by enough: of a floating-point type, where
        there is one."""
        floats = [n for n, v in self.outputs.items() if is_floating(v)] or list(self.outputs)
        scales = {n: scale(self.outputs[n]) for n in floats}
        return [scales[n] > LARGE and self.moves[n] > MOVES * scales[n] for n in floats]


def random_inputs(
    model: Model,
    shapes: Mapping[str, Sequence[int]] | None = None,
    given: Mapping[str, np.ndarray] | None = None,
) -> Arrays:
    """Inputs that a model runs on, floats and integers 0 and 1, in a size that it takes.

    Args:
        shapes: input name -> sizes, for inputs with symbolic dimensions.
        given: input name -> array to use instead.

    Raises:
        CheckFailed: the model runs on none of the sizes tried.
        UsageError: a shape does not fit, or the model has no such input.
    """
    return random_trial(model, shapes, given).inputs


def random_trial(
    model: Model,
    shapes: Mapping[str, Sequence[int]] | None = None,
    given: Mapping[str, np.ndarray] | None = None,
    wanted: Callable[[Iterable[bool]], bool] = all,
    source: Compute | None = None,
    ways: Sequence[int] = _WAYS,
) -> Trial:
    """A run on inputs as `random_inputs` gives them.

    The floats are normal, or of the first other range and size where `wanted`, all or any, of the
    outputs respond to the inputs: behind a saturated sigmoid they do not. If they do for none,
    those where most do.

    Args:
        source: what runs in the Trial, where not the model itself.
        ways: as for Trial; one takes the fewest runs.
    """
    shapes, given = shapes or {}, given or {}
    nodes = [i for i in model.inputs if i.name not in given]
    _check_shapes("shape", shapes, nodes)
    # A first dimension without a size is a batch, and so is another of its name.
    batches = {i.shape[0] for i in nodes if i.shape and isinstance(i.shape[0], str)}

    def dims(node, size):
        return shapes.get(node.name) or [
            d if isinstance(d, int) else 1 if at == 0 or d in batches else size
            for at, d in enumerate(node.shape)
        ]

    def draw(size, place):
        rng, (spread, offset) = np.random.default_rng(place), _RANGES[place]
        inputs = dict(given)
        for node in nodes:
            inputs[node.name] = _random(rng, node.type, dims(node, size), spread, offset)
        return inputs

    fixed = all(isinstance(dim, int) for i in nodes for dim in shapes.get(i.name) or i.shape)
    best = failure = None
    for size in _SIZES[:1] if fixed else _SIZES:
        if best is not None and size not in _MORE_SIZES:
            break
        try:
            _check_size([dims(i, size) for i in nodes], _MOST_GIVEN if fixed else _MOST_CHOSEN)
        except ModelError as error:
            failure = failure or error
            continue
        inputs = draw(size, 0)
        try:
            outputs = model.run(inputs)
        except ModelError as error:  # The size does not fit.
            failure = error
            continue
        for place in range(len(_RANGES)):
            drawn = inputs if place == 0 else draw(size, place)
            trial = Trial(source or model.run, drawn, given, ways)
            if place == 0 and source is None:
                trial.outputs = outputs
            if best is None or sum(trial.telling()) > sum(best.telling()):
                best = trial
            if wanted(best.telling()):
                return best
    if best is None:
        raise CheckFailed(f"found no random input that the model runs on: {failure}")
    return best


def _check_shapes(source: str, shapes: Mapping[str, Sequence[int]], inputs: Sequence) -> None:
    declared = {i.name: i.shape for i in inputs}
    for name, shape in shapes.items():
        if name not in declared:
            raise UsageError(f"{source}: no input {name!r}: choose among {', '.join(declared)}")
        want = declared[name]
        fits = len(shape) == len(want) and all(
            not isinstance(w, int) or w == s for s, w in zip(shape, want, strict=True)
        )
        if not fits:
            raise UsageError(f"{source}: {name!r} is {_by_x(want)}, got {_by_x(shape)}")


def _check_size(shapes: Sequence[Sequence[int]], most: int) -> None:
    """Raise ModelError where random inputs of some shapes would have too many elements, or more
    dimensions than NumPy's arrays."""
    if sum(map(math.prod, shapes)) > most or max(map(len, shapes), default=0) > _MOST_DIMENSIONS:
        raise ModelError(f"its inputs, {', '.join(map(_by_x, shapes))}, are too large")


def _by_x(shape: Sequence) -> str:
    return "x".join("?" if dim is None else str(dim) for dim in shape) or "a scalar"


def _dtype(kind: str) -> np.dtype | None:
    """The NumPy dtype of ONNX Runtime's name of a tensor type; None for other types."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype(_NUMPY_NAMES.get(name, name))
    except TypeError:
        return None


def _random(
    rng: np.random.Generator, kind: str, dims: Sequence[int], spread: float, offset: float
) -> np.ndarray:
    dtype = _dtype(kind)
    if dtype is None or dtype.kind not in "fiub":
        raise CheckFailed(f"no random input can be made for {kind}")
    if dtype.kind == "f":
        return (rng.normal(size=dims) * spread + offset).astype(dtype)
    return rng.integers(0, 2, dims).astype(dtype)


def _other(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Other values for an input: the same shuffled, floats smaller, and 0 in place of 1."""
    other = rng.permutation(array.ravel()).reshape(array.shape)
    if array.dtype.kind == "f":
        return (other * 0.75).astype(array.dtype)
    if array.dtype.kind in "iub" and array.size and (array == array.flat[0]).all():
        return other ^ np.ones((), array.dtype)
    return other


def _nudge(rng: np.random.Generator, array: np.ndarray, relative: float, way: int) -> np.ndarray:
    """An input that differs by a part of its largest value: scaled, shifted or at random."""
    largest = scale(array)
    by = array if way == 0 else largest if way == 1 else largest * rng.uniform(-1, 1, array.shape)
    return np.asarray(array + relative * by, array.dtype)


def is_floating(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def scale(array: np.ndarray) -> float:
    if not is_floating(array):
        return 1.0
    values = np.abs(array.astype(np.float64))
    return float(values[np.isfinite(values)].max(initial=0.0))


def change(before: np.ndarray, after: np.ndarray | None) -> float:
    """The largest change of an output; infinity for another shape, or in what is no float."""
    if after is None or after.shape != before.shape:
        return np.inf
    if not is_floating(before):
        return 0.0 if np.array_equal(before, after) else np.inf
    return float(_difference(before, after).max(initial=0.0))


def _difference(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        change = np.abs(after.astype(np.float64) - before.astype(np.float64))
    return np.nan_to_num(change, posinf=0.0)
