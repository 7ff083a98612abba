"""Validating a model: that it computes, in ONNX Runtime, what the method says."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto

from .. import ctu
from ..errors import (
    CheckFailed,
    CtonnxError,
    MissingDependency,
    ModelError,
    NothingToDo,
    UsageError,
)
from ..model import files
from ..model.external import check_external_data
from ..model.flow import reached_by_values
from ..model.graph import node_label
from ..model.inference import computed_types
from ..ort import blocked, library
from ..ort.compare import Comparison, Response, compare
from ..ort.runs import (
    CPU,
    Arrays,
    Compute,
    Model,
    Trial,
    load_inputs,
    random_trial,
    session_options,
    variant,
    with_outputs,
)
from ..ort.steps import Steps
from ..rewriting.steer import Report
from ..rewriting.steered import NOT_STEERED, SteeredModel
from .expected import Expected, Float64Run, OriginalRun, PyTorchRun, required_inputs
from .units import Units

# Where an activation differs by less, that is not the cause: a CTU at beta 1 may, around 0.
_NOISE = 1e-6


@dataclass(frozen=True)
class Run:
    """One way to run a model, and its outputs beside the expected ones.

    `diverges` is the first activation, in graph order, whose output differs, where an output does
    and the activation can be told.
    """

    name: str
    outputs: list[Comparison]
    diverges: str | None = None

    @property
    def ok(self) -> bool:
        return bool(self.outputs) and all(output.ok for output in self.outputs)

    @property
    def inconclusive(self) -> bool:
        """Whether it would pass if its outputs told more."""
        return not self.ok and all(output.ok or output.inconclusive for output in self.outputs)


@dataclass(frozen=True)
class Validation:
    """The result of `validate`: `against` says in words what the runs were compared with, and
    `inputs` on what: name -> shape."""

    against: str
    inputs: dict[str, list[int]]
    runs: list[Run]
    notes: list[str]

    @property
    def ok(self) -> bool:
        return all(run.ok for run in self.runs)


def validate(
    path: str | os.PathLike,
    *,
    against: str | os.PathLike | None = None,
    module: str | None = None,
    inputs: str | os.PathLike | None = None,
    shapes: dict[str, list[int]] | None = None,
    providers: Sequence[str] = (CPU,),
    rtol: float | None = None,
    atol: float | None = None,
) -> Validation:
    """Compare what a model gives in ONNX Runtime with what it must give.

    It is run on every provider, with the op library, without it where the model carries a fallback,
    and on the CPU in the blocked layout where `ctonnx.session` would use that. As a whole network
    hides small errors, its CTUs are also run one by one in a comparison with float64, on inputs of
    every magnitude, and held to the op's numeric contract. An activation that is not steered shows
    in a comparison with a PyTorch model alone; else a note names it.

    Args:
        path: the model's path.
        against: path of the original, which the model at beta 1 is compared with.
        module: "PKG:FACTORY" of a PyTorch model to compare with, steered as the ONNX model is where
            it holds no CT units. Where both are None, the expected outputs are those of the ONNX
            model run with PyTorch in float64.
        inputs: path of an .npz file with an array for each input; random ones where None.
        shapes: input name -> list of sizes, for the random inputs.
        providers: names of execution providers.
        rtol, atol: as for compare.compare; atol is 0 where None.

    Returns:
        Validation.

    Raises:
        CheckFailed: the model runs on none of the random inputs tried, no output depends on an
            input, or one activation has another beta than the model records.
        MissingDependency: a provider, torch or onnxruntime is missing, or the op library where the
            model has no fallback.
        InputFileError: the inputs cannot be read.
        ModelError: the model cannot be read or run.
        NothingToDo: the model was never steered and there is no PyTorch model to compare with, or
            there is no beta to set to 1 for `against`.
        UsageError: shapes or inputs do not fit the model, one that is needed is not given, or the
            PyTorch model cannot be made, steered or run.
    """
    if against is not None and module is not None:
        raise UsageError("against and torch are two things to compare with: give one")
    if inputs is not None and shapes:
        raise UsageError("shape is for random inputs: leave it out, or inputs")
    if not providers:
        raise UsageError("providers must name at least one")
    path = Path(path)
    steered = SteeredModel(files.load(path))
    check_external_data(steered.proto, path.parent)
    _check_records(path, steered)
    notes = []
    if against is not None or module is not None:
        steered.check_uncalibrated("leave out against and torch, to compare with a float64 run")
    if against is not None:
        expected = OriginalRun(Path(against), steered)
    elif module is not None:
        expected = PyTorchRun(module, steered)
    elif steered.was_steered:
        try:
            expected = Float64Run(path, steered)
        except MissingDependency as error:
            raise MissingDependency(
                f"{error}, or compare with the original: --against ORIGINAL"
            ) from error
    else:  # It would pass: PyTorch computes the same standard ops.
        raise NothingToDo(NOT_STEERED)
    ways = _ways(path, steered, providers, notes)
    trial = _trial(ways[0].session, steered, expected, inputs, shapes, notes)
    arrays = trial.inputs
    _check_inputs(steered, arrays, notes)
    outputs = expected.run(arrays)
    notes += [f"output {n!r} is empty: not compared" for n, v in outputs.items() if not np.size(v)]
    check = partial(compare, rtol=rtol, reference=expected.exact, inside=_narrowest_type(steered))
    response = _response(trial, steered, notes)
    steps = Steps(trial, expected.run, response.moves)
    absolute = partial(check, atol=atol or 0.0)
    runs = []
    for way in ways:
        comparisons = absolute(outputs, way.session.run(arrays), response=response)
        comparisons = steps.judge(comparisons, way.session.run, absolute)
        run = Run(way.name, comparisons)
        if any(not c.ok and not c.inconclusive for c in comparisons):
            run = Run(way.name, comparisons, _diverges(steered, arrays, expected, way, check))
        runs.append(run)
    if isinstance(expected, PyTorchRun) and not all(run.ok for run in runs):
        notes += expected.notes_on_weights()
    if expected.exact:
        runs += _validate_units(steered, arrays, ways, notes)
    return Validation(
        expected.what, {name: list(np.shape(v)) for name, v in arrays.items()}, runs, notes
    )


def _response(trial: Trial, steered: SteeredModel, notes: list[str]) -> Response:
    """How the outputs respond to the inputs, less those that depend on no values of them."""
    values = trial.inputs.keys() - steered.parameters.betas - steered.parameters.coeffs
    reached = reached_by_values(steered.proto.graph, values)
    constant = {v.name for v in steered.proto.graph.output} - reached
    if len(constant) == len(steered.proto.graph.output):
        raise CheckFailed("inconclusive: no output depends on the values of an input")
    notes += [f"output {n!r} depends on no values of the inputs" for n in sorted(constant)]
    moves = {n: m for n, m in trial.moves.items() if n.partition("[")[0] not in constant}
    return replace(trial.response(), moves=moves)


def _narrowest_type(steered: SteeredModel) -> str | None:
    """The name of the half type that a model computes in, if it does."""
    types = computed_types({id(site.scope): site.scope for site in steered.sites}.values())
    halves = {TensorProto.BFLOAT16: "bfloat16", TensorProto.FLOAT16: "float16"}
    return next((name for dtype, name in halves.items() if dtype in types), None)


def _check_records(path: Path, steered: SteeredModel) -> None:
    """Refuse a model that records one beta, while its activations have several.

    Raises:
        CheckFailed: one activation has another beta than the others.
    """
    recorded = steered.metadata.beta
    betas = {a.path: a.beta for a in steered.activations if a.status == "steered"}
    fixed = {name: beta for name, beta in betas.items() if beta is not None}
    others = [name for name, beta in fixed.items() if not _is(beta, recorded)]
    if recorded is not None and others and len(others) < len(betas):
        raise CheckFailed(
            f"{path}: records beta {recorded:g}, but {others[0]} has {fixed[others[0]]}: steer the "
            "original again, with --params for betas that differ, or `ctonnx set` one beta"
        )


def _is(beta: float | list, recorded: float | None) -> bool:
    return bool(np.all(np.asarray(beta, np.float32) == np.float32(recorded or 0.0)))


# --- ways to run a model


@dataclass
class _Way:
    """A way in which ONNX Runtime runs a model.

    `model` may be a changed one of that at `path`. `session` is opened once.
    """

    name: str
    path: Path
    model: ModelProto
    library: bool = False
    provider: str = CPU
    blocked: bool = False
    _session: Model | None = field(default=None, init=False)

    @property
    def session(self) -> Model:
        if self._session is None:
            self._session = self.open(self.model)
        return self._session

    def open(self, model: ModelProto) -> Model:
        """Open another model in this way."""
        with variant(self.path, model) as opened:
            if not self.blocked:
                return Model(opened, self.library, self.provider)
            session, reason = blocked.open_session(opened, [CPU], session_options(library=True))
            if session is None:
                raise ModelError(reason)
            return Model.of(session)


def _ways(
    path: Path, steered: SteeredModel, providers: Sequence[str], notes: list[str]
) -> list[_Way]:
    """The ways in which people run a model; what stands in the way of one goes into `notes`."""
    model, has_ctu, has_library = steered.proto, bool(steered.ctus), library.has_library()
    functions = {f.name for f in model.functions if ctu.is_ctu(f)}
    has_fallback = functions >= {node.op_type for node in steered.ctus}
    ways = []
    for provider in providers:
        if not has_ctu:
            ways.append(_Way(provider, path, model, provider=provider))
            continue
        if has_library or not has_fallback:
            name = f"{provider} with the op library"
            ways.append(_Way(name, path, model, library=True, provider=provider))
        if has_fallback:
            ways.append(_Way(f"{provider} without it", path, model, provider=provider))
    if has_ctu and not has_library:
        notes.append("the op library is not installed: only the fallback was run")
    if has_ctu and has_library and CPU in providers:
        way = _Way(f"{CPU} in the blocked layout", path, model, library=True, blocked=True)
        try:
            way._session = way.open(model)
            ways.append(way)
        except ModelError:
            pass  # `ctonnx.session` does not use the layout either.
    if not has_ctu:
        notes.append("the model holds no CTU: a float64 run computes the same standard ops")
    left = [a for a in steered.activations if a.status == "steerable"]
    if has_ctu and left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        notes.append(f"not steered, though it could be: {left[0].name}{more}")
    return ways


def _validate_units(
    steered: SteeredModel, inputs: Arrays, ways: list[_Way], notes: list[str]
) -> list[Run]:
    """Hold each CTU to the op's numeric contract, as a whole network hides small errors."""
    units = Units(steered, inputs)
    if units.left_out:
        notes.append(f"{units.left_out} CTUs were not run by themselves: see ctonnx.check.units")
    return [
        Run(f"each CTU by itself, {way.name}", units.compare(way.open, way.library))
        for way in ways
        if units and not way.blocked
    ]


