"""Model files: external data, and nothing half-written."""

import os

import numpy as np
import onnx
import pytest
from conftest import parsed

import ctonnx
from ctonnx import files
from ctonnx.errors import ModelError, UsageError

WEIGHTED = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y) { h = Add(x, w)  y = Relu(h) }"""


@pytest.fixture
def external(tmp_path):
    """A model whose weight lies in in/weights.bin."""
    model = onnx.parser.parse_model(WEIGHTED)
    weight = onnx.numpy_helper.from_array(np.float32([1, 2, 3, 4]), "w")
    model.graph.initializer.append(weight)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def run(path):
    (y,) = ctonnx.session(path).run(None, {"x": np.float32([[-9, 0, 1, 2]])})
    return y


def test_external_data_are_shared_in_the_same_folder(external):
    steered = ctonnx.patch(external, 1.0)
    assert sorted(os.listdir(external.parent)) == ["model.ct.onnx", "model.onnx", "weights.bin"]
    assert (external.parent / "weights.bin").stat().st_size == 16
    np.testing.assert_allclose(run(steered), [[0, 2, 4, 6]], atol=1e-5)


def test_external_data_are_copied_to_another_folder(external, tmp_path):
    (tmp_path / "out").mkdir()
    steered = ctonnx.patch(external, 1.0, output=tmp_path / "out" / "m.onnx")
    assert sorted(os.listdir(tmp_path / "out")) == ["m.onnx", "weights.bin"]
    np.testing.assert_allclose(run(steered), [[0, 2, 4, 6]], atol=1e-5)
    (tmp_path / "out" / "m.onnx").unlink()
    with pytest.raises(UsageError, match=r"weights\.bin: exists already"):
        ctonnx.patch(external, 1.0, output=tmp_path / "out" / "m.onnx")
    assert os.listdir(tmp_path / "out") == ["weights.bin"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"location": "../weights.bin"}, "unsafe external data location"),
        ({"location": "/etc/passwd"}, "unsafe external data location"),
        ({"location": "sub/../../weights.bin"}, "unsafe external data location"),
        ({"location": "link.bin"}, "leaves the model's folder"),
        ({"location": "pipe"}, "no regular file"),
        ({"location": "missing.bin"}, "missing"),
        ({"offset": "8"}, "too short"),
        ({"offset": "-8"}, "too short"),
        ({"length": "1000"}, "too short"),
        ({"length": "many"}, "damaged"),
    ],
)
def test_unsafe_external_data_are_refused(external, tmp_path, change, message):
    (tmp_path / "outside.bin").write_bytes(bytes(16))
    (external.parent / "link.bin").symlink_to(tmp_path / "outside.bin")
    os.mkfifo(external.parent / "pipe")
    model = onnx.load(external, load_external_data=False)
    tensor = model.graph.initializer[0]
    held = {e.key: e.value for e in tensor.external_data} | {"offset": "0", "length": "16"} | change
    del tensor.external_data[:]
    for key, value in held.items():
        tensor.external_data.add(key=key, value=value)
    external.write_bytes(model.SerializeToString())
    before = sorted(os.listdir(external.parent))
    with pytest.raises(ModelError, match=message):
        ctonnx.patch(external, 0.5)
    assert sorted(os.listdir(external.parent)) == before


def test_a_write_that_fails_leaves_nothing(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")

    def fail():
        with files.staged(path, force=True) as temporary:
            temporary.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert path.read_bytes() == b"before"


def test_an_unreadable_file_is_an_error(tmp_path):
    for data in (
        b"",
        b"\\x00" * 100,
        parsed(WEIGHTED.replace("w)", "x)")).SerializeToString()[:40],
    ):
        (tmp_path / "m.onnx").write_bytes(data)
        with pytest.raises(ModelError, match="not an ONNX model"):
            files.load(tmp_path / "m.onnx")
