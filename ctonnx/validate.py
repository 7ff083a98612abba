"""Comparing runs: every output is compared, or the comparison fails."""

from dataclasses import dataclass, replace

import numpy as np

from . import files, rewrite, runtime
from .errors import CheckFailed, CtonnxError, ModelError, first_line
from .reference import arrays

# Differences below this are noise: at beta 1 a CTU differs from ReLU by up to 7e-7 around 0.
_NOISE = 1e-6

# Largest allowed max|actual - expected| / max|expected|, by dtype: float32's holds for the others
# that are at least as precise, the half types differ by their own rounding.
_TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2}
_DEFAULT_TOLERANCE = 1e-5

# Sizes tried in turn for an input's symbolic dimensions, until the model runs.
_SIZES = (1, 2, 8, 32, 64, 224, 256, 512)


@dataclass(frozen=True)
class Comparison:
    """One output of two runs. `max_rel` is max|actual - expected| / max|expected|."""

    name: str
    max_abs: float
    max_rel: float
    ok: bool
    reason: str | None = None


def compare(expected, actual, tolerance=None):
    """Compare two runs: dicts from output name to array.

    Args:
        tolerance: largest `max_rel` that passes; 1e-5 where None, 1e-2 for float16 and 5e-2 for
            bfloat16. A `max_abs` up to 1e-6 passes too.

    Returns:
        list of Comparison, one per output of either run. One fails where an output is missing, not
        finite in the same places with the same sign, or NaN anywhere; all fail where all are
        empty.
    """
    results = [
        _compare_one(name, expected.get(name), actual.get(name), tolerance)
        for name in sorted({*expected, *actual})
    ]
    if not any(np.size(value) for value in expected.values()):
        return [replace(r, ok=False, reason="empty: nothing to compare") for r in results]
    return results


def _compare_one(name, expected, actual, tolerance):
    def failed(reason):
        return Comparison(name, float("nan"), float("nan"), False, reason)

    if expected is None or actual is None:
        return failed("missing in one of the runs")
    expected, actual = np.asarray(expected), np.asarray(actual)
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return failed(
            f"is {actual.dtype}{list(actual.shape)}, not {expected.dtype}{list(expected.shape)}"
        )
    if not np.issubdtype(expected.dtype, np.number) and expected.dtype.name != "bfloat16":
        same = bool(np.array_equal(expected, actual))
        return Comparison(name, 0.0, 0.0, True) if same else failed("differs")
    if tolerance is None:
        tolerance = _TOLERANCE.get(expected.dtype.name, _DEFAULT_TOLERANCE)
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    if np.isnan(expected).any() or np.isnan(actual).any():
        return failed("NaN")
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(actual)) or np.any(
        expected[~finite] != actual[~finite]
    ):
        return failed("infinite in other places")
    max_abs = float(np.abs(actual[finite] - expected[finite]).max(initial=0.0))
    largest = float(np.abs(expected[finite]).max(initial=0.0))
    max_rel = max_abs / largest if largest else (0.0 if max_abs == 0.0 else float("inf"))
    ok = max_rel <= tolerance or max_abs <= _NOISE
    reason = f"differs by {max_abs:.1e}, relative {max_rel:.1e}, allowed {tolerance:.0e}"
    return Comparison(name, max_abs, max_rel, ok, None if ok else reason)


