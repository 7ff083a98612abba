"""Every code block of the user pages runs and prints what the page says.

A `console` block holds commands after "$ " and their output. A `text` block after a `python` block
holds its output. "..." stands for any text. Blocks run in the folder of their page, those of docs/
in the root. NOT_RUN lists the kinds of blocks that do not run, with the reason.
"""

import base64
import doctest
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "samples/*/README.md")
    for path in ROOT.glob(pattern)
)
RUN = ("console", "python")

# Language of a block -> why it is not run.
NOT_RUN = {
    "text": "output",
    "sh": "sets up a machine or takes long: CI or another test runs something like it",
    "gpu": "needs an NVIDIA GPU",
    "proto": "a server's configuration: another test reads it",
}
BLOCK = re.compile(r"^( *)(`{3,}|~{3,})(.*?)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """Pairs of a block's language and text."""
    matches = BLOCK.findall((ROOT / page).read_text())
    return [(info.strip(), textwrap.dedent(text)) for _, _, info, text in matches]


def runnable(page):
    return any(language in RUN for language, _ in blocks(page))


def assert_output(expected, actual, source):
    same = doctest.OutputChecker().check_output(expected, actual, doctest.ELLIPSIS)
    assert same, f"{source}\nexpected:\n{expected}\nactual:\n{actual}"


def run(command, folder):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)])
def test_blocks_print_what_the_page_says(page, tmp_path):
    # Leave out files from earlier runs of the blocks.
    ignored = shutil.ignore_patterns("*.ct.onnx", "build", "__pycache__")
    shutil.copytree(ROOT / "samples", tmp_path / "samples", ignore=ignored)
    folder = tmp_path if page.startswith("docs/") else tmp_path / Path(page).parent
    page_blocks = blocks(page)
    for i, (language, text) in enumerate(page_blocks):
        if language == "console":
            for command in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                line, _, expected = command.partition("\n")
                assert_output(expected, run(["bash", "-c", line], folder), line)
        elif language == "python":
            actual = run([sys.executable, "-c", text], folder)
            if i + 1 < len(page_blocks) and page_blocks[i + 1][0] == "text":
                assert_output(page_blocks[i + 1][1], actual, text)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_has_a_reason(page):
    for language, text in blocks(page):
        assert language in RUN or language in NOT_RUN, f"{language!r} in\n{text}"
        if language == "console":
            assert text.startswith("$ "), text


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)\s#]+)", (ROOT / page).read_text()):
        if "://" not in link:
            assert (ROOT / page).parent.joinpath(link).exists(), link


def test_ci_runs_the_commands_of_the_readme():
    commands = [text for language, text in blocks("README.md") if language == "sh"]
    assert len(commands) == 2
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_results_hold_the_table_that_the_sample_prints():
    (_, text), *_ = blocks("samples/boundary/README.md")
    assert text.partition("\n")[2] in (ROOT / "docs" / "results.md").read_text()


def test_every_sample_file_is_named_in_a_readme():
    for folder in (ROOT / "samples").iterdir():
        page = (folder / "README.md").read_text()
        for path in folder.iterdir():
            if path.name not in ("README.md", "__pycache__") and ".ct." not in path.name:
                assert path.name in page


def test_every_room_is_on_the_map():
    _, _, section = (ROOT / "README.md").read_text().partition("## Map")
    for path in (ROOT / "ctonnx").glob("*/__init__.py"):
        assert f"`ctonnx/{path.parent.name}/`" in section


@pytest.mark.parametrize("pattern", ["ctonnx/*.py", "custom_ops/ctu_*", "benchmarks/*.*"])
def test_every_module_is_on_the_map(pattern):
    """The map names it, or has a pattern for it like `ctu_cpu.*`."""
    _, _, section = (ROOT / "README.md").read_text().partition("## Map")
    names = re.findall(r"`(?:\w+/)?([\w.*]+\.[\w*]+)`", section)
    paths = [path for path in ROOT.glob(pattern) if not path.name.startswith("__")]
    assert paths
    for path in paths:
        assert any(fnmatch(path.name, name) for name in names), path.name


def test_the_figure_is_what_its_script_draws(tmp_path):
    """Compares only the text: the last digits of curves differ between versions of matplotlib."""
    pytest.importorskip("matplotlib")
    shutil.copy(ROOT / "docs" / "figures.py", tmp_path)
    run([sys.executable, "figures.py"], tmp_path)
    drawn, committed = (
        re.findall(r"<text[^>]*>(.*?)</text>", (folder / "ctu.svg").read_text())
        for folder in (tmp_path, ROOT / "docs")
    )
    assert drawn == committed
    assert {"β = 0.9", "c = 0.5"} < set(drawn)


@pytest.fixture
def in_process(monkeypatch, capsys, tmp_path):
    """A function that runs a script in `tmp_path` and returns what it prints.

    The script runs in this process, since importing PyTorch and its exporter in another one takes
    as long as the training. PyTorch's settings are restored.
    """
    torch = pytest.importorskip("torch")
    threads, exactly = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    def run(script, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        with torch.random.fork_rng():
            runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exactly)


@pytest.mark.filterwarnings("ignore")
def test_the_training_script_runs(in_process, tmp_path):
    """One epoch of the committed script gives a model and held-out data of the same form."""
    pytest.importorskip("sklearn")
    pytest.importorskip("onnxscript")
    script = ROOT / "samples" / "digits" / "train.py"
    out = in_process(script, "--epochs", 1, "--out", tmp_path)
    assert "test accuracy, ONNX Runtime" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits.onnx", "digits_test.npz"]
    committed = (script.parent / "digits_test.npz").read_bytes()
    assert (tmp_path / "digits_test.npz").stat().st_size == len(committed)


@pytest.mark.filterwarnings("ignore")
def test_the_training_script_of_the_playground_runs(in_process, tmp_path):
    """The data equal the committed ones. The networks are as good; rounding differs by machine, and
    so does that of the corrections."""
    pytest.importorskip("onnxscript")
    folder = ROOT / "samples" / "playground"
    out = in_process(folder / "train.py", "--out", tmp_path)
    first = re.search(r"beta 1.0  spiral accuracy (.*)  squared error (.*)", out)
    assert float(first[1]) > 0.97
    assert float(first[2]) < 0.08
    written, committed = (json.loads((at / "data.json").read_text()) for at in (tmp_path, folder))
    for kind in ("sharp", "blurred"):
        np.testing.assert_allclose(
            *(
                np.frombuffer(base64.b64decode(data["digits"]["corrections"].pop(kind)), "<f4")
                for data in (written, committed)
            ),
            rtol=1e-3,
            atol=1e-3,
        )
    assert written == committed
    assert sorted(p.name for p in tmp_path.glob("*.onnx")) == sorted(
        p.name for p in folder.glob("*.onnx")
    )
