"""Verify a steered network on the CPU, then time it against the original.

    python benchmarks/network.py [--threads 1,2] [--rounds 31] [ORIGINAL.onnx ...]

The variants take turns in one process, in an order shuffled every round. Threads do not spin, since
a spinning pool of one session slows down the others. Figures are medians.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import onnx
import onnx.parser
import onnxruntime as ort
from onnx import ModelProto

import ctonnx
from ctonnx import ctu
from ctonnx.check import validate
from ctonnx.ort import runs
from ctonnx.rewriting.steer import Selection, steer

DIGITS = Path(__file__).parent.parent / "samples" / "digits" / "digits.onnx"
BETA = 0.85
PROVIDERS = ["CPUExecutionProvider"]
LOADS = 3

# The paper's formula in standard ops is less precise than the op, and errors add up in a network.
TOLERANCE = 1e-3


def naive_function(model):
    """The paper's formula in standard ops, as a fallback function for a steered ModelProto."""
    opset = next(e.version for e in model.opset_import if e.domain in ("", "ai.onnx"))
    body = """
        one = Constant <value = float {1.0}> ()  epsilon = Constant <value = float {1e-6}> ()
        gap = Sub(one, beta)  s = Add(gap, epsilon)  t = Div(X, s)
        scaled = Mul(beta, t)  gate = Sigmoid(scaled)  gated = Mul(gate, X)
        first = Mul(coeff, gated)  soft = Softplus(t)  scale = Mul(s, soft)
        rest = Sub(one, coeff)  second = Mul(rest, scale)  Y = Add(first, second)"""
    head = f'<domain: "{ctu.DOMAIN}", opset_import: ["" : {opset}]>'
    return onnx.parser.parse_function(f"{head} {ctu.OP_TYPE} (X, beta, coeff) => (Y) {{{body}}}")


def variants(path):
    """Name -> function from SessionOptions to an open session; the original comes first."""
    original = onnx.load(path)
    steered, naive = ModelProto(), ModelProto()
    steered.CopyFrom(original)
    steer(steered, BETA, selection=Selection(["relu"]))
    naive.CopyFrom(steered)
    del naive.functions[:]
    naive.functions.extend(f for f in steered.functions if not ctu.is_ctu(f))
    naive.functions.append(naive_function(naive))
    relu, steered, naive = (m.SerializeToString() for m in (original, steered, naive))
    return {
        "ReLU": lambda options: ort.InferenceSession(relu, options, PROVIDERS),
        "ctonnx.session": lambda options: ctonnx.session(steered, PROVIDERS, options),
        "layout=False": lambda options: ctonnx.session(steered, PROVIDERS, options, layout=False),
        "without library": lambda options: ort.InferenceSession(steered, options, PROVIDERS),
        "naive primitives": lambda options: ort.InferenceSession(naive, options, PROVIDERS),
    }


def quiet_options(threads):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def opened(make, threads):
    """A session, and the median milliseconds to open it."""
    times = []
    for _ in range(LOADS):
        options = quiet_options(threads)
        start = time.perf_counter()
        session = make(options)
        times.append(1e3 * (time.perf_counter() - start))
    return session, statistics.median(times)


def verify(sessions, inputs):
    """Exit with a message if a steered session differs from the one in the plain layout."""

    def run(session):
        outputs = [output.name for output in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, inputs), strict=True))

    expected = run(sessions["layout=False"])
    for name, session in sessions.items():
        if name == "ReLU":
            continue
        for result in validate.compare(expected, run(session), TOLERANCE):
            if not result.ok:
                sys.exit(f"{name}: output {result.name!r} {result.reason}")


def timed(sessions, inputs, rounds):
    """Name -> median milliseconds of a run."""
    times = {name: [] for name in sessions}
    order = list(sessions)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            sessions[name].run(None, inputs)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, default=[DIGITS], metavar="ORIGINAL.onnx")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    random.seed(0)

    rows = []
    for path in args.models:
        makers = variants(path)
        inputs = runs.random_inputs(validate.Model(path))
        for threads in map(int, args.threads.split(",")):
            sessions, loads = {}, {}
            for name, make in makers.items():
                sessions[name], loads[name] = opened(make, threads)
            verify(sessions, inputs)
            print(f"{path.name}, {threads} threads: outputs agree, timing", file=sys.stderr)
            times = timed(sessions, inputs, args.rounds)
            for name, value in times.items():
                ratio = value / times["ReLU"]
                rows.append((path.name, threads, name, value, ratio, loads[name]))

    print(f"{'network':24} {'threads':>7}  {'variant':18} {'ms':>9} {'ratio':>6} {'load ms':>8}")
    for network, threads, name, value, ratio, load in rows:
        print(f"{network:24.24} {threads:7}  {name:18} {value:9.3f} {ratio:6.2f} {load:8.0f}")


if __name__ == "__main__":
    main()
