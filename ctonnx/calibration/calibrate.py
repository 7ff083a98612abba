"""Calibrating steered models in place: their linear layers get back the original's statistics.

A CTU moves the mean and the scale of every channel behind it. The mean and variance of each layer's
output, as the original has them on a few unlabelled samples, are restored in running order, each
layer on what the corrected ones before it give, and folded into its weight and bias.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from onnx import ModelProto, inliner, numpy_helper

from .. import ctu
from ..errors import CtonnxError, UsageError
from ..model import files
from ..model.external import has_external_data
from ..rewriting.steer import Report, steer, steer_or_set
from ..rewriting.steered import SteeredModel
from .calibrator import Calibrator, data_inputs
from .linear import is_layer
from .running import Feeds
from .samples import Calibration


def check_calibration(calibration: Any, beta_as: str = "initializer") -> Calibration:
    """The Calibration that a user gives, or the one of the data that are given in its place.

    Raises:
        UsageError: beta is to be an input.
    """
    if beta_as != "initializer":
        raise UsageError(
            "calibrated weights serve one beta: leave out beta-as, so that beta is baked in"
        )
    return calibration if isinstance(calibration, Calibration) else Calibration(calibration)


def steer_calibrated(
    model: ModelProto,
    calibration: Calibration | None,
    origin: files.Origin,
    check: Callable[[Report], None] = lambda report: None,
    progress: files.Progress | None = None,
    **options: Any,
) -> Report:
    """Steer a model in place, and calibrate it where there is a `calibration`.

    Args:
        origin: where the model comes from.
        check: called in between.
        progress: called with the number of steps of the calibration.
        options: as for `steer`.

    Returns:
        the Report of `steer`, with the notes of the calibration.

    Raises:
        As `steer` and `calibrate`.
    """
    report = steer(model, **options)
    check(report)
    if calibration is not None:
        steered = SteeredModel(model, betas=report.beta_names)
        report.notes += calibrate(steered, calibration, ones(steered), origin, progress)
    return report


def set_calibrated(
    steered: SteeredModel,
    calibration: Calibration | None,
    origin: Callable[[], files.Origin],
    beta: float,
    coeff: float | None = None,
    progress: files.Progress | None = None,
) -> tuple[int, list[str]]:
    """Give a steered model another β, and c, in place, and calibrate it where there is a
    `calibration`: to the statistics of the original, or to those that it has now where it is
    calibrated.

    Returns:
        what `SteeredModel.set` and `calibrate` return.

    Raises:
        As these; UsageError: the model is calibrated, and there is no `calibration`.
    """
    if calibration is None:
        steered.check_uncalibrated("calibrate it again, or steer its original")
        return steered.set(beta, coeff), []
    calibrated = steered.metadata.calibration is not None
    wanted = values_of(steered) if calibrated else ones(steered)
    source = origin()._replace(digest=digest_of_original(steered))
    count = steered.set(beta, coeff)
    return count, calibrate(steered, calibration, wanted, source, progress)


def steer_or_set_calibrated(
    model: ModelProto,
    calibration: Calibration | None,
    origin: files.Origin,
    beta: float,
    coeff: float | None,
    beta_as: str = "initializer",
) -> None:
    """Steer a model, or set the β of one, in place, and calibrate it where there is a
    `calibration`.

    Raises:
        As `steer_or_set` and `calibrate`.
    """
    steered = SteeredModel(model)
    if calibration is not None and steered.is_steered:
        origin = origin._replace(digest=digest_of_original(steered))
    steer_or_set(model, beta, coeff, beta_as)
    if calibration is not None:
        steered = SteeredModel(model)
        calibrate(steered, calibration, ones(steered), origin)


def calibrate(
    steered: SteeredModel,
    calibration: Calibration,
    wanted: Feeds,
    origin: files.Origin,
    progress: files.Progress | None = None,
) -> list[str]:
    """Calibrate a steered model for the β and c that it has, in place, and record that.

    Model-local functions that hold linear layers are inlined, as their calls have statistics of
    their own.

    Args:
        steered: the model; initializers hold β and c.
        wanted: the initializers that hold β -> what to feed for them to get the statistics to
            restore: `ones` for those of the original.
        origin: where it comes from; without a digest the recorded one stays.
        progress: called with the number of steps.

    Returns:
        lines that a user should see.

    Raises:
        UsageError: β is an input, the model has no linear layer behind a steered activation, or
            the data do not fit it, are too few or not finite, or its outputs are not.
        InputFileError: the data cannot be read.
        ModelError: ONNX Runtime does not load a part of the model.
    """
    model, parameters = steered.proto, steered.parameters
    if parameters.inputs:
        check_calibration(calibration, "input")
    present = values_of(steered)
    if all(np.array_equal(present[name], wanted[name]) for name in present):
        return ["not calibrated: at this beta the statistics are those to restore"]
    inline_layers(model)
    folder = folder_of_data(model, origin)
    names = set(wanted)
    with calibration.read(data_inputs(model, names)) as samples:
        calibrator = Calibrator(model, wanted, samples, folder)
        if calibrator.layers:
            with stepping(progress, calibrator.steps(1)) as step:
                corrections = calibrator.corrections(present, step)
            changed = calibrator.fold(corrections)
            before = steered.metadata.calibration or {}
            steered.metadata.calibration = {
                "original": origin.digest or before.get("original"),
                "beta": steered.metadata.beta,
                "coeff": steered.metadata.coeff,
                "samples": samples.count,
                "seed": calibration.seed,
                "data": samples.digest,
                "layers": len(calibrator.layers),
                "skipped": [f"{s.op} {s.name}: {s.reason}" for s in calibrator.skipped],
                "tensors": changed,
            }
        steered.forget()
        return notes_on(calibrator, f"on {samples.count} samples")


def ones(steered: SteeredModel) -> dict[str, np.ndarray]:
    """The initializers of a steered model that hold β -> ones, which give the original network."""
    return {name: np.ones_like(array) for name, array in values_of(steered).items()}


def values_of(steered: SteeredModel) -> dict[str, np.ndarray]:
    """The initializers of a steered model that hold β -> their arrays.

    Raises:
        NothingToDo: nothing holds a beta.
    """
    betas = steered.betas()
    tensors = steered.proto.graph.initializer
    return {t.name: numpy_helper.to_array(t) for t in tensors if t.name in betas}


def digest_of_original(steered: SteeredModel) -> str | None:
    """The digest of the original of a steered model; the recorded one where it is calibrated, None
    where it is not known."""
    if steered.metadata.calibration is not None:
        return steered.metadata.calibration.get("original")
    original = files.own(steered.proto)
    try:
        SteeredModel(original).unsteer()
    except CtonnxError:
        return None
    return files.digest(original)


def inline_layers(model: ModelProto) -> None:
    """Inline the model-local functions, but for those of our ops, if one holds a linear layer."""
    others = [function for function in model.functions if not ctu.is_ctu(function)]
    if any(is_layer(node) for function in others for node in function.node):
        ids = [(function.domain, function.name) for function in others]
        model.CopyFrom(inliner.inline_selected_functions(model, ids))


def folder_of_data(model: ModelProto, origin: files.Origin) -> str | None:
    """The folder of a model's external data; None if it has none."""
    return str(origin.folder or ".") if has_external_data(model) else None


def notes_on(calibrator: Calibrator, extent: str) -> list[str]:
    """What a Calibrator corrects, and what it skips by reason, as lines for a user; `extent` says
    on what."""
    count = len(calibrator.layers)
    notes = [f"calibrated {count} layers {extent}" if count else "no layer needs calibration"]
    reasons = Counter(skipped.reason for skipped in calibrator.skipped)
    firsts = {skipped.reason: skipped for skipped in reversed(calibrator.skipped)}
    for reason, number in reasons.items():
        more = f" and {number - 1} more" if number > 1 else ""
        first = firsts[reason]
        notes.append(f"not calibrated: {first.op} {first.name}{more}: {reason}")
    return notes


@contextmanager
def stepping(progress: files.Progress | None, total: int) -> Iterator[Callable[[], None]]:
    """A context of a function to call after each of `total` steps, which `progress` shows."""
    if progress is None:
        yield lambda: None
        return
    with progress(total) as bar:
        yield lambda: bar.update(1)
