"""What `tune` trains, and the result that it writes."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor

from .. import ctu
from ..errors import InputFileError, UsageError
from ..measure import intervals
from ..measure.engine import padded
from ..measure.metrics import Metric, class_indices
from ..model import files, flow
from ..rewriting import params
from ..rewriting.find import Activation
from ..rewriting.params import Values
from ..rewriting.places import Place, group, insert_places
from ..torch.tct import RAW_BETA, pair_shape
from ..transfer.features import batches
from .curvature import Curvature
from .losses import Loss
from .network import Network
from .normalization import check_normalizations
from .result import TunedActivation, Tuning, measured
from .subject import Subject
from .training import Data, History, Schedule, Trainee

# Where the authors' code starts β.
_BETA = 1 / (1 + math.exp(-RAW_BETA))


@dataclass(frozen=True)
class Start:
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
class Task:
    """All that training needs but what is trained."""

    subject: Subject
    data: Data
    outputs: list[str]
    loss: Loss
    metric: Metric
    schedule: Schedule
    device: str
    adapt: bool

    def prepare(self, per: str, patterns: Sequence[str] | None, start: Start) -> Trainee:
        """The network with β and c to train."""
        proto = files.own(self.subject.proto)
        places, _ = insert_places(proto, self.subject.selection, self.subject.own, "op")
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


def result_of(
    task: Task,
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
