"""Steering a model in place: activations become `ctonnx::CTU` nodes, and back.

A node is steered by changing its op_type, domain, inputs and attributes; its name, outputs, docs
and order stay, and so does everything else in the model. What changed is kept as a serialized
proto under the metadata key `ctonnx.original` of the node (and of the model, for its IR version
and inputs), which is what `unpatch` reads.
"""

import base64
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace

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

from . import activations, ctu
from .errors import ModelError, NothingToDo, UsageError
from .graph import functions_of, key_of, names, node_label, scopes, typed_scopes, unique_name

ORIGINAL = "ctonnx.original"

# On the standard ops of a CTU lowered to primitives: "inside" on its Relus, "result" on its last.
LOWERED = "ctonnx.lowered"

# On a model that imported the CTU's domain before.
IMPORTED = "ctonnx.imported"

LOWERINGS = ("portable", "op", "primitives")
BETA_AS = ("initializer", "input", "required-input")


@dataclass(frozen=True)
class Activation:
    """One activation of a model, as `inspect` and `patch` report it.

    `status` is "steerable", "steered" or "skipped", the last with a `reason`. `beta` and `coeff`
    are those of a steered one; None where they are fed at run time or differ per channel.
    """

    name: str
    op: str
    scope: str
    status: str
    reason: str | None = None
    beta: float | None = None
    coeff: float | None = None


