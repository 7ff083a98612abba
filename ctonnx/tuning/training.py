"""The training loop: Adam over batches, validation after each epoch, and the state that is kept."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch
from ..data.source import Source
from ..errors import UsageError
from ..measure.engine import padded
from ..measure.metrics import Metric
from ..transfer.features import batches
from .curvature import Curvature
from .losses import Loss
from .network import Network
from .result import Epoch

# Called with the number of steps, None if unknown: a context of an object with
# `update(steps, text)`, or of None.
Progress = Callable[[int | None], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train: the arguments of `tune` with these names."""

    epochs: int = 20
    patience: int = 5
    rate: float = 0.1
    head_rate: float = 1e-3
    micro_batch: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise a UsageError if an option is out of range."""
        for name in ("epochs", "patience"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate", "head_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"{name} must be positive, got {getattr(self, name)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UsageError(f"micro_batch must be at least 1, got {self.micro_batch}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed must lie between 0 and 2**32 - 1, got {self.seed}")


@dataclass(frozen=True)
class Data:
    """Where to train and validate. `labels` gives a batch's labels as the loss takes them."""

    train: Source
    validation: Source | None
    labels: Callable[[Batch, Source], np.ndarray | None]


@dataclass
class History:
    """What happened: a loss for each step, the epochs, the `best` of these, whose state is kept,
    None for the last state, and what stopped the training early, or None."""

    losses: list[float] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    best: Epoch | None = None
    stopped: str | None = None
    # The last state with which the loss was a number, and that of the best epoch.
    good: dict[str, Tensor] | None = field(default=None, repr=False)
    best_state: dict[str, Tensor] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Trainee:
    """What is trained: β and c, None for none; the tensors of a new head by name; and the network,
    with the statistics of batch norm that adapts."""

    network: Network
    curvature: Curvature | None
    head: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {**({} if self.curvature is None else self.curvature.tensors()), **self.head}

    def state(self) -> dict[str, Tensor]:
        """All that training changes, by name."""
        raw = {} if self.curvature is None else self.curvature.state_dict()
        state = {f"curvature.{name}": tensor for name, tensor in raw.items()}
        state |= {f"head.{name}": tensor for name, tensor in self.head.items()}
        for name, pair in self.network.statistics.items():
            state |= {f"{kind}.{name}": t for kind, t in zip(("mean", "var"), pair, strict=True)}
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state that `state` gave."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(state[name])


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


class Saving(Protocol):
    """Saves the state after each epoch, and restores it."""

    def save(
        self, trainee: Trainee, optimizer: torch.optim.Optimizer, history: History
    ) -> None: ...

    def restore(self, trainee: Trainee, optimizer: torch.optim.Optimizer) -> History: ...


def fit(
    trainee: Trainee,
    data: Data,
    loss: Loss,
    metric: Metric,
    schedule: Schedule,
    progress: Progress | None = None,
    saving: Saving | None = None,
) -> History:
    """Train, and leave the best state: that with the least loss on the validation data, or the
    last without these. A loss that is no number stops the training; the state before stays.

    Raises:
        UsageError: the first loss is no number already, or data, loss and model do not fit.
    """
    groups = [{"params": list(trainee.head.values()), "lr": schedule.head_rate}]
    if trainee.curvature is not None:
        groups.append({"params": list(trainee.curvature.parameters()), "lr": schedule.rate})
    optimizer = torch.optim.Adam(groups)
    history = History() if saving is None else saving.restore(trainee, optimizer)
    with progress(_count_steps(data.train, schedule)) if progress else nullcontext() as bar:
        if bar and history.losses:
            bar.update(len(history.losses), "")
        for epoch in range(len(history.epochs) + 1, schedule.epochs + 1):
            if history.stopped:
                break
            data.train.reorder([schedule.seed, epoch])
            mean = _run_epoch(trainee, data, loss, schedule, optimizer, history, bar)
            if history.stopped:
                break
            done = Epoch(epoch, mean)
            if data.validation is not None:
                done = Epoch(epoch, mean, *_validate(trainee, data, loss, metric))
            _add(history, done, trainee, schedule)
            if bar:
                bar.update(0, _shown(done, metric))
            if saving is not None:
                saving.save(trainee, optimizer, history)
    if history.best_state is not None:
        trainee.load(history.best_state)
    return history


