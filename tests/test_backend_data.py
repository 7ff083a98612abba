"""onnx's own backend test data: every model with a supported activation, against a float64 oracle.

The oracle does not use the rewrite. It runs the original graph in float64 with onnx's evaluator and
computes the activations by the formula: see `oracle`.
"""

import numpy as np
import onnx
import pytest
from conftest import HEAVY, LIGHT_MODELS, backend_cases, light_model, parsed, vary_weights
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import ctonnx
from ctonnx import ctu
from ctonnx.check.reference import Evaluator, Reference
from ctonnx.check.validate import Model, compare
from ctonnx.errors import ModelError, NothingToDo
from ctonnx.model.graph import node_label, scopes
from ctonnx.ort.runs import random_inputs
from ctonnx.rewriting import steer as steering
from ctonnx.rewriting.steer import LOWERINGS

pytest.importorskip("torch")

from ctonnx.check.ops import OPS

BETA = np.float32(0.85)
# Not one half, where c and 1 - c are the same.
COEFF = np.float32(0.3)

# Whether the op library is registered, by lowering.
LIBRARY = {"portable": (False, True), "op": (True,), "primitives": (False,)}

# Kind -> least number of models that are steered.
KINDS = {"node": 17, "simple": 1, "pytorch-converted": 9, "pytorch-operator": 1}


def unit(x, slope=0.0):
    return ctu.ctu(x, BETA, COEFF, slope)


def kink(distance):
    """What smoothing adds at a distance from a kink, on either side of it."""
    return unit(-np.abs(distance))


def clip(x, low=None, high=None, min=None, max=None):
    """Bounds are inputs, and attributes before opset 11."""
    low, high = low if min is None else min, high if max is None else max
    y = np.clip(x, low, high)
    if low is not None:
        y = y + kink(x - low)
    if high is not None:
        y = y - kink(x - high)
    return y


def old_prelu(x, slope):
    """Before opset 7, a slope is per channel and does not broadcast."""
    return unit(x, slope.reshape(-1, *[1] * (x.ndim - 2)) if x.ndim > 1 else slope)


# The smooth version of each op that ctonnx may steer, as a function of its inputs and attributes.
FORMULAS = {
    "Relu": unit,
    "LeakyRelu": lambda x, alpha=0.01: unit(x, alpha),
    "PRelu": unit,
    "Clip": clip,
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: clip(alpha * x + beta, 0.0, 1.0),
    "Max": lambda x, y: np.maximum(x, y) + kink(x - y),
    "Min": lambda x, y: np.minimum(x, y) - kink(x - y),
}


def is_constant(name, producers):
    producer = producers.get(name)
    return producer is None or (
        producer.op_type in ("Constant", "Cast", "CastLike")
        and all(is_constant(n, producers) for n in producer.input[:1])
    )


def join_pairs(graph, inputs):
    """Make one Clip of each Min of a Max, or Max of a Min, of x and two constants."""
    producers = {name: node for node in graph.node for name in node.output}
    producers |= dict.fromkeys(inputs, NodeProto())
    for node in graph.node:
        opposite = {"Max": "Min", "Min": "Max"}.get(node.op_type)
        for place, name in enumerate(node.input):
            inner = producers.get(name)
            if inner is None or inner.op_type != opposite or len(inner.input) != 2:
                continue
            bounds = [n for n in inner.input if is_constant(n, producers)]
            bounds.append(node.input[1 - place])
            if len(bounds) == 2 and is_constant(bounds[1], producers):
                (x,) = set(inner.input) - set(bounds)
                low, high = bounds if opposite == "Max" else reversed(bounds)
                node.op_type, node.input[:] = "Clip", [x, low, high]
                break


def op_class(op_type, formula):
    def run(self, *inputs, **attributes):
        return (np.asarray(formula(*inputs, **attributes)).astype(inputs[0].dtype),)

    return type(op_type, (OpRun,), {"op_domain": "oracle", "_run": run})


