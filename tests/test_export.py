"""From PyTorch to ONNX: on every way there, the file computes the same as PyTorch."""

import copy
import functools
import io
import sys
import types

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

import ctonnx
from ctonnx import ctu
from ctonnx.rewriting import params, weights
from ctonnx.rewriting.checkpoint import pairs, weight_arrays
from ctonnx.rewriting.steer import steer as steer_onnx
from ctonnx.rewriting.steered import SteeredModel
from ctonnx.torch import CTU, by_name, export, restore, steer, trainable
from ctonnx.torch.exporting import run_exporter

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*legacy TorchScript:DeprecationWarning",
    "ignore:.*isinstance.treespec:FutureWarning",
    "ignore:The feature will be removed:DeprecationWarning",
)


class Block(nn.Module):
    """A block of ResNet-18, which has one module for both ReLUs."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential()
        if stride != 1:
            self.down = nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.down(x))


class ResNet(nn.Module):
    example = (2, 3, 16, 16)

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(8, 8, 1))
        self.layer2 = nn.Sequential(Block(8, 12, 2))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


class MLP(nn.Sequential):
    """All kinds of activation modules."""

    example = (7, 6)

    def __init__(self):
        kinds = [nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(9), nn.ReLU6(), nn.Hardtanh(-0.5, 0.5)]
        super().__init__(
            nn.Linear(6, 9), *(m for act in kinds for m in (act, nn.Linear(9, 9))), nn.PReLU()
        )


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(torch.softmax(q @ k.transpose(1, 2) / 3, -1) @ v)
        return x + self.down(self.act(self.up(self.norm2(x))))


class Transformer(nn.Module):
    example = (2, 5, 8)

    def __init__(self):
        super().__init__()
        self.block, self.head = Attention(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x))


class UNet(nn.Module):
    """Some of its ReLUs are function calls, which T-CT does not reach."""

    example = (2, 1, 8, 8)

    def __init__(self):
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.LeakyReLU(0.1))
        self.up, self.merge = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = torch.cat([a, self.up(b).relu_()], 1)
        return self.out(F.relu(self.merge(y))).clamp(max=1.0)


PARTS = (ResNet, MLP, Transformer, UNet)


class All(nn.Module):
    """Four networks in one, as an export takes a second whatever its size."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(part() for part in PARTS)

    def forward(self, a, b, c, d):
        return tuple(part(x) for part, x in zip(self.parts, (a, b, c, d), strict=True))


def example():
    """The model, always the same, in eval mode, and its inputs."""
    torch.manual_seed(0)
    model = All()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval(), tuple(torch.randn(part.example) for part in PARTS)


@functools.cache
def plain(dynamo):
    """The bytes of the model as PyTorch exports it."""
    model, x = example()
    if dynamo:
        return torch.onnx.export(model, x, verbose=False).model_proto.SerializeToString()
    buffer = io.BytesIO()
    torch.onnx.export(model, x, buffer, dynamo=False)
    return buffer.getvalue()


@functools.cache
def tuned():
    """The T-CT version of the model: random pairs for each channel, trained for a few steps."""
    model, x = example()
    with pytest.warns(UserWarning, match="3 activations that are function calls"):
        model = trainable(model, x)
    fitted = [p for key, p in model.named_parameters() if "_raw_" in key]
    for parameter in fitted:
        nn.init.normal_(parameter, std=2)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(fitted, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(y.square().mean() for y in model(*x)).backward()
        optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert moved == {key for key in before if "_raw_" in key}
    return model


def runs(proto, x):
    """The outputs of ONNX Runtime with the op library, then without it."""
    data = proto.SerializeToString()
    names = [value.name for value in proto.graph.input]
    feeds = {name: value.numpy() for name, value in zip(names, x, strict=True)}
    for session in (ctonnx.session(data), ort.InferenceSession(data)):
        yield session.run(None, feeds)


def furthest(proto, x, want):
    """For each output the largest difference between the file and PyTorch."""
    onnx.checker.check_model(proto, full_check=True)
    worst = np.zeros(len(want))
    for got in runs(proto, x):
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            assert one.shape == other.shape
            assert np.isfinite(one).all()
            worst[i] = max(worst[i], abs(one - other.detach().numpy()).max())
    return worst


# Threads slow down the work on tensors this small.
torch.set_num_threads(1)

both = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])


