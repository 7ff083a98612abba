"""Running models, to compare them: ONNX Runtime on one thread, and inputs to feed."""

import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
from onnx import ValueInfoProto

from ..errors import (
    CheckFailed,
    InputFileError,
    MissingDependency,
    ModelError,
    UsageError,
    first_line,
)
from ..model import files
from ..model.external import has_external_data
from ..model.values import arrays, cast
from .library import import_onnxruntime, open_session, register

CPU = "CPUExecutionProvider"

# Sizes tried in turn for an input's symbolic dimensions, until the model runs.
# Where every axis has one element, what a normalisation or an attention gives tells nothing: last.
_SIZES = (8, 32, 64, 224, 256, 512, 2, 1)

# By default convolutions and matrix products on CUDA are of TF32, which differs by 1e-3.
# https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#use_tf32
_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}

_NUMPY_NAMES = {"float": "float32", "double": "float64"}


class Model:
    """A model to run in ONNX Runtime, on one thread of the CPU or on another provider.

    Args:
        path: path of a model, or its bytes.
        library: whether to register the op library.
        provider: the execution provider; what it does not take runs on the CPU.

    Raises:
        MissingDependency: the provider is not available, or does not start.
        ModelError: ONNX Runtime does not load the model.
    """

    def __init__(self, path, library=False, provider=CPU):
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        if library:
            register(options)
        try:
            given = [(provider, _OPTIONS.get(provider, {}))]
            session = open_session(path, options, given)
        except MissingDependency:
            raise
        except Exception as error:  # ONNX Runtime has an exception type for each of its codes.
            raise ModelError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error
        if provider not in session.get_providers():
            raise MissingDependency(f"{provider} does not start here, `ctonnx doctor` tells more")
        self._use(session)

    def _use(self, session):
        self._session = session
        self.inputs = session.get_inputs()
        self.optional_inputs = session.get_overridable_initializers()
        self.names = {i.name for i in self.inputs}

    @classmethod
    def of(cls, session):
        """A session that is open already."""
        model = cls.__new__(cls)
        model._use(session)
        return model

    def run(self, inputs):
        """Output name -> array for `inputs`, input name -> array; a sequence's have an index.

        Raises:
            ModelError: it does not run on them.
        """
        names = [output.name for output in self._session.get_outputs()]
        try:
            values = self._session.run(names, inputs)
        except Exception as error:  # As above.
            raise ModelError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error
        return arrays(zip(names, values, strict=True))


def with_outputs(model, names):
    """A copy of a ModelProto whose outputs are the tensors `names`."""
    copy = files.own(model)
    del copy.graph.output[:]
    # ONNX Runtime infers their types.
    copy.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return copy


def variant(path, model):
    """A context of what opens as `model`, a changed ModelProto of the one at `path`.

    Its bytes, or a file beside that, where its external data are.

    Raises:
        UsageError: the model's folder cannot be written to.
    """
    data = model.SerializeToString()
    return beside(data, path.parent) if has_external_data(model) else nullcontext(data)


@contextmanager
def beside(data, folder):
    """The path of a file of `data`, a model, in `folder`, for as long as this lasts.

    Raises:
        UsageError: the folder cannot be written to.
    """
    try:
        stream = tempfile.NamedTemporaryFile(dir=folder, prefix=".ctonnx-", suffix=".onnx")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to: {error.strerror}") from None
    with stream:
        stream.write(data)
        stream.flush()
        yield Path(stream.name)


def load_inputs(path, model, known, notes):
    """The inputs of `model`, a Model, from an .npz file with an array for each, by name, but for
    those whose names are `known`. What else the file holds is passed over, with a line in `notes`.

    Raises:
        InputFileError: the file cannot be read.
        UsageError: an input is missing, unknown, or of another kind of numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            given = {name: held[name] for name in held}
    except FileNotFoundError:
        raise InputFileError(f"{path}: no such file") from None
    except Exception:  # Whatever the parser raises for a damaged file.
        raise InputFileError(
            f"{path}: cannot be read as an .npz file, as numpy.savez writes"
        ) from None
    kinds = {i.name: i.type for i in (*model.inputs, *model.optional_inputs)}
    wanted = ", ".join(f"{i.name} {_by_x(i.shape)}" for i in model.inputs)
    for name in sorted(model.names - given.keys() - set(known)):
        raise UsageError(f"{path}: holds no array for input {name!r}, the model takes {wanted}")
    for name in sorted(given.keys() - kinds.keys()):
        notes.append(f"{path}: {name!r} is no input of the model: ignored")
        del given[name]
    for name, array in given.items():
        dtype = _dtype(kinds[name])
        if dtype is None:
            raise UsageError(f"{path}: {name!r} is {kinds[name]}, for which there is no array")
        given[name] = cast(f"{path}: {name!r}", array, dtype)
    shapes = {i.name: given[i.name].shape for i in model.inputs if i.name in given}
    _check_shapes(str(path), shapes, model.inputs)
    return given


def random_inputs(model, shapes=None, given=None, seed=0):
    """Inputs that `model`, a Model, runs on: normal floats, integers 0 and 1, in a size it takes.

    Args:
        shapes: input name -> list of sizes, for inputs with symbolic dimensions.
        given: input name -> array to use instead.

    Raises:
        CheckFailed: the model runs on none of the sizes tried.
        UsageError: a shape does not fit, or is of an input that the model lacks.
    """
    shapes, given = shapes or {}, given or {}
    inputs = [i for i in model.inputs if i.name not in given]
    _check_shapes("shape", shapes, inputs)
    # A first dimension without a size is a batch, and so is another of its name.
    batches = {i.shape[0] for i in inputs if i.shape and isinstance(i.shape[0], str)}

    def made(size):
        rng = np.random.default_rng(seed)
        result = dict(given)
        for i in inputs:
            dims = shapes.get(i.name) or [
                d if isinstance(d, int) else 1 if at == 0 or d in batches else size
                for at, d in enumerate(i.shape)
            ]
            result[i.name] = _random(rng, i.type, dims)
        return result

    fixed = all(isinstance(dim, int) for i in inputs for dim in shapes.get(i.name) or i.shape)
    error = None
    for size in _SIZES[:1] if fixed else _SIZES:
        result = made(size)
        try:
            model.run(result)
            return result
        except ModelError as caught:  # The size does not fit.
            error = caught
    raise CheckFailed(f"found no random input that the model runs on: {error}")


def _check_shapes(source, shapes, inputs):
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


def _by_x(shape):
    return "x".join("?" if dim is None else str(dim) for dim in shape) or "a scalar"


def _dtype(kind):
    """The NumPy dtype of ONNX Runtime's name of a tensor type; None for other types."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype(_NUMPY_NAMES.get(name, name))
    except TypeError:
        return None


def _random(rng, kind, dims):
    dtype = _dtype(kind)
    if dtype is None or dtype.kind not in "fiub":
        raise CheckFailed(f"no random input can be made for {kind}")
    if dtype.kind == "f":
        return rng.normal(size=dims).astype(dtype)
    return rng.integers(0, 2, dims).astype(dtype)
