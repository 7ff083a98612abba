"""Validating a model: that it computes, in ONNX Runtime, what the method says."""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from onnx import ModelProto, ValueInfoProto

from .. import ctu
from ..errors import CheckFailed, CtonnxError, ModelError, NothingToDo, UsageError
from ..model import files
from ..model.graph import key_of, node_label
from ..ort import blocked, library
from ..ort.compare import Comparison, compare
from ..ort.runs import CPU, Model, load_inputs, random_inputs, variant
from ..rewriting import rewrite
from .units import Units


@dataclass(frozen=True)
class Run:
    """One way to run a model, and its outputs beside the expected ones.

    `diverges` is the first activation, in graph order, whose output differs, where an output does
    and that could be found out.
    """

    name: str
    outputs: list[Comparison]
    diverges: str | None = None

    @property
    def ok(self):
        return bool(self.outputs) and all(output.ok for output in self.outputs)


@dataclass(frozen=True)
class Validation:
    """What `validate` found; `against` says in words what the runs were compared with, and `inputs`
    on what: name -> shape."""

    against: str
    inputs: dict[str, list[int]]
    runs: list[Run]
    notes: list[str]

    @property
    def ok(self):
        return all(run.ok for run in self.runs)


def validate(
    path,
    *,
    against=None,
    module=None,
    inputs=None,
    shapes=None,
    providers=(CPU,),
    rtol=None,
    atol=None,
):
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
        rtol, atol: as for compare.compare.

    Returns:
        Validation.

    Raises:
        CheckFailed: the model runs on none of the random inputs tried.
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
    model = files.load(path)
    files.check_external_data(model, path.parent)
    notes = []
    if against is not None:
        side = _Original(Path(against), model)
    elif module is not None:
        side = _Module(module, model)
    elif rewrite.was_steered(model):
        side = _Reference(path, model)
    else:  # It would pass: PyTorch computes the same standard ops.
        raise NothingToDo(rewrite.NOT_STEERED)
    ways = _ways(path, model, providers, notes)
    first = ways[0].open()
    if inputs is None:
        if _betas(model) & _required(model) - side.fed.keys():
            raise UsageError("the model does not tell which beta to feed: use --inputs")
        try:
            inputs = random_inputs(first, shapes, side.fed)
        except CheckFailed as error:
            raise CheckFailed(
                f"{error}: give sizes with --shape, or values with --inputs"
            ) from None
    elif against is None:
        inputs = side.fed | load_inputs(inputs, first, side.fed, notes)
    else:  # At beta 1, whatever the file holds.
        inputs = load_inputs(inputs, first, side.fed, notes) | side.fed
    _check_inputs(model, inputs, notes)
    wanted = side.run(inputs)
    notes += [f"output {n!r} is empty: not compared" for n, v in wanted.items() if not np.size(v)]
    check = partial(compare, rtol=rtol, atol=atol, reference=side.exact)
    runs = []
    for way in ways:
        outputs = check(wanted, way.run(inputs))
        diverges = None
        if not Run(way.name, outputs).ok:
            diverges = _first_to_diverge(model, inputs, side, way, check)
        runs.append(Run(way.name, outputs, diverges))
    if module is not None and not all(run.ok for run in runs):
        notes += side.differing()
    if side.exact:
        units = Units(model, inputs)
        if units.left_out:
            notes.append(f"{units.left_out} CTUs were not run by themselves: see ctonnx.units")
        for way in ways:
            if units and not way.blocked:
                outputs = units.compare(way.open, way.library)
                runs.append(Run(f"each CTU by itself, {way.name}", outputs))
    return Validation(
        side.what, {name: list(np.shape(v)) for name, v in inputs.items()}, runs, notes
    )


@dataclass(frozen=True)
class _Way:
    """A model, a changed one of that at `path` perhaps, as ONNX Runtime can run it."""

    name: str
    path: Path
    model: ModelProto
    library: bool = False
    provider: str = CPU
    blocked: bool = False

    def open(self, model=None):
        """A Model of `model`, or of the one that this is about."""
        with variant(self.path, model or self.model) as opened:
            if not self.blocked:
                return Model(opened, self.library, self.provider)
            options = library.import_onnxruntime().SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 4
            library.register(options)
            session, reason = blocked.open_session(opened, [CPU], options)
            if session is None:
                raise ModelError(reason)
            return Model.of(session)

    def run(self, inputs, names=None):
        """Output name -> array; of the tensors `names` of the graph instead, where given."""
        return self.open(names and _with_outputs(self.model, names)).run(inputs)