@both
def test_a_steered_model_is_what_is_exported(dynamo):
    model, x = example()
    original = model(*x)
    options = {}
    if dynamo:
        options["dynamic_shapes"] = [None, None, None, {0: torch.export.Dim("batch")}]
        options |= {"input_names": list("pqrs"), "opset_version": 18}
    with steer(model, 0.7, 0.4):
        want = model(*x)
        proto = export(model, x, dynamo=dynamo, **options)
        assert furthest(proto, x, want).max() < 1e-5
        if dynamo:  # The exporter's options take effect.
            more = (*x[:3], torch.randn(5, *UNet.example[1:]))
            assert furthest(proto, more, model(*more)).max() < 1e-5
            assert [value.name for value in proto.graph.input] == list("pqrs")
    # Steering changes each output by far more than that.
    assert furthest(proto, x, original).min() > 1e-2
    patched = ctonnx.patch(onnx.load_from_string(plain(dynamo)), 0.7, 0.4)
    assert furthest(patched, x, want).max() < 1e-5
    # `patch` steers the same activations.
    ops, others = (sorted(a.op for a in ctonnx.inspect(m)) for m in (proto, patched))
    assert ops == others
    assert [t.name for t in proto.graph.initializer].count("beta") == 1
    # It can be changed and undone like any other.
    with steer(model, 0.9, 0.4):
        SteeredModel(proto).set(0.9)
        assert furthest(proto, x, model(*x)).max() < 1e-5
    back = ctonnx.unpatch(proto)
    assert not any(map(ctu.is_ctu, back.graph.node))
    assert furthest(back, x, original).max() < 1e-5


@both
def test_trained_pairs_are_what_is_exported_and_what_a_checkpoint_brings(dynamo, tmp_path):
    model, x = tuned(), example()[1]
    want = model(*x)
    proto = export(model, x, dynamo=dynamo)
    assert furthest(proto, x, want).max() < 1e-5
    assert furthest(proto, x, example()[0](*x)).min() > 1e-2
    # The file has neither the raw pairs nor the nodes that compute the pairs.
    assert not any("_raw_" in tensor.name for tensor in proto.graph.initializer)
    assert not any(node.op_type == "Sigmoid" for node in proto.graph.node)

    torch.save(model.state_dict(), tmp_path / "t.pth")
    (tmp_path / "m.onnx").write_bytes(plain(dynamo))
    written = ctonnx.patch(tmp_path / "m.onnx", params=tmp_path / "t.pth")
    assert furthest(onnx.load(written), x, want).max() < 1e-5
    again = restore(example()[0], torch.load(tmp_path / "t.pth", weights_only=True))
    assert all(map(torch.equal, again(*x), want))

    # If one channel of one module differs, the comparison sees it in that network's output alone.
    trained = params.read(tmp_path / "t.pth")
    beta = trained["parts.0.layer2.0.relu"]["beta"]
    beta[0, 3] = 1 - beta[0, 3].round()
    moved = ctonnx.patch(onnx.load_from_string(plain(dynamo)), params=trained)
    worst = furthest(moved, x, want)
    assert worst[0] > 1e-4
    assert worst[1:].max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "dynamo"),
    [
        (torch.float64, False),
        (torch.float16, False),
        (torch.float16, True),
        (torch.bfloat16, False),
    ],
    ids=str,
)
def test_element_types(dtype, dynamo):
    """In bfloat16, which ONNX Runtime takes no inputs of, the file is only checked."""
    units = [CTU(0.7), CTU([0.3, 0.5, 0.9], 0.2), CTU(lower=-1.0, upper=0.3), CTU(upper=0.2)]
    units.append(CTU(0.8, slope=nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))))
    model, x = nn.Sequential(*units).to(dtype).eval(), torch.randn(4, 3).to(dtype)
    proto = export(model, (x,), dynamo=dynamo)
    onnx.checker.check_model(proto, full_check=True)
    assert sum(map(ctu.is_ctu, proto.graph.node)) == 5
    if dtype != torch.bfloat16:
        # beta and c are the same in both; in the file they are float32.
        assert furthest(proto, (x,), (model(x),)) < (1e-3 if dtype == torch.float16 else 1e-7)


