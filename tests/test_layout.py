"""Sessions in the blocked layout: the same outputs as in the plain one, and every refusal."""

import itertools
import logging
import os
import tempfile
import threading

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import DIGITS, parsed
from onnx import TensorProto, helper, numpy_helper

import ctonnx
from ctonnx import ctu
from ctonnx.ort import blocked, library
from ctonnx.rewriting.steer import BETA_AS, Selection, steer

CPU = ["CPUExecutionProvider"]
HEAD = '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 16, 8, 8] x'
PAD = "<pads = [1, 1, 1, 1]>"

# A residual block and a fully connected layer: every way in which activations are fused.
NET = f"""{HEAD}, float[16, 16, 3, 3] w1, float[16, 16, 3, 3] w2, float[16, 4] w3)
=> (float[N, 4] y)
{{ c = Conv {PAD} (x, w1)  r = Relu(c)  d = Conv {PAD} (r, w2)  s = Add(d, r)  t = Relu(s)
  p = GlobalAveragePool(t)  f = Flatten(p)  h = Gemm(f, w3)  y = Relu(h) }}"""

# One activation, followed by TAIL.
ONE = f"""{HEAD}, float[16, 16, 3, 3] w) => (float[N, 16, 8, 8] y)
{{ c = Conv {PAD} (x, w)  r = Relu(c)  TAIL }}"""


def tail(text):
    return ONE.replace("TAIL", text)


def with_weights(text):
    """The parsed model, with random initializers in place of the inputs other than x."""
    model, rng = parsed(text), np.random.default_rng(0)
    for value in list(model.graph.input)[1:]:
        dims = [d.dim_value for d in value.type.tensor_type.shape.dim]
        weights = rng.normal(size=dims) * np.sqrt(2 / np.prod(dims[1:]))
        model.graph.initializer.append(
            numpy_helper.from_array(weights.astype(np.float32), value.name)
        )
        model.graph.input.remove(value)
    return model


def steered(text=NET, **options):
    model = with_weights(text)
    steer(model, 0.85, **options)
    return model


def new_options():
    options = ort.SessionOptions()
    options.log_severity_level = 4
    library.register(options)
    return options


def opened(model, options=None):
    return blocked.open_session(model.SerializeToString(), CPU, options or new_options())


def reason_of(model, options=None):
    session, reason = opened(model, options)
    assert session is None
    return reason


@pytest.fixture(autouse=True, scope="module")
def _blocks():
    """Some processors have no blocked layout."""
    if opened(steered())[1] == "ONNX Runtime lays out nothing in blocks":
        pytest.skip("no blocked layout on this processor")


def random_x(*shape):
    return np.random.default_rng(1).normal(size=shape or (2, 16, 8, 8)).astype(np.float32)


def assert_same(model, x=None, fed=None, blocked=None, plain=None):
    """Compare two sessions of `model`, by default in both layouts; return the blocked output."""
    if blocked is None:
        blocked, reason = opened(model)
        assert blocked is not None, reason
    plain = plain or library.open_session(model.SerializeToString(), new_options(), CPU)
    for kind in "get_inputs", "get_outputs", "get_overridable_initializers":
        expected, actual = (
            [(i.name, i.type, i.shape) for i in getattr(s, kind)()] for s in (plain, blocked)
        )
        assert actual == expected
    inputs = {plain.get_inputs()[0].name: random_x() if x is None else x, **(fed or {})}
    expected, actual = plain.run(None, inputs)[0], blocked.run(None, inputs)[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * max(1, np.abs(expected).max()))
    return actual


# --- equal outputs


