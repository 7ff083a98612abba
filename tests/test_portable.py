"""Everything but the kernels works where a system lacks what Linux has."""

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from conftest import DIGITS

import ctonnx

# What Windows lacks is taken away before ctonnx is imported.
WITHOUT = """
import os, signal, sys
sys.modules["fcntl"] = None
del os.copy_file_range, signal.SIGHUP
from ctonnx.model import files
assert files.fcntl is None
from ctonnx.ort import library
library._LIBRARY = "none"
from ctonnx.cli.main import main
sys.argv = ["ctonnx", *sys.argv[1:]]
main()
"""


def run(*arguments):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def external(tmp_path):
    """The sample model with external data, in a folder of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    model = onnx.load(DIGITS / "digits.onnx")
    onnx.save(
        model, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=100
    )
    return folder / "m.onnx"


def test_models_are_steered_copied_checked_and_undone(external, tmp_path):
    steered, original = tmp_path / "s.onnx", tmp_path / "o.onnx"
    done = run("patch", external, "--beta", "0.8", "-o", steered, "--check")
    assert done.returncode == 0, done.stderr
    assert "the op library is not installed" in done.stderr
    assert (tmp_path / "m.data").read_bytes() == (external.parent / "m.data").read_bytes()
    expected = ctonnx.patch(onnx.load(external), 0.8)
    image = np.load(DIGITS / "digits_test.npz")["image"]
    outputs = [
        ctonnx.session(model).run(None, {"image": image})[0] for model in (steered, expected)
    ]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)
    assert run("unpatch", steered, "-o", original).returncode == 0
    assert onnx.load(original) == onnx.load(external)
    assert sorted(os.listdir(tmp_path)) == ["m.data", "model", "o.onnx", "s.onnx"]


def test_sweeps_run_on_the_fallback(tmp_path):
    data = DIGITS / "digits_test.npz"
    output = tmp_path / "points.csv"
    done = run("sweep", DIGITS / "digits.onnx", "--data", data, "--beta", "0.9", "-o", output)
    assert done.returncode == 0, done.stderr
    assert "the op library is not installed: the model runs as its fallback" in done.stderr
    assert len(output.read_text().splitlines()) == 3
