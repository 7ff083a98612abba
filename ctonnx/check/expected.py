"""What a model is compared with: a float64 run, its original, or a PyTorch model.

Each class has `what`, in words; `exact`, whether it computes in float64; `feeds`, the betas that
are to be fed; and `run`, which gives the outputs, or the tensors `names` of the graph.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from onnx import ModelProto

from ..errors import ModelError, UsageError
from ..model import files
from ..ort.runs import Arrays, Model, variant, with_outputs
from ..rewriting.steered import SteeredModel


class Expected(Protocol):
    """The expected outputs of a model."""

    what: str
    exact: bool
    feeds: Arrays

    def run(self, inputs: Arrays, names: list[str] | None = None) -> Arrays: ...


class Float64Run:
    """The model itself, run with PyTorch in float64."""

    what, exact = "PyTorch in float64", True

    def __init__(self, path: Path, steered: SteeredModel):
        from .reference import Reference

        self._reference = Reference(path)
        self.feeds = _recorded_betas(steered)

    def run(self, inputs: Arrays, names: list[str] | None = None) -> Arrays:
        return self._reference.run(inputs, names)


class OriginalRun:
    """The original at `path` in ONNX Runtime; it sets the steered model to beta 1.

    Raises:
        UsageError: the original is steered itself, or takes an input that the model has not.
        NothingToDo: the model has no beta to set to 1.
        ModelError: the original cannot be read, or does not run.
    """

    exact = False

    def __init__(self, path: Path, steered: SteeredModel):
        self.what, self._path = f"{path} in ONNX Runtime, at beta 1", path
        self._model = files.load(path)
        if SteeredModel(self._model).is_steered:
            raise UsageError(f"{path}: is steered itself: give the original")
        self.feeds = steered.override(1.0)
        lacking = required_inputs(self._model) - required_inputs(steered.proto)
        if lacking:
            raise UsageError(f"{path}: takes an input {min(lacking)!r}, which the model has not")

    @cached_property
    def _session(self) -> Model:
        with variant(self._path, self._model) as opened:
            return Model(opened)

    def run(self, inputs: Arrays, names: list[str] | None = None) -> Arrays:
        own = {value.name for value in self._model.graph.input}
        inputs = {n: v for n, v in inputs.items() if n in own}
        try:
            if names is None:
                return self._session.run(inputs)
            with variant(self._path, with_outputs(self._model, names)) as opened:
                return Model(opened).run(inputs)
        except ModelError as error:
            raise ModelError(
                f"{self._path}: does not run on the model's inputs: is it its original? ({error})"
            ) from error


class PyTorchRun:
    """The PyTorch model that `target`, PKG:FACTORY, names, steered as the ONNX model is.

    Raises:
        UsageError: it cannot be made, steered or run.
    """

    exact = False

    def __init__(self, target: str, steered: SteeredModel):
        self.what, self._target, self._steered = f"{target} in PyTorch", target, steered
        self.feeds = _recorded_betas(steered)

    def run(self, inputs: Arrays, names: list[str] | None = None) -> Arrays:
        from ..torch import by_name

        metadata, betas = self._steered.metadata, self._steered.parameters.betas
        beta = next((np.asarray(inputs[n]).item() for n in betas & inputs.keys()), metadata.beta)
        graph = self._steered.proto.graph
        order = [v.name for v in graph.input if v.name in inputs and v.name not in betas]
        outputs, activations = by_name.run_model(
            self._target,
            [inputs[name] for name in order],
            [value.name for value in graph.output],
            beta,
            metadata.coeff,
        )
        if names is None:
            return outputs
        if len(names) != len(activations):
            raise UsageError(
                f"{self._target}: has {len(activations)} activations, not {len(names)}"
            )
        return dict(zip(names, activations, strict=True))

    def notes_on_weights(self) -> Iterator[str]:
        """Yield a note where weights of the file differ from those of the PyTorch model."""
        from ..torch import by_name

        names = by_name.differing_weights(self._target, self._steered.proto.graph.initializer)
        if names:
            yield (
                f"{len(names)} weights are not those of {self._target}, such as {names[0]!r}: does "
                "it load what was exported?"
            )


def required_inputs(model: ModelProto) -> set[str]:
    """The names of the graph's inputs that have no default."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    return {value.name for value in model.graph.input} - defaults


def _recorded_betas(steered: SteeredModel) -> Arrays:
    """What to feed for the betas that must be fed: what the metadata tell, if they do."""
    beta = steered.metadata.beta
    names = set() if beta is None else steered.parameters.betas & required_inputs(steered.proto)
    return dict.fromkeys(names, np.array(beta, np.float32))
