"""Running one model at many points (β, c) over batches: one session, whose β and c are inputs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from .. import ctu
from ..data.batches import Batch, Input, array_bytes, digest, padded
from ..data.source import Source, stamp
from ..errors import ModelError, UsageError
from ..model import files
from ..model.endings import Ending, ending_of
from ..model.external import check_external_data
from ..ort import library
from ..ort.runs import beside
from ..ort.session import session
from ..rewriting.places import Group, Place, insert_places, take_original
from ..rewriting.steer import Report, Selection, steer
from ..rewriting.steered import SteeredModel
from .metrics import Metric

# The index of the original network, β = 1, in every list of points.
ORIGINAL_POINT = 0

# β and c; the model's own c where that is None.
BetaCoeff = tuple[float, float | None]

# Where a model is measured: β and c of all activations, or of each of their groups.
Where = BetaCoeff | tuple[BetaCoeff, ...]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


@dataclass
class Steerable:
    """A steered model whose β, and c if that is swept, are graph inputs that must be fed.

    Attributes:
        data: the serialized ModelProto.
        folder: the folder of its external data; None if it has none.
        inputs: the inputs that data feed: all but those of β and c.
        outputs: the names of all outputs.
        measurable: the names of the outputs of floating type.
        widths: how many numbers each of these has per sample; None if that is unknown.
        dtypes: the NumPy dtype of each of these.
        endings: how each of these ends.
        betas: the names of the inputs that take β.
        coeffs: the names of the inputs that take c.
        external: the paths of the files with external data.
        notes: lines that a user should see.
        chosen: the name of the output that is measured; the first measurable one if None.
        corrections: point -> input name -> array of the corrections of calibration, which are
            inputs too; empty without calibration.
        places: the activations, if each has inputs of its own.
        groups: the groups of these that share β and c, if points give each its own.
    """

    data: bytes
    folder: str | None
    inputs: list[Input]
    outputs: list[str]
    measurable: list[str]
    widths: dict[str, int | None]
    dtypes: dict[str, np.dtype]
    endings: dict[str, Ending]
    betas: list[str]
    coeffs: list[str]
    external: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    chosen: str | None = None
    corrections: dict[Where, dict[str, np.ndarray]] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    @property
    def parameters(self) -> list[str]:
        """The names of the inputs that data do not feed."""
        corrections = next(iter(self.corrections.values()), {})
        return [*self.betas, *self.coeffs, *corrections]

    @property
    def output(self) -> str:
        """The name of the output that is measured."""
        return self.chosen or self.measurable[0]

    def named_output(self, name: str | None) -> str | None:
        """`name`, the user's choice of an output to measure, or None.

        Raises:
            UsageError: it is no output of floating type.
        """
        if name is not None and name not in self.measurable:
            raise UsageError(
                f"the model has no floating-point output {name!r}: choose among "
                f"{', '.join(self.measurable)}"
            )
        return name

    def open(self, providers: Sequence | None = None, threads: int = 0) -> Any:
        """Open an onnxruntime.InferenceSession.

        Args:
            providers: execution providers, as for `ctonnx.session`.
            threads: threads of a node; ONNX Runtime's choice if 0.

        Raises:
            ModelError: ONNX Runtime does not load the model.
            MissingDependency: as `ctonnx.session`.
        """
        ort = library.import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        loading = library.errors_as(ModelError, "ONNX Runtime cannot load the model")
        with self._beside_external_data() as model, loading:
            return session(model, providers, options)

    def identity(self) -> list:
        """What tells the model from others, for JSON."""
        fed = [
            array_bytes(array) for feeds in self.corrections.values() for array in feeds.values()
        ]
        calibrated = [digest(b"".join(fed))] if fed else []
        return [digest(self.data), *map(stamp, self.external), *calibrated]

    def _beside_external_data(self) -> AbstractContextManager[bytes | Path]:
        """What a session opens: the model's bytes, or a temporary file beside its external data."""
        if self.folder is None:
            return nullcontext(self.data)
        return beside(self.data, self.folder)


