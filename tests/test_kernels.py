"""The CPU kernels of every instruction set: alone, under sanitizers, and inside ONNX Runtime; the
op at its C boundary; and the threads of the CUDA kernels, on the host.

`kernels_test.cc`, `op_test.cc` and `cuda_test.cc` need no ONNX Runtime; `contract.h` has the rows
of the numeric contract. To see them fail, break what they test: set k_lo to 0 in ctu_math.h; lower
kCoarseDegree in ctu_table.h; end the loop of for_each_vector an element early in ctu_kernels.cc;
begin a packet elsewhere in ctu_thread.h; add 1 to next_point, origin or whole_count in
ctu_launch.h; lower kFastFromBeta in ctu_math.h; remove a `catch` of ctu_op.cc.
"""

import ctypes
import fcntl
import gc
import os
import shutil
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from conftest import ROOT, op_model
from onnx import TensorProto, helper, numpy_helper

import ctonnx
from ctonnx import ctu, doctor

LEVELS = ("avx512", "avx2", "portable")
SANITIZERS = {
    "plain": [],
    "address": ["-DCMAKE_CXX_FLAGS=-fsanitize=address,undefined -fno-sanitize-recover=all"],
    # What threads share is the same at every level: one saves time.
    "thread": ["-DCMAKE_CXX_FLAGS=-fsanitize=thread", "-DCTONNX_PORTABLE_ONLY=ON"],
}
PROGRAMS = {
    "plain": ["kernels_test", "cuda_test_fma"],
    "address": ["kernels_test", "cuda_test", "op_test"],
    "thread": ["kernels_test", "op_test"],
}


def at_level(level, *command):
    """Run a command with CTONNX_CPU set."""
    environment = {**os.environ, "CTONNX_CPU": level}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module", params=LEVELS)
def level(request):
    """An instruction set that this machine has."""
    if request.param not in supported_levels():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@cache
def supported_levels():
    code = (
        "from ctonnx import doctor; from ctonnx.ort import library; "
        "print(doctor._cpu_level(library.get_library_path()))"
    )
    return [n for n in LEVELS if at_level(n, sys.executable, "-c", code).stdout.strip() == n]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A function that builds PROGRAMS with a sanitizer, once, and gives their folder."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # what all workers share

    def build(sanitizer):
        folder = root / f"programs-{sanitizer}"
        with (root / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                configure = ["cmake", "-S", ROOT / "custom_ops", "-B", folder, "-DCTONNX_CUDA=OFF"]
                configure += SANITIZERS[sanitizer]
                if sanitizer != "plain":  # Sanitizers take long to compile at -O3.
                    configure.append("-DCMAKE_CXX_FLAGS_RELEASE=-Og")
                subprocess.run(configure, check=True, capture_output=True)
            target = ["cmake", "--build", folder, "--target", *PROGRAMS[sanitizer]]
            subprocess.run(target, check=True, capture_output=True)
        return folder

    return build


@pytest.mark.parametrize("sanitizer", ["plain", "address"])
def test_kernels_alone(programs, sanitizer, level):
    done = at_level(level, programs(sanitizer) / "kernels_test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{level}: 0 failures\n"


def test_what_threads_share(programs):
    done = at_level("portable", programs("thread") / "kernels_test", "threads")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("sanitizer", "program"),
    [(sanitizer, p) for sanitizer in PROGRAMS for p in PROGRAMS[sanitizer] if "cuda" in p],
)
def test_cuda_threads_on_the_host(programs, sanitizer, program):
    """nvcc may contract to fused multiply-adds or not: both keep the contract."""
    if program.endswith("fma") and "fma" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this machine has no fused multiply-add")
    done = subprocess.run([programs(sanitizer) / program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "0 failures\n"


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_op_at_its_c_boundary(programs, sanitizer):
    """Two ONNX Runtimes in one process stay apart, and failures leak nothing."""
    done = subprocess.run([programs(sanitizer) / "op_test"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "0 failures\n"


def test_op_at_every_level(level):
    if level == doctor.examine()["cpu_level"]:
        pytest.skip("test_op.py itself runs at this level")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = at_level(level, *command, str(ROOT / "tests" / "test_op.py"))
    assert done.returncode == 0, done.stdout


def test_an_unknown_level_is_an_error():
    code = "import ctonnx, onnxruntime; ctonnx.register(onnxruntime.SessionOptions())"
    done = at_level("sse9", sys.executable, "-c", code)
    assert done.returncode == 1
    assert 'CTONNX_CPU is "sse9"; this machine can use: ' in done.stderr


def test_doctor_names_the_level():
    best = os.environ.get("CTONNX_CPU") or supported_levels()[0]
    assert doctor.examine()["cpu_level"] == best


def test_nothing_of_one_level_can_serve_another(programs):
    """A weak symbol is merged over all files, whatever instructions it was compiled to."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    objects = list(programs("plain").rglob("ctu_kernels*.o"))
    assert objects
    for path in objects:
        listed = subprocess.run(["nm", path], check=True, capture_output=True, text=True).stdout
        kinds = {line.split()[-2] for line in listed.splitlines()}
        assert kinds <= set("bdDrtU"), (path, kinds)


@pytest.mark.parametrize("shape", [(50000,), (7, 96), (2, 64, 14, 14)])
def test_changing_beta_in_many_threads(shape):
    """One session, beta fed: each run answers for its own."""
    session = ctonnx.session(op_model(function=False).SerializeToString())
    per_channel = {1: (), 2: (96,), 4: (64, 1, 1)}[len(shape)]
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    coeff = np.array(0.5, np.float32)
    betas = rng.uniform(size=(8, *per_channel)).astype(np.float32)
    exact = [ctu.ctu(x, beta, coeff) for beta in betas]
    errors = []

    def work(first):
        for i in range(first, first + 40):
            (y,) = session.run(None, {"X": x, "beta": np.asarray(betas[i % 8]), "coeff": coeff})
            errors.append(np.abs(y - exact[i % 8]).max())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 160
    assert max(errors) < 1e-6


def test_a_thousand_sessions_leave_nothing_behind():
    """Memory after 1,000 sessions with tables per channel is what it was after 100."""
    parameters = np.full((64, 1, 1), 0.85, np.float32)
    graph = helper.make_graph(
        [helper.make_node(ctu.OP_TYPE, ["X", "beta", "coeff"], ["Y"], domain=ctu.DOMAIN)],
        "one_node",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [1, 64, 7, 7])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [1, 64, 7, 7])],
        [numpy_helper.from_array(parameters, name) for name in ("beta", "coeff")],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(ctu.DOMAIN, ctu.VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()
    x = np.ones((1, 64, 7, 7), np.float32)

    def open_and_run(times):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        ctonnx.register(options)
        for _ in range(times):
            ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(
                None, {"X": x}
            )
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return resident_pages * os.sysconf("SC_PAGE_SIZE")

    before = open_and_run(100)
    # One leaked set of tables is 50 kB: 900 would be 45 MB.
    assert open_and_run(900) - before < 4e6
