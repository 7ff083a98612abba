"""Judging outputs that change in steps only: a one-hot, an argmax, what is rounded.

One run of such a model tells little, as with other weights it would mostly give the same. But
other weights move the steps: so both runs must agree on both sides of some.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise

import numpy as np

from ..errors import CtonnxError
from .compare import TELLING, Comparison
from .runs import LARGE, MOVES, TWENTIETH, Arrays, Compute, Trial, change, scale

# The steps that an output must have, and between how many random inputs they are looked for.
_STEPS, _DRAWS = 8, 65

# How often the way between two inputs, of which one may be 1000 times the other, is halved.
_HALVINGS = 16

# From outputs of two runs to their comparisons.
Check = Callable[[Arrays, Arrays], list[Comparison]]


@dataclass(frozen=True)
class _Step:
    """Inputs on both sides of a step of an output, with what is expected of it, and its height."""

    sides: list[tuple[Arrays, Arrays]]
    height: float


class Steps:
    """Compares runs on both sides of the steps of outputs.

    Args:
        trial: of the model whose steps are looked for.
        expected: gives the expected outputs for inputs.
        names: those of the outputs that depend on inputs.
    """

    def __init__(self, trial: Trial, expected: Compute, names: Collection[str]):
        self._trial, self._expected, self._names = trial, expected, names
        self._found: dict[str, list[_Step]] = {}

    def judge(self, comparisons: list[Comparison], run: Compute, check: Check) -> list[Comparison]:
        """The comparisons, those of outputs that change in steps judged beside the steps too.

        What is inconclusive passes where it agrees on both sides of 8 steps, each larger than 4
        times the differences there. What differs there does not pass: it is inconclusive where
        the runs differ by as much elsewhere, as those of a quantized model may do.

        Args:
            comparisons: of outputs of `run` on the trial's inputs.
            check: compares outputs without regard to how they respond.
        """
        return [self._judge(one, run, check) for one in comparisons]

    def _judge(self, one: Comparison, run: Compute, check: Check) -> Comparison:
        stepwise = one.inconclusive or (one.ok and one.name in self._trial.stepwise)
        if one.name not in self._names or not stepwise:
            return one
        telling = 0
        for step in self._steps(one.name):
            largest = 0.0
            for inputs, expected in step.sides:
                (result,) = check(expected, _only(one.name, run(inputs)))
                if not result.ok:
                    reason = f"{result.reason}, beside a step"
                    if step.height > TELLING * one.max_abs:
                        return replace(result, reason=reason)
                    reason = f"is inconclusive: {reason}"
                    return replace(one, ok=False, reason=reason, inconclusive=True)
                largest = max(largest, result.max_abs)
            telling += step.height > TELLING * largest
        if one.inconclusive and telling >= _STEPS:
            return replace(one, ok=True, reason=None, inconclusive=False)
        return one

    def _steps(self, name: str) -> list[_Step]:
        if name not in self._found:
            self._found[name] = list(islice(self._look_for(name), _STEPS))
        return self._found[name]

    def _look_for(self, name: str) -> Iterator[_Step]:
        """Yield steps of an output between random inputs."""
        for one, other in pairwise(self._drawn()):
            with suppress(CtonnxError):  # Inputs in between need not be such that a run takes.
                sides = self._sides(name, one, other)
                if sides is None:
                    continue
                below, above = (self._trial.run(side).get(name) for side in sides)
                if below is None or not _differ(below, above):
                    continue
                expected = [(side, _only(name, self._expected(side))) for side in sides]
                if all(np.size(outputs.get(name, ())) for _, outputs in expected):
                    yield _Step(expected, change(below, above))

    def _drawn(self) -> Iterator[tuple[Arrays, Arrays]]:
        """Random inputs, and the outputs for them."""
        for seed in range(_DRAWS if self._trial.floats else 0):
            inputs = self._trial.draw(seed)
            with suppress(CtonnxError):
                yield inputs, self._trial.run(inputs)

    def _sides(
        self, name: str, one: tuple[Arrays, Arrays], other: tuple[Arrays, Arrays]
    ) -> tuple[Arrays, Arrays] | None:
        """Inputs on both sides of the first step between two inputs; None where there is none.

        Args:
            one, other: inputs and their outputs.
        """
        (start, outputs), (end, others) = one, other
        before = outputs.get(name)
        if before is None or not _differ(before, others.get(name)):
            return None
        ways = {n: end[n].astype(np.float64) - start[n] for n in self._trial.floats}

        def at(part, beyond=0.0):
            """Inputs a part of the way, and `beyond` by that of their largest value."""
            moved = {}
            for n, way in ways.items():
                value = start[n] + part * way
                value += beyond * scale(value) / (scale(way) or 1.0) * way
                moved[n] = np.asarray(value, start[n].dtype)
            return {**start, **moved}

        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if _differ(before, self._trial.run(at(middle)).get(name)):
                high = middle
            else:
                low = middle
        return at(low, -TWENTIETH / 2), at(high, TWENTIETH / 2)


def _only(name: str, outputs: Arrays) -> Arrays:
    return {name: outputs[name]} if name in outputs else {}


def _differ(before: np.ndarray, after: np.ndarray | None) -> bool:
    """Whether an output changes by as much as counts as a response."""
    if after is None:
        return True
    largest = max(scale(before), scale(after))
    return largest > LARGE and change(before, after) > MOVES * largest
