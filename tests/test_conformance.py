"""The check of other runtimes fails if a runtime gives a wrong output or none."""

import sys

import numpy as np
import pytest
from conftest import DIGITS, ROOT

sys.path.insert(0, str(ROOT / "conformance"))
run = pytest.importorskip("run")
pytest.importorskip("torch")

# A worker that runs ONNX Runtime and then alters the outputs.
WORKER = """
import os, sys, time
sys.path.insert(0, {folder!r})
import numpy as np, worker

def runtime(path, fed):
    def altered(inputs):
        outputs, steered = worker.onnxruntime(path, fed)(inputs), "portable" in path
        {alter}
        return outputs
    return altered

worker.runtime = runtime
worker.main("runtime")
"""

FAULTS = {
    "wrong": (
        'outputs["logits"] = outputs["logits"] * np.float32(1.001)',
        "wrong: 'logits' differs by",
    ),
    "missing": ("outputs.clear()", "wrong: 'logits' missing in one of the runs"),
    "nan": ('outputs = {"logits": np.full_like(outputs["logits"], np.nan)}', "wrong: 'logits' NaN"),
    "refuses": ('raise ValueError("no such op\\nand more")', "no such op"),
    "crashes": ("os.kill(os.getpid(), 11)", "crashes: SIGSEGV"),
    "hangs": ("time.sleep(600)", "no answer in 15 s"),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    inputs = {"image": np.load(DIGITS / "digits_test.npz")["image"][:3]}
    models = {"digits": (DIGITS / "digits.onnx", inputs)}
    every = run.cases(models, tmp_path_factory.mktemp("models"))
    return [case for case in every if case.column.endswith((run.UNSTEERED, ", input"))]


def measured(cases, folder, alter="pass"):
    path = folder / "altered.py"
    path.write_text(WORKER.format(folder=str(ROOT / "conformance"), alter=alter))
    runtime = run.Runtime("A runtime", "onnx", (sys.executable, path))
    return {runtime.name: run.measure(runtime, cases, timeout=15)}


@pytest.fixture(scope="module")
def page(cases, tmp_path_factory):
    """The page of a runtime that works on all cases."""
    results = measured(cases, tmp_path_factory.mktemp("worker"))
    (runtime,) = results.values()
    assert all(result.error is not None and result.error < 1e-5 for result in runtime.values())
    columns = [column for _, column in runtime]
    text = run.render(results, {"A runtime": "A runtime 1.0"}, columns)
    text = f"Words.\n{run.BEGIN}\n{text}\n{run.END}\nMore."
    assert run.differences(text, results) == []
    return text


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported(cases, page, tmp_path, fault):
    """Only the faulty case is reported: the original and the file after it still work."""
    alter, reason = FAULTS[fault]
    results = measured(cases, tmp_path, f"if steered: {alter}")
    (line,) = run.differences(page, results)
    assert line.startswith(f"A runtime, digits, portable, input: works on the page, now: {reason}")


def test_a_runtime_that_does_not_start_is_reported(cases, page, tmp_path):
    results = {"A runtime": run.measure(run.Runtime("A runtime", "x", ("false",)), cases, 15)}
    lines = run.differences(page, results)
    assert len(lines) == len(cases)
    assert all("works on the page, now: ends with code 1" in line for line in lines)


def test_changes_in_either_direction_are_reported(cases, page):
    gone = {"A runtime": run.not_run(cases, "not run: x cannot be installed here")}
    assert len(run.differences(page, gone)) == len(cases)
    works = {"A runtime": {(c.model, c.column): run.Result(1e-7) for c in cases}}
    assert run.differences(page, works) == []
    assert any("now works" in line for line in run.differences(_first_fails(page), works))
    assert any("not on the page" in line for line in run.differences("", works))
    assert any("not measured" in line for line in run.differences(page, {}))


def _first_fails(page):
    head, _, row = page.rpartition("| digits | ")
    return f"{head}| digits | fails (1) |{row.partition('|')[2]}"


def test_the_page_has_every_runtime():
    """The committed page has a cell for each runtime, model and column."""
    text = (ROOT / "docs" / "runtimes.md").read_text()
    cells = run.cells(text.partition(run.BEGIN)[2].partition(run.END)[0])
    names = {runtime.name for runtime in run.runtimes(ROOT)}
    assert {name for name, _, _ in cells} == names
    assert len(cells) == len(names) * 5 * len(run.COLUMNS)
