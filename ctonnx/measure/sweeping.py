"""Sweeping β, and c, over a data set: `ctonnx.sweep` and what it returns."""

import itertools
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from .. import ctu
from ..data.open import DataOptions, open_source
from ..data.source import Stream
from ..errors import UsageError
from ..model import files
from ..rewriting.steer import steer_or_set
from . import engine as runner
from . import intervals, journal, metrics, racing
from .results import check_format, result_of

SEARCHES = ("grid", "racing")
ENGINES = ("local", "ray")

_MOST_POINTS = 10_000


def sweep(
    model,
    dataset,
    betas="0.7:1.0:0.01",
    metric="accuracy",
    *,
    coeffs=None,
    labels=None,
    batch_size=None,
    images=None,
    skip_broken=False,
    search="grid",
    confidence=0.95,
    providers=None,
    engine="local",
    address=None,
    gpus=0,
    output=None,
    force=False,
    resume=False,
    progress=None,
):
    """Measure a model at every β on a data set, and find the best.

    Args:
        model: a path or an onnx.ModelProto, steered or not. It is not changed.
        dataset: a path (.npz with inputs by name and labels, .npy, .csv, a folder of images with
            one sub-folder per class), "PKG:FACTORY", a function that gives an iterable of (inputs,
            labels), one such pair, or inputs alone.
        betas, coeffs: numbers in [0, 1], or as text "0.7:1.0:0.01" or "0.8,0.9". The original, at
            β = 1, is always a point. Without `coeffs` c is the model's own, or 0.5.
        metric: a name of ctonnx.metrics.NAMES, "top5", "PKG:FUNCTION" or a function.
        labels: the name of the labels' array or column, or the path of an .npy file.
        batch_size: samples per run; the model's own where it is fixed, else 32.
        images: an images.Transform.
        skip_broken: leave out images that cannot be read, and count them.
        search: "grid" measures every point on all data. "racing" drops points that are
            significantly worse on growing random subsets: see ctonnx.racing.
        confidence: of racing; approximate for most metrics: see ctonnx.racing.
        providers: execution providers, as for `ctonnx.session`.
        engine: "local", or "ray" for an existing Ray cluster at `address`, with `gpus` per task.
        output: a .csv, .json or .parquet file to write the points to. What is measured is kept in
            OUTPUT.progress until then, where `resume` takes it up: with the same model, data and
            options, but functions are known by their names alone.
        force: overwrite `output`.
        progress: called with the number of runs to do, where known, and gives a context manager
            for an object whose `update` is called with the runs done since.

    Returns:
        Sweep.

    Raises:
        UsageError: a wrong argument; data, metric and model do not fit together.
        NothingToDo: no activation to steer.
        ModelError: the model cannot be read.
        InputFileError: the data, or the progress file, cannot be read.
        MissingDependency: a package is missing.
    """
    _check_choices(search, engine)
    if not 0.5 <= confidence < 1:
        raise UsageError(f"confidence must lie in [0.5, 1), got {confidence!r}")
    if engine == "local" and (address is not None or gpus):
        raise UsageError("address and gpus are of engine ray: leave them out")
    if gpus < 0:
        raise UsageError(f"gpus must not be negative, got {gpus:g}")
    if output is not None:
        check_format(output)
        files.check_output(output, force)
    elif resume:
        raise UsageError("resume goes with an output: progress is kept beside it")
    points = _points(grid("beta", betas), [None] if coeffs is None else grid("coeff", coeffs))
    chosen = metrics.find(metric)
    steerable = runner.prepare(model, coeffs is not None)
    if engine == "ray":  # Its workers may be in another folder.
        dataset, labels = map(_absolute, (dataset, labels))
    opening = partial(
        open_source,
        dataset,
        steerable.inputs,
        DataOptions(labels, batch_size, images, skip_broken),
        shuffle=search == "racing",
    )
    source = opening()
    steerable.notes.extend(source.notes)
    folders = len(getattr(source, "classes", ()))
    if 1 < folders < (steerable.scores or 0):
        steerable.notes.append(
            f"{dataset} has folders of {folders} classes, the model scores of {steerable.scores}: "
            f"they were labelled 0 to {folders - 1}, in order; where one is missing, make an empty "
            "folder of its name"
        )
    count = _length(source)
    if count is None and (search, engine) != ("grid", "local"):
        raise UsageError(f"{search} search on {engine}: the factory's iterable must have a length")
    intervals.quantile(intervals.LEVEL, 1)  # What is missing is better said now than in the end.
    header = {}
    if output is not None:
        header = {"version": 2, "model": steerable.identity(), "data": source.identity()}
        header |= {"points": points, "metric": chosen.name, "providers": providers}
        header |= {"search": search, "confidence": confidence}
    if engine == "ray":
        from .cluster import Cluster

        work_on = Cluster(address, gpus, opening, providers, steerable, chosen, points).run
    else:
        runs = runner.Runner(steerable, providers)

        def work_on(work):
            return runner.run_local(runs, source, chosen, points, work)

    book, outcome = journal.Journal(progress_path(output), header, resume), None
    share = racing.BUDGET if search == "racing" else 1
    total = None if count is None else int(share * count * len(points))
    done = False
    try:
        with progress(total) if progress else nullcontext() as bar:
            evaluate = _evaluator(book, work_on, bar)
            if search == "racing":
                ones = np.array([abs(1 - beta) for beta, _ in points])
                outcome = racing.race(
                    evaluate, book.statistics, chosen, len(points), count, ones, confidence
                )
                if not source.random:
                    outcome = replace(outcome, within=float("nan"), confidence=None)
                elif isinstance(source, Stream) and outcome.passes < outcome.grid_passes:
                    # A batch's samples may be alike, and count as fewer.
                    outcome = replace(outcome, approximate=True)
            else:
                evaluate(itertools.count() if count is None else range(count), range(len(points)))
        result = result_of(chosen, points, book, outcome, steerable.notes)
        if output is not None:
            result.write(output)
        done = True
    finally:
        book.close(done)
    return result