def test_one_part_steered_and_units_by_hand():
    """The file steers only the activations that are steered in PyTorch."""
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU()), CTU(0.5, 0.1), nn.ReLU())
    x = torch.randn(3, 4)
    with steer(model[1], 0.7):
        proto = export(model, x, dynamo=False)
        assert furthest(proto, (x,), (model(x),)) < 1e-6
    states = [(a.status, a.beta) for a in ctonnx.inspect(proto)]
    assert states == [("steerable", None), ("steered", 0.7), ("steered", 0.5), ("steerable", None)]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.units = nn.ModuleList([CTU(0.6), CTU(0.9, 0.2, slope=0.1, trainable=True)])

    def forward(self, x):
        return torch.cond(x.sum() > 0, self.units[0], self.units[1], (x,))


def test_units_in_branches():
    model, x = Branches().eval(), torch.randn(2, 3).abs()
    proto = export(model, x)
    assert [a.scope != "" for a in ctonnx.inspect(proto)] == [True, True]
    for sign in 1, -1:
        assert furthest(proto, (sign * x,), (model(sign * x),)) < 1e-6


def test_a_unit_that_would_be_lost_is_refused():
    """The model calls the op itself, as CTU refuses such a bound."""

    class Guarding(nn.Module):
        def forward(self, x):
            pair = torch.full((), 0.5), torch.full((), 0.5)
            y = torch.ops.ctonnx.ctu(x, *pair)
            return torch.ops.ctonnx.ctu(y, *pair, None, 1e-6, None)

    with pytest.raises(ctonnx.UsageError, match="'/CTUMax' matches no activation"):
        export(Guarding(), torch.randn(3), dynamo=False)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    model, x = CTU(0.7), torch.randn(2, 3)
    path = tmp_path / "m.onnx"
    write = functools.partial(export, args=x, path=path, dynamo=False)
    assert write(model) == path
    assert furthest(onnx.load(path), (x,), (model(x),)) < 1e-6
    before = path.read_bytes()
    with pytest.raises(ctonnx.UsageError, match="exists already"):
        write(model)
    with pytest.raises(ctonnx.NothingToDo, match="has no CT unit"):
        write(nn.ReLU(), force=True)

    class Moody(nn.Module):
        def forward(self, x):
            return torch.ops.ctonnx.ctu(x, x.mean().sigmoid(), x.new_zeros(()))

    with pytest.raises(ctonnx.UsageError, match="depends on the input"):
        write(Moody(), force=True)
    with pytest.raises(ctonnx.UsageError, match="opset_version must be 11"):
        write(model, force=True, opset_version=9)
    assert path.read_bytes() == before
    write(CTU(0.8), force=True)
    assert path.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_exported_programs(tmp_path):
    """An ExportedProgram has the units as the op, and computes their beta from the raw one."""
    x = torch.randn(2, 3)
    model = trainable(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), x)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "m.pt2")
    proto = export(torch.export.load(tmp_path / "m.pt2"))
    assert furthest(proto, (x,), (model(x),)) < 1e-5


