"""`ctonnx bench`: it verifies, then times. The times themselves are not tested."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import DIGITS, parsed
from onnx import numpy_helper

import ctonnx
from ctonnx.cli.main import cli
from ctonnx.errors import CheckFailed, UsageError
from ctonnx.measure import bench
from ctonnx.ort import library

# Every kind of CTU, and an input with a size to choose.
KINDS = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 4, h] x) => (float[n, 4, h] y) <float lo = {-0.5}, float hi = {0.75}>
    { a = Relu(x)  b = LeakyRelu <alpha = 0.25> (x)  c = Clip(x, lo, hi)  d = Clip(x, hi)
      e = Clip(x, , hi)  f = HardSigmoid(x)  s = Sum(a, b, c, d, e, f)  y = Identity(s) }"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "kinds.onnx"
    onnx.save(parsed(KINDS), path)
    return path


def test_every_variant_of_every_kind(path):
    result = bench.bench(path, shapes={"x": [2, 4, 6]}, threads=[1, 2], rounds=3)
    assert result.inputs == {"x": [2, 4, 6]}
    assert not result.notes
    names = [bench.ORIGINAL, bench.SESSION, bench.PLAIN, bench.FALLBACK, bench.NAIVE]
    assert [(t.threads, t.variant) for t in result.timings] == [
        (c, n) for c in (1, 2) for n in names
    ]
    assert all(t.run_ms > 0 and t.open_ms > 0 and t.ratio > 0 for t in result.timings)
    assert {t.ratio for t in result.timings if t.variant == bench.ORIGINAL} == {1.0}


@pytest.mark.parametrize("beta_as", ["initializer", "input", "required-input"])
def test_a_steered_model_is_timed_against_its_original(path, tmp_path, beta_as, monkeypatch):
    steered = ctonnx.patch(path, 0.7, output=tmp_path / "steered.onnx", beta_as=beta_as)
    originals = []
    pair = bench._pair
    monkeypatch.setattr(bench, "_pair", lambda *args: originals.append(pair(*args)) or originals[0])
    assert len(bench.bench(steered, rounds=1).timings) == 5
    assert originals[0][0].SerializeToString(deterministic=True) == onnx.load(
        path
    ).SerializeToString(deterministic=True)
    with pytest.raises(UsageError, match="it is timed with the beta and c that it has"):
        bench.bench(steered, beta=0.8)


@pytest.mark.parametrize("wrong", ["Unit", "CTUClip", "CTUHardSigmoid", "CTUMax", "CTUMin"])
def test_a_wrong_variant_is_not_timed(path, monkeypatch, wrong):
    functions = bench.naive_functions

    def damaged(*args, **kwargs):
        made = functions(*args, **kwargs)
        (function,) = [f for f in made if f.name == wrong]
        function.node[-1].op_type, function.node[-1].domain = "Identity", ""
        del function.node[-1].input[1:]
        return made

    monkeypatch.setattr(bench, "naive_functions", damaged)
    monkeypatch.setattr(bench, "_timed", lambda *args: pytest.fail("timed"))
    with pytest.raises(CheckFailed, match="naive ops: output 'y' "):
        bench.bench(path)


def test_a_number_that_cancels_out_is_no_disagreement(tmp_path):
    """Of a thousand scores one is always near 0: beside the others it is rounding and no more."""
    rng = np.random.default_rng(0)
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 8] x, float[8, 4096] v, float[4096, 3] w) => (float[1, 3] y)
        { h = MatMul(x, v)  r = Relu(h)  y = MatMul(r, w) }"""
    )
    v, w = 0.1 * rng.normal(size=(8, 4096)), rng.normal(size=(4096, 3)) * [0.01, 0.01, 1]
    v[:, 2048:] = v[:, :2048] + 1e-6  # The last score is the difference of two equal sums, nearly.
    w[2048:, 2] = -w[:2048, 2]
    model.graph.initializer.extend(
        numpy_helper.from_array(np.float32(array), name) for name, array in (("v", v), ("w", w))
    )
    onnx.save(model, tmp_path / "m.onnx")
    assert bench.bench(tmp_path / "m.onnx", rounds=1).timings


def test_without_the_library(path, monkeypatch):
    monkeypatch.setattr(library, "has_library", lambda: False)
    result = bench.bench(path, rounds=1)
    assert result.notes == ["the op library is not installed: only the fallback is timed"]
    assert [t.variant for t in result.timings] == [bench.ORIGINAL, bench.FALLBACK, bench.NAIVE]


def test_what_cannot_be_timed_is_left_out(path, tmp_path):
    alone = ctonnx.patch(path, 0.7, output=tmp_path / "op.onnx", lowering="op")
    result = bench.bench(alone, rounds=1)
    assert "the model carries no fallback" in result.notes
    assert bench.FALLBACK not in [t.variant for t in result.timings]
    half = """<ir_version: 8, opset_import: ["" : 17]>
        g (float16[4] x) => (float16[4] y) { y = HardSigmoid(x) }"""
    onnx.save(parsed(half), path)
    result = bench.bench(path, rounds=1)
    assert [note.split(":")[0] for note in result.notes] == ["naive ops are left out"]


def test_table_and_json():
    command = ["bench", str(DIGITS / "digits.onnx"), "--rounds", "1"]
    done = CliRunner().invoke(cli, command)
    lines = done.stdout.splitlines()
    assert lines[0] == "outputs agree, on image 1x1x8x8"
    assert lines[1].split() == ["THREADS", "VARIANT", "RUN", "RATIO", "OPEN"]
    assert len(lines) == 7
    document = json.loads(CliRunner().invoke(cli, [*command, "--threads", "1,2", "--json"]).stdout)
    assert document["schema_version"] == 1
    assert [t["threads"] for t in document["timings"]] == [1] * 5 + [2] * 5
    assert set(document["timings"][0]) == {"variant", "threads", "run_ms", "ratio", "open_ms"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "x"], "'x' is no list of numbers"),
        (["--threads", "0"], "rounds and threads must be 1 or more"),
        (["--beta", "2"], "beta must lie in"),
        (["--shape", "image"], "--shape image: expected an input's name"),
        (["--shape", "nothing=1"], "no input 'nothing'"),
    ],
)
def test_wrong_usage_is_one_line(options, message):
    done = CliRunner().invoke(cli, ["bench", str(DIGITS / "digits.onnx"), *options])
    assert done.exit_code != 0
    assert message in str(done.exception) + done.output