MODELS = {
    "network": NET,
    "channels that need padding": NET.replace("float[16, 16, 3, 3] w2", "float[12, 12, 3, 3] w2")
    .replace("float[16, 16, 3, 3] w1", "float[12, 16, 3, 3] w1")
    .replace("float[16, 4]", "float[12, 4]"),
    "used twice": tail("y = Add(r, c)"),
    "Tanh in the model": tail("y = Tanh(r)"),
    "Tanh and Sigmoid in the model": tail("s = Sigmoid(r)  y = Tanh(s)"),
    "before Clip": tail("z = Constant <value_float = 0.0> ()  y = Clip(r, z)"),
    "before QuantizeLinear": tail(
        """scale = Constant <value_float = 0.1> ()  zero = Constant <value = uint8 {0}> ()
        q = QuantizeLinear(r, scale, zero)  y = DequantizeLinear(q, scale, zero)"""
    ),
    "branches": tail(
        """b = ReduceMax <keepdims = 0> (x)  z = Constant <value_float = 9.0> ()
        g = Greater(b, z)  y = If (g) <
            then_branch = a () => (float[N, 16, 8, 8] i) { i = Neg(r) },
            else_branch = b () => (float[N, 16, 8, 8] k) { j = Conv (r, w)
              l = Relu(j)  m = Pad(l, pads)  k = Relu(m) }>"""
    ).replace("y)\n", "y)\n<int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}>\n"),
}


@pytest.mark.parametrize("text", MODELS.values(), ids=MODELS)
def test_outputs_are_those_of_the_plain_session(text):
    assert_same(steered(text))


def test_digits():
    model = onnx.load(DIGITS / "digits.onnx")
    steer(model, 0.85)
    assert_same(model, random_x(3, 1, 8, 8))


def test_nan_and_infinity_pass_alike():
    x = random_x()
    x[0, 0, 0, 0], x[1, 0, 0, 0] = np.nan, np.inf
    assert np.isnan(assert_same(steered(), x)).any()


@pytest.mark.parametrize("number", range(1, 7))
def test_partial_steering(number):
    """Each proper subset of the three Relus, by the names of their outputs."""
    chosen = [name for i, name in enumerate("rty") if number >> i & 1]
    model = steered(selection=Selection(include=f"^({'|'.join(chosen)})$"))
    assert sum(map(ctu.is_ctu, model.graph.node)) == len(chosen)
    assert_same(model)


@pytest.mark.parametrize("ops", [None, ["relu"], ["leakyrelu"]])
def test_leaky_relus_beside_relus(ops):
    text = NET.replace("t = Relu(s)", "t = LeakyRelu <alpha = 0.2> (s)")
    assert_same(steered(text, selection=Selection(ops)))


def test_each_site_keeps_its_own_parameters():
    model = steered()
    sites = [node for node in model.graph.node if ctu.is_ctu(node)]
    for site, beta in zip(sites, (0.5, 0.7, 0.95), strict=True):
        name = f"beta_{site.output[0]}"
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [beta]))
        site.input[1] = name
    assert_same(model)


@pytest.mark.parametrize(
    "activation",
    ["Clip(IN, lo, hi)", "Clip(IN, lo)", "Clip(IN, , hi)", "HardSigmoid(IN)", "Max(IN, zero)"],
)
@pytest.mark.parametrize(
    "values",
    [
        "<float lo = {-0.5}, float hi = {0.75}, float zero = {0.0}> { ",
        """{ lo = Constant <value = float {-0.5}> ()  hi = Constant <value_float = 0.75> ()
        zero = Constant <value = float {0.0}> () """,
    ],
    ids=["initializers", "constants"],
)
def test_kinks_elsewhere(activation, values):
    """Behind a convolution, a depthwise one and a residual sum."""
    text = f"""{HEAD}, float[16, 16, 3, 3] w1, float[16, 1, 3, 3] w2, float[16, 16, 1, 1] w3)
        => (float[N, 16, 8, 8] y) {values}
          a = Conv {PAD} (x, w1)  b = {activation.replace("IN", "a")}
          c = Conv <pads = [1, 1, 1, 1], group = 16> (b, w2)  d = {activation.replace("IN", "c")}
          e = Conv (d, w3)  s = Add(e, b)  y = {activation.replace("IN", "s")} }}"""
    model = with_weights(text)
    steer(model, 0.85)
    assert sum(map(ctu.is_ctu, model.graph.node)) == 3
    assert_same(model)


