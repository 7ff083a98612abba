"""A quick run of samples/transfer: the shape of the table, and properties of the numbers."""

import csv
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import ROOT
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

FOLDER = ROOT / "samples" / "transfer"
sys.path.insert(0, str(FOLDER))
import tasks  # noqa: E402
import transfer  # noqa: E402

COLUMNS = ["data", "method", "seed", "accuracy", "head", "added", "chosen", "pytorch"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that a quick run wrote, and its output."""
    out = tmp_path_factory.mktemp("transfer")
    command = [sys.executable, str(FOLDER / "transfer.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def rows(written):
    with (written[0] / "results.csv").open() as file:
        records = list(csv.DictReader(file))
    assert list(records[0]) == COLUMNS
    return {(row["data"], row["method"]): row for row in records}


def test_every_method_is_there_for_every_data_set(written, rows):
    assert list(rows) == [(name, method) for name in transfer.QUICK for method in transfer.METHODS]
    out, printed = written
    table = (out / "table.md").read_text()
    assert table in printed
    wide, beyond = table.split("\n\n")[:2]
    names = [*transfer.QUICK, "**mean**"]
    assert [line.split("|")[1].strip() for line in wide.splitlines()[2:]] == names
    assert [line.split("|")[1].strip() for line in beyond.splitlines()[2:]] == [*transfer.METHODS]
    for part in wide, beyond:
        assert len({line.count("|") for line in part.splitlines()}) == 1
    assert sorted(path.name for path in out.iterdir()) == [
        "curves.csv",
        "results.csv",
        "table.md",
        "transfer.png",
    ]


def test_the_table_matches_the_rows(written, rows):
    lines = (written[0] / "table.md").read_text().splitlines()
    for name in transfer.QUICK:
        (line,) = (line for line in lines if line.startswith(f"| {name} |"))
        cells = [cell.split("±")[0].strip() for cell in line.split("|")[2:7]]
        assert cells == [f"{float(rows[name, m]['accuracy']):.3f}" for m in transfer.METHODS]


def assert_table_matches_results(folder, names):
    """Assert that table.md repeats results.csv, apart from its last line, machine and time."""
    with (folder / "results.csv").open() as file:
        records = list(csv.DictReader(file))
    rows = []
    for row in records:
        accuracy = float(row["accuracy"])
        numbers = {key: int(row[key]) for key in ("seed", "head", "added")}
        # results.csv lacks the verdicts and the figure's intervals, which the table does not use.
        rows.append(
            {
                **row,
                **numbers,
                "accuracy": accuracy,
                "right": np.full(2, accuracy),
                "gain_half": 0.0,
            }
        )
    table = transfer.table(transfer.summarized(rows), names, "")
    committed = (folder / "table.md").read_text()
    assert table.rstrip() == committed.rstrip().rpartition("\n")[0].rstrip()


def test_a_table_matches_its_results(written, tmp_path):
    assert_table_matches_results(written[0], transfer.QUICK)
    for name in ("results.csv", "table.md"):
        (tmp_path / name).write_text((written[0] / name).read_text())
    text = (tmp_path / "table.md").read_text()
    (tmp_path / "table.md").write_text(text.replace("| 1 |", "| 2 |"))
    with pytest.raises(AssertionError):
        assert_table_matches_results(tmp_path, transfer.QUICK)


def test_the_committed_table_matches_the_committed_results():
    assert_table_matches_results(FOLDER, (*transfer.IMAGES, *transfer.SERIES))


@pytest.mark.parametrize("name", transfer.QUICK)
def test_beta_1_is_linear_probing(rows, written, name):
    """The accuracy equals that of scikit-learn on features of the committed network."""
    model = onnx.load(transfer.network(name))
    gemm = model.graph.node[-1]
    model.graph.output.append(onnx.ValueInfoProto(name=gemm.input[0]))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (train, labels), (test, expected) = transfer.data(name)
    features, test_features = (
        session.run([gemm.input[0]], {"input": x})[0].astype(np.float64) for x in (train, test)
    )
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    accuracy = head.fit(features, labels).score(test_features, expected)
    assert float(rows[name, transfer.PROBED]["accuracy"]) == accuracy
    with (written[0] / "curves.csv").open() as file:
        (point,) = (p for p in csv.DictReader(file) if p["data"] == name and p["beta"] == "1")
    assert float(point["test"]) == accuracy


def test_onnx_runtime_is_as_right_as_pytorch(rows):
    trained = [row for (_, method), row in rows.items() if method in transfer.TRAINED]
    assert len(trained) == len(transfer.QUICK) * len(transfer.TRAINED)
    for row in trained:
        assert row["accuracy"] == row["pytorch"]


def test_accuracy_is_above_chance(rows):
    for (name, method), row in rows.items():
        _, (_, labels) = transfer.data(name)
        assert float(row["accuracy"]) > 1.2 * np.bincount(labels).max() / len(labels), (
            name,
            method,
        )


def test_number_of_parameters_beyond_the_head(rows):
    for name in transfer.QUICK:
        added = [int(rows[name, method]["added"]) for method in transfer.METHODS]
        # T-CT: a pair for each of 16 + 2 (16 + 32 + 64) channels. LoRA: a row and a column each.
        assert added[:4] == [0, 1, 0, 480]
        model = onnx.load(transfer.network(name))
        shapes = [t.dims for t in model.graph.initializer if len(t.dims) == 4]
        assert added[4] == sum(d[0] + d[1] * d[2] * d[3] for d in shapes)


def test_training_again_gives_the_same(rows):
    """In another process than that of the run, with another state of all generators."""
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import transfer; transfer._prepare();"
        "print(transfer.trained('GunPoint', 'T-CT', 0, 40, (0.1,))['accuracy'])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == rows["GunPoint", "T-CT"]["accuracy"], done.stderr


def test_means_intervals_and_gains():
    """Compares with numbers computed by hand."""

    def row(method, seed, right):
        right = np.array(right, bool)
        return transfer._row("x", method, seed, right.mean(), 10, 2, "", right)

    plain = [row(transfer.PROBED, seed, [1, 1, 0, 0]) for seed in range(3)]
    tuned = [
        row("T-CT", i, right) for i, right in enumerate(([1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]))
    ]
    result = transfer.summarized([*plain, *tuned])["x", "T-CT"]
    assert result["accuracy"] == 0.75
    # Student's t with 2 degrees of freedom, 4.3027, times 0.25 / sqrt(3).
    assert result["half"] == pytest.approx(0.62103, abs=1e-4)
    assert result["gain"] == 0.25
    # The gains per sample are -1/3, 0, 1, 1/3: deviation 0.5693 / sqrt(4), times 3.1824.
    assert result["gain_half"] == pytest.approx(0.90596, abs=1e-3)
    summary = transfer.summarized([*plain, *tuned])
    assert transfer.relative(summary, ["x"], "T-CT", transfer.PROBED) == pytest.approx(50)


def test_a_quick_run_does_not_overwrite_the_committed_files():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "transfer.py"), "--quick"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--out" in done.stderr


def test_data_sets_fit_the_networks():
    for name in (*transfer.IMAGES, *transfer.SERIES):
        (train, labels), (test, expected) = transfer.data(name)
        shape = (1, 28, 28) if name in transfer.IMAGES else (1, 1, tasks.LENGTH)
        assert train.shape[1:] == test.shape[1:] == shape
        assert train.dtype == test.dtype == np.float32
        assert np.isfinite(train).all()
        assert np.isfinite(test).all()
        assert labels.dtype == expected.dtype == np.int64
        # Every class is in both parts.
        assert len(np.unique(labels)) == labels.max() + 1 == expected.max() + 1


def test_the_networks_are_equal_in_pytorch_and_onnx():
    import torch

    for name in ("digits", "GunPoint"):
        path = transfer.network(name)
        _, (inputs, _) = transfer.data(name)
        with torch.no_grad():
            expected = transfer.pretrain.load(path)(torch.from_numpy(inputs)).numpy()
        actual = transfer._outputs(path.read_bytes(), inputs)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
