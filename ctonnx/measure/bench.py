"""What steering costs: a model steered in several ways against its original, on the CPU.

The variants take turns in one process, in an order shuffled every round. Threads do not spin, since
a spinning pool of one session slows down the others.
"""

import os
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto

from .. import ctu
from ..errors import CheckFailed, UsageError
from ..model import files
from ..model.graph import keep, opset_of, scopes
from ..ort import library
from ..ort.compare import compare
from ..ort.runs import AT_RANDOM, CPU, Arrays, Model, Trial, random_inputs, variant
from ..ort.session import session
from ..rewriting.steer import steer
from ..rewriting.steered import SteeredModel

# The beta of a model that is not steered yet, or asks for one.
BETA = 0.85

# How often each session is opened.
_LOADS = 3

# The paper's formula in standard ops is less precise than the op, and errors add up in a network.
_NAIVE_TOLERANCE = 1e-3

ORIGINAL, SESSION, PLAIN = "original", "ctonnx.session", "plain layout"
FALLBACK, NAIVE = "without library", "naive ops"


@dataclass(frozen=True)
class Timing:
    """One variant with a number of threads: milliseconds of a run, their ratio to the original's,
    and milliseconds to open a session. All are medians."""

    variant: str
    threads: int
    run_ms: float
    ratio: float
    open_ms: float


@dataclass
class Result:
    """The Timings, by threads and in the order of the variants; the shapes of the inputs by name;
    and what is left out, and why."""

    timings: list[Timing] = field(default_factory=list)
    inputs: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def bench(
    path: str | os.PathLike,
    beta: float | None = None,
    coeff: float | None = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    threads: Sequence[int] = (1,),
    rounds: int = 31,
) -> Result:
    """Time a model on the CPU, steered and not, once the steered ways to run it agree.

    Args:
        path: a model, or a steered one, which is timed against its original.
        beta, coeff: for a model that is not steered, in [0, 1]; BETA and ctu.COEFF where None.
        shapes: input name -> sizes, for inputs with symbolic dimensions.
        threads: numbers of threads, each in turn.
        rounds: runs of each variant.

    Raises:
        CheckFailed: the steered ways to run the model disagree, or no random input runs.
        UsageError: a wrong argument.
        NothingToDo, ModelError: the model cannot be steered, or unsteered.
    """
    if rounds < 1 or not threads or min(threads) < 1:
        raise UsageError("rounds and threads must be 1 or more")
    path, result = Path(path), Result()
    original, steered = _pair(path, beta, coeff)
    with ExitStack() as stack:

        def opened_as(model):
            return stack.enter_context(variant(path, model))

        makers = _variants(original, steered, opened_as, result.notes)
        inputs = random_inputs(Model.of(makers[ORIGINAL](quiet_options(1))), shapes)
        result.inputs = {name: list(array.shape) for name, array in inputs.items()}
        needed = SteeredModel(steered).parameters.required
        betas: Arrays = {name: np.array(BETA, np.float32) for name in needed}
        for count in threads:
            sessions, opening = {}, {}
            for name, make in makers.items():
                sessions[name], opening[name] = _opened(make, count)
            feeds = {n: inputs | (betas if n != ORIGINAL else {}) for n in sessions}
            _verify(sessions, feeds, betas)
            times = _timed(sessions, feeds, rounds)
            for name, values in times.items():
                pairs = zip(values, times[ORIGINAL], strict=True)
                ratio = statistics.median(value / unsteered for value, unsteered in pairs)
                result.timings.append(
                    Timing(name, count, statistics.median(values), ratio, opening[name])
                )
    return result


def _pair(path: Path, beta: float | None, coeff: float | None) -> tuple[ModelProto, ModelProto]:
    """The original model and the steered one."""
    model = files.load(path)
    steered = SteeredModel(model)
    if not steered.was_steered:
        changed = files.own(model)
        steer(changed, BETA if beta is None else beta, ctu.COEFF if coeff is None else coeff)
        return model, changed
    if beta is not None or coeff is not None:
        raise UsageError(f"{path} is steered: it is timed with the beta and c that it has")
    original = files.own(model)
    SteeredModel(original).unsteer()
    return original, model


_Maker = Callable[[Any], Any]


def _variants(
    original: ModelProto,
    steered: ModelProto,
    opened_as: Callable[[ModelProto], Path | bytes],
    notes: list[str],
) -> dict[str, _Maker]:
    """Name -> function from SessionOptions to an open session."""

    def plainly(source):
        return lambda options: library.open_session(source, options, [CPU])

    source = opened_as(steered)
    makers = {ORIGINAL: plainly(opened_as(original))}
    if library.has_library():
        makers[SESSION] = lambda options: session(source, [CPU], options)
        makers[PLAIN] = lambda options: session(source, [CPU], options, layout=False)
    else:
        notes.append("the op library is not installed: only the fallback is timed")
    functions = {function.name for function in steered.functions if ctu.is_ctu(function)}
    nodes = [node for scope in scopes(steered) for node in scope.graph.node if ctu.is_ctu(node)]
    if not functions >= {node.op_type for node in nodes}:
        notes.append("the model carries no fallback")
    else:
        makers[FALLBACK] = plainly(source)
    naive = _naive(steered, nodes)
    if naive is None:
        notes.append("naive ops are left out: they are for float32 and opset 9 or newer")
    else:
        makers[NAIVE] = plainly(opened_as(naive))
    return makers


