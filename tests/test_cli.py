"""The command line: results on stdout, mistakes as one line on stderr, no file damaged."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import DIGITS, parsed

import ctonnx
from ctonnx import ctu
from ctonnx.cli import main as cli
from ctonnx.cli.inspect import rows
from ctonnx.cli.tables import columns
from ctonnx.rewriting.steer import BETA_AS, LOWERINGS
from ctonnx.rewriting.steered import SteeredModel

NO_ACTIVATION = """<ir_version: 8, opset_import: ["" : 17]>
g (float[4] x) => (float[4] y) { y = Neg(x) }"""


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run the command line in a folder that holds digits.onnx: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.onnx").write_bytes((DIGITS / "digits.onnx").read_bytes())

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ctonnx", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        # After an interruption it is ignored, also by the processes that the tests start.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run


def files():
    return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


def test_patch_writes_beside_the_model(run):
    code, out, err = run("patch", "digits.onnx", "--beta", "0.85")
    assert (code, out, err) == (
        0,
        "wrote digits.ct.onnx: 7 steered, 0 skipped at beta 0.85\n",
        "",
    )
    assert oct(os.stat("digits.ct.onnx").st_mode) == oct(os.stat("digits.onnx").st_mode)
    model = onnx.load("digits.ct.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert sum(map(ctu.is_ctu, model.graph.node)) == 7


def test_patch_json(run):
    code, out, err = run(
        "patch", "digits.onnx", "--beta", "0.85", "--exclude", "6$", "-o", "o.onnx", "--json"
    )
    document = json.loads(out)
    assert (code, err, document["schema_version"], document["output"]) == (0, "", 1, "o.onnx")
    assert document["replaced"][0] == {"name": "node_relu", "op": "Relu", "scope": ""}
    assert (document["written"], document["notes"], document["checks"]) == (True, [], [])
    assert document["skipped"] == [
        {
            "name": "node_relu_6",
            "op": "Relu",
            "scope": "",
            "reason": "its name matches exclude",
        }
    ]


def test_output_is_deterministic(run):
    for name in "ab":
        assert run("patch", "digits.onnx", "--beta", "0.85", "-o", f"{name}.onnx")[0] == 0
    assert files()["a.onnx"] == files()["b.onnx"]


@pytest.mark.parametrize("lowering", ["portable", "op", "primitives"])
@pytest.mark.parametrize("beta_as", ["initializer", "input", "required-input"])
def test_patch_check(run, lowering, beta_as):
    code, _, err = run(
        "patch",
        "digits.onnx",
        "--beta",
        "0.85",
        "--check",
        "--lowering",
        lowering,
        "--beta-as",
        beta_as,
    )
    assert code == 0, err
    assert "check passed: at beta 1 against the original" in err
    assert ("op library vs. fallback" in err) == (lowering == "portable")
    assert sorted(files()) == ["digits.ct.onnx", "digits.onnx"]


def test_dry_run_writes_nothing(run):
    before = files()
    code, out, _ = run("patch", "digits.onnx", "--beta", "0.85", "--dry-run")
    assert (code, out) == (
        0,
        "would write digits.ct.onnx: 7 steered, 0 skipped at beta 0.85\n",
    )
    assert json.loads(run("patch", "digits.onnx", "--beta", "0.85", "--dry-run", "--json")[1])
    assert files() == before


def test_inspect_set_unpatch(run):
    assert run("patch", "digits.onnx", "--beta", "0.85")[0] == 0
    _, out, _ = run("inspect", "digits.ct.onnx")
    header, first, *_ = out.splitlines()
    assert header.split() == ["STATE", "OP", "SHAPE", "NAME", "MODULE"]
    assert first.split() == [
        "steered",
        "Relu",
        "batch,16,8,8",
        "node_relu",
        "stem.1",
        "beta",
        "0.85",
    ]
    assert out.splitlines()[-1] == "7 steered, 0 steerable, 0 skipped"
    (first, *_) = json.loads(run("inspect", "digits.ct.onnx", "--json")[1])["activations"]
    assert first == {
        "name": "node_relu",
        "op": "Relu",
        "scope": "",
        "status": "steered",
        "reason": None,
        "beta": 0.85,
        "coeff": 0.5,
        "shape": ["batch", 16, 8, 8],
        "module": "stem.1",
    }
    assert run("set", "digits.ct.onnx", "--beta", "0.9")[:2] == (
        0,
        "wrote digits.ct.onnx: beta 0.9\n",
    )
    assert "beta 0.9\n" in run("inspect", "digits.ct.onnx")[1]
    document = json.loads(run("set", "digits.ct.onnx", "--beta", "1", "-o", "b.onnx", "--json")[1])
    assert document == {"schema_version": 1, "output": "b.onnx", "beta": 1.0}
    code, out, _ = run("unpatch", "digits.ct.onnx", "-o", "back.onnx")
    assert (code, out) == (0, "wrote back.onnx: unsteered\n")
    assert onnx.load("back.onnx") == onnx.load("digits.onnx")
    code, out, _ = run("unpatch", "digits.ct.onnx", "--force", "--json")
    assert json.loads(out)["output"] == "digits.onnx"
    assert files()["digits.onnx"] == files()["back.onnx"]


def test_inspect_says_where_and_why(run):
    """Empty columns are left out; only terminals get colors."""
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, ?] x, bool b) => (float[N, ?] y) {
          s = Sigmoid(x)  y = If (b) <
            then_branch = t () => (float[N, ?] a) { a = Relu(s) },
            else_branch = e () => (float[N, ?] c) { c = Neg(s) }> }"""
    )
    Path("m.onnx").write_bytes(model.SerializeToString())
    lines = run("inspect", "m.onnx")[1].splitlines()
    assert [line.split()[:4] for line in lines[:3]] == [
        ["STATE", "OP", "SHAPE", "NAME"],
        ["skipped", "Sigmoid", "N,?", "s"],
        ["steerable", "Relu", "N,?", "a"],
    ]
    assert "already smooth: nothing to steer" in lines[1]
    assert "y.then_branch" in lines[2]
    assert lines[3] == "0 steered, 1 steerable, 1 skipped"
    assert "\x1b" not in "".join(lines)
    assert any("\x1b" in line for line in columns(rows(SteeredModel(model).activations)))


