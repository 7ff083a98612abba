"""Recalibrating a steered model: its linear layers get back the statistics of the original.

A CTU moves the mean and the scale of every channel behind it. The mean and variance of each layer's
output, as the original has them on a few unlabelled samples, are restored in running order, each
layer on what the corrected ones before it give, and folded into its weight and bias.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, inliner, numpy_helper

from ..data.batches import Input
from ..errors import CtonnxError, UsageError
from ..model import files
from ..model.external import has_external_data
from ..model.flow import cut
from ..model.graph import scopes
from ..rewriting.steer import steer_or_set
from ..rewriting.steered import SteeredModel
from .constants import Constants
from .flat import Flat
from .folding import Folder, add_inputs
from .layers import Layer, Left, find_layers, is_layer, level_layers
from .moments import Correction, Moments, correction
from .running import Part, Stages
from .samples import Calibration

# Called with the number of steps: a context of an object with `update(steps)`, or of None.
Progress = Callable[[int | None], AbstractContextManager[Any]]

Feeds = Mapping[str, np.ndarray]


class Calibrator:
    """Finds the corrections of a steered model.

    Args:
        model: the steered ModelProto. It is not changed, and must not change otherwise.
        parameters: the names of the initializers and inputs that hold β, and c where it changes.
        original: what to feed for them to get the wanted statistics: name -> array.
        calibration: the data.
        folder: the folder of the model's external data; None if it has none.
        providers: execution providers; the CPU where None.

    Attributes:
        layers: the layers that are corrected.
        left: those that steering reaches and that are left alone.
        samples: the samples.

    Raises:
        UsageError: the model has no linear layer behind a steered activation; the data do not fit.
        InputFileError: the data cannot be read.
        ModelError: ONNX Runtime does not load a part of the model.
    """

    def __init__(
        self,
        model: ModelProto,
        parameters: set[str],
        original: Feeds,
        calibration: Calibration,
        folder: str | Path | None = None,
        providers: Sequence | None = None,
    ):
        constants = {tensor.name for tensor in model.graph.initializer}
        fed = [v for v in model.graph.input if v.name not in constants | parameters]
        self.samples = calibration.read([Input.of(value) for value in fed])
        self._folder = str(folder or ".") if has_external_data(model) else None
        self._original, self._providers = original, providers
        self._inside = list(scopes(model))
        self._constants = Constants(self._inside)
        flat = Flat(model, self._inside, parameters, is_layer, self._conditions)
        self.layers, self.left = find_layers(flat, self._constants, parameters)
        if not self.layers and not self.left:
            raise UsageError(
                "calibration has nothing to correct: no linear layer is behind a steered activation"
            )
        ready, more = level_layers(flat.model.graph, self.layers)
        self.left += more
        self._stages = Stages(flat.model, self.layers, ready, self._folder, providers)
        self._wanted: dict[int, Moments] | None = None

    def steps(self, points: int) -> int:
        """How many steps `corrections` reports for so many points."""
        return (points + (self._wanted is None)) * len(self._stages) * self.samples.batches

    def corrections(
        self, feeds: Feeds, step: Callable[[], None] = lambda: None
    ) -> dict[int, Correction]:
        """The Correction of each layer, by its id, where the parameters are `feeds`.

        Args:
            step: called after every step.

        Raises:
            UsageError: the model does not run on the data, or gives NaN or infinity.
        """
        if self._wanted is None:
            wanted: dict[int, Moments] = {}

            def remember(layer: Layer, moments: Moments) -> None:
                wanted[id(layer)] = moments

            self._stages.walk(self.samples, self._original, remember, step)
            self._wanted = wanted
        targets, found = self._wanted, {}

        def correct(layer: Layer, moments: Moments) -> Correction:
            found[id(layer)] = correction(targets[id(layer)], moments, layer.axis)
            return found[id(layer)]

        self._stages.walk(self.samples, feeds, correct, step)
        return found

    def fold(self, model: ModelProto, corrections: Mapping[int, Correction]) -> list[str]:
        """Fold corrections into the model, in place; it is the one given, or holds its nodes.

        Returns:
            the names of the tensors that were changed or added.
        """
        folder = Folder(model, self._constants, self._folder)
        for layer in self.layers:
            folder.fold(layer, corrections[id(layer)])
        return folder.changed

    def add_inputs(self, model: ModelProto) -> None:
        """Make inputs of the model, in place, of the corrections: what `feeds` gives."""
        self._names = add_inputs(model, self.layers, self._constants)
        self._dtypes = {
            id(layer): self._constants.dtype(layer.uses[0].scope, layer.uses[0].node)
            for layer in self.layers
        }

    def feeds(self, corrections: Mapping[int, Correction]) -> dict[str, np.ndarray]:
        """Name -> array of the inputs that `add_inputs` has made, for some corrections."""
        fed = {}
        for key, names in self._names.items():
            arrays = corrections[key].arrays(self._dtypes[key])
            fed.update(zip(names, arrays, strict=True))
        return fed

    def _conditions(self, model: ModelProto, names: Sequence[str]) -> dict[str, bool]:
        """The value of each condition that is the same for all batches."""
        part = Part(cut(model, names), self._folder, self._providers)
        values: dict[str, set[bool]] = {name: set() for name in names}
        for batch in range(self.samples.batches):
            arrays = {n: self.samples.get(batch, n) for n in self.samples.names & part.inputs}
            arrays |= {n: a for n, a in self._original.items() if n in part.inputs}
            for name, value in part.run(arrays).items():
                values[name].add(bool(np.asarray(value).all()))
        return {name: seen.pop() for name, seen in values.items() if len(seen) == 1}


def check_calibration(calibration: Any, beta_as: str = "initializer") -> Calibration:
    """The Calibration that a user gives, or the one of the data that are given in its place.

    Raises:
        UsageError: beta is to be an input.
    """
    if beta_as != "initializer":
        raise UsageError(
            "calibrated weights serve one beta alone: beta cannot be an input of the model"
        )
    return calibration if isinstance(calibration, Calibration) else Calibration(calibration)


def inline_layers(model: ModelProto) -> None:
    """Inline the model-local functions that hold linear layers, in place: the calls of a function
    have statistics of their own."""
    if any(is_layer(node) for function in model.functions for node in function.node):
        model.CopyFrom(inliner.inline_local_functions(model))


def wanted_feeds(steered: SteeredModel) -> dict[str, np.ndarray]:
    """What to feed for β to get the statistics that calibration restores: ones, as in the original,
    or for a model that is calibrated already the β whose statistics are like the original's."""
    present = parameter_values(steered.proto, steered.betas())
    if steered.metadata.calibration is not None:
        return present
    return {name: np.ones_like(array) for name, array in present.items()}