# The paper's formula in standard ops, and the ops that are made of it.
_NAIVE = {
    "Unit (X, beta, coeff)": """
        one = Constant <value = float {1.0}> ()  epsilon = Constant <value = float {1e-6}> ()
        gap = Sub(one, beta)  s = Add(gap, epsilon)  t = Div(X, s)
        scaled = Mul(beta, t)  gate = Sigmoid(scaled)  gated = Mul(gate, X)
        first = Mul(coeff, gated)  soft = Softplus(t)  scale = Mul(s, soft)
        rest = Sub(one, coeff)  second = Mul(rest, scale)  Y = Add(first, second)""",
    "CTU (X, beta, coeff)": "Y = ctonnx.Unit(X, beta, coeff)",
    "CTU (X, beta, coeff, slope)": """
        one = Constant <value = float {1.0}> ()  gap = Sub(one, slope)  size = Abs(gap)
        d = Mul(size, X)  u = ctonnx.Unit(d, beta, coeff)  sign = Sign(gap)  bent = Mul(sign, u)
        line = Mul(slope, X)  Y = Add(line, bent)""",
    "CTUMax (X, beta, coeff, lo)": """
        d = Sub(X, lo)  u = ctonnx.Unit(d, beta, coeff)  Y = Add(u, lo)""",
    "CTUMin (X, beta, coeff, hi)": """
        d = Sub(hi, X)  u = ctonnx.Unit(d, beta, coeff)  Y = Sub(hi, u)""",
    "CTUClip (X, beta, coeff, lo, hi)": """
        d = Sub(X, lo)  u = ctonnx.Unit(d, beta, coeff)
        e = Sub(X, hi)  v = ctonnx.Unit(e, beta, coeff)  w = Sub(u, v)  Y = Add(w, lo)""",
    "CTUHardSigmoid (X, beta, coeff, alpha, offset, lo, hi)": """
        m = Mul(alpha, X)  z = Add(m, offset)  Y = ctonnx.CTUClip(z, beta, coeff, lo, hi)""",
}


def naive_functions(opset: int, sloped: bool = False) -> list[FunctionProto]:
    """The paper's formula in standard ops of an opset, as functions of our ops for float32.

    Args:
        sloped: whether CTU takes a slope.
    """
    head = f'<domain: "{ctu.DOMAIN}", opset_import: ["" : {opset}, "{ctu.DOMAIN}" : 1]>'
    functions = (
        onnx.parser.parse_function(f"{head} {name} => (Y) {{ {body} }}")
        for name, body in _NAIVE.items()
    )
    arity = 4 if sloped else 3
    return [f for f in functions if f.name != ctu.OP_TYPE or len(f.input) == arity]


def _naive(steered: ModelProto, nodes: list[NodeProto]) -> ModelProto | None:
    """The steered model with naive functions in place of its own, where these can be written."""
    arities = {len(node.input) for node in nodes if node.op_type == ctu.OP_TYPE}
    others = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    typed = any(tensor.data_type in others for tensor in steered.graph.initializer)
    if typed or opset_of(steered) < 9 or len(arities) > 1:
        return None
    naive = files.own(steered)
    keep(naive.functions, lambda function: not ctu.is_ctu(function))
    naive.functions.extend(naive_functions(opset_of(steered), sloped=arities == {4}))
    naive.ir_version = max(naive.ir_version, 8)  # which functions came with
    return naive


def quiet_options(threads: int) -> Any:
    """The onnxruntime.SessionOptions for a number of threads that do not spin, and no messages."""
    options = library.import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _opened(make: _Maker, threads: int) -> tuple[Any, float]:
    """A session, and the median milliseconds to open it."""
    times, opened = [], None
    for _ in range(_LOADS):
        options = quiet_options(threads)
        start = time.perf_counter()
        opened = make(options)
        times.append(1e3 * (time.perf_counter() - start))
    return opened, statistics.median(times)


def _verify(sessions: dict[str, Any], feeds: dict[str, Arrays], fixed: Collection[str]) -> None:
    """Raise CheckFailed where a steered session differs from the first of them.

    Args:
        fixed: the names of the inputs that hold beta.
    """
    trial = None
    for name, opened in sessions.items():
        if name == ORIGINAL:
            continue
        run = Model.of(opened).run
        if trial is None:
            trial = Trial(run, feeds[name], fixed, AT_RANDOM)
            continue
        tolerance = _NAIVE_TOLERANCE if name == NAIVE else None
        response = trial.response()
        for output in compare(trial.outputs, run(feeds[name]), tolerance, response=response):
            # What is too small to tell agrees all the same.
            if not output.ok and not output.inconclusive:
                raise CheckFailed(f"{name}: output {output.name!r} {output.reason}")


def _timed(
    sessions: dict[str, Any], feeds: dict[str, Arrays], rounds: int
) -> dict[str, list[float]]:
    """Name -> milliseconds of each run."""
    times, order = {name: [] for name in sessions}, list(sessions)
    rng = random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            start = time.perf_counter()
            sessions[name].run(None, feeds[name])
            times[name].append(1e3 * (time.perf_counter() - start))
    return times
