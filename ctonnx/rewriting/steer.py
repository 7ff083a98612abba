"""Steering a model in place: activations become `ctonnx::CTU` nodes, and back.

A node is steered by changing its op_type, domain, inputs and attributes; its name, outputs, docs
and order stay, and so does everything else in the model. What changed is kept as a serialized
proto under the metadata key `ctonnx.original` of the node (and of the model, for its IR version
and inputs), which is what `unpatch` reads.
"""

import ast
import base64
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import (
    FunctionProto,
    ModelProto,
    NodeProto,
    TensorProto,
    checker,
    helper,
    inliner,
    numpy_helper,
)

from .. import ctu
from ..errors import ModelError, NothingToDo, UsageError
from ..model.graph import (
    DEFAULT_DOMAINS,
    Scope,
    check_names,
    functions_of,
    key_of,
    node_label,
    scopes,
    typed_scopes,
)
from ..model.names import FreshNames
from . import activations, params

ORIGINAL = "ctonnx.original"

# Lowering to primitives leaves it on the last op of an activation, with the activation's op type,
# and empty on those inside that would look like activations themselves.
LOWERED = "ctonnx.lowered"

# The labels of a head that `ctonnx probe` has put in: no record of steering.
CLASSES = "ctonnx.classes"

# What stands for beta or coeff in the model's metadata where it is not one number.
PER_ACTIVATION = "per activation"

_INLINED = "the model was steered, and another tool inlined its CTUs: this may be part of one"

NOT_STEERED = "the model is not steered: `ctonnx patch` steers it"

LOWERINGS = ("portable", "op", "primitives")
BETA_AS = ("initializer", "input", "required-input")


@dataclass(frozen=True)
class Activation:
    """One activation of a model, as `inspect` and `patch` report it.

    `scope` is the body or function that it stands in, "" for the graph. `status` is "steerable",
    "steered" or "skipped", the last with a `reason`. `beta` and `coeff` are those of a steered one:
    a number, nested lists where they differ per channel, and None where they are fed at run time.
    `shape` is that of its tensor as far as inference knows it, and `module` the path of the PyTorch
    module that it comes from, where the exporter wrote that down.
    """

    name: str
    op: str
    scope: str
    status: str
    reason: str | None = None
    beta: float | list | None = None
    coeff: float | list | None = None
    shape: list[int | str | None] | None = None
    module: str | None = None

    @property
    def path(self):
        """`scope/name`, which no other activation has in a model whose nodes' names are unique."""
        return f"{self.scope}/{self.name}" if self.scope else self.name


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

    def skip(self, activation, reason):
        self.skipped.append(replace(activation, status="skipped", reason=reason))


def find(model):
    """The Activations of a ModelProto, in order of scope and node."""
    check_names(model)
    values = _parameter_values(model)
    found = [site.activation for site in _survey(model, values)]
    if not holds_ctu(model):
        baked = _baked_parameters(model)
        found = [replace(a, **baked) if a.status == "steered" else a for a in found]
    if was_steered(model) and all(a.status != "steered" for a in found):
        # Optimisers inline functions, and the CTU's own Relu looks like any other then.
        found = [
            replace(a, status="skipped", reason=_INLINED) if a.status == "steerable" else a
            for a in found
        ]
    return found