def prepare(
    model: str | Path | ModelProto, sweep_coeff: bool = False, each: bool = False
) -> Steerable:
    """Make a Steerable of a model, which is steered first if it is not yet.

    Args:
        model: a path or a ModelProto. It is not changed.
        sweep_coeff: make c an input too.
        each: give each activation inputs of its own. A steered model keeps its choice of
            activations, and its c where that is not an input.

    Raises:
        NothingToDo: there is no activation to steer.
        ModelError: the model cannot be read.
        UsageError: it is neither of these, or its inputs or outputs are not arrays with a row per
            sample; or it is calibrated already.
    """
    proto = files.own(model)
    folder, external = None, {}
    if isinstance(model, str | Path):
        external = check_external_data(proto, Path(model).parent)
        if external:
            folder = str(Path(model).parent.absolute())
    notes, places = [], []
    steered = SteeredModel(proto)
    steered.check_uncalibrated("take its original instead")
    if each:
        places = _insert_places(proto, notes)
        betas, coeffs = {place.beta for place in places}, {place.coeff for place in places}
    else:
        if not steered.is_steered:
            report = steer(proto, 1.0, beta_as="required-input")
            notes.append(_steered_on_the_fly(report))
            steered = SteeredModel(proto, betas=report.beta_names)
        betas, coeffs = steered.changeable(sweep_coeff)
        if sweep_coeff and not coeffs:
            raise UsageError("c cannot be swept: the model is lowered to primitives")
        if len(betas) > 1:
            notes.append(f"all activations share one beta, in place of {len(betas)}")
    initializers = {tensor.name for tensor in proto.graph.initializer}
    if not sweep_coeff and coeffs <= initializers:
        coeffs = set()
    steered.require_inputs(betas | coeffs)
    fed = [v for v in proto.graph.input if v.name not in initializers | betas | coeffs]
    if not fed:
        raise UsageError("the model takes no input: there is nothing to sweep over")
    measurable = _measurable(proto.graph.output)
    return Steerable(
        data=proto.SerializeToString(deterministic=True),
        folder=folder,
        inputs=[_input(value) for value in fed],
        outputs=[value.name for value in proto.graph.output],
        measurable=[value.name for value in measurable],
        widths={value.name: _width(value) for value in measurable},
        dtypes={
            value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            for value in measurable
        },
        endings={value.name: ending_of(proto, value.name) for value in measurable},
        betas=sorted(betas),
        coeffs=sorted(coeffs),
        external=sorted(map(str, external.values())),
        notes=notes,
        places=places,
    )


