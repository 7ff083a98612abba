"""Probing: plain linear probing at β = 1, what is chosen by what, the model that is written."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import DIGITS, parsed

import ctonnx
from ctonnx.cli import main as cli
from ctonnx.errors import MissingDependency, UsageError
from ctonnx.measure import engine
from ctonnx.model import flow
from ctonnx.rewriting.steer import Selection, steer
from ctonnx.rewriting.steered import SteeredModel
from ctonnx.transfer import features as reading
from ctonnx.transfer import fit

pytest.importorskip("sklearn")
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

MODEL = str(DIGITS / "digits.onnx")
HELD = dict(np.load(DIGITS / "digits_test.npz"))
FEATURES = "relu_6"
# Digits below 5 and above: another labelling than the network's.
HIGH = (HELD["label"] >= 5).astype(int)
TRAIN, TEST = (HELD["image"][::2], HIGH[::2]), (HELD["image"][1::2], HIGH[1::2])
BETAS = [0.6, 0.8, 0.95]


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """The result and the file that it wrote."""
    path = tmp_path_factory.mktemp("probe") / "m.onnx"
    return ctonnx.probe(MODEL, TRAIN, TEST, BETAS, output=path), path


def features(model, images, name=FEATURES, session=onnxruntime.InferenceSession):
    """Of a ModelProto, run as a whole, batch by batch as a probe does."""
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    opened = session(model.SerializeToString())
    batches = [images[i : i + 32] for i in range(0, len(images), 32)]
    return np.concatenate([opened.run([name], {"image": batch})[0] for batch in batches])


def classifier(rows, labels):
    made = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    return made.fit(rows.astype(np.float64), labels)


def test_at_beta_1_it_is_plain_linear_probing(probed):
    """To the last digit, with the unsteered model in plain ONNX Runtime."""
    train, test = (features(onnx.load(MODEL), images) for images, _ in (TRAIN, TEST))
    right = classifier(train, TRAIN[1]).predict(test) == TEST[1]
    assert 0.5 < right.mean() < 1
    assert probed[0].original.test == right.mean()
    assert probed[0].original.beta == 1


def test_beta_is_chosen_on_validation_samples(probed):
    """Each number, recomputed with models that have β baked in."""
    result, _ = probed
    train, test, expected = {}, {}, {}
    for beta in (*BETAS, 1.0):
        patched = ctonnx.patch(onnx.load(MODEL), beta)
        train[beta], test[beta] = (
            features(patched, images, session=ctonnx.session) for images, _ in (TRAIN, TEST)
        )
        right = classifier(train[beta], TRAIN[1]).predict(test[beta]) == TEST[1]
        expected[beta] = float(right.mean())
    assert {p.beta: p.test for p in result.points} == expected
    validated = {beta: [] for beta in expected}
    for seed in range(3):
        split = StratifiedShuffleSplit(1, test_size=0.2, random_state=seed)
        ((fit, held),) = split.split(TRAIN[0], TRAIN[1])
        for beta, rows in train.items():
            made = classifier(rows[fit], TRAIN[1][fit])
            validated[beta].append((made.predict(rows[held]) == TRAIN[1][held]).mean())
        best = max(validated, key=lambda beta: (validated[beta][-1], beta))
        chosen = result.seeds[seed]
        assert (chosen.beta, chosen.validation) == (best, validated[best][-1])
        assert chosen.test == expected[best]
        assert chosen.gain == pytest.approx(expected[best] - expected[1.0])
    means = {p.beta: p.validation for p in result.points}
    assert means == pytest.approx({beta: np.mean(v) for beta, v in validated.items()})
    assert len({*means.values()}) > 1
    assert result.best.beta == max(means, key=lambda beta: (round(means[beta], 9), beta))
    assert result.accuracy == pytest.approx(np.mean([s.test for s in result.seeds]))
    assert result.gain == pytest.approx(result.accuracy - result.original.test)
    first = result.points[0]
    assert first.gain_low < first.gain < first.gain_high < 0


def test_what_is_written_has_the_reported_accuracy_in_plain_onnx_runtime(probed):
    result, path = probed
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(["logits"], {"image": TEST[0]})
    assert logits.shape == (270, 2)
    assert result.written == (logits.argmax(1) == TEST[1]).mean() == result.best.test
    model = onnx.load(path)
    assert model == result.model
    onnx.checker.check_model(model, full_check=True)
    before = {tensor.name for tensor in onnx.load(MODEL).graph.initializer}
    after = {tensor.name for tensor in model.graph.initializer}
    assert before - after == {"head.2.weight", "head.2.bias"}
    assert after - before == {"head_weight", "head_bias", "beta", "coeff"}
    used = {name for node in model.graph.node for name in node.input}
    assert after <= used
    shape = session.get_outputs()[0].shape
    assert shape == [onnxruntime.InferenceSession(MODEL).get_outputs()[0].shape[0], 2]
    assert not any(entry.key == "ctonnx.classes" for entry in model.metadata_props)
    assert {a.beta for a in ctonnx.inspect(path)} == {result.best.beta}
    assert result.parameters == sum(
        np.prod(t.dims) for t in model.graph.initializer if t.name.startswith("head_")
    )
    assert (result.features, result.width, result.classes) == (FEATURES, 32, [0, 1])
    # Undone it is the original, but for the head.
    assert Counter(n.op_type for n in ctonnx.unpatch(model).graph.node) == Counter(
        n.op_type for n in onnx.load(MODEL).graph.node
    )


def test_the_test_set_chooses_nothing(probed):
    """With other test labels all is chosen alike."""
    other = ctonnx.probe(MODEL, TRAIN, (TEST[0], 1 - TEST[1]), BETAS)
    assert other.best.beta == probed[0].best.beta
    chosen = [[(s.beta, s.validation) for s in r.seeds] for r in (other, probed[0])]
    assert chosen[0] == chosen[1]
    assert other.written == pytest.approx(1 - probed[0].written)


# --- small models

X = np.random.default_rng(0).normal(size=(90, 3)).astype(np.float32)
Y = (np.abs(X).sum(1) > 2.3).astype(int) + (X[:, 0] > 1)

TRUNK = "z = MatMul(x, a) h = Relu(z)"


def small(tail="y = Gemm(h, w, c)", trunk=TRUNK, output="float[N, 2] y", shape="N, 3", opset=17):
    return parsed(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[{shape}] x) => ({output})
        <float[3, 4] a = {{1, -1, 0.5, 2, 0.3, 1, -1, -2, 1, 1, -0.7, 0.4}},
         float[4, 2] w = {{1, 0, 0, 1, 1, 1, -1, 0}}, float[2, 4] v = {{1, 0, 0, 1, 1, 1, -1, 0}},
         float[2, 4, 1, 1] k = {{1, 0, 0, 1, 1, 1, -1, 0}}, float[2] c = {{0.5, -0.5}},
         float t = {{0.5}}, int64[4] s = {{-1, 4, 1, 1}}, int64[2] ends = {{2, 3}},
         int64[1] middle = {{1}}>
        {{ {trunk} {tail} }}"""
    )


