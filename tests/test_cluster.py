"""Sweeps on a Ray cluster of two nodes: the local result, whatever happens to a worker."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import DIGITS

import ctonnx
from ctonnx.cli import main as cli
from ctonnx.errors import MissingDependency, UsageError

ray = pytest.importorskip("ray")
pytest.importorskip("sklearn")
MODEL, DATA = str(DIGITS / "digits.onnx"), str(DIGITS / "digits_test.npz")

# Factories and a metric that workers import: one batch kills the worker that first prepares it.
MODULE = f"""
import os, signal
import numpy as np

held = dict(np.load({DATA!r}))


class Batches:
    deadly = None

    def __len__(self):
        return 9

    def __getitem__(self, i):
        marker = os.environ["CTONNX_TEST_MARKER"]
        if i == self.deadly and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        rows = slice(60 * i, 60 * (i + 1))
        return held["image"][rows], held["label"][rows]


class Deadly(Batches):
    deadly = 4


class Fatal(Batches):
    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


def wrong():
    return [(held["image"][:, :, :4], held["label"])]


def many():
    return wrong() * 9
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a head and a second node, of one CPU each, whose workers find `shards`."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("ray")
    (folder / "shards.py").write_text(MODULE)
    changed = {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "CTONNX_TEST_MARKER": str(folder / "marker"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in changed.items():
            patched.setenv(name, value)
        patched.syspath_prepend(folder)
        node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node)
        try:
            made.add_node(num_cpus=1, object_store_memory=80 << 20)
            yield made.address, folder / "marker"
        finally:
            ray.shutdown()
            made.shutdown()


def on_ray(cluster, *arguments, **options):
    return ctonnx.sweep(*arguments, engine="ray", address=cluster[0], **options)


@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_the_result_is_the_local_one(cluster, tmp_path, metric):
    on_ray(cluster, MODEL, DATA, "0.7:1:0.02", metric, output=tmp_path / "ray.csv")
    assert {node["Alive"] for node in ray.nodes()} == {True}
    assert len(ray.nodes()) == 2
    ctonnx.sweep(MODEL, DATA, "0.7:1:0.02", metric, output=tmp_path / "local.csv")
    assert (tmp_path / "ray.csv").read_bytes() == (tmp_path / "local.csv").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["local.csv", "ray.csv"]


def test_a_worker_that_is_killed_changes_nothing(cluster):
    whole = on_ray(cluster, MODEL, "shards:Batches", "0.7:1:0.05", "nll")
    assert not cluster[1].exists()
    survived = on_ray(cluster, MODEL, "shards:Deadly", "0.7:1:0.05", "nll")
    assert cluster[1].exists()
    local = ctonnx.sweep(MODEL, "shards:Batches", "0.7:1:0.05", "nll")
    assert whole.to_csv() == survived.to_csv() == local.to_csv()


def test_racing_and_the_command_line(cluster, tmp_path, monkeypatch, capsys):
    race = on_ray(cluster, MODEL, "shards:Batches", "0.5:1:0.05", "nll", search="racing")
    local = ctonnx.sweep(MODEL, "shards:Batches", "0.5:1:0.05", "nll", search="racing")
    assert race == local
    outputs = []
    for engine in ("ray", "local"):
        arguments = ["sweep", MODEL, "--data", DATA, "--engine", engine, "--beta", "0.7:1:0.1"]
        arguments += ["--address", cluster[0]] if engine == "ray" else []
        monkeypatch.setattr("sys.argv", ["ctonnx", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        assert not exit_.value.code, captured.err
        outputs.append(captured.out)
    assert outputs[0] == outputs[1]


def test_mistakes_come_back_as_one_line(cluster):
    with pytest.raises(UsageError, match=r"model takes float32\[N,1,8,8\]"):
        on_ray(cluster, MODEL, "shards:wrong")
    with pytest.raises(UsageError, match="no node with 1 GPUs"):
        on_ray(cluster, MODEL, DATA, gpus=1)
    images = np.zeros((3, 1, 8, 8), np.float32)
    with pytest.raises(UsageError, match="label 10 is out of range"):
        on_ray(cluster, MODEL, (images, np.array([1, 10, 2])))


def test_a_batch_that_always_kills_its_worker_is_one_line(cluster, monkeypatch):
    monkeypatch.setattr("ctonnx.measure.cluster._RETRIES", 1)
    with pytest.raises(
        MissingDependency, match=r"batch \d killed its worker 2 times.*Crashed"
    ) as caught:
        on_ray(cluster, MODEL, "shards:Fatal", [0.9])
    assert "\n" not in str(caught.value)


def test_paths_and_modules_of_the_current_folder(cluster, tmp_path, monkeypatch):
    """Workers, which were started elsewhere, find them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copy(MODEL, "m.onnx")
    shutil.copy(DATA, "d.npz")
    (tmp_path / "near.py").write_text(
        "import numpy as np\n"
        "def batches():\n    held = np.load('d.npz')\n    return [(held['image'], held['label'])]\n"
        "def size(outputs, labels): return outputs['logits'].max(1)\n"
    )
    whole = ctonnx.sweep(MODEL, DATA, [0.9], batch_size=540)
    assert on_ray(cluster, "m.onnx", "d.npz", [0.9], batch_size=540) == whole
    assert on_ray(cluster, "m.onnx", "near:batches", [0.9]) == whole
    local = ctonnx.sweep("m.onnx", "d.npz", [0.9], "near:size")
    assert on_ray(cluster, "m.onnx", "d.npz", [0.9], "near:size") == local


def test_errors_of_tasks_that_nobody_waits_for_are_not_printed(cluster, tmp_path):
    code = (
        "import sys, ctonnx.cli.main\n"
        f"sys.argv = ['ctonnx', 'sweep', {MODEL!r}, '--data', 'shards:many', '--engine', 'ray', "
        f"'--address', {cluster[0]!r}]\n"
        "ctonnx.cli.main.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr


def test_another_cluster_is_refused(cluster):
    on_ray(cluster, MODEL, DATA, [0.9])
    with pytest.raises(UsageError, match=r"Ray is already connected to "):
        ctonnx.sweep(MODEL, DATA, [0.9], engine="ray", address="10.0.0.1:6379")
    with pytest.raises(UsageError, match="gpus must not be negative, got -1"):
        on_ray(cluster, MODEL, DATA, [0.9], gpus=-1)


def test_no_cluster_is_one_line(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuse(**_):
        raise ConnectionError("Could not find any running Ray instance.\nMore.")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(MissingDependency, match="no Ray cluster to connect to: Could not find any"):
        ctonnx.sweep(MODEL, DATA, engine="ray")