@dataclass
class Report:
    """What `steer` did: the Activations it replaced and skipped, and what else it had to change.

    `beta_name` is the name of the initializer or input that holds beta.
    """

    replaced: list[Activation] = field(default_factory=list)
    skipped: list[Activation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    beta_name: str = "beta"

    def skip(self, activation, reason):
        self.skipped.append(replace(activation, status="skipped", reason=reason))


def find(model):
    """The Activations of a ModelProto, in order of scope and node."""
    values = _scalar_initializers(model)
    return [activation for activation, *_ in _survey(model, values)]


def steer(
    model,
    beta,
    coeff=0.5,
    *,
    beta_as="initializer",
    lowering="portable",
    ops=None,
    include=None,
    exclude=None,
):
    """Replace the activations of `model`, a ModelProto, in place.

    Args:
        beta, coeff: the CTU's parameters, in [0, 1].
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
        ModelError: the opset is older than the function's arithmetic.
    """
    beta, coeff = ctu.check_unit_interval("beta", beta), ctu.check_unit_interval("coeff", coeff)
    _check_choice("lowering", lowering, LOWERINGS)
    _check_choice("beta_as", beta_as, BETA_AS)
    selected = _selector(ops, include, exclude)
    if _is_steered(model):
        raise UsageError(
            "the model is already steered: change its beta with `ctonnx set`, or steer its original"
        )
    imports = [e for function in model.functions for e in function.opset_import]
    nodes = (node for scope in scopes(model) for node in scope.body.node)
    if any(proto.domain == ctu.DOMAIN for proto in (*imports, *model.functions, *nodes)):
        raise ModelError(f"the model uses the domain {ctu.DOMAIN!r} for something else")
    # Once the op library is registered, ONNX Runtime lists the domain in every model it saves.
    imported = any(entry.domain == ctu.DOMAIN for entry in model.opset_import)
    if any(function.domain in activations.DEFAULT_DOMAINS for function in model.functions):
        # Its Relu need not be a ReLU, and would end up inside the CTU's own function.
        raise ModelError("the model defines functions in the domain of the standard ops")
    opset = _opset(model)

    report = Report()
    candidates = []
    with_function = lowering != "op"
    for activation, node, scope, dtypes in _survey(model, {}):
        reason = activation.reason or selected(activation)
        if reason:
            report.skip(activation, reason)
            continue
        candidates.append((activation, node, dtypes))
        if scope.function is not None and not with_function:
            with_function = True
            report.notes.append(
                "wrote the op's function too: without it ONNX Runtime cannot infer the types in "
                "the model-local functions that hold activations"
            )
    usual = _usual_type(model, candidates)
    unknown = sum(not dtypes for _, _, dtypes in candidates)
    if unknown:
        name = TensorProto.DataType.Name(usual).lower()
        report.notes.append(f"took {unknown} activations of unknown element type to be {name}")
    if opset < 15:
        candidates = [(a, node, dtypes or {usual}) for a, node, dtypes in candidates]
    sites = _of_fitting_types(candidates, opset, with_function, report)
    if not sites:
        raise NothingToDo(_nothing_matched(report.skipped))

    # Functions came with IR 8; before IR 4 every initializer had to be listed as an input as well.
    _raise_ir(model, 8 if with_function and lowering != "primitives" else 4, report)
    parameters = _Parameters(model)
    report.beta_name = parameters.add("beta", beta, as_input=beta_as)
    if beta_as != "initializer":
        report.notes.append(f"beta is the graph's input {report.beta_name!r}")
    coeff_name = parameters.add("coeff", coeff)
    sloped = any(activations.slope_of(node) for _, node, _ in sites)
    for activation, node, dtypes in sites:
        slope = activations.slope_of(node)
        inputs = [node.input[0], report.beta_name, coeff_name]
        if isinstance(slope, str):
            inputs.append(slope)
        elif slope or (sloped and with_function):
            # A function has one signature, so next to a LeakyRelu a Relu passes its slope too.
            inputs.append(parameters.add_slope(slope, next(iter(dtypes), usual)))
        _record_node(node)
        node.op_type, node.domain = ctu.OP_TYPE, ctu.DOMAIN
        del node.attribute[:], node.input[:]
        node.input.extend(inputs)
        held = None if beta_as == "required-input" else beta
        report.replaced.append(replace(activation, status="steered", beta=held, coeff=coeff))

    _pass_into_functions(model, parameters.names)
    if imported:
        model.metadata_props.add(key=IMPORTED, value="")
    else:
        model.opset_import.append(helper.make_opsetid(ctu.DOMAIN, ctu.VERSION))
    if with_function:
        unknown = {TensorProto.UNDEFINED}
        dtypes = set().union(*(dtypes or unknown for _, _, dtypes in sites))
        model.functions.append(ctu.function(opset, dtypes, sloped))
    if lowering == "primitives":
        _inline(model)
    from . import __version__

    for key, value in ("version", __version__), ("beta", repr(beta)), ("coeff", repr(coeff)):
        model.metadata_props.add(key=f"ctonnx.{key}", value=value)
    return report


def set_beta(model, beta):
    """Change the beta of a steered ModelProto in place; optional inputs get it as their default.

    Raises:
        UsageError: beta is not in [0, 1], or is a required input, which has no value to set.
        NothingToDo: the model holds no CTU.
    """
    beta = ctu.check_unit_interval("beta", beta)
    held = {
        name
        for scope in _steered(model)
        for node in scope.body.node
        if ctu.is_ctu(node)
        for name in node.input[1:2]
    }
    changed = False
    for tensor in model.graph.initializer:
        if tensor.name in held:
            tensor.CopyFrom(_scalar(tensor.name, beta, TensorProto.FLOAT))
            changed = True
    if not changed:
        raise UsageError("beta is a required input of this model: feed it instead of setting it")
    for entry in model.metadata_props:
        if entry.key == "ctonnx.beta":
            entry.value = repr(beta)


def make_beta_an_input(model, name):
    """Let the initializer `name` of a ModelProto be overridden: list it as a graph input too."""
    if name not in {value.name for value in model.graph.input}:
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))


def unsteer(model):
    """Undo `steer` on a ModelProto in place, node for node and attribute for attribute.

    Raises:
        NothingToDo: the model holds no CTU, as after lowering to primitives.
        ModelError: a CTU node carries no record of what it replaced.
    """
    parameters = set()
    for scope in _steered(model):
        for node in scope.body.node:
            if ctu.is_ctu(node):
                parameters.update(node.input[1:])
                _restore(node)
                parameters.difference_update(node.input)
    for scope in scopes(model):
        # PRelu's slope is the model's own: what restored nodes still use is no parameter of ours.
        if isinstance(scope.body, FunctionProto):
            _keep(scope.body.input, lambda name: name not in parameters)
        for node in scope.body.node:
            if _metadata(node, ORIGINAL) is not None:
                _restore(node)
    for i in reversed(range(len(model.functions))):
        if ctu.is_ctu(model.functions[i]):
            del model.functions[i]
    imported = _metadata(model, IMPORTED) is not None
    for owner in model.functions if imported else (model, *model.functions):
        _keep(owner.opset_import, lambda entry: entry.domain != ctu.DOMAIN)
    _keep(model.graph.initializer, lambda tensor: tensor.name not in parameters)
    _keep(model.graph.input, lambda value: value.name not in parameters)
    original = _metadata(model, ORIGINAL)
    if original is not None:
        before = _decode(ModelProto, original)
        model.ir_version = before.ir_version
        if before.graph.input:
            del model.graph.input[:]
            model.graph.input.extend(before.graph.input)
    _keep(model.metadata_props, lambda entry: not entry.key.startswith("ctonnx."))