def _ways(path, model, providers, notes):
    """The _Ways in which people run a model; what stands in the way of one goes into `notes`."""
    has_ctu = rewrite.holds_ctu(model)
    has_fallback = any(key_of(f)[:2] == (ctu.DOMAIN, ctu.OP_TYPE) for f in model.functions)
    ways = []
    for provider in providers:
        if not has_ctu:
            ways.append(_Way(provider, path, model, provider=provider))
            continue
        if library.has_library() or not has_fallback:
            name = f"{provider} with the op library"
            ways.append(_Way(name, path, model, library=True, provider=provider))
        if has_fallback:
            ways.append(_Way(f"{provider} without it", path, model, provider=provider))
    if has_ctu and not library.has_library():
        notes.append("the op library is not installed: only the fallback was run")
    if has_ctu and library.has_library() and CPU in providers:
        way = _Way(f"{CPU} in the blocked layout", path, model, library=True, blocked=True)
        with suppress(ModelError):
            way.open()
            ways.append(way)
    if not has_ctu:
        notes.append("the model holds no CTU: a float64 run computes the same standard ops")
    left = [a for a in rewrite.find(model) if a.status == "steerable"]
    if has_ctu and left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        notes.append(f"not steered, though it could be: {left[0].name}{more}")
    return ways


# --- what the runs are compared with: `run` gives the outputs, or the tensors `names` of the graph,
# `fed` is what is fed for a beta without default, and `exact` tells float64 apart


class _Reference:
    what, exact = "PyTorch in float64", True

    def __init__(self, path, model):
        from .reference import Reference

        self.run, self.fed = Reference(path).run, _fed_betas(model)


class _Original:
    """The original in ONNX Runtime; `model` is set to beta 1."""

    exact = False

    def __init__(self, path, model):
        self.what, self._path = f"{path} in ONNX Runtime, at beta 1", path
        self._way = _Way("", path, files.load(path))
        if rewrite.holds_steered(self._way.model):
            raise UsageError(f"{path}: is steered itself: give the original")
        names = rewrite.beta_names(model)
        rewrite.fill_beta(model, names, 1.0)
        self.fed = {n: np.array(1.0, np.float32) for n in names & _inputs(model)}
        lacking = _required(self._way.model) - _required(model)
        if lacking:
            raise UsageError(f"{path}: takes an input {min(lacking)!r}, which the model has not")

    def run(self, inputs, names=None):
        own = _inputs(self._way.model)
        try:
            return self._way.run({n: v for n, v in inputs.items() if n in own}, names)
        except ModelError as error:
            raise ModelError(
                f"{self._path}: does not run on the model's inputs: is it its original? ({error})"
            ) from error


class _Module:
    """A PyTorch model, steered as `model` is."""

    exact = False

    def __init__(self, target, model):
        self.what, self._target, self._model = f"{target} in PyTorch", target, model
        self.fed = _fed_betas(model)

    def run(self, inputs, names=None):
        from ..torch import by_name

        betas = _betas(self._model)
        beta = next(
            (np.asarray(inputs[n]).item() for n in betas & inputs.keys()),
            _number(self._model, "beta"),
        )
        graph = self._model.graph
        order = [v.name for v in graph.input if v.name in inputs and v.name not in betas]
        outputs, activations = by_name.run_model(
            self._target,
            [inputs[name] for name in order],
            [value.name for value in graph.output],
            beta,
            _number(self._model, "coeff"),
        )
        if names is None:
            return outputs
        if len(names) != len(activations):
            raise UsageError(
                f"{self._target}: has {len(activations)} activations, not {len(names)}"
            )
        return dict(zip(names, activations, strict=True))

    def differing(self):
        """Notes on weights of the file that the PyTorch model has otherwise."""
        from ..torch import by_name

        names = by_name.differing_weights(self._target, self._model.graph.initializer)
        if names:
            yield (
                f"{len(names)} weights are not those of {self._target}, such as {names[0]!r}: does "
                "it load what was exported?"
            )