class Model:
    """A model to run on one thread of the CPU.

    Args:
        path: path of a model, or its bytes.
        library: whether to register the op library.

    Raises:
        ModelError: ONNX Runtime does not load it.
    """

    def __init__(self, path, library=False):
        ort = runtime.import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        if library:
            runtime.register(options)
        try:
            self._session = runtime.open_session(path, options, ["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has an exception type for each of its codes.
            raise ModelError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error
        self.inputs = self._session.get_inputs()
        self.names = {i.name for i in self.inputs}

    def run(self, inputs):
        """Output name -> array for `inputs`, input name -> array; a sequence's have an index."""
        names = [output.name for output in self._session.get_outputs()]
        result = {}
        for name, value in zip(names, self._session.run(names, inputs), strict=True):
            result.update(arrays(name, value))
        return result


def random_inputs(model, seed=0):
    """Inputs that `model`, a Model, runs on: normal floats, integers 0 and 1, in a size it takes.

    Raises:
        CheckFailed: it runs on none of the sizes tried.
    """
    # A first dimension without a size is a batch, and so is another of its name.
    batches = {i.shape[0] for i in model.inputs if i.shape and isinstance(i.shape[0], str)}

    def made(size):
        rng = np.random.default_rng(seed)
        inputs = {}
        for i in model.inputs:
            dims = [
                d if isinstance(d, int) else 1 if at == 0 or d in batches else size
                for at, d in enumerate(i.shape)
            ]
            inputs[i.name] = _random(rng, i.type, dims)
        return inputs

    fixed = all(isinstance(dim, int) for i in model.inputs for dim in i.shape)
    error = None
    for size in _SIZES[:1] if fixed else _SIZES:
        try:
            inputs = made(size)
            model.run(inputs)
            return inputs
        except CtonnxError:
            raise
        except Exception as caught:  # As above: here for a size that does not fit.
            error = caught
    raise CheckFailed(
        "the check found no random input that the original runs on, which says nothing of the "
        f"steered model: {first_line(error)}"
    )


def _random(rng, kind, dims):
    dtype = kind.removeprefix("tensor(").removesuffix(")")
    if dtype in ("float", "double", "float16"):
        return rng.normal(size=dims).astype({"float": "float32"}.get(dtype, dtype))
    if dtype == "bool":
        return rng.integers(0, 2, dims).astype(bool)
    if dtype.startswith(("int", "uint")):
        return rng.integers(0, 2, dims).astype(dtype)
    raise CheckFailed(f"no random input can be made for {kind}")


def check_steered(original, steered, report, beta, lowering, inputs=None):
    """Compare a steered model at beta 1 with its original, and with itself without the library.

    Args:
        original, steered: paths.
        report: the rewrite.Report of the steering.
        beta, lowering: what it was steered with.
        inputs: input name -> array; random ones where None.

    Returns:
        dict from the name of the check to its list of Comparison; all passed.

    Raises:
        CheckFailed: an output differs; the message names the check and the output.
        EnvironmentLacks: onnxruntime is not installed, or the op library that lowering "op" needs.
        ModelError: ONNX Runtime cannot load a model.
    """
    library = lowering == "op" or (lowering == "portable" and runtime.has_library())
    reference = Model(original)
    inputs = random_inputs(reference) if inputs is None else dict(inputs)
    results = {}
    # The same model at beta 1, in a file beside it for the sake of external data.
    variant = steered.with_name(steered.name + ".beta")
    try:
        proto = files.load(steered)
        rewrite.fill_beta(proto, report.beta_names, 1.0)
        variant.write_bytes(proto.SerializeToString())
        at_one = Model(variant, library)
        if report.beta_name in at_one.names:
            inputs[report.beta_name] = np.float32([1.0])
        at_one = at_one.run(inputs)
        inputs.pop(report.beta_name, None)
    finally:
        variant.unlink(missing_ok=True)
    results["at beta 1 against the original"] = compare(reference.run(inputs), at_one)
    if lowering == "portable" and library:
        with_library, without = Model(steered, True), Model(steered)
        if report.beta_name in without.names:
            inputs[report.beta_name] = np.float32([beta])
        results["with against without the op library"] = compare(
            without.run(inputs), with_library.run(inputs)
        )
    for check, comparisons in results.items():
        for comparison in comparisons:
            if not comparison.ok:
                raise CheckFailed(f"{check}: output {comparison.name!r} {comparison.reason}")
    return results