def steer(
    model,
    beta=None,
    coeff=ctu.COEFF,
    *,
    params=None,
    beta_as="initializer",
    lowering="portable",
    ops=None,
    include=None,
    exclude=None,
):
    """Replace the activations of `model`, a ModelProto, in place.

    Args:
        beta, coeff: the CTU's parameters, in [0, 1].
        params: parameters of single activations, as params.resolve takes them. Without `beta` only
            those are steered.
        beta_as: "initializer" bakes beta in; "input" makes it an optional graph input with the
            value as default; "required-input" makes it a graph input that must be fed.
        lowering: "portable" writes the node and a function of standard ops as its fallback; "op"
            the node alone; "primitives" standard ops only.
        ops: op types to steer, in any case; all where None.
        include, exclude: regular expressions searched in the activation's name.

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
    _check_choice("lowering", lowering, LOWERINGS)
    _check_choice("beta_as", beta_as, BETA_AS)
    selected = _selector(ops, include, exclude)
    _check_unsteered(model)
    opset = _opset(model)

    report = Report()
    candidates, with_function = _candidates(model, selected, opset, lowering, report)
    usual = _usual_type(model, candidates)
    unknown = sum(not site.dtypes for site in candidates)
    if unknown:
        name = TensorProto.DataType.Name(usual).lower()
        report.notes.append(f"took {unknown} activations of unknown element type to be {name}")
    if opset < 15:
        candidates = [replace(site, dtypes=site.dtypes or {usual}) for site in candidates]
    sites = _of_fitting_types(candidates, opset, with_function, report)
    sites, given = _with_parameters(sites, params, beta, coeff, report)
    _note_weights(model, params, report)
    if opset < 7 and any(values[key].ndim for values in given for key in ("beta", "coeff")):
        raise UsageError("params: one value per channel needs opset 7")
    if not sites:
        raise NothingToDo(nothing_matched(report.skipped))
    if beta_as != "initializer" and not any(values["common"] for values in given):
        raise UsageError("no activation would use the beta that is to be an input")

    # Functions came with IR 8; before IR 4 every initializer had to be listed as an input as well.
    any_function = with_function or any(s.steering.op_type != ctu.OP_TYPE for s in sites)
    before = ModelProto()
    _raise_ir(model, 8 if any_function and lowering != "primitives" else 4, before, report)
    parameters = _Parameters(model)
    if beta_as != "initializer":
        report.beta_name = parameters.add_input("beta", beta, beta_as)
        report.notes.append(f"beta is the graph's input {report.beta_name!r}")
    sloped = with_function and any(site.steering.sloped for site in sites)
    for site, values in zip(sites, given, strict=True):
        operands = list(site.steering.operands)
        if sloped and site.steering.op_type == ctu.OP_TYPE and not operands:
            # A function has one signature: next to a LeakyRelu a Relu passes its slope too.
            operands = [0.0]
        dtype = next(iter(site.dtypes), usual)
        operands = [o if isinstance(o, str) else parameters.add_operand(o, dtype) for o in operands]
        common = values["common"] and beta_as != "initializer"
        held = [
            report.beta_name if common else parameters.add("beta", values["beta"]),
            parameters.add("coeff", values["coeff"]),
        ]
        report.beta_names.add(held[0])
        _steer_node(site, [*held, *operands], parameters)
        report.replaced.append(replace(site.activation, status="steered"))
    _insert_activations(model, sites)
    _note_calibrated(model, sites, report)
    _note_opset(opset, sites, with_function, lowering, report)
    _pass_into_functions(model, parameters.names)
    _import_domain(model, before)
    if before.ByteSize():
        _record(model, before)
    _add_functions(model, sites, opset, with_function, sloped)
    if lowering == "primitives":
        _inline(model)
    from .. import __version__

    entries = {"version": __version__}
    entries |= {key: _in_common([values[key] for values in given]) for key in ("beta", "coeff")}
    if report.beta_name:
        entries["beta_input"] = report.beta_name
    for key, value in entries.items():
        model.metadata_props.add(key=f"ctonnx.{key}", value=value)
    return report


def _in_common(arrays):
    """The number that all the float32 arrays are, as text, or "per activation"."""
    numbers = {str(array[()]) for array in arrays if not array.ndim}
    return (
        numbers.pop() if len(numbers) == 1 and not any(a.ndim for a in arrays) else PER_ACTIVATION
    )


def set_beta(model, beta):
    """Change the beta of a steered ModelProto in place, of all its activations.

    An optional input gets it as its default.

    Returns:
        how many initializers held a beta: more than one where activations had parameters of their
        own.

    Raises:
        UsageError: beta is not in [0, 1], or is a required input, which has no value to set; or as
            `parameters_of`.
        NothingToDo: the model holds no CTU.
    """
    beta = ctu.check_unit_interval("beta", beta)
    check_names(model)
    _steered(model)  # What is lowered to primitives may have an input for beta all the same.
    held, _ = parameters_of(model)
    if not held.issubset(tensor.name for tensor in model.graph.initializer):
        raise UsageError("beta is a required input of this model: feed it instead of setting it")
    fill_beta(model, held, beta)
    for entry in model.metadata_props:
        if entry.key == "ctonnx.beta":
            entry.value = repr(beta)
    return len(held)


def beta_names(model):
    """The names of the initializers and inputs of a steered ModelProto that hold a beta.

    Raises:
        NothingToDo: the model holds no CTU, and no input for beta either.
    """
    name = _metadata(model, "ctonnx.beta_input")
    try:
        return _inputs_of_ctus(_steered(model), 1, 2)
    except NothingToDo:
        if name is None:
            raise
        return {name}  # Lowered to primitives it holds no CTU, but may have this input.


def parameters_of(model, coeff=False):
    """As `beta_names`, and the names of those that hold a c: none after lowering to primitives.

    Args:
        coeff: whether c is to change as well as beta.

    Raises:
        UsageError: what is to change cannot, for all CTUs and nothing else.
        NothingToDo: as `beta_names`.
    """
    betas = beta_names(model)
    try:
        steered = _steered(model)
    except NothingToDo:
        return betas, set()
    if not betas:
        raise UsageError("the model's CTUs name no beta: steer its original")
    coeffs = _inputs_of_ctus(steered, 2, 3)
    _check_alone(model, betas, 1)
    if coeff:
        _check_alone(model, coeffs, 2)
    return betas, coeffs


def _check_alone(model, parameters, slot):
    """Raise UsageError where `parameters` are not the graph's, or are more than input `slot` of
    CTUs: ONNX Runtime's optimiser shares constants that are equal."""
    graph = model.graph
    beyond = parameters - {held.name for held in (*graph.input, *graph.initializer)}
    if beyond:
        raise UsageError(
            f"{min(beyond)!r} is no input or initializer of the graph, so it cannot be changed: "
            "steer the original"
        )
    places, seen = _given(model, parameters)
    for scope in scopes(model):
        for node in scope.body.node if seen(scope) else ():
            allowed = {slot} if ctu.is_ctu(node) else places.get(key_of(node), ())
            for i, name in enumerate(node.input):
                if name in parameters and i not in allowed:
                    raise UsageError(
                        f"{name!r} is also an input of {node.op_type} {node_label(node)!r}, as the "
                        "optimiser shares what is equal: steer the original"
                    )