def _add(history: History, done: Epoch, trainee: Trainee, schedule: Schedule) -> None:
    """Add an epoch, and keep its state if it is the best."""
    history.epochs.append(done)
    if done.validation_loss is None:
        return
    best = history.best
    least = float("inf") if best is None or best.validation_loss is None else best.validation_loss
    if done.validation_loss < least:
        history.best, history.best_state = done, _copied(trainee.state())
    elif best is not None and done.epoch - best.epoch >= schedule.patience:
        history.stopped = f"the validation loss has not fallen for {schedule.patience} epochs"


def _count_steps(source: Source, schedule: Schedule) -> int | None:
    try:
        return len(source) * schedule.epochs
    except TypeError:  # A generator has no length.
        return None


def _shown(epoch: Epoch, metric: Metric) -> str:
    text = f"loss {epoch.loss:.4g}"
    if epoch.validation_loss is not None:
        text += f", validation loss {epoch.validation_loss:.4g}, {metric.name} {epoch.metric:.4g}"
    return text


def _run_epoch(
    trainee: Trainee,
    data: Data,
    loss: Loss,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer,
    history: History,
    bar: Any,
) -> float:
    """Train on every batch once; gives the mean loss."""
    total, count = 0.0, 0
    for batch in batches(data.train):
        if not len(batch):
            continue
        optimizer.zero_grad()
        state = _copied(trainee.state())
        value = _step(trainee, data, loss, schedule, batch)
        if not np.isfinite(value):
            if history.good is None:
                raise UsageError(
                    f"the loss is {value} at the first step: look for NaN and infinity in the data"
                )
            trainee.load(history.good)
            history.stopped = f"the loss became {value} at step {len(history.losses) + 1}"
            return value
        history.good = state
        optimizer.step()
        history.losses.append(value)
        total, count = total + value * len(batch), count + len(batch)
        if bar:
            bar.update(1, f"loss {value:.4g}")
    if not count:
        raise UsageError("the training data hold no sample")
    return total / count


def _step(trainee: Trainee, data: Data, loss: Loss, schedule: Schedule, batch: Batch) -> float:
    """Add the gradient of a batch's loss, and return that."""
    value = 0.0
    for part in _parts(batch, schedule.micro_batch):
        outputs = _outputs(trainee, part, data.train, training=True)
        share = loss.compute(outputs, data.labels(part, data.train)) * (len(part) / len(batch))
        if share.requires_grad:  # Batch norm may be all that changes.
            share.backward()
        value += share.item()
    return value


def _parts(batch: Batch, size: int | None) -> Iterator[Batch]:
    """The batch in parts of at most `size` samples."""
    for i in range(0, len(batch), size or len(batch)):
        part = slice(i, i + (size or len(batch)))
        labels = None if batch.labels is None else batch.labels[part]
        yield Batch({name: array[part] for name, array in batch.inputs.items()}, labels)


def _outputs(trainee: Trainee, batch: Batch, source: Source, training: bool) -> dict[str, Tensor]:
    outputs = trainee.network.run(padded(batch, source.inputs), trainee.tensors(), training)
    for name, value in outputs.items():
        if not value.ndim or len(value) < len(batch):
            raise UsageError(
                f"output {name!r} is {list(value.shape)} for {len(batch)} samples: it needs a row "
                "per sample"
            )
    return {name: value[: len(batch)] for name, value in outputs.items()}


@torch.no_grad()
def _validate(trainee: Trainee, data: Data, loss: Loss, metric: Metric) -> tuple[float, float]:
    """The mean loss, and the metric, on the validation data."""
    source, total, count, rows = data.validation, 0.0, 0, []
    assert source is not None
    for batch in batches(source):
        if not len(batch):
            continue
        outputs, labels = _outputs(trainee, batch, source, False), data.labels(batch, source)
        total += loss.compute(outputs, labels).item() * len(batch)
        count += len(batch)
        arrays = {name: value.cpu().numpy() for name, value in outputs.items()}
        chosen = arrays if metric.takes_all_outputs else next(iter(arrays.values()))
        rows.append(metric.measure(chosen, labels, None))
    if not count:
        raise UsageError("the validation data hold no sample")
    return total / count, metric.value_of(np.concatenate(rows))
