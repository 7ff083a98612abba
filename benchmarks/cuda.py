"""Verify the op on a GPU, then time it against a copy, ONNX Runtime's Relu and the fallback.

    python benchmarks/cuda.py [--build [--arch 90]] [--sanitize] [--only PART] [NETWORK.onnx]

`--build` compiles the op library and the kernels' benchmark with the machine's nvcc for one
architecture. `--sanitize` also runs part of the verification under compute-sanitizer, with its
tools memcheck and racecheck. PyTorch provides device memory. The network is timed in float32 and
float16, at several batch sizes. `--only` does one part: verify, kernels or models. Rows are printed
as they are measured, and again at the end.

Exit codes: 0 if all checks pass; 1 if one fails; 4 if there is no GPU, a dependency is missing, or
the library of an earlier run is still in place.
"""

import argparse
import ctypes
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda"
KERNELS = BUILD / "libcuda_kernel.so"
SHADOW = ROOT / "ctonnx" / "libctonnx_ops.so"  # if present, preferred to the installed one
TESTS = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "-m",
    "gpu",
    str(ROOT / "tests" / "test_cuda.py"),
]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

BETA, COEFF = 0.85, 0.5
SIZES = [1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 24, 1 << 26, 1 << 28, 1 << 30]  # bytes of X
LARGE = 1 << 28
BATCHES = (1, 32, 256)

# Of class probabilities: sessions may choose different convolution algorithms.
TOLERANCE = {"float32": 5e-3, "float16": 3e-2}


def leave(code, message):
    print(message, file=sys.stderr)
    sys.exit(code)


def shell(command, code, what, **options):
    try:
        failed = subprocess.run([str(part) for part in command], **options).returncode
    except FileNotFoundError:
        leave(4, f"{command[0]} is not installed")
    if failed:
        leave(code, f"{what} failed, see above")


def compile_kernels(arch, library, *options):
    """The command that compiles only the kernels, for one architecture, into `library`."""
    command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-shared", "-Xcompiler=-fPIC"]
    command += [f'-DCTONNX_CUDA_KERNELS="sm_{arch}"', *options]
    return [*command, Path(__file__).with_name("cuda_kernel.cu"), "-o", library]


def build(arch):
    """Compile the op library and the benchmark's library of kernels."""
    if NVCC is None:
        leave(4, "nvcc is not installed")
    options = [f"-DCTONNX_CUDA_ARCHITECTURES={arch}", "-DCTONNX_CUDA=ON"]
    options += [f"-DCMAKE_CUDA_COMPILER={NVCC}"]
    shell(["cmake", "-S", ROOT / "custom_ops", "-B", BUILD, *options], 4, "configuring")
    jobs = ["-j", os.cpu_count()]
    shell(["cmake", "--build", BUILD, "--target", "ctonnx_ops", *jobs], 4, "building")
    shell(compile_kernels(arch, KERNELS), 4, "building")


def verify(sanitize):
    """Run all tests that need a GPU; on request, those of small tensors under sanitizers too."""
    # A skipped test would go unnoticed.
    environment = {**os.environ, "CTONNX_REQUIRE_GPU": "1"}
    shell(TESTS, 1, "verification", cwd=ROOT, env=environment)
    if sanitize:
        for tool in ("memcheck", "racecheck"):
            # Racecheck checks only shared memory, which these kernels do not use.
            command = [
                "compute-sanitizer",
                "--tool",
                tool,
                "--error-exitcode",
                "9",
                "--report-api-errors",
                "no",
                "--kernel-regex",
                "kns=ctu_kernel",
                *TESTS,
                "-k",
                "length_and_alignment or broadcast or outside or special",
            ]
            shell(command, 1, f"compute-sanitizer's {tool}", cwd=ROOT, env=environment)


# ---- The kernel alone ----------------------------------------------------------------------------


