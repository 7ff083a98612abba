"""Arrays in files whose headers lie: refused in one line, before anything is made of them."""

import io
import struct
import zipfile

import numpy as np
import pytest
from conftest import parsed

from ctonnx.data.batches import Input
from ctonnx.data.open import DataOptions, open_source
from ctonnx.errors import CtonnxError, InputFileError
from ctonnx.ort import runs
from ctonnx.rewriting import params
from ctonnx.rewriting.steer import steer

FLOAT = np.dtype(np.float32)
RELU = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"""
X = [Input("x", FLOAT, (None, 4))]
SHAPES = {
    "negative rows": "(-5,4)",
    "negative columns": "(20,-4)",
    "columns that overflow to a few": "(20,4611686018427387904,4)",
    "columns beyond any integer": "(20,9223372036854775808)",
    "rows of nothing": "(20,0)",
    "many rows of nothing": "(9223372036854775807,0)",
    "more rows of nothing than can be counted": "(99999999999999999999,0)",
    "truth values": "(True,4)",
    "many dimensions": str((1,) * 70),
    "more rows than there are": "(21,4)",
}
HEADERS = {
    what: f"{{'descr':'<f4','fortran_order':False,'shape':{shape}}}"
    for what, shape in SHAPES.items()
} | {
    "an open bracket": "{'descr':'<f4','fortran_order':False,'shape':(20,4",
    "an open quote": "{'descr':'<f4,'fortran_order':False,'shape':(20,4)}",
    "an open text": "{'descr':'<f4','fortran_order':False,'shape':(20,4)}\n'''",
    "an indented line": "{'descr':'<f4',\n\t 'shape':(20,4)}\n  x",
    "many signs": "{'descr':'<f4','fortran_order':False,'shape':(" + "-" * 9000 + "1,)}",
    "an order that is a number": "{'descr':'<f4','fortran_order':1,'shape':(20,4)}",
    "values of no bytes": "{'descr':'|V0','fortran_order':False,'shape':(20,4)}",
    "text of no bytes": "{'descr':'<U0','fortran_order':False,'shape':(20,4)}",
    "raw bytes": "{'descr':'|V4','fortran_order':False,'shape':(20,4)}",
    "arrays as values": "{'descr':('<f4',(2,)),'fortran_order':False,'shape':(20,2)}",
}


def npy(header):
    """An .npy file with this header and the data of 20 rows of 4 numbers."""
    text = header.encode()
    text += b" " * (63 - (10 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0" * 320


def archive(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def saved(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def one_line(caught, start):
    assert str(caught.value).startswith(str(start))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("what", HEADERS)
def test_data_whose_header_lies(tmp_path, what, compression):
    lying, inputs, labels = npy(HEADERS[what]), saved(np.zeros((20, 4), FLOAT)), saved(np.ones(20))
    for arrays in ({"x": lying, "labels": labels}, {"x": inputs, "labels": lying, "z": labels}):
        path = archive(tmp_path / "d.npz", compression, **arrays)
        with pytest.raises(InputFileError) as caught:
            open_source(path, X)
        one_line(caught, path)
    (tmp_path / "x.npy").write_bytes(lying)
    (tmp_path / "good.npy").write_bytes(inputs)
    with pytest.raises(InputFileError) as caught:
        open_source(tmp_path / "x.npy", X)
    one_line(caught, tmp_path / "x.npy")
    with pytest.raises(InputFileError):
        open_source(tmp_path / "good.npy", X, DataOptions(labels=tmp_path / "x.npy"))


@pytest.mark.parametrize("what", HEADERS)
def test_inputs_and_parameters_whose_header_lies(tmp_path, what):
    model = runs.Model(parsed(RELU).SerializeToString())
    path = archive(tmp_path / "d.npz", x=npy(HEADERS[what]))
    # A shape without elements is an array like any other to NumPy, and fails as an input.
    with pytest.raises(CtonnxError) as caught:
        runs.load_inputs(path, model, (), [])
    one_line(caught, path)
    path = archive(tmp_path / "p.npz", **{"y.beta": npy(HEADERS[what])})
    with pytest.raises(CtonnxError) as caught:
        steer(parsed(RELU), params=params.read(path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).strip()[-1] != ":"