def oracle(model, inputs):
    """The expected outputs of the steered model: dict from output name to float64 array.

    The activations that `inspect` calls steerable move to the domain "oracle", whose ops compute
    the formula. Floating-point types become float64. Nothing else changes.
    """
    steerable = {(a.scope, a.name) for a in ctonnx.inspect(model) if a.status == "steerable"}
    original, model = model, ModelProto()
    model.CopyFrom(original)
    join_pairs(model.graph, inputs)
    for scope in scopes(model):
        for node in scope.graph.node:
            if (scope.path, node_label(node)) in steerable and node.op_type in FORMULAS:
                steerable.remove((scope.path, node_label(node)))
                node.domain = "oracle"
    assert not steerable, f"no formula for {steerable}"
    for owner in (model, *model.functions):
        owner.opset_import.append(helper.make_opsetid("oracle", 1))
    old = any(e.domain == "" and e.version < 7 for e in model.opset_import)
    formulas = FORMULAS | ({"PRelu": old_prelu} if old else {})
    widened = {k: v.astype(np.float64) if is_floating(v) else v for k, v in inputs.items()}
    classes = [op_class(*item) for item in formulas.items()]
    # The evaluator forgets new_ops in functions.
    return evaluated(Evaluator(inliner.inline_local_functions(model), classes), widened)


def evaluated(evaluator, inputs):
    with np.errstate(all="ignore"):
        return dict(zip(evaluator.output_names, evaluator.run(None, inputs), strict=True))


def is_floating(array):
    return np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"


def steered(model, beta, lowering):
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy, steering.steer(copy, float(beta), float(COEFF), lowering=lowering)


class CTU(OpRun):
    """The op in the ReferenceEvaluator, in place of the op library in ONNX Runtime."""

    op_domain = ctu.DOMAIN

    def _run(self, x, beta, coeff, slope=None):
        y = ctu.ctu(x, beta, coeff, 0.0 if slope is None else slope)
        return (np.asarray(y).astype(x.dtype),)


def in_reference(model, inputs, library=False):
    # The ReferenceEvaluator forgets new_ops in functions.
    others = [(f.domain, f.name) for f in model.functions if f.name != ctu.OP_TYPE]
    model = inliner.inline_selected_functions(model, others) if others else model
    # onnx's Loop is wrong; its other wrong ops are not in these models.
    ops = [op for op in OPS if op.__name__ == "Loop"]
    return evaluated(ReferenceEvaluator(model, new_ops=[CTU, *ops] if library else ops), inputs)


def in_onnxruntime(model, inputs, library=False):
    return Model(model.SerializeToString(), library).run(inputs)


def runs_in_onnxruntime(model, inputs):
    # ONNX Runtime has no arithmetic before opset 7, nothing yet for the newest opset, and takes no
    # arrays of bfloat16.
    if any(e.domain == "" and e.version < 7 for e in model.opset_import):
        return False
    if any(str(getattr(value, "dtype", "")) == "bfloat16" for value in inputs.values()):
        return False
    try:
        return bool(Model(model.SerializeToString()))
    except ModelError:
        return False


def wrong(expected, actual):
    """The reasons why outputs differ; `expected` is cast to the types of `actual`."""
    expected = {k: np.asarray(v).astype(actual[k].dtype) for k, v in expected.items()}
    return [f"{c.name}: {c.reason}" for c in compare(expected, actual) if not c.ok]


def is_plain(model):
    """Whether the model's units are CTUs, which alone the evaluator knows without a function."""
    units = [n for s in scopes(model) for n in s.graph.node if ctu.is_ctu(n)]
    return all(node.op_type == ctu.OP_TYPE for node in units)


def assert_follows_the_oracle(model, inputs, original=None):
    """Assert that every lowering follows the original at beta 1 and the oracle at 0.85.

    Args:
        original: the model's outputs in ONNX Runtime, if known.

    Returns:
        Whether the original and the oracle differ.
    """
    run = in_onnxruntime if original or runs_in_onnxruntime(model, inputs) else in_reference
    original = original or run(model, inputs)
    expected = oracle(model, inputs)
    for lowering in LOWERINGS:
        for beta, wanted in (1.0, original), (BETA, expected):
            changed, report = steered(model, beta, lowering)
            assert report.replaced
            onnx.checker.check_model(changed, full_check=lowering != "op")
            if run is in_reference and lowering == "op" and not is_plain(changed):
                continue
            for library in LIBRARY[lowering]:
                difference = wrong(wanted, run(changed, inputs, library))
                assert not difference, (lowering, beta, library, difference)
    return bool(wrong(expected, original))


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_follows_the_oracle(kind, capsys):
    passed, refused, sensitive = [], [], []
    for name, model, inputs, _ in backend_cases(kind):
        if not any(a.status == "steerable" for a in ctonnx.inspect(model)):
            continue
        try:
            sensitive += [name] * assert_follows_the_oracle(model, inputs)
            passed.append(name)
        except NothingToDo as error:
            if "before opset 7" not in str(error):
                raise
            refused.append(name)
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error
    with capsys.disabled():
        print(
            f"\n{kind}: {len(passed)} models steered, {len(refused)} with too old an opset; "
            f"the outputs of {len(sensitive)} depend on beta"
        )
    assert len(passed) + len(refused) >= KINDS[kind]
    assert sensitive == passed


