"""Running a flat model level by level over samples, each layer corrected before the next is run.

The model is cut at its layers. What a part gives to later parts waits in a file for each batch of
samples, so that every node runs once for each sample, and memory does not grow with their number.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from onnx import ModelProto, helper

from ..errors import ModelError, UsageError
from ..model.flow import Flow, cut
from ..ort import library
from ..ort.runs import CPU, beside
from .layers import Layer
from .moments import Correction, Moments
from .samples import Arrays, Samples
from .store import Store

# Each part of a model has threads of its own.
_MOST_THREADS = 8

# Called with a layer and the moments of its output; gives the Correction of it, or None.
Visit = Callable[[Layer, Moments], Correction | None]


class Part:
    """A part of a model in ONNX Runtime.

    Args:
        model: the part, a ModelProto.
        folder: the folder of its external data; None if it has none.
        providers: execution providers; ONNX Runtime's default where None.

    Raises:
        ModelError: ONNX Runtime does not load it.
    """

    def __init__(self, model: ModelProto, folder: str | None, providers: Sequence | None):
        options = library.import_onnxruntime().SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = min(_MOST_THREADS, os.cpu_count() or 1)
        # The threads of a part that does not run would keep those of the others from running.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if library.has_library():
            library.register(options)
        data = model.SerializeToString()
        with ExitStack() as stack:
            opened = data if folder is None else stack.enter_context(beside(data, folder))
            loading = library.errors_as(ModelError, "ONNX Runtime cannot load a part of the model")
            stack.enter_context(loading)
            self._session = library.open_session(opened, options, providers or [CPU])
        self._names = [value.name for value in model.graph.output]
        self.inputs = {value.name for value in self._session.get_inputs()}

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Output name -> array for input name -> array.

        Raises:
            UsageError: it does not run on them.
        """
        with library.errors_as(UsageError, "the model does not run on the calibration data"):
            outputs = self._session.run(self._names, arrays)
        return dict(zip(self._names, outputs, strict=True))


@dataclass
class _Stage:
    """What runs once all layers of lower levels are corrected: `takes` are tensors of earlier
    stages, `gives` those that later ones take and the outputs of `layers`, and `done` what nothing
    takes any more."""

    layers: list[Layer]
    takes: list[str] = field(default_factory=list)
    gives: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    part: Part | None = None


class Stages:
    """A flat model, cut at its layers.

    Args:
        model: the flat ModelProto.
        layers: the layers to correct, with their levels.
        ready: the level from which on a tensor is final, by name.
        folder, providers: as for Part.
    """

    def __init__(
        self,
        model: ModelProto,
        layers: list[Layer],
        ready: Mapping[str, int],
        folder: str | None,
        providers: Sequence | None,
    ):
        self._model, self._folder, self._providers = model, folder, providers
        self._stages = _planned(Flow(model.graph), layers, ready)

    def __len__(self) -> int:
        return len(self._stages)

    def walk(
        self,
        samples: Samples,
        feeds: Mapping[str, np.ndarray],
        visit: Visit,
        step: Callable[[], None],
    ) -> None:
        """Run all stages, and visit each layer once its input is final.

        Args:
            samples: what is fed.
            feeds: name -> array of the inputs that are no data.
            visit: called with every layer and the moments of its output.
            step: called after every batch of a stage.

        Raises:
            UsageError: the model does not run on the samples, or an output is not finite.
        """
        with TemporaryDirectory(prefix="ctonnx-") as folder:
            store = Store(folder)
            corrections: dict[str, Correction] = {}
            for stage in self._stages:
                moments = {id(layer): Moments() for layer in stage.layers}
                for batch in range(samples.batches):
                    arrays = {name: store.get(batch, name) for name in stage.takes}
                    for name in arrays.keys() & corrections.keys():
                        arrays[name] = corrections[name].apply(arrays[name])
                    self._run(stage, batch, arrays, samples, feeds, moments, store)
                    step()
                store.drop(samples.batches, stage.done)
                for layer in stage.layers:
                    found = moments[id(layer)]
                    if not found.count or not found.is_finite:
                        raise UsageError(
                            f"the output of {layer.op} {layer.name} is empty or not finite on the "
                            "calibration data"
                        )
                    correction = visit(layer, found)
                    if correction is not None:
                        corrections.update((use.output, correction) for use in layer.uses)

    def _run(
        self,
        stage: _Stage,
        batch: int,
        arrays: Arrays,
        samples: Samples,
        feeds: Mapping[str, np.ndarray],
        moments: dict[int, Moments],
        store: Store,
    ) -> None:
        """Run a stage on a batch, and keep what it gives."""
        if stage.part is None:
            types = [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
                )
                for name, array in arrays.items()
            ]
            stage.part = Part(cut(self._model, stage.gives, types), self._folder, self._providers)
        wanted = stage.part.inputs
        arrays |= {name: samples.get(batch, name) for name in samples.names & wanted}
        arrays |= {name: array for name, array in feeds.items() if name in wanted}
        outputs = stage.part.run(arrays)
        for layer in stage.layers:
            for use in layer.uses:
                moments[id(layer)].add(outputs[use.output], layer.axis)
        for name in stage.gives:
            if not isinstance(outputs[name], np.ndarray):
                raise ModelError(f"{name!r} is no tensor: the model cannot be calibrated")
            store.put(batch, name, outputs[name])


def _planned(flow: Flow, layers: list[Layer], ready: Mapping[str, int]) -> list[_Stage]:
    outputs = {use.output: layer for layer in layers for use in layer.uses}
    stages = [_Stage([]) for _ in range(1 + max((layer.level for layer in layers), default=-1))]
    for layer in layers:
        stages[layer.level].layers.append(layer)
    needed = flow.needed_for(outputs)
    level_of: dict[str, int] = {}
    for i in needed:
        level = max((ready.get(name, 0) for name in flow.reads[i]), default=0)
        for name in flow.nodes[i].output:
            level_of[name] = outputs[name].level if name in outputs else level
    last: dict[str, int] = {}  # tensor -> the last stage that takes it
    for i in needed:
        level = max(level_of.get(name, 0) for name in flow.nodes[i].output)
        for name in sorted(flow.reads[i] - flow.constants):
            if name in level_of and level_of[name] < level:
                stages[level].takes.append(name)
                last[name] = max(level, last.get(name, 0))
    for stage in stages:
        stage.takes = sorted(set(stage.takes))
    for name, level in level_of.items():
        if name in last or name in outputs:
            stages[level].gives.append(name)
            stages[last.get(name, level)].done.append(name)
    return stages
