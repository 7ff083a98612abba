"""The PyTorch side: the unit's values and gradients, and every way to steer a model."""

import copy
import io
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctonnx
from ctonnx import ctu as oracle
from ctonnx.rewriting import params
from ctonnx.torch import CTU, restore, steer, trainable

# Warnings of torch.jit, which PyTorch deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:While compiling:UserWarning"
)

BETAS = (0.0, 1e-4, 0.05, 0.3, 0.5, 0.85, 0.999, 1.0)
COEFFS = (0.0, 0.37, 0.5, 1.0)


def unit(x, beta, coeff=0.5, slope=None, lower=None, upper=None):
    beta, coeff = (torch.as_tensor(value, dtype=torch.float32) for value in (beta, coeff))
    return torch.ops.ctonnx.ctu(x, beta, coeff, slope, lower, upper)


# --- the unit


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 4e-15), (torch.float32, 5e-7)], ids=str
)
@pytest.mark.parametrize("slope", [None, 0.0, 0.25, 1.0, 1.5])
def test_values_are_those_of_the_oracle(dtype, bound, slope):
    """In float32 PyTorch's own functions allow twice the error that the kernels may have."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=999), rng.uniform(-1e4, 1e4, 999), [0.0, -0.0]])
    x = torch.from_numpy(x).to(dtype)
    slope_tensor = None if slope is None else torch.tensor(slope, dtype=dtype)
    for beta in map(np.float32, BETAS):
        for coeff in map(np.float32, COEFFS):
            want = oracle.ctu(x.numpy(), beta, coeff, slope or 0.0)
            got = unit(x, beta, coeff, slope_tensor).double().numpy()
            assert (abs(got - want) <= bound * np.maximum(1.0, abs(want))).all(), (beta, coeff)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    x = torch.linspace(-9, 9, 999).to(dtype)
    assert torch.equal(unit(x, 0.85), unit(x.float(), 0.85).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unit(x, 0.85), unit(x.float(), 0.85).to(dtype))


@pytest.mark.parametrize("beta", BETAS)
def test_special_values(beta):
    far = 3e38 if beta else 1e15  # At beta 0 the gradient of beta grows like x * x.
    x = torch.tensor([np.inf, -np.inf, far, -far], requires_grad=True)
    b = torch.tensor(beta, requires_grad=True)
    y = torch.ops.ctonnx.ctu(x, b, torch.tensor(0.5))
    assert y[:2].tolist() == [np.inf, 0]
    y.sum().backward()
    assert torch.isfinite(b.grad)
    assert x.grad.tolist() == [
        1,
        0,
        *(pytest.approx(v) for v in ([1, 0] if beta else [0.75, 0.25])),
    ]
    assert unit(x, beta, slope=torch.tensor(0.1))[1] == -np.inf
    assert unit(x, beta, slope=torch.tensor(0.0))[1] == 0
    assert unit(x, beta, lower=0.0, upper=6.0)[:2].tolist() == [6, 0]
    for kinks in {}, {"slope": torch.tensor(0.1)}, {"lower": 0.0, "upper": 6.0}:
        assert torch.isnan(unit(torch.tensor(np.nan), beta, **kinks))


@pytest.mark.parametrize("beta", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("slope", [None, 0.0, 0.25, 1.5])
def test_gradients(beta, slope):
    """Gradients of x, beta, c and slope, at the kink as well."""
    x = torch.tensor([-3.0, -0.2, 0.0, 0.01, 2.0], dtype=torch.float64, requires_grad=True)
    values = [torch.full((5,), v, dtype=torch.float64, requires_grad=True) for v in (beta, 0.4)]
    if slope is not None:
        values.append(torch.full((5,), slope, dtype=torch.float64, requires_grad=True))
    # The second derivative at the kink grows like 1 / s.
    options = {"eps": 1e-7, "atol": 1e-5 / (1 - beta)}
    assert torch.autograd.gradcheck(torch.ops.ctonnx.ctu, (x, *values), **options)


def test_gradients_of_bounds():
    x = torch.tensor([-2.0, -1.0, 0.3, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    pair = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.4)]
    for bounds in ((-1.0, 2.0), (-1.0, None), (None, 2.0)):

        def bounded(*inputs, bounds=bounds):
            return torch.ops.ctonnx.ctu(*inputs, None, *bounds)

        assert torch.autograd.gradcheck(bounded, (x, *pair), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_at_zero_is_that_of_the_smooth_function(beta):
    """It is half, or the mean of both slopes, and not 0 or 1, as that of ReLU itself."""
    x = torch.zeros(1, requires_grad=True)
    unit(x, beta).backward()
    assert x.grad == 0.5
    x.grad = None
    unit(x, beta, slope=torch.tensor(0.2)).backward()
    assert x.grad == pytest.approx(0.6)


def test_at_beta_one_values_and_gradients_are_those_of_relu():
    x = torch.tensor([-1e4, -1.0, -1e-3, 1e-3, 1.0, 1e4], requires_grad=True)
    y = unit(x, 1.0)
    y.sum().backward()
    assert torch.equal(y, F.relu(x))
    assert x.grad.tolist() == [0, 0, 0, 1, 1, 1]


def test_formula_is_what_is_compared():
    """The bound of the first test tells the formula from that of a slightly different beta."""
    x = torch.linspace(-3, 3, 99, dtype=torch.float64)
    want = oracle.ctu(x.numpy(), np.float32(0.85), np.float32(0.5))
    assert abs(unit(x, 0.8500001).numpy() - want).max() > 1e-9


# --- the module


KINKS = [{}, {"slope": 0.1}, {"slope": nn.Parameter(torch.rand(4))}, {"lower": -1.0, "upper": 2.0}]


class Side(nn.ModuleList):
    """Modules side by side, so that one compilation covers all of them."""

    def forward(self, x):
        return torch.stack([module(x) for module in self])


@pytest.mark.parametrize("fit", [False, True], ids=["fixed", "trainable"])
def test_modules_script_compile_and_export(fit):
    beta = torch.tensor([0.3, 0.5, 0.7, 0.9])
    model = Side(CTU(beta, 0.4, trainable=fit, **kinks) for kinks in KINKS)
    x = torch.randn(3, 4, 5, 5)
    want = model(x)
    for module, y in zip(model, want, strict=True):
        assert torch.equal(torch.jit.script(module)(x), y)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), want)
    if fit:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want)
        compiled(x).sum().backward()
        assert all(module._raw_beta.grad.abs().min() > 0 for module in model)


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4), (2, 4, 3, 5), (2, 4, 3, 5, 2)], ids=str)
def test_channels(shape):
    """Channels are the last dim of 2-D and 3-D inputs, dim 1 of others, as in the authors' code."""
    beta, x = torch.tensor([0.2, 0.5, 0.8, 1.0]), torch.randn(shape)
    last = x.movedim(1, -1) if len(shape) > 3 else x
    want = torch.stack([unit(last[..., i], b, 0.3) for i, b in enumerate(beta)], -1)
    want = want.movedim(-1, 1) if len(shape) > 3 else want
    torch.testing.assert_close(CTU(beta, 0.3)(x), want, rtol=0, atol=1e-6)


