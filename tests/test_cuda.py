"""The CUDA kernels: tests that run without a GPU, and tests marked `gpu` that need one.

`cuda_test.cc` runs the kernels' threads on the host, for test_kernels.py, which builds it.
"""

import ctypes
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import DIGITS, ROOT, op_model
from onnx import TensorProto, helper

import ctonnx
from ctonnx import ctu, doctor
from ctonnx.check import validate
from ctonnx.data.batches import Batch
from ctonnx.measure import engine
from ctonnx.ort import library

SOURCES = ROOT / "custom_ops"
CODES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float64): TensorProto.DOUBLE,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
}
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "cuda.py"))
NVCC = BENCHMARK["NVCC"]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


def why_no_gpu():
    """Why there is no GPU for these tests; None if there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver: libcuda.so.1 is missing"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "no NVIDIA GPU"
    return None


NO_GPU = why_no_gpu()


# ---- Without a GPU ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The benchmark's library of kernels for one architecture, the output of ptxas, and the PTX."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("nvcc")
    keep = ["-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
    command = BENCHMARK["compile_kernels"](90, folder / "kernels.so", *keep)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (ptx,) = folder.glob("*.ptx")
    return folder / "kernels.so", done.stderr, ptx.read_text()


def test_accesses_are_of_16_bytes_and_nothing_spills(compiled):
    """Each kernel on packets moves a packet by one access, and no kernel uses local memory."""
    _, log, ptx = compiled
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", log)
    assert spills == [("0", "0")] * 24
    kernels = ptx.split(".entry ")[1:]
    assert len(kernels) == 24
    wide = [kernel for kernel in kernels if "Li1E" not in kernel.partition("(")[0]]
    assert len(wide) == 16
    for kernel in wide:
        # Two loads: a thread's first packet and the later ones. Of double, two words of 8 bytes.
        assert len(re.findall(r"ld\.global\.(v4\.[ufb]32|v2\.[ufb]64)", kernel)) == 2
        assert len(re.findall(r"st\.global\.v4\.[ub]32", kernel)) == 1


@pytest.mark.skipif(NO_GPU is None, reason="there is a GPU")
def test_a_launch_that_fails_says_why(compiled):
    run = ctypes.CDLL(str(compiled[0])).run_ctu
    run.restype, number = ctypes.c_char_p, ctypes.c_uint64
    x = np.zeros(8, np.float64)
    at = ctypes.c_void_p(x.ctypes.data)
    for code in CODES.values():
        for points in (1, 2):
            message = run(code, at, at, number(8), at, at, number(points), number(1), None)
            assert b"CUDA" in message
            # Without a driver, CUDA reports one that is too old for the kernels.
            if "libcuda" in NO_GPU:
                assert message.startswith(b"the library's kernels (sm_90) do not run on this GPU")
                assert message.endswith(b"or with CTONNX_CUDA=OFF")


def architectures_in(library):
    """(kind, architecture) of the entries of a library's fat binaries: kind 1 is PTX, 2 is code."""
    data, magic = Path(library).read_bytes(), struct.pack("<IHH", 0xBA55ED50, 1, 16)
    architectures = set()
    at = data.find(magic)
    while at >= 0:
        (size,) = struct.unpack_from("<Q", data, at + 8)
        entry, end = at + 16, at + 16 + size
        while entry < end:
            kind, _, header, payload = struct.unpack_from("<HHIQ", data, entry)
            architectures.add((kind, *struct.unpack_from("<I", data, entry + 28)))
            entry += header + payload
        at = data.find(magic, end)
    return architectures


@needs_nvcc
@pytest.mark.skipif(
    os.environ.get("CTONNX_CUDA", "").upper() in ("0", "OFF", "NO", "FALSE", "N", "IGNORE"),
    reason="CUDA is turned off",
)
def test_doctor_lists_the_architectures_in_the_library():
    library = ctonnx.get_library_path()
    kernels = doctor.examine()["cuda_kernels"]
    assert kernels is not None
    assert kernels.endswith(" + PTX")
    named = {int(number) for number in re.findall(r"sm_(\d+)", kernels)}
    assert architectures_in(library) == {(2, arch) for arch in named} | {
        (1, min(named)),
        (1, max(named)),
    }


