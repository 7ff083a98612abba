"""Steering a model in place: activations become `ctonnx::CTU` nodes.

A node is steered by changing its op_type, domain, inputs and attributes. Its name, outputs, docs
and place stay, and so does everything else in the model. What changes is recorded (see `records`),
for `undo`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import ModelProto, TensorProto, helper

from .. import __version__, ctu
from ..errors import ModelError, NothingToDo, UsageError, check_choice
from ..model.graph import (
    DEFAULT_DOMAINS,
    functions_of,
    keep,
    key_of,
    node_label,
    opset_of,
    put,
    scopes,
)
from . import activations, params, records, weights
from .find import Activation, Site
from .lower import to_primitives
from .parameters import NewParameters, pass_into_functions
from .sequences import to_loops
from .steered import SteeredModel

LOWERINGS = ("portable", "op", "primitives")
# The reason why an activation is skipped that `params` gives nothing.
NO_BETA = "no beta is given for it"
BETA_AS = ("initializer", "input", "required-input")


@dataclass(frozen=True)
class Selection:
    """Which activations to steer: of `ops`, op types in any case, all where None; whose names
    match the regular expression `include`, and do not match `exclude`."""

    ops: Iterable[str] | None = None
    include: str | None = None
    exclude: str | None = None


@dataclass
class Report:
    """What `steer` did: the Activations it replaced and skipped, and what else it had to change.

    `beta_name` is the input that holds beta, if there is one, and `beta_names` are the initializers
    and inputs that hold any.
    """

    replaced: list[Activation] = field(default_factory=list)
    skipped: list[Activation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    beta_name: str | None = None
    beta_names: set[str] = field(default_factory=set)

    def skip(self, activation: Activation, reason: str) -> None:
        self.skipped.append(replace(activation, status="skipped", reason=reason))


def steer(
    model: ModelProto,
    beta: float | None = None,
    coeff: float = ctu.COEFF,
    *,
    params: Mapping | None = None,
    beta_as: str = "initializer",
    lowering: str = "portable",
    selection: Selection | None = None,
) -> Report:
    """Replace the activations of `model`, a ModelProto, in place.

    Args:
        beta, coeff: the CTU's parameters, in [0, 1].
        params: parameters of single activations, as params.resolve takes them. Without `beta` only
            those are steered.
        beta_as: "initializer" bakes beta in; "input" makes it an optional graph input with the
            value as default; "required-input" makes it a graph input that must be fed.
        lowering: "portable" writes the node and a function of standard ops as its fallback; "op"
            the node alone; "primitives" standard ops only.
        selection: which activations to steer; all where None.

    Returns:
        Report.

    Raises:
        UsageError: a wrong argument, or the model is steered already.
        NothingToDo: no activation is left to steer. The model is unchanged.
        ModelError: the model has no opset, cannot be lowered to primitives, or already has ops in
            our domain that are not ours.
    """
    if beta is not None or params is None:
        beta = ctu.check_unit_interval("beta", beta)
    elif beta_as != "initializer":
        raise UsageError("beta can only be an input together with a value for beta")
    coeff = ctu.check_unit_interval("coeff", coeff)
    check_choice("lowering", lowering, LOWERINGS)
    check_choice("beta_as", beta_as, BETA_AS)
    reason_against = _selector(selection or Selection())
    steered = SteeredModel(model)
    _check_unsteered(steered)
    report = Report()
    opset = _opset(model)
    candidates, with_function = _candidates(steered.sites, reason_against, opset, lowering, report)
    usual = _commonest_type(model, candidates)
    candidates = _with_types(candidates, usual, opset, report)
    sites = _of_fitting_types(candidates, opset, with_function, report)
    sites, values = _with_parameters(sites, params, beta, coeff, report)
    _note_weights(model, params, report)
    _check_parameters(values, opset, beta_as, report)

    # Functions came with IR 8; before IR 4 every initializer had to be listed as an input as well.
    before = ModelProto()
    _raise_ir(model, 8 if with_function and lowering != "primitives" else 4, before, report)
    parameters = NewParameters(model)
    if beta_as != "initializer" and beta is not None:
        report.beta_name = parameters.add_input("beta", beta, optional=beta_as == "input")
        report.notes.append(f"beta is the graph's input {report.beta_name!r}")
    sloped = with_function and any(site.becomes.sloped for site in sites)
    for site, value in zip(sites, values, strict=True):
        inputs = _inputs(site, value, usual, sloped, parameters, report)
        _steer_node(site, inputs, parameters)
        report.replaced.append(replace(site.activation, status="steered"))
    _insert_activations(sites)
    _note_quantized(model, sites, report)
    _note_opset(opset, with_function, lowering, report)
    pass_into_functions(model, parameters.names)
    _import_domain(model, before)
    if with_function:
        _add_functions(model, sites, opset, sloped)
    metadata = records.Metadata(model)
    metadata.set_original(before)
    if lowering == "primitives":
        to_primitives(model)
    _loop_sequence_maps(model, parameters, report)
    metadata.update(
        version=__version__,
        beta=_in_common([value.beta for value in values]),
        coeff=_in_common([value.coeff for value in values]),
        beta_input=report.beta_name,
    )
    return report


def steer_or_set(
    model: ModelProto, beta: float, coeff: float | None = None, beta_as: str = "initializer"
) -> None:
    """Steer a ModelProto, or give one that is steered another beta, in place.

    Args:
        beta, coeff: in [0, 1]; where coeff is None the model's own c, or ctu.COEFF.
        beta_as: "initializer" or "input".

    Raises:
        As `steer`, or as `SteeredModel.set`.
    """
    steered = SteeredModel(model)
    if steered.is_steered:
        steered.check_uncalibrated("take its original instead")
        steered.set(beta, coeff, beta_as)
    else:
        steer(model, beta, ctu.COEFF if coeff is None else coeff, beta_as=beta_as)


def nothing_matched(skipped: list[Activation]) -> str:
    """The message where no activation is left to steer."""
    if not skipped:
        return "no activation to steer: the model holds none"
    first = skipped[0]
    more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
    return f"no activation to steer: skipped {first.op} {first.name} ({first.reason}){more}"


# --- checks


def _check_unsteered(steered: SteeredModel) -> None:
    """Refuse a model that is steered, or whose names would make steering go wrong."""
    model = steered.proto
    if steered.was_steered:
        change = "change its beta with `ctonnx set`, or " if steered.ctus else ""
        raise UsageError(f"the model is already steered: {change}steer its original")
    # The model's own imports do not count: ONNX Runtime adds ours to what it saves, once it has
    # loaded the op library.
    imports = [entry for function in model.functions for entry in function.opset_import]
    nodes = [node for scope in scopes(model) for node in scope.graph.node]
    if any(entry.domain == ctu.DOMAIN for entry in (*imports, *model.functions, *nodes)):
        raise ModelError(f"the model uses the domain {ctu.DOMAIN!r} for something else")
    if any(function.domain in DEFAULT_DOMAINS for function in model.functions):
        # Its Relu need not be a ReLU, and would end up inside the CTU's own function.
        raise ModelError("the model defines functions in the domain of the standard ops")
    functions = functions_of(model)
    for node in nodes:
        function = functions.get(key_of(node))
        if function is not None and len(node.input) > len(function.input):
            # The inputs that steering adds would not be those that the function gets.
            raise ModelError(f"{node_label(node)!r} passes more inputs than its function takes")


def _check_parameters(
    values: list[params.Values], opset: int, beta_as: str, report: Report
) -> None:
    if opset < 7 and any(value.beta.ndim or value.coeff.ndim for value in values):
        raise UsageError("params: one value per channel needs opset 7")
    if not values:
        raise NothingToDo(nothing_matched(report.skipped))
    if beta_as != "initializer" and not any(value.common for value in values):
        raise UsageError("no activation would use the beta that is to be an input")


def _opset(model: ModelProto) -> int:
    # A graph of function calls alone need not import the default domain.
    opset = opset_of(model) or max(map(opset_of, model.functions), default=0)
    if not opset:
        raise ModelError("the model imports no opset of the default domain: there is no activation")
    return opset


# --- choosing sites


def _candidates(
    sites: list[Site],
    reason_against: Callable[[Activation], str | None],
    opset: int,
    lowering: str,
    report: Report,
) -> tuple[list[Site], bool]:
    """The Sites that can be steered and are selected, and whether the op's function is needed."""
    candidates = []
    with_function = lowering != "op"
    for site in sites:
        reason = site.activation.reason or reason_against(site.activation)
        reason = reason or _too_old(site, opset)
        if reason:
            report.skip(site.activation, reason)
            continue
        candidates.append(site)
        if site.scope.function is not None and not with_function:
            with_function = True
            report.notes.append(
                "wrote the op's function too: without it ONNX Runtime cannot infer the types in "
                "the model-local functions that hold activations"
            )
    return candidates, with_function


