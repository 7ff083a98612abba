"""Sweeping: the numbers of bare runs, searches, interruption, what is written."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import DIGITS, parsed

import ctonnx
from ctonnx.cli.sweep import verdict
from ctonnx.data.open import open_source
from ctonnx.errors import CtonnxError, InputFileError, ModelError, NothingToDo, UsageError
from ctonnx.measure import engine, intervals, journal, metrics, racing, results, sweeping

pytest.importorskip("sklearn")
MODEL, DATA = str(DIGITS / "digits.onnx"), str(DIGITS / "digits_test.npz")
HELD = dict(np.load(DATA))
BETAS = [0.6, 0.8, 1.0]


def accuracies(betas, coeff=0.5):
    """Of models with each beta baked in, run as a whole."""
    values = []
    for beta in betas:
        session = ctonnx.session(ctonnx.patch(onnx.load(MODEL), beta, coeff))
        (logits,) = session.run(None, {"image": HELD["image"]})
        values.append((logits.argmax(1) == HELD["label"]).mean())
    return values


def test_points_are_those_of_baked_models():
    result = ctonnx.sweep(MODEL, DATA, "0.6:1:0.2")
    assert [point.beta for point in result.points] == BETAS
    assert [point.value for point in result.points] == pytest.approx(accuracies(BETAS), abs=0)
    assert result.best is result.original is result.points[-1]
    first = result.points[0]
    assert first.gain == pytest.approx(first.value - result.original.value)
    assert first.error == pytest.approx(np.sqrt(first.value * (1 - first.value) / 539))
    assert first.gain_low < first.gain < first.gain_high
    assert first.samples == 540


def steered(**options):
    return ctonnx.patch(onnx.load(MODEL), 0.9, **options)


@pytest.mark.parametrize(
    "model",
    [
        lambda: onnx.load(MODEL),
        steered,
        lambda: steered(beta_as="input"),
        lambda: steered(beta_as="required-input"),
        lambda: steered(params={"node_relu": [0.5] * 16, "node_relu_3": 0.7}),
        lambda: steered(lowering="op"),
        lambda: steered(lowering="primitives", beta_as="input"),
    ],
    ids=["original", "baked", "input", "required", "per activation", "op", "primitives"],
)
def test_a_model_may_be_steered_already(model):
    result = ctonnx.sweep(model(), (HELD["image"][:200], HELD["label"][:200]), BETAS, "nll")
    plain = ctonnx.sweep(MODEL, (HELD["image"][:200], HELD["label"][:200]), BETAS, "nll")
    values = [[p.value for p in r.points] for r in (result, plain)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_sessions_are_not_opened_for_points(monkeypatch):
    opened, before = [], onnxruntime.InferenceSession

    class Counted(before):
        def __init__(self, *arguments, **options):
            opened.append(1)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Counted)
    ctonnx.sweep(MODEL, DATA, "0.9", batch_size=540)
    few, opened[:] = len(opened), []
    ctonnx.sweep(MODEL, DATA, "0.7:1:0.05", coeffs="0.3,0.5")
    # More than one where layouts are compared: never more for more points.
    assert 1 <= len(opened) == few <= 3


def test_coeff_is_swept_too():
    result = ctonnx.sweep(MODEL, DATA, "0.7,0.8", coeffs=[0.2, 0.5])
    assert [(p.beta, p.coeff) for p in result.points] == [
        (0.7, 0.2),
        (0.8, 0.2),
        (0.7, 0.5),
        (0.8, 0.5),
        (1.0, 0.5),
    ]
    values = [p.value for p in result.points]
    assert values[:2] == accuracies([0.7, 0.8], 0.2)
    assert values[2:] == accuracies([0.7, 0.8, 1.0], 0.5)
    assert values[:2] != values[2:4]


def test_fixed_batches_external_data_and_several_outputs(tmp_path):
    """The last batch is filled up; weights stay beside the model, and nothing is left there."""
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[4, 3] x) => (int64[4] k, float[4, 3] y)
        <float[3] w = {1.0, -2.0, 3.0}>
        { z = Mul(x, w) y = Relu(z) k = ArgMax<axis = 1, keepdims = 0>(y) }"""
    )
    # External are raw data alone.
    (weight,) = model.graph.initializer
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight), "w"))
    onnx.save(
        model,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        size_threshold=0,
        location="w",
    )
    x = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    y = np.maximum(x * [1, -2, 3], 0)
    before = sorted(os.listdir(tmp_path))
    assert before == ["m.onnx", "w"]
    result = ctonnx.sweep(tmp_path / "m.onnx", (x, y), [0.5], "mae")
    assert sorted(os.listdir(tmp_path)) == before
    assert (result.best.beta, result.original.samples) == (1.0, 10)
    assert result.original.value == pytest.approx(0, abs=1e-6)
    from ctonnx.ctu import ctu

    expected = np.abs(ctu(x * np.array([1, -2, 3]), 0.5) - y).mean()
    assert result.points[0].value == pytest.approx(expected, rel=1e-5)


def test_a_constant_metric_says_so():
    result = ctonnx.sweep(MODEL, DATA, [0.999, 0.9995], metric=lambda outputs, labels: labels * 1.0)
    assert "at every point: none is better than the original" in result.notes[-1]
    assert result.best is result.original