def test_the_state_dict_keeps_the_authors_parameters():
    module = CTU(0.8, 0.25, trainable=True)
    assert sorted(module.state_dict()) == ["_raw_beta", "_raw_coeff"]
    assert module._raw_beta.item() == pytest.approx(np.log(4), rel=1e-6)
    assert (module.beta.item(), module.coeff.item()) == pytest.approx((0.8, 0.25))
    fixed = CTU(0.7)
    fixed.load_state_dict(CTU(0.9, 0.1).state_dict())
    assert (fixed.beta.item(), fixed.coeff.item()) == pytest.approx((0.9, 0.1))
    assert not list(fixed.parameters())
    assert "beta=0.9, coeff=0.1" in repr(fixed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CTU(1.1), "beta must lie in [0, 1]"),
        (lambda: CTU([0.5, float("nan")]), "beta must lie in [0, 1]"),
        (lambda: CTU(coeff="half"), "coeff must be made of numbers, got 'half'"),
        (lambda: CTU(lower=2.0, upper=1.0), "leave no room"),
        (lambda: CTU(slope=0.1, upper=1.0), "slope and bounds do not go together"),
        (lambda: CTU(slope=torch.zeros(2)), "slope must be a number or an nn.Parameter"),
        (lambda: steer(nn.DataParallel(nn.ReLU()), 0.8), "take its `module`"),
        (lambda: steer(nn.ReLU(), 2.0), "beta must lie in [0, 1]"),
        (lambda: steer(torch.relu, 0.8), "expected an nn.Module"),
        (lambda: steer(torch.jit.script(nn.ReLU()), 0.8), "is compiled: steer it before"),
        (lambda: steer(torch.compile(nn.ReLU()), 0.8), "is compiled: steer it before"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(ctonnx.UsageError) as caught:
        make()
    assert message in str(caught.value)


# --- steering


class Calls(nn.Module):
    """A model that runs `call` between two affine maps."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(2 * x - 0.5) * 3


@torch.jit.script
def scripted(x):
    return torch.relu(x)


SHARED = nn.Parameter(torch.tensor([0.3, 0.1, 0.2]))

# Spelling -> the call, and the slope, lower and upper of the unit that takes its place.
SPELLINGS = {
    "nn.ReLU": (nn.ReLU(), {}),
    "nn.ReLU in place": (nn.ReLU(inplace=True), {}),
    "nn.ReLU6": (nn.ReLU6(), {"lower": 0.0, "upper": 6.0}),
    "nn.LeakyReLU": (nn.LeakyReLU(0.2), {"slope": 0.2}),
    "nn.PReLU": (nn.PReLU(1, 0.3), {"slope": 0.3}),
    "nn.Hardtanh": (nn.Hardtanh(-2.0, 0.5), {"lower": -2.0, "upper": 0.5}),
    "nn.RReLU": (nn.RReLU(0.1, 0.3).eval(), {"slope": 0.2}),
    "F.relu": (F.relu, {}),
    "F.relu_": (F.relu_, {}),
    "F.relu in place": (lambda x: F.relu(x, True), {}),
    "torch.relu": (torch.relu, {}),
    "torch.relu_": (torch.relu_, {}),
    "x.relu": (lambda x: x.relu(), {}),
    "x.relu_": (lambda x: x.relu_(), {}),
    "F.leaky_relu": (lambda x: F.leaky_relu(x, negative_slope=0.2), {"slope": 0.2}),
    "F.leaky_relu_": (lambda x: F.leaky_relu_(x, 0.2), {"slope": 0.2}),
    "F.prelu": (lambda x: F.prelu(x, torch.tensor([0.3])), {"slope": 0.3}),
    "x.prelu": (lambda x: x.prelu(torch.tensor(0.3)), {"slope": 0.3}),
    "prelu per channel": (lambda x: F.prelu(x, SHARED), {"slope": SHARED.detach()[:, None]}),
    "F.relu6": (lambda x: F.relu6(x, inplace=True), {"lower": 0.0, "upper": 6.0}),
    "F.hardtanh": (F.hardtanh, {"lower": -1.0, "upper": 1.0}),
    "F.hardtanh_": (lambda x: F.hardtanh_(x, -1.0, 2.0), {"lower": -1.0, "upper": 2.0}),
    "x.clamp": (lambda x: x.clamp(min=0), {}),
    "x.clamp_": (lambda x: x.clamp_(0), {}),
    "torch.clamp": (lambda x: torch.clamp(x, -1, max=0.5), {"lower": -1.0, "upper": 0.5}),
    "torch.clamp max": (lambda x: torch.clamp(input=x, max=1.0), {"upper": 1.0}),
    "torch.clip": (lambda x: torch.clip(x, min=0), {}),
    "x.clip_": (lambda x: x.clip_(-1, 1), {"lower": -1.0, "upper": 1.0}),
    "x.clamp NumPy": (lambda x: x.clamp(max=np.float32(0.5)), {"upper": 0.5}),
    "x.clamp_min": (lambda x: x.clamp_min(-0.5), {"lower": -0.5}),
    "torch.clamp_max_": (lambda x: torch.clamp_max_(x, 0.5), {"upper": 0.5}),
    "F.threshold": (lambda x: F.threshold(x, -0.5, -0.5), {"lower": -0.5}),
    "nn.Threshold": (nn.Threshold(0, 0, inplace=True), {}),
    "aten.relu": (torch.ops.aten.relu, {}),
    "aten.relu.default": (lambda x: torch.ops.aten.relu.default(self=x), {}),
    "aten.relu_": (torch.ops.aten.relu_.default, {}),
    "aten.hardtanh": (torch.ops.aten.hardtanh.default, {"lower": -1.0, "upper": 1.0}),
    "aten.clamp": (lambda x: torch.ops.aten.clamp.default(x, None, 1.0), {"upper": 1.0}),
    "torch.jit.script": (scripted, {}),
    "torch.jit.trace": (torch.jit.trace(F.relu6, torch.ones(3)), {"lower": 0.0, "upper": 6.0}),
    "torch.clamp out": (lambda x: torch.clamp(x, min=0, out=torch.empty_like(x)), {}),
}


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_every_spelling_is_steered_and_undone(spelled):
    call, kinks = SPELLINGS[spelled]
    model, x = Calls(call).eval(), torch.randn(2, 3, 7)
    with torch.no_grad():
        plain = model(x)
        with steer(model, 0.6, 0.3):
            steered = model(x)
        slope = kinks.get("slope")
        if slope is not None:
            slope = torch.as_tensor(slope)
        bounds = kinks.get("lower"), kinks.get("upper")
        want = 3 * unit(2 * x - 0.5, 0.6, 0.3, slope, *bounds)
        torch.testing.assert_close(steered, want, rtol=0, atol=1e-6)
        assert not torch.allclose(steered, plain, atol=1e-2)
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.threshold(x, 0.0, 0.5),
        lambda x: x.clamp(min=torch.tensor(0.0)),
        lambda x: x.clamp(min=1e-6),
        lambda x: x.clamp(1.0, 1.0),
        lambda x: F.rrelu(x, 0.2, 0.2, training=True),
        lambda x: x.to(torch.int64).clamp(min=0).float(),
        lambda x: x.to(torch.int64).relu().float(),
        F.gelu,
        torch.sigmoid,
        torch.abs,
    ],
)
def test_what_patch_leaves_alone_is_left_alone(call):
    model, x = Calls(call), torch.randn(2, 3, 7)
    plain = model(x)
    with steer(model, 0.6):
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize(
    ("call", "bounds"),
    [
        (lambda x: x.relu_(), ()),
        (torch.relu_, ()),
        (lambda x: F.relu(x, inplace=True), ()),
        (nn.ReLU(inplace=True), ()),
        (lambda x: F.hardtanh(x, -1.0, 0.5, inplace=True), (-1.0, 0.5)),
        (lambda x: x.clamp_(min=0.0), ()),
    ],
)
def test_in_place_calls_change_their_input_and_keep_gradients_right(call, bounds):
    def discarding(x):
        before = x
        assert call(x) is before
        return before

    x = torch.randn(4, 5, requires_grad=True)
    model = Calls(discarding)
    with steer(model, 0.6):
        model(x).sum().backward()
    got, x.grad = x.grad, None
    (3 * unit(2 * x - 0.5, 0.6, 0.5, None, *bounds)).sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_what_ends_steering():
    model, x = nn.Sequential(nn.ReLU()), torch.zeros(1)
    handle = steer(model, 0.6)
    assert isinstance(model, nn.Sequential)
    assert model(x) > 0
    for part in (model, nn.Sequential(model)):
        with pytest.raises(ctonnx.UsageError, match="already steered"):
            steer(part, 0.7)
    handle.remove()
    handle.remove()
    assert (type(model), model(x).item()) == (nn.Sequential, 0)
    with pytest.raises(RuntimeError, match="body"), steer(model, 0.6):
        raise RuntimeError("body")
    assert model(x) == 0
    failing = Calls(lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError), steer(failing, 0.6):
        failing(x)
    assert torch.relu(x) == 0  # The exception ended the mode.


def test_steering_follows_the_model():
    """Copies, threads, replicas, tracing and export compute the same as the model."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    with steer(model, 0.6):
        want = model(x)
        assert torch.equal(copy.deepcopy(model)(x), want)
        assert torch.equal(torch.jit.trace(model, (x,))(x), want)
        for strict in (False, True):
            program = torch.export.export(model, (x,), strict=strict)
            torch.testing.assert_close(program.module()(x), want)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), want)
        weights = dict(model.named_parameters())
        assert torch.equal(torch.func.functional_call(model, weights, (x,)), want)
        assert isinstance(model._replicate_for_data_parallel(), type(model))
        outputs = []
        threads = [threading.Thread(target=lambda: outputs.append(model(x))) for _ in range(4)]
        for thread in threads:
            thread.start()
        plain = F.relu(model[0](x))  # Outside the model's call: not steered.
        for thread in threads:
            thread.join()
        assert all(torch.equal(y, want) for y in outputs)
        assert not torch.equal(plain, want)
        with pytest.raises(ctonnx.UsageError, match=r"torch\.jit\.trace"):
            torch.jit.script(model)