# --- inputs


def _trial(
    session: Model,
    steered: SteeredModel,
    expected: Expected,
    inputs: str | os.PathLike | None,
    shapes: dict[str, list[int]] | None,
    notes: list[str],
) -> Trial:
    """The Trial of the arrays to feed: those of a file, or random ones, and the betas of
    `expected`. The original runs in it where there is one, as what is compared with it may be
    damaged."""
    source = expected.run if isinstance(expected, OriginalRun) else None
    if inputs is None:
        required = required_inputs(steered.proto)
        if steered.parameters.betas & required - expected.feeds.keys():
            raise UsageError("the model does not tell which beta to feed: use --inputs")
        try:
            return random_trial(session, shapes, expected.feeds, source=source)
        except CheckFailed as error:
            raise CheckFailed(
                f"{error}: give sizes with --shape, or values with --inputs"
            ) from None
    arrays = load_inputs(inputs, session, expected.feeds, notes)
    if isinstance(expected, OriginalRun):  # At beta 1, whatever the file holds.
        arrays |= expected.feeds
    else:
        arrays = expected.feeds | arrays
    parameters = steered.parameters.betas | steered.parameters.coeffs
    return Trial(source or session.run, arrays, parameters)


def _check_inputs(steered: SteeredModel, inputs: Arrays, notes: list[str]) -> None:
    """Refuse a beta outside [0, 1], and note what makes NaN of everything."""
    for name in steered.parameters.betas & inputs.keys():
        if np.size(inputs[name]) != 1:
            raise UsageError(f"{name!r} is one number, got {list(np.shape(inputs[name]))}")
        for value in np.ravel(inputs[name]):
            ctu.check_unit_interval(name, value)
    for name, value in inputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            notes.append(f"input {name!r} holds NaN or infinity")


