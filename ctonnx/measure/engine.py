"""Running one model at many points, (β, c), over batches: one session, fed at run time."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper

from .. import ctu
from ..data.batches import Input
from ..data.source import digest, stamp
from ..errors import CtonnxError, ModelError, UsageError, first_line
from ..model import files
from ..model.external import check_external_data
from ..ort import library
from ..ort.runs import beside
from ..ort.session import session
from ..rewriting.steer import steer
from ..rewriting.steered import SteeredModel

# The point that is the original network, in every list of points the first.
ORIGINAL = 0

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


@dataclass
class Steerable:
    """A steered model whose β, and c where it is swept, are inputs that must be fed.

    `inputs` are those of the data, `outputs` all names, `measurable` those of floating type, and
    `scores` how many numbers the first of these has for a sample, None where that is not known;
    `folder` is where external data are, if there are any, and `external` their files.
    """

    data: bytes
    folder: str | None
    inputs: list[Input]
    outputs: list[str]
    measurable: list[str]
    scores: int | None
    betas: list[str]
    coeffs: list[str]
    external: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def output(self):
        """The name of the output that is measured: the first of floating type."""
        return self.measurable[0]

    def open(self, providers=None, threads=0):
        """A session; `threads` 0 leaves their number to ONNX Runtime.

        Raises:
            ModelError: ONNX Runtime does not load the model.
        """
        ort = library.import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        with self._beside_its_data() as model:
            try:
                return session(model, providers, options)
            except CtonnxError:
                raise
            except Exception as error:  # ONNX Runtime has an exception type for each of its codes.
                line = first_line(error)
                raise ModelError(f"ONNX Runtime cannot load the model: {line}") from error

    def identity(self):
        """What tells the model from others, for JSON."""
        return [digest(self.data), *map(stamp, self.external)]

    def _beside_its_data(self):
        """A context of what a session is made of: bytes, or a file where external data are."""
        if self.folder is None:
            return nullcontext(self.data)
        return beside(self.data, self.folder)


def prepare(model, sweep_coeff=False):
    """Make a model Steerable; one that is not steered is steered first.

    Args:
        model: a path or a ModelProto. It is not changed.
        sweep_coeff: make c an input too.

    Raises:
        NothingToDo: there is no activation to steer.
        ModelError: the model cannot be read.
        UsageError: it is neither of these, or its inputs or outputs are not arrays with a row per
            sample.
    """
    proto, folder, external = files.own(model), None, {}
    if not isinstance(model, ModelProto):
        external = check_external_data(proto, Path(model).parent)
        if external:
            folder = str(Path(model).parent.absolute())
    notes = []
    steered = SteeredModel(proto)
    if not steered.is_steered:
        report = steer(proto, 1.0, beta_as="required-input")
        count = f"{len(report.replaced)} activations, {len(report.skipped)} skipped"
        notes.append(f"steered on the fly: {count}")
        steered = SteeredModel(proto, betas=report.beta_names)
    betas, coeffs = steered.changeable(sweep_coeff)
    if sweep_coeff and not coeffs:
        raise UsageError("c cannot be swept: the model is lowered to primitives")
    if len(betas) > 1:
        notes.append(f"all activations get one beta, in place of {len(betas)}")
    held = {tensor.name for tensor in proto.graph.initializer}
    coeffs = coeffs if sweep_coeff or not coeffs <= held else set()
    steered.require_inputs(betas | coeffs)
    fed = [v for v in proto.graph.input if v.name not in held | betas | coeffs]
    if not fed:
        raise UsageError("the model takes no input: there is nothing to sweep over")
    measurable = _measurable(proto.graph.output)
    dims = measurable[0].type.tensor_type.shape.dim
    return Steerable(
        proto.SerializeToString(deterministic=True),
        folder,
        [_input(value) for value in fed],
        [value.name for value in proto.graph.output],
        [value.name for value in measurable],
        (dims[1].dim_value or None) if len(dims) == 2 else None,
        sorted(betas),
        sorted(coeffs),
        sorted(map(str, external.values())),
        notes,
    )


def _input(value):
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or kind.elem_type == TensorProto.STRING:
        raise UsageError(f"input {value.name!r} is no array of numbers: it cannot be swept")
    shape = None
    if kind.HasField("shape"):
        shape = tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim)
        if not shape:
            raise UsageError(f"input {value.name!r} is a single value: it has no row per sample")
    return Input(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape)


def _measurable(outputs):
    found = [v for v in outputs if v.type.tensor_type.elem_type in _FLOATS]
    if not found:
        raise UsageError("the model has no floating-point output to measure")
    return found


class Runner:
    """A session whose inputs and outputs stay bound to its device.

    On CUDA a batch is copied there once for all points, and only outputs come back; tests run on
    the CPU alone. One session runs all points. On the CPU `library.session` may open others first
    to compare layouts, and keeps one: their number does not grow with the points.
    """

    def __init__(self, steerable, providers=None, threads=0, shared=None):
        """`shared` is a Steerable that makes, once for all points, inputs that the session takes
        beside those of the data."""
        self._model = steerable
        self._shared = shared and Runner(shared, providers, threads)
        self._session = steerable.open(providers, threads)
        self._taken = {i.name for i in self._session.get_inputs()}
        self._device = "cpu", 0
        # A plug-in need not tell its options.
        for name, held in self._session.get_provider_options().items():
            if name in library.CUDA_PROVIDERS:
                self._device = "cuda", int(held.get("device_id", 0))

    def measure(self, batch, points, metric):
        """The statistics of a metric: array (points, samples, k).

        Args:
            batch: batches.Batch.
            points: list of (beta, coeff); the original comes first.
            metric: metrics.Metric. What one compares with the original is the first point.
        """
        if not len(batch):
            return None
        names = self._model.outputs if metric.takes_all_outputs else [self._model.output]
        original, rows = None, []
        for outputs in self.outputs(batch, points, names):
            scores = outputs if metric.takes_all_outputs else outputs[names[0]]
            original = scores if original is None else original
            rows.append(metric.measure(scores, batch.labels, original))
        return np.stack(rows)

    def outputs(self, batch, points, names):
        """Yield output name -> array of the outputs `names` at each point: see `measure`."""
        ort = library.import_onnxruntime()
        given = filled(batch, self._model.inputs)
        rows = len(next(iter(given.values())))
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(array, *self._device)
            for name, array in given.items()
        }
        if self._shared:
            values |= self._shared._values(values)
        binding = self._bound(values, names)
        for beta, coeff in points:
            fed = dict.fromkeys(self._model.betas, beta)
            fed |= dict.fromkeys(self._model.coeffs, ctu.COEFF if coeff is None else coeff)
            # What is bound must live until the run is done.
            scalars = {name: np.array(value, np.float32) for name, value in fed.items()}
            for name in self._taken.intersection(scalars):
                binding.bind_cpu_input(name, scalars[name])
            outputs = self._run(binding, names, rows)
            yield {name: value[: len(batch)] for name, value in outputs.items()}

    def _bound(self, values, names):
        binding = self._session.io_binding()
        for name in self._taken.intersection(values):
            binding.bind_ortvalue_input(name, values[name])
        for name in names:
            binding.bind_output(name, *self._device)
        return binding

    def _values(self, values):
        """All outputs, name -> OrtValue, of a model that takes no β."""
        binding = self._bound(values, self._model.outputs)
        self._execute(binding)
        return dict(zip(self._model.outputs, binding.get_outputs(), strict=True))

    def _execute(self, binding):
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime has an exception type for each of its codes.
            line = first_line(error)
            raise UsageError(f"the model does not run on the data: {line}") from error

    def _run(self, binding, names, rows):
        self._execute(binding)
        outputs = dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))
        for name, value in outputs.items():
            if not value.ndim or len(value) != rows:
                raise UsageError(
                    f"output {name!r} is {list(value.shape)} for {rows} samples: it needs a row "
                    "per sample"
                )
        return outputs


def filled(batch, inputs):
    """The arrays of a Batch by name; where an input's size is fixed, with its last row repeated."""
    arrays = {}
    for i in inputs:
        array = batch.inputs[i.name]
        short = (i.shape[0] or 0) - len(array) if i.shape else 0
        arrays[i.name] = (
            np.concatenate([array, np.repeat(array[-1:], short, 0)]) if short > 0 else array
        )
    return arrays


