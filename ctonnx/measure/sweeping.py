"""Sweeping β, and c, over a data set: `ctonnx.sweep`."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
from onnx import ModelProto

from .. import ctu
from ..calibration.calibrate import check_calibration, steer_or_set_calibrated
from ..data.images import Transform
from ..data.open import DataOptions, open_source
from ..data.source import Source, Stream
from ..errors import UsageError, check_choice
from ..model import files
from ..ort.runs import CPU
from . import coordinates, intervals, racing
from .calibrating import calibrated
from .engine import (
    BetaCoeff,
    Job,
    Measured,
    Runner,
    Steerable,
    Work,
    prepare,
    run_local,
)
from .journal import Journal
from .metrics import metric_named
from .outputs import choose_output, notes_on_output, notes_on_zeros
from .results import Sweep, check_format, result_of

SEARCHES = ("grid", "racing")
ENGINES = ("local", "ray")

_MOST_POINTS = 10_000

# Does some work and yields each piece that is done.
Execute = Callable[[Work], Iterator[Measured]]


@dataclass(frozen=True)
class Execution:
    """Where a sweep runs: the arguments of `sweep` with these names."""

    engine: str = "local"
    address: str | None = None
    gpus: float = 0

    def check(self) -> None:
        """Raise a UsageError if the options do not go together."""
        check_choice("engine", self.engine, ENGINES)
        if self.engine == "local" and (self.address is not None or self.gpus):
            raise UsageError("address and gpus apply only to engine ray: leave them out")
        if self.gpus < 0:
            raise UsageError(f"gpus must not be negative, got {self.gpus:g}")


@dataclass(frozen=True)
class Search:
    """How the best point is looked for: `search`, `confidence`, `tolerance`, `per`, as for
    `sweep`."""

    method: str = "grid"
    confidence: float = 0.95
    tolerance: float | None = None
    per: str | None = None

    def check(self) -> None:
        """Raise a UsageError if an option is out of range."""
        check_choice("search", self.method, SEARCHES)
        if not 0.5 <= self.confidence < 1:
            raise UsageError(f"confidence must lie in [0.5, 1), got {self.confidence!r}")
        if self.tolerance is not None:
            if not 0 <= self.tolerance < float("inf"):
                raise UsageError(f"tolerance must be 0 or more, got {self.tolerance!r}")
            if self.method != "grid":
                raise UsageError("tolerance needs all points on all data: leave out search")
            if self.per is not None:
                raise UsageError("tolerance takes one beta for all: leave out per")
        if self.per is not None:
            check_choice("per", self.per, coordinates.PER)


@dataclass(frozen=True)
class Output:
    """Where a sweep is written: `output` and its options, as for `sweep`."""

    path: str | PathLike | None = None
    force: bool = False
    resume: bool = False

    def check(self) -> None:
        """Raise a CtonnxError if the result could not be written."""
        if self.path is not None:
            check_format(self.path)
            files.check_output(self.path, self.force)
        elif self.resume:
            raise UsageError("resume needs an output: progress is saved beside it")


def sweep(
    model: str | Path | ModelProto,
    dataset: Any,
    betas: str | float | Iterable[float] = "0.7:1.0:0.01",
    metric: str | Callable = "accuracy",
    *,
    coeffs: str | float | Iterable[float] | None = None,
    labels: str | PathLike | None = None,
    batch_size: int | None = None,
    images: Transform | None = None,
    skip_broken: bool = False,
    search: str = "grid",
    confidence: float = 0.95,
    tolerance: float | None = None,
    output_name: str | None = None,
    calibration: Any = None,
    per: str | None = None,
    providers: Sequence | None = None,
    engine: str = "local",
    address: str | None = None,
    gpus: float = 0,
    output: str | PathLike | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Callable[[int | None], AbstractContextManager] | None = None,
) -> Sweep:
    """Measure a model at every β on a data set, and find the best.

    Args:
        model: a path or an onnx.ModelProto, steered or not. It is not changed.
        dataset: a path (.npz with inputs by name and labels, .npy, .csv, a folder of images with
            one sub-folder per class), "PKG:FACTORY", a function that gives an iterable of (inputs,
            labels), one such pair, or inputs alone.
        betas, coeffs: numbers in [0, 1], or as text "0.7:1.0:0.01" or "0.8,0.9". The original, at
            β = 1, is always a point. Without `coeffs` c is the model's own, or 0.5.
        metric: "accuracy", "f1", "nll", "ece", "miou", "mse", "mae", "r2", "agreement", "entropy",
            "kl", "top5" or another number, "curvature" or with a radius "curvature:0.5",
            "PKG:FUNCTION" or a function: see
            ctonnx.measure.metrics.
        labels: the name of the labels' array or column, or the path of an .npy file.
        batch_size: samples per run; if None, the model's own where that is fixed, else 32.
        images: how images are prepared: a ctonnx.data.images.Transform.
        skip_broken: leave out images that cannot be read, and count them.
        search: "grid" measures every point on all data. "racing" drops points that are
            significantly worse on growing random subsets: see ctonnx.measure.racing.
        confidence: that of racing; approximate for most metrics: see ctonnx.measure.racing.
        tolerance: how much worse than the original the best may be: it is the smallest β that is
            not worse by more. The point with the best value if None.
        output_name: the name of the output to measure, for a named metric; if None, the first of
            floating type that suits the metric and the labels.
        calibration: unlabelled data, or a ctonnx.Calibration of them: at every β the model is
            calibrated on these, as `ctonnx.patch` does.
        per: "stage" (activations of one resolution) or "activation" looks for a β, and c, of each
            of these too, from the best that all share: see ctonnx.measure.coordinates.
        providers: execution providers, as for `ctonnx.session`.
        engine: "local", or "ray" for an existing Ray cluster.
        address: address of the Ray cluster; the running one if None.
        gpus: GPUs per task on the Ray cluster.
        output: a .csv, .json or .parquet file to write the points to. Progress is saved in
            OUTPUT.progress until it is written.
        force: overwrite `output`.
        resume: continue from OUTPUT.progress, which must be of the same model, data and options;
            functions are known by their names alone.
        progress: called with the number of runs to do, None if unknown; returns a context manager
            for an object whose `update` is called with the number of runs done since.

    Returns:
        Sweep.

    Raises:
        UsageError: a wrong argument; data, metric and model do not fit together.
        NothingToDo: no activation to steer.
        ModelError: the model cannot be read.
        InputFileError: the data, or the progress file, cannot be read.
        MissingDependency: a package is missing.
    """
    searching = Search(search, confidence, tolerance, per)
    execution = Execution(engine, address, gpus)
    target = Output(output, force, resume)
    for options in searching, execution, target:
        options.check()
    points = _points(grid("beta", betas), [None] if coeffs is None else grid("coeff", coeffs))
    chosen_metric = metric_named(metric)
    samples = None if calibration is None else check_calibration(calibration)
    if per is not None and (engine != "local" or samples is not None):
        other = "calibration" if engine == "local" else f"engine {engine}"
        raise UsageError(f"{other} measures points that are known before: leave out per")
    steerable = prepare(model, coeffs is not None, per is not None)
    if engine == "ray":  # Its workers may be in another folder.
        dataset, labels = _absolute(dataset), _absolute(labels)
    open_data = partial(
        open_source,
        dataset,
        steerable.inputs,
        DataOptions(labels, batch_size, images, skip_broken),
        seed=0 if search == "racing" else None,
    )
    source = open_data()
    count = _length(source)
    if count is None and (search, engine, per) != ("grid", "local", None):
        what = "racing" if search == "racing" else "engine ray" if engine == "ray" else "per"
        raise UsageError(f"the factory's iterable must have a length for {what}")
    intervals.quantile(intervals.LEVEL, 1)  # Fail early if scipy is missing.

    # On Ray this process chooses the output alone, without the cluster's devices.
    runner = partial(Runner, steerable, [CPU] if engine == "ray" else providers)
    if engine == "local":
        runner = cache(runner)
    steerable.chosen = choose_output(steerable, chosen_metric, source, runner, output_name)
    ending = steerable.endings[steerable.output]
    chosen_metric = replace(chosen_metric, kind=ending.kind)
    if samples is not None:
        steerable = calibrated(steerable, samples, points, providers, progress)
        runner = cache(partial(Runner, steerable, providers))
    notes = [*steerable.notes, *source.notes, *_class_notes(dataset, source, steerable)]
    notes += notes_on_output(steerable, chosen_metric)
    if per is not None:
        steerable.groups = coordinates.groups_of(steerable, per, source)
    job = Job(steerable, open_data, chosen_metric, [*points], providers)
    header = None if output is None else _header(job, source, searching)
    execute = _executor(job, source, execution, runner)
    with Journal(progress_path(output), header, resume) as journal:
        total = None if per else _count_runs(searching, count, len(points))
        with progress(total) if progress else nullcontext() as bar:
            outcome = None
            evaluate = partial(_evaluate, journal, source, execute, bar)
            if count is not None and search == "racing":
                outcome = _race(job, source, count, searching.confidence, journal, evaluate)
            else:
                evaluate(itertools.count() if count is None else range(count), range(len(points)))
            for piece in execute((batch, []) for batch in journal.unconfirmed()):
                journal.add(piece)
            journal.check_confirmed()
            statistics = map(journal.statistics, range(len(points)))
            notes += notes_on_zeros(steerable, chosen_metric, statistics)
            result = replace(
                result_of(chosen_metric, points, journal, outcome, notes, tolerance),
                output_name=None if chosen_metric.takes_all_outputs else steerable.output,
                output_kind=chosen_metric.kind if chosen_metric.takes_kind else None,
            )
            if per is not None:
                assert count is not None
                best = points.index((result.best.beta, result.best.coeff))
                race = confidence if search == "racing" else None
                grouped = coordinates.search(
                    job, per, best, count, evaluate, journal.statistics, race
                )
                result = replace(result, grouped=grouped)
        if output is not None:
            result.write(output)
    return result


def _points(betas: list[float], coeffs: Sequence[float | None]) -> list[BetaCoeff]:
    """All points, the original first: at β = 1 every c gives the original network."""
    middle = 0.5 if 0.5 in coeffs else coeffs[0]
    return [(1.0, middle), *((b, c) for c in coeffs for b in betas if b != 1.0)]


def _absolute(path: Any) -> Any:
    """The absolute path of an existing file or folder; anything else as it is."""
    exists = isinstance(path, str | os.PathLike) and os.path.exists(path)
    return os.path.abspath(path) if exists else path


def _class_notes(dataset: Any, source: Source, steerable: Steerable) -> list[str]:
    """A note if the folders of images are fewer than the model's classes."""
    folders, scores = len(source.classes), steerable.widths[steerable.output] or 0
    if not 1 < folders < scores:
        return []
    return [
        f"{dataset} has {folders} class folders, but the model scores {scores} classes: the "
        f"folders are labelled 0 to {folders - 1}, in order; for a missing class, add an empty "
        "folder of its name"
    ]


