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
    # The same data may lie there already; other data are never overwritten.
    ctonnx.patch(external, 1.0, output=tmp_path / "out" / "m.onnx", force=True)
    (tmp_path / "out" / "weights.bin").write_bytes(b"somebody else's!")
    with pytest.raises(UsageError, match=r"weights\.bin: exists and holds other data"):
        ctonnx.patch(external, 1.0, output=tmp_path / "out" / "m.onnx", force=True)
    assert (tmp_path / "out" / "weights.bin").read_bytes() == b"somebody else's!"
    assert sorted(os.listdir(tmp_path / "out")) == ["m.onnx", "weights.bin"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"location": "../weights.bin"}, "unsafe external data location"),
        ({"location": "/etc/passwd"}, "unsafe external data location"),
        ({"location": "sub/../../weights.bin"}, "unsafe external data location"),
        ({"location": "link.bin"}, "leave the model's folder"),
        ({"location": "pipe"}, "no regular file"),
        ({"location": "missing.bin"}, "missing"),
        ({"offset": "8"}, "too short"),
        ({"offset": "-8"}, "too short"),
        ({"length": "1000"}, "too short"),
        ({"length": "8"}, "too short"),
        ({"length": "many"}, "external data of 'w'"),
        ({"location": "loop"}, "external data of 'w'"),
        ({"location": "a\0b"}, "external data of 'w'"),
        ({"location": "x" * 300}, "external data of 'w'"),
    ],
)
def test_unsafe_external_data_are_refused(external, tmp_path, change, message):
    (tmp_path / "outside.bin").write_bytes(bytes(16))
    (external.parent / "link.bin").symlink_to(tmp_path / "outside.bin")
    (external.parent / "loop").symlink_to(external.parent / "loop")
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


def test_a_failing_edit_leaves_nothing_and_changes_nothing(external, tmp_path):
    def fail(result, path):
        assert run(path).shape == (1, 4)
        raise ZeroDivisionError

    (tmp_path / "out").mkdir()
    for folder in (external.parent, tmp_path / "out"):
        (folder / "old.onnx").write_bytes(b"before")
        before = sorted(os.listdir(folder))
        with pytest.raises(ZeroDivisionError):
            files.edit(external, lambda model: None, folder / "old.onnx", True, fail)
        assert sorted(os.listdir(folder)) == before
        assert (folder / "old.onnx").read_bytes() == b"before"


def test_the_output_may_not_be_the_data(external):
    with pytest.raises(UsageError, match="data of the model itself"):
        ctonnx.patch(external, 0.5, output=external.parent / "weights.bin", force=True)
    assert (external.parent / "weights.bin").stat().st_size == 16


def test_an_unreadable_file_is_an_error(tmp_path):
    for data in (
        b"",
        bytes(100),
        parsed(WEIGHTED.replace("w)", "x)")).SerializeToString()[:40],
    ):
        (tmp_path / "m.onnx").write_bytes(data)
        with pytest.raises(ModelError, match="not an ONNX model"):
            files.load(tmp_path / "m.onnx")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError, match="no regular file"):
        files.load(tmp_path / "pipe")