def _selector(selection: Selection) -> Callable[[Activation], str | None]:
    """A function that gives the reason why an Activation is not selected, or None."""
    ops = None
    if isinstance(selection.ops, str):
        raise UsageError(f"ops must be a list of op types, got {selection.ops!r}")
    if selection.ops is not None:
        ops = {op.lower() for op in selection.ops}
        unknown = ops - {op.lower() for op in activations.STEERABLE}
        if unknown:
            raise UsageError(
                f"unknown op {sorted(unknown)[0]!r}: choose among "
                + ", ".join(op.lower() for op in activations.STEERABLE)
            )
    include = _pattern("include", selection.include)
    exclude = _pattern("exclude", selection.exclude)

    def reason_against(activation):
        if ops is not None and activation.op.lower() not in ops:
            return "not among the selected ops"
        if include and not include.search(activation.name):
            return "its name does not match include"
        if exclude and exclude.search(activation.name):
            return "its name matches exclude"
        return None

    return reason_against


def _pattern(option: str, text: str | None) -> re.Pattern | None:
    if text is None:
        return None
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise UsageError(f"{option}: {text!r} is not a regular expression: {error}") from None


def _too_old(site: Site, opset: int) -> str | None:
    """Why the ops of `opset` cannot make up the fallback of a Site, or None."""
    if opset < 7 and site.becomes.sloped and isinstance(site.becomes.operands[0], str):
        return "its slope broadcasts otherwise before opset 7"
    return None