def test_names_write_no_control_characters(run):
    """Of the terminal, of other lines, and of text from right to left."""
    model = parsed(NO_ACTIVATION)
    evil = "\x1b]0;evil\x07\x1b[2Jn\ny\r\x7f\x9b\u202e"
    model.graph.node[0].name = f"é {evil}"
    for op in "Relu", "Tanh", "LeakyRelu":
        model.graph.node.add(op_type=op, name=f"{op}{evil}", input=["x"], output=[op])
    onnx.save(model, "evil.onnx")
    relu = ["--include", "Relu", "--exclude", "Leaky"]
    outputs = [
        run("inspect", "evil.onnx"),
        run("inspect", "evil.onnx", "--json"),
        run("patch", "evil.onnx", "--beta", "0.5", *relu),
        run("patch", "evil.onnx", "--beta", "0.5", "--include", "Tanh"),
        run("validate", "evil.ct.onnx", "--against", "evil.onnx"),
        run("inspect", f"no{evil}.onnx"),
        run("inspect", "evil.onnx", f"--no{evil}"),
    ]
    assert [code for code, _, _ in outputs] == [0, 0, 0, 1, 0, 3, 2]
    for _, out, err in outputs:
        assert all(line.isprintable() for line in (out + err).split("\n")), (out, err)
    lines = outputs[0][1].splitlines()
    assert len(lines) == 5
    assert r"Relu\x1b]0;evil\x07\x1b[2Jn\ny\r\x7f\x9b\u202e" in lines[1]
    assert json.loads(outputs[1][1])["activations"][0]["name"] == f"Relu{evil}"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_names_that_the_terminal_cannot_show(run, encoding):
    model = parsed(NO_ACTIVATION)
    model.graph.node.add(op_type="Relu", name="ж", input=["x"], output=["r"])
    onnx.save(model, b"\xff.onnx")
    done = subprocess.run(
        [sys.executable, "-m", "ctonnx", "patch", b"\xff.onnx", "--beta", "0.5"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(rb"wrote \udcff.ct.onnx")
    listed = subprocess.run(
        [sys.executable, "-m", "ctonnx", "inspect", b"\xff.onnx"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert listed.returncode == 0
    assert "ж".encode(encoding, "backslashreplace") in listed.stdout


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_outputs_that_are_links_to_themselves(run, force):
    os.symlink("loop.onnx", "loop.onnx")
    before = set(os.listdir())
    for command in (
        ["patch", "digits.onnx", "--beta", "0.5", "-o", "loop.onnx"],
        ["patch", "digits.onnx", "--beta", "0.5", "-o", "loop.onnx/y.onnx"],
        ["sweep", "digits.onnx", "--data", "x.npz", "--beta", "0.5", "--save-best", "loop.onnx"],
        ["sweep", "digits.onnx", "--data", "loop.onnx", "-o", "loop.onnx"],
    ):
        code, out, err = run(*command, *force)
        assert (code, out, err.count("\n")) == (2, "", 1)
    assert run("inspect", "loop.onnx")[0] == 3
    assert set(os.listdir()) == before
    assert os.path.islink("loop.onnx")


def test_too_little_memory_is_one_line(run, monkeypatch):
    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr("ctonnx.model.files.load", full)
    code, out, err = run("inspect", "digits.onnx")
    assert (code, out, err.count("\n")) == (4, "", 1)
    assert "out of memory" in err


def test_sizes_of_thousands_of_digits(run):
    code, _, err = run("validate", "digits.onnx", "--shape", f"image={5000 * '9'}")
    assert code == 2
    assert "expected sizes like" in err


def test_doctor(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "works"
    report = json.loads(run("doctor", "--json")[1])
    assert report["ok"]
    assert not report["problems"]
    assert report["packages"]["ctonnx"]


def test_doctor_without_onnxruntime_finds_the_library(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out, err = run("doctor")
    assert code == 4
    assert err.splitlines() == [
        "problem: onnxruntime is not installed: pip install onnxruntime, or onnxruntime-gpu"
    ]
    assert "libctonnx_ops" in out


def test_doctor_says_what_is_wrong(run, monkeypatch):
    from ctonnx import doctor
    from ctonnx.ort import library

    with monkeypatch.context() as twice:
        twice.setattr(doctor, "_version", lambda package: "1.0")
        code, out, err = run("doctor")
        assert (code, out.splitlines()[-1]) == (0, "works")
        assert err.startswith("problem: onnxruntime and onnxruntime-gpu share one module")
    monkeypatch.setattr(doctor, "_largest_error", lambda: 0.1)
    code, out, err = run("doctor")
    assert (code, out.splitlines()[-1]) == (4, "the op library does not work, see above")
    assert "wrong by 1.0e-01" in err
    monkeypatch.setattr(doctor, "_largest_error", lambda: float("nan"))
    assert run("doctor")[0] == 4
    monkeypatch.setattr(library, "_LIBRARY", "libmissing.so")
    code, _, err = run("doctor")
    assert code == 4
    assert "installed without a C++ compiler" in err
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxruntime", None)
        code, _, err = run("doctor")
        assert (code, err.count("problem: ")) == (4, 2)
        assert "onnxruntime is not installed: pip install" in err
    # The check then uses the fallback.
    code, _, err = run("patch", "digits.onnx", "--beta", "0.85", "--check")
    assert code == 0
    assert err.count("check passed") == 1
    code, _, err = run(
        "patch", "digits.onnx", "--beta", "0.85", "--check", "--force", "--lowering", "op"
    )
    assert code == 4
    assert "installed without a C++ compiler" in err


SWEEP = ["sweep", "digits.onnx", "--data"]
VALIDATE = ("validate", "steered.onnx", "--against", "digits.onnx")

# Arguments, exit code, and part of the one line.
MISTAKES = [
    (["patch", "missing.onnx", "--beta", "0.5"], 3, "missing.onnx: no such file"),
    (["patch", "folder", "--beta", "0.5"], 3, "folder: is a folder"),
    (["patch", "truncated.onnx", "--beta", "0.5"], 3, "not an ONNX model, or truncated"),
    (["patch", "random.onnx", "--beta", "0.5"], 3, "not an ONNX model, or truncated"),
    (["patch", "empty.onnx", "--beta", "0.5"], 3, "not an ONNX model, or truncated"),
    (["patch", "none.onnx", "--beta", "0.5"], 1, "no activation to steer"),
    (["patch", "digits.onnx", "--beta", "1.5"], 2, "beta must lie in [0, 1], got 1.5"),
    (["patch", "digits.onnx", "--beta", "nan"], 2, "beta must lie in [0, 1], got nan"),
    (["patch", "digits.onnx", "--beta", "much"], 2, "'much' is not a valid float"),
    (["patch", "digits.onnx", "--beta", "1", "--coeff", "2"], 2, "coeff must lie in [0, 1]"),
    (["patch", "digits.onnx", "--beta", "0.5", "--include", "("], 2, "not a regular expression"),
    (["patch", "digits.onnx", "--beta", "0.5", "--ops", "gelu"], 2, "unknown op 'gelu'"),
    (["patch", "digits.onnx", "--beta", "0.5", "--ops", ""], 2, "unknown op ''"),
    (["validate", "digits.onnx", "--torch", "x:y", "--providers", ""], 4, " is not available"),
    (["patch", "digits.onnx", "--beta", "0.5", "-o", "taken.onnx"], 2, "exists already"),
    (["patch", "digits.onnx", "--beta", "0.5", "--dry-run", "--check"], 2, "does not go with"),
    (["patch", "digits.onnx", "--beta", "0.5", "-o", "folder"], 2, "folder: is a folder"),
    (["patch", "digits.onnx", "--beta", "0.5", "-o", "no/such.onnx"], 2, "no folder no"),
    (["patch", "digits.onnx", "--beta", "0.5", "-o", "x" * 300], 2, "File name too long"),
    (["patch", "digits.onnx", "--beta", "0.5", "-o", "pipe", "--force"], 2, "no regular file"),
    (["patch", "digits.onnx", "--beta", "0.5", "-o", "no/x.onnx", "--dry-run"], 2, "no folder no"),
    (["patch", "digits.onnx", "--beta", "0.5", "-o", "new/"], 2, "new: is a folder"),
    (["patch", "digits.onnx", "--beta", "0.5", "-o", "taken.onnx/"], 2, "is a folder"),
    (["patch", "digits.onnx", "--beta", "0.5", "-o", ""], 2, "is a folder"),
    (["patch", "", "--beta", "0.5"], 3, "is a folder"),
    (
        ["patch", "digits.onnx", "--beta=1", "--lowering=primitives", "-o./digits.onnx", "--force"],
        2,
        "primitives cannot be undone: write to another file than MODEL",
    ),
    (["patch", "digits.onnx"], 2, "Missing option '--beta'"),
    (["patch", "digits.onnx", "--bet", "0.5"], 2, "No such option"),
    (["patch", "steered.onnx", "--beta", "0.5"], 2, "already steered"),
    (["patch", "wrong.onnx", "--beta", "0.5", "--check"], 3, "ctonnx: ONNX Runtime cannot load"),
    (
        ["patch", "old.onnx", "--beta", "0.5", "--check"],
        3,
        "the steered model: ONNX Runtime cannot",
    ),
    (["inspect", "missing.onnx"], 3, "no such file"),
    (["set", "digits.onnx", "--beta", "0.5"], 1, "not steered"),
    (["set", "steered.onnx", "--beta", "2"], 2, "beta must lie in [0, 1]"),
    (["unpatch", "digits.onnx", "-o", "x.onnx"], 1, "not steered"),
    (["unpatch", "missing.onnx"], 3, "no such file"),
    (["unpatch", "steered.onnx"], 2, "does not end in .ct.onnx"),
    (["validate", "missing.onnx"], 3, "no such file"),
    (["validate", "random.onnx"], 3, "not an ONNX model, or truncated"),
    (["validate", "digits.onnx"], 1, "the model is not steered: `ctonnx patch` steers it"),
    (["validate", "digits.onnx", "--against", "digits.onnx"], 1, "not steered"),
    (["validate", "steered.onnx", "--against", "missing.onnx"], 3, "missing.onnx: no such file"),
    (["validate", "steered.onnx", "--shape", "8x8"], 2, "--shape 8x8: expected an input's name"),
    ([*VALIDATE, "--shape", "x=1"], 2, "no input 'x': choose among image"),
    ([*VALIDATE, "--shape", "image=1x3x8x8"], 2, "'image' is batchx1x8x8, got 1x3x8x8"),
    ([*VALIDATE, "--inputs", "missing.npz"], 3, "missing.npz: no such file"),
    ([*VALIDATE, "--inputs", "taken.onnx"], 3, "cannot be read as an .npz file"),
    ([*VALIDATE, "--providers", "None"], 4, "None is not available: choose among"),
    (["frobnicate"], 2, "No such command 'frobnicate'"),
    ([*SWEEP, "missing.npz"], 3, "missing.npz: no such file"),
    ([*SWEEP, "no_such:factory"], 2, "no_such: cannot be imported"),
    ([*SWEEP, "taken.onnx"], 2, "expected .npz, .npy, .csv, a folder of images, or PKG:FACTORY"),
    ([*SWEEP, "empty.npz"], 3, "empty.npz: cannot be read: File is not a zip file"),
    ([*SWEEP, "few.npz", "--labels", "truth"], 2, "holds no array 'truth': it holds image, label"),
    ([*SWEEP, "few.npz", "--beta", "0.9:0.7:0.1"], 2, "FIRST:LAST:STEP must ascend"),
    ([*SWEEP, "few.npz", "--coeff", "2"], 2, "coeff must lie in [0, 1], got 2.0"),
    ([*SWEEP, "few.npz", "--metric", "speed"], 2, "no metric 'speed': choose among accuracy"),
    ([*SWEEP, "few.npz", "--confidence", "1"], 2, "confidence must lie in [0.5, 1), got 1.0"),
    ([*SWEEP, "few.npz", "--batch", "0"], 2, "the batch size must be at least 1, got 0"),
    ([*SWEEP, "few.npz", "--crop", "9"], 2, "which is not a folder of images: leave them out"),
    ([*SWEEP, "few.npz", "--mean", "a"], 2, "'a' is no list of numbers"),
    ([*SWEEP, "few.npz", "--preset", "best"], 2, "no preset 'best': choose among plain, imagenet"),
    ([*SWEEP, "few.npz", "--beta-as", "input"], 2, "--beta-as goes with --save-best"),
    ([*SWEEP, "few.npz", "--gpus", "1"], 2, "address and gpus apply only to engine ray"),
    ([*SWEEP, "few.npz", "--gpus", "-1"], 2, "-1.0 is not in the range x>=0"),
    ([*SWEEP, "few.npz", "--skip-broken"], 2, "the option skip-broken does not apply to few.npz"),
    ([*SWEEP, "few.npz", "--resume"], 2, "--resume goes with -o"),
    ([*SWEEP, "few.npz", "-o", "r.txt"], 2, "r.txt: results go to .csv, .json, .parquet"),
    ([*SWEEP, "few.npz", "--save-best", "taken.onnx"], 2, "taken.onnx: exists already"),
    ([*SWEEP, "few.npz", "--plot", "c.pdf"], 2, "c.pdf: drawings go to .png or .svg"),
    (["sweep", "none.onnx", "--data", "few.npz"], 1, "no activation to steer"),
    (["sweep", "-", "--data", "few.npz"], 2, "a sweep takes the model's file, not -"),
    (["sweep", "digits.onnx"], 2, "Missing option '--data'"),
    (["tune", "none.onnx", "--train", "few.npz"], 1, "no activation to steer"),
    (["tune", "-", "--train", "few.npz"], 2, "tune takes the model's file, and writes one, not -"),
    (["tune", "digits.onnx"], 2, "Missing option '--train'"),
    (["tune", "digits.onnx", "--train", "none.npz"], 3, "none.npz: no such file"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "line"), MISTAKES, ids=lambda v: " ".join(v) if type(v) is list else ""
)
def test_a_mistake_is_one_line_and_writes_nothing(run, arguments, code, line):
    if arguments[0] == "tune" and code != 2:
        pytest.importorskip("torch")
    digits = files()["digits.onnx"]
    os.mkdir("folder")
    os.mkfifo("pipe")
    for name, data in {
        "truncated.onnx": digits[: len(digits) // 2],
        "random.onnx": np.random.default_rng(0).bytes(1000),
        "empty.onnx": b"",
        "none.onnx": parsed(NO_ACTIVATION).SerializeToString(),
        "old.onnx": parsed(
            NO_ACTIVATION.replace("17", "6").replace("Neg", "Relu")
        ).SerializeToString(),
        "wrong.onnx": digits.replace(b"Conv", b"Cnov"),
        "taken.onnx": b"precious",
        "empty.npz": b"",
    }.items():
        Path(name).write_bytes(data)
    np.savez("few.npz", image=np.zeros((2, 1, 8, 8), np.float32), label=[0, 1])
    assert run("patch", "digits.onnx", "--beta", "0.5", "-o", "steered.onnx")[0] == 0
    before = files()
    actual, out, err = run(*arguments)
    assert (actual, out) == (code, "")
    assert err.count("\n") == 1
    assert err.startswith("ctonnx: ")
    assert line in err
    assert files() == before


def test_validate_passes_and_fails(run):
    """The output is tables or one JSON document; each failure is a line that says where."""
    assert run("patch", "digits.onnx", "--beta", "0.85")[0] == 0
    arguments = ("validate", "digits.ct.onnx", "--against", "digits.onnx")
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith(
        "compared with digits.onnx in ONNX Runtime, at beta 1, on image 1x1x8x8\n"
    )
    assert "CPUExecutionProvider with the op library: passed\n  OUTPUT  MAX ABS" in out
    document = json.loads(run(*arguments, "--json")[1])
    assert (document["schema_version"], document["ok"], document["diverges"]) == (1, True, {})
    first = document["outputs"][0]
    assert first["run"] == "CPUExecutionProvider with the op library"
    assert (first["name"], first["ok"], first["reason"], first["top1"]) == ("logits", True, None, 1)
    assert all(first[key] >= 0 for key in ("max_abs", "max_rel", "ulp", "cosine"))

    np.savez("nan.npz", image=np.full((1, 1, 8, 8), np.nan, np.float32))
    code, out, err = run(*arguments, "--inputs", "nan.npz")
    assert (code, out.count("FAILED")) == (1, 3)
    assert "with the op library: 'logits' NaN\n" in err
    assert "with the op library: the first activation to differ is node_relu\n" in err
    code, out, _ = run(*arguments, "--inputs", "nan.npz", "--json")
    assert (code, json.loads(out, parse_constant=pytest.fail)["outputs"][0]["ulp"]) == (1, None)


NETS = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        flat = nn.Sequential(nn.Flatten(), nn.ReLU())
        super().__init__(nn.Conv2d(1, 3, 3), nn.ReLU(), flat, nn.Sigmoid())

def make():
    print("made")
    return Net()

def without():
    return nn.Linear(3, 3)

def smooth():
    return nn.GELU()

def failing():
    raise KeyError("no\\nweights")

number = 3
"""


@pytest.fixture
def nets(run, monkeypatch):
    """Write nets.py with factories, and t.pth with T-CT weights; return that model and an input."""
    torch = pytest.importorskip("torch")
    from ctonnx.torch import trainable

    Path("nets.py").write_text(NETS)
    monkeypatch.setattr(sys, "path", [*sys.path, os.getcwd()])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    import nets

    x = torch.randn(1, 1, 5, 5)
    torch.export.save(torch.export.export(nets.Net().eval(), (x,)), "n.pt2")
    model = trainable(nets.Net(), x)
    for name, parameter in model.named_parameters():
        if "_raw_" in name:
            torch.nn.init.normal_(parameter)
    torch.save(model.state_dict(), "t.pth")
    torch.save({"1._raw_beta": torch.zeros(1), "1._raw_coeff": torch.zeros(1)}, "other.pth")
    torch.save([model], "pickled.pth")
    torch.save(nets.Net().state_dict(), "plain.pth")
    torch.save(nets.without().state_dict(), "linear.pth")
    return model, x


def outputs(path, x):
    session = ctonnx.session(path)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def test_export(run, nets):
    model, x = nets
    base = ("export", "nets:make", "--input", "1x1x5x5")
    dynamic = ("export", "nets:make", "--input", "batchx1x5x5")
    code, out, err = run(*dynamic, "--checkpoint", "t.pth", "-o", "t.onnx")
    assert (code, out) == (0, "wrote t.onnx: 2 steered, 1 skipped\n")
    assert err.startswith("made\nskipped node_sigmoid_4: already smooth: nothing to steer")
    assert err.count("\n") == 2
    for images in x, x.repeat(3, 1, 1, 1):
        assert abs(outputs("t.onnx", images) - model(images).detach().numpy()).max() < 1e-6
    # A separate process shows that PyTorch's progress and warnings are not printed. A state dict
    # without pairs supplies only its weights.
    arguments = ("--checkpoint", "plain.pth", "--beta", "0.7", "--coeff", "0.4", "-o", "-")
    code, out, err = piped(*base, *arguments, "--json")
    assert code == 0
    Path("b.onnx").write_bytes(out)
    document = json.loads(err.removeprefix("made\n"))
    assert (document["output"], len(document["replaced"])) == ("-", 2)
    assert [a["name"] for a in document["skipped"]] == ["node_sigmoid"]
    assert [a["module"] for a in document["replaced"]] == ["1", "2.1"]
    # The file of torch.export gives the same, and so does steering what PyTorch exports.
    for target in "n.pt2", "N.onnx":
        if target == "N.onnx":
            assert run("unpatch", "b.onnx", "-o", target)[0] == 0
        command = "export" if target == "n.pt2" else "patch"
        arguments = ("--beta", "0.7", "--coeff", "0.4", "-o", f"{target}.onnx")
        assert run(command, target, *arguments)[0] == 0
        np.testing.assert_array_equal(outputs(f"{target}.onnx", x), outputs("b.onnx", x))
    assert abs(outputs("b.onnx", x) - outputs("t.onnx", x)).max() > 1e-3
    # The exported original takes a checkpoint too.
    assert run("patch", "N.onnx", "--params", "t.pth", "-o", "p.onnx")[0] == 0
    np.testing.assert_allclose(outputs("p.onnx", x), outputs("t.onnx", x), atol=1e-6)
    # Without module names, --by-order assigns the pairs in order, and a message lists them.
    model = onnx.load("N.onnx")
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, "B.onnx")
    code, _, err = run("patch", "B.onnx", "--params", "t.pth", "-o", "q.onnx")
    assert (code, "--by-order" in err, Path("q.onnx").exists()) == (2, True, False), err
    code, _, err = run("patch", "B.onnx", "--params", "t.pth", "--by-order", "-o", "q.onnx")
    order = "took the pairs in order: 1 for node_ctu, 2.1 for node_ctu_1\n"
    assert (code, order in err) == (0, True), err
    np.testing.assert_array_equal(outputs("q.onnx", x), outputs("p.onnx", x))


NET = ("export", "nets:make", "--input", "1x1x5x5", "-o", "new.onnx")
OUT = ("--input", "1x3", "-o", "new.onnx", "--beta", "0.8")
EXPORT_MISTAKES = [
    ((*NET,), 1, "nets:make: has no CT unit: give --beta or --checkpoint"),
    ((*NET, "--beta", "2"), 2, "beta must lie in [0, 1]"),
    ((*NET, "--beta", "1", "-o", "digits.onnx"), 2, "digits.onnx: exists already"),
    ((*NET, "--beta", "1", "--input", "1x1"), 3, "nets:make: cannot be exported: "),
    ((*NET, "--beta", "1", "--input", "1x0"), 2, "--input 1x0: expected sizes like 1x3x224x224"),
    ((*NET, "--beta", "1", "--input", "1,3"), 2, "--input 1,3: expected sizes"),
    ((*NET, "--checkpoint", "none.pth"), 3, "none.pth: no such file"),
    ((*NET, "--checkpoint", "digits.onnx"), 3, "digits.onnx: cannot be read as weights alone"),
    ((*NET, "--checkpoint", "pickled.pth"), 3, "pickled.pth: cannot be read as weights alone"),
    ((*NET, "--checkpoint", "other.pth"), 2, "does not fit the model: Missing key(s)"),
    ((*NET, "--checkpoint", "plain.pth"), 2, "no _raw_beta: it does not come from a T-CT model"),
    (("export", "nets:make", "--input", "1x1x5x5", "--beta", "1"), 2, "Missing option '-o'"),
    (("export", "nets:make", "-o", "new.onnx"), 2, "the shape of its input is missing"),
    (("export", "nets", *OUT), 2, "nets: expected PKG:FACTORY, or a .pt2 file"),
    (("export", "nets:nothing", *OUT), 2, "nets:nothing: the module has no function of that name"),
    (("export", "nets:number", *OUT), 2, "nets:number: the module has no function of that name"),
    (("export", "nets:failing", *OUT), 2, "fails when it is called: KeyError: 'no"),
    (("export", "nets:dict", *OUT), 2, "the module has no function of that name"),
    (("export", "builtins:dict", *OUT), 2, "builtins:dict: returns a dict, expected an nn.Module"),
    (("export", "no.such:net", *OUT), 2, "no.such: cannot be imported: ModuleNotFoundError"),
    (("export", "nets:without", *OUT, "--checkpoint", "linear.pth"), 1, "the model holds none"),
    (("export", "nets:smooth", *OUT), 1, "nets:smooth: no activation to steer: skipped Gelu"),
    (("export", "n.pt2", *OUT), 2, "leave out --input and --checkpoint"),
    (("export", "none.pt2", "-o", "new.onnx"), 3, "none.pt2: no such file"),
    (("export", "bad.pt2", "-o", "new.onnx"), 3, "bad.pt2: cannot be read by torch.export"),
    (("patch", "digits.onnx", "--params", "t.pth"), 2, "'1' is no module of an activation"),
    (("patch", "digits.onnx", "--params", "digits.pth"), 3, "digits.pth: no such file"),
]


def test_mistakes_of_exports_are_one_line_and_write_nothing(run, nets):
    Path("bad.pt2").write_bytes(b"bad")
    before = files()
    for arguments, code, line in EXPORT_MISTAKES:
        actual, out, err = run(*arguments)
        assert (actual, out) == (code, ""), (arguments, err)
        err = err.removeprefix("made\n")
        assert err.count("\n") == 1, err
        assert err.startswith("ctonnx: ")
        assert line in err
    assert files() == before


def test_without_pytorch_the_line_says_so(run):
    program = "import sys; sys.modules['torch'] = None; from ctonnx.cli.main import main; main()"
    assert run("patch", "digits.onnx", "--beta", "0.8")[0] == 0
    patch = "patch", "digits.onnx", "--params", "t.pth"
    validate = "validate", "digits.ct.onnx"
    for arguments in NET, patch, validate:
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (4, "")
        hint = ", or compare with the original: --against ORIGINAL" if arguments is validate else ""
        line = f"ctonnx: PyTorch is not installed: pip install 'ctonnx[torch]'{hint}\n"
        assert done.stderr == line


def test_links_are_followed_and_modes_kept(run):
    assert run("patch", "digits.onnx", "--beta", "0.85")[0] == 0
    os.chmod("digits.ct.onnx", 0o640)
    os.symlink("digits.ct.onnx", "link.onnx")
    assert run("set", "link.onnx", "--beta", "0.9")[0] == 0
    assert os.path.islink("link.onnx")
    assert "beta 0.9\n" in run("inspect", "digits.ct.onnx")[1]
    assert oct(os.stat("digits.ct.onnx").st_mode & 0o777) == "0o640"


def piped(*arguments, model=b"", **options):
    """Run the command line in a separate process with `model` as standard input."""
    command = [sys.executable, "-m", "ctonnx", *arguments]
    done = subprocess.run(
        command, **({"input": model, "stdout": subprocess.PIPE} | options), stderr=subprocess.PIPE
    )
    return done.returncode, done.stdout, done.stderr.decode()


def test_standard_input_and_output(run):
    """As a filter, each command outputs the bytes that it would write to a file."""
    assert run("patch", "digits.onnx", "--beta", "0.85", "-o", "p.onnx")[0] == 0
    assert run("set", "p.onnx", "--beta", "0.9", "-o", "s.onnx")[0] == 0
    assert run("unpatch", "s.onnx", "-o", "u.onnx")[0] == 0
    written = files()
    code, patched, err = piped("patch", "-", "--beta", "0.85", model=written["digits.onnx"])
    assert (code, patched) == (0, written["p.onnx"])
    assert err == "wrote -: 7 steered, 0 skipped at beta 0.85\n"
    code, changed, err = piped("set", "-", "--beta", "0.9", "--json", model=patched)
    assert (code, changed, json.loads(err)["output"]) == (0, written["s.onnx"], "-")
    assert piped("unpatch", "-", model=changed)[:2] == (0, written["u.onnx"])
    assert piped("patch", "digits.onnx", "--beta", "0.85", "-o", "-")[1] == written["p.onnx"]
    code, out, err = piped("inspect", "-", model=patched)
    assert (code, out.decode(), err) == (0, run("inspect", "p.onnx")[1], "")
    arguments = ("patch", "-", "--beta", "0.85", "-o", "new.onnx")
    assert piped(*arguments, model=written["digits.onnx"])[1].startswith(
        b"wrote new.onnx: 7 steered"
    )
    assert files() == written | {"new.onnx": written["p.onnx"]}
    # ./- still names a file.
    os.rename("p.onnx", "-")
    assert "7 steered" in run("inspect", "./-")[1]


def test_dry_run_of_standard_input_writes_nothing(run):
    model = files()["digits.onnx"]
    code, out, err = piped("patch", "-", "--beta", "0.85", "--dry-run", model=model)
    assert (code, out, err) == (0, b"", "would write -: 7 steered, 0 skipped at beta 0.85\n")


def test_standard_input_and_output_mistakes_are_one_line(run):
    model = files()["digits.onnx"]
    external = onnx.load("digits.onnx")
    onnx.save(external, "e.onnx", save_as_external_data=True, size_threshold=0, location="w")
    patch = ("patch", "-", "--beta", "0.85")
    with open("/dev/full", "wb") as full:
        no_room = piped(*patch, model=model, stdout=full)
    terminal, other = os.openpty()
    results = [
        (piped(*patch), 3, "standard input: not an ONNX model"),
        (piped(*patch, model=model[:999]), 3, "standard input: not an ONNX model"),
        (piped(*patch, model=files()["e.onnx"]), 2, "external data, which - cannot carry"),
        (piped("patch", "e.onnx", "--beta", "1", "-o", "-"), 2, "external data, which - cannot"),
        (piped(*patch, "--check", model=model), 2, "it does not go with -"),
        (piped(*patch, model=model, stdout=other), 2, "a terminal: name a file with -o"),
        (no_room, 2, "standard output cannot be written: No space left on device"),
    ]
    os.close(other)
    os.close(terminal)
    for (code, out, err), expected, line in results:
        assert (code, out or b"", err.count("\n")) == (expected, b"", 1), err
        assert line in err


def test_a_progress_bar_is_for_terminals_only(run):
    onnx.save(onnx.load("digits.onnx"), "e.onnx", save_as_external_data=True, location="w")
    terminal, other = os.openpty()
    for folder, stderr in ("a", subprocess.PIPE), ("b", other):
        os.mkdir(folder)
        command = [sys.executable, "-m", "ctonnx", "patch", "e.onnx", "--beta", "1"]
        done = subprocess.run(
            [*command, "-o", f"{folder}/m.onnx"], stdout=subprocess.PIPE, stderr=stderr
        )
        assert done.stdout == f"wrote {folder}/m.onnx: 7 steered, 0 skipped at beta 1\n".encode()
        assert done.stderr in (b"", None)
    os.close(other)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert "copying data" in shown
    assert "100%" in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(run, monkeypatch, number):
    from ctonnx.check import validate

    monkeypatch.setattr(validate, "check_steered", lambda *a, **o: os.kill(os.getpid(), number))
    assert run("patch", "digits.onnx", "--beta", "0.5", "--check")[0] == 128 + number
    assert os.listdir() == ["digits.onnx"]


def test_standard_output_that_cannot_be_written_is_one_line(tmp_path):
    command = [sys.executable, "-m", "ctonnx", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_a_check_of_an_output_that_is_0_is_inconclusive(run):
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y)
    <float zero = {0.0}> { a = Mul(x, zero)  y = Relu(a) }"""
    Path("zero.onnx").write_bytes(parsed(text).SerializeToString())
    before = files()
    code, out, err = run("patch", "zero.onnx", "--beta", "0.9", "--check")
    assert (code, out) == (1, "")
    assert "output 'y' is inconclusive: it is zero throughout: without --check" in err
    assert files() == before
    assert run("patch", "zero.onnx", "--beta", "0.9")[0] == 0
    code, out, err = run("validate", "zero.ct.onnx", "--against", "zero.onnx")
    assert code == 1
    assert "CPUExecutionProvider without it: INCONCLUSIVE" in out
    assert "passed" not in out
    assert "inconclusive: give --inputs" in err


def test_a_check_of_a_constant_0_gives_the_absolute_difference(run):
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y, float[4] z)
    <float[4] zeros = {0.0, 0.0, 0.0, 0.0}> { y = Relu(x)  z = Relu(zeros) }"""
    Path("zero.onnx").write_bytes(parsed(text).SerializeToString())
    arguments = ("patch", "zero.onnx", "--beta", "0.9", "--check", "--force")
    assert re.search(r"original, largest absolute difference \d\.\de-07\n", run(*arguments)[2])
    checks = json.loads(run(*arguments, "--json")[1], parse_constant=pytest.fail)["checks"]
    (check,) = [c for c in checks if c["name"] == "z" and "original" in c["check"]]
    assert (check["ok"], check["max_rel"], 0 < check["max_abs"] < 1e-6) == (True, None, True)


def test_a_failing_check_writes_nothing(run, monkeypatch):
    from ctonnx.ort import compare

    monkeypatch.setattr(compare, "_TOLERANCE", 0.0)
    monkeypatch.setattr(compare, "_NOISE", 0.0)
    code, out, err = run("patch", "digits.onnx", "--beta", "0.85", "--check")
    assert (code, out) == (1, "")
    assert "at beta 1 against the original: output 'logits' differs by" in err
    assert list(files()) == ["digits.onnx"]


def test_a_bug_shows_its_traceback(run, monkeypatch):
    from ctonnx.rewriting import steered

    def bug(model):
        raise ZeroDivisionError

    monkeypatch.setattr(steered, "SteeredModel", bug)
    monkeypatch.setattr(sys, "argv", ["ctonnx", "inspect", "digits.onnx"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_interruption(run, monkeypatch):
    from ctonnx.calibration import calibrate as steering

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(steering, "steer", interrupt)
    assert run("patch", "digits.onnx", "--beta", "0.5")[0] == 130
    assert list(files()) == ["digits.onnx"]


def test_a_second_interrupt_changes_nothing(tmp_path):
    """Interrupts while the message is printed and while Python exits."""
    script = """if True:
        import os, signal
        from ctonnx.cli import main as cli
        from ctonnx import doctor
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt = lambda *args: os.kill(os.getpid(), signal.SIGINT)
        doctor.examine, say = interrupt, cli.say
        cli.say = lambda message: (say(message), interrupt())
        cli.main()"""
    command = [sys.executable, "-c", script, "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (130, "ctonnx: interrupted")


@pytest.mark.parametrize(
    ("reason", "code", "line"),
    [
        ("KeyboardInterrupt()", 130, "interrupted"),
        ("SystemExit(143)", 143, ""),
        ("OSError('no libfoo.so')", 4, "onnxruntime cannot be imported: OSError: no libfoo.so"),
        (
            "ModuleNotFoundError('No module named \\'numpy\\'', name='numpy')",
            4,
            "onnxruntime cannot be imported: ModuleNotFoundError: No module named 'numpy'",
        ),
    ],
)
def test_an_import_of_onnxruntime_that_fails(run, monkeypatch, reason, code, line):
    """onnxruntime's extension turns any exception into an ImportError."""
    source = f"raise ImportError('initialization failed') from {reason}"
    Path("onnxruntime.py").write_text(source)
    monkeypatch.syspath_prepend(os.getcwd())
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    actual, _, err = run("patch", "digits.onnx", "--beta", "0.9", "--check")
    assert (actual, err.strip()) == (code, line and f"ctonnx: {line}")


def test_choices_of_options_match_the_library():
    """The command line repeats them as literals, since --help must not import onnx."""
    from ctonnx.measure import coordinates, metrics, sweeping
    from ctonnx.rewriting import activations

    named = {option.name: option.help for option in (*cli.sweep.params[1:], *cli.patch.params[1:])}
    assert set(metrics.METRICS) <= set(re.findall(r"\w+", named["metric"]))
    assert {op.lower() for op in activations.STEERABLE} <= set(re.findall(r"\w+", named["ops"]))
    options = {option.name: option.type for option in cli.sweep.params}
    assert tuple(options["search"].choices) == sweeping.SEARCHES
    assert tuple(options["engine"].choices) == sweeping.ENGINES
    assert tuple(options["per"].choices) == coordinates.PER
    options = {option.name: option.type for option in cli.patch.params}
    assert tuple(options["lowering"].choices) == LOWERINGS
    assert tuple(options["beta_as"].choices) == BETA_AS


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0
    assert run()[:2] == (0, out)
    assert "..." not in out.partition("Commands:")[2]  # No first line is cut off.
    for command in (
        "patch",
        "inspect",
        "set",
        "sweep",
        "probe",
        "tune",
        "unpatch",
        "export",
        "doctor",
    ):
        assert f"  {command} " in out
        assert run(command, "--help")[0] == 0
    assert run("--version")[1].startswith("ctonnx")


def test_help_is_quick_and_imports_nothing_heavy():
    """--help takes at most 0.25 s of CPU time, the best of three, and imports nothing heavy."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "ctonnx", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.25
    heavy = "onnx onnxruntime numpy torch matplotlib sklearn scipy plotext PIL ray"
    program = f"""if True:
        import sys, ctonnx.cli.main
        assert not set("{heavy}".split()) & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", program], check=True)