@pytest.mark.parametrize("name", LIGHT_MODELS)
def test_every_light_model_follows_the_oracle(name):
    """With random weights, and with the last activation as an output, since the Softmax behind it
    would hide differences."""
    model = light_model(name)
    vary_weights(model)
    last = [node for node in model.graph.node if node.op_type == "Relu"][-1].output[0]
    model.graph.output.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, None))
    opened = Model(model.SerializeToString())
    inputs = random_inputs(opened)
    original = opened.run(inputs)
    shape = original[last].shape
    model.graph.output[-1].CopyFrom(helper.make_tensor_value_info(last, TensorProto.FLOAT, shape))
    assert assert_follows_the_oracle(model, inputs, original)
    if name not in HEAVY:
        # The reference run agrees with ONNX Runtime too.
        changed, _ = steered(model, BETA, "portable")
        for proto, outputs in (model, original), (changed, in_onnxruntime(changed, inputs)):
            assert not wrong(Reference(proto).run(inputs), outputs)


EVERY_PLACE = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
g (float[N, 4] x, bool b) => (float[N, 4] y) <float[4] a = {0.1, 0.2, -0.3, 1.5}>
{
  p = Relu(x)  q = LeakyRelu <alpha: float = 0.2> (x)  r = PRelu(x, a)  s = my.f(x)
  t = If (b) <then_branch = then_graph () => (float[N, 4] c) { c = Relu(x) },
    else_branch = else_graph () => (float[N, 4] d) { d = Neg(x) }>
  y = Sum(p, q, r, s, t)
}
<domain: "my", opset_import: ["" : 17]> f (X) => (Z) { H = Neg(X)  Z = LeakyRelu(H) }"""

SITES = ["p", "q", "r", "c", "Z"]


def put_back(site):
    """A mutation: one activation is not steered."""

    def mutate(changed, model):
        originals = {n.output[0]: n for scope in scopes(model) for n in scope.graph.node}
        for scope in scopes(changed):
            for node in scope.graph.node:
                if site in node.output and node.output[0] in originals:
                    node.CopyFrom(originals[site])

    return mutate


def replaced_scalar(name, value):
    """A mutation: an initializer of the steering has another value."""

    def mutate(changed, model):
        for tensor in changed.graph.initializer:
            if tensor.name.startswith(name):
                tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, [], [value]))

    return mutate


MUTATIONS = {
    **{f"{site} is not steered": put_back(site) for site in SITES},
    "c and 1 - c swapped": replaced_scalar("coeff", float(1 - COEFF)),
    "beta 0.86": replaced_scalar("beta", 0.86),
    "no slopes": replaced_scalar("ctu_operand", 0.0),
}


@pytest.mark.parametrize("lowering", ["portable", "op"])
@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_a_wrong_rewrite_fails(mutation, lowering, monkeypatch):
    model = parsed(EVERY_PLACE)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    inputs = {"x": x, "b": np.array(True)}
    if mutation is None:
        assert assert_follows_the_oracle(model, inputs)
        return
    right = steering.steer

    def steer(proto, *arguments, **options):
        before = ModelProto()
        before.CopyFrom(proto)
        report = right(proto, *arguments, **options)
        # Not at beta 1, where most mistakes do not show.
        if arguments[0] != 1.0 and options["lowering"] == lowering:
            MUTATIONS[mutation](proto, before)
        return report

    monkeypatch.setattr(steering, "steer", steer)
    with pytest.raises(AssertionError, match=rf"{lowering}.*y: differs"):
        assert_follows_the_oracle(model, inputs)