def _length(source: Source) -> int | None:
    """The number of batches; None if it is unknown."""
    try:
        return len(source)
    except TypeError:  # A generator has no length; PyTorch's DataLoader raises it too.
        return None


def _header(job: Job, source: Source, searching: Search) -> dict:
    """What a progress file must agree in to be resumed."""
    return {
        "model": job.steerable.identity(),
        "data": source.identity(),
        **_header_of_points(job, searching),
        "metric": job.metric.name,
        "output": job.steerable.output,
        "providers": job.providers,
        "search": searching.method,
        "confidence": searching.confidence,
    }


def _header_of_points(job: Job, searching: Search) -> dict:
    if searching.per is None:
        return {"points": job.points}
    # There will be more than these.
    return {"choices": job.points, "per": searching.per}


def _executor(
    job: Job, source: Source, execution: Execution, runner: Callable[[], Runner]
) -> Execute:
    """Open the model, here or on the cluster, to do work on it."""
    if execution.engine == "ray":
        from .cluster import Cluster

        return Cluster(job, execution.address, execution.gpus).run
    return partial(run_local, job, runner(), source)


def _count_runs(searching: Search, batches: int | None, points: int) -> int | None:
    """The number of runs, at most; None if it is unknown."""
    share = racing.BUDGET if searching.method == "racing" else 1
    return None if batches is None else int(share * batches * points)


