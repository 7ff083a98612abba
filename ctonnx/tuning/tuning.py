"""Training β and c of an ONNX model, without its training code: `ctonnx.tune`.

The method is T-CT of arXiv 2502.07783: β and c are sigmoids of raw values, which start at 0.8 and
0.5; all weights but those of a new head are frozen, and Adam trains. The rates are those of the
authors' code.
"""

import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor

from .. import ctu
from ..data.images import Transform
from ..data.open import DataOptions, open_source
from ..errors import InputFileError, UsageError, check_choice
from ..measure import engine, intervals
from ..measure.engine import padded
from ..measure.metrics import Metric, class_indices, metric_named
from ..measure.outputs import choose_output
from ..model import files, flow
from ..rewriting import params
from ..rewriting.find import Activation
from ..rewriting.params import Values
from ..rewriting.steer import Selection
from ..torch.tct import RAW_BETA, pair_shape
from ..transfer.features import batches
from ..transfer.heads import find_head
from .curvature import PER, Curvature, Place, group, insert_places
from .losses import Loss, loss_named, with_kind
from .network import Network
from .normalization import check_normalizations
from .result import TunedActivation, Tuning, measured
from .subject import Subject, new_head
from .training import Data, History, Progress, Schedule, Trainee, fit

BATCH_NORM = ("frozen", "adapt")

# Where the authors' code starts β.
_BETA = 1 / (1 + math.exp(-RAW_BETA))


