"""Verify the ops on one CPU thread, then time them against ONNX Runtime's Relu, or Clip.

    python benchmarks/kernels.py [--rounds 41] [--levels avx512,avx2,portable]

The variants of a case take turns in one process, in an order shuffled every round, without spinning
threads; figures are medians. Large tensors take turns too, so that they are read from memory. The
library chooses its instructions once per process, so each level runs in its own process.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnxruntime as ort
from onnx import helper, numpy_helper

import ctonnx
from ctonnx import ctu
from ctonnx.measure.bench import naive_functions, quiet_options

LARGE = [16, 1024, 14, 14]
BETA, COEFF = 0.85, 0.5
PROVIDERS = ["CPUExecutionProvider"]
CACHE = 64 << 20  # bytes, more than any cache holds
TIMED = 50e-6  # seconds: shorter runs are repeated within one timing


class Case(NamedTuple):
    name: str
    shape: list
    parameters: tuple = ()  # shape of beta and coeff
    dtype: type = np.float32
    tolerance: float = 2.5e-7
    bounds: tuple = ()  # of a Clip


CASES = [
    Case("3.2 M", [3211264]),
    Case("16 K", [16384]),
    Case("1x64x7x7", [1, 64, 7, 7]),
    Case("1x64", [1, 64]),
    Case("per channel 14x14, batch 16", LARGE, (1024, 1, 1)),
    Case("per channel 14x14", [1, *LARGE[1:]], (1024, 1, 1)),
    Case("per channel 112x112", [1, 64, 112, 112], (64, 1, 1)),
    Case("per channel 7x7", [1, 512, 7, 7], (512, 1, 1)),
    Case("last dimension", [4096, 768], (768,)),
    Case("last dimension, cached", [16, 768], (768,)),
    Case("3.2 M float16", [3211264], dtype=np.float16, tolerance=2**-11),
    Case("3.2 M bfloat16", [3211264], dtype=ml_dtypes.bfloat16, tolerance=2**-8),
    Case("3.2 M double", [3211264], dtype=np.float64, tolerance=4e-15),
    Case("ReLU6, 3.2 M", [3211264], tolerance=5e-7, bounds=(0, 6)),
    Case("ReLU6, 16 K", [16384], tolerance=5e-7, bounds=(0, 6)),
    Case("ReLU6 per channel 14x14", [1, *LARGE[1:]], (1024, 1, 1), tolerance=5e-7, bounds=(0, 6)),
]


def model(case, steered, function=None):
    """The bytes of a model of one node; `function` selects its fallback: "ours" or "naive"."""
    code = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
    op = ("CTUClip" if case.bounds else ctu.OP_TYPE) if steered else original(case)
    values = {"beta": BETA, "coeff": COEFF} if steered else {}
    tensors = [
        numpy_helper.from_array(np.full(case.parameters, value, np.float32), name)
        for name, value in values.items()
    ]
    for name, bound in zip(("lo", "hi"), case.bounds, strict=False):
        tensors.append(numpy_helper.from_array(np.array(bound, case.dtype), name))
    inputs = ["X", *(tensor.name for tensor in tensors)]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["Y"], domain=ctu.DOMAIN if steered else "")],
        "one_node",
        [helper.make_tensor_value_info("X", code, case.shape)],
        [helper.make_tensor_value_info("Y", code, case.shape)],
        tensors,
    )
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(ctu.DOMAIN, ctu.VERSION)],
        ir_version=8,
    )
    if function == "naive":
        proto.functions.extend(naive_functions(17))
    elif function:
        proto.functions.append(
            ctu.kinked_function(op, 17, {code})
            if case.bounds
            else ctu.function(17, {code}, sloped=False)
        )
    return proto.SerializeToString()


def original(case):
    return "Clip" if case.bounds else "Relu"


def exact(case, x):
    """Y in float64."""
    parameters = np.float32(BETA), np.float32(COEFF)
    if not case.bounds:
        return ctu.ctu(x, *parameters)
    lo, hi = case.bounds
    kinks = [ctu.ctu(-np.abs(x - bound), *parameters) for bound in case.bounds]
    return np.clip(x, lo, hi) + kinks[0] - kinks[1]


def sessions(case):
    """Name -> session, without those that ONNX Runtime has no kernel for; the op comes first."""
    kernel = quiet_options(1)
    ctonnx.register(kernel)
    makers = {"op": (model(case, True), kernel)}
    makers["original"] = (model(case, False), quiet_options(1))
    makers["function"] = (model(case, True, "ours"), quiet_options(1))
    if case.dtype == np.float32:
        makers["naive"] = (model(case, True, "naive"), quiet_options(1))
    opened = {}
    for name, (data, options) in makers.items():
        try:
            opened[name] = ort.InferenceSession(data, options, PROVIDERS)
        except Exception as error:  # ONNX Runtime has an exception type for each of its codes.
            if name == "op" or "NOT_IMPLEMENTED" not in str(error):
                raise
    return opened


def bindings(session, inputs, outputs, case):
    """An IO binding for each pair of arrays, so that timed runs allocate nothing."""
    code = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
    bound = []
    for x, y in zip(inputs, outputs, strict=True):
        binding = session.io_binding()
        binding.bind_input("X", "cpu", 0, code, x.shape, x.ctypes.data)
        binding.bind_output("Y", "cpu", 0, code, y.shape, y.ctypes.data)
        bound.append(binding)
    return bound


def measure(case, rounds):
    """Name -> median seconds of a run."""
    opened = sessions(case)
    rng = np.random.default_rng(0)
    size = np.prod(case.shape) * np.dtype(case.dtype).itemsize
    pairs = 1 if size < 1 << 20 else CACHE // (2 * size) + 1
    inputs = [(2 * rng.normal(size=case.shape)).astype(case.dtype) for _ in range(pairs)]
    outputs = [np.zeros(case.shape, case.dtype) for _ in range(pairs)]
    bound = {name: bindings(s, inputs, outputs, case) for name, s in opened.items()}

    opened["op"].run_with_iobinding(bound["op"][0])
    expected = exact(case, inputs[0].astype(np.float64))
    excess = np.abs(outputs[0] - expected) / np.maximum(1, np.abs(expected))
    if not excess.max() <= case.tolerance:
        sys.exit(f"{case.name}: wrong by {excess.max():.1e}")

    def timed(name, count, first):
        run, turns = opened[name].run_with_iobinding, bound[name]
        start = time.perf_counter()
        for i in range(first, first + count):
            run(turns[i % pairs])
        return (time.perf_counter() - start) / count

    order = list(opened)
    counts = {name: max(1, int(TIMED / timed(name, 3, 0))) for name in order}
    times = {name: [] for name in order}
    for i in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(timed(name, counts[name], i))
    return {name: statistics.median(values) for name, values in times.items()}


def measure_level(rounds):
    """Print one line of JSON for each case."""
    for case in CASES:
        times = measure(case, rounds)
        moved = 2 * int(np.prod(case.shape)) * np.dtype(case.dtype).itemsize
        print(json.dumps([case.name, moved, times]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", default="avx512,avx2,portable")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    random.seed(0)
    if args.child:
        return measure_level(args.rounds)

    rows = []
    for level in args.levels.split(","):
        command = [sys.executable, __file__, "--child", "--rounds", str(args.rounds)]
        environment = {**os.environ, "CTONNX_CPU": level}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{level}: failed, see above")
        print(f"{level}: agrees with the formula, timed", file=sys.stderr)
        rows += [(level, *json.loads(line)) for line in done.stdout.splitlines()]

    others = ("original", "function", "naive")
    print(f"{'level':9} {'case':28} {'us':>9} {'GB/s':>6}  time of the op by that of")
    print(f"{'':55} {' '.join(f'{name:>9}' for name in others)}")
    for level, case, moved, times in rows:
        ratios = [f"{times['op'] / times[n]:9.2f}" if n in times else f"{'-':>9}" for n in others]
        rate = moved / times["op"] / 1e9
        print(f"{level:9} {case:28} {1e6 * times['op']:9.1f} {rate:6.1f} {' '.join(ratios)}")


if __name__ == "__main__":
    main()