def _insert_places(proto: ModelProto, notes: list[str]) -> list[Place]:
    """Steer a model, in place, each activation by an initializer of its own for β and for c.

    An activation that was steered keeps its c, where the model tells it.
    """
    own = take_original(proto)
    places, report = insert_places(proto, Selection(), own)
    if own is None:
        notes.append(_steered_on_the_fly(report))
    known = {path: a.coeff for path, a in (own or {}).items() if a.coeff is not None}
    coeffs = {p.coeff: known.get(p.activation.path, ctu.COEFF) for p in places}
    for tensor in proto.graph.initializer:
        if tensor.name in coeffs:
            array = np.asarray(coeffs[tensor.name], np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return [replace(p, activation=replace(p.activation, coeff=coeffs[p.coeff])) for p in places]


def _steered_on_the_fly(report: Report) -> str:
    count = f"{len(report.replaced)} activations, {len(report.skipped)} skipped"
    return f"steered on the fly: {count}"


def parameters_at(steerable: Steerable, point: Where) -> dict[str, np.ndarray]:
    """What to feed for β and c at a point: name -> float32 array without dimensions."""
    if isinstance(point[0], tuple):
        values = {}
        for group, pair in zip(steerable.groups, cast(Sequence[BetaCoeff], point), strict=True):
            for place in (steerable.places[i] for i in group.members):
                values |= {place.beta: pair[0], place.coeff: pair[1]}
        values = {name: values[name] for name in [*steerable.betas, *steerable.coeffs]}
    else:
        beta, coeff = point
        values = dict.fromkeys(steerable.betas, beta) | dict.fromkeys(steerable.coeffs, coeff)
    return {
        name: np.array(ctu.COEFF if value is None else value, np.float32)
        for name, value in values.items()
    }


def _input(value: ValueInfoProto) -> Input:
    given = Input.of(value)
    if given.shape == ():
        raise UsageError(f"input {value.name!r} is a single value: it has no row per sample")
    return given


def _measurable(outputs: Iterable[ValueInfoProto]) -> list[ValueInfoProto]:
    measurable = [v for v in outputs if v.type.tensor_type.elem_type in _FLOATS]
    if not measurable:
        raise UsageError("the model has no floating-point output to measure")
    return measurable


def _width(output: ValueInfoProto) -> int | None:
    dims = output.type.tensor_type.shape.dim
    return (dims[1].dim_value or None) if len(dims) == 2 else None


class Runner:
    """A session whose inputs and outputs stay bound to its device.

    On CUDA a batch is copied there once for all points, and only outputs come back.

    One session runs all points. On the CPU `ctonnx.session` may first open others to compare
    layouts, but their number does not grow with the points.

    Args:
        steerable: the model.
        providers: execution providers, as for `ctonnx.session`.
        threads: as for Steerable.open.
        shared: a model without β and c, run once per batch, whose outputs are inputs of
            `steerable` besides those of the data.

    Raises:
        ModelError: ONNX Runtime does not load the model.
    """

    def __init__(
        self,
        steerable: Steerable,
        providers: Sequence | None = None,
        threads: int = 0,
        shared: Steerable | None = None,
    ) -> None:
        self._model = steerable
        self._shared = None if shared is None else Runner(shared, providers, threads)
        self._session = steerable.open(providers, threads)
        self._input_names = {i.name for i in self._session.get_inputs()}
        self._device = "cpu", 0
        # A plug-in provider may not tell its options.
        for name, options in self._session.get_provider_options().items():
            if name in library.CUDA_PROVIDERS:
                self._device = "cuda", int(options.get("device_id", 0))

    def measure(
        self, batch: Batch, metric: Metric, points: Sequence[Where], chosen: list[int]
    ) -> np.ndarray | None:
        """Measure a metric on a batch at some points.

        Args:
            batch: the samples.
            metric: what to measure.
            points: all points; the first is the original network.
            chosen: the indices of the points to measure, in ascending order.

        Returns:
            the metric's statistics, float64 (chosen points, samples, k); None without samples.

        Raises:
            UsageError: the model does not run on the batch, or the metric does not fit it.
        """
        if not len(batch):
            return None
        extra = metric.needs_original and ORIGINAL_POINT not in chosen
        wanted = [ORIGINAL_POINT, *chosen] if extra else chosen
        names = self._model.outputs if metric.takes_all_outputs else [self._model.output]
        original, rows = None, []
        batches = [batch, *([] if metric.nearby is None else metric.nearby(batch))]
        runs = [self.outputs(each, [points[i] for i in wanted], names) for each in batches]
        for outputs, *nearby in zip(*runs, strict=True):
            scores = outputs if metric.takes_all_outputs else outputs[names[0]]
            original = scores if original is None else original
            others = [each[names[0]] for each in nearby] if nearby else original
            rows.append(metric.measure(scores, batch.labels, others))
        return np.stack(rows[1:] if extra else rows)

    def outputs(
        self, batch: Batch, points: Iterable[Where], names: Sequence[str]
    ) -> Iterator[dict[str, np.ndarray]]:
        """Run a batch at each point.

        Args:
            batch: the samples, at least one.
            points: where to run.
            names: the outputs to compute.

        Yields:
            output name -> array with a row per sample, for each point.

        Raises:
            UsageError: the model does not run on the batch, or an output has no row per sample.
        """
        ort = library.import_onnxruntime()
        arrays = padded(batch, self._model.inputs)
        rows = len(next(iter(arrays.values())))
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(array, *self._device)
            for name, array in arrays.items()
        }
        if self._shared is not None:
            values |= self._shared._computed(values)
        binding = self._bound(values, names)
        for point in points:
            # ONNX Runtime does not copy bound inputs: keep them alive until the run is done.
            fed = parameters_at(self._model, point)
            if self._model.corrections:
                fed |= self._model.corrections[point]
            for name in self._input_names.intersection(fed):
                binding.bind_cpu_input(name, fed[name])
            outputs = self._run(binding, names, rows)
            yield {name: value[: len(batch)] for name, value in outputs.items()}

    def _bound(self, values: dict[str, Any], names: Iterable[str]) -> Any:
        """A binding of these OrtValues to inputs, and of these outputs to the device."""
        binding = self._session.io_binding()
        for name in self._input_names.intersection(values):
            binding.bind_ortvalue_input(name, values[name])
        for name in names:
            binding.bind_output(name, *self._device)
        return binding

    def _computed(self, values: dict[str, Any]) -> dict[str, Any]:
        """All outputs, as OrtValues, of a model without β and c."""
        binding = self._bound(values, self._model.outputs)
        self._execute(binding)
        return dict(zip(self._model.outputs, binding.get_outputs(), strict=True))

    def _execute(self, binding: Any) -> None:
        with library.errors_as(UsageError, "the model does not run on the data"):
            self._session.run_with_iobinding(binding)

    def _run(self, binding: Any, names: Sequence[str], rows: int) -> dict[str, np.ndarray]:
        self._execute(binding)
        outputs = dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))
        for name, value in outputs.items():
            if not value.ndim or len(value) != rows:
                raise UsageError(
                    f"output {name!r} is {list(value.shape)} for {rows} samples: it needs a row "
                    "per sample"
                )
        return outputs