# --- where a run diverges


def _diverges(
    steered: SteeredModel, inputs: Arrays, expected: Expected, way: _Way, check: partial
) -> str | None:
    """The name of the first activation whose output differs; None where that cannot be told."""
    labels = _activations_by_output(steered)
    names = list(labels)
    try:
        wanted = expected.run(inputs, names)
        actual = way.open(with_outputs(steered.proto, names)).run(inputs)
    except CtonnxError:  # One of the sides cannot give these tensors.
        return None
    failed = {c.name for c in check(wanted, actual, atol=_NOISE) if not c.ok}
    return next((label for output, label in labels.items() if output in failed), None)


def _activations_by_output(steered: SteeredModel) -> dict[str, str]:
    """Output -> name of the graph's nodes that are activations, or have some in their subgraphs.
    Those that cannot be steered are left out."""
    direct, inside = {}, {}
    for activation in steered.activations:
        if activation.status == "skipped":
            continue
        if activation.scope:
            inside.setdefault(activation.scope, activation)
        else:
            direct[activation.name] = activation
    labels = {}
    for node in steered.proto.graph.node:
        activation = direct.get(node_label(node)) or inside.get(f"{node.domain}::{node.op_type}")
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            within = (a for scope, a in inside.items() if scope.startswith(f"{node_label(node)}."))
            activation = next(within, None)
        if activation is not None and node.output:
            labels[node.output[0]] = activation.path
    return labels


