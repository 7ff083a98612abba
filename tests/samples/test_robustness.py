"""A quick run of samples/robustness: the shape of the table, and properties of the numbers."""

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

FOLDER = ROOT / "samples" / "robustness"
COLUMNS = (
    "threat",
    "kind",
    "half",
    "beta",
    "digits",
    "accuracy",
    "error",
    "gain",
    "low",
    "high",
    "clean",
    "white_box",
    "square",
    "other_network",
    "other_betas",
    "missed",
    "torch_differs",
    "masked",
)
ATTACKED = ("linf", "l2")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that a quick run wrote, and its output."""
    out = tmp_path_factory.mktemp("robustness")
    command = [sys.executable, str(FOLDER / "robustness.py"), "--quick", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def read_rows(folder):
    with (folder / "results.csv").open() as file:
        records = list(csv.DictReader(file))
    assert tuple(records[0]) == COLUMNS
    text = ("threat", "kind", "half", "masked")
    return [{k: v if k in text or v == "" else float(v) for k, v in r.items()} for r in records]


@pytest.fixture(scope="module")
def rows(written):
    return read_rows(written[0])


@pytest.fixture(scope="module")
def robustness():
    pytest.importorskip("pyautoattack")
    sys.path.insert(0, str(FOLDER))
    try:
        import robustness
    finally:
        sys.path.remove(str(FOLDER))
    return robustness


def test_every_threat_has_both_halves_at_every_beta(rows, robustness):
    kinds, halves = ("plain", "recalibrated"), ("choose", "report")
    swept = ("clean", "mixed", *robustness.CORRUPTIONS)
    expected = set(itertools.product(ATTACKED, kinds, halves, (0.8, 1)))
    expected |= set(itertools.product(swept, kinds, halves, (0.8, 0.9, 1)))
    assert {(r["threat"], r["kind"], r["half"], r["beta"]) for r in rows} == expected
    assert len(rows) == len(expected)


def test_no_digit_is_both_reported_and_calibrated_on(robustness):
    used = robustness.CALIBRATION
    assert used.stop - used.start == 128
    for budget in robustness.FULL, robustness.QUICK:
        assert used.start >= budget.digits
        reported = range(budget.corrupted // 2, budget.corrupted)
        assert not set(range(used.start, used.stop)) & set(reported)


def test_beta_1_is_the_original_network_to_the_last_digit(rows, robustness):
    import onnxruntime as ort

    session = ort.InferenceSession(FOLDER / "resnet.onnx", providers=["CPUExecutionProvider"])

    def right(images, labels):
        return (session.run(None, {"image": images})[0].argmax(1) == labels).mean()

    budget = robustness.QUICK
    images, labels = robustness.held_out(budget.corrupted)
    seen = 0
    for row in (row for row in rows if row["beta"] == 1):
        assert (row["gain"], row["low"], row["high"]) == (0, 0, 0)
        attacked = row["threat"] in ATTACKED
        count = budget.digits if attacked else budget.corrupted
        x = images if attacked else robustness.corrupted(row["threat"], images)
        half = slice(count // 2) if row["half"] == "choose" else slice(count // 2, count)
        assert row["clean" if attacked else "accuracy"] == pytest.approx(
            right(x[half], labels[half]), abs=1e-6
        )
        seen += 1
    assert seen == 4 * (len(ATTACKED) + len(robustness.CORRUPTIONS) + 2)


def test_pytorch_and_onnx_runtime_agree_on_every_example(rows):
    assert {row["torch_differs"] for row in rows if row["threat"] in ATTACKED} == {0}


def test_attacks_only_lower_accuracy(rows):
    for row in (row for row in rows if row["threat"] in ATTACKED):
        attacks = [row[k] for k in ("white_box", "square", "other_network", "other_betas")]
        assert max(attacks) <= row["clean"] <= 1
        assert 0 <= row["accuracy"] <= min(attacks)
        missed = round((row["white_box"] - row["accuracy"]) * row["digits"], 3)
        assert missed == row["missed"]
        masked = row["white_box"] > min(attacks)
        assert row["masked"] == ("yes" if masked else "no")
    # Even the quick attacks have an effect.
    assert min(row["white_box"] for row in rows if row["threat"] == "linf") < 0.5


def test_with_a_large_bound_nothing_stays_right(written):
    assert "at most 0 of 32 digits stay right at any β" in written[1]


def test_the_table_and_the_figure_are_written(written, rows, robustness):
    out, printed = written
    assert (out / "table.md").read_text() == printed
    assert (out / "robustness.png").stat().st_size > 10_000
    summary = printed.split("\n\n")[0].splitlines()[2:]
    assert len(summary) == 2 * (4 + len(robustness.CORRUPTIONS))
    assert all(line.count("|") == 9 for line in summary)


def test_an_attack_gives_the_same_examples_again(robustness):
    few = robustness.QUICK._replace(digits=8)
    for kind in "white-box", "square", "transfer":
        job = (kind, "l2", robustness.Variant("recalibrated", 0.8), few)
        np.testing.assert_array_equal(robustness.attack(job), robustness.attack(job))


@pytest.mark.parametrize(
    ("norm", "moved"), [("Linf", [0.06, 0.07, 0.0]), ("L2", [0.06, 0.06, 0.0])]
)
def test_examples_outside_the_bound_are_refused(robustness, norm, moved):
    images = np.full((1, 1, 1, 3), 0.5, np.float32)
    robustness.checked(images + np.float32(0.02), images, norm, 0.06)
    with pytest.raises(ValueError, match="examples leave"):
        robustness.checked(images + np.array(moved, np.float32), images, norm, 0.06)
    with pytest.raises(ValueError, match="examples leave"):
        robustness.checked(images - 0.51, images, norm, 1.0)
    with pytest.raises(ValueError, match="examples leave"):
        robustness.checked(np.full_like(images, np.nan), images, norm, 1.0)


def test_the_beta_reported_is_chosen_on_the_other_half(robustness):
    def row(half, beta, accuracy, kind="plain"):
        numbers = {"beta": beta, "accuracy": accuracy}
        return {"threat": "l2", "kind": kind, "half": half, **numbers}

    rows = [row("choose", 0.8, 0.5), row("choose", 0.9, 0.5), row("choose", 1.0, 0.4)]
    rows += [row("report", 0.8, 0.9), row("report", 0.9, 0.1), row("report", 1.0, 0.8)]
    other = [row("choose", 0.8, 0.9, "recalibrated"), row("report", 0.8, 0.7, "recalibrated")]
    assert robustness.chosen(other + rows, "l2", "plain") == row("report", 0.9, 0.1)
    assert robustness.chosen(other + rows, "l2", "recalibrated") == other[1]


def test_corruptions_change_digits_and_give_valid_images(robustness):
    images, _ = robustness.held_out(60)
    for kind in (*robustness.CORRUPTIONS, "mixed"):
        changed = robustness.corrupted(kind, images)
        assert changed.dtype == np.float32
        assert changed.shape == images.shape
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert (changed != images).any(axis=(1, 2, 3)).all()
        np.testing.assert_array_equal(changed, robustness.corrupted(kind, images))


def test_the_committed_table_matches_the_committed_results(robustness):
    """table.md repeats results.csv, apart from machine and time."""
    rows = read_rows(FOLDER)
    for row in rows:
        for name in ("missed", "torch_differs", "digits"):
            row[name] = int(row[name]) if row[name] != "" else ""
    table = robustness.table(rows, 0, robustness.FULL, 0.0)
    committed = (FOLDER / "table.md").read_text()
    assert table.split("\n\nWith ε")[0] == committed.split("\n\nWith ε")[0]


def test_the_networks_attacked_are_those_measured(robustness):
    images, labels = robustness.held_out(2000)
    accuracy = {}
    for kind, beta in ("plain", 1.0), ("plain", 0.5), ("recalibrated", 0.5):
        right, differ = robustness.Network(robustness.Variant(kind, beta)).right(images, labels)
        assert differ == 0
        accuracy[kind, beta] = right.mean()
    assert accuracy["plain", 1.0] > 0.975
    assert accuracy["recalibrated", 0.5] > accuracy["plain", 1.0] - 0.01
    assert accuracy["plain", 0.5] < 0.9
    assert Path(robustness.MODEL).stat().st_size < 300_000