def prefetch(source: Source, work: Iterable[tuple]) -> Iterator[tuple[tuple, Batch]]:
    """Read the batches of some work; the next is read while one is used.

    Args:
        source: where to read.
        work: tuples whose first item is the index of a batch.

    Yields:
        each tuple and its batch, until the source ends.
    """
    items = iter(work)
    with ThreadPoolExecutor(1) as pool:

        def start():
            item = next(items, None)
            return item and (item, pool.submit(source.batch, item[0]))

        started = start()
        while started:
            item, future = started
            batch = future.result()
            if batch is None:
                return
            started = start()
            yield item, batch


@dataclass(frozen=True)
class Job:
    """What a sweep measures: all that a process needs to take part.

    Attributes:
        steerable: the model.
        open_source: opens the data.
        metric: what to measure.
        points: where to measure; the first is the original network.
        providers: execution providers, as for `ctonnx.session`.
    """

    steerable: Steerable
    open_source: Callable[[], Source]
    metric: Metric
    points: list[Where]
    providers: Sequence | None = None


# Pieces of a Job: the index of a batch, and those of the points to measure on it. Without points
# the batch is only read, to compare it with what was measured before.
Work = Iterable[tuple[int, list[int]]]


class Measured(NamedTuple):
    """A piece of work that is done.

    Attributes:
        batch: the index of the batch.
        points: the indices of the points; none where the batch was only read.
        statistics: the metric's, as Runner.measure returns them; None without samples or points.
        broken: how many samples of the batch are unreadable.
        digest: what tells the batch from others; None if its source is repeatable.
    """

    batch: int
    points: list[int]
    statistics: np.ndarray | None
    broken: int
    digest: str | None


def measure_batch(
    job: Job, runner: Runner, source: Source, batch: Batch, index: int, points: list[int]
) -> Measured:
    """Measure a batch of a job.

    Args:
        job: what to measure.
        runner: the job's model, opened.
        source: where the batch is from.
        batch: the batch.
        index: its index.
        points: the indices of the points.
    """
    statistics = runner.measure(batch, job.metric, job.points, points) if points else None
    mark = None if source.repeatable else batch.digest()
    return Measured(index, points, statistics, batch.broken, mark)


def run_local(job: Job, runner: Runner, source: Source, work: Work) -> Iterator[Measured]:
    """Do the work in this process, in its order, until the source ends.

    Args:
        job: what to measure.
        runner: the job's model, opened.
        source: its data, opened.
        work: what to do.

    Yields:
        each piece of work that is done.
    """
    for (index, chosen), batch in prefetch(source, work):
        yield measure_batch(job, runner, source, batch, index, chosen)