@needs_cmake
@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["-DCTONNX_CUDA=OFF"], {"CUDACXX": "/nonexistent"}, None),
        ([], {"CTONNX_CUDA": "off", "CUDACXX": "/nonexistent"}, None),
        ([], {"CTONNX_CUDA": "", "CUDACXX": "/nonexistent -G"}, "/nonexistent -G does not work"),
        (["-DCMAKE_CUDA_COMPILER=/first"], {"CUDACXX": "/second"}, "/first does not work"),
        ([], {"CUDACXX": "nvcc"}, "needs another host compiler"),
        (["-DCMAKE_CUDA_HOST_COMPILER=/host"], {"CUDACXX": "nvcc"}, "unknown option --threads"),
        (["-DCMAKE_SYSTEM_NAME=Linux"], {}, "cross-compiling"),
    ],
    ids=["option", "environment", "empty", "missing", "host", "old", "cross"],
)
def test_builds_without_cuda(tmp_path, options, environment, message):
    """CUDA is turned off, or nvcc does not work and a warning says why."""
    nvcc = tmp_path / "nvcc"  # a stub that wants `-ccbin` and lacks an option that the build uses
    nvcc.write_text(
        '#!/bin/sh\ncase "$*" in --list*) echo compute_75; exit;; *"-ccbin /host"*) ;; '
        "*) echo needs another host compiler >&2; exit 1;; esac\n"
        'case "$*" in *--threads*) echo unknown option --threads >&2; exit 1;; esac\n'
    )
    nvcc.chmod(0o755)
    around = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CTONNX_CUDA")}
    if environment.get("CUDACXX") == "nvcc":
        environment = {"CUDACXX": str(nvcc)}
    done = subprocess.run(
        ["cmake", "-S", SOURCES, "-B", tmp_path / "build", *options],
        env=around | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "+ PTX" not in done.stdout
    warned = " ".join(done.stderr.split())
    assert ("built without CUDA kernels" in warned) == (message not in (None, "cross-compiling"))
    assert message is None or message in warned + done.stdout


def test_doctor_says_why_cuda_is_not_used():
    available = ["CPUExecutionProvider"]
    assert "no working nvcc, or CTONNX_CUDA=OFF" in doctor._why_not_cuda(None, available)
    assert "has no CUDA provider" in doctor._why_not_cuda("sm_90 + PTX", available)


def test_cpp_and_python_list_the_same_cuda_providers():
    table = re.search(r"kCudaProviders\[\] = \{(.*?)\}", (SOURCES / "ctu_op.cc").read_text())
    assert tuple(re.findall(r'"(\w+)"', table[1])) == library.CUDA_PROVIDERS


@pytest.mark.parametrize(
    ("providers", "first"),
    [
        (["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"], True),
        (["NvTensorRTRTXExecutionProvider", "CPUExecutionProvider"], True),
        (["CUDAExecutionProvider", "TensorrtExecutionProvider"], False),
        (["CPUExecutionProvider"], False),
    ],
)
def test_tensorrt_before_cuda_is_logged(monkeypatch, caplog, providers, first):
    class Session:
        def get_providers(self):
            return providers

    monkeypatch.setattr(library, "open_session", lambda *arguments: Session())
    ctonnx.session(op_model().SerializeToString(), ["CPUExecutionProvider"], layout=False)
    assert ("--lowering primitives" in caplog.text) == first


@pytest.fixture
def gpu_sessions(monkeypatch):
    """Pretend that there is a GPU, and run everything on the CPU.

    Returns:
        A list that receives the `providers` of each session opened.
    """
    import onnxruntime as ort  # not at the top, since tests on a GPU import torch before it

    requested = []
    available = [*library.TENSORRT_PROVIDERS, library.CUDA_PROVIDERS[0], "CPUExecutionProvider"]

    class Session(ort.InferenceSession):
        starts = True  # whether CUDA starts

        def __init__(self, model, options=None, providers=None):
            requested.append(providers)
            super().__init__(model, options, ["CPUExecutionProvider"])
            names = [p if isinstance(p, str) else p[0] for p in providers or ()]
            self.names = names if self.starts else ["CPUExecutionProvider"]
            self.options = {p[0]: p[1] for p in providers or () if not isinstance(p, str)}

        def get_providers(self):
            return self.names

        def get_provider_options(self):
            return {name: self.options.get(name, {}) for name in self.names}

    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(library, "cuda_kernels", lambda library: "sm_90 + PTX")
    return requested


def test_tensorrt_is_used_only_on_request(gpu_sessions, caplog):
    model = op_model().SerializeToString()
    ctonnx.session(model)
    assert gpu_sessions.pop() == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert not caplog.text
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    ctonnx.session(model, providers)
    assert gpu_sessions.pop() == providers
    assert "--lowering primitives" in caplog.text


def is_registered(session):
    try:
        return session.get_session_options().get_session_config_entry("ctonnx.registered") == "1"
    except RuntimeError:
        return False


CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("providers", "starts", "kernels", "registers"),
    [
        ([CUDA, CPU], True, None, False),
        ([(CUDA, {"device_id": 0}), CPU], True, None, False),
        (None, True, None, False),
        ([CUDA, CPU], True, "sm_90 + PTX", True),
        ([CUDA, CPU], False, None, True),
        ([CPU, CUDA], True, None, True),
        ([CPU], True, None, True),
    ],
    ids=["cuda", "options", "default", "kernels", "no gpu", "cpu first", "cpu"],
)
def test_a_library_without_cuda_kernels_is_not_registered_on_cuda(
    gpu_sessions, monkeypatch, providers, starts, kernels, registers
):
    """With the library, each CTU would run on the CPU between two copies."""
    import onnxruntime as ort

    monkeypatch.setattr(ort.InferenceSession, "starts", starts)
    monkeypatch.setattr(library, "cuda_kernels", lambda library: kernels)
    model = ctonnx.patch(onnx.load(DIGITS / "digits.onnx"), 0.85)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session = ctonnx.session(model, providers)
    assert is_registered(session) == registers
    messages = [str(warning.message) for warning in caught]
    assert ["has none for CUDA" in message for message in messages] == [True] * (not registers)
    assert session.run(None, {"image": np.zeros((1, 1, 8, 8), np.float32)})[0].shape == (1, 10)