@pytest.mark.parametrize(
    "tail",
    [
        "y = Gemm(h, w, c)",
        "y = Gemm<transB = 1>(h, v)",
        "l = MatMul(h, w) y = Add(c, l)",
        "l = MatMul(h, w) m = Add(l, c) n = Div(m, t) y = Softmax<axis = 1>(n)",
        "q = Transpose(v) l = MatMul(h, q) y = LogSoftmax(l)",
        "p = Reshape(h, s) l = Conv(p, k, c) y = Flatten(l)",
        "p = Reshape(h, s) l = Conv(p, k, c) m = Squeeze(l, ends) y = Sigmoid(m)",
    ],
)
def test_the_head_is_found(tail):
    result = ctonnx.probe(small(tail), (X[:60], Y[:60]), (X[60:], Y[60:]), [0.5], seeds=1)
    assert result.features == ("p" if "Reshape" in tail else "h")
    assert (result.width, result.classes, result.parameters) == (4, [0, 1, 2], 15)
    assert result.original.test > np.bincount(Y[60:]).max() / 30
    model = result.model
    onnx.checker.check_model(model, full_check=True)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": X[60:]})
    assert y.shape == (30, 3)
    assert result.written == (y.argmax(1) == Y[60:]).mean() == result.best.test
    sums = {"Softmax": y.sum(1), "LogSoftmax": np.exp(y).sum(1)}
    ending = model.graph.node[-1].op_type
    assert ending == next((op for op in sums if f" {op}" in tail), "Gemm")
    if ending != "Gemm":
        assert sums[ending] == pytest.approx(1, rel=1e-5)
    left = {tensor.name for tensor in model.graph.initializer}
    assert left.isdisjoint({"w", "v", "k", "c"} & set(tail.replace("(", " ").split()))
    assert any("Sigmoid" in note for note in result.notes) == ("Sigmoid" in tail)
    rows = np.maximum(X @ onnx.numpy_helper.to_array(small().graph.initializer[0]), 0)
    right = classifier(rows[:60], Y[:60]).predict(rows[60:]) == Y[60:]
    assert result.original.test == right.mean()