def require_inputs(model, names):
    """Make parameters of a steered ModelProto scalar inputs that must be fed, in place."""
    keep(model.graph.initializer, lambda tensor: tensor.name not in names)
    keep(model.graph.input, lambda value: value.name not in names)
    for name in sorted(names):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))


def holds_steered(model):
    """Whether an activation of a ModelProto is steered: not where all were, and another tool
    inlined them."""
    return any(activation.status == "steered" for activation in find(model))


def give(model, beta, coeff=None, beta_as="initializer"):
    """Steer a ModelProto, or `settle` one that is steered, in place.

    Args:
        coeff: where None the model's own, or ctu.COEFF.
        beta_as: "initializer" or "input".

    Raises:
        As `steer`, or as `settle`.
    """
    if holds_steered(model):
        settle(model, beta, coeff, beta_as)
    else:
        steer(model, beta, ctu.COEFF if coeff is None else coeff, beta_as=beta_as)


def settle(model, beta, coeff=None, beta_as="initializer"):
    """Give all CTUs of a steered ModelProto one beta, and one c where it is given, in place.

    Whatever held a beta before, one initializer does then, and it is an optional input where
    `beta_as` is "input". Those of c keep their names, and become initializers where it is given.

    Raises:
        As `parameters_of`.
    """
    betas, coeffs = parameters_of(model, coeff is not None)
    name = _metadata(model, "ctonnx.beta_input")
    name = name if name in betas else min(betas)
    _merge(model, betas, name)
    values = {name: beta}
    if coeff is not None:
        values |= dict.fromkeys(coeffs, coeff)
    replaced = betas.union(values)
    keep(model.graph.initializer, lambda tensor: tensor.name not in replaced)
    keep(model.graph.input, lambda value: value.name not in replaced)
    for held, value in sorted(values.items()):
        model.graph.initializer.append(_scalar(held, value, TensorProto.FLOAT))
    asked = name if beta_as == "input" else None
    if asked:
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
    recorded = {"ctonnx.beta": repr(beta), "ctonnx.beta_input": asked}
    if coeff is not None and coeffs:
        recorded["ctonnx.coeff"] = repr(coeff)
    if not coeffs and _metadata(model, "ctonnx.beta") == PER_ACTIVATION:
        del recorded["ctonnx.beta"]  # Lowered to primitives, activations keep a beta of their own.
    keep(model.metadata_props, lambda entry: entry.key not in recorded)
    for key, value in recorded.items():
        if value is not None:
            model.metadata_props.add(key=key, value=value)


def fill_beta(model, names, beta):
    """Give the initializers `names` of a ModelProto the value beta."""
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(_scalar(tensor.name, beta, TensorProto.FLOAT))