def ahead(source, work):
    """Yield (item, batch) of each item of `work`, (batch index, ...), until the source ends; the
    next batch is prepared while one is used."""
    work = iter(work)
    with ThreadPoolExecutor(1) as pool:

        def start():
            item = next(work, None)
            return item and (item, pool.submit(source.batch, item[0]))

        started = start()
        while started:
            item, future = started
            batch = future.result()
            if batch is None:
                return
            started = start()
            yield item, batch


def run_local(runner, source, metric, points, work):
    """Do the work in this process; the next batch is prepared while one runs.

    Args:
        points: list of (beta, coeff), the original first.
        work: iterable of (batch index, list of point indices).

    Yields:
        (batch index, point indices, statistics as Runner.measure gives them, count of unreadable
        samples). It ends where the source does.
    """
    for (index, chosen), batch in ahead(source, work):
        yield index, chosen, measure(runner, batch, metric, points, chosen), batch.broken


def measure(runner, batch, metric, points, chosen):
    """As Runner.measure, for the indices `chosen`, with the original where the metric needs it."""
    extra = metric.needs_original and ORIGINAL not in chosen
    wanted = [ORIGINAL, *chosen] if extra else chosen
    rows = runner.measure(batch, [points[i] for i in wanted], metric)
    return rows[1:] if extra and rows is not None else rows