def test_a_half_steered_model_is_not_exported(tmp_path):
    """A scripted function without its Python source, and an RNN whose length a trace would fix."""
    scripted = torch.jit.script(positive)
    del scripted._torchdynamo_inline
    path = tmp_path / "m.onnx"

    class Half(nn.Module):
        def forward(self, x):
            return scripted(x.relu() - 0.3)

    rnn = nn.Sequential(nn.RNN(3, 4, nonlinearity="relu"), Scores())
    for model, left in ((Half(), "Relu"), (rnn, "torch.rnn_relu")):
        with (
            steer(model.eval(), 0.7),
            pytest.raises(ctonnx.UsageError, match=f"half steered: steer does not reach .*{left}"),
        ):
            export(model, torch.randn(5, 2, 3), path, dynamo=False)
        assert not path.exists()
    # A part that is not steered is another matter.
    model, x = nn.Sequential(nn.ReLU(), nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3)
    with steer(model[0], 0.7):
        proto = export(model, x, dynamo=False)
    assert [a.status for a in ctonnx.inspect(proto)] == ["steered", "steerable"]


@both
def test_what_only_exporters_see_through_is_steered(dynamo):
    scripted = torch.jit.script(positive)

    class Scripted(nn.Module):
        def forward(self, x):
            return scripted(x.relu() - 0.3)

    x = torch.randn(2, 3)
    model = Scripted()
    with steer(model, 0.7):
        proto, want = export(model, x, dynamo=dynamo), model(x)
    assert [a.status for a in ctonnx.inspect(proto)] == ["steered", "steered"]
    assert furthest(proto, (x,), (want,)) < 1e-6


class Scores(nn.Module):
    def forward(self, outputs):
        return outputs[0].relu()


def positive(x):
    return torch.relu(x) * 2


# --- checkpoints that do not fit


class Two(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())


def two(bare):
    """The T-CT pairs of a small model, its ONNX model, its input and the T-CT output."""
    torch.manual_seed(0)
    model, x, buffer = Two(), torch.randn(3, 4), io.BytesIO()
    torch.onnx.export(model, (x,), buffer, dynamo=False)
    proto = onnx.load_from_string(buffer.getvalue())
    for i, node in enumerate(proto.graph.node if bare else ()):
        node.name = f"n{i}"
    model = trainable(model, x)
    for name, parameter in model.named_parameters():
        if "_raw_" in name:
            nn.init.normal_(parameter)
    return params.Trained(pairs(model.state_dict())), proto, x, model(x)


def test_where_nothing_names_modules_pairs_go_in_order_only_when_asked():
    trained, proto, x, want = two(bare=True)
    with pytest.raises(ctonnx.UsageError, match=r"does not name the modules.* by --by-order"):
        ctonnx.patch(proto, params=trained)
    trained.by_order = True
    again = onnx.ModelProto.FromString(proto.SerializeToString())
    report = steer_onnx(again, params=trained)
    assert furthest(again, (x,), (want,)) < 1e-6
    assert report.notes == ["took the pairs in order: 1 for n1, 3 for n3"]
    for by_order in (True, False):
        one = params.Trained({"1": trained["1"]}, by_order=by_order)
        with pytest.raises(ctonnx.UsageError, match="holds 1 pairs, the model 2 activations"):
            ctonnx.patch(proto, params=one)


