"""Which output of a model a metric measures, and what that output holds."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ..data.source import Source
from ..errors import UsageError
from ..model import endings
from .engine import Runner, Steerable
from .metrics import Metric, smallest


def choose_output(
    steerable: Steerable,
    metric: Metric,
    source: Source,
    runner: Callable[[], Runner],
    wanted: str | None,
) -> str:
    """Choose the output to measure.

    Of several outputs of floating type that is one for which the metric can be computed on the
    first batch. Of several such ones it is one with a score for each class of the data, then one
    of probabilities, then the first.

    Args:
        steerable: the model.
        metric: what to measure.
        source: the data.
        runner: opens the model; not called unless needed.
        wanted: the name that the user chose, or None.

    Raises:
        UsageError: there is no such output, the metric takes all, or the metric fits none.
    """
    names = steerable.measurable
    if wanted is not None and metric.takes_all_outputs:
        raise UsageError(f"{metric.name} takes all outputs: leave out output-name")
    named = steerable.named_output(wanted)
    if named is not None:
        return named
    if len(names) == 1 or metric.takes_all_outputs:
        return names[0]
    batch = source.batch(0)
    if batch is None or not len(batch):
        return names[0]
    widths, failures, opened = {}, [], runner()
    for name in names:
        try:
            (outputs,) = opened.outputs(batch, [(1.0, None)], [name])
            metric.measure(outputs[name], batch.labels, outputs[name])
            widths[name] = outputs[name].shape[1:2]
        except UsageError as error:
            failures.append(error)
    if not widths:
        raise failures[0]
    labels = source.all_labels()
    classes = _count_classes(source, batch.labels if labels is None else labels)

    def rank(name: str) -> tuple[bool, bool]:
        is_logits = steerable.endings[name].kind == endings.LOGITS
        return widths[name] != (classes,), is_logits

    return min(widths, key=rank)


def _count_classes(source: Source, labels: np.ndarray | None) -> int | None:
    """How many classes the data have; None if the labels are no indices of classes."""
    if source.classes:
        return len(source.classes)
    if labels is None or labels.dtype.kind not in "iu" or not labels.size:
        return None
    return int(labels.max()) + 1


def notes_on_output(steerable: Steerable, metric: Metric) -> Iterator[str]:
    """Lines on which output is measured, if there are several, and on what it holds."""
    names, output = steerable.measurable, steerable.output
    if metric.takes_all_outputs:
        return
    if len(names) > 1:
        yield f"measures the output {output!r} of {', '.join(names)}: --output-name chooses another"
    if metric.takes_kind:
        ending = steerable.endings[output]
        line = f"output {output!r} holds {ending.kind}"
        if ending.kind == endings.PROBABILITIES:
            dtype = steerable.dtypes[output]
            line += f" (of a {ending.op}): 0 counts as {smallest(dtype):.2g}"
        yield line


def notes_on_zeros(
    steerable: Steerable, metric: Metric, statistics: Iterable[np.ndarray]
) -> Iterator[str]:
    """A line on how many samples of an nll have a probability of 0 for their label.

    Args:
        steerable: the model.
        metric: the metric.
        statistics: the statistics (samples, 1) of each point.
    """
    if metric.name != "nll" or metric.kind != endings.PROBABILITIES:
        return
    # Less than what all probabilities are divided by, their sum.
    limit = -np.log(smallest(steerable.dtypes[steerable.output])) - 1
    counts = {(int((array >= limit).sum()), len(array)) for array in statistics}
    zeros, samples = max(counts, default=(0, 0))
    if zeros:
        yield f"the label has a probability of 0 in up to {zeros} of {samples} samples at a point"
