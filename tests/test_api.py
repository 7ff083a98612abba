"""The public functions: what they accept and return, and which names are visible."""

import ast
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import DIGITS, ROOT

import ctonnx
from ctonnx.ort import library

PUBLIC = [
    "Calibration",
    "CheckFailed",
    "CtonnxError",
    "InputFileError",
    "MissingDependency",
    "ModelError",
    "NothingToDo",
    "UsageError",
    "get_library_path",
    "inspect",
    "patch",
    "probe",
    "register",
    "session",
    "set",
    "sweep",
    "tune",
    "unpatch",
    "validate",
]


def test_the_public_names():
    assert ctonnx.__all__ == PUBLIC
    assert {n for n in dir(ctonnx) if not n.startswith("_")} == set(PUBLIC)
    assert all(getattr(ctonnx, name).__doc__ for name in PUBLIC[8:])
    with pytest.raises(AttributeError):
        ctonnx.steer  # noqa: B018


def public_functions(tree):
    """The public functions of a module, and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)
            continue
        # Commands get their arguments from click.
        function = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if function and not any("click" in ast.unparse(call) for call in node.decorator_list):
            yield node


def unannotated(tree):
    """The names of public functions that lack a type somewhere."""
    for function in public_functions(tree):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        typed = all(a.annotation for a in named if a.arg not in ("self", "cls"))
        if not typed or function.returns is None:
            yield function.name


def test_public_functions_are_annotated():
    modules = Path(ctonnx.__file__).parent.rglob("*.py")
    missing = {str(path): list(unannotated(ast.parse(path.read_text()))) for path in modules}
    assert {path: names for path, names in missing.items() if names} == {}
    assert list(unannotated(ast.parse("def f(x) -> int: ...\ndef g(x: int): ..."))) == ["f", "g"]


def test_errors_form_a_tree():
    codes = {name: getattr(ctonnx, name).exit_code for name in PUBLIC[1:8]}
    assert codes == {
        "CheckFailed": 1,
        "CtonnxError": 1,
        "InputFileError": 3,
        "MissingDependency": 4,
        "ModelError": 3,
        "NothingToDo": 1,
        "UsageError": 2,
    }
    assert all(issubclass(getattr(ctonnx, name), ctonnx.CtonnxError) for name in PUBLIC[1:8])


def test_a_path_gives_a_path(tmp_path):
    model = tmp_path / "digits.onnx"
    model.write_bytes((DIGITS / "digits.onnx").read_bytes())
    steered = ctonnx.patch(model, 0.85)
    assert steered == tmp_path / "digits.ct.onnx"
    assert {a.status for a in ctonnx.inspect(str(steered))} == {"steered"}
    back = ctonnx.unpatch(str(steered), tmp_path / "back.onnx")
    assert onnx.load(back) == onnx.load(model)
    with pytest.raises(ctonnx.UsageError, match="exists already"):
        ctonnx.patch(model, 0.85)
    assert ctonnx.patch(model, 0.5, force=True) == steered


def test_a_proto_gives_a_new_proto():
    model = onnx.load(DIGITS / "digits.onnx")
    before = model.SerializeToString(deterministic=True)
    steered = ctonnx.patch(model, 0.85)
    assert model.SerializeToString(deterministic=True) == before
    assert [a.beta for a in ctonnx.inspect(steered)] == [0.85] * 7
    assert ctonnx.unpatch(steered) == model
    with pytest.raises(ctonnx.UsageError, match="output goes with a path"):
        ctonnx.patch(model, 0.85, output="x.onnx")
    with pytest.raises(
        ctonnx.UsageError, match="expected a path, a ModelProto or a graphsurgeon Graph"
    ):
        ctonnx.patch(42, 0.85)


def test_a_graphsurgeon_graph_gives_a_graph():
    gs = pytest.importorskip("onnx_graphsurgeon")
    graph = gs.import_onnx(onnx.load(DIGITS / "digits.onnx"))
    steered = ctonnx.patch(graph, 0.85)
    with pytest.raises(ctonnx.ModelError, match="no record"):
        ctonnx.unpatch(steered)
    assert isinstance(steered, gs.Graph)
    assert not any(node.op == "CTU" for node in graph.nodes)
    assert sum(node.op == "CTU" for node in steered.nodes) == 7
    expected = ctonnx.patch(onnx.load(DIGITS / "digits.onnx"), 0.85)
    x = np.load(DIGITS / "digits_test.npz")["image"]
    for with_library in (True, False):
        options = ort.SessionOptions()
        if with_library:
            ctonnx.register(options)
        first, second = (
            ort.InferenceSession(m.SerializeToString(), options).run(None, {"image": x})[0]
            for m in (gs.export_onnx(steered), expected)
        )
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def test_session_runs_with_the_library_and_without(monkeypatch, tmp_path):
    """The library changes the speed, not the result; a warning reports its absence."""
    steered = ctonnx.patch(DIGITS / "digits.onnx", 0.85, output=tmp_path / "digits.ct.onnx")
    digits = np.load(DIGITS / "digits_test.npz")
    fast = ctonnx.session(steered).run(None, {"image": digits["image"]})[0]
    monkeypatch.setattr(library, "_LIBRARY", "libmissing.so")
    with pytest.warns(RuntimeWarning, match="without fast kernels"):
        slow = ctonnx.session(steered).run(None, {"image": digits["image"]})[0]
    np.testing.assert_allclose(fast, slow, rtol=1e-4, atol=1e-4)
    assert (fast.argmax(1) == digits["label"]).mean() > 0.9
    with pytest.raises(ctonnx.MissingDependency, match="without a C\\+\\+ compiler"):
        ctonnx.get_library_path()
    alone = ctonnx.patch(onnx.load(DIGITS / "digits.onnx"), 0.85, lowering="op")
    with (
        pytest.warns(RuntimeWarning, match="without fast kernels"),
        pytest.raises(ctonnx.MissingDependency, match="holds no fallback"),
    ):
        ctonnx.session(alone)


def test_session_takes_options_and_providers():
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ctonnx.session(DIGITS / "digits.onnx", ["CPUExecutionProvider"], options)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_session_options().intra_op_num_threads == 1
    with pytest.raises(ctonnx.MissingDependency, match="CPUExecutionProvider"):
        ctonnx.session(DIGITS / "digits.onnx", ["NoSuchExecutionProvider"])


def test_providers_are_a_list():
    with pytest.raises(ctonnx.UsageError, match="must be a list, got 'CPUExecutionProvider'"):
        ctonnx.session(DIGITS / "digits.onnx", "CPUExecutionProvider")
    pytest.importorskip("scipy")
    data = np.zeros((2, 1, 8, 8), np.float32), [0, 1]
    with pytest.raises(ctonnx.UsageError, match="must be a list, got 'CPUExecutionProvider'"):
        ctonnx.sweep(DIGITS / "digits.onnx", data, providers="CPUExecutionProvider")


@pytest.mark.skipif(not hasattr(ort, "get_ep_devices"), reason="options hold no providers yet")
def test_session_takes_providers_from_the_options(caplog):
    """ONNX Runtime's own way to choose an execution provider; here it is the CPU's."""
    options = ort.SessionOptions()
    options.add_provider_for_devices(
        [d for d in ort.get_ep_devices() if d.ep_name == "CPUExecutionProvider"], {}
    )
    with warnings.catch_warnings(), caplog.at_level("DEBUG", "ctonnx.runtime"):
        warnings.simplefilter("error")  # ONNX Runtime warns if it ignores them
        session = ctonnx.session(DIGITS / "digits.onnx", session_options=options)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert caplog.messages == ["plain layout: the session options hold providers"]


def test_session_takes_a_path_bytes_or_a_proto():
    path = DIGITS / "digits.onnx"
    for model in (path, str(path), path.read_bytes(), onnx.load(path)):
        assert ctonnx.session(model).get_inputs()[0].name == "image"
    with pytest.raises(ctonnx.UsageError, match="expected a path, bytes or a ModelProto, got int"):
        ctonnx.session(42)


def test_the_source_folder_finds_the_installed_library(tmp_path):
    """Python run in a clone imports the clone's ctonnx, which has no library beside it."""
    shutil.copytree(ROOT / "ctonnx", tmp_path / "ctonnx", ignore=shutil.ignore_patterns("*.so"))
    program = "import ctonnx; print(ctonnx.__file__, ctonnx.get_library_path())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    module, library = done.stdout.split()
    assert module.startswith(str(tmp_path))
    assert library == ctonnx.get_library_path()