def test_a_model_without_a_fallback_gets_the_library_on_cuda(gpu_sessions, monkeypatch):
    monkeypatch.setattr(library, "cuda_kernels", lambda library: None)
    model = op_model(function=False).SerializeToString()
    assert is_registered(ctonnx.session(model, [CUDA, CPU]))


def test_options_with_the_library_registered_keep_it(gpu_sessions, monkeypatch):
    """Options cannot unregister a library."""
    import onnxruntime as ort

    monkeypatch.setattr(library, "cuda_kernels", lambda library: None)
    options = ort.SessionOptions()
    ctonnx.register(options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session = ctonnx.session(op_model().SerializeToString(), [CUDA, CPU], options)
    assert is_registered(session)


def test_models_are_compared_in_float32(gpu_sessions, tmp_path):
    """TF32, which CUDA uses by default, causes larger differences than the tolerance."""
    original = DIGITS / "digits.onnx"
    steered = ctonnx.patch(original, 0.85, output=tmp_path / "digits.ct.onnx")
    gpu_sessions.clear()
    assert validate.validate(steered, against=original, providers=[CUDA]).ok
    assert gpu_sessions.count([(CUDA, {"use_tf32": "0"})]) >= 2
    assert all(provider[0][0] == CPU or provider[0][1] for provider in gpu_sessions)


@pytest.mark.parametrize(
    ("providers", "device"),
    [
        ([(CUDA, {"device_id": "1"}), CPU], ("cuda", 1)),
        ([CPU, (CUDA, {"device_id": 2})], ("cuda", 2)),
        ([CUDA], ("cuda", 0)),
        ([CPU], ("cpu", 0)),
    ],
    ids=["second", "third", "first", "cpu"],
)
def test_a_sweep_keeps_to_the_device_of_its_session(gpu_sessions, monkeypatch, providers, device):
    import onnxruntime as ort

    bound, make = [], ort.OrtValue.ortvalue_from_numpy
    opened = ort.InferenceSession.io_binding

    def io_binding(session):
        binding = opened(session)
        bind = binding.bind_output
        binding.bind_output = lambda name, *where: (bound.append(where), bind(name))
        return binding

    monkeypatch.setattr(
        ort.OrtValue, "ortvalue_from_numpy", lambda x, *where: (bound.append(where), make(x))[1]
    )
    monkeypatch.setattr(ort.InferenceSession, "io_binding", io_binding)
    steerable = engine.prepare(DIGITS / "digits.onnx")
    runner = engine.Runner(steerable, providers)
    batch = Batch({"image": np.load(DIGITS / "digits_test.npz")["image"][:4]}, None)
    outputs = list(runner.outputs(batch, [(1.0, None), (0.8, None)], ["logits"]))
    assert bound == [device] * 2  # the images, the logits
    assert not np.array_equal(outputs[0]["logits"], outputs[1]["logits"])


# Runs the benchmark with its library in a given folder and a pretended GPU; it gets SIGTERM.
KILLED = f"""
import os, runpy, signal, sys, types
from pathlib import Path

folder = Path(sys.argv.pop(1))
cuda = types.SimpleNamespace(is_available=lambda: True)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
main = runpy.run_path({str(ROOT / "benchmarks" / "cuda.py")!r})["main"]


def benchmark(torch, args):
    print((folder / "shadow.so").read_text(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()


paths = {{"SHADOW": folder / "shadow.so", "BUILD": folder, "KERNELS": folder / "kernels.so"}}
main.__globals__.update(paths, benchmark=benchmark)
main()
"""


@pytest.mark.parametrize(
    ("arguments", "shadow", "code", "message"),
    [
        ([], None, 128 + 15, ""),
        (
            [],
            "old",
            4,
            "shadow.so is in the way, and is used in place of the installed one: remove",
        ),
        (["--rounds=1"], None, 2, "--rounds must be at least 2"),
    ],
    ids=["terminated", "in the way", "one round"],
)
def test_the_benchmark_leaves_libraries_as_they_were(tmp_path, arguments, shadow, code, message):
    """A library left beside the sources would silently be used instead of the installed one."""
    (tmp_path / "libctonnx_ops.so").write_text("built")
    (tmp_path / "kernels.so").touch()
    if shadow:
        (tmp_path / "shadow.so").write_text(shadow)
    command = [sys.executable, "-c", KILLED, tmp_path, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stdout.split() == ["built"] * (code == 143)
    left = [path.read_text() for path in tmp_path.glob("shadow.so")]
    assert left == ([shadow] if shadow else [])


# ---- With a GPU, inside ONNX Runtime -------------------------------------------------------------

# benchmarks/cuda.py sets CTONNX_REQUIRE_GPU, so that no test is skipped unnoticed.
skipped = NO_GPU is not None and not os.environ.get("CTONNX_REQUIRE_GPU")
gpu = [pytest.mark.gpu, pytest.mark.skipif(skipped, reason=str(NO_GPU))]


class Op:
    """A session of one CTU node on CUDA, run on device memory through IO binding.

    A tensor can start `shift` elements into its memory, which makes it unaligned. The memory of the
    output and around it is filled with a poison value before the run. The run must overwrite all
    of the output and nothing around it.
    """

    POISON = 0xA5

    def __init__(self, dtype, sloped=False, **options):
        import torch  # before onnxruntime, which needs the CUDA libraries it loads
        from onnxruntime import InferenceSession, SessionOptions

        self.torch, self.dtype, self.code = torch, np.dtype(dtype), CODES[np.dtype(dtype)]
        session_options = SessionOptions()
        session_options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        ctonnx.register(session_options)
        provider = (library.CUDA_PROVIDERS[0], {k: str(v) for k, v in options.items()})
        model = typed_model(self.code, sloped).SerializeToString()
        self.session = InferenceSession(model, session_options, providers=[provider])
        assert self.session.get_providers()[0] == provider[0], "CUDA did not start"

    def place(self, array, shift=0):
        """Copy an array to device memory: the memory with margins, and the array's address."""
        size, room = array.nbytes, 64 + shift * array.itemsize
        memory = self.torch.full((size + room + 64,), self.POISON, dtype=self.torch.uint8)
        content = np.frombuffer(array.tobytes(), np.uint8).copy()
        memory[room : room + size] = self.torch.from_numpy(content)
        memory = memory.cuda()
        return memory, memory.data_ptr() + room

    def bind(self, inputs, shape, output):
        """An IO binding of the inputs, (array, address) by name, and of Y at address `output`."""
        binding = self.session.io_binding()
        for name, (array, address) in inputs.items():
            code = CODES[array.dtype]
            binding.bind_input(name, "cuda", 0, code, array.shape, address)
        binding.bind_output("Y", "cuda", 0, self.code, shape, output)
        return binding

    def run(self, x, beta, coeff=0.5, slope=None, x_shift=0, y_shift=0, in_place=False):
        arrays = {
            "X": np.array(x, self.dtype),
            "beta": np.array(beta, np.float32),
            "coeff": np.array(coeff, np.float32),
        }
        if slope is not None:
            arrays["slope"] = np.array(slope, self.dtype)
        placed = {n: self.place(a, x_shift if n == "X" else 0) for n, a in arrays.items()}
        poison = np.full(x.size * self.dtype.itemsize, self.POISON, np.uint8)
        memory, address = (
            placed["X"]
            if in_place
            else self.place(poison.view(self.dtype).reshape(x.shape), y_shift)
        )
        self.torch.cuda.synchronize()
        inputs = {name: (arrays[name], placed[name][1]) for name in arrays}
        self.session.run_with_iobinding(self.bind(inputs, x.shape, address))
        result = memory.cpu().numpy()
        begin = address - memory.data_ptr()
        end = begin + x.size * self.dtype.itemsize
        assert (result[:begin] == self.POISON).all()
        assert (result[end:] == self.POISON).all()
        return np.frombuffer(result[begin:end].tobytes(), self.dtype).reshape(x.shape)


def typed_model(code, sloped):
    """A model of one CTU node on inputs of any shape and type, bfloat16 included."""
    names = ["X", "beta", "coeff", "slope"][: 4 if sloped else 3]
    own = {"X": code, "slope": code}
    inputs = [
        helper.make_tensor_value_info(name, own.get(name, TensorProto.FLOAT), None)
        for name in names
    ]
    graph = helper.make_graph(
        [helper.make_node(ctu.OP_TYPE, names, ["Y"], domain=ctu.DOMAIN)],
        "one_node",
        inputs,
        [helper.make_tensor_value_info("Y", code, None)],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(ctu.DOMAIN, ctu.VERSION)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


@pytest.fixture(scope="module")
def contract():
    """The module test_op.py, for its rows and its comparison."""
    import torch  # noqa: F401  before onnxruntime, which needs the CUDA libraries it loads

    import test_op  # isort: skip

    return test_op


def dtypes(function):
    kinds = pytest.mark.parametrize("dtype", list(CODES), ids=str)
    for mark in [kinds, *gpu]:
        function = mark(function)
    return function


def on_gpu(function):
    for mark in gpu:
        function = mark(function)
    return function


def row_of(contract, dtype):
    return next(row for row in contract.CONTRACT if np.dtype(row.numpy) == dtype)


def fresh(count, limit=100):
    rng = np.random.default_rng()
    spread = 10 ** rng.uniform(-6, np.log10(limit), count) * rng.choice([-1, 1], count)
    return np.where(rng.uniform(size=count) < 0.5, spread, rng.normal(size=count))


@dtypes
def test_contract_on_cuda(contract, dtype):
    op, row = Op(dtype, sloped=True), row_of(contract, dtype)
    for beta in contract.BETAS:
        x = fresh(20011, 1e4).astype(dtype)
        for coeff in contract.COEFFS:
            y = op.run(x, beta, coeff, 0.0)
            contract.assert_contract(row, y, x, beta, coeff)
        for slope in contract.SLOPES:
            rounded = np.asarray(slope, dtype)
            y = op.run(x, beta, 0.5, rounded)
            contract.assert_contract(row, y, x, beta, 0.5, rounded.astype(np.float64))


@dtypes
@pytest.mark.parametrize("op_type", ["CTUMax", "CTUMin", "CTUClip", "CTUHardSigmoid"])
def test_kinks_elsewhere_on_cuda(contract, dtype, op_type):
    if dtype == np.dtype(ml_dtypes.bfloat16):
        pytest.skip("the session feeds bfloat16 by a Cast, which CUDA may not have")
    session = contract.bounded_session(
        op_type, CODES[dtype], providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    row, x = row_of(contract, dtype), fresh(20011, 1e4).astype(dtype)
    for beta in contract.BETAS:
        y = contract.run(session, x, beta)
        contract.assert_bounded(row, op_type, y, x, beta)


@dtypes
def test_special_values_on_cuda(dtype):
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0]).astype(dtype)
    plain, sloped = Op(dtype), Op(dtype, sloped=True)
    for slope, minus in ((None, 0.0), (0.25, -np.inf), (-0.25, np.inf), (1.0, -np.inf)):
        op = plain if slope is None else sloped
        for beta in (0.0, 0.3, 0.5, 0.85, 1.0):
            y = op.run(special, beta, slope=slope).astype(np.float64)
            np.testing.assert_array_equal(y[:3], [np.nan, np.inf, minus])
            expected = ctu.ctu(0.0, np.float32(beta), slope=slope or 0.0)
            assert y[3] == y[4] == pytest.approx(float(expected), rel=1e-2, abs=6e-8)


@dtypes
def test_parameters_outside_the_unit_interval_give_nan(dtype):
    op, x = Op(dtype), np.array([-1, 0, 1, np.inf, -np.inf]).astype(dtype)
    for beta, coeff in (
        (-0.1, 0.5),
        (1.1, 0.5),
        (np.nan, 0.5),
        (0.85, -1),
        (0.85, 2),
        (0.3, np.nan),
    ):
        assert np.isnan(op.run(x, beta, coeff).astype(np.float64)).all()
    y = op.run(x, np.array([0.85, np.nan, 0.3, 2, 0.5])).astype(np.float64)
    np.testing.assert_array_equal(np.isnan(y), [False, True, False, True, False])


@dtypes
def test_every_length_and_alignment_on_cuda(contract, dtype):
    op, row = Op(dtype), row_of(contract, dtype)
    lanes = 16 // dtype.itemsize
    for length in range(68):
        for x_shift, y_shift in {(0, 0), (1, 1), (1, 0), (0, lanes - 1), (lanes - 1, 1)}:
            x = fresh(length).astype(dtype)
            y = op.run(x, 0.85, x_shift=x_shift, y_shift=y_shift)
            contract.assert_contract(row, y, x, 0.85, 0.5)
        y = op.run(x, 0.85, x_shift=length % lanes, in_place=True)
        contract.assert_contract(row, y, x, 0.85, 0.5)


@dtypes
@pytest.mark.parametrize("length", [4097, 1 << 20, (1 << 24) + 5])
def test_long_tensors_on_cuda(contract, dtype, length):
    """From one packet per thread to as many as a thread takes at a time."""
    x = np.tile(fresh(1 << 16), -(-length // (1 << 16)))[:length].astype(dtype)
    op, row = Op(dtype), row_of(contract, dtype)
    contract.assert_contract(row, op.run(x, 0.85, x_shift=1, y_shift=1), x, 0.85, 0.5)
    contract.assert_contract(row, op.run(x, 0.3, in_place=True), x, 0.3, 0.5)


@dtypes
@pytest.mark.parametrize(
    ("x_shape", "shape"),
    [
        ((), ()),
        ((), (1,)),
        ((0, 3), (3,)),
        ((5,), (1, 1, 1)),
        ((2, 3, 4, 5), (3, 1, 1)),
        ((2, 3, 4, 5), (5,)),
        ((2, 3, 4, 5), (2, 1, 1, 1)),
        ((2, 3, 4, 5), (4, 1)),
        ((2, 3, 4, 5), (2, 1, 4, 1)),
        ((2, 3, 4, 5), (2, 3, 4, 5)),
        ((7, 96), (96,)),
        ((4097, 33), (33,)),
        ((2, 64, 7, 7), (64, 1, 1)),
        ((2, 64, 200, 7), (64, 1, 1)),
    ],
)
def test_parameters_broadcast_on_cuda(contract, dtype, x_shape, shape):
    rng = np.random.default_rng()
    x = rng.normal(size=x_shape).astype(dtype)
    beta, coeff = rng.uniform(size=(2, *shape)).astype(np.float32)
    slope = rng.uniform(0, 1.5, size=shape).astype(dtype)
    op, row = Op(dtype, sloped=True), row_of(contract, dtype)
    full = np.broadcast_shapes(shape, x_shape)
    for shift in (0, 1):
        y = op.run(x, beta, coeff, slope, x_shift=shift, y_shift=shift)
        if full == x_shape:
            contract.assert_contract(row, y, x, beta, coeff, slope.astype(np.float64))
        else:
            parameters = (a.reshape(()) for a in (beta, coeff, slope.astype(np.float64)))
            contract.assert_contract(row, y, x, *parameters)


@on_gpu
def test_every_float16_on_cuda(contract):
    x = np.arange(65536, dtype=np.uint16).view(np.float16)
    for beta in (0.3, 0.5, 0.85, 1.0):
        y = Op(np.float16).run(x, beta)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
        finite = np.isfinite(x)
        contract.assert_contract(contract.CONTRACT[2], y[finite], x[finite], beta, 0.5)


@on_gpu
def test_more_elements_than_32_bits_count():
    op = Op(np.float16)
    torch, count = op.torch, (1 << 32) + 77
    if torch.cuda.mem_get_info()[0] < 3 * count:
        pytest.skip("needs 13 GB of GPU memory")
    x = torch.full((count,), -0.5, dtype=torch.float16, device="cuda")
    scalars = {"beta": np.array(0.85, np.float32), "coeff": np.array(0.5, np.float32)}
    placed = {name: op.place(array) for name, array in scalars.items()}
    torch.cuda.synchronize()
    binding = op.session.io_binding()
    for name, (_, address) in placed.items():
        binding.bind_input(name, "cuda", 0, TensorProto.FLOAT, (), address)
    binding.bind_input("X", "cuda", 0, TensorProto.FLOAT16, [count], x.data_ptr())
    binding.bind_output("Y", "cuda", 0, TensorProto.FLOAT16, [count], x.data_ptr())
    op.session.run_with_iobinding(binding)
    expected = np.float16(ctu.ctu(-0.5, np.float32(0.85)))
    assert torch.all(x == float(expected)).item()


@on_gpu
def test_a_captured_graph_replays_with_another_beta():
    """The host keeps no copy of beta: a replay uses the value now in the bound memory."""
    op = Op(np.float32, enable_cuda_graph=1)
    torch = op.torch
    x = torch.randn(4099, device="cuda")
    y = torch.empty_like(x)
    beta, coeff = (torch.tensor(v, device="cuda") for v in (0.9, 0.5))
    binding = op.session.io_binding()
    for name, tensor in (("X", x), ("beta", beta), ("coeff", coeff)):
        binding.bind_input(name, "cuda", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
    binding.bind_output("Y", "cuda", 0, np.float32, tuple(y.shape), y.data_ptr())
    for value in (0.9, 0.9, 0.9, 0.7, 0.2, 1.0, float("nan"), 0.85):
        beta.fill_(value)
        x.normal_()
        y.fill_(-77)
        torch.cuda.synchronize()
        op.session.run_with_iobinding(binding)
        torch.cuda.synchronize()
        expected = ctu.ctu(x.cpu().numpy(), np.float32(value))
        np.testing.assert_allclose(y.cpu().numpy(), expected, rtol=3e-7, atol=3e-7)


@on_gpu
def test_no_copies_around_the_op(tmp_path):
    """The optimised model of a network has no Memcpy nodes."""
    import torch  # noqa: F401  loads CUDA's libraries
    from onnxruntime import SessionOptions

    options = SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    steered = ctonnx.patch(onnx.load(ROOT / "samples" / "digits" / "digits.onnx"), 0.85)
    ctonnx.session(steered, [library.CUDA_PROVIDERS[0]], options)
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    assert sum(ctu.is_ctu(node) for node in nodes) == 7
    assert not [node.name for node in nodes if node.op_type.startswith("Memcpy")]


@on_gpu
def test_doctor_on_a_gpu():
    import torch  # noqa: F401  loads CUDA's libraries

    assert doctor.examine()["cuda"] == "works"