def test_exported_programs_and_graphs_are_steered_like_their_model(tmp_path):
    model, x = (
        Calls(nn.Sequential(nn.ReLU(), nn.PReLU(), nn.Hardsigmoid())).eval(),
        torch.randn(2, 3),
    )
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    with steer(model, 0.6, 0.3):
        want = model(x)
    plain = model(x)
    for graph in (torch.export.load(path).module(), torch.fx.symbolic_trace(model)):
        handle = steer(graph, 0.6, 0.3)
        torch.testing.assert_close(graph(x), want)
        assert (sum(handle.steered.values()), handle.left) == (3, {})
        # What changes or copies a graph writes a class of its own.
        for copied in (copy.deepcopy(graph), copy.deepcopy(nn.Sequential(graph)), graph):
            torch.testing.assert_close(copied(x), want)
        graph.recompile()
        torch.testing.assert_close(graph(x), want)
        torch.testing.assert_close(torch.export.export(graph, (x,)).module()(x), want)
        handle.remove()
        torch.testing.assert_close(graph(x), plain)


def test_the_fx_graph_of_a_steered_model_is_steered():
    class Spelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.ReLU6())

        def forward(self, x):
            return F.relu(self.parts(x).clamp(min=-0.5)) - torch.relu(input=x).clamp_(max=1)

    model, x = Spelled().eval(), torch.randn(3, 4)
    with steer(model, 0.6, 0.3):
        graph, want = torch.fx.symbolic_trace(model), model(x)
    assert torch.equal(graph(x), want)
    assert not torch.equal(graph(x), model(x))
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    hiding = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8))
    with (
        steer(hiding, 0.6),
        pytest.raises(ctonnx.UsageError, match="cannot trace 0, a Transformer"),
    ):
        torch.fx.symbolic_trace(hiding)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_recurrent_networks_are_steered(bidirectional, bias):
    """At beta 1 as PyTorch computes them, and with a smaller one as by hand."""
    torch.manual_seed(0)
    model = nn.RNN(4, 3, 2, "relu", bias, bidirectional=bidirectional).double().eval()
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    packed = nn.utils.rnn.pack_sequence([x[:n, i] for i, n in enumerate((5, 3, 3, 1))])
    for example in (x, x[:, 0], packed):
        plain = model(example)
        with steer(model, 1.0):
            torch.testing.assert_close(model(example), plain, rtol=0, atol=1e-5)
        with steer(model, 0.6):
            assert not torch.allclose(model(example)[1], plain[1], atol=1e-2)
    swapped = copy.deepcopy(model)
    swapped.batch_first = True
    with steer(model, 0.6), steer(swapped, 0.6):
        torch.testing.assert_close(swapped(x.transpose(0, 1))[0].transpose(0, 1), model(x)[0])
    one, cell = nn.RNN(4, 3, nonlinearity="relu"), nn.RNNCell(4, 3, nonlinearity="relu")
    for name, weight in cell.named_parameters():
        weight.data = getattr(one, f"{name}_l0").data
    with steer(one, 0.6), steer(cell, 0.6) as handle:
        first, second = one(x[:2].float())[0]
        by_hand = unit(cell_sum(cell, x[0].float(), torch.zeros(4, 3)), 0.6)
        torch.testing.assert_close(first, by_hand)
        torch.testing.assert_close(cell(x[1].float(), first), second)
    assert handle.steered == {"torch.rnn_relu_cell": 1}