class Backwards(nn.Module):
    """A model whose modules are not used in the order in which they are defined."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.ReLU(), nn.ReLU()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.last(self.b(self.first(self.a(x)))))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@both
def test_a_checkpoint_of_a_wrapped_model_is_matched_by_name(dynamo, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    wrapped = {
        "DataParallel": (nn.DataParallel, lambda model: model),
        "torch.compile": (torch.compile, lambda model: model),
        "both": (lambda model: nn.DataParallel(torch.compile(model)), lambda model: model),
        "a module around it": (Wrapper, lambda model: model),
        "a part of it": (lambda model: nn.Sequential(nn.DataParallel(model)), nn.Sequential),
    }
    for what, (wrap, around) in wrapped.items():
        model = Backwards().eval()
        path, checkpoint = tmp_path / "m.onnx", tmp_path / "m.pth"
        exported = around(copy.deepcopy(model))
        torch.onnx.export(exported, (x,), path, dynamo=dynamo, verbose=False)
        model = trainable(model, x)
        for name, parameter in model.named_parameters():
            if "_raw_" in name:
                nn.init.normal_(parameter)
        torch.save(wrap(model).state_dict(), checkpoint)
        steered = ctonnx.patch(path, params=checkpoint, output=tmp_path / "o.onnx", force=True)
        assert furthest(onnx.load(steered), (x,), (model(x),)) < 1e-6, what
        report = steer_onnx(onnx.load(path), params=params.read(checkpoint))
        assert report.notes == [], what
        state = torch.load(checkpoint, weights_only=True)
        restored = restore(around(Backwards().eval()), state)
        torch.testing.assert_close(restored(x), model(x), msg=what)


def test_by_order_goes_with_a_state_dict_alone(tmp_path):
    _, proto, _, _ = two(bare=False)
    (tmp_path / "p.json").write_text('{"Relu": 0.5}')
    for given in (tmp_path / "p.json", {"Relu": 0.5}):
        with pytest.raises(ctonnx.UsageError, match="state dict"):
            ctonnx.patch(proto, params=given, by_order=True)


def test_a_batch_norm_that_an_exporter_folds_is_no_difference():
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.ReLU()),
        *(nn.ConvTranspose2d(4, 5, 3), nn.BatchNorm2d(5, affine=False), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(320, 4), nn.BatchNorm1d(4)),
    )
    x = torch.randn(16, 3, 8, 8)
    for _ in range(3):
        model(x * 2 + 1)
    model.eval()
    proto = torch.onnx.export(model, (x,), verbose=False).model_proto
    assert not any(node.op_type == "BatchNormalization" for node in proto.graph.node)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("0.weight", "0.bias", "3.weight", "3.bias", "7.weight", "7.bias"):
        tensors = proto.graph.initializer
        assert list(weights.differing(weight_arrays(state), tensors)) == []
        changed = {**state, name: state[name] + torch.randn_like(state[name]) * 0.01}
        assert list(weights.differing(weight_arrays(changed), tensors)) == [name]
    # Another norm gives other weights.
    changed = {**state, "1.running_var": state["1.running_var"] * 1.1}
    assert list(weights.differing(weight_arrays(changed), tensors)) == ["0.weight", "0.bias"]


def test_other_weights_than_the_checkpoint_has_are_noted():
    """T-CT trains a head too, which an older export does not have."""
    trained, proto, _, _ = two(bare=False)
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    assert steer_onnx(copy, params=params.Trained(trained, weights)).notes == []
    name = min(weights)
    weights[name] = weights[name] + 1
    report = steer_onnx(proto, params=params.Trained(trained, weights))
    (note,) = report.notes
    assert note.startswith("took beta and c alone: 1 weights of the checkpoint differ")
    assert f"such as {name};" in note


def test_pairs_go_to_modules_whatever_the_nodes_are_called():
    trained, proto, _, _ = two(bare=False)
    relus = [node for node in proto.graph.node if node.op_type == "Relu"]
    for node, module in zip(relus, trained, strict=True):
        node.name = "r"
        names = node.metadata_props.add(key="pkg.torch.onnx.name_scopes")
        names.value = repr(["", module, node.name])
    steered = ctonnx.inspect(ctonnx.patch(proto, params=trained))
    for activation, pair in zip(steered, trained.values(), strict=True):
        assert np.float32(activation.beta).tolist() == pair["beta"].tolist()


def test_a_checkpoint_of_bfloat16_and_of_parameters_is_read(tmp_path):
    _, proto, _, _ = two(bare=False)
    state = {"1._raw_beta": torch.zeros(1, 6), "1._raw_coeff": torch.ones(1, 6)}
    for dtype, kind in (torch.bfloat16, torch.Tensor), (torch.float32, nn.Parameter):
        torch.save({k: kind(v.to(dtype)) for k, v in state.items()}, tmp_path / "s.pth")
        steered = ctonnx.patch(proto, params=params.read(tmp_path / "s.pth"))
        assert np.unique(ctonnx.inspect(steered)[0].beta).tolist() == [0.5]


def test_an_extra_pair_or_one_of_another_width_is_refused():
    trained, proto, _, _ = two(bare=False)
    with pytest.raises(ctonnx.UsageError, match=r"'head\.1' is no module of an activation"):
        ctonnx.patch(proto, params=params.Trained({**trained, "head.1": trained["1"]}))
    wide = {key: np.tile(value, 2) for key, value in trained["1"].items()}
    with pytest.raises(ctonnx.UsageError, match=r"\[1, 12\] does not broadcast to \[3, 6\]"):
        ctonnx.patch(proto, params=params.Trained({**trained, "1": wide}))
    # An activation without a pair stays as it is.
    steered = ctonnx.patch(proto, params=params.Trained({"1": trained["1"]}))
    assert [a.status for a in ctonnx.inspect(steered)] == ["steered", "steerable"]


# --- models by name


class Giving(nn.Module):
    """A model that prints, and returns `call` of its input after a ReLU."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        print("ran")
        return self.call(x.relu())


