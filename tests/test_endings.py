"""What the outputs of a model hold, and which of several is measured."""

import json

import numpy as np
import onnx
import pytest
from conftest import DIGITS, parsed

import ctonnx
from ctonnx.errors import UsageError
from ctonnx.model.endings import Ending, ending_of

LOGITS, SOFTMAX = Ending(), Ending("probabilities", "Softmax")
SIGMOID, LOG_SOFTMAX = (
    Ending("probabilities", "Sigmoid"),
    Ending("log-probabilities", "LogSoftmax"),
)
HEAD = '<ir_version: 8, opset_import: ["" : 13, "com.microsoft" : 1, "my" : 1]>'
CONSTANTS = """<float two = {2.0}, float one = {1.0}, float s = {0.1}, uint8 z = {0},
    int64[1] axis = {1}, int64[2] shape = {-1, 3}, int64[1] first = {0}, bool yes = {1}>"""


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("y = Identity(x)", LOGITS),
        ("y = Softmax(x)", SOFTMAX),
        ("p = Softmax(x) y = Cast<to = 1>(p)", SOFTMAX),
        ("p = Softmax(x) q = QuantizeLinear(p, s, z) y = DequantizeLinear(q, s, z)", SOFTMAX),
        ("p = Softmax(x) q = Identity(p) y = Reshape(q, shape)", SOFTMAX),
        ("q = com.microsoft.QLinearSoftmax(x, s, z, s, z) y = DequantizeLinear(q, s, z)", SOFTMAX),
        ("y = Sigmoid(x)", SIGMOID),
        ("p = Sigmoid(x) n = Sub(one, p) y = Concat<axis = 1>(n, p)", SIGMOID),
        ("y = LogSoftmax(x)", LOG_SOFTMAX),
        ("p = Softmax(x) y = Log(p)", LOG_SOFTMAX),
        ("l = LogSoftmax(x) y = Exp(l)", SOFTMAX),
        ("e = Exp(x) t = ReduceSum(e, axis) y = Div(e, t)", SOFTMAX),
        # The mean of two networks, and a part of the classes.
        ("p = Softmax(x) q = Softmax(p) t = Add(p, q) y = Div(t, two)", SOFTMAX),
        ("p = Softmax(x) y = Gather<axis = 1>(p, first)", SOFTMAX),
        # What is made of probabilities need not be any.
        ("p = Sigmoid(x) y = Mul(x, p)", LOGITS),
        ("p = Softmax(x) y = Add(x, p)", LOGITS),
        ("p = Softmax(x) y = Neg(p)", LOGITS),
        ("p = Softmax(x) y = MatMul(p, x)", LOGITS),
        ("t = Div(x, two) y = Identity(t)", LOGITS),
        # In functions, whose names tell nothing, and in branches.
        ("y = my.soft(x)", SOFTMAX),
        ("y = my.Softmax(x)", LOGITS),
        ("p = Softmax(x) y = my.same(p)", SOFTMAX),
        (
            """y = If(yes)<then_branch = a () => (u) { u = Softmax(x) },
            else_branch = b () => (v) { w = Softmax(x) v = Identity(w) }>""",
            SOFTMAX,
        ),
        (
            """y = If(yes)<then_branch = a () => (u) { u = Softmax(x) },
            else_branch = b () => (v) { v = Identity(x) }>""",
            LOGITS,
        ),
    ],
)
def test_what_an_output_holds(nodes, expected):
    model = onnx.parser.parse_model(
        f"""{HEAD} g (float[N, 3] x) => (float[N, 3] y) {CONSTANTS} {{ {nodes} }}
        <domain: "my", opset_import: ["" : 13]> soft (a) => (b) {{ c = Softmax(a) b = Identity(c) }}
        <domain: "my", opset_import: ["" : 13]> same (a) => (b) {{ b = Identity(a) }}
        <domain: "my", opset_import: ["" : 13]> Softmax (a) => (b) {{ b = Relu(a) }}"""
    )
    assert ending_of(model, "y") == expected


def test_a_graph_that_is_no_graph_ends_in_logits():
    """Cycles, and paths that double at each node."""
    doubled = " ".join(f"t{i + 1} = Add(t{i}, t{i})" for i in range(2000))
    for nodes in (
        f"t0 = Softmax(x) {doubled} y = Identity(t2000)",
        "a = Identity(y) y = Identity(a)",
        "a = Add(y, y) y = Mul(a, a)",
    ):
        model = onnx.parser.parse_model(
            f"{HEAD} g (float[N, 3] x) => (float[N, 3] y) {{ {nodes} }}"
        )
        assert ending_of(model, "y") == LOGITS


IMAGES, LABELS = (np.load(DIGITS / "digits_test.npz")[name][:100] for name in ("image", "label"))


def digits(*ops):
    """The digits' classifier with these ops behind its output, which keeps its name."""
    model = onnx.load(DIGITS / "digits.onnx")
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["scores" if name == output.name else name for name in node.output]
    names = ["scores", *(f"t{i}" for i in range(1, len(ops))), output.name]
    for i, op in enumerate(ops):
        model.graph.node.append(onnx.helper.make_node(op, [names[i]], [names[i + 1]]))
    return model