def per_channel(text, seed=0):
    """The steered model, with parameters for each channel of each site."""
    model, rng = with_weights(text), np.random.default_rng(seed)
    sites = [n for n in model.graph.node if n.op_type in ("Relu", "PRelu", "Clip")]
    channels = {o.name: o for o in onnx.shape_inference.infer_shapes(model).graph.value_info}
    channels.update((o.name, o) for o in model.graph.output)
    count = {
        n.output[0]: channels[n.output[0]].type.tensor_type.shape.dim[1].dim_value for n in sites
    }
    params = {
        f"^{name}$": {"beta": rng.uniform(0.5, 1, c), "coeff": rng.uniform(size=c)}
        for name, c in count.items()
    }
    steer(model, params=params)
    return model


PER_CHANNEL = {
    "network": MODELS["network"],
    "channels that need padding": MODELS["channels that need padding"],
    "branch without a convolution": tail("y = Add(r, x)"),
    "behind a pooling": tail("m = MaxPool <kernel_shape = [1, 1]> (r)  y = Relu(m)"),
    "slopes": ONE.replace("float[16, 16, 3, 3] w)", "float[16, 16, 3, 3] w, float[16, 1, 1] a)")
    .replace("Relu(c)", "PRelu(c, a)")
    .replace("TAIL", "y = Neg(r)"),
    "outside the blocks": tail("t = Transpose <perm = [0, 1, 3, 2]> (r)  y = Relu(t)"),
}


@pytest.mark.parametrize("text", PER_CHANNEL.values(), ids=PER_CHANNEL)
def test_parameters_per_channel(text):
    assert_same(per_channel(text))


def test_the_block_is_that_of_this_processor():
    assert blocked._block() in (8, 16)


def test_wrong_parameters_per_channel_are_caught(monkeypatch):
    lay_out = blocked._in_blocks
    monkeypatch.setattr(blocked, "_in_blocks", lambda *args: np.roll(lay_out(*args), 1, axis=-1))
    assert reason_of(per_channel(NET)).startswith("its output 'y' differs by")


def test_names_that_tell_nothing_are_refused(monkeypatch):
    optimise = blocked._optimise

    def renamed(*args):
        optimised = optimise(*args)
        for i, node in enumerate(optimised.graph.node):
            node.name = f"node{i}"
        return optimised

    monkeypatch.setattr(blocked, "_optimise", renamed)
    assert opened(steered())[0] is not None
    assert "the names do not tell" in reason_of(per_channel(NET))


# --- random networks

NETWORKS = 30 * int(os.environ.get("CTONNX_FUZZ", "1"))
FIRST_NETWORK = 1000 * int(os.environ.get("CTONNX_FUZZ_SEED", "0"))