@pytest.fixture
def named(monkeypatch):
    """A function that puts a model behind a PKG:FACTORY name, and returns the name."""

    def name(model):
        def make():
            print("made")
            return model

        monkeypatch.setitem(sys.modules, "models_by_name", types.SimpleNamespace(make=make))
        return "models_by_name:make"

    return name


def test_a_model_by_name_runs_and_stays_as_it_was(named, capsys):
    """It is steered only while it runs; its prints go to stderr."""
    model, x = Giving(lambda y: y), torch.randn(2, 3)
    target = named(model)
    for beta in 0.7, 0.9:
        got, units = by_name.run_model(target, [x.numpy()], ["y"], beta, 0.5)
        np.testing.assert_array_equal(got["y"], CTU(beta)(x))
        np.testing.assert_array_equal(units, [got["y"]])
    assert capsys.readouterr() == ("", "made\nran\n" * 2)
    assert type(model) is Giving
    for pair, lack in ((None, 0.5), "beta"), ((0.7, None), "c"):
        with pytest.raises(ctonnx.UsageError, match=f"do not share one {lack}: make it return"):
            by_name.run_model(target, [x.numpy()], ["y"], *pair)


def test_an_export_by_name_leaves_the_model_as_it_was(named, tmp_path, capsys, monkeypatch):
    def quicker(model, args, dynamo, options):
        return run_exporter(model, args, False, options)

    monkeypatch.setattr(by_name, "run_exporter", quicker)
    model = Giving(lambda y: y)
    by_name.export_model(named(model), [[2, 3]], tmp_path / "m.onnx", beta=0.7)
    assert type(model) is Giving
    assert capsys.readouterr().out == ""


def test_outputs_of_a_model_by_name(named):
    """They come in the exporters' order, without None."""
    x = torch.rand(2, 3) + 1
    parts = {"a": lambda y: (y, [None, 2 * y]), "b": nn.Parameter, "c": torch.Tensor.bfloat16}
    nested = named(Giving(lambda y: {key: make(y) for key, make in parts.items()}))
    got, _ = by_name.run_model(nested, [x.numpy()], ["first"], 1.0, 0.5)
    want = {"first": x, "output 1": 2 * x, "output 2": x, "output 3": x.bfloat16().float()}
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    for other in 3, np.zeros(2), "y":
        target = named(Giving(lambda y, other=other: (y, {"n": other})))
        message = f"{target}: returns an output of type {type(other).__name__}, expected tensors"
        with pytest.raises(ctonnx.UsageError, match=message):
            by_name.run_model(target, [x.numpy()], ["y"], 0.7, 0.5)