def unsteer(model):
    """Undo `steer` on a ModelProto in place, node for node and attribute for attribute.

    Raises:
        NothingToDo: the model holds no CTU, as after lowering to primitives.
        ModelError: a CTU node carries no record of what it replaced.
    """
    check_names(model)
    parameters, inserted = set(), False
    for scope in _steered(model):
        for node in scope.body.node:
            if ctu.is_ctu(node):
                parameters.update(node.input[1:])
                _restore(node)
                parameters.difference_update(node.input)
                if not node.input:  # It was fused into the node before it.
                    node.ClearField("op_type")
                    inserted = True
    for scope in scopes(model):
        # PRelu's slope is the model's own: what restored nodes still use is no parameter of ours.
        if isinstance(scope.body, FunctionProto):
            keep(scope.body.input, lambda name: name not in parameters)
        for node in scope.body.node:
            if _metadata(node, ORIGINAL) is not None:
                _restore(node)
        if inserted:
            keep(scope.body.node, lambda node: node.op_type)
    for i in reversed(range(len(model.functions))):
        if ctu.is_ctu(model.functions[i]):
            del model.functions[i]
    original = _metadata(model, ORIGINAL)
    before = _decode(ModelProto, original) if original is not None else ModelProto()
    if not before.opset_import:
        keep(model.opset_import, lambda entry: entry.domain != ctu.DOMAIN)
    for function in model.functions:
        keep(function.opset_import, lambda entry: entry.domain != ctu.DOMAIN)
    keep(model.graph.initializer, lambda tensor: tensor.name not in parameters)
    keep(model.graph.input, lambda value: value.name not in parameters)
    if before.ir_version:
        model.ir_version = before.ir_version
    if before.graph.input:
        del model.graph.input[:]
        model.graph.input.extend(before.graph.input)
    keep(model.metadata_props, lambda entry: not _is_record(entry))


def drop_recorded_inputs(model, names):
    """Drop inputs from the record that `unsteer` would give a steered ModelProto back."""
    for entry in model.metadata_props:
        if entry.key == ORIGINAL:
            before = _decode(ModelProto, entry.value)
            keep(before.graph.input, lambda value: value.name not in names)
            data = before.SerializeToString(deterministic=True)
            entry.value = base64.b64encode(data).decode()


# --- finding


@dataclass(frozen=True)
class _Site:
    """An activation where it stands. `dtypes` is empty where the element type is not known;
    `inner` is the activation as a node of its own where `node` is one that it is fused into."""

    activation: Activation
    node: NodeProto
    scope: Scope
    dtypes: set
    steering: activations.Steering | None = None
    inner: NodeProto | None = None


def _survey(model, values):
    """Yield a _Site for every activation of the model."""
    for scope in typed_scopes(model):
        if scope.function is not None and ctu.is_ctu(scope.function):
            continue
        makers = {name: node.op_type for node in scope.body.node for name in node.output}
        for node in scope.body.node:
            inner = activations.unfused(node)
            # X, bounds, slope and Y are of one type: the first that is known.
            types = (scope.types.get(name) for name in (*node.input, *node.output))
            known = next(filter(None, types), set())
            found = _judge(node, inner, known, scope, values, makers)
            if found is None:
                continue
            details, steering = found
            activation = Activation(
                name=node_label(node),
                scope=scope.path,
                shape=scope.shapes.get((*node.output, "")[0]),
                module=_module(node),
                **details,
            )
            yield _Site(activation, node, scope, known, steering, inner)


def _judge(node, inner, known, scope, values, makers):
    """What an Activation says of a node, and its Steering; None where it is no activation."""
    if ctu.is_ctu(node):
        # Somebody else's may lack them.
        beta, coeff = (*(values.get(name) for name in node.input[1:3]), None, None)[:2]
        return {"op": original_op(node), "status": "steered", "beta": beta, "coeff": coeff}, None
    lowered = _metadata(node, LOWERED)
    if lowered is not None:
        return ({"op": lowered, "status": "steered"}, None) if lowered else None
    judged = activations.judge(inner or node, known, scope.constant)
    judged = judged or activations.clips_at_zero(node, scope.types, scope.constant, makers)
    if judged is None:
        return None
    op_type = (inner or node).op_type
    if isinstance(judged, str):
        return {"op": op_type, "status": "skipped", "reason": judged}, None
    return {"op": op_type, "status": "steerable"}, judged


def _module(node):
    """The PyTorch module that a node comes from: its exporter keeps the scopes around it."""
    text = _metadata(node, "pkg.torch.onnx.name_scopes")
    try:
        return next((s for s in reversed(ast.literal_eval(text)[:-1]) if s), None)
    except (SyntaxError, TypeError, ValueError):
        return None  # There is none, or another exporter's.


def _check_unsteered(model):
    """Raise UsageError or ModelError where steering `model` would go wrong."""
    check_names(model)
    if was_steered(model):
        change = "change its beta with `ctonnx set`, or " if holds_ctu(model) else ""
        raise UsageError(f"the model is already steered: {change}steer its original")
    # Not the model's own imports: ONNX Runtime writes ours into what it saves, once it has seen it.
    imports = [entry for function in model.functions for entry in function.opset_import]
    nodes = [node for scope in scopes(model) for node in scope.body.node]
    if any(entry.domain == ctu.DOMAIN for entry in (*imports, *model.functions, *nodes)):
        raise ModelError(f"the model uses the domain {ctu.DOMAIN!r} for something else")
    if any(function.domain in DEFAULT_DOMAINS for function in model.functions):
        # Its Relu need not be a ReLU, and would end up inside the CTU's own function.
        raise ModelError("the model defines functions in the domain of the standard ops")