def digest_of_original(steered: SteeredModel) -> str | None:
    """What tells the original of a steered model from others; None where it cannot be had."""
    original = files.own(steered.proto)
    try:
        SteeredModel(original).unsteer()
    except CtonnxError:
        return None
    return files.digest(original.SerializeToString(deterministic=True))


def calibrate(
    steered: SteeredModel,
    calibration: Calibration,
    original: Feeds,
    digest: str | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Calibrate a steered model with its present β and c, in place, and record that.

    Args:
        steered: the model; β and c are in initializers.
        original: as `wanted_feeds` gives it.
        digest: of the original's file; as recorded where None.
        folder: the folder of its external data.
        progress: called with the number of steps.

    Returns:
        lines that a user should see.

    Raises:
        As Calibrator.
    """
    model = steered.proto
    present = parameter_values(model, set(original))
    calibrator = Calibrator(model, set(original), original, calibration, folder)
    if calibrator.layers:
        with progress(calibrator.steps(1)) if progress else nullcontext() as bar:
            step = (lambda: bar.update(1)) if bar else (lambda: None)
            corrections = calibrator.corrections(present, step)
        changed = calibrator.fold(model, corrections)
        before = steered.metadata.calibration or {}
        steered.metadata.calibration = {
            "original": before.get("original") if digest is None else digest,
            "samples": calibrator.samples.count,
            "seed": calibration.seed,
            "data": calibrator.samples.digest,
            "layers": len(calibrator.layers),
            "tensors": changed,
        }
        steered.refresh()
    return notes_on(calibrator)


def calibrate_steered(
    model: ModelProto,
    betas: set[str] | None,
    calibration: Calibration,
    digest: str | None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Calibrate a model that was steered just now, as `calibrate`.

    Args:
        betas: the names of what holds β; those that its CTUs read where None.
    """
    steered = SteeredModel(model, betas=betas)
    return calibrate(steered, calibration, wanted_feeds(steered), digest, folder, progress)


def steer_or_set_calibrated(
    model: ModelProto,
    beta: float,
    coeff: float | None,
    calibration: Calibration | None,
    digest: str | None,
    folder: str | Path | None,
    beta_as: str = "initializer",
) -> None:
    """Steer a model, or set the β of one, in place, as `steer_or_set`; and calibrate it where there
    is a `calibration`. At β = 1 there is nothing to restore."""
    if calibration is None or beta == 1:
        steer_or_set(model, beta, coeff, beta_as)
        return
    check_calibration(calibration, beta_as)
    steered = SteeredModel(model)
    if steered.is_steered:
        digest = digest_of_original(steered)
    else:
        inline_layers(model)
    steer_or_set(model, beta, coeff)
    calibrate_steered(model, None, calibration, digest, folder)


def notes_on(calibrator: Calibrator, extent: str = "") -> list[str]:
    """What a Calibrator corrects and what it leaves alone, as lines for a user.

    Args:
        extent: how much was calibrated, where that is more than one β.
    """
    count, samples = len(calibrator.layers), calibrator.samples.count
    notes = ["no layer needs calibration"]
    if count:
        notes = [f"calibrated {count} layers on {samples} samples{extent}"]
    reasons: dict[str, list[Left]] = {}
    for left in calibrator.left:
        reasons.setdefault(left.reason, []).append(left)
    for reason, group in reasons.items():
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        notes.append(f"not calibrated: {group[0].op} {group[0].name}{more}: {reason}")
    return notes


def parameter_values(model: ModelProto, names: set[str]) -> dict[str, np.ndarray]:
    """Name -> array of the initializers `names`."""
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name in names
    }