def _evaluate(
    journal: Journal,
    source: Source,
    execute: Execute,
    bar: Any,
    batches: Iterable[int],
    points: Sequence[int],
) -> None:
    """Measure these batches at these points, as far as the journal lacks them.

    Batches that were measured before the sweep was interrupted are read again where their order
    may differ now.
    """

    def missing() -> Iterator[tuple[int, list[int]]]:
        unconfirmed = journal.unconfirmed()
        for batch in batches:
            lacking = journal.missing(batch, points)
            if bar:
                bar.update(len(points) - len(lacking))
            if lacking:
                yield batch, lacking
            elif source.sequential and batch in unconfirmed:
                yield batch, []
            if lacking and not source.sequential:
                # A new one comes first: what stopped the sweep may stop it again.
                yield from ((old, []) for old in unconfirmed)
                unconfirmed = []

    for piece in execute(missing()):
        journal.add(piece)
        if bar:
            bar.update(len(piece.points))


def _race(
    job: Job,
    source: Source,
    batches: int,
    confidence: float,
    journal: Journal,
    evaluate: Callable[[range, list[int]], None],
) -> racing.Outcome:
    outcome = racing.race(
        evaluate,
        journal.statistics,
        job.metric,
        len(job.points),
        batches,
        distances=[abs(1 - beta) for beta, _ in cast(list[BetaCoeff], job.points)],
        confidence=confidence,
    )
    if not source.random:
        return replace(outcome, within=float("nan"), confidence=None)
    if isinstance(source, Stream) and outcome.passes < outcome.grid_passes:
        # The samples of a batch may be alike, and then count as fewer.
        return replace(outcome, approximate=True)
    return outcome