def test_old_models_and_fixed_batches():
    """Before IR 4 initializers are inputs too; the last batch is filled up."""
    model = small(shape="4, 3", output="float[4, 2] y", opset=12)
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    result = ctonnx.probe(model, (X[:59], Y[:59]), (X[60:], Y[60:]), [0.5, 1])
    plain = ctonnx.probe(small(opset=12), (X[:59], Y[:59]), (X[60:], Y[60:]), [0.5, 1])
    assert [p.test for p in result.points] == [p.test for p in plain.points]
    original = ctonnx.unpatch(result.model)
    inputs = {value.name for value in original.graph.input}
    assert {"x", "a", "head_weight", "head_bias"} <= inputs
    assert inputs.isdisjoint({"w"})
    assert original.graph.output[0].type.tensor_type.shape.dim[0].dim_value == 4
    onnxruntime.InferenceSession(original.SerializeToString())
    # Steering takes initializers out of the inputs, and undoing it brings back those that are left.
    steered = ctonnx.probe(ctonnx.patch(model, 0.9), (X[:59], Y[:59]), (X[60:], Y[60:]), [0.5, 1])
    assert steered.points == result.points
    again = ctonnx.unpatch(steered.model)
    assert {value.name for value in again.graph.input} == inputs - {"head_weight", "head_bias"}
    session = onnxruntime.InferenceSession(again.SerializeToString())
    assert [value.name for value in session.get_inputs()] == ["x"]


def test_nodes_in_another_order_than_they_run_in(tmp_path):
    """ONNX Runtime takes them, and so do the model and the head that are written."""
    model = small("l = MatMul(h, w)  y = Add(l, c)")
    expected = ctonnx.probe(model, (X, Y), (X, Y), [0.5])
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in reversed(model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "m.onnx")
    out = tmp_path / "head.onnx"
    result = ctonnx.probe(tmp_path / "m.onnx", (X, Y), (X, Y), [0.5], output=out)
    assert result.points == expected.points
    onnx.checker.check_model(onnx.load(out))


def test_a_node_of_the_head_gets_a_name_of_its_own():
    model = small()
    model.graph.node[0].name = "node_Gemm"
    result = ctonnx.probe(model, (X, Y), (X, Y), [0.5])
    names = [node.name for node in result.model.graph.node if node.name]
    assert len(names) == len(set(names))


def test_what_hangs_on_the_old_head_is_left_out():
    model = small(
        "y = Gemm(h, w, c) i = ArgMax<axis = 1, keepdims = 0>(y) e = Abs(h) d = Neg(z)",
        output="float[N, 2] y, int64[N] i, float[N, 4] e",
    )
    result = ctonnx.probe(model, (X, Y), (X, Y), [0.5])
    assert [value.name for value in result.model.graph.output] == ["y", "e"]
    assert [n.op_type for n in result.model.graph.node] == ["MatMul", "CTU", "Abs", "Neg", "Gemm"]
    assert "left out what depends on the old head: 'i'" in result.notes


def test_labels_are_the_same_however_they_are_written(tmp_path):
    """In one batch all are numbers, in another there is text."""
    labels = ["1.0", "2"] * 40 + ["1.0", "cat", "1e0"] * 5
    lines = ["a,b,c,label", *(f"1,{i % 7},{i % 5},{label}" for i, label in enumerate(labels))]
    (tmp_path / "d.csv").write_text("\n".join(lines))
    result = ctonnx.probe(small(), tmp_path / "d.csv", tmp_path / "d.csv", [0.5])
    assert result.classes == [1, 2, "1e0", "cat"]