def _commonest_type(model: ModelProto, candidates: list[Site]) -> int:
    """The commonest known type of the candidates, else of the floating-point initializers."""
    counts = Counter(dtype for site in candidates for dtype in site.dtypes) or Counter(
        t.data_type for t in model.graph.initializer if t.data_type in ctu.FLOATING
    )
    return counts.most_common(1)[0][0] if counts else TensorProto.FLOAT


def _with_types(candidates: list[Site], usual: int, opset: int, report: Report) -> list[Site]:
    """The candidates, those of unknown element type with the `usual` one where the function needs
    to know it."""
    unknown = sum(not site.dtypes for site in candidates)
    if unknown:
        name = TensorProto.DataType.Name(usual).lower()
        report.notes.append(f"took {unknown} activations of unknown element type to be {name}")
    if opset >= 15:
        return candidates
    return [replace(site, dtypes=site.dtypes or {usual}) for site in candidates]


def _of_fitting_types(
    candidates: list[Site], opset: int, with_function: bool, report: Report
) -> list[Site]:
    """The candidates whose element types the function, or an operand, can serve; others are
    skipped.

    An operand is an initializer of one element type. The function's body is written for one element
    type too, unless CastLike (opset 15) is there to follow X.
    """
    commonest = Counter(min(site.dtypes, default=0) for site in candidates).most_common(1)
    sloped = any(site.becomes.sloped for site in candidates)
    one_type = opset < 15 and with_function
    sites = []
    for site in candidates:
        typed = sloped or any(not isinstance(o, str) for o in site.becomes.operands)
        if len(site.dtypes) > 1 and (typed or one_type):
            report.skip(site.activation, "its function is called with several element types")
        elif one_type and min(site.dtypes) != commonest[0][0]:
            reason = "its element type is not the usual one; mixing needs opset 15"
            report.skip(site.activation, reason)
        else:
            sites.append(site)
    return sites