def _candidates(model, selected, opset, lowering, report):
    """The _Sites that can be steered and are selected, and whether the op's function is needed."""
    candidates = []
    with_function = lowering != "op"
    for site in _survey(model, {}):
        reason = site.activation.reason or selected(site.activation)
        if not reason:
            reason = _too_old(site, opset)
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


def _selector(ops, include, exclude):
    """A function from an Activation to the reason why the user did not select it, or None."""
    wanted = None
    if isinstance(ops, str):
        raise UsageError(f"ops must be a list of op types, got {ops!r}")
    if ops is not None:
        wanted = {op.lower() for op in ops}
        unknown = wanted - {op.lower() for op in activations.STEERABLE}
        if unknown:
            raise UsageError(
                f"unknown op {sorted(unknown)[0]!r}: choose among "
                + ", ".join(op.lower() for op in activations.STEERABLE)
            )
    include, exclude = _pattern("include", include), _pattern("exclude", exclude)

    def reason(activation):
        if wanted is not None and activation.op.lower() not in wanted:
            return "not among the selected ops"
        if include and not include.search(activation.name):
            return "its name does not match include"
        if exclude and exclude.search(activation.name):
            return "its name matches exclude"
        return None

    return reason


def _pattern(option, text):
    if text is None:
        return None
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise UsageError(f"{option}: {text!r} is not a regular expression: {error}") from None


def _too_old(site, opset):
    """Why the ops of `opset` cannot make up the fallback of a _Site, or None."""
    if opset < 7 and site.steering.sloped and isinstance(site.steering.operands[0], str):
        return "its slope broadcasts otherwise before opset 7"
    return None


def _usual_type(model, candidates):
    """The commonest known type of the candidates, else of the floating-point initializers."""
    counts = Counter(dtype for site in candidates for dtype in site.dtypes) or Counter(
        t.data_type for t in model.graph.initializer if t.data_type in ctu.FLOATING
    )
    return counts.most_common(1)[0][0] if counts else TensorProto.FLOAT


def _of_fitting_types(candidates, opset, with_function, report):
    """The candidates whose element types the function, or an operand, can serve; the rest skipped.

    An operand is an initializer of one element type. The function's body is written for one element
    type too, unless CastLike (opset 15) is there to follow X.
    """
    commonest = Counter(min(site.dtypes, default=0) for site in candidates).most_common(1)
    sloped = any(site.steering.sloped for site in candidates)
    one_type = opset < 15 and with_function
    sites = []
    for site in candidates:
        typed = sloped or any(not isinstance(o, str) for o in site.steering.operands)
        if len(site.dtypes) > 1 and (typed or one_type):
            report.skip(site.activation, "its function is called with several element types")
        elif one_type and min(site.dtypes) != commonest[0][0]:
            reason = "its element type is not the usual one; mixing needs opset 15"
            report.skip(site.activation, reason)
        else:
            sites.append(site)
    return sites


def _with_parameters(sites, given, beta, coeff, report):
    """The sites that have a beta, and the arrays of each; those without are skipped."""
    found = [site.activation for site in sites]
    resolved = params.resolve(given, beta, coeff, found, report.notes)
    kept = []
    for site, values in zip(sites, resolved, strict=True):
        if values["beta"] is None:
            report.skip(site.activation, "no beta is given for it")
            continue
        name, shape = site.activation.name, site.activation.shape
        for key in "beta", "coeff":
            values[key] = params.per_channel(values[key], shape, name)
            if values[key].size > 1 and site.node.op_type in ("Conv", "NhwcFusedConv"):
                raise UsageError(
                    f"params: {name}: its channels are not dimension 1: give one value"
                )
        kept.append((site, values))
    return [site for site, _ in kept], [values for _, values in kept]


def nothing_matched(skipped):
    """What to say where no activation is left to steer."""
    if not skipped:
        return "no activation to steer: the model holds none"
    first = skipped[0]
    more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
    return f"no activation to steer: skipped {first.op} {first.name} ({first.reason}){more}"


def _check_choice(name, value, choices):
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _opset(model):
    def version(owner):
        domains = DEFAULT_DOMAINS
        return max((e.version for e in owner.opset_import if e.domain in domains), default=0)

    # A graph of function calls alone need not import the default domain.
    opset = version(model) or max(map(version, model.functions), default=0)
    if not opset:
        raise ModelError("the model imports no opset of the default domain: there is no activation")
    return opset


def holds_ctu(model):
    """Whether a node of ours stands anywhere in a ModelProto."""
    return any(ctu.is_ctu(node) for scope in scopes(model) for node in scope.body.node)