# --- finding


def _survey(model, values):
    """Yield (Activation, node, Scope, element types) of every activation of the model."""
    for scope in typed_scopes(model):
        if scope.function is not None and ctu.is_ctu(scope.function):
            continue
        for node in scope.body.node:
            name = node_label(node)
            if ctu.is_ctu(node):
                # Somebody else's may lack them.
                beta, coeff = (*(values.get(n) for n in node.input[1:3]), None, None)[:2]
                activation = Activation(
                    name, _original_op(node), scope.path, "steered", None, beta, coeff
                )
                yield activation, node, scope, set()
                continue
            lowered = _metadata(node, LOWERED)
            if lowered == "result":
                yield Activation(name, ctu.OP_TYPE, scope.path, "steered"), node, scope, set()
            if lowered is not None:
                continue
            known = scope.types.get(node.input[0], set()) if node.input else set()
            reason = activations.refusal(node, known)
            if reason is None:
                continue
            status = "skipped" if reason else "steerable"
            activation = Activation(name, node.op_type, scope.path, status, reason or None)
            yield activation, node, scope, known


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


def _usual_type(model, candidates):
    """The commonest known type of the candidates, else of the floating-point initializers."""
    counts = Counter(dtype for _, _, dtypes in candidates for dtype in dtypes) or Counter(
        t.data_type for t in model.graph.initializer if t.data_type in ctu.FLOATING
    )
    return counts.most_common(1)[0][0] if counts else TensorProto.FLOAT


def _of_fitting_types(candidates, opset, with_function, report):
    """The candidates whose element types the function, or a slope, can serve; the rest are skipped.

    A slope is an initializer of one element type. The function's body is written for one element
    type too, unless CastLike (opset 15) is there to follow X.
    """
    commonest = Counter(min(dtypes, default=0) for _, _, dtypes in candidates).most_common(1)
    sloped = any(activations.slope_of(node) for _, node, _ in candidates)
    one_type = opset < 15 and with_function
    sites = []
    for activation, node, dtypes in candidates:
        if len(dtypes) > 1 and (sloped or one_type):
            report.skip(activation, "its function is called with several element types")
        elif one_type and min(dtypes) != commonest[0][0]:
            report.skip(activation, "its element type is not the usual one; mixing needs opset 15")
        else:
            sites.append((activation, node, dtypes))
    return sites


def _nothing_matched(skipped):
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
        domains = activations.DEFAULT_DOMAINS
        return max((e.version for e in owner.opset_import if e.domain in domains), default=0)

    # A graph of function calls alone need not import the default domain.
    opset = version(model) or max(map(version, model.functions), default=0)
    if opset < ctu.MIN_OPSET:
        raise ModelError(
            f"the model's opset is {opset}, steering needs {ctu.MIN_OPSET} or newer: "
            "convert it with onnx.version_converter"
        )
    return opset


def _is_steered(model):
    # Other tools drop metadata of the model or of nodes; lowering to primitives leaves no CTU.
    nodes = (node for scope in scopes(model) for node in scope.body.node)
    return any(ctu.is_ctu(node) or _has_record(node) for node in nodes) or _has_record(model)


def _has_record(proto):
    return any(entry.key.startswith("ctonnx.") for entry in proto.metadata_props)