def _with_parameters(
    sites: list[Site], given: Mapping | None, beta: float | None, coeff: float, report: Report
) -> tuple[list[Site], list[params.Values]]:
    """The sites that have a beta, and the values of each; the others are skipped."""
    found = [site.activation for site in sites]
    resolved = params.resolve(given, beta, coeff, found, report.notes)
    chosen, values = [], []
    for site, value in zip(sites, resolved, strict=True):
        if value is None:
            report.skip(site.activation, NO_BETA)
            continue
        value = value.shaped(site.activation)
        if value.per_channel and site.node.op_type in ("Conv", "NhwcFusedConv"):
            raise UsageError(
                f"params: {site.activation.name}: its channels are not dimension 1: give one value"
            )
        chosen.append(site)
        values.append(value)
    return chosen, values


# --- editing


def _raise_ir(model: ModelProto, minimum: int, before: ModelProto, report: Report) -> None:
    """Raise the IR version, and put what that changes into `before`."""
    if model.ir_version >= minimum:
        return
    before.ir_version = model.ir_version
    report.notes.append(f"raised the IR version from {model.ir_version} to {minimum}")
    if model.ir_version < 4:
        # From IR 4 on an initializer that is also an input can be overridden, which would stop ONNX
        # Runtime from folding and fusing it.
        constants = {tensor.name for tensor in model.graph.initializer}
        before.graph.input.extend(model.graph.input)
        keep(model.graph.input, lambda value: value.name not in constants)
        report.notes.append(
            "initializers are no longer listed as inputs, as that IR version has it"
        )
    model.ir_version = minimum


def _inputs(
    site: Site,
    value: params.Values,
    usual: int,
    sloped: bool,
    parameters: NewParameters,
    report: Report,
) -> list[str]:
    """The names of a CTU's inputs behind X: beta, c and operands."""
    operands = list(site.becomes.operands)
    if sloped and site.becomes.op_type == ctu.OP_TYPE and not operands:
        # A function has one signature: next to a LeakyRelu a Relu passes its slope too.
        operands = [0.0]
    dtype = next(iter(site.dtypes), usual)
    beta = report.beta_name if value.common else None
    if beta is None:
        beta = parameters.add("beta", value.beta)
    coeff = parameters.add("coeff", value.coeff)
    report.beta_names.add(beta)
    names = [o if isinstance(o, str) else parameters.add_operand(o, dtype) for o in operands]
    return [beta, coeff, *names]


def _steer_node(site: Site, inputs: list[str], parameters: NewParameters) -> None:
    """Turn the site's node, or the one fused into it, into an op of ours with `inputs` behind X."""
    node, x = site.node, site.becomes.x
    if site.absorbed is not None:
        absorbed, unbounded = site.absorbed
        records.record_node(absorbed)
        activations.pass_on(absorbed, unbounded)
    if site.inner is None:
        records.record_node(node)
    else:
        records.record_node(node, output=True)
        x = parameters.fresh_name(f"{node.output[0]}_before_activation")
        site.inner.name = node.name and parameters.fresh_node_name(f"{node.name}_activation")
        activations.take_out(node, x)
        node = site.inner
        records.record_op_type(node)
    node.op_type, node.domain = site.becomes.op_type, ctu.DOMAIN
    del node.attribute[:], node.input[:]
    node.input.extend([x, *inputs])


