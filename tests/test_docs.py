"""Every block of the READMEs is run, and prints what they say it prints.

A `console` block holds commands after "$ " and their output; a `python` block is followed by a
`text` block with its output where it has one; "..." stands for anything. `sh` blocks set up and are
run by CI.
"""

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [
    "README.md",
    "samples/digits/README.md",
    "samples/graphsurgeon/README.md",
    "samples/pytorch/README.md",
    "samples/sweep/README.md",
    "samples/transfer/README.md",
    "CONTRIBUTING.md",
    "docs/probe.md",
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    return BLOCK.findall((ROOT / page).read_text())


def assert_output(expected, got, what):
    same = doctest.OutputChecker().check_output(expected, got, doctest.ELLIPSIS)
    assert same, f"{what}\nexpected:\n{expected}\ngot:\n{got}"


def run(command, folder):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_blocks_print_what_the_page_says(page, tmp_path):
    # Without what somebody who followed the README has made there.
    ignored = shutil.ignore_patterns("*.ct.onnx")
    shutil.copytree(ROOT / "samples", tmp_path / "samples", ignore=ignored)
    # Those of docs/ run at the root.
    folder = tmp_path if page.startswith("docs/") else tmp_path / Path(page).parent
    found = blocks(page)
    assert found
    for i, (language, text) in enumerate(found):
        if language == "console":
            for command in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                line, _, expected = command.partition("\n")
                assert_output(expected, run(["bash", "-c", line], folder), line)
        elif language == "python":
            got = run([sys.executable, "-c", text], folder)
            if i + 1 < len(found) and found[i + 1][0] == "text":
                assert_output(found[i + 1][1], got, text)
        else:
            assert language in ("text", "sh")


def test_ci_runs_the_commands_of_the_readme():
    commands = [text for language, text in blocks("README.md") if language == "sh"]
    assert len(commands) == 2
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_sample_file_is_named_in_a_readme():
    for folder in (ROOT / "samples").iterdir():
        page = (folder / "README.md").read_text()
        for path in folder.iterdir():
            if path.name not in ("README.md", "__pycache__") and ".ct." not in path.name:
                assert path.name in page


def test_every_module_is_on_the_map():
    page = (ROOT / "README.md").read_text()
    for path in (ROOT / "ctonnx").glob("*.py"):
        assert path.name.startswith("__") or path.name in page, path.name


def test_the_training_script_runs(tmp_path):
    """One epoch from the committed script gives a model and held-out data of the same form."""
    pytest.importorskip("sklearn")
    pytest.importorskip("onnxscript")
    script = ROOT / "samples" / "digits" / "train.py"
    out = run([sys.executable, str(script), "--epochs", "1", "--out", str(tmp_path)], tmp_path)
    assert "test accuracy, ONNX Runtime" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits.onnx", "digits_test.npz"]
    committed = (script.parent / "digits_test.npz").read_bytes()
    assert (tmp_path / "digits_test.npz").stat().st_size == len(committed)