def _steered(model):
    """The Scopes that hold CTU nodes, as a list."""
    found = [scope for scope in scopes(model) if any(map(ctu.is_ctu, scope.body.node))]
    if not found:
        raise NothingToDo(
            "the model holds no CTU: it is not steered, or for good, being lowered to primitives"
        )
    return found


# --- editing


def _raise_ir(model, minimum, report):
    if model.ir_version >= minimum:
        return
    before = ModelProto(ir_version=model.ir_version)
    report.notes.append(f"raised the IR version from {model.ir_version} to {minimum}")
    if model.ir_version < 4:
        # From IR 4 on an initializer that is also an input can be overridden, which would stop ONNX
        # Runtime from folding and fusing it.
        constants = {tensor.name for tensor in model.graph.initializer}
        before.graph.input.extend(model.graph.input)
        _keep(model.graph.input, lambda value: value.name not in constants)
        report.notes.append(
            "initializers are no longer listed as inputs, as that IR version has it"
        )
    model.ir_version = minimum
    _record(model, before)


class _Parameters:
    """The initializers and inputs that steering adds to the graph, under names that are free."""

    def __init__(self, model):
        self._model = model
        self._taken = names(model)
        self._slopes = {}
        self.names = []

    def _name(self, base):
        name = unique_name(base, self._taken)
        self._taken.add(name)
        self.names.append(name)
        return name

    def add(self, base, value, as_input="initializer"):
        name = self._name(base)
        if as_input != "initializer":
            make_beta_an_input(self._model, name)
        if as_input != "required-input":
            self._model.graph.initializer.append(_scalar(name, value, TensorProto.FLOAT))
        return name

    def add_slope(self, value, dtype):
        if (value, dtype) not in self._slopes:
            name = self._slopes[value, dtype] = self._name("slope")
            self._model.graph.initializer.append(_scalar(name, value, dtype))
        return self._slopes[value, dtype]


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


def _inline(model):
    """Replace every CTU by the body of its function, leaving standard ops only."""
    for node in model.functions[-1].node:
        if node.op_type == "Relu":
            node.metadata_props.add(key=LOWERED, value="inside")
        if "Y" in node.output:
            node.metadata_props.add(key=LOWERED, value="result")
    try:
        inlined = inliner.inline_selected_functions(model, [(ctu.DOMAIN, ctu.OP_TYPE)])
    except (RuntimeError, checker.ValidationError) as error:
        raise ModelError(f"cannot be lowered to primitives: {error}") from None
    model.CopyFrom(inlined)
    for owner in (model, *model.functions):
        _keep(owner.opset_import, lambda entry: entry.domain != ctu.DOMAIN)


# --- records


def _metadata(proto, key):
    return next((entry.value for entry in proto.metadata_props if entry.key == key), None)


def _record(proto, before):
    """Keep `before`, the part of `proto` that is about to change, in its metadata."""
    value = base64.b64encode(before.SerializeToString(deterministic=True)).decode()
    proto.metadata_props.add(key=ORIGINAL, value=value)


def _record_node(node):
    # Nothing else: fields that this onnx does not know stay on the node, and would come twice.
    before = NodeProto(input=node.input, attribute=node.attribute)
    for name in "op_type", "domain":
        if node.HasField(name):
            setattr(before, name, getattr(node, name))
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
    node.MergeFrom(before)
    _keep(node.metadata_props, lambda entry: entry.key != ORIGINAL)


def _original_op(node):
    text = _metadata(node, ORIGINAL)
    return _decode(NodeProto, text).op_type if text is not None else node.op_type


def _scalar_initializers(model):
    """name -> value of the graph's scalar float32 initializers, in the fewest digits."""
    found = {}
    for tensor in model.graph.initializer:
        scalar = tensor.data_type == TensorProto.FLOAT and not tensor.dims
        if scalar and tensor.data_location != TensorProto.EXTERNAL:
            # One that holds more than a scalar, or nothing, has no value to tell.
            with suppress(ValueError):
                found[tensor.name] = float(str(numpy_helper.to_array(tensor)))
    return found


def _keep(repeated, wanted):
    """Drop the elements of a repeated field that are not `wanted`."""
    for i in reversed(range(len(repeated))):
        if not wanted(repeated[i]):
            del repeated[i]