def _insert_activations(sites: list[Site]) -> None:
    """Put the activations that were fused behind the nodes that they were fused into."""
    behind = {}
    for site in sites:
        if site.inner is not None:
            behind[id(site.scope.graph), site.node.output[0]] = site.inner
    if not behind:
        return
    # Innermost subgraphs first, as a subgraph is copied along with the node that holds it.
    for scope in reversed(list({id(site.scope): site.scope for site in sites}.values())):
        nodes = []
        for node in scope.graph.node:
            nodes.append(node)
            inner = behind.get((id(scope.graph), node.output[0] if node.output else ""))
            if inner is not None:
                nodes.append(inner)
        put(scope.graph.node, nodes)


def _import_domain(model: ModelProto, before: ModelProto) -> None:
    """Import our domain, and put an import that is there already into `before`."""
    imports = [entry for entry in model.opset_import if entry.domain == ctu.DOMAIN]
    before.opset_import.extend(imports)
    if not imports:
        model.opset_import.append(helper.make_opsetid(ctu.DOMAIN, ctu.VERSION))


def _add_functions(model: ModelProto, sites: list[Site], opset: int, sloped: bool) -> None:
    """Add the functions that the steered sites fall back on."""
    dtypes: dict[str, set[int]] = defaultdict(set)
    for site in sites:
        dtypes[site.becomes.op_type] |= site.dtypes or {TensorProto.UNDEFINED}
    for op, types in sorted(dtypes.items()):
        if op == ctu.OP_TYPE:
            model.functions.append(ctu.function(opset, types, sloped))
        else:
            model.functions.append(ctu.kinked_function(op, opset, types))


def _in_common(arrays: list[np.ndarray]) -> str:
    """The number that all the float32 arrays are, as text, or "per activation"."""
    numbers = {str(array[()]) for array in arrays if not array.ndim}
    alike = len(numbers) == 1 and not any(array.ndim for array in arrays)
    return numbers.pop() if alike else records.PER_ACTIVATION


# --- notes


def _note_weights(model: ModelProto, given: Mapping | None, report: Report) -> None:
    """Note where a state dict holds other weights than the model: T-CT trains a head as well."""
    if not isinstance(given, params.Trained):
        return
    names = list(weights.differing(given.weights, model.graph.initializer))
    if names:
        report.notes.append(
            f"took beta and c alone: {len(names)} weights of the checkpoint differ from those in "
            f"the model, such as {names[0]}; `ctonnx export --checkpoint` takes all"
        )


def _note_quantized(model: ModelProto, sites: list[Site], report: Report) -> None:
    """Note how many sites feed a quantization, whose range was calibrated without steering."""
    quantized = {
        name
        for scope in scopes(model)
        for node in scope.graph.node
        if node.op_type == "QuantizeLinear"
        for name in node.input[:1]
    }
    count = sum(bool(quantized.intersection((site.inner or site.node).output)) for site in sites)
    if count:
        report.notes.append(
            f"{count} feed QuantizeLinear, with a range that was calibrated without steering"
        )


def _note_opset(opset: int, with_function: bool, lowering: str, report: Report) -> None:
    """Note where ONNX Runtime has no kernels for the standard ops that stand for CTUs."""
    if opset < 7 and (lowering == "primitives" or with_function):
        library = "" if lowering == "primitives" else ", or load the op library"
        report.notes.append(
            f"the standard ops that make up a CTU do not run in ONNX Runtime at opset {opset}, as "
            f"its kernels begin at 7: raise the original's with onnx.version_converter{library}"
        )


def _loop_sequence_maps(model: ModelProto, parameters: NewParameters, report: Report) -> None:
    """Let ONNX Runtime load the functions that are called inside SequenceMap."""
    made, left = to_loops(model, parameters.names, parameters.fresh_name)
    if made:
        report.notes.append(
            f"wrote {made} SequenceMap as the Loop that it stands for: ONNX Runtime cannot load "
            "functions inside SequenceMap (microsoft/onnxruntime#22100)"
        )
    if left:
        report.notes.append(
            f"{left} SequenceMap hold functions, which ONNX Runtime cannot load there "
            "(microsoft/onnxruntime#22100), and types that are unknown, so that they stay: inline "
            "the original's functions with onnx.inliner first"
        )