def save_best(
    model: str | Path,
    result: Sweep,
    path: str | PathLike,
    beta_as: str = "initializer",
    force: bool = False,
    calibration: Any = None,
) -> str | Path:
    """Write the model with the best β, and c, baked in, or with β as the default of an input.

    Args:
        model: the path that was swept.
        result: its Sweep.
        path: where to write.
        beta_as: "initializer" or "input".
        force: overwrite `path`.
        calibration: that of the sweep.

    Returns:
        the path written.

    Raises:
        UsageError: as for `files.Transaction`.
    """
    beta, coeff = result.best.beta, result.best.coeff
    samples = None if calibration is None else check_calibration(calibration, beta_as)
    with files.Transaction(model, path, force) as edit:
        if result.grouped is not None:
            if beta_as != "initializer":
                raise UsageError("beta can be an input only if all activations share it")
            coordinates.write(edit.model, result.grouped)
        else:
            origin = files.Origin() if samples is None else edit.origin()
            steer_or_set_calibrated(edit.model, samples, origin, beta, coeff, beta_as)
    return edit.output


def progress_path(output: str | PathLike | None) -> Path | None:
    """The file that a sweep saves its progress in until `output` is written."""
    return None if output is None else Path(f"{output}.progress")


def grid(name: str, spec: str | float | Iterable[float]) -> list[float]:
    """The numbers of a grid, ascending.

    Args:
        name: what they are, for messages.
        spec: numbers in [0, 1], or as text "0.7:1.0:0.01" or "0.5,0.7:0.9:0.1".

    Raises:
        UsageError: it is not of that form, empty, or too long.
    """
    if isinstance(spec, str):
        parts = [part.split(":") for part in spec.split(",")]
    else:
        parts = [[value] for value in np.atleast_1d(np.asarray(spec, object))]
    values = set()
    for part in parts:
        try:
            numbers = [float(item) for item in part]
            if len(numbers) not in (1, 3):
                raise ValueError
        except (TypeError, ValueError):
            shown = ":".join(map(str, part))
            raise UsageError(f"{name}: {shown!r} is neither a number nor FIRST:LAST:STEP") from None
        if len(numbers) == 3:
            first, last, step = numbers
            if not step > 0 or not first <= last:
                raise UsageError(f"{name}: FIRST:LAST:STEP must ascend, got {':'.join(part)}")
            count = (last - first) / step + 1e-9
            if count > _MOST_POINTS:
                raise UsageError(f"{name}: more than {_MOST_POINTS} values: take a larger step")
            numbers = [round(first + i * step, 12) for i in range(int(count) + 1)]
        values.update(ctu.check_unit_interval(name, number) for number in numbers)
    if not values:
        raise UsageError(f"{name}: holds no values")
    return sorted(values)
