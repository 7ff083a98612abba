"""The result of tuning, and measuring models in plain ONNX Runtime."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from ..data.batches import Batch
from ..data.source import Source
from ..errors import ModelError
from ..measure.engine import padded
from ..measure.metrics import Metric
from ..measure.results import without_nan
from ..ort import library, runs
from ..transfer.features import batches
from ..transfer.fit import Label


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data: the mean `loss` of its steps, and afterwards the loss and
    the metric on the validation data, None where there are none."""

    epoch: int
    loss: float
    validation_loss: float | None = None
    metric: float | None = None


@dataclass(frozen=True)
class TunedActivation:
    """What an activation learned: `beta` and `coeff` are means over its channels, with their
    standard deviations, and `values` counts the pairs."""

    name: str
    group: str
    values: int
    beta: float
    beta_deviation: float
    coeff: float
    coeff_deviation: float


@dataclass(frozen=True)
class Tuning:
    """The result.

    `written` is the metric of `model`, the ModelProto with the trained β and c, run by plain ONNX
    Runtime on the validation data, or on the training data where there are none. `reference` is
    that of the model without steering; with a new head or batch norm that adapts, and then it is
    `controlled`, of one that was trained likewise without β and c, so that the difference is
    theirs. `gain` is by how much
    `written` is better, and `gain_low` to `gain_high` is its 95 % interval, paired over the
    samples. `original` is the metric of the model before training, None with a new head.

    `losses` has a loss for each step, `epochs` an Epoch for each pass over the data, `best` is the
    Epoch whose state is written, None for the last state, and `stopped` says what ended the
    training early, or is None. `activations` has a TunedActivation for each activation that was
    trained. `parameters` counts the numbers that were trained, without the head's, and `classes`
    are the labels in order of a new head's output, or None. `notes` are lines that a user should
    see.
    """

    metric: str
    written: float
    reference: float
    gain: float
    gain_low: float
    gain_high: float
    original: float | None
    controlled: bool
    samples: int
    losses: list[float]
    epochs: list[Epoch]
    best: Epoch | None
    stopped: str | None
    activations: list[TunedActivation]
    parameters: int
    per: str
    classes: list[Label] | None
    model: ModelProto = field(repr=False)
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The result as a dict that JSON can hold, without the model."""
        fields = asdict(replace(self, model=None))
        return {name: without_nan(value) for name, value in fields.items() if name != "model"}


def measured(
    model: Path | bytes,
    source: Source,
    metric: Metric,
    outputs: Sequence[str],
    labels: Callable[[Batch, Source], np.ndarray | None],
) -> np.ndarray:
    """The metric's statistics, (samples, k), of a model in plain ONNX Runtime; with the op library
    where the model holds no fallback.

    Args:
        outputs: the outputs to measure: the first, or all where the metric takes all.

    Raises:
        ModelError: ONNX Runtime does not load or run the model.
        UsageError: the metric does not fit.
    """
    try:
        opened = runs.Model(model)
    except ModelError:
        if not library.has_library():
            raise
        opened = runs.Model(model, library=True)
    rows = []
    for batch in batches(source):
        if not len(batch):
            continue
        arrays = opened.run(padded(batch, source.inputs))
        kept = {name: arrays[name][: len(batch)] for name in outputs}
        chosen = kept if metric.takes_all_outputs else kept[outputs[0]]
        rows.append(metric.measure(chosen, labels(batch, source), None))
    return np.concatenate(rows)
