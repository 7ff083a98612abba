"""`sweep --per`: what is found equals what separate models show, and no single change is better."""

import json
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import DIGITS, parsed

import ctonnx
from ctonnx.errors import CtonnxError, InputFileError, NothingToDo, UsageError
from ctonnx.measure import coordinates, engine, metrics, sweeping
from ctonnx.rewriting.find import Activation
from ctonnx.rewriting.places import Group, Place

pytest.importorskip("sklearn")
MODEL, DATA = str(DIGITS / "digits.onnx"), str(DIGITS / "digits_test.npz")
HELD = dict(np.load(DATA))
BETAS = [0.5, 0.7, 0.8, 1.0]
# Digits that the network reads badly, so that there is something to gain.
_NOISE = 0.5 * np.random.default_rng(0).normal(size=HELD["image"].shape)
NOISY = np.float32(HELD["image"] + _NOISE)[:200], HELD["label"][:200]


def accuracy(model, data=NOISY):
    """That of a whole model in plain ONNX Runtime."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (scores,) = session.run(None, {"image": data[0]})
    return (scores.argmax(1) == data[1]).mean()


def patched(groups, pairs):
    """The model with a β and c for each group of activations."""
    params = {
        name: {"beta": beta, "coeff": coeff}
        for names, (beta, coeff) in zip(groups, pairs, strict=True)
        for name in names
    }
    return ctonnx.patch(onnx.load(MODEL), params=params)


@pytest.fixture(scope="module", params=["stage", "activation"])
def found(request):
    return ctonnx.sweep(MODEL, NOISY, BETAS, coeffs=[0.3, 0.5], per=request.param)


def test_no_change_of_one_group_is_better(found):
    grouped = found.grouped
    groups = [[a.name for a in part.activations] for part in grouped.parts]
    pairs = [(part.beta, part.coeff) for part in grouped.parts]
    assert len(groups) == (3 if grouped.per == "stage" else 7)
    assert sum(map(len, groups)) == 7
    best = accuracy(patched(groups, pairs))
    assert grouped.value == best
    assert grouped.gain == pytest.approx(best - accuracy(onnx.load(MODEL)))
    assert grouped.over_single == pytest.approx(best - found.best.value)
    assert grouped.over_single > 0  # So there was something to find.
    for i, part in enumerate(grouped.parts):
        others = [
            accuracy(patched(groups, [*pairs[:i], (beta, coeff), *pairs[i + 1 :]]))
            for beta in BETAS
            for coeff in (0.3, 0.5)
        ]
        assert max(others) <= best
        assert part.part == pytest.approx(best - others[-1])
        assert part.part_low <= part.part <= part.part_high


def test_params_and_the_saved_file_are_the_model_that_was_measured(run, found, tmp_path):
    assert accuracy(ctonnx.patch(onnx.load(MODEL), params=found.grouped.params)) == (
        found.grouped.value
    )
    np.savez(tmp_path / "noisy.npz", image=NOISY[0], label=NOISY[1])
    arguments = "sweep", MODEL, "--data", tmp_path / "noisy.npz", "--beta", "0.5,0.7,0.8"
    options = "--coeff", "0.3,0.5", "--per", found.grouped.per, "--save-best", tmp_path / "s.onnx"
    result = run(*arguments, *options)
    assert result.exit_code == 0
    assert f"per {found.grouped.per}: accuracy {found.grouped.value:.4f}" in result.stdout
    saved = onnx.load(tmp_path / "s.onnx")
    assert accuracy(saved) == found.grouped.value
    betas = {a.name: round(a.beta, 6) for a in ctonnx.inspect(saved)}
    assert betas == {name: pair["beta"] for name, pair in found.grouped.params.items()}
    original = ctonnx.unpatch(saved)
    assert original == onnx.load(MODEL)


def test_one_group_finds_what_all_share():
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x) => (float[n, 2] y) <float[4, 2] w = {1, -1, 2, 0.5, -0.3, 1, 0.2, -2}>
        { r = Relu(x)  y = MatMul(r, w) }"""
    )
    rng = np.random.default_rng(0)
    data = rng.normal(size=(50, 4)).astype(np.float32), rng.integers(0, 2, 50)
    result = ctonnx.sweep(model, data, "0.1:1:0.1", "nll", per="stage")
    assert [part.beta for part in result.grouped.parts] == [result.best.beta]
    assert result.grouped.over_single == 0


