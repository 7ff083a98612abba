"""samples/serving and docs/deployment.md: the same numbers in every language, and readable errors.

The tests build a stand-in for a release archive of ONNX Runtime: the shared library is that of the
onnxruntime wheel, and the headers come from a package with an older, compatible C API.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import onnxruntime as ort
import pytest
from conftest import DIGITS, ROOT
from google.protobuf import text_format
from test_docs import blocks, run

import ctonnx

EXPECTED = """\
beta 1.00  accuracy 0.9981  first logit -11.4311
beta 0.70  accuracy 0.8648  first logit -11.7585
"""
COMPILED = {"c": "cc", "cpp": "c++"}

# Tests with large downloads or builds have their own nox session.
in_its_session = pytest.mark.skipif(
    os.environ.get("NOX_CURRENT_SESSION") != "serving", reason="runs in `nox -s serving`"
)


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A copy of samples/serving after the Python steps of its README."""
    root = tmp_path_factory.mktemp("serving")
    for name in ("digits", "serving"):
        ignored = shutil.ignore_patterns("build")
        shutil.copytree(ROOT / "samples" / name, root / "samples" / name, ignore=ignored)
    folder = root / "samples" / "serving"
    (folder / "build").mkdir()
    model = folder / "build" / "steered.onnx"
    ctonnx.patch(DIGITS / "digits.onnx", 0.85, beta_as="required-input", output=model)
    (python,) = (text for language, text in blocks_of("serving") if language == "python")
    run([sys.executable, "-c", python], folder)
    shutil.copy(ctonnx.get_library_path(), folder / "build")
    return folder


def blocks_of(name):
    return blocks(f"samples/{name}/README.md")


def commands(word):
    """The only `sh` block of the sample's README that contains `word`."""
    (text,) = (text for lang, text in blocks_of("serving") if lang == "sh" and word in text)
    return text


@pytest.fixture(scope="session")
def programs(sample, fetched):
    """A function that builds the program of a language as the README says.

    It returns the output of the README's commands and the path of the program.
    """
    headers = next(fetched("amd-quark==0.13").glob("**/onnxruntime_c_api.h")).parent
    (library,) = (Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*")
    archive = sample / "onnxruntime"
    (archive / "lib").mkdir(parents=True)
    (archive / "include").symlink_to(headers)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (archive / "lib" / name).symlink_to(library)
    built = {}

    def build(language):
        if language not in built:
            if shutil.which(COMPILED[language]) is None:
                pytest.skip(f"needs {COMPILED[language]}")
            line = f"ORT={shlex.quote(str(archive))}\n{commands(f'serve.{language} ')}"
            out = run(["bash", "-euc", line], sample)
            built[language] = out, sample / "build" / f"serve_{language}"
        return built[language]

    return build


def program(language, sample, programs):
    """The command that runs the program of a language."""
    if language == "py":
        return [sys.executable, sample / "serve.py"]
    return [programs(language)[1]]


@pytest.mark.parametrize("language", COMPILED)
def test_compiled_programs_print_the_same_as_the_python_one(language, programs):
    out, _ = programs(language)
    assert out == 2 * EXPECTED


def test_the_page_has_the_expected_output():
    assert (ROOT / "samples" / "serving" / "README.md").read_text().count(EXPECTED) == 2


@pytest.mark.parametrize("language", ["py", *COMPILED])
def test_the_library_runs_the_model(language, sample, programs, tmp_path):
    """The model has no fallback function, so only the library can run it."""
    model = tmp_path / "op.onnx"
    options = {"beta_as": "required-input", "lowering": "op", "output": model}
    ctonnx.patch(DIGITS / "digits.onnx", 0.85, **options)
    command = [*program(language, sample, programs), model, sample / "build"]
    assert run([*command, ctonnx.get_library_path()], tmp_path) == EXPECTED
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ctonnx:CTU(-1) is not a registered function/op" in done.stderr


@pytest.mark.parametrize("language", ["py", *COMPILED])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("steered.onnx . ./missing.so", "cannot open shared object file"),
        ("steered.onnx . libctonnx_ops.so", "cannot open shared object file"),
        ("steered.onnx . labels.u8", "cannot open shared object file"),
        ("steered.onnx . ./labels.u8", "file too short|invalid ELF header"),
        ("steered.onnx . libm.so.6", "undefined symbol: RegisterCustomOps"),
        ("missing.onnx .", "File doesn't exist"),
        ("labels.u8 .", "Protobuf parsing failed|InvalidProtobuf|INVALID_PROTOBUF"),
        ("steered.onnx missing", "missing/images.f32"),
        ("steered.onnx", "usage: "),
    ],
)
def test_a_wrong_path_gives_one_line(language, arguments, message, sample, programs):
    command = [*program(language, sample, programs), *arguments.split()]
    done = subprocess.run(command, cwd=sample / "build", capture_output=True, text=True)
    assert done.returncode == 1
    assert any(part in done.stderr for part in message.split("|")), done.stderr
    assert done.stderr.startswith(("serve", "usage"))
    assert done.stderr.count("\n") == 1, done.stderr
    assert not done.stdout


