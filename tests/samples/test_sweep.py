"""The part of samples/sweep that has a script: what recalibration and β gain on shifted digits."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

FOLDER = ROOT / "samples" / "sweep"


@pytest.fixture(scope="module")
def adapt():
    sys.path.insert(0, str(FOLDER))
    try:
        import adapt
    finally:
        sys.path.remove(str(FOLDER))
    return adapt


def cells(folder):
    """The cells of a table, without its header."""
    lines = (folder / "table.md").read_text().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_committed_table_is_what_the_script_writes(tmp_path):
    """Near enough: another machine may read a few digits otherwise."""
    command = [sys.executable, str(FOLDER / "adapt.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "table.md").read_text()
    written, committed = cells(tmp_path), cells(FOLDER)
    assert [row[:2] for row in written] == [row[:2] for row in committed]
    for row, other in zip(written, committed, strict=True):
        for place in (2, 3, 5):
            assert float(row[place]) == pytest.approx(float(other[place]), abs=0.01)


def test_on_the_same_digits_the_script_does_what_calibration_does(adapt):
    images = adapt.digits("clean")[0][: adapt.SAMPLES]
    for beta in (0.7, 0.3):
        model, own = adapt.calibrated(beta, images), adapt.adapted(beta, images, images)
        # To the rounding of float32: logits are as large as 30.
        logits = [adapt.run(each, images)[0] for each in (model, own, adapt.plain(beta))]
        np.testing.assert_allclose(logits[1], logits[0], rtol=1e-4, atol=1e-4)
        assert np.abs(logits[2] - logits[0]).max() > 0.5


def test_a_restored_layer_has_the_statistics_wanted(adapt):
    clean, shifted = (adapt.digits(name)[0][: adapt.SAMPLES] for name in ("clean", "blurred"))
    original, model = adapt.plain(1.0), adapt.adapted(0.6, clean, shifted)
    wanted = adapt.statistics(original, clean, adapt.layers(original))
    found = adapt.statistics(model, shifted, adapt.layers(model))
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