def test_a_steered_model_keeps_its_activations_and_c(tmp_path):
    path = tmp_path / "s.onnx"
    options = {"include": r"relu_[3-6]$", "output": path}
    ctonnx.patch(MODEL, 0.9, 0.3, **options)
    result = ctonnx.sweep(path, NOISY, BETAS, per="activation")
    pairs = {name: pair["coeff"] for name, pair in result.grouped.params.items()}
    assert pairs == pytest.approx(dict.fromkeys([f"node_relu_{i}" for i in range(3, 7)], 0.3))
    steered = ctonnx.patch(onnx.load(MODEL), params=result.grouped.params)
    assert accuracy(steered) == result.grouped.value
    saved = onnx.load(sweeping.save_best(path, result, tmp_path / "best.onnx"))
    assert accuracy(saved) == result.grouped.value
    betas = {a.name: a.beta for a in ctonnx.inspect(saved) if a.status == "steered"}
    params = result.grouped.params
    assert betas == pytest.approx({name: pair["beta"] for name, pair in params.items()})


def searched(values, confidence=None):
    """A search over two groups with β 1, 0.8 and 0.6: from the β of both to a value of each
    sample, the accuracies of the best, and the β found."""
    names = "a", "b"
    activations = [Activation(name, "Relu", "", "steered", coeff=0.5) for name in names]
    steerable = SimpleNamespace(
        places=[Place(i, a, f"beta{i}", f"c{i}") for i, a in enumerate(activations)],
        groups=[Group(name, [i]) for i, name in enumerate(names)],
    )
    points = [(beta, None) for beta in (1.0, 0.8, 0.6)]
    job = SimpleNamespace(steerable=steerable, points=points, metric=metrics.METRICS["accuracy"])

    def statistics(i, end=None):
        point = job.points[i] if isinstance(job.points[i][0], tuple) else [job.points[i]] * 2
        rows = np.asarray(values(*(beta for beta, _ in point)), float)
        return rows[:end, None]

    single = max(range(3), key=lambda i: statistics(i).mean())
    count = len(statistics(0))
    found = coordinates.search(
        job, "activation", single, count, lambda *_: None, statistics, confidence
    )
    return found.value, tuple(part.beta for part in found.parts)


def share(correct):
    return [1] * correct + [0] * (100 - correct)


def test_groups_are_gone_through_again():
    """The first group has nothing to gain before the second has changed."""
    table = {(1, 1): 50, (1, 0.8): 60, (0.8, 0.8): 45, (0.6, 0.8): 70, (0.6, 0.6): 20}
    assert searched(lambda a, b: share(table.get((a, b), 10))) == (0.7, (0.6, 0.8))


def test_of_equals_the_present_one_stays():
    """The second group makes no difference, and keeps the β that all share."""
    table = {1: 40, 0.8: 60, 0.6: 50}
    assert searched(lambda a, b: share(table[a])) == (0.6, (0.8, 0.8))


def test_what_a_race_takes_is_measured_on_all_data():
    """(0.8, 1) is right on the first samples, which decide the race, and wrong on most others."""

    def values(a, b):
        return [(a, b) == (0.8, 1)] * 300 + [(a, b) == (0.8, 0.8)] * 700

    assert searched(values, 0.95) == (0.7, (0.8, 0.8))


def test_races_are_measured_on_all_data_at_the_end():
    options = {"search": "racing", "batch_size": 8}
    raced = ctonnx.sweep(MODEL, NOISY, BETAS, per="stage", **options)
    whole = ctonnx.sweep(MODEL, NOISY, BETAS, per="stage")
    steered = ctonnx.patch(onnx.load(MODEL), params=raced.grouped.params)
    assert raced.grouped.value == accuracy(steered)
    assert raced.grouped.value >= accuracy(onnx.load(MODEL))
    assert whole.grouped.value >= whole.best.value