def cell_sum(cell, x, state):
    return F.linear(x, cell.weight_ih, cell.bias_ih) + F.linear(state, cell.weight_hh, cell.bias_hh)


def test_int8_modules_are_steered_in_their_range():
    """Of fused modules and of activations on quantized tensors: as in float, but rounded."""
    import torch.ao.quantization as quantization

    def network(act):
        return nn.Sequential(
            quantization.QuantStub(),
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 4, 3), act),
            nn.Flatten(),
            nn.Sequential(nn.Linear(64, 5), nn.ReLU()),
            quantization.DeQuantStub(),
        )

    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    # Quantized, Hardsigmoid cannot leave [0, 1].
    for act, bound in ((nn.ReLU6(), 4), (nn.Hardsigmoid(), 14), (nn.LeakyReLU(0.2), 4)):
        model = network(act).eval()
        model.qconfig = quantization.get_default_qconfig("fbgemm")
        with steer(model, 0.6):
            want = model(x)
        plain = model(x)
        quantization.fuse_modules(model, [["1.0", "1.1"], ["4.0", "4.1"]], inplace=True)
        quantization.prepare(model, inplace=True)
        with steer(model, 0.6):
            model(x)  # The ranges are those of the steered model.
        quantization.convert(model, inplace=True)
        with steer(model, 0.6) as handle:
            got = model(x)
        assert (sum(handle.steered.values()), handle.left) == (3, {})
        step = model[4][0].scale
        error = (got - want.clamp(min=0)).abs().max() / step
        assert error < bound
        assert (plain - want).abs().max() / step > 20