def _evaluator(book, work_on, bar):
    """A function that does the work on (batches, points) that the journal lacks."""

    def evaluate(batches, points):
        def missing():
            for batch in batches:
                lacking = book.missing(batch, points)
                if bar:
                    bar.update(len(points) - len(lacking))
                if lacking:
                    yield batch, lacking

        for batch, measured, statistics, broken in work_on(missing()):
            book.add(batch, measured, statistics, broken)
            if bar:
                bar.update(len(measured))

    return evaluate


def _points(betas, coeffs):
    """All (β, c), the original first: at β = 1 every c gives it."""
    middle = 0.5 if 0.5 in coeffs else coeffs[0]
    return [(1.0, middle), *((b, c) for c in coeffs for b in betas if b != 1.0)]


def save_best(model, result, path, beta_as="initializer", force=False):
    """Write the model with the best β, and c, baked in, or β as the default of an input.

    Args:
        model: the path that was swept.
        result: its Sweep.
        beta_as: "initializer" or "input".
        force: overwrite `path`.

    Raises:
        UsageError: as for `files.Transaction`.
    """
    beta, coeff = result.best.beta, result.best.coeff

    with files.Transaction(model, path, force) as edit:
        steer_or_set(edit.model, beta, coeff, beta_as)
    return edit.output


def progress_path(output):
    """Where a sweep keeps what it has measured until `output` is written."""
    return None if output is None else Path(f"{output}.progress")


def _check_choices(search, engine):
    for name, value, choices in ("search", search, SEARCHES), ("engine", engine, ENGINES):
        if value not in choices:
            raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _absolute(path):
    """The path of a file or folder that is there; anything else as it is."""
    held = isinstance(path, str | os.PathLike) and os.path.exists(path)
    return os.path.abspath(path) if held else path


def _length(source):
    try:
        return len(source)
    except TypeError:
        return None


def grid(name, given):
    """The numbers of a grid in [0, 1], ascending: "0.7:1.0:0.01", "0.5,0.7:0.9:0.1", or numbers.

    Raises:
        UsageError: it is not of that form, empty, or too long.
    """
    if isinstance(given, str):
        parts = [part.split(":") for part in given.split(",")]
    else:
        parts = [[value] for value in np.atleast_1d(np.asarray(given, object))]
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