def was_steered(model):
    """Whether a ModelProto is steered, or was before it was lowered to primitives or optimised."""
    # Other tools drop metadata of the model or of nodes; lowering to primitives leaves no CTU.
    return _has_record(model) or any(
        ctu.is_ctu(node) or _has_record(node) for scope in scopes(model) for node in scope.body.node
    )


def _has_record(proto):
    return any(map(_is_record, proto.metadata_props))


def _is_record(entry):
    return entry.key.startswith("ctonnx.") and entry.key != CLASSES


def _steered(model):
    """The Scopes of the model's own that hold CTU nodes, as a list."""
    found = [
        scope
        for scope in scopes(model)
        if not (scope.function and ctu.is_ctu(scope.function))
        and any(map(ctu.is_ctu, scope.body.node))
    ]
    if not found and was_steered(model):
        raise NothingToDo(
            "the model holds no CTU, for it was lowered to primitives: go back to its original"
        )
    if not found:
        raise NothingToDo(NOT_STEERED)
    return found


# --- editing


def _import_domain(model, before):
    """Import our domain, and put into `before` an import that is there already."""
    held = [entry for entry in model.opset_import if entry.domain == ctu.DOMAIN]
    before.opset_import.extend(held)
    if not held:
        model.opset_import.append(helper.make_opsetid(ctu.DOMAIN, ctu.VERSION))


def _raise_ir(model, minimum, before, report):
    """Raise the IR version, and put into `before` what that changes."""
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


def _steer_node(site, inputs, parameters):
    """Make the site's node, or the one fused into it, an op of ours with `inputs` behind X."""
    node = site.node
    if site.inner is not None:
        _record_node(node, output=True)
        before = parameters.free_name(f"{node.output[0]}_before_activation")
        site.inner.name = node.name and f"{node.name}_activation"
        activations.take_out(node, before)
        node = site.inner
        _record(node, NodeProto(op_type=node.op_type))
        x = before
    else:
        _record_node(node)
        x = site.steering.x
    node.op_type, node.domain = site.steering.op_type, ctu.DOMAIN
    del node.attribute[:], node.input[:]
    node.input.extend([x, *inputs])


def _insert_activations(model, sites):
    """Put the activations that were fused behind the nodes that they were fused into."""
    behind = {}
    for site in sites:
        if site.inner is not None:
            behind[id(site.scope.body), site.node.output[0]] = site.inner
    if not behind:
        return
    # Innermost bodies first, as a body is copied along with the node that holds it.
    for scope in reversed(list({id(site.scope): site.scope for site in sites}.values())):
        nodes = []
        for node in scope.body.node:
            nodes.append(node)
            inner = behind.get((id(scope.body), node.output[0] if node.output else ""))
            if inner is not None:
                nodes.append(inner)
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del scope.body.node[:]
        scope.body.node.extend(copies)


def _note_weights(model, given, report):
    """Note where a state dict holds other weights than the model: T-CT trains a head as well."""
    if not isinstance(given, params.Trained):
        return
    names = list(params.differing(given.weights, model.graph.initializer))
    if names:
        report.notes.append(
            f"took beta and c alone: {len(names)} weights of the checkpoint differ from those in "
            f"the model, such as {names[0]}; `ctonnx export --checkpoint` takes all"
        )


def _note_calibrated(model, sites, report):
    """Note how many sites feed a quantization, whose range does not know of steering."""
    quantized = {
        name
        for scope in scopes(model)
        for node in scope.body.node
        if node.op_type == "QuantizeLinear"
        for name in node.input[:1]
    }
    count = sum(bool(quantized.intersection((site.inner or site.node).output)) for site in sites)
    if count:
        report.notes.append(
            f"{count} feed QuantizeLinear, with a range that was calibrated without steering"
        )


def _note_opset(opset, sites, with_function, lowering, report):
    """Note where ONNX Runtime has no kernels for the standard ops that stand for CTUs."""
    needed = lowering == "primitives" or any(s.steering.op_type != ctu.OP_TYPE for s in sites)
    if opset < 7 and (needed or with_function):
        library = "" if needed else ", or load the op library"
        report.notes.append(
            f"the standard ops that make up a CTU do not run in ONNX Runtime at opset {opset}, as "
            f"its kernels begin at 7: raise the original's with onnx.version_converter{library}"
        )


def _add_functions(model, sites, opset, with_function, sloped):
    """Add the functions that the steered sites call, or fall back on."""
    if with_function:
        unknown = {TensorProto.UNDEFINED}
        dtypes = set().union(*(site.dtypes or unknown for site in sites))
        model.functions.append(ctu.function(opset, dtypes, sloped))
    # These have no kernel: wherever they stand their function is what runs.
    ours = {site.steering.op_type for site in sites} - {ctu.OP_TYPE}
    if "CTUHardSigmoid" in ours:
        ours.add("CTUClip")
    model.functions.extend(activations.function(op, opset, sloped) for op in sorted(ours))