def test_equals_go_to_the_nearest_to_the_original():
    result = ctonnx.sweep(
        MODEL, DATA, BETAS, lambda outputs, labels: (outputs["logits"][:, 0] > 1e9) * 1.0
    )
    assert result.best is result.original


class Refilled:
    """Batches in the same two arrays each time, by index or, as a function, in turn."""

    def __init__(self):
        self.image, self.label = HELD["image"][:60].copy(), HELD["label"][:60].copy()

    def __len__(self):
        return 9

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError
        rows = slice(60 * i, 60 * (i + 1))
        self.image[:], self.label[:] = HELD["image"][rows], HELD["label"][rows]
        return self.image, self.label


@pytest.mark.parametrize("factory", [Refilled, lambda: iter(Refilled())])
def test_a_batch_in_arrays_that_are_refilled(factory):
    """The next batch is read while one is measured."""
    result = ctonnx.sweep(MODEL, factory, BETAS)
    assert [point.value for point in result.points] == accuracies(BETAS)


def test_a_metric_may_change_its_labels():
    def hits(outputs, labels):
        labels -= outputs["logits"].argmax(1)
        return labels == 0

    result = ctonnx.sweep(MODEL, Refilled, BETAS, hits)
    assert [point.value for point in result.points] == accuracies(BETAS)


def test_grid_syntax():
    assert sweeping.grid("beta", "0.7:1.0:0.1") == [0.7, 0.8, 0.9, 1.0]
    assert sweeping.grid("beta", "0.5,0.7:0.9:0.1") == [0.5, 0.7, 0.8, 0.9]
    assert len(sweeping.grid("beta", "0.7:1.0:0.01")) == 31
    assert sweeping.grid("beta", np.array([0.9, 0.5, 0.9])) == [0.5, 0.9]
    assert sweeping.grid("beta", 0.9) == [0.9]
    for wrong, line in [
        ("", "'' is neither a number nor FIRST:LAST:STEP"),
        ("0.7:1.0", "'0.7:1.0' is neither"),
        ("0.7:1.0:0", "must ascend"),
        ("1:0.7:0.1", "must ascend"),
        ("0.5,1.5", "beta must lie in [0, 1], got 1.5"),
        ("nan", "beta must lie in [0, 1]"),
        ("0:1:1e-9", "more than 10000 values"),
        ([], "holds no values"),
    ]:
        with pytest.raises(UsageError) as caught:
            sweeping.grid("beta", wrong)
        assert line in str(caught.value)


# --- racing


def synthetic(seed, accuracy):
    """Scores (points, samples) over β with a peak somewhere, and the βs, the original first.

    A sample's score moves slowly with β, as it does in a network: a Gaussian process along β beside
    what is common to all. With `accuracy` it is 1 where the process lies below a threshold.
    """
    rng = np.random.default_rng(seed)
    betas = np.linspace(1.0, 0.7, 31)
    peak, width, height = rng.uniform(0.7, 1), rng.uniform(0.05, 0.2), rng.uniform(0.02, 0.1)
    curve = rng.uniform(0.6, 0.95) - height * np.minimum(((betas - peak) / width) ** 2, 6)
    reach = rng.uniform(0.05, 0.3)
    near = np.exp(-0.5 * ((betas[:, None] - betas) / reach) ** 2)
    samples = int(rng.choice([2000, 5000]))
    root = np.linalg.cholesky(0.85 + 0.15 * near + 1e-9 * np.eye(31))
    process = root @ rng.normal(size=(31, samples))
    if not accuracy:
        return curve[:, None] - 0.2 * np.exp(0.8 * process), betas
    ordered = np.sort(rng.normal(size=100_000))
    threshold = ordered[(np.clip(curve, 0.02, 0.995) * 100_000).astype(int)]
    return (process < threshold[:, None]).astype(float), betas