def random_network(seed):
    """A convolutional network with activations of every kind, steered with random parameters."""
    rng = np.random.default_rng(seed)
    nodes, weights, params = [], [], {}

    def weight(*dims, low=None, high=None):
        values = rng.normal(size=dims) * np.sqrt(2 / max(1, np.prod(dims[1:])))
        if low is not None:
            values = rng.uniform(low, high, dims)
        weights.append(numpy_helper.from_array(values.astype(np.float32), f"w{len(weights)}"))
        return weights[-1].name

    def node(op_type, *inputs, **attributes):
        nodes.append(helper.make_node(op_type, inputs, [f"t{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def activation(x, channels):
        lo, hi = weight(low=-1, high=0), weight(low=0.5, high=6)
        choices = {
            "Relu": lambda: node("Relu", x),
            "LeakyRelu": lambda: node("LeakyRelu", x, alpha=0.125),
            "PRelu": lambda: node("PRelu", x, weight(channels, 1, 1, low=-0.5, high=1.5)),
            "Clip": lambda: node("Clip", x, weight(low=0, high=0), hi),
            "Clip below": lambda: node("Clip", x, lo),
            "Clip above": lambda: node("Clip", x, "", hi),
            "HardSigmoid": lambda: node("Mul", node("HardSigmoid", x, alpha=0.25), x),
            "Min": lambda: node("Min", node("Relu", x), hi),
            "none": lambda: x,
        }
        return choices[rng.choice(list(choices))]()

    channels = int(rng.choice([3, 8, 12, 16, 32]))
    shape = [2, channels, 8, 8]
    x = "x"
    for _ in range(rng.integers(1, 6)):
        kind = rng.choice(["conv", "depthwise", "residual", "pool", "squeeze"])
        before = x
        if kind == "conv":
            filters = int(rng.choice([4, 8, 12, 16, 24, 32]))
            x = node("Conv", x, weight(filters, channels, 3, 3), weight(filters), pads=[1] * 4)
            channels = filters
        elif kind == "depthwise":
            x = node("Conv", x, weight(channels, 1, 3, 3), group=channels, pads=[1] * 4)
        elif kind == "residual":
            x = activation(
                node("Conv", x, weight(channels, channels, 3, 3), pads=[1] * 4), channels
            )
            x = node("Conv", x, weight(channels, channels, 1, 1))
            x = node("Add", x, before)
        elif kind == "pool":
            x = node("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4)
        else:
            pooled = node("GlobalAveragePool", x)
            hidden = activation(node("Conv", pooled, weight(8, channels, 1, 1)), 8)
            gate = node("HardSigmoid", node("Conv", hidden, weight(channels, 8, 1, 1)))
            x = node("Mul", x, gate)
        x = activation(x, channels)
    nodes.append(helper.make_node("Conv", [x, weight(4, channels, 1, 1)], ["y"]))
    graph = helper.make_graph(
        nodes,
        f"network {seed}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4, 8, 8])],
        weights,
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model, full_check=True)
    beta = rng.choice([0.5, 0.7, 0.85, 0.95])
    if seed % 3 == 0:
        steer(model, beta)
        return model, shape
    found = ctonnx.inspect(model)
    for site in found.activations if hasattr(found, "activations") else found:
        if site.status == "steerable" and rng.random() < 0.8:
            size = site.shape[1] if seed % 3 == 1 and site.shape and rng.random() < 0.7 else ()
            params[f"^{site.name}$"] = {
                "beta": rng.uniform(0.4, 1, size),
                "coeff": rng.uniform(size=size),
            }
    steer(model, beta, params=params)
    return model, shape


def test_random_networks():
    """Most are in the blocked layout, and give what the plain session gives."""
    refused = []
    for seed in range(FIRST_NETWORK, FIRST_NETWORK + NETWORKS):
        try:
            model, shape = random_network(seed)
        except ctonnx.NothingToDo:
            continue
        session, reason = opened(model)
        if session is None:
            refused.append((seed, reason))
            continue
        plain = library.open_session(model.SerializeToString(), new_options(), CPU)
        x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        expected, actual = plain.run(None, {"x": x})[0], session.run(None, {"x": x})[0]
        largest = np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * largest, err_msg=seed)
    assert len(refused) < 0.2 * NETWORKS, refused


@pytest.mark.parametrize("beta_as", ["input", "required-input"])
def test_beta_can_be_fed(beta_as):
    model = steered(beta_as=beta_as)
    results = [
        assert_same(model, fed={"beta": np.full(shape, beta, np.float32)})
        for shape, beta in itertools.product(([], [1]), (0.5, 0.9))
    ]
    assert np.array_equal(results[0], results[2])
    assert not np.array_equal(results[0], results[1])


def test_added_names_avoid_existing_ones():
    assert_same(steered(NET.replace("w3", "one"), beta_as="input"))


def test_beta_fed_per_channel_is_an_error():
    session, _ = opened(steered(beta_as="input"))
    with pytest.raises(Exception, match="Reshape"):
        session.run(None, {"x": random_x(), "beta": np.full([16, 1, 1], 0.5, np.float32)})


def test_baked_beta_can_be_overridden_in_the_options():
    model = steered()
    value = ort.OrtValue.ortvalue_from_numpy(np.array(0.5, np.float32))
    sessions = []
    for open_one in blocked.open_session, lambda path, p, o: (library.open_session(path, o, p), ""):
        options = new_options()
        options.add_initializer("beta", value)
        sessions.append(open_one(model.SerializeToString(), CPU, options)[0])
    result = assert_same(model, None, None, *sessions)
    assert not np.allclose(result, assert_same(model))


def test_per_channel_override_of_baked_beta_falls_back():
    options = new_options()
    channels = np.linspace(0, 1, 16, dtype=np.float32).reshape(16, 1, 1)
    value = ort.OrtValue.ortvalue_from_numpy(channels)
    options.add_initializer("beta", value)
    assert reason_of(steered(tail("y = Neg(r)")), options).startswith("its output 'y' differs")


def test_metadata_stay():
    model = steered()
    model.metadata_props.add(key="names", value="a, b")
    model.producer_name, model.domain, model.model_version = "me", "here", 3
    model.doc_string, model.graph.doc_string = "model", "graph"
    plain = library.open_session(model.SerializeToString(), new_options(), CPU).get_modelmeta()
    meta = opened(model)[0].get_modelmeta()
    assert meta.custom_metadata_map["names"] == "a, b"
    for field in dir(plain):
        if not field.startswith("_"):
            assert getattr(meta, field) == getattr(plain, field)


def test_external_data(tmp_path):
    path = tmp_path / "net.onnx"
    model = steered()
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="net.data")
    session, reason = blocked.open_session(path, CPU, new_options())
    assert session is not None, reason
    assert_same(steered(), blocked=session)
    reason = blocked.open_session(path.read_bytes(), CPU, new_options())[1]
    assert reason is not None


# --- refusals


def per_row():
    model = steered(tail("y = Neg(r)"))
    beta = next(tensor for tensor in model.graph.initializer if tensor.name == "beta")
    beta.CopyFrom(helper.make_tensor("beta", TensorProto.FLOAT, [8, 1], [0.85] * 8))
    return model


def fed_per_channel():
    model = steered(tail("y = Neg(r)"), beta_as="required-input")
    beta = next(value for value in model.graph.input if value.name == "beta")
    beta.CopyFrom(helper.make_tensor_value_info("beta", TensorProto.FLOAT, [16, 1, 1]))
    return model


def half():
    model = steered()
    model.graph.initializer.append(helper.make_tensor("h", TensorProto.FLOAT16, [], [1.0]))
    return model


IN_FUNCTION = f"""<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
g (float[N, 16, 8, 8] x, float[16, 16, 3, 3] w) => (float[N, 16, 8, 8] y)
{{ c = Conv {PAD} (x, w)  y = my.f(c) }}
<domain: "my", opset_import: ["" : 17]> f (X) => (Y) {{ Y = Relu(X) }}"""

REFUSED = {
    "the model holds no CTU": lambda: with_weights(NET),
    "the model holds no convolution": lambda: steered(
        f"{HEAD}) => (float[N, 16, 8, 8] y) {{ y = Relu(x) }}"
    ),
    "a CTU is inside a model-local function": lambda: steered(IN_FUNCTION),
    "the model computes in half precision": half,
    "'beta' is no scalar, and not one for each channel": per_row,
    "a parameter of 'r' is no constant, and no scalar": fed_per_channel,
    "no op is left to stand in for the CTU": lambda: steered(
        tail("s = Sigmoid(r)  t = Tanh(s)  y = Relu(t)"), selection=Selection(include="^r$")
    ),
    "ONNX Runtime lays out nothing in blocks": lambda: steered(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 16, 8] x, float[16, 16, 3] w) => (float[N, 16, 6] y)
        { c = Conv(x, w)  y = Relu(c) }"""
    ),
    "ONNX Runtime folded, merged or decomposed some stand-ins": lambda: steered(
        tail("m = Relu(w)  y = Conv <pads = [1, 1, 1, 1]> (r, m)")
    ),
    "its output 'y' NaN": lambda: steered(
        tail("n = Neg(x)  m = Mul(n, x)  l = Log(m)  y = Add(l, r)")
    ),
}


@pytest.mark.parametrize(("reason", "make"), REFUSED.items(), ids=REFUSED)
def test_refused_models(reason, make):
    assert reason_of(make()) == reason


def test_ops_that_become_a_stand_in_are_refused():
    """ONNX Runtime has no kernel for Mish and replaces it by Softplus, Tanh and Mul."""
    text = tail("y = Mish(r)").replace('"" : 17', '"" : 18')
    assert reason_of(steered(text)) == "ONNX Runtime folded, merged or decomposed some stand-ins"


def test_models_that_run_on_no_random_input_are_refused():
    text = tail("seven = Constant <value = int64[1] {7}> ()  y = Reshape(r, seven)")
    model = steered(text.replace("float[N, 16, 8, 8] y", "float[7] y"))
    assert "random input" in reason_of(model)


def test_large_models_are_refused(monkeypatch):
    monkeypatch.setattr(blocked, "_LARGEST", 1 << 10)
    assert reason_of(steered()) == "the model is larger than 0 MiB"


def test_weights_in_other_files_count_for_the_size(tmp_path):
    """The size of the file counts, unread; the model uses little of it, and the rest is sparse."""
    path, weights = tmp_path / "net.onnx", tmp_path / "net.data"
    onnx.save(steered(), path, save_as_external_data=True, size_threshold=0, location=weights.name)
    with weights.open("r+b") as file:
        file.truncate((256 << 20) + 1)
    session, reason = blocked.open_session(path, CPU, new_options())
    assert session is None
    assert reason == "the model is larger than 256 MiB"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"graph_optimization_level": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED},
            "the session options lower the optimisation level",
        ),
        (
            {"optimized_model_filepath": "optimised.onnx"},
            "the session options want the optimised model in a file",
        ),
    ],
)
def test_refused_options(change, reason):
    options = new_options()
    for name, value in change.items():
        setattr(options, name, value)
    assert reason_of(steered(), options) == reason


def test_other_providers_are_refused():
    model = steered().SerializeToString()
    providers = [("CUDAExecutionProvider", {"device_id": 0}), *CPU]
    session, reason = blocked.open_session(model, providers, new_options())
    assert session is None
    assert reason == "runs on CUDAExecutionProvider, not on the CPU alone"


# --- the comparison can fail


def test_a_bug_is_raised_and_not_taken_for_a_refusal(monkeypatch):
    """Falling back to the plain layout would hide the bug."""

    def bug(*arguments):
        raise TypeError("a bug")

    monkeypatch.setattr(blocked, "bake", bug)
    with pytest.raises(TypeError, match="a bug"):
        ctonnx.session(steered())


def relu_left(sites):
    sites[0].op_type, sites[0].domain = "Relu", ""
    del sites[0].input[1:]


def parameters_swapped(sites):
    sites[1].input[1], sites[1].input[2] = sites[1].input[2], sites[1].input[1]


def wrong_input(sites):
    sites[1].input[0] = sites[0].output[0]


@pytest.mark.parametrize("damage", [relu_left, parameters_swapped, wrong_input])
@pytest.mark.parametrize("beta_as", BETA_AS)
def test_wrong_bake_is_caught(monkeypatch, damage, beta_as):
    bake = blocked.bake

    def wrong(optimised, *args):
        count = bake(optimised, *args)
        damage([node for node in optimised.graph.node if ctu.is_ctu(node)])
        return count

    monkeypatch.setattr(blocked, "bake", wrong)
    assert reason_of(steered(beta_as=beta_as)).startswith("its output 'y' differs by")


def test_a_second_run_that_differs_is_caught(monkeypatch):
    """ONNX Runtime 1.18 goes wrong from there on, where a node is dead."""
    run, runs = blocked.Model.run, []

    def wrong(model, inputs):
        runs.append(model)
        outputs = run(model, inputs)
        # The plain session runs first.
        second = model is not runs[0] and runs.count(model) == 2
        return {name: array + second for name, array in outputs.items()}

    monkeypatch.setattr(blocked.Model, "run", wrong)
    assert reason_of(steered()).startswith("its output 'y' differs by")
    assert [runs.count(model) for model in set(runs) if model is not runs[0]] == [2]


def test_other_interface_is_caught(monkeypatch):
    bake = blocked.bake

    def wrong(optimised, *args):
        count = bake(optimised, *args)
        beta = next(tensor for tensor in optimised.graph.initializer if tensor.name == "beta")
        optimised.graph.initializer.remove(beta)
        return count

    monkeypatch.setattr(blocked, "bake", wrong)
    assert reason_of(steered(beta_as="input")) == "its inputs differ from the plain session's"


def test_lost_site_is_caught(monkeypatch):
    bake = blocked.bake

    def wrong(optimised, *args):
        for node in optimised.graph.node:
            for attribute in node.attribute:
                if attribute.name == "activation":
                    attribute.s = b"Relu"
        return bake(optimised, *args)

    monkeypatch.setattr(blocked, "bake", wrong)
    assert reason_of(steered()) == "ONNX Runtime folded, merged or decomposed some stand-ins"


# --- ctonnx.session


def test_session_is_blocked_unless_told_otherwise(monkeypatch, tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(steered(), path)
    seen = []
    open_session = blocked.open_session

    def spy(*args):
        seen.append(open_session(*args))
        return seen[-1]

    monkeypatch.setattr(blocked, "open_session", spy)
    assert ctonnx.session(path) is seen[0][0] is not None
    ctonnx.session(path, layout=False)
    assert len(seen) == 1


def test_fallback_is_silent(recwarn, caplog, capfd):
    caplog.set_level(logging.DEBUG, "ctonnx.runtime")
    model = with_weights(NET)
    session = ctonnx.session(model.SerializeToString())
    assert session.run(None, {"x": random_x()})[0].shape == (2, 4)
    assert caplog.messages == ["plain layout: the model holds no CTU"]
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_the_blocked_layout_prints_nothing(capfd):
    ctonnx.session(steered(beta_as="input", lowering="op").SerializeToString(), CPU)
    assert "nchwc" not in capfd.readouterr().err.lower()


def test_broken_models_raise_what_onnx_runtime_raises(tmp_path):
    with pytest.raises(Exception, match="missing"):
        ctonnx.session(tmp_path / "missing.onnx")


def test_options_and_disk_are_left_as_they_were(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fields = [
        "graph_optimization_level",
        "optimized_model_filepath",
        "log_severity_level",
        "enable_profiling",
    ]
    for model in steered(), steered(tail("y = Neg(r)")), with_weights(NET):
        options = ort.SessionOptions()
        before = [getattr(options, field) for field in fields]
        ctonnx.session(model.SerializeToString(), CPU, options)
        assert [getattr(options, field) for field in fields] == before
    assert not list(tmp_path.iterdir())


def test_one_profile_is_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = ort.SessionOptions()
    options.enable_profiling = True
    session = ctonnx.session(steered().SerializeToString(), CPU, options)
    session.end_profiling()
    assert len(list(tmp_path.iterdir())) == 1


def test_threads_may_share_options():
    model = steered().SerializeToString()
    options = new_options()
    sessions = []

    def make(blocked):
        sessions.append(ctonnx.session(model, CPU, options, layout=blocked))

    threads = [threading.Thread(target=make, args=[i % 2 == 0]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = [session.run(None, {"x": random_x()})[0] for session in sessions]
    assert len(results) == 8
    for result in results:
        np.testing.assert_allclose(result, results[0], rtol=0, atol=1e-6)