def test_the_triton_configuration_fits_the_schema_and_the_model(fetched, tmp_path):
    """Checks what Triton's ONNX Runtime backend checks when it loads a model."""
    (path,) = fetched("tritonclient==2.73.0").glob("*/grpc/model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    ((_, text),) = (b for b in blocks("docs/deployment.md") if b[0] == "proto")
    config = text_format.Parse(text, schema.ModelConfig())
    library = config.model_operations.op_library_filename
    assert [Path(name).name for name in library] == [Path(ctonnx.get_library_path()).name]
    assert all(Path(name).is_absolute() for name in library)
    assert config.max_batch_size == 0

    model = DIGITS / "digits.onnx"
    steered = ctonnx.patch(model, 0.85, beta_as="input", output=tmp_path / "model.onnx")
    session = ctonnx.session(steered, ["CPUExecutionProvider"])
    optional = session.get_overridable_initializers()
    puts = [*session.get_inputs(), *optional, *session.get_outputs()]
    assert {put.name for put in (*config.input, *config.output)} == {put.name for put in puts}
    assert [i.name for i in config.input if i.optional] == [i.name for i in optional]
    dims = {put.name: list(put.dims) for put in (*config.input, *config.output)}
    for put in puts:
        assert put.type == "tensor(float)"
        sizes = [size if isinstance(size, int) else -1 for size in put.shape]
        assert dims[put.name] == (sizes or [1]), put.name
    assert {i.data_type for i in config.input} == {schema.TYPE_FP32}


@in_its_session
def test_node_runs_the_function(sample, tmp_path):
    """Runs the README's commands, errors, and the ignored optional input that it warns of."""
    assert run(["bash", "-euc", commands("npm install")], sample).endswith(EXPECTED)
    environment = {**os.environ, "NODE_PATH": str(sample / "build" / "node_modules")}

    def node(*arguments):
        command = ["node", sample / "serve.js", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    steered, data = sample / "build" / "steered.onnx", sample / "build"
    for arguments, message in (
        ((steered, data, ctonnx.get_library_path()), "cannot load an op library"),
        (("missing.onnx", data), "File doesn't exist"),
        ((steered, "missing"), "missing/images.f32"),
        ((steered,), "usage: "),
    ):
        done = node(*arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1

    optional = ctonnx.patch(
        DIGITS / "digits.onnx", 0.7, beta_as="input", output=tmp_path / "optional.onnx"
    )
    first, second = node(optional, data).stdout.splitlines()
    assert first.partition("accuracy")[2] == second.partition("accuracy")[2]


@in_its_session
def test_the_dockerfile_builds_and_serves(sample, tmp_path):
    """Carries out its instructions in a folder for each stage instead of a container."""
    lines = (ROOT / "samples" / "serving" / "Dockerfile").read_text().splitlines()
    context = tmp_path / "context"
    shutil.copytree(ROOT, context, ignore=shutil.ignore_patterns(".*", "build", "__pycache__"))
    shutil.copytree(sample / "build", context / "samples" / "serving" / "build")
    stages, here = {}, None
    for line in lines:
        instruction, _, rest = line.partition(" ")
        words = shlex.split(rest)
        if instruction == "FROM":
            stage = tmp_path / f"stage{len(stages)}"
            venv.create(stage, with_pip=True)
            stages[words[-1]] = stage
            environment = {**os.environ, "PATH": f"{stage / 'bin'}:{os.environ['PATH']}"}
        elif instruction == "COPY":
            source = context
            if words[0].startswith("--from="):
                source = stages[words.pop(0).removeprefix("--from=")]
            *sources, target = words
            (stage / target.strip("/")).mkdir(parents=True, exist_ok=True)
            for name in sources:
                path = source / name.strip("/")
                path = f"{path}/." if path.is_dir() else path
                subprocess.run(["cp", "-r", path, stage / target.strip("/")], check=True)
        elif instruction == "RUN":
            rooted = [f"{stage}{word}" if word.startswith("/") else word for word in words]
            subprocess.run(rooted, check=True, env=environment)
        elif instruction == "WORKDIR":
            here = stage / words[0].strip("/")
        elif instruction == "CMD":
            command = [f"{stage}{w}" if w.startswith("/") else w for w in json.loads(rest)]
            done = subprocess.run(
                command, cwd=here, env=environment, capture_output=True, text=True, check=True
            )
            assert done.stdout == EXPECTED
        else:
            assert instruction in ("#", "")