def test_an_old_onnxruntime_is_refused(monkeypatch):
    monkeypatch.setattr(ort, "__version__", "1.17.3")
    with pytest.raises(ctonnx.MissingDependency, match=r"1\.17\.3 is too old"):
        ctonnx.register(ort.SessionOptions())


def test_the_library_never_imports_torch():
    program = """if True:
        import sys, ctonnx
        from ctonnx.cli import main as cli
        from ctonnx.check import validate
        from ctonnx import doctor
        doctor.examine()
        for name in ctonnx.__all__: getattr(ctonnx, name)
        assert "torch" not in sys.modules"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_set(tmp_path):
    path = ctonnx.patch(DIGITS / "digits.onnx", 0.8, output=tmp_path / "m.onnx")
    expected = ctonnx.patch(onnx.load(DIGITS / "digits.onnx"), 0.6, 0.3)
    assert ctonnx.set(onnx.load(path), 0.6, 0.3) == expected
    other = ctonnx.set(path, 0.6, 0.3, output=tmp_path / "n.onnx")
    assert onnx.load(other) == expected != onnx.load(path)
    assert ctonnx.set(path, 0.6, 0.3) == path
    assert onnx.load(path) == expected
    with pytest.raises(ctonnx.UsageError, match="exists already"):
        ctonnx.set(path, 0.5, output=other)
    with pytest.raises(ctonnx.NothingToDo):
        ctonnx.set(DIGITS / "digits.onnx", 0.5, output=tmp_path / "o.onnx")
    data = DIGITS / "digits_test.npz"
    calibrated = ctonnx.set(path, 0.5, calibration=data)
    with pytest.raises(ctonnx.UsageError, match="the model is calibrated"):
        ctonnx.set(calibrated, 0.4)


def test_validate(tmp_path):
    path = ctonnx.patch(DIGITS / "digits.onnx", 0.8, output=tmp_path / "m.onnx")
    assert ctonnx.validate(path, against=DIGITS / "digits.onnx").ok
    pytest.importorskip("torch")
    assert ctonnx.validate(path).ok