def test_an_interrupted_search_is_resumed(tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    arguments = {"betas": BETAS, "per": "stage", "output": out}
    np.savez(tmp_path / "noisy.npz", image=NOISY[0], label=NOISY[1])
    whole = ctonnx.sweep(MODEL, tmp_path / "noisy.npz", **arguments)
    text = json.loads(out.read_text())
    out.unlink()
    # While the first group is changed: the points that all share take 4 x 7 runs.
    runs, before = [], engine.Runner._run

    def stopping(self, *args):
        runs.append(1)
        if len(runs) == 30:
            raise KeyboardInterrupt
        return before(self, *args)

    monkeypatch.setattr(engine.Runner, "_run", stopping)
    with pytest.raises(KeyboardInterrupt):
        ctonnx.sweep(MODEL, tmp_path / "noisy.npz", **arguments)
    monkeypatch.setattr(engine.Runner, "_run", before)
    for other in {"per": "activation"}, {"per": None}, {"betas": [0.5]}:
        with pytest.raises(UsageError, match="belongs to another sweep"):
            ctonnx.sweep(MODEL, tmp_path / "noisy.npz", resume=True, **{**arguments, **other})
    again = ctonnx.sweep(MODEL, tmp_path / "noisy.npz", resume=True, **arguments)
    assert again.grouped == whole.grouped
    assert json.loads(out.read_text()) == text
    assert [part["beta"] for part in text["grouped"]["parts"]] == [
        part.beta for part in whole.grouped.parts
    ]


def test_sizes_that_only_the_data_tell():
    """The model leaves height and width open: stages are those of the data."""
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 2, h, w] x) => (float[n, 2] y)
        { a = Relu(x)  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)  b = Relu(p)
          c = Sub(b, p)  d = Relu(c)  m = GlobalAveragePool(d)  y = Flatten(m) }"""
    )
    data = np.random.default_rng(0).normal(size=(20, 2, 8, 6)).astype(np.float32), np.zeros(20, int)
    result = ctonnx.sweep(model, data, [0.5], "nll", per="stage")
    assert {part.name: len(part.activations) for part in result.grouped.parts} == {
        "8x6": 1,
        "4x3": 2,
    }
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 8] x) => (float[n, k] y)
        { s = Shape(x)  t = Relu(x)  y = Reshape(t, s) }"""
    )
    flat = data[0][:, 0, :, 0], data[1]
    assert ctonnx.sweep(model, flat, [0.5], "nll", per="stage").grouped
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
        g (float[n, 8] x) => (float[n, 8] y) { y = f.Act(x) }
        <domain: "f", opset_import: ["" : 17]> Act (a) => (b) { b = Relu(a) }"""
    )
    with pytest.raises(UsageError, match="resolution of 'f::Act/b' is not known"):
        ctonnx.sweep(model, flat, [0.5], "nll", per="stage")
    assert ctonnx.sweep(model, flat, [0.5], "nll", per="activation").grouped


def test_the_drawing_shows_depth(run, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotext")
    arguments = "sweep", MODEL, "--data", DATA, "--beta", 0.7, "--metric", "nll", "--per", "stage"
    shown = run(*arguments, "--plot").stdout
    assert "activation, in the order of the graph" in shown
    assert run(*arguments, "--plot", tmp_path / "depth.svg").exit_code == 0
    drawn = (tmp_path / "depth.svg").read_text()
    assert len(drawn) > 10_000
    # Each text is in a comment beside its glyphs; a curve would name no activation.
    assert "<!-- head.1 -->" in drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "channel"}, "per must be"),
        ({"per": "stage", "tolerance": 0.1}, "tolerance takes one beta for all"),
        ({"per": "stage", "engine": "ray"}, "engine ray measures points"),
        ({"per": "stage", "calibration": DATA}, "calibration measures points"),
    ],
)
def test_mistakes_are_one_clear_line(options, message):
    with pytest.raises(UsageError, match=message):
        ctonnx.sweep(MODEL, DATA, BETAS, **options)


def test_data_that_cannot_be_read_again():
    def factory():
        return iter([NOISY])

    with pytest.raises(UsageError, match="must have a length for per"):
        ctonnx.sweep(MODEL, factory, BETAS, per="stage")
    with pytest.raises(InputFileError, match="no sample"):
        ctonnx.sweep(MODEL, (NOISY[0][:0], NOISY[1][:0]), BETAS, per="stage")


def test_models_without_places(run, tmp_path):
    nothing = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 2] x) => (float[n, 2] y) { y = Neg(x) }"""
    )
    with pytest.raises(NothingToDo):
        ctonnx.sweep(nothing, (np.zeros((2, 2), np.float32), [0, 1]), per="stage")
    lowered = ctonnx.patch(onnx.load(MODEL), 0.9, lowering="primitives")
    with pytest.raises(CtonnxError, match="lowered to primitives"):
        ctonnx.sweep(lowered, NOISY, per="stage")
    command = "sweep", MODEL, "--data", DATA, "--per", "stage"
    result = run(*command, "--save-best", tmp_path / "b.onnx", "--beta-as", "input")
    assert result.exit_code == 2
    assert "leave out --per" in result.stderr
    assert not list(tmp_path.iterdir())
