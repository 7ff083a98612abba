"""Calibrating a model at every point that it is measured at, in one session."""

import time
from collections.abc import Sequence
from dataclasses import replace

from onnx import ModelProto

from ..calibration.calibrate import Calibration, inline_layers, notes_on, stepping
from ..calibration.calibrator import Calibrator
from ..model import files
from .engine import BetaCoeff, Steerable, parameters_at


def calibrated(
    steerable: Steerable,
    calibration: Calibration,
    points: Sequence[BetaCoeff],
    providers: Sequence | None = None,
    progress: files.Progress | None = None,
) -> Steerable:
    """A Steerable whose layers are corrected at each point; the corrections are inputs.

    Args:
        steerable: the model.
        calibration: the data.
        points: where it will be measured.
        providers: execution providers, as for `ctonnx.session`.
        progress: called with the number of steps.

    Raises:
        As `calibrate`.
    """
    start = time.monotonic()
    model = ModelProto.FromString(steerable.data)
    inline_layers(model)
    feeds = [parameters_at(steerable, point) for point in points]
    original = parameters_at(steerable, (1.0, None))
    with calibration.read(steerable.inputs) as samples:
        calibrator = Calibrator(model, original, samples, steerable.folder, providers)
        with stepping(progress, calibrator.steps(len(points))) as step:
            found = [calibrator.corrections(fed, step) for fed in feeds]
        inputs = calibrator.add_inputs()
        corrections = {p: inputs.feeds(c) for p, c in zip(points, found, strict=True)}
        seconds = time.monotonic() - start
        extent = f"on {samples.count} samples at {len(points)} points in {seconds:.2g} s"
        notes = [*steerable.notes, *notes_on(calibrator, extent)]
    data = model.SerializeToString(deterministic=True)
    return replace(steerable, data=data, corrections=corrections, notes=notes)