def half(x):
    return (torch.relu(x - 0.1) + torch.relu(x) + x.clamp(0.0, 6.0)) / 2


def test_what_steering_does_not_reach_is_named_once():
    scripted_only = torch.jit.script(half)
    del scripted_only._torchdynamo_inline
    model, x = Calls(lambda x: scripted_only(x.relu())), torch.randn(2, 3)
    with steer(model, 0.6) as handle:
        with pytest.warns(UserWarning, match=r"steer left .*: aten.relu \(2 times\), aten.clamp$"):
            model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
    assert handle.steered == {"Tensor.relu": 2}
    assert handle.left == {"aten.relu": 2, "aten.clamp": 1}


def test_fused_inference_of_transformers_is_steered_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True)
    model, x = (
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval(),
        torch.randn(2, 5, 8),
    )
    want = {}
    with steer(model, 0.5):
        want["steered"] = model(x)
    unit_model = trainable(copy.deepcopy(model), x)
    want["trainable"] = unit_model(x)
    with torch.no_grad():
        plain = model(x)
        with steer(model, 0.5):
            torch.testing.assert_close(model(x), want["steered"])
        torch.testing.assert_close(unit_model(x), want["trainable"])
    assert not torch.allclose(plain, want["steered"], atol=1e-3)
    assert not torch.allclose(plain, want["trainable"], atol=1e-3)