class _Parameters:
    """The initializers and inputs that steering adds to the graph, under names that are free."""

    def __init__(self, model):
        self._model = model
        self._fresh = FreshNames(model)
        self._held = {}
        self.names = []

    def free_name(self, base):
        """A name like `base` that nothing in the model has."""
        return self._fresh(base)

    def _parameter(self, base):
        name = self.free_name(base)
        self.names.append(name)
        return name

    def add(self, base, value):
        """The name of an initializer of a float32 array, one for all that are equal."""
        key = base, value.shape, value.tobytes()
        if key not in self._held:
            name = self._held[key] = self._parameter(base)
            tensor = helper.make_tensor(name, TensorProto.FLOAT, value.shape, value.ravel())
            self._model.graph.initializer.append(tensor)
        return self._held[key]

    def add_input(self, base, value, kind):
        """The name of a scalar graph input, with `value` as its default where it is optional."""
        name = self._parameter(base)
        self._model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
        if kind == "input":
            self._model.graph.initializer.append(_scalar(name, value, TensorProto.FLOAT))
        return name

    def add_operand(self, value, dtype):
        """The name of an initializer of the number `value`, one for all that need it."""
        if dtype == TensorProto.FLOAT16:  # A bound beyond its range is none.
            value = float(np.clip(value, *(np.finfo(np.float16).min, np.finfo(np.float16).max)))
        if (value, dtype) not in self._held:
            name = self._held[value, dtype] = self._parameter("ctu_operand")
            self._model.graph.initializer.append(_scalar(name, value, dtype))
        return self._held[value, dtype]


def _scalar(name, value, dtype):
    return helper.make_tensor(name, dtype, [], [value])


def _pass_into_functions(model, parameters):
    """Functions see no outer names: give each that needs parameters of ours them as inputs."""
    functions = functions_of(model)
    scopes_of = {key: [] for key in functions}
    for scope in scopes(model):
        if scope.function is not None:
            scopes_of[key_of(scope.function)].append(scope)
    needs = {
        key: {name for scope in inside for node in scope.body.node for name in node.input}
        & set(parameters)
        for key, inside in scopes_of.items()
    }

    def callees(inside):
        for scope in inside:
            for node in scope.body.node:
                if key_of(node) in functions:
                    yield node, key_of(node)

    # A caller needs what its callees need; functions cannot recurse, so this settles.
    changed = True
    while changed:
        changed = False
        for key, inside in scopes_of.items():
            wanted = needs[key].union(*(needs[callee] for _, callee in callees(inside)))
            changed |= wanted != needs[key]
            needs[key] = wanted

    arity = {key: len(function.input) for key, function in functions.items()}
    for node, key in list(callees(scopes(model))):
        if needs[key]:
            _record_node(node)
            node.input.extend([""] * (arity[key] - len(node.input)))
            node.input.extend(name for name in parameters if name in needs[key])
    for key, function in functions.items():
        function.input.extend(name for name in parameters if name in needs[key])
        if any(ctu.is_ctu(node) for scope in scopes_of[key] for node in scope.body.node):
            function.opset_import.append(helper.make_opsetid(ctu.DOMAIN, ctu.VERSION))


def _given(model, parameters):
    """Which functions are given `parameters` of ours as `_pass_into_functions` does it: by the same
    name within as in all calls.

    Returns:
        key of a function -> the indices of these inputs, and a function that tells whether the
        parameters are seen in a Scope.
    """
    functions = {key: f for key, f in functions_of(model).items() if not ctu.is_ctu(f)}
    places = {
        key: {i for i, held in enumerate(function.input) if held in parameters}
        for key, function in functions.items()
    }
    for scope in scopes(model):
        for node in scope.body.node:
            held = places.get(key_of(node), set())
            names = functions[key_of(node)].input if held else ()
            held -= {i for i in held if node.input[i : i + 1] != [names[i]]}

    def seen(scope):
        # What is given none may have tensors of such names itself.
        return scope.function is None or bool(places.get(key_of(scope.function)))

    return places, seen


def _merge(model, parameters, name):
    """Make one, `name`, of `parameters` of ours: in nodes, and in what functions are given."""
    places, seen = _given(model, parameters)

    def merge(inputs, ours):
        if ours:
            first, *others = sorted(ours)
            inputs[first] = name
            for i in reversed(others):
                del inputs[i]

    for scope in scopes(model):
        for node in scope.body.node if seen(scope) else ():
            ours = places.get(key_of(node), ())
            merge(node.input, ours)
            for i, held in enumerate(node.input):
                if held in parameters and ctu.is_ctu(node):
                    node.input[i] = name
    for function in model.functions:
        merge(function.input, places.get(key_of(function), ()))