def captured(torch, launches):
    """A CUDA graph of the launches: replaying it has almost no launch overhead."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for launch in launches:
            launch(stream)
    return graph


def seconds(torch, graphs, flush, rounds):
    """Name -> median seconds to replay a graph; they take turns, with a write of `flush` before."""
    times = {name: [] for name in graphs}
    order = list(graphs)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            times[name].append(1e-3 * begin.elapsed_time(end))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def time_kernel(torch, library, dtype, code, size, rounds, beta=BETA, points=1, inner=1):
    """Seconds of the kernel and of a copy of as many bytes, from memory instead of the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = size // torch.empty((), dtype=dtype).element_size()
    pairs = max(1, min(256, 4 * cache // (2 * size) + 1))
    xs = [torch.randn(count, device="cuda", dtype=torch.float32).to(dtype) for _ in range(pairs)]
    ys = [torch.empty_like(x) for x in xs]
    betas = torch.full((points,), beta, device="cuda")
    coeffs = torch.full((points,), COEFF, device="cuda")
    torch.cuda.synchronize()

    def run(x, y):
        def launch(stream):
            message = library.run_ctu(
                code,
                x.data_ptr(),
                y.data_ptr(),
                count,
                betas.data_ptr(),
                coeffs.data_ptr(),
                points,
                inner,
                stream.cuda_stream,
            )
            if message:
                raise RuntimeError(f"the kernel does not start: {message.decode()}")

        return launch

    turns = max(pairs, 8)
    order = [i % pairs for i in range(turns)]
    graphs = {
        "copy": captured(torch, [lambda _, i=i: ys[i].copy_(xs[i]) for i in order]),
        "op": captured(torch, [run(xs[i], ys[i]) for i in order]),
    }
    times = seconds(torch, graphs, torch.empty(4 * cache, dtype=torch.uint8, device="cuda"), rounds)
    # Check that the timed kernel computes the formula.
    from ctonnx import ctu

    for y in ys:
        y.fill_(float("nan"))
    graphs["op"].replay()
    torch.cuda.synchronize()
    some = slice(max(0, count - 4096), count)
    exact = ctu.ctu(xs[-1][some].double().cpu().numpy(), beta, COEFF)
    actual = ys[-1][some].double().cpu().numpy()
    if not (abs(actual - exact) <= 1e-2 * (1 + abs(exact))).all():
        raise RuntimeError(f"the timed kernel is wrong for {dtype}, {size} bytes")
    return {name: value / turns for name, value in times.items()}


def time_kernels(torch, rounds):
    """Yield the rows of the table and print each: the GB/s of the op and of a copy."""
    library = ctypes.CDLL(str(KERNELS))
    library.run_ctu.restype = ctypes.c_char_p
    pointer, size_t = ctypes.c_void_p, ctypes.c_uint64
    library.run_ctu.argtypes = [
        ctypes.c_int,
        pointer,
        pointer,
        size_t,
        pointer,
        pointer,
        size_t,
        size_t,
        pointer,
    ]
    for dtype, code in (
        (torch.float32, 1),
        (torch.float16, 10),
        (torch.bfloat16, 16),
        (torch.float64, 11),
    ):
        name, width = str(dtype).removeprefix("torch."), torch.empty((), dtype=dtype).element_size()
        cases = [(f"beta {BETA}", size, {}) for size in SIZES]
        cases += [("beta 0.3", LARGE, {"beta": 0.3})]
        cases += [("per channel, 56x56", LARGE, {"points": 64, "inner": 56 * 56})]
        cases += [("last dimension, 768", LARGE, {"points": 768, "inner": 1})]
        for case, size, options in cases:
            # A tensor consists of whole channels.
            period = options.get("points", 1) * options.get("inner", 1) * width
            times = time_kernel(
                torch, library, dtype, code, size // period * period, rounds, **options
            )
            rate, copy = (2e-9 * (size // period * period) / times[k] for k in ("op", "copy"))
            row = f"{name:10} {case:22} {size:10} {rate:7.0f} {copy:7.0f} {rate / copy:7.2f}"
            print(row, flush=True)
            yield row


# ---- Inside ONNX Runtime -------------------------------------------------------------------------


def half(model):
    """A copy of a float32 ModelProto with float16 weights, inputs and outputs."""
    import numpy as np
    from onnx import ModelProto, TensorProto, numpy_helper

    copy = ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return copy


def relu_model(code):
    """A model of one Relu on a tensor of any length."""
    from onnx import helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["X"], ["Y"])],
        "one_node",
        [helper.make_tensor_value_info("X", code, ["N"])],
        [helper.make_tensor_value_info("Y", code, ["N"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def open_sessions(original, graphs):
    """Name -> session on CUDA only: ReLU model, steered model with and without the library.

    Raises:
        RuntimeError: the optimised model has Memcpy nodes, or CUDA does not start. Other errors of
            ONNX Runtime pass through, such as that of an op that would run on the CPU.
    """
    import onnx
    import onnxruntime as ort
    from onnx import ModelProto

    import ctonnx
    from ctonnx.ort import library
    from ctonnx.rewriting.steer import Selection, steer

    steered = ModelProto()
    steered.CopyFrom(original)
    steer(steered, BETA, selection=Selection(["relu"]))
    # An exhaustive search for the fastest convolutions would take longer than the timing.
    settings = {"enable_cuda_graph": str(int(graphs)), "cudnn_conv_algo_search": "HEURISTIC"}
    provider = (library.CUDA_PROVIDERS[0], settings)
    sessions = {}
    for name, model in (("Relu", original), ("op", steered), ("fallback", steered)):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if name == "op":
            ctonnx.register(options)
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = f"{folder}/optimised.onnx"
            session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
            nodes = onnx.load(options.optimized_model_filepath).graph.node
        if session.get_providers()[0] != provider[0]:
            raise RuntimeError(f"ONNX Runtime cannot start {provider[0]}")
        if any(node.op_type.startswith("Memcpy") for node in nodes):
            raise RuntimeError(f"{name}: Memcpy nodes in the optimised model")
        sessions[name] = session
    return sessions


def time_model(torch, original, shape, rounds, graphs):
    """Compare the outputs, then return name -> median seconds of a synchronized run.

    Raises:
        RuntimeError: the outputs differ, or `open_sessions` raises it.
    """
    sessions = open_sessions(original, graphs)
    session = sessions["op"]
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    dtype = getattr(torch, {"tensor(float)": "float32", "tensor(float16)": "float16"}[source.type])
    code = 1 if dtype == torch.float32 else 10
    x = torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)
    out = [shape[0], *target.shape[1:]]
    results, bound = {}, {}
    for name, opened in sessions.items():
        y = torch.full(out, float("nan"), device="cuda", dtype=dtype)
        binding = opened.io_binding()
        binding.bind_input(source.name, "cuda", 0, code, shape, x.data_ptr())
        binding.bind_output(target.name, "cuda", 0, code, out, y.data_ptr())
        results[name], bound[name] = y, binding
    torch.cuda.synchronize()
    for name, opened in sessions.items():
        for _ in range(4):  # The first runs choose algorithms and capture a graph.
            opened.run_with_iobinding(bound[name])
    torch.cuda.synchronize()
    # The timed runs are replays: check one on new numbers.
    x.copy_(torch.randn(shape, device="cuda", dtype=torch.float32))
    for y in results.values():
        y.fill_(float("nan"))
    torch.cuda.synchronize()
    for name, opened in sessions.items():
        opened.run_with_iobinding(bound[name])
    torch.cuda.synchronize()
    difference = (results["op"].double() - results["fallback"].double()).abs().max().item()
    if not difference <= TOLERANCE[str(dtype).removeprefix("torch.")]:
        raise RuntimeError(f"op and fallback differ by {difference:.1e}")
    times = {name: [] for name in sessions}
    order = list(sessions)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            begin = time.perf_counter()
            sessions[name].run_with_iobinding(bound[name])
            torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def time_models(torch, network, rounds):
    """Yield the rows of the table and print each: times and their ratios."""
    import onnx

    for dtype, code in (("float32", 1), ("float16", 10)):
        models = [("one node", relu_model(code), [[1 << 16], [1 << 26]])]
        if network:
            original = onnx.load(network)
            inputs = original.graph.input[0].type.tensor_type.shape.dim
            rest = [dim.dim_value for dim in inputs[1:]]
            model = half(original) if dtype == "float16" else original
            models.append((Path(network).stem, model, [[batch, *rest] for batch in BATCHES]))
        for name, model, shapes in models:
            for shape in shapes:
                for graphs in (False, True):
                    times = time_model(torch, model, shape, rounds, graphs)
                    relu, op, fallback = (times[n] for n in ("Relu", "op", "fallback"))
                    row = f"{name:12.12} {dtype:8} {shape[0]:9} {'yes' if graphs else 'no':>6} "
                    row += f"{1e6 * relu:9.1f} {1e6 * op:9.1f} {op / relu:7.2f} "
                    row += f"{op / fallback:11.2f}"
                    print(row, flush=True)
                    yield row


KERNELS_HEAD = (
    f"{'kernel':10} {'case':22} {'bytes of X':>10} {'GB/s':>7} {'copy':>7} {'of copy':>7}"
)
MODELS_HEAD = f"{'model':12} {'dtype':8} {'batch':>9} {'graphs':>6} {'Relu us':>9} {'op us':>9} "
MODELS_HEAD += f"{'of Relu':>7} {'of fallback':>11}"


def measure(table, head, rows):
    """Append the head and the rows to the table; return whether all rows were measured."""
    print(head, flush=True)
    table.append(head)
    try:
        for row in rows:
            table.append(row)
    except Exception:  # ONNX Runtime has an exception type for each of its codes.
        table.append("(incomplete: stopped by an error, see above)")
        traceback.print_exc()
        return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", nargs="?", metavar="NETWORK.onnx")
    parser.add_argument("--build", action="store_true")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--only", choices=("verify", "kernels", "models"))
    parser.add_argument(
        "--rounds", type=int, default=21, help="at least 2, as the first one is a warm-up"
    )
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: the first one is a warm-up")
    if SHADOW.exists():
        leave(4, f"{SHADOW} is in the way, and is used in place of the installed one: remove it")
    random.seed(0)
    sys.path.insert(0, str(ROOT))
    try:
        import torch  # before onnxruntime, which needs the CUDA libraries it loads
    except ImportError:
        leave(4, "torch is not installed: it provides the device memory")
    if not torch.cuda.is_available():
        leave(4, "no GPU that torch can use")
    if args.build:
        build(args.arch)
    if not KERNELS.exists():
        leave(4, f"{KERNELS} is missing: run with --build")
    # Clean up as on Ctrl-C.
    for number in signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it.
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        shutil.copy(BUILD / "libctonnx_ops.so", SHADOW)
        right = benchmark(torch, args)
    finally:
        SHADOW.unlink(missing_ok=True)
    sys.exit(0 if right else 1)


def benchmark(torch, args):
    """Run the selected parts and print the table; return whether all checks passed."""
    if args.only in (None, "verify"):
        verify(args.sanitize)

    import onnxruntime as ort

    table, right = [], True
    if args.only in (None, "kernels"):
        right &= measure(table, KERNELS_HEAD, time_kernels(torch, args.rounds))
    if args.only in (None, "models"):
        right &= measure(table, MODELS_HEAD, time_models(torch, args.network, args.rounds))
    checked = "all checks passed" if right else "SOME CHECKS FAILED"
    print(f"\n{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}, ", end="")
    print(f"torch {torch.__version__}, onnxruntime {ort.__version__}; {checked}")
    print("\n".join(table))
    return right


if __name__ == "__main__":
    main()