# --- T-CT


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 6, 3), nn.ReLU()
        self.head = nn.Sequential(nn.Linear(6, 5), nn.PReLU(5), nn.LeakyReLU(0.2), nn.ReLU6())
        self.alias = self.act

    def forward(self, x):
        return self.head(self.alias(self.act(self.conv(x)) - 0.1).mean((2, 3)))


def test_trainable_gives_each_module_a_pair_per_channel():
    original, x = Several(), torch.randn(2, 3, 8, 8)
    model = trainable(copy.deepcopy(original).train(), x)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if "_raw_beta" in k}
    assert shapes == {
        "act._raw_beta": (1, 6, 1, 1),
        "alias._raw_beta": (1, 6, 1, 1),
        **{f"head.{i}._raw_beta": (1, 5) for i in (1, 2, 3)},
    }
    assert model.act is model.alias
    assert model.training
    assert model.act.training
    assert torch.equal(model.act._raw_beta, torch.full((1, 6, 1, 1), 1.386))
    assert torch.equal(model.act._raw_coeff, torch.zeros(1, 6, 1, 1))
    assert torch.equal(model.head[1].weight, original.head[1].weight)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # It computes the same as steering with that pair.
    with steer(original.eval(), torch.sigmoid(torch.tensor(1.386)).item()):
        torch.testing.assert_close(model.eval()(x), original(x), rtol=0, atol=1e-6)


def test_modules_called_by_keyword_are_trainable():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(input=x)

    x = torch.randn(2, 3)
    model = trainable(Keyword(), x)
    assert model.act._raw_beta.shape == (1, 3)
    torch.testing.assert_close(model(x), unit(x, torch.sigmoid(torch.tensor(1.386))))