def test_an_embedding_may_come_before_the_scores():
    model = small("y = Gemm(h, w, c) e = Abs(h)", output="float[N, 4] e, float[N, 2] y")
    result = ctonnx.probe(model, (X, Y), (X, Y), [0.5])
    dims = [value.type.tensor_type.shape.dim[1] for value in result.model.graph.output]
    assert [dim.dim_value for dim in dims] == [4, 3]
    assert "the new head makes the output 'y', as the old one did" in result.notes


def test_the_output_of_the_new_head_may_be_named():
    """Of a detector's two linear layers the first is that of its boxes."""
    model = small(
        "b = Gemm(h, w, c) n = Abs(h) y = Gemm(n, w, c)", output="float[N, 2] b, float[N, 2] y"
    )
    for name, features in (None, "h"), ("b", "h"), ("y", "n"):
        result = ctonnx.probe(model, (X, Y), (X, Y), [0.5], output_name=name)
        assert result.features == features
        told = "of the outputs b, y --output-name chooses another"
        assert (told in result.notes) == (name is None)
    with pytest.raises(UsageError, match="no floating-point output 'z': choose among b, y"):
        ctonnx.probe(model, (X, Y), (X, Y), [0.5], output_name="z")


def test_features_may_be_named():
    """With what is behind them alone taken out, and flattened."""
    model = small("p = Reshape(h, s) g = Relu(p) m = Flatten(g) n = Abs(m) y = Gemm(n, w, c)")
    result = ctonnx.probe(model, (X, Y), (X, Y), [0.5], features="g")
    assert [n.op_type for n in result.model.graph.node] == [
        "MatMul",
        "CTU",
        "Reshape",
        "CTU",
        "Flatten",
        "Gemm",
    ]
    assert (result.features, result.width) == ("g", 4)
    session = onnxruntime.InferenceSession(result.model.SerializeToString())
    assert result.written == (session.run(None, {"x": X})[0].argmax(1) == Y).mean()


def test_features_may_be_beside_the_classifier():
    """Then a node that no output needs goes with what it reads."""
    model = small("b = Abs(z) r = Relu(b) y = Gemm(h, w, c) d = Neg(h)")
    result = ctonnx.probe(model, (X, Y), (X, Y), [0.5], features="r")
    assert [n.op_type for n in result.model.graph.node] == ["MatMul", "Abs", "CTU", "Gemm"]


def test_classes_may_have_names():
    names = np.array(["low", "high", "ärger"])[Y]
    result = ctonnx.probe(small(), (X, names), (X, names), [0.5])
    numbers = ctonnx.probe(small(), (X, Y.astype(float)), (X, Y[:, None]), [0.5])
    assert result.classes == ["high", "low", "ärger"]
    assert numbers.classes == [0, 1, 2]
    metadata = {entry.key: entry.value for entry in result.model.metadata_props}
    assert json.loads(metadata["ctonnx.classes"]) == result.classes
    session = onnxruntime.InferenceSession(result.model.SerializeToString())
    predicted = np.array(result.classes)[session.run(None, {"x": X})[0].argmax(1)]
    assert result.written == (predicted == names).mean()


