"""Training β and c of an ONNX model, without its training code: `ctonnx.tune`.

The method is T-CT of arXiv 2502.07783: β and c are sigmoids of raw values, which start at 0.8 and
0.5; all weights but those of a new head are frozen, and Adam trains. The rates are those of the
authors' code.
"""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from onnx import ModelProto

from .. import ctu
from ..data.images import Transform
from ..data.open import DataOptions, open_source
from ..errors import UsageError, check_choice, first_line
from ..measure import engine, intervals
from ..measure.metrics import metric_named
from ..measure.outputs import choose_output
from ..model import files
from ..optional import require
from ..rewriting import params
from ..rewriting.steer import Selection
from ..transfer.heads import find_head
from .result import Tuning

PER = ("channel", "activation", "stage", "model")
BATCH_NORM = ("frozen", "adapt")


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
    resume: bool = False,
    progress: Callable[[int | None], AbstractContextManager[Any]] | None = None,
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
        output: where to write the model, which then has to be a path. The state of the training is
            saved in OUTPUT.progress until it is written.
        export_checkpoint: where to write the raw β and c too: a state dict with the names that the
            authors' code gives them, for models whose nodes name their PyTorch modules.
        force: overwrite what is written.
        resume: go on from OUTPUT.progress, which must be of the same model, data and options;
            functions are known by their names alone.
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
    torch = require("torch")
    from .losses import loss_named, with_kind
    from .saved import Saved, progress_path
    from .subject import Subject, new_head
    from .task import Start, Task, result_of
    from .training import Data, Schedule, fit

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # The latter where PyTorch has no CUDA.
        raise UsageError(f"device {device!r} cannot be used: {first_line(error)}") from None
    schedule = Schedule(epochs, patience, rate, head_rate, micro_batch, seed)
    schedule.check()
    check_choice("per", per, PER)
    check_choice("batch_norm", batch_norm, BATCH_NORM)
    if features is not None and not head:
        raise UsageError("features goes with head: it is what a new head reads")
    if by_order and not isinstance(init, str | Path):
        raise UsageError("by_order goes with the path of a T-CT state dict as init")
    _check_output(model, output, force)
    if resume and output is None:
        raise UsageError("resume needs an output: the state is saved beside it")
    if export_checkpoint is not None:
        files.check_output(export_checkpoint, force)
    intervals.quantile(intervals.LEVEL, 1)  # Fail early if scipy is missing.
    start = Start(
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
    source = open_source(train, steerable.inputs, options, seed=0)
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
    task = Task(
        subject,
        Data(source, validation, subject.labels),
        outputs,
        chosen_loss,
        chosen_metric,
        schedule,
        device,
        batch_norm == "adapt",
    )
    trainee = task.prepare(per, groups, start)
    assert trainee.curvature is not None
    if export_checkpoint is not None:
        trainee.curvature.state_of_modules()  # Where that fails it does so before training.
    saved = None
    if output is not None:
        options = (per, groups, loss, metric, head, features, batch_norm, include, exclude, seed)
        rates = (beta, coeff, init, rate, head_rate, micro_batch, epochs, patience)
        known = [getattr(value, "__name__", str(value)) for value in (*options, *rates)]
        sources = [source] if validation is None else [source, validation]
        identity = [*steerable.identity(), *(each.identity() for each in sources)]
        saved = Saved(progress_path(output), [*map(str, identity), *known], resume)
    history = fit(trainee, task.data, task.loss, task.metric, schedule, progress, saved)
    control = None
    if head or task.adapt:
        control = task.prepare_control()
        fit(control, task.data, task.loss, task.metric, schedule, progress)
    result = result_of(task, trainee, control, history, per, output, force)
    if saved is not None:
        saved.remove()
    if export_checkpoint is not None:
        buffer = io.BytesIO()
        torch.save(trainee.curvature.state_of_modules(), buffer)
        files.write(export_checkpoint, buffer.getvalue())
    return result


def _check_output(model: Any, output: Any, force: bool) -> None:
    if output is None:
        return
    if not isinstance(model, str | Path):
        raise UsageError(
            "output needs a model that is a path: save the model of the result instead"
        )
    files.check_output(output, force)
