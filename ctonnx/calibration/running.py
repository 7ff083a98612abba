"""Running a flat model level by level over samples, each layer corrected before the next is run.

The model is cut at its layers. What later parts take waits in a file for each batch of samples, so
that every node runs once for each sample, and memory does not grow with their number.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, helper

from ..errors import ModelError, UsageError
from ..model.flow import Flow, cut
from ..ort import library
from ..ort.runs import CPU, beside, session_options
from .layers import Layer
from .moments import Correction, Moments
from .samples import Samples
from .store import Store

# Each part of a model has threads of its own.
_MOST_THREADS = 8

Feeds = Mapping[str, np.ndarray]

# Called with a layer and the moments of its output; gives the Correction of it, or None.
Visit = Callable[[Layer, Moments], Correction | None]


class Part:
    """A part of a model in ONNX Runtime.

    Args:
        model: the part, a ModelProto.
        folder: the folder of its external data; None if it has none.
        providers: execution providers; the CPU where None.

    Attributes:
        inputs: the names of its inputs.

    Raises:
        ModelError: ONNX Runtime does not load it.
    """

    def __init__(self, model: ModelProto, folder: str | None, providers: Sequence | None):
        threads = min(_MOST_THREADS, os.cpu_count() or 1)
        options = session_options(library.has_library(), threads)
        # The threads of a part that does not run would keep those of the others from running.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        data = model.SerializeToString()
        loading = library.errors_as(ModelError, "ONNX Runtime cannot load a part of the model")
        with nullcontext(data) if folder is None else beside(data, folder) as opened, loading:
            self._session = library.open_session(opened, options, providers or [CPU])
        self._names = [value.name for value in model.graph.output]
        self.inputs = {value.name for value in self._session.get_inputs()}

    def run(self, arrays: Feeds) -> dict[str, Any]:
        """Output name -> array for input name -> array; those that are no inputs are passed over.

        Raises:
            UsageError: it does not run on them.
        """
        fed = {name: array for name, array in arrays.items() if name in self.inputs}
        with library.errors_as(UsageError, "the model does not run on the calibration data"):
            outputs = self._session.run(self._names, fed)
        return dict(zip(self._names, outputs, strict=True))


@dataclass
class _Stage:
    """What runs once all layers of lower levels are corrected.

    Attributes:
        layers: the layers whose outputs it computes.
        inputs: the tensors that it takes of earlier stages.
        outputs: those that later ones take, and the outputs of `layers`.
        done: the tensors that no later stage takes.
        part: its session, once it has run.
    """

    layers: list[Layer]
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    part: Part | None = None


class Stages:
    """A flat model, cut at its layers.

    Args:
        model: the flat ModelProto.
        layers: the layers to correct, with their levels.
        final_from: the level from which on a tensor is final, by name.
        folder, providers: as for Part.
    """

    def __init__(
        self,
        model: ModelProto,
        layers: list[Layer],
        final_from: Mapping[str, int],
        folder: str | None,
        providers: Sequence | None,
    ):
        self._model, self._folder, self._providers = model, folder, providers
        self._stages = _planned(Flow(model.graph), layers, final_from)

    def __len__(self) -> int:
        return len(self._stages)

    def walk(self, samples: Samples, feeds: Feeds, visit: Visit, step: Callable[[], None]) -> None:
        """Run all stages, and visit each layer once its input is final.

        Args:
            samples: what is fed.
            feeds: name -> array of the inputs that are no data.
            visit: called with every layer and the moments of its output.
            step: called after every batch of a stage.

        Raises:
            UsageError: the model does not run on the samples, or an output is not finite.
            ModelError: ONNX Runtime does not load a part of it.
        """
        corrections: dict[str, Correction] = {}
        with Store() as store:
            for stage in self._stages:
                moments = {layer: Moments() for layer in stage.layers}
                for batch in range(samples.batches):
                    taken = {name: store.get(batch, name) for name in stage.inputs}
                    for name in taken.keys() & corrections.keys():
                        taken[name] = corrections[name].apply(taken[name])
                    part = self._opened(stage, taken)
                    outputs = part.run({**samples.arrays(batch, part.inputs), **feeds, **taken})
                    for layer, found in moments.items():
                        for use in layer.uses:
                            found.add(outputs[use.output], layer.axis)
                    for name in stage.outputs:
                        store.put(batch, name, outputs[name])
                    step()
                store.drop(samples.batches, stage.done)
                for layer, found in moments.items():
                    _check_finite(layer, found)
                    correction = visit(layer, found)
                    if correction is not None:
                        corrections.update((use.output, correction) for use in layer.uses)

    def _opened(self, stage: _Stage, taken: Feeds) -> Part:
        """The session of a stage, opened for the types of what it takes."""
        if stage.part is None:
            values = [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
                )
                for name, array in taken.items()
            ]
            part = cut(self._model, stage.outputs, values)
            stage.part = Part(part, self._folder, self._providers)
        return stage.part


def _check_finite(layer: Layer, moments: Moments) -> None:
    if not moments.count or not moments.is_finite:
        raise UsageError(
            f"the output of {layer.op} {layer.name} is empty or not finite on the calibration data"
        )


def _planned(flow: Flow, layers: list[Layer], final_from: Mapping[str, int]) -> list[_Stage]:
    outputs = {use.output: layer for layer in layers for use in layer.uses}
    stages = [_Stage([]) for _ in range(1 + max((layer.level for layer in layers), default=-1))]
    for layer in layers:
        stages[layer.level].layers.append(layer)
    needed = flow.needed_for(outputs)
    level_of: dict[str, int] = {}
    for i in needed:
        level = max((final_from.get(name, 0) for name in flow.reads[i]), default=0)
        for name in flow.nodes[i].output:
            level_of[name] = outputs[name].level if name in outputs else level
    last: dict[str, int] = {}  # tensor -> the last stage that takes it
    for i in needed:
        level = max(level_of.get(name, 0) for name in flow.nodes[i].output)
        for name in sorted(flow.reads[i] - flow.constants):
            if name in level_of and level_of[name] < level:
                stages[level].inputs.append(name)
                last[name] = max(level, last.get(name, 0))
    for stage in stages:
        stage.inputs = sorted(set(stage.inputs))
    for name, level in level_of.items():
        if name in last or name in outputs:
            stages[level].outputs.append(name)
            stages[last.get(name, level)].done.append(name)
    return stages