@pytest.mark.parametrize("accuracy", [True, False])
def test_racing_finds_the_grids_best_with_few_passes(accuracy):
    """On 20 problems: the best, or one not significantly worse, and within what is stated."""
    metric, found, bounds = metrics.Metric("score", None, span=1.0 if accuracy else None), 0, []
    for seed in range(20):
        scores, betas = synthetic(seed, accuracy)
        batches, runs = -(-scores.shape[1] // 32), []
        seen = np.zeros(31, int)

        def evaluate(span, points, seen=seen, runs=runs):
            assert (seen[points] == span.start).all()
            seen[points] = span.stop
            runs.append(len(span) * len(points))

        outcome = racing.race(
            evaluate,
            lambda p, end, s=scores: s[p, : 32 * end, None],
            metric,
            31,
            batches,
            1 - betas,
            0.95,
        )
        values = scores.mean(1)
        best = int(values.argmax())
        difference, error, _ = intervals.paired_difference(
            metric, scores[best][:, None], scores[outcome.best][:, None]
        )
        found += (
            difference <= 1.96 * error and values[best] - values[outcome.best] <= outcome.within
        )
        bounds.append(outcome.within)
        assert outcome.passes == sum(runs)
        assert outcome.passes <= 0.3 * outcome.grid_passes
    assert found >= 19
    # What is stated says something.
    assert np.median(bounds) < 0.01


@pytest.mark.parametrize("span", [1.0, None])
def test_racing_where_rare_samples_decide(span):
    """With a known span what is stated holds; without, it is stated to be approximate."""
    metric, held, betas = metrics.Metric("score", None, span=span), 0, np.linspace(1, 0.7, 11)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        hard = rng.random(4000) < 0.003
        if span:
            scores = (rng.random(4000) < np.linspace(0.9, 0.895, 11)[:, None]) * 1.0
            scores[:, hard] = (np.arange(11) > 7)[:, None]
        else:
            spread = np.exp(0.5 * rng.normal(size=4000))
            scores = -(0.3 + 0.01 * np.arange(11))[:, None] * spread
            scores[:, hard] -= np.where(np.arange(11) > 7, 0.5, 20)[:, None]
        outcome = racing.race(
            lambda *_: None,
            lambda p, end, s=scores: s[p, : 32 * end, None],
            metric,
            11,
            125,
            1 - betas,
            0.95,
        )
        values = scores.mean(1)
        held += values.max() - values[outcome.best] <= outcome.within
        assert outcome.approximate == (span is None)
    assert held >= (38 if span else 0)


def test_racing_on_batches():
    """Of a list they are taken in a random order; else nothing is stated of the others."""
    batches = [(HELD["image"][i::9], HELD["label"][i::9]) for i in range(9)]

    class Sized:
        def __len__(self):
            return 9

        def __iter__(self):
            return iter(batches)

    inputs = engine.prepare(MODEL).inputs
    source = open_source(lambda: batches, inputs, seed=0)
    order = [
        next(j for j in range(9) if np.array_equal(batches[j][1], source.batch(i).labels))
        for i in range(9)
    ]
    assert sorted(order) == list(range(9)) != order
    assert source.batch(9) is None
    race = ctonnx.sweep(MODEL, lambda: batches, BETAS, "accuracy", search="racing").race
    assert (race.confidence, race.approximate) == (0.95, True)
    result = ctonnx.sweep(MODEL, Sized, BETAS, "accuracy", search="racing")
    assert (result.race.confidence, result.document()["race"]["within"]) == (None, None)
    assert "on the first batches, which tell nothing certain of the others" in verdict(result)


def test_racing_on_a_model():
    grid = ctonnx.sweep(MODEL, DATA, "0.5:1:0.02", "nll", batch_size=10)
    race = ctonnx.sweep(MODEL, DATA, "0.5:1:0.02", "nll", batch_size=10, search="racing")
    assert race.race.passes <= 0.3 * race.race.grid_passes
    values = {point.beta: point.value for point in grid.points}
    assert values[race.best.beta] - values[grid.best.beta] <= race.race.within
    assert race.best.beta > 0.8
    worst = race.points[0]
    assert (worst.beta, worst.samples < race.best.samples) == (0.5, True)
    document = race.document()["race"]
    assert document["confidence"] == 0.95
    assert document["left"] >= 1


def test_racing_keeps_what_it_cannot_tell_apart():
    """Equal points all stay, and the original is taken."""
    scores = np.random.default_rng(0).normal(size=(1, 640, 1)).repeat(5, 0)
    seen = {}
    outcome = racing.race(
        lambda span, points: seen.update(dict.fromkeys(points, span.stop)),
        lambda p, end: scores[p, : 32 * end],
        metrics.Metric("score", None),
        5,
        20,
        np.arange(5.0),
    )
    assert (outcome.best, len(outcome.left)) == (0, 5)
    assert outcome.passes <= 0.3 * 100


# --- interruption


class Interrupted:
    """Batches of which one raises, and a list of those that were asked for."""

    def __init__(self, stop):
        self.stop, self.asked = stop, []

    def __call__(self):
        return self

    def __len__(self):
        return 9

    def __getitem__(self, i):
        self.asked.append(i)
        if i == self.stop:
            raise KeyboardInterrupt
        rows = slice(60 * i, 60 * (i + 1))
        return HELD["image"][rows], HELD["label"][rows]


@pytest.mark.parametrize("search", ["grid", "racing"])
def test_an_interrupted_sweep_is_resumed(tmp_path, search):
    output, options = tmp_path / "r.csv", {"search": search, "metric": "nll"}
    whole = ctonnx.sweep(MODEL, Interrupted(None), BETAS, **options).to_csv()
    # A race takes batch 5 as its second.
    stop, kept, again = (5, 1, 5) if search == "racing" else (4, 4, 6)
    with pytest.raises(KeyboardInterrupt):
        ctonnx.sweep(MODEL, Interrupted(stop), BETAS, output=output, **options)
    assert os.listdir(tmp_path) == ["r.csv.progress"]
    progress = tmp_path / "r.csv.progress"
    assert len(progress.read_bytes().splitlines()) == 1 + kept
    # As if it had been cut off while a line was written.
    with open(progress, "ab") as stream:
        stream.write(b'{"batch": 4, "poi')
    with pytest.raises(UsageError, match="holds an interrupted sweep: continue with --resume"):
        ctonnx.sweep(MODEL, Interrupted(None), BETAS, output=output, **options)
    with pytest.raises(UsageError, match="another sweep, which differs in points: remove it"):
        ctonnx.sweep(MODEL, Interrupted(None), [0.5], output=output, resume=True, **options)
    with pytest.raises(KeyboardInterrupt):
        ctonnx.sweep(MODEL, Interrupted(again), BETAS, output=output, resume=True, **options)
    rest = Interrupted(None)
    ctonnx.sweep(MODEL, rest, BETAS, output=output, resume=True, **options)
    assert rest.asked[0] == again
    assert os.listdir(tmp_path) == ["r.csv"]
    assert output.read_text() == whole


class Stop:
    """A progress bar that interrupts after some runs."""

    def __init__(self, runs):
        self.runs = runs

    def __call__(self, _):
        return nullcontext(self)

    def update(self, runs):
        self.runs -= runs
        if self.runs < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("runs", [120, 260, 380])
def test_a_race_resumed_after_drops_decides_the_same(tmp_path, runs):
    output = tmp_path / "r.csv"
    arguments, options = (MODEL, DATA, "0.5:1:0.02", "nll"), {"batch_size": 10, "search": "racing"}
    whole = ctonnx.sweep(*arguments, **options)
    with pytest.raises(KeyboardInterrupt):
        ctonnx.sweep(*arguments, **options, output=output, progress=Stop(runs))
    assert ctonnx.sweep(*arguments, **options, output=output, resume=True) == whole
    assert len({point.samples for point in whole.points}) > 2  # There were drops.


def test_what_was_measured_on_something_else_is_not_taken_over(tmp_path):
    """Weights, labels, images and providers belong to what a progress file is of."""
    Image = pytest.importorskip("PIL.Image")
    onnx.save(
        onnx.load(MODEL),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        size_threshold=99,
        location="w",
    )
    x, y = HELD["image"][:60], HELD["label"][:60]
    np.savez(tmp_path / "d.npz", image=x, label=y, other=y[::-1])
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(60):
        Image.fromarray(np.uint8(x[i, 0] * 255)).save(tmp_path / "images" / "a" / f"{i}.png")
    output = tmp_path / "r.csv"

    def touch(name):
        os.utime(tmp_path / name, (1, 1))

    none, cpu = {}, {"providers": ["CPUExecutionProvider"]}
    for name, first, then, change, line in [
        ("d.npz", none, none, "w", "differs in model"),
        ("d.npz", {"labels": "label"}, {"labels": "other"}, None, "differs in data"),
        ("x.npy", {"labels": str(tmp_path / "y.npy")}, None, "y.npy", "differs in data"),
        ("images", none, none, "images/a/3.png", "differs in data"),
        ("images", none, {"skip_broken": True}, None, None),
        ("d.npz", none, cpu, None, "differs in providers"),
    ]:
        arguments = (tmp_path / "m.onnx", tmp_path / name, [0.8, 0.9])
        options = {"output": output, "batch_size": 20, "force": True}
        with pytest.raises(KeyboardInterrupt):
            ctonnx.sweep(*arguments, **options, **first, progress=Stop(3))
        if change:
            touch(change)
        with nullcontext() if line is None else pytest.raises(UsageError, match=line):
            ctonnx.sweep(*arguments, **options, **(first if then is None else then), resume=True)
        Path(f"{output}.progress").unlink(missing_ok=True)


def test_a_mistake_leaves_no_progress_file(tmp_path):
    wrong = HELD["label"] + 1
    with pytest.raises(UsageError, match=r"label \d0 is out of range"):
        ctonnx.sweep(MODEL, (HELD["image"][:9], wrong[:9] * 10), BETAS, output=tmp_path / "r.csv")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_named(tmp_path):
    """Where no file may grow, as on a full disk."""
    np.savez(tmp_path / "d.npz", **HELD)
    arguments = ["sweep", MODEL, "--data", "d.npz", "-o", "r.csv", "--beta", "0.9"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 0; "$@"', "_", sys.executable, "-m", "ctonnx", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "ctonnx: r.csv.progress: cannot be written: File too large\n"


def test_a_damaged_progress_file_is_one_line(tmp_path):
    header = {"metric": "x"}
    path = tmp_path / "r.csv.progress"
    made = journal.Journal(path, header)
    made.add(engine.Measured(0, [0], np.zeros((1, 2, 1)), 0, None))
    made.close()
    path.write_bytes(path.read_bytes() + b"nonsense\n")
    with pytest.raises(InputFileError, match=r"progress: is damaged: remove it to start anew"):
        journal.Journal(path, header, resume=True)
    path.write_text('{"a": 1}\n')
    with pytest.raises(UsageError, match="is not a sweep's progress file"):
        journal.Journal(path, header, resume=True)


def rewritten(line, **changes):
    """A line of a progress file with other values, and the checksum of these."""
    entry = {**json.loads(line), **changes}
    del entry["sum"]
    return journal._line(entry)


def test_a_changed_progress_file_is_refused(tmp_path):
    """Every byte counts, and so do types and ranges where the checksum is made to fit."""
    header, path = {"points": [[1.0, None], [0.5, None]]}, tmp_path / "r.csv.progress"
    made = journal.Journal(path, header)
    for batch in range(2):
        made.add(engine.Measured(batch, [0, 1], np.ones((2, 3, 1)) * batch, 0, "d"))
    made.close()
    whole = path.read_bytes()
    first, *lines = whole.splitlines(keepends=True)
    restored = journal.Journal(path, header, resume=True)
    assert restored.statistics(1).ravel().tolist() == [0, 0, 0, 1, 1, 1]
    for at in range(len(first), len(whole) - 1, 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InputFileError, match="is damaged: remove it to start anew"):
            journal.Journal(path, header, resume=True)
    short = json.loads(lines[0])["data"][:32]
    for changes in (
        {"batch": -1},
        {"batch": 1.5},
        {"batch": True},
        {"batch": None},
        {"points": [0, 2]},
        {"points": [0, 0]},
        {"points": [-1, 0]},
        {"points": []},
        {"points": "01"},
        {"points": 3},
        {"broken": -1},
        {"broken": "0"},
        {"digest": 5},
        {"shape": [2, 3]},
        {"shape": [3, 3, 1]},
        {"shape": [2, 0, 1]},
        {"shape": [2, -3, -1]},
        {"shape": [2, 2, 1], "data": short},
        {"shape": None},
        {"data": ""},
        {"data": "?"},
        {"data": 5},
    ):
        # Of the same batch as the line before, whose samples it must have.
        path.write_bytes(first + lines[0] + rewritten(lines[0], **changes))
        with pytest.raises(InputFileError, match="is damaged: remove it to start anew"):
            journal.Journal(path, header, resume=True)
    path.write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(InputFileError, match="is damaged: remove it to start anew"):
        journal.Journal(path, header, resume=True)
    for content, line in [
        (b'{"ctonnx": "sweep", "version": 2}\n', "was written by another version of ctonnx"),
        (b"my own notes", "is not a sweep's progress file"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UsageError, match=line):
            journal.Journal(path, header, resume=True)
        assert path.read_bytes() == content
    path.unlink()
    path.mkdir()
    with pytest.raises(InputFileError, match="cannot be read: Is a directory"):
        journal.Journal(path, header, resume=True)


@pytest.mark.parametrize("cut", [10, 2000])
def test_a_sweep_stopped_by_a_full_disk_is_resumed(tmp_path, monkeypatch, cut):
    """The progress file holds whole lines alone, or is gone."""
    output, opened = tmp_path / "r.csv", open

    class Full:
        """A file on a disk with room for some bytes."""

        def __init__(self, stream):
            self.stream, self.left = stream, cut

        def write(self, data):
            if not self.left:
                raise OSError(28, "No space left on device")
            written = self.stream.write(data[: self.left])
            self.left -= written
            return written

        def __getattr__(self, name):
            return getattr(self.stream, name)

    def limited(*arguments, **options):
        stream = opened(*arguments, **options)
        return Full(stream) if arguments[1:2] == ("ab",) else stream

    monkeypatch.setattr(journal, "open", limited, raising=False)
    with pytest.raises(UsageError, match="progress: cannot be written: No space left"):
        ctonnx.sweep(MODEL, DATA, BETAS, output=output)
    progress = tmp_path / "r.csv.progress"
    assert progress.exists() == (cut > 10)
    assert not progress.exists() or 1 < len(progress.read_bytes().splitlines()) < 5
    assert not progress.exists() or progress.read_bytes().endswith(b"\n")
    monkeypatch.undo()
    result = ctonnx.sweep(MODEL, DATA, BETAS, output=output, resume=True)
    assert result == ctonnx.sweep(MODEL, DATA, BETAS)
    assert os.listdir(tmp_path) == ["r.csv"]


class Shuffled:
    """Batches of samples in a random order, by index or in turn, with a seed or without."""

    def __init__(self, by_index, seed=None):
        self.by_index, self.seed = by_index, seed

    def __call__(self):
        rows = np.random.default_rng(self.seed).permutation(540).reshape(9, 60)
        batches = [(HELD["image"][each], HELD["label"][each]) for each in rows]
        return batches if self.by_index else iter(batches)


@pytest.mark.parametrize("by_index", [True, False])
def test_data_in_another_order_are_not_resumed(tmp_path, monkeypatch, by_index):
    output = tmp_path / "r.csv"
    with pytest.raises(KeyboardInterrupt):
        ctonnx.sweep(MODEL, Shuffled(by_index), BETAS, output=output, progress=Stop(12))
    held = (tmp_path / "r.csv.progress").read_bytes()
    with pytest.raises(UsageError, match="come in another order: batch 0 is not what it was"):
        ctonnx.sweep(MODEL, Shuffled(by_index), BETAS, output=output, resume=True)
    assert (tmp_path / "r.csv.progress").read_bytes().startswith(held)
    # Fewer data than before, from a function of the same name.
    monkeypatch.setattr(Shuffled, "__call__", lambda _: iter([]))
    with pytest.raises(UsageError, match="batch 0 did not come again: fix the order"):
        ctonnx.sweep(MODEL, Shuffled(by_index), BETAS, output=output, resume=True)
    monkeypatch.undo()
    (tmp_path / "r.csv.progress").unlink()
    with pytest.raises(KeyboardInterrupt):
        ctonnx.sweep(MODEL, Shuffled(by_index, 1), BETAS, output=output, progress=Stop(12))
    result = ctonnx.sweep(MODEL, Shuffled(by_index, 1), BETAS, output=output, resume=True)
    assert result == ctonnx.sweep(MODEL, Shuffled(by_index, 1), BETAS)


def test_what_cannot_be_written_keeps_the_progress(tmp_path, monkeypatch):
    def full(*_):
        raise UsageError("r.csv: cannot be written: No space left on device")

    monkeypatch.setattr(results.Sweep, "write", full)
    with pytest.raises(UsageError, match="No space"):
        ctonnx.sweep(MODEL, DATA, BETAS, output=tmp_path / "r.csv")
    monkeypatch.undo()
    result = ctonnx.sweep(MODEL, DATA, BETAS, output=tmp_path / "r.csv", resume=True)
    assert (tmp_path / "r.csv").read_text() == result.to_csv()


def test_ctrl_c_exits_130_and_keeps_what_is_finished(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nimport numpy as np\n"
        f"held = dict(np.load({DATA!r}))\n"
        "def batches():\n"
        "    for i in range(0, 540, 60):\n"
        "        time.sleep(0.1)\n"
        "        yield held['image'][i:i + 60], held['label'][i:i + 60]\n"
    )
    arguments = ["sweep", MODEL, "--data", "slow:batches", "--beta", "0.6,0.8", "-o", "r.csv"]
    command = [sys.executable, "-m", "ctonnx", *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    progress = tmp_path / "r.csv.progress"
    deadline = time.monotonic() + 60
    while not progress.exists() or progress.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "progress saved in r.csv.progress; continue with --resume\n" in err
    assert err.endswith("ctonnx: interrupted\n")
    assert "Traceback" not in err
    assert not (tmp_path / "r.csv").exists()
    subprocess.run([*command, "--resume"], cwd=tmp_path, check=True, capture_output=True)
    result = ctonnx.sweep(MODEL, DATA, [0.6, 0.8], batch_size=60)
    assert (tmp_path / "r.csv").read_text() == result.to_csv()


# --- the command line


def command(*arguments, **options):
    """Run the command line: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "ctonnx", "sweep", *map(str, arguments)],
        **({"stderr": subprocess.PIPE} | options),
        stdout=subprocess.PIPE,
    )
    return done.returncode, done.stdout.decode(), (done.stderr or b"").decode()


def test_the_command_prints_the_result_alone(tmp_path):
    """A folder of images with a broken one; the table, a drawing, a saved model; then JSON."""
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("plotext")
    for i in range(60):
        path = tmp_path / "images" / str(HELD["label"][i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(HELD["image"][i, 0] * 255)).save(path)
    (tmp_path / "images" / "3" / "bad.png").write_bytes(b"no image")
    arguments = [MODEL, "--data", "images", "--beta", "0.6,0.8"]
    code, out, err = command(*arguments, cwd=tmp_path)
    assert (code, out) == (3, "")
    assert err.startswith("ctonnx: images/3/bad.png: cannot be read as an image: cannot identify")
    assert err.count("\n") == 1
    arguments += ["--skip-broken", "--batch", "9"]
    written = ["--save-best", "best.onnx", "-o", "r.json", "--plot"]
    code, out, err = command(*arguments, *written, cwd=tmp_path)
    assert code == 0, err
    assert err.splitlines() == [
        "steered on the fly: 7 activations, 0 skipped",
        "skipped 1 unreadable images",
        "the original is best: best.onnx computes the same, with CT units at beta 1",
        "wrote r.json",
        "wrote best.onnx",
    ]
    lines = out.splitlines()
    assert lines[0].split() == ["BETA", "ACCURACY", "SE", "GAIN", "95", "%"]
    assert [line[0] for line in lines[1:4]] == [" ", " ", "*"]
    assert "┌" in lines[5]
    assert lines[-1] == "best beta 1: accuracy 1.0000 on 60 samples, the original"
    assert [a.beta for a in ctonnx.inspect(tmp_path / "best.onnx")] == [1.0] * 7
    code, out, _ = command(*arguments, "--json", cwd=tmp_path)
    document = json.loads(out)
    assert (code, document["metric"], document["broken"]) == (0, "accuracy", 1)
    assert [point["beta"] for point in document["points"]] == [0.6, 0.8, 1.0]
    assert document["best"] == document["points"][-1]
    assert document == json.loads((tmp_path / "r.json").read_text())


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (["-o", "o.csv", "--save-best", "./o.csv"], "--save-best and --output"),
        (["-o", "d.csv", "--force"], "--output and --data"),
    ],
)
def test_outputs_are_files_of_their_own(tmp_path, outputs, names):
    data = "x0,label\n1,0\n2,1\n"
    (tmp_path / "d.csv").write_text(data)
    code, out, err = command(MODEL, "--data", "d.csv", *outputs, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert f"{names} name one file" in err
    assert [p.name for p in tmp_path.iterdir()] == ["d.csv"]
    assert (tmp_path / "d.csv").read_text() == data


def test_what_data_hold_besides_is_told(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    np.savez(tmp_path / "d.npz", image=HELD["image"], what=HELD["label"])
    assert ctonnx.sweep(MODEL, tmp_path / "d.npz", [0.8]).notes[1:] == [
        f"{tmp_path / 'd.npz'}: took 'what' for the labels"
    ]
    for name in "0/a", "1/b", "c":
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(HELD["image"][0, 0] * 255)).save(tmp_path / f"images/{name}.png")
    (tmp_path / "images" / "2").mkdir()
    notes = ctonnx.sweep(MODEL, tmp_path / "images", [0.8]).notes
    assert f"{tmp_path / 'images' / '2'} holds no images that can be read" in notes
    assert f"left out 1 images beside the sub-folders of {tmp_path / 'images'}" in notes


def test_a_missing_folder_is_told(tmp_path):
    """Labels count the folders, so those behind it are others than the model's."""
    Image = pytest.importorskip("PIL.Image")
    for i in range(60):
        if HELD["label"][i] != 4:
            path = tmp_path / str(HELD["label"][i]) / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.uint8(HELD["image"][i, 0] * 255)).save(path)
    result = ctonnx.sweep(MODEL, tmp_path, [0.8])
    assert result.original.value < 0.6
    assert result.notes[1].endswith(
        "has 9 class folders, but the model scores 10 classes: the folders are labelled 0 to 8, in "
        "order; for a missing class, add an empty folder of its name"
    )


@pytest.mark.parametrize("endless", [False, True])
def test_a_progress_bar_with_rate_is_for_terminals(tmp_path, endless):
    (tmp_path / "gen.py").write_text(
        f"import numpy as np\nheld = dict(np.load({DATA!r}))\n"
        "def batches(): yield held['image'], held['label']\n"
    )
    terminal, other = os.openpty()
    data = "gen:batches" if endless else DATA
    code, out, _ = command(MODEL, "--data", data, "--beta", "0.8", cwd=tmp_path, stderr=other)
    os.close(other)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert code == 0
    assert "sweeping" not in out
    assert "runs/s" in shown
    assert ("34/34" in shown) == (not endless)


# --- what is written


def test_results_in_every_format(tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    result = ctonnx.sweep(MODEL, DATA, BETAS)
    for name in ("r.csv", "r.json", "r.parquet"):
        result.write(tmp_path / name)
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert lines[0] == "beta,coeff,value,error,gain,gain_low,gain_high,samples"
    assert [line.split(",")[0] for line in lines[1:]] == ["0.6", "0.8", "1.0"]
    document = json.loads((tmp_path / "r.json").read_text())
    assert (document["schema_version"], document["metric"]) == (1, "accuracy")
    assert document["best"] == document["points"][-1]
    table = pyarrow.read_table(tmp_path / "r.parquet").to_pylist()
    assert table == document["points"]
    assert [point["value"] for point in table] == [point.value for point in result.points]
    with pytest.raises(UsageError, match=r"results go to \.csv, \.json, \.parquet"):
        result.write(tmp_path / "r.txt")


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotext")
    result = ctonnx.sweep(MODEL, DATA, "0.6,0.8", coeffs="0.4,0.5")
    for name, start in ("c.png", b"\x89PNG"), ("c.svg", b"<?xml"):
        result.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    text = result.plot()
    assert "accuracy" in text
    assert "c = 0.4" in text
    assert "\x1b" not in text
    assert len(text.splitlines()) == 20
    with pytest.raises(UsageError, match=r"drawings go to \.png or \.svg"):
        result.plot(tmp_path / "c.pdf")


@pytest.mark.parametrize("before", [None, "initializer", "input", "required-input", "own"])
@pytest.mark.parametrize("beta_as", ["initializer", "input"])
def test_the_best_is_saved(tmp_path, before, beta_as):
    """It gives what the sweep measured there; undone, it is the original."""
    model = tmp_path / "m.onnx"
    model.write_bytes(Path(MODEL).read_bytes())
    if before == "own":
        model = ctonnx.patch(model, 0.9, params={"node_relu": 0.3, "node_relu_1": 0.5})
    elif before:
        model = ctonnx.patch(model, 0.9, beta_as=before)
    data = (HELD["image"][:100], HELD["label"][:100])
    # Of all but the original: entropy prefers it, its negative does not.
    result = ctonnx.sweep(model, data, [0.8], lambda out, _: -out["logits"].max(1), coeffs=[0.4])
    assert result.best.beta == 0.8
    saved = sweeping.save_best(model, result, tmp_path / "best.onnx", beta_as)
    session = ctonnx.session(saved)
    assert [i.name for i in session.get_overridable_initializers()] == ["beta"] * (
        beta_as == "input"
    )
    held = session.get_modelmeta().custom_metadata_map
    assert (held["ctonnx.beta"], held["ctonnx.coeff"]) == ("0.8", "0.4")
    assert held.get("ctonnx.beta_input") == ("beta" if beta_as == "input" else None)
    (logits,) = session.run(["logits"], {"image": data[0]})
    assert -logits.max(1).mean() == pytest.approx(result.best.value, rel=1e-5)
    assert {(a.beta, a.coeff) for a in ctonnx.inspect(saved)} == {(0.8, 0.4)}
    assert onnx.load(ctonnx.unpatch(saved, tmp_path / "back.onnx")) == onnx.load(MODEL)


def test_memory_does_not_grow_with_the_data(tmp_path):
    """Peak memory of sweeps over 4 MB and 48 MB."""
    program = """if True:
        import re, sys, ctonnx
        ctonnx.sweep(sys.argv[1], sys.argv[2], [0.8, 0.9])
        print(re.search("VmHWM:\\\\s*(\\\\d+)", open("/proc/self/status").read())[1])"""
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4096] x) => (float[N, 2] y)
        <int64[2] at = {0, 1}> { z = Relu(x) y = Gather<axis=1>(z, at) }"""
    )
    onnx.save(model, tmp_path / "m.onnx")
    peaks = []
    for count in (250, 3000):
        data = tmp_path / f"{count}.npz"
        np.savez(data, x=np.zeros((count, 4096), np.float32), label=np.zeros(count, int))
        command = [sys.executable, "-c", program, str(tmp_path / "m.onnx"), str(data)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True).stdout))
    assert peaks[1] - peaks[0] < 8_000, peaks


def test_mistakes_are_one_clear_line():
    images, labels = HELD["image"], HELD["label"]
    scalar = """<ir_version: 8, opset_import: ["" : 17]>
        g (float x) => (float y) { y = Relu(x) }"""
    whole = """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[N] x) => (int64[N] z) { y = Cast<to=1>(x) r = Relu(y) z = Cast<to=7>(r) }"""
    mean = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 2] x) => (float[1, 2] y)
        { r = Relu(x) y = ReduceMean<axes = [0], keepdims = 1>(r) }"""
    pair = (np.zeros((9, 2), np.float32), np.zeros(9, int))
    alike = (np.zeros((9, 2), np.float32), np.zeros((9, 2)))
    nan = (np.full((9, 2), np.nan, np.float32), np.zeros(9, int))
    more = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 2] x) => (float[M, 2] y) { r = Relu(x) y = Concat<axis = 0>(r, r) }"""
    broken = """<ir_version: 8, opset_import: ["" : 17, "no.such" : 1]>
        g (float[N, 2] x) => (float[N, 2] y) { r = Relu(x) y = no.such.Op(r) }"""
    relu = mean.replace("[1, 2] y", "[N, 2] r").replace(
        "y = ReduceMean<axes = [0], keepdims = 1>(r)", ""
    )
    for arguments, options, kind, line in [
        ((parsed(scalar), pair), {}, UsageError, "'x' is a single value: it has no row per"),
        ((parsed(whole), pair), {}, UsageError, "no floating-point output to measure"),
        ((parsed(mean), pair), {}, UsageError, "output 'y' is [1, 2] for 9 samples: it needs"),
        ((parsed(more), pair), {}, UsageError, "output 'y' is [18, 2] for 9 samples: it needs"),
        ((onnx.parser.parse_model(broken), pair), {}, ModelError, "ONNX Runtime cannot load"),
        ((parsed(relu), nan), {}, UsageError, "accuracy is NaN at every point"),
        ((MODEL, (images, labels + 1)), {}, UsageError, "label 10 is out of range"),
        ((MODEL, (images[:, :, :4], labels)), {}, UsageError, "model takes float32[N,1,8,8]"),
        ((MODEL, (images, labels[:3])), {}, UsageError, "the numbers of rows differ"),
        ((MODEL, (images, None)), {}, UsageError, "accuracy needs labels"),
        ((MODEL, DATA), {"metric": "miou"}, UsageError, "miou needs scores (N, classes, H, W)"),
        (
            (MODEL, DATA),
            {"metric": lambda outputs, labels: 1 / 0},
            UsageError,
            "<lambda>: fails when it is called: ZeroDivisionError: division",
        ),
        ((MODEL, DATA), {"gpus": 1}, UsageError, "address and gpus apply only to engine ray"),
        ((parsed(relu), alike), {"metric": "r2"}, UsageError, "labels, or samples, are all alike"),
        ((MODEL, DATA), {"search": "all"}, UsageError, "search must be one of grid, racing"),
        ((MODEL, DATA), {"confidence": 1.0}, UsageError, "confidence must lie in [0.5, 1)"),
        ((MODEL, DATA), {"resume": True}, UsageError, "resume needs an output"),
        ((MODEL, DATA), {"coeffs": "2"}, UsageError, "coeff must lie in [0, 1]"),
        (
            (steered(lowering="primitives", beta_as="input"), DATA),
            {"coeffs": "0.5"},
            UsageError,
            "c cannot be swept: the model is lowered to primitives",
        ),
        ((steered(lowering="primitives"), DATA), {}, NothingToDo, "no CTU"),
        ((42, DATA), {}, UsageError, "expected a path or a ModelProto, got int"),
        (("missing.onnx", DATA), {}, ModelError, "missing.onnx: no such file"),
        (
            (MODEL, lambda: iter([(images, labels)])),
            {"search": "racing"},
            UsageError,
            "the factory's iterable must have a length for racing",
        ),
        ((MODEL, lambda: []), {}, InputFileError, "the data hold no sample that can be read"),
        (
            (parsed(relu.replace("Relu", "Sigmoid")), pair),
            {},
            NothingToDo,
            "no activation to steer",
        ),
    ]:
        with pytest.raises(kind) as caught:
            ctonnx.sweep(*arguments, "0.9", **options)
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, CtonnxError)