def _inputs(model):
    return {value.name for value in model.graph.input}


def _required(model):
    """The names of the graph's inputs that have no default."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    return _inputs(model) - defaults


def _betas(model):
    """The names of what holds a beta; none where nothing does."""
    try:
        return rewrite.beta_names(model)
    except NothingToDo:
        return set()


def _number(model, key):
    """What the model was steered with, None where that differs by activation or is not recorded."""
    value = next((e.value for e in model.metadata_props if e.key == f"ctonnx.{key}"), "")
    try:
        return float(value)
    except ValueError:
        return None


def _fed_betas(model):
    """What to feed for each beta that must be fed: what the model was steered with, if it tells."""
    value = _number(model, "beta")
    names = set() if value is None else _betas(model) & _required(model)
    return dict.fromkeys(names, np.array(value, np.float32))


def _check_inputs(model, inputs, notes):
    """Raise UsageError where a beta is none, and note what makes NaN of everything."""
    for name in _betas(model) & inputs.keys():
        if np.size(inputs[name]) != 1:
            raise UsageError(f"{name!r} is one number, got {list(np.shape(inputs[name]))}")
        for value in np.ravel(inputs[name]):
            ctu.check_unit_interval(name, value)
    for name, value in inputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            notes.append(f"input {name!r} holds NaN or infinity")


def _with_outputs(model, names):
    """A copy of a ModelProto whose outputs are the tensors `names`."""
    copy = files.own(model)
    del copy.graph.output[:]
    # ONNX Runtime infers their types.
    copy.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return copy


def _first_to_diverge(model, inputs, side, way, check):
    """The name of the first activation whose output differs, or None."""
    labels = _activations_by_output(model)
    try:
        wanted, got = (run(inputs, list(labels)) for run in (side.run, way.run))
    except CtonnxError:  # One of the sides cannot give these tensors.
        return None
    failed = {c.name for c in check(wanted, got) if not c.ok}
    return next((label for output, label in labels.items() if output in failed), None)


def _activations_by_output(model):
    """The graph's nodes that are activations, or hold some in their bodies: output -> name. Those
    that cannot be steered are left out."""
    direct, inside = {}, {}
    for activation in rewrite.find(model):
        if activation.status == "skipped":
            continue
        if activation.scope:
            inside.setdefault(activation.scope, activation)
        else:
            direct[activation.name] = activation
    labels = {}
    for node in model.graph.node:
        activation = direct.get(node_label(node)) or inside.get(f"{node.domain}::{node.op_type}")
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            within = (a for scope, a in inside.items() if scope.startswith(f"{node_label(node)}."))
            activation = next(within, None)
        if activation is not None and node.output:
            labels[node.output[0]] = activation.path
    return labels


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
        MissingDependency: onnxruntime is not installed, or the op library that lowering "op" needs.
        ModelError: ONNX Runtime cannot load a model.
    """
    use_library = lowering == "op" or (lowering == "portable" and library.has_library())
    reference = Model(original)
    inputs = random_inputs(reference) if inputs is None else dict(inputs)
    at_one = files.load(steered)
    rewrite.fill_beta(at_one, report.beta_names, 1.0)

    def load(path, library=False):
        try:
            return Model(path, library)
        except ModelError as error:
            raise ModelError(f"the steered model: {error}") from error

    with variant(steered, at_one) as opened:
        model = load(opened, use_library)
        fed = {report.beta_name: np.float32([1.0])} if report.beta_name in model.names else {}
        results = {
            "at beta 1 against the original": compare(
                reference.run(inputs), model.run({**inputs, **fed})
            )
        }
    if lowering == "portable" and use_library:
        with_library, without = load(steered, True), load(steered)
        inputs.update(dict.fromkeys(fed, np.float32([beta])))
        results["with against without the op library"] = compare(
            without.run(inputs), with_library.run(inputs)
        )
    for check, comparisons in results.items():
        for comparison in comparisons:
            if not comparison.ok:
                raise CheckFailed(f"{check}: output {comparison.name!r} {comparison.reason}")
    return results
