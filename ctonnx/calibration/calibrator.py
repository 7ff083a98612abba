"""Finding what restores the statistics of a steered model's layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from ..data.batches import Input
from ..errors import UsageError
from ..model.flow import cut
from ..model.graph import scopes
from .constants import Constants
from .flat import Flat
from .folding import Folding, add_inputs
from .layers import Layer, find_layers, level_layers
from .moments import Correction, Moments, correction
from .running import Feeds, Part, Stages
from .samples import Samples

Corrections = Mapping[Layer, Correction]


def data_inputs(model: ModelProto, parameters: set[str]) -> list[Input]:
    """The inputs of a model that data feed: all but `parameters` and those with a default.

    Raises:
        UsageError: one is no array of numbers.
    """
    passed = {tensor.name for tensor in model.graph.initializer} | parameters
    return [Input.of(value) for value in model.graph.input if value.name not in passed]


class Calibrator:
    """Finds the corrections of a steered model.

    Args:
        model: the steered ModelProto. It may change by `fold` and `add_inputs` alone.
        original: the initializers and inputs that hold β, and c where it changes -> what to feed
            for them to get the wanted statistics, float arrays.
        samples: what to run it on.
        folder: the folder of the model's external data; None if it has none.
        providers: execution providers; the CPU where None.

    Attributes:
        layers: the layers that are corrected.
        skipped: those that steering reaches and that are left alone.

    Raises:
        UsageError: the model has no linear layer behind a steered activation.
        ModelError: ONNX Runtime does not load a part of the model.
    """

    def __init__(
        self,
        model: ModelProto,
        original: Feeds,
        samples: Samples,
        folder: str | None = None,
        providers: Sequence | None = None,
    ):
        self._original, self._samples = original, samples
        self._folder, self._providers = folder, providers
        inside = list(scopes(model))
        self._model, self._constants = model, Constants(inside)
        flat = Flat(model, inside, original.keys(), self._conditions)
        self.layers, self.skipped = find_layers(flat, self._constants, original.keys())
        if not self.layers and not self.skipped:
            raise UsageError(
                "calibration has nothing to correct: no linear layer is behind a steered activation"
            )
        final_from, more = level_layers(flat.model.graph, self.layers)
        self.skipped += more
        self._stages = Stages(flat.model, self.layers, final_from, folder, providers)
        self._wanted: dict[Layer, Moments] | None = None

    def steps(self, points: int) -> int:
        """How many steps `corrections` reports for so many points."""
        return (points + (self._wanted is None)) * len(self._stages) * self._samples.batches

    def corrections(
        self, feeds: Feeds, step: Callable[[], None] = lambda: None
    ) -> dict[Layer, Correction]:
        """The corrections where the parameters are `feeds`, as `original` names them.

        Args:
            step: called after every step.

        Raises:
            UsageError: the model does not run on the data, or gives NaN or infinity.
        """
        if self._wanted is None:
            wanted: dict[Layer, Moments] = {}

            def remember(layer: Layer, moments: Moments) -> None:
                wanted[layer] = moments

            self._stages.walk(self._samples, self._original, remember, step)
            self._wanted = wanted
        targets, found = self._wanted, {}

        def correct(layer: Layer, moments: Moments) -> Correction:
            found[layer] = correction(targets[layer], moments, layer.axis)
            return found[layer]

        self._stages.walk(self._samples, feeds, correct, step)
        return found

    def fold(self, corrections: Corrections) -> list[str]:
        """Fold corrections into the model, in place.

        Returns:
            the names of the tensors that were changed or added.
        """
        folding = Folding(self._model, self._constants, self._folder or "")
        for layer in self.layers:
            folding.fold(layer, corrections[layer])
        return folding.changed

    def add_inputs(self) -> "CorrectionInputs":
        """Make inputs of the corrections, in the model itself."""
        names = add_inputs(self._model, self.layers, self._constants)
        uses = {layer: layer.uses[0] for layer in self.layers}
        dtypes = {layer: self._constants.dtype(use.scope, use.node) for layer, use in uses.items()}
        return CorrectionInputs(names, dtypes)

    def _conditions(self, model: ModelProto, names: Sequence[str]) -> dict[str, bool]:
        """The value of each condition that is the same for all batches."""
        part = Part(cut(model, names), self._folder, self._providers)
        values: dict[str, set[bool]] = {name: set() for name in names}
        for batch in range(self._samples.batches):
            arrays = self._samples.arrays(batch, part.inputs)
            for name, value in part.run({**arrays, **self._original}).items():
                values[name].add(bool(np.asarray(value).all()))
        return {name: seen.pop() for name, seen in values.items() if len(seen) == 1}


@dataclass(frozen=True)
class CorrectionInputs:
    """The inputs of a model that take corrections: the `names` of scale and shift of each layer,
    and their `dtypes`."""

    names: Mapping[Layer, tuple[str, str]]
    dtypes: Mapping[Layer, np.dtype]

    def feeds(self, corrections: Corrections) -> dict[str, np.ndarray]:
        """Name -> array of all these inputs."""
        fed = {}
        for layer, names in self.names.items():
            fed.update(zip(names, corrections[layer].arrays(self.dtypes[layer]), strict=True))
        return fed