def test_training_moves_the_pairs_and_restore_brings_them_back():
    torch.manual_seed(0)
    x, target = torch.randn(16, 3, 8, 8), torch.randn(16, 5)
    model = trainable(Several(), x)
    pairs = [p for name, p in model.named_parameters() if "_raw_" in name]
    optimizer = torch.optim.Adam(pairs, lr=0.1)
    losses = []
    for _ in range(10):
        losses.append(F.mse_loss(model(x), target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert len(set(model.act.beta.flatten().tolist())) == 6
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again = restore(Several(), torch.load(buffer, weights_only=True))
    assert torch.equal(again(x), model(x))
    again = trainable(Several(), x)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_a_state_dict_of_the_papers_code_means_what_it_means_there():
    """Parameters have the input's rank. The paper's formula does not overflow for these values."""
    model, x = (
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()).double(),
        torch.randn(2, 3, 8, 8).double(),
    )
    raw_beta, raw_coeff = torch.randn(2, 1, 6, 1, 1, dtype=torch.float64)
    y, b, c = model[0](x), torch.sigmoid(raw_beta), torch.sigmoid(raw_coeff)
    want = c * torch.sigmoid(b * y / (1 - b)) * y + (1 - c) * F.softplus(y / (1 - b)) * (1 - b)
    state = {**model.state_dict(), "1._raw_beta": raw_beta, "1._raw_coeff": raw_coeff}
    got = restore(model, state)(x)
    # The paper's formula has no epsilon, and parameters are float32 here.
    assert abs(got - want).max() < 1e-5
    assert abs(got - F.relu(y)).max() > 1e-2


def test_trainable_tells_what_it_cannot_do():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(3, 4), nn.Linear(4, 5), nn.ReLU()

        def forward(self, x):
            return self.relu(self.b(self.relu(self.a(x))))

    x = torch.randn(2, 3)
    model = Twice()
    with pytest.raises(ctonnx.UsageError, match="relu is used with 4 and with 5 channels"):
        trainable(model, x)
    assert type(model.relu) is nn.ReLU
    assert not model.relu._forward_pre_hooks
    with pytest.raises(ctonnx.UsageError, match="no activation module"):
        trainable(Calls(F.relu), x)
    with pytest.raises(ctonnx.UsageError, match="the model: T-CT knows inputs of 2 to 4"):
        trainable(nn.ReLU(), torch.zeros(3))
    mixed = nn.Sequential(nn.ReLU(), Calls(F.relu), Calls(torch.Tensor.relu))
    with pytest.warns(UserWarning, match="2 activations that are function calls, and 0 modules"):
        trainable(mixed, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainable(nn.Sequential(nn.ReLU(inplace=True)), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s | dict.fromkeys(("conv._raw_beta", "conv._raw_coeff"), torch.zeros(1)),
            "'conv', which is no activation of the model",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "act._raw_coeff"},
            "the checkpoint's pair for 'act' is incomplete",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "conv.bias"}, "Missing key(s)"),
        (lambda s: s | {"head.0.weight": torch.zeros(7, 6)}, "size mismatch for head.0.weight"),
        (lambda s: s | {"more": torch.zeros(1)}, "Unexpected key(s)"),
    ],
)
def test_restore_refuses_what_does_not_fit(change, message):
    state = trainable(Several(), torch.randn(2, 3, 8, 8)).state_dict()
    with pytest.raises(ctonnx.UsageError) as caught:
        restore(Several(), change(dict(state)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checkpoint_files(tmp_path):
    path = tmp_path / "t.pth"
    model = trainable(Several(), torch.randn(2, 3, 8, 8))
    for state in (model.state_dict(), {"state_dict": model.state_dict(), "epoch": 3}):
        torch.save(state, path)
        loaded = params.read(path)
        assert sorted(loaded) == ["act", "alias", "head.1", "head.2", "head.3"]
        np.testing.assert_array_equal(loaded["act"]["beta"], model.act.beta.detach())
    for content, error in (
        (model, ctonnx.InputFileError),  # A module is a pickle with code.
        ([1, 2], ctonnx.InputFileError),
        (Several().state_dict(), ctonnx.UsageError),
        ({"act._raw_beta": torch.zeros(3)}, ctonnx.UsageError),
    ):
        torch.save(content, path)
        with pytest.raises(error):
            params.read(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ctonnx.InputFileError, match="cannot be read as weights alone"):
        params.read(path)
    with pytest.raises(ctonnx.InputFileError, match="no such file"):
        params.read(tmp_path / "none.pth")