def _inline(model):
    """Replace every CTU by the body of its function, leaving standard ops only."""
    ours = [function for function in model.functions if ctu.is_ctu(function)]
    results = {}
    for scope in scopes(model):
        for node in scope.body.node:
            if scope.function is not None and ctu.is_ctu(scope.function):
                if node.op_type in activations.STEERABLE:
                    node.metadata_props.add(key=LOWERED, value="")
            elif ctu.is_ctu(node):
                results[scope.path, node.output[0]] = original_op(node)
    try:
        inlined = inliner.inline_selected_functions(model, [(f.domain, f.name) for f in ours])
    except (RuntimeError, checker.ValidationError) as error:
        raise ModelError(f"cannot be lowered to primitives: {error}") from None
    model.CopyFrom(inlined)
    for scope in scopes(model):
        for node in scope.body.node:
            op_type = results.get((scope.path, node.output[0] if node.output else ""))
            if op_type is not None:
                node.metadata_props.add(key=LOWERED, value=op_type)
    for owner in (model, *model.functions):
        keep(owner.opset_import, lambda entry: entry.domain != ctu.DOMAIN)


# --- records


def _metadata(proto, key):
    return next((entry.value for entry in proto.metadata_props if entry.key == key), None)


def _record(proto, before):
    """Keep `before`, the part of `proto` that is about to change, in its metadata."""
    value = base64.b64encode(before.SerializeToString(deterministic=True)).decode()
    proto.metadata_props.add(key=ORIGINAL, value=value)


def _record_node(node, output=False):
    """Keep what steering changes of a node, and its outputs where it changes those."""
    # Nothing else: fields that this onnx does not know stay on the node, and would come twice.
    before = NodeProto(input=node.input, attribute=node.attribute)
    for name in "op_type", "domain":
        if node.HasField(name):
            setattr(before, name, getattr(node, name))
    if output:
        before.output.extend(node.output)
    _record(node, before)


def _decode(kind, text):
    try:
        return kind.FromString(base64.b64decode(text, validate=True))
    except Exception:
        raise ModelError(f"the record {ORIGINAL} in the model is damaged: cannot undo") from None


def _restore(node):
    text = _metadata(node, ORIGINAL)
    if text is None:
        raise ModelError(f"CTU {node_label(node)!r} has no record of what it replaced: cannot undo")
    before = _decode(NodeProto, text)
    for changed in "op_type", "domain", "input", "attribute":
        node.ClearField(changed)
    if before.output:
        node.ClearField("output")
    node.MergeFrom(before)
    keep(node.metadata_props, lambda entry: entry.key != ORIGINAL)


def original_op(node):
    """The op type that a node had before it was steered."""
    text = _metadata(node, ORIGINAL)
    return _decode(NodeProto, text).op_type if text is not None else node.op_type


def _parameter_values(model):
    """name -> value of the initializers that hold a beta or coeff, as Activation has them."""
    used = _inputs_of_ctus(scopes(model), 1, 3)
    return {t.name: _decimal(t) for t in model.graph.initializer if t.name in used}


def _baked_parameters(model):
    """beta and coeff, as Activation has them, of a model lowered to primitives."""
    name, baked = _metadata(model, "ctonnx.beta_input"), {}
    fed = name is not None and all(tensor.name != name for tensor in model.graph.initializer)
    for key in ("coeff",) if fed else ("beta", "coeff"):
        with suppress(TypeError, ValueError):  # It is one for each activation, or not known.
            baked[key] = float(_metadata(model, f"ctonnx.{key}"))
    return baked


def _inputs_of_ctus(found, start, stop):
    """The names of the inputs from `start` to before `stop` of every CTU in the Scopes `found`."""
    return {
        name
        for scope in found
        for node in scope.body.node
        if ctu.is_ctu(node)
        for name in node.input[start:stop]
    }


def _decimal(tensor):
    """Numbers with the fewest digits that tell two float32 apart, not those of the next double.

    None where the tensor is none of ours: of another type, elsewhere, or damaged.
    """
    if tensor.data_type != TensorProto.FLOAT or tensor.data_location == TensorProto.EXTERNAL:
        return None
    try:
        array = numpy_helper.to_array(tensor)
    except ValueError:
        return None
    return np.reshape([float(str(value)) for value in array.ravel()], array.shape).tolist()


def keep(repeated, wanted):
    """Drop the elements of a repeated field that are not `wanted`."""
    for i in reversed(range(len(repeated))):
        if not wanted(repeated[i]):
            del repeated[i]