def tune(
    model: str | Path | ModelProto,
    train: Any,
    val: Any = None,
    *,
    per: str = "channel",
    groups: Sequence[str] | None = None,
    beta: float | None = None,
    coeff: float | None = None,
    init: str | Path | Mapping | None = None,
    by_order: bool = False,
    loss: str | Callable = "cross-entropy",
    metric: str | Callable | None = None,
    head: bool = False,
    features: str | None = None,
    batch_norm: str = "frozen",
    epochs: int = 20,
    patience: int = 5,
    rate: float = 0.1,
    head_rate: float = 1e-3,
    micro_batch: int | None = None,
    seed: int = 0,
    device: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
    output_name: str | None = None,
    labels: str | os.PathLike | None = None,
    val_labels: str | os.PathLike | None = None,
    batch_size: int | None = None,
    images: Transform | None = None,
    skip_broken: bool = False,
    output: str | os.PathLike | None = None,
    export_checkpoint: str | os.PathLike | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Tuning:
    """Train β and c of a model's activations on data, and write the steered model.

    All weights stay as they are, but for a new head. With a new head, or batch norm that adapts,
    a second network is trained likewise without β and c: much of the gain may be theirs.

    Args:
        model: a path or an onnx.ModelProto, steered or not. It is not changed. A steered one keeps
            its choice of activations, and starts from its own β and c.
        train, val: as the dataset of `ctonnx.sweep`. With `val` the state of the epoch with the
            least loss there is kept; without it the last.
        per: what has a β and a c of its own: each "channel", "activation" or "stage" (activations
            of one resolution), or the whole "model". Channels are dim 1 of tensors with 4
            dimensions or more, and the last dim of others.
        groups: regular expressions instead: the activations whose path or module the first of them
            matches share a β and a c, and so on.
        beta, coeff: where to start, in [0, 1]; the authors' 0.8 and 0.5 where None.
        init: where single activations start, as the `params` of `ctonnx.patch`: a .pth, .json or
            .npz file, or a dict. Where activations share a β, the mean of the raw values.
        by_order: assign the pairs of a state dict in order, not by name.
        loss: "cross-entropy", "mse", a function, or its name "PKG:FUNCTION", which takes the
            outputs, name -> tensor, and the labels, and returns a tensor of one number.
        metric: as for `ctonnx.sweep`; "accuracy", or "mse" for the loss mse, where None.
        head: put a new linear layer for the data's labels in place of the last one, and train it.
        features: with `head`, the name of the tensor that it reads, as for `ctonnx.probe`.
        batch_norm: "frozen", or "adapt": it uses the batch's statistics in training and updates its
            own, as in PyTorch's training mode.
        epochs: passes over the training data, at most.
        patience: epochs without a smaller validation loss that end the training.
        rate, head_rate: Adam's rates for β and c, and for the head.
        micro_batch: samples to run at once; a batch's gradient is summed over several runs.
        seed: of the order of samples and of the head's first values.
        device: where PyTorch trains, such as "cuda:1"; a GPU where there is one, if None.
        include, exclude: regular expressions searched in the activations' names.
        output_name: the name of the output to train on; if None, as for `ctonnx.sweep`.
        labels, val_labels: the name of the labels' array or column in `train` and in `val`, or the
            path of an .npy file. `val_labels` is as `labels` where None.
        batch_size, images, skip_broken: as for `ctonnx.sweep`.
        output: where to write the model, which then has to be a path.
        export_checkpoint: where to write the raw β and c too: a state dict with the names that the
            authors' code gives them, for models whose nodes name their PyTorch modules.
        force: overwrite what is written.
        progress: called with the number of steps, None if unknown; returns a context manager for an
            object whose `update` is called with the number done since, and a text.

    Returns:
        Tuning.

    Raises:
        UsageError: a wrong argument; data, loss, metric and model do not fit together; an op
            between an activation and the output has no gradient.
        NothingToDo: no activation to train.
        ModelError: the model cannot be read.
        InputFileError: the data cannot be read.
        MissingDependency: PyTorch or another package is missing.
    """
    schedule = Schedule(epochs, patience, rate, head_rate, micro_batch, seed)
    schedule.check()
    check_choice("per", per, PER)
    check_choice("batch_norm", batch_norm, BATCH_NORM)
    if features is not None and not head:
        raise UsageError("features goes with head: it is what a new head reads")
    _check_output(model, output, force)
    if export_checkpoint is not None:
        files.check_output(export_checkpoint, force)
    intervals.quantile(intervals.LEVEL, 1)  # Fail early if scipy is missing.
    start = _Start(
        None if beta is None else ctu.check_unit_interval("beta", beta),
        None if coeff is None else ctu.check_unit_interval("coeff", coeff),
        params.read(init, by_order) if isinstance(init, str | Path) else init,
    )
    chosen_loss = loss_named(loss)
    chosen_metric = metric_named(chosen_loss.metric if metric is None else metric)
    if chosen_metric.needs_original:
        raise UsageError(f"{chosen_metric.name} compares with the original: choose another metric")

    steerable = engine.prepare(model)
    if micro_batch is not None and any(i.shape and i.shape[0] for i in steerable.inputs):
        raise UsageError("the model takes batches of a fixed size: leave out micro_batch")
    options = DataOptions(labels, batch_size, images, skip_broken)
    source = open_source(train, steerable.inputs, options, shuffle=True)
    validation = None
    if val is not None:
        options = replace(options, labels=val_labels or labels)
        validation = open_source(val, steerable.inputs, options)

    subject = Subject.of(model, Selection(None, include, exclude))
    everything = chosen_loss.takes_all_outputs or chosen_metric.takes_all_outputs
    if head:
        names = steerable.measurable if output_name is None else [output_name]
        steerable.named_output(output_name)
        site = find_head(subject.proto, names, features)
        subject.head = new_head(subject.proto, site, source, validation, seed)
        outputs = [site.output]
        subject.notes += subject.head.insert(subject.proto)
    else:
        wanted = None if everything else output_name
        chosen = choose_output(
            steerable, chosen_metric, source, partial(engine.Runner, steerable), wanted
        )
        others = steerable.measurable if everything else []
        outputs = [chosen, *(name for name in others if name != chosen)]
        kind = steerable.endings[chosen].kind
        chosen_loss, chosen_metric = with_kind(chosen_loss, kind), replace(chosen_metric, kind=kind)
    task = _Task(
        subject,
        Data(source, validation, subject.labels),
        outputs,
        chosen_loss,
        chosen_metric,
        schedule,
        device or ("cuda" if torch.cuda.is_available() else "cpu"),
        batch_norm == "adapt",
    )
    trainee = task.prepare(per, groups, start)
    assert trainee.curvature is not None
    if export_checkpoint is not None:
        trainee.curvature.state_of_modules()  # Where that fails it does so before training.
    history = fit(trainee, task.data, task.loss, task.metric, schedule, progress)
    control = None
    if head or task.adapt:
        control = task.prepare_control()
        fit(control, task.data, task.loss, task.metric, schedule, progress)
    result = _result(task, trainee, control, history, per, output, force)
    if export_checkpoint is not None:
        buffer = io.BytesIO()
        torch.save(trainee.curvature.state_of_modules(), buffer)
        files.write(export_checkpoint, buffer.getvalue())
    return result


@dataclass(frozen=True)
class _Start:
    """Where β and c start: for all activations, and for single ones."""

    beta: float | None
    coeff: float | None
    single: Mapping | None

    def of(self, places: Sequence[Place], subject: Subject) -> list[Values | None]:
        """The start of each place; None for the authors'."""
        activations, notes = [place.activation for place in places], subject.notes
        if self.beta is None and self.coeff is None and self.single is None:
            own = subject.own or {}
            return [_own_values(own.get(activation.path)) for activation in activations]
        default = _BETA if self.beta is None else self.beta
        coeff = ctu.COEFF if self.coeff is None else self.coeff
        return list(params.resolve(self.single, default, coeff, activations, notes))


def _own_values(activation: Activation | None) -> Values | None:
    """The β and c of a steered activation; None where they are not known."""
    if activation is None or activation.beta is None or activation.coeff is None:
        return None
    pair = (np.asarray(value, np.float32) for value in (activation.beta, activation.coeff))
    return Values(*pair, common=False)


@dataclass(frozen=True)
class _Task:
    """All that training needs but what is trained."""

    subject: Subject
    data: Data
    outputs: list[str]
    loss: Loss
    metric: Metric
    schedule: Schedule
    device: str
    adapt: bool

    def prepare(self, per: str, patterns: Sequence[str] | None, start: _Start) -> Trainee:
        """The network with β and c to train."""
        proto = files.own(self.subject.proto)
        places = insert_places(proto, self.subject.selection, self.subject.chosen)
        names = {name for place in places for name in (place.beta, place.coeff)}
        network, head = self._network(proto, names)
        count = len(places)
        places = [place for place in places if place.beta in network.reaching]
        if len(places) < count:
            self.subject.notes.append(
                f"{count - len(places)} activations are not in front of the output "
                f"{self.outputs[0]!r}: they stay as they are"
            )
        fixed = torch.tensor(0.5, device=self.device, dtype=torch.float32)
        self._run_once(network, {**dict.fromkeys(names, fixed), **head})
        shapes = [_shape_of(place, network.shapes[place.beta], per) for place in places]
        groups = group(places, shapes, per, patterns)
        per_channel = per == "channel" and patterns is None
        starts = start.of(places, self.subject)
        curvature = Curvature(places, groups, shapes, per_channel, starts).to(self.device)
        trainee = Trainee(network, curvature, head)
        # What cannot be written is refused before training.
        self.subject.changed(files.own(self.subject.model), trainee)
        return trainee

    def prepare_control(self) -> Trainee:
        """The network without β and c: its head and batch norm alone are trained."""
        proto = files.own(self.subject.proto)
        network, head = self._network(proto, set())
        self._run_once(network, head)
        return Trainee(network, None, head)

    def _network(self, proto: ModelProto, names: set[str]) -> tuple[Network, dict[str, Tensor]]:
        """The differentiable run of a model, and the tensors of its new head."""
        head = {}
        if self.subject.head is not None:
            head = self.subject.head.tensors(proto, self.device)
        part = flow.cut(proto, self.outputs)
        network = Network(part, self.outputs, {*names, *head}, self.device, adapt=self.adapt)
        return network, head

    def _run_once(self, network: Network, trained: Mapping[str, Tensor]) -> None:
        """Run a first batch, which tells shapes and checks the labels."""
        source = self.data.train
        batch = next((batch for batch in batches(source) if len(batch)), None)
        if batch is None:
            raise InputFileError("the training data hold no sample that can be read")
        with torch.no_grad():
            outputs = network.run(padded(batch, source.inputs), trained)
            cut = {name: value[: len(batch)] for name, value in outputs.items()}
            self.loss.compute(cut, self.subject.labels(batch, source))
        check_normalizations(self.subject.proto, network.statistics)
        labels, scores = source.all_labels(), next(iter(outputs.values()))
        if self.loss.name == "cross-entropy" and self.subject.head is None and scores.ndim == 2:
            class_indices(
                np.empty(0) if labels is None else labels, scores.shape[1], self.loss.name
            )


def _shape_of(place: Place, shapes: set[tuple[int, ...]], per: str) -> tuple[int, ...]:
    """The shape of an activation's tensor in the first batch."""
    if per == "channel" and len({tuple(pair_shape(shape)) for shape in shapes}) > 1:
        raise UsageError(
            f"{place.activation.path} is used with several shapes: tune per activation, or leave "
            "it out with --exclude"
        )
    return min(shapes)


def _check_output(model: Any, output: Any, force: bool) -> None:
    if output is None:
        return
    if not isinstance(model, str | Path):
        raise UsageError(
            "output needs a model that is a path: save the model of the result instead"
        )
    files.check_output(output, force)


def _result(
    task: _Task,
    trainee: Trainee,
    control: Trainee | None,
    history: History,
    per: str,
    output: str | os.PathLike | None,
    force: bool,
) -> Tuning:
    """Write the model, and measure it and what it is compared with in plain ONNX Runtime."""
    subject, data, metric = task.subject, task.data, task.metric
    source = data.train if data.validation is None else data.validation

    def measure(opened: Path | bytes) -> np.ndarray:
        return measured(opened, source, metric, task.outputs, data.labels)

    def measure_copy(proto: ModelProto) -> np.ndarray:
        with subject.opened(proto) as opened:
            return measure(opened)

    original = None if subject.head is not None else measure_copy(subject.original())
    reference = original
    if control is not None:
        other = files.own(subject.model)
        subject.changed(other, control)
        reference = measure_copy(other)
    assert reference is not None
    if output is not None and not isinstance(subject.model, ModelProto):
        with files.Transaction(subject.model, output, force) as edit:
            proto, notes = edit.model, subject.changed(edit.model, trainee)
            written = measure(edit.stage())
    else:
        proto = files.own(subject.model)
        notes = subject.changed(proto, trainee)
        written = measure_copy(proto)
    notes = [*subject.notes, *data.train.notes, *notes]
    if data.validation is None:
        notes.append("measured on the training data: give others with --val")
    if history.stopped:
        notes.append(f"stopped early: {history.stopped}")
    curvature = trainee.curvature
    assert curvature is not None
    gain, low, high = intervals.gain(metric, written, reference)
    return Tuning(
        metric=metric.name,
        written=metric.value_of(written),
        reference=metric.value_of(reference),
        gain=gain,
        gain_low=low,
        gain_high=high,
        original=None if original is None else metric.value_of(original),
        controlled=control is not None,
        samples=len(written),
        losses=history.losses,
        epochs=history.epochs,
        best=history.best,
        stopped=history.stopped,
        activations=list(_learned(curvature)),
        parameters=sum(parameter.numel() for parameter in curvature.parameters()),
        per=per,
        classes=None if subject.head is None else subject.head.classes,
        model=proto,
        notes=list(dict.fromkeys(notes)),
    )


def _learned(curvature: Curvature) -> Iterator[TunedActivation]:
    values = curvature.values()
    for each in curvature.groups:
        for i in each.members:
            place = curvature.places[i]
            beta, coeff = values[place.index]
            yield TunedActivation(
                place.activation.path,
                each.name,
                beta.size,
                float(beta.mean()),
                float(beta.std()),
                float(coeff.mean()),
                float(coeff.std()),
            )