@pytest.mark.parametrize("metric", ["nll", "ece", "entropy", "kl"])
def test_what_is_measured_does_not_depend_on_the_ending(metric):
    values = {}
    for ops, kind in [
        (("Identity",), "logits"),
        (("Softmax",), "probabilities"),
        (("LogSoftmax",), "log-probabilities"),
        (("Softmax", "Log"), "log-probabilities"),
    ]:
        result = ctonnx.sweep(digits(*ops), (IMAGES, LABELS), [0.8, 0.9], metric)
        values[ops] = [point.value for point in result.points]
        assert result.document()["output_kind"] == kind
        assert any(n.startswith(f"output 'logits' holds {kind}") for n in result.notes)
    first, *others = values.values()
    for other in others:
        assert other == pytest.approx(first, rel=1e-3, abs=1e-6)


def test_zeros_are_told():
    """Of probabilities in steps of 1/4."""
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 2] x) => (float[N, 2] y) <float s = {0.25}, uint8 z = {0}> {
            r = Relu(x) p = Softmax(r)
            q = QuantizeLinear(p, s, z) y = DequantizeLinear(q, s, z) }"""
    )
    x, y = np.float32([[9, 0], [9, 0], [0, 9], [1, 0]]), np.array([0, 1, 0, 0])
    result = ctonnx.sweep(model, (x, y), [0.9], "nll")
    expected = (2 * 149 * np.log(2) - np.log(0.75)) / 4
    assert result.original.value == pytest.approx(expected, rel=1e-6)
    assert result.notes[1:3] == [
        "output 'y' holds probabilities (of a Softmax): 0 counts as 1.4e-45",
        "the label has a probability of 0 in up to 2 of 4 samples at a point",
    ]


DETECTOR = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] boxes, float[N, K] scores, float[N, 4, 4] maps) <
    int64[2] shape = {-1, 1}, int64[1] axis = {1}, int64[3] at = {0, 1, 2}> {
    boxes = Relu(x)
    n = Neg(boxes)
    scores = Gather<axis = 1>(n, at)
    rows = Unsqueeze(x, axis)
    maps = Concat<axis = 1>(rows, rows, rows, rows) }"""


def test_the_output_is_that_which_suits_metric_and_labels():
    model = parsed(DETECTOR)
    x = np.abs(np.random.default_rng(0).normal(size=(60, 4))).astype(np.float32)
    classes = (-x[:, :3]).argmax(1)
    assert set(classes) == {0, 1, 2}
    for labels, metric, output in [
        (classes, "accuracy", "scores"),
        (x, "mae", "boxes"),
        (-x[:, :3], "mae", "scores"),
        (None, "entropy", "boxes"),
        (np.tile(x[:, None], (1, 4, 1)), "mse", "maps"),
    ]:
        result = ctonnx.sweep(model, (x, labels), [0.9], metric)
        assert result.output_name == result.document()["output_name"] == output
        note = (
            f"measures the output {output!r} of boxes, scores, maps: --output-name chooses another"
        )
        assert note in result.notes
        if labels is not None:
            assert result.original.value == pytest.approx(1 if metric == "accuracy" else 0)
    # Batches in turn are not lost by looking at the first.
    halves = [(x[:30], classes[:30]), (x[30:], classes[30:])]
    batches = iter(halves)
    result = ctonnx.sweep(model, lambda: batches, [0.9])
    assert (result.output_name, result.original.samples) == ("scores", 60)
    chosen = ctonnx.sweep(model, (x, classes), [0.9], output_name="boxes")
    assert chosen.output_name == "boxes"
    assert chosen.original.value < 1
    for options, line in [
        (
            {"output_name": "box"},
            "no floating-point output 'box': choose among boxes, scores, maps",
        ),
        (
            {"output_name": "boxes", "metric": lambda outputs, labels: labels},
            "<lambda> takes all outputs: leave out output-name",
        ),
        ({"metric": "miou"}, "miou needs scores"),
    ]:
        with pytest.raises(UsageError, match=line):
            ctonnx.sweep(model, (x, classes), [0.9], **options)


def test_the_command_chooses_an_output(tmp_path, monkeypatch, capsys):
    from ctonnx.cli import main as cli

    onnx.save(parsed(DETECTOR), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.eye(4, dtype=np.float32)[:3], label=np.arange(3))
    monkeypatch.chdir(tmp_path)
    arguments = ["sweep", "m.onnx", "--data", "d.npz", "--beta", "0.9", "--json", "-o", "r.json"]
    for chosen in ("boxes", "scores"):
        monkeypatch.setattr("sys.argv", ["ctonnx", *arguments, "--output-name", chosen, "--force"])
        with pytest.raises(SystemExit):
            cli.main()
        document = json.loads(capsys.readouterr().out)
        assert (document["output"], document["output_name"]) == ("r.json", chosen)
        assert document["original"]["value"] == (1 if chosen == "boxes" else 0)