def test_classes_in_csv_may_have_names(tmp_path):
    """Of which some are numbers, in a batch of their own too."""
    names = np.where(Y == 2, "high", Y.astype(str))[np.argsort(Y, kind="stable")]
    rows = X[np.argsort(Y, kind="stable")]
    assert set(names[:32]) <= {"0", "1"}
    assert names[-1] == "high"
    lines = [f"{a},{b},{c},{name}" for (a, b, c), name in zip(rows, names, strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(["a,b,c,kind", *lines]))
    path = str(tmp_path / "a.csv")
    result = ctonnx.probe(small(), path, path, [0.5], labels="kind")
    assert result.classes == [0, 1, "high"]
    assert result.points == ctonnx.probe(small(), (rows, names), (rows, names), [0.5]).points


def test_folders_name_classes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for part, kept in ("train", "ab"), ("test", "b"):
        for name in kept:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(6):
                level = 60 * "ab".index(name) + 5 * i
                image.new("L", (2, 2), level).save(tmp_path / part / name / f"{i}.png")
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 1, 2, 2] x) => (float[N, 1] y) <float[4, 1] w = {1, 1, -1, 2}>
        { f = Flatten(x) h = Relu(f) y = MatMul(h, w) }"""
    )
    result = ctonnx.probe(model, str(tmp_path / "train"), str(tmp_path / "test"), [0.9])
    # Its only class has another number in the test folder.
    assert (result.classes, result.original.test) == (["a", "b"], 1.0)
    listed = [
        f"{file.relative_to(tmp_path)},{file.parent.name}" for file in tmp_path.rglob("*.png")
    ]
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *listed]))
    listed = ctonnx.probe(model, str(tmp_path / "train"), str(tmp_path / "all.csv"), [0.9])
    assert (listed.classes, listed.test_samples) == (["a", "b"], 18)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_as": "required-input"},
        {"params": {"node_relu": 0.3}},
        {"lowering": "op"},
        {"lowering": "primitives", "beta_as": "input"},
    ],
    ids=["baked", "required", "one alone", "op", "primitives"],
)
def test_a_model_may_be_steered_already(options):
    """Then only those activations are, and β = 1 is still the original."""
    one = "params" in options
    steered = ctonnx.patch(onnx.load(MODEL), None if one else 0.9, **options)
    train, test = ((images[:90], labels[:90]) for images, labels in (TRAIN, TEST))
    result = ctonnx.probe(steered, train, test, [0.6], seeds=[5])
    plain = ctonnx.probe(MODEL, train, test, [0.6], seeds=[5])
    assert result.original.test == plain.original.test
    assert (result.points[0].test == plain.points[0].test) != one
    assert any("no fallback" in note for note in result.notes) == (options == {"lowering": "op"})
    unknown = any("beta 1 is measured through the CT units" in note for note in result.notes)
    assert unknown == (options.get("lowering") == "primitives")
    states = Counter(a.status for a in ctonnx.inspect(result.model))
    assert states == ({"steered": 1, "steerable": 6} if one else {"steered": 7})


def test_coeff_is_taken():
    train, test = ((images[:60], labels[:60]) for images, labels in (TRAIN, TEST))
    half, more = (ctonnx.probe(MODEL, train, test, [0.5], coeff=c, seeds=1) for c in (None, 0.9))
    assert half.points[0] != more.points[0]
    rows = [
        features(ctonnx.patch(onnx.load(MODEL), 0.5, 0.9), images, session=ctonnx.session)
        for images, _ in (train, test)
    ]
    right = classifier(rows[0], train[1]).predict(rows[1]) == test[1]
    assert more.points[0].test == right.mean()
    assert {a.coeff for a in ctonnx.inspect(more.model)} == {0.9}


def test_external_data_are_shared(tmp_path):
    model = onnx.load(MODEL)
    onnx.save(
        model,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        size_threshold=1024,
        location="w",
    )
    train, test = ((images[:60], labels[:60]) for images, labels in (TRAIN, TEST))
    path = tmp_path / "out.onnx"
    given = ctonnx.probe(tmp_path / "m.onnx", train, test, [0.9])
    result = ctonnx.probe(tmp_path / "m.onnx", train, test, [0.9], output=path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "out.onnx", "w"]
    (logits,) = onnxruntime.InferenceSession(path).run(None, {"image": test[0]})
    assert given.written == result.written == (logits.argmax(1) == test[1]).mean()


# --- in two parts


def parts(model, output="h", **options):
    """The two parts of a small model steered, and the whole."""
    steer(model, 1.0, beta_as="required-input", **options)
    return flow.split(model, output, SteeredModel(model).betas()), model


def run(model, **fed):
    names = {value.name for value in model.graph.input}
    given = {name: value for name, value in fed.items() if name in names}
    values = ctonnx.session(model).run(None, given)
    return dict(zip((value.name for value in model.graph.output), values, strict=True))


@pytest.mark.parametrize("exclude", [None, "^node_relu(_[1-3])?$"])
def test_the_part_before_the_first_steered_activation_is_run_once(exclude):
    """Both parts give what the whole model does, but for how ONNX Runtime fuses and lays it out."""
    (before, after), whole = parts(onnx.load(MODEL), FEATURES, selection=Selection(exclude=exclude))
    convolutions = [sum(n.op_type == "Conv" for n in part.graph.node) for part in (before, after)]
    assert sum(convolutions) == 6
    assert convolutions[0] == (1 if exclude is None else 5)
    images = HELD["image"][:32]
    shared = run(before, image=images)
    whole.graph.output.append(onnx.ValueInfoProto(name=FEATURES))
    for beta in np.array([[0.5], [0.9]], np.float32):
        got = run(after, image=images, beta=beta, **shared)[FEATURES]
        whole_gives = run(whole, image=images, beta=beta)[FEATURES]
        np.testing.assert_allclose(got, whole_gives, rtol=0, atol=1e-6 * np.abs(got).max())


def test_subgraphs_see_tensors_of_the_first_part():
    """A captured tensor counts, and so does one that the first part takes from the input."""
    trunk = """z = MatMul(x, a) o = Abs(x) b = ReduceSum<keepdims = 0>(x) n = Greater(b, t)
        r = Relu(z) h = If(n) <
          then_branch = g () => (float[N, 4] u) { u = Mul(r, z) },
          else_branch = g () => (float[N, 4] u) { p = MatMul(o, a) u = Add(r, p) }>"""
    (before, after), whole = parts(small(trunk=trunk))
    assert {value.name for value in before.graph.output} == {"z", "o", "n"}
    whole.graph.output.append(onnx.ValueInfoProto(name="h"))
    for x in X[:5], -np.abs(X[:5]):
        shared = run(before, x=x)
        beta = np.array([0.7], np.float32)
        got = run(after, x=x, beta=beta, **shared)["h"]
        np.testing.assert_array_equal(got, run(whole, x=x, beta=beta)["h"])


@pytest.mark.parametrize(
    "trunk",
    [
        "q = RandomNormalLike(x) z = MatMul(q, a) h = Relu(z)",
        "q = Dropout(x, t, on) z = MatMul(q, a) h = Relu(z)",
        "q = Abs(x) r = Relu(q) h = MatMul(r, a)",  # Not worth it.
    ],
)
def test_some_models_are_run_as_a_whole(trunk):
    if "on" in trunk:
        trunk = f"on = Constant<value = bool {{1}}>() {trunk}"
    assert parts(small(trunk=trunk))[0] is None
    # Where Dropout is not in training nothing is random.
    if "Dropout" in trunk:
        assert parts(small(trunk=trunk.replace("{1}", "{0}")))[0] is not None


def test_betas_are_read_in_groups(monkeypatch, probed):
    """Of a size that is bounded: with the same numbers."""
    groups, before = [], reading._read

    def counted(runner, source, head, points):
        groups.append(len(points))
        return before(runner, source, head, points)

    monkeypatch.setattr(reading, "_read", counted)
    monkeypatch.setattr(reading, "_MAX_BYTES", 2 * 540 * 32 * 4)
    result = ctonnx.probe(MODEL, TRAIN, TEST, BETAS)
    assert groups == [1, 1, 2, 2, 1, 1]
    assert result.points == probed[0].points


def test_the_shared_part_is_not_run_for_points(monkeypatch):
    runs, before = Counter(), engine.Runner._execute

    def counted(self, binding):
        runs["beta" in self._input_names] += 1
        return before(self, binding)

    monkeypatch.setattr(engine.Runner, "_execute", counted)
    train, test = ((images[:32], labels[:32]) for images, labels in (TRAIN, TEST))
    ctonnx.probe(MODEL, train, test, [0.7, 0.8, 0.9], seeds=1)
    # Of each set one batch: the original once, the shared part once, the rest three times.
    assert runs == {False: 4, True: 6}


# --- mistakes

GOOD = (X, Y)
ALONE = np.arange(9) // 8
SERIES = np.stack([X, X, X], 1)


@pytest.mark.parametrize(
    ("model", "train", "test", "options", "line"),
    [
        (small(), (X, Y * 0), GOOD, {}, "all training labels are 0: there is nothing"),
        (small(), GOOD, (X, Y + 1), {}, "lacks the test label 3: it holds 0, 1, 2"),
        (small(), GOOD, (X, np.full(90, b"\xe9")), {}, "whole numbers or text, got b'\\xe9'"),
        (small(), GOOD, (X, Y[:9]), {}, "the numbers of rows differ: x 90, labels 9"),
        (small(), GOOD, X, {}, "the data hold no labels: name them with --labels"),
        (small(), (X, Y + 0.5), GOOD, {}, "labels are whole numbers or text, got 0.5"),
        (small(), (X, np.stack([Y, Y], 1)), GOOD, {}, "per sample, the labels are [32, 2]"),
        (small(), (X[:9], ALONE), (X, Y * 0), {}, "only one training sample has the label"),
        (small(), (X[:9], Y[:9] > 0), (X, Y > 0), {"validation": 0.1}, "9 training samples, 1 of"),
        (
            small("l = Gemm(h, w, c) y = Relu(l)"),
            GOOD,
            GOOD,
            {},
            "no linear layer produces the output 'y', which comes from Relu 'y': name the tensor",
        ),
        (
            small("y = MatMul(h, g)", trunk=f"{TRUNK} g = Transpose(h)", output="float[N, N] y"),
            GOOD,
            GOOD,
            {},
            "no linear layer produces the output 'y', which comes from MatMul 'y'",
        ),
        (small(), GOOD, GOOD, {"features": "hh"}, "computes no tensor 'hh': did you mean h?"),
        (small(), GOOD, GOOD, {"features": "w"}, "computes no tensor 'w'"),
        (small(), GOOD, GOOD, {"features": "y"}, "features 'y' are not in front of the output 'y'"),
        (small(), GOOD, GOOD, {"features": "z"}, "no steered activation is in front of the"),
        (
            small("y = Gemm(z, w, c)", output="float[N, 2] y, float[N, 4] h"),
            GOOD,
            GOOD,
            {},
            "no steered activation is in front of the features 'z'",
        ),
        (
            small("n = ReduceSum<keepdims = 0>(h, middle) y = Gemm(h, w, c)"),
            GOOD,
            GOOD,
            {"features": "n"},
            "the features 'n' are float32[32]: expected the same number of floating-point numbers",
        ),
        (
            small("m = ReduceMean<axes = [1], keepdims = 0>(h) y = MatMul(m, w)", shape="N, T, 3"),
            (SERIES, Y),
            (SERIES[:, :2], Y),
            {"features": "h"},
            "'h' of a sample are [3, 4] in the training set and [2, 4] in the test set",
        ),
        (
            small(
                "p = Concat<axis = 1>(h, h) q = Reshape(p, f) y = MatMul(q, w)",
                trunk=f"f = Constant<value = int64[3] {{-1, 2, 4}}>() {TRUNK}",
                output="float[N, 2, 2] y",
            ),
            GOOD,
            GOOD,
            {},
            "the linear layer is applied to a sequence or a map",
        ),
        (
            small("n = Log(z) q = Add(n, h) y = Gemm(q, w, c)"),
            GOOD,
            GOOD,
            {},
            "the features 'q' hold NaN or infinity at beta 1",
        ),
        (small(), GOOD, GOOD, {"seeds": 0}, "seeds must be at least one, all different"),
        (small(), GOOD, GOOD, {"seeds": [2**32]}, "all different, from 0 to 2**32 - 1"),
        (small(), GOOD, GOOD, {"seeds": [1, 1]}, "seeds must be at least one, all different"),
        (small(), GOOD, GOOD, {"seeds": "many"}, "seeds must be a number of seeds or a list"),
        (small(), GOOD, GOOD, {"validation": 1}, "validation must lie between 0 and 1, got 1"),
        (small(), GOOD, GOOD, {"coeff": 2}, "coeff must lie in [0, 1]"),
        (small(), GOOD, GOOD, {"output": "x.onnx"}, "output needs a model that is a path"),
    ],
)
def test_mistakes_are_one_clear_line(model, train, test, options, line):
    with pytest.raises(UsageError) as caught:
        ctonnx.probe(model, train, test, [0.5], **options)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_features_that_steering_has_made_are_refused():
    """At β = 1 there are none: the original gives the features there."""
    trunk = 'h = com.microsoft.FusedGemm<activation = "Relu">(x, a)'
    trunk += ' g = com.microsoft.FusedGemm<activation = "Relu">(h, q)'
    trunk = f"q = MatMul(w, v) {trunk}"
    model = small("y = MatMul(g, w)", trunk=trunk, opset='17, "com.microsoft" : 1')
    assert ctonnx.probe(model, GOOD, GOOD, [0.5]).features == "g"
    with pytest.raises(
        UsageError, match="features 'g_before_activation' exist in the steered model only"
    ):
        ctonnx.probe(model, GOOD, GOOD, [0.5], features="g_before_activation")


def test_labels_in_a_file_are_of_one_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, array in {"x": X, "y": Y, "z": X[::-1], "t": Y[::-1]}.items():
        np.save(f"{name}.npy", array)
    for labels in "y.npy", Path("y.npy"):
        with pytest.raises(UsageError, match=r"y.npy holds the training labels: name those of"):
            ctonnx.probe(small(), "x.npy", "z.npy", [0.5], labels=labels)
    options = {"labels": "y.npy", "test_labels": "t.npy"}
    both = ctonnx.probe(small(), "x.npy", "z.npy", [0.5], **options)
    plain = ctonnx.probe(small(), GOOD, GOOD, [0.5])
    assert [p.test for p in both.points] == [p.test for p in plain.points]


def test_data_in_another_order_are_refused():
    orders = iter([Y, Y[::-1]])
    with pytest.raises(UsageError, match="come in another order when read again"):
        ctonnx.probe(small(), lambda: iter([(X, next(orders))]), GOOD, [0.5])


def test_fits_that_do_not_converge_are_counted(monkeypatch):
    monkeypatch.setattr(fit, "MAX_ITERATIONS", 2)
    result = ctonnx.probe(small(), GOOD, GOOD, [0.5], seeds=2)
    assert "6 fits of a head did not converge in 2 steps" in result.notes


def test_scikit_learn_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ctonnx\[sweep\]'"):
        ctonnx.probe(small(), GOOD, GOOD, [0.5])


# --- the command line


def command(*arguments, folder):
    return subprocess.run(
        ["ctonnx", "probe", *map(str, arguments)], cwd=folder, capture_output=True, text=True
    )


def test_the_command_writes_the_model_and_the_points(tmp_path):
    onnx.save(small(), tmp_path / "m.onnx")
    np.savez(tmp_path / "a.npz", x=X, kind=Y, other=Y)
    np.savez(tmp_path / "b.npz", x=X, label=Y)
    data = ("--train", "a.npz", "--test", "b.npz", "--labels", "kind", "--test-labels", "label")
    options = (*data, "--beta", "0.5:0.9:0.2", "--points", "p.csv")
    done = command("m.onnx", *options, folder=tmp_path)
    assert (done.returncode, done.stderr.splitlines()) == (
        0,
        ["wrote p.csv", "steered on the fly: 1 activations, 0 skipped"],
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "4 features 'h', 3 classes, 90 training and 90 test samples"
    result = ctonnx.probe(small(), GOOD, GOOD, [0.5, 0.7, 0.9])
    expected = f"wrote m.probe.onnx: beta {result.best.beta:g}, test accuracy {result.written:.4f}"
    assert lines[-1] == expected
    assert (tmp_path / "p.csv").read_text() == result.to_csv()
    assert onnx.load(tmp_path / "m.probe.onnx") == result.model
    again = command("m.onnx", *options, "--force", "--json", folder=tmp_path)
    assert json.loads(again.stdout) == {
        "schema_version": 1,
        "output": "m.probe.onnx",
        **result.document(),
    }


BOTH = ("--train", "a.npz", "--test", "a.npz")


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (("m.onnx", "--train", "a.npz"), 2, "Missing option '--test'"),
        (("-", *BOTH), 2, "a probe takes the model's file"),
        (("no.onnx", *BOTH), 3, "no.onnx: no such file"),
        (("m.onnx", "--train", "b.npz", "--test", "a.npz"), 3, "b.npz: no such file"),
        (("m.onnx", *BOTH, "--points", "p.txt"), 2, "p.txt: results"),
        (("m.onnx", *BOTH, "-o", "b.onnx"), 2, "exists already"),
        (("m.onnx", *BOTH, "-o", "./m.onnx", "--force"), 2, "--output and MODEL name one file"),
        (("m.onnx", *BOTH, "--providers", "Abacus, CPU"), 4, "Abacus is not available"),
        (("m.onnx", *BOTH, "-o", "p.csv", "--points", "./p.csv"), 2, "name one file"),
        (("m.onnx", *BOTH, "--features", "u"), 2, "no tensor 'u'"),
    ],
)
def test_mistakes_end_the_command_with_a_line_and_nothing_written(
    tmp_path, arguments, code, line, monkeypatch, capsys
):
    for name in "m.onnx", "b.onnx":
        onnx.save(small(), tmp_path / name)
    np.savez(tmp_path / "a.npz", x=X, label=Y)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ctonnx", "probe", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    out, err = capsys.readouterr()
    assert line in err
    assert (out, err.count("\n")) == ("", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.onnx", "m.onnx"]