# --- the check of `ctonnx patch`


def check_steered(
    original: str | os.PathLike,
    steered: Path,
    report: Report,
    beta: float,
    lowering: str,
    inputs: Arrays | None = None,
) -> dict[str, list[Comparison]]:
    """Compare a steered model at beta 1 with its original, and the op library with the fallback.

    Args:
        original, steered: paths.
        report: what `steer` returned.
        beta, lowering: what it was steered with.
        inputs: input name -> array; random ones where None.

    Returns:
        dict from the name of the check to its list of Comparison; all passed.

    Raises:
        CheckFailed: an output differs or is inconclusive; the message names the check and the
            output.
        MissingDependency: onnxruntime is not installed, or the op library that lowering "op" needs.
        ModelError: ONNX Runtime cannot load a model.
    """
    use_library = lowering == "op" or (lowering == "portable" and library.has_library())
    reference = Model(original)
    trial = random_trial(reference) if inputs is None else Trial(reference.run, dict(inputs))
    inputs = dict(trial.inputs)
    at_one = SteeredModel(files.load(steered), betas=report.beta_names)
    response, inside = _response(trial, at_one, []), _narrowest_type(at_one)

    def load(path, with_library=False):
        try:
            return Model(path, with_library)
        except ModelError as error:
            raise ModelError(f"the steered model: {error}") from error

    check = partial(compare, inside=inside)

    def compared(expected: Compute, actual: Compute) -> list[Comparison]:
        comparisons = check(expected(inputs), actual(inputs), response=response)
        return Steps(trial, expected, response.moves).judge(comparisons, actual, check)

    feeds = at_one.override(1.0)
    with variant(steered, at_one.proto) as opened:
        changed = load(opened, use_library)
    results = {
        "at beta 1 against the original": compared(
            reference.run, lambda inputs: changed.run({**inputs, **feeds})
        )
    }
    if lowering == "portable" and use_library:
        fed = dict.fromkeys(feeds, np.array(beta, np.float32))
        fallback, kernel = load(steered), load(steered, True)
        results["op library vs. fallback"] = compared(
            lambda inputs: fallback.run({**inputs, **fed}),
            lambda inputs: kernel.run({**inputs, **fed}),
        )
    for name, comparisons in results.items():
        for comparison in comparisons:
            if not comparison.ok:
                remedy = ": without --check, `ctonnx validate --against` takes --inputs and --shape"
                raise CheckFailed(
                    f"{name}: output {comparison.name!r} {comparison.reason}"
                    f"{remedy if comparison.inconclusive else ''}"
                )
    return results
