"""Metrics: their values as scikit-learn gives them, their errors, and what does not fit."""

from dataclasses import replace

import numpy as np
import pytest

from ctonnx.errors import UsageError
from ctonnx.measure import intervals, metrics
from ctonnx.measure.intervals import paired_difference
from ctonnx.measure.metrics import metric_named
from ctonnx.model.endings import LOG_PROBABILITIES, PROBABILITIES
from ctonnx.model.endings import LOGITS as LOGIT

sklearn = pytest.importorskip("sklearn.metrics")
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(scale=2, size=(200, 5)).astype(np.float32)
LABELS = RNG.integers(0, 5, 200)
OTHER = LOGITS + RNG.normal(scale=1, size=LOGITS.shape).astype(np.float32)


def softmax(logits):
    exp = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def value(name, outputs, labels=None, original=None, parts=7, kind=LOGIT):
    """The value of a metric that gets the samples in several batches."""
    metric = replace(metric_named(name), kind=kind)

    def split(array):
        return [None] * parts if array is None else np.array_split(array, parts)

    batches = zip(split(outputs), split(labels), split(original), strict=True)
    return metric.value_of(np.concatenate([metric.measure(*batch) for batch in batches]))


CASES = {
    "accuracy": sklearn.accuracy_score(LABELS, LOGITS.argmax(1)),
    "top2": sklearn.top_k_accuracy_score(LABELS, LOGITS, k=2),
    "f1": sklearn.f1_score(LABELS, LOGITS.argmax(1), average="macro"),
    "nll": sklearn.log_loss(LABELS, softmax(LOGITS)),
}


@pytest.mark.parametrize("name", CASES)
def test_classification_is_scikit_learns(name):
    assert value(name, LOGITS, LABELS) == pytest.approx(CASES[name], rel=1e-6)
    # Labels as floating-point numbers, in a column; scores with the dimensions of an image.
    spread = LOGITS[:, :, None, None]
    assert value(name, spread, LABELS[:, None] * 1.0) == pytest.approx(CASES[name], rel=1e-6)


def test_of_equal_scores_the_first_is_chosen():
    scores, labels = np.float32([[1, 1, 0]] * 3), np.array([0, 1, 2])
    for name, expected in ("accuracy", 1 / 3), ("top1", 1 / 3), ("top2", 2 / 3):
        assert value(name, scores, labels, parts=1) == pytest.approx(expected)


def test_probabilities_and_logits():
    probabilities = softmax(LOGITS).astype(np.float32)
    # Rounded ones, which do not sum to 1, are taken in proportion.
    for given in (probabilities, probabilities * 1.05):
        found = value("nll", given, LABELS, kind=PROBABILITIES)
        assert found == pytest.approx(CASES["nll"], rel=1e-5)
    logs = np.log(softmax(LOGITS))
    found = value("nll", logs, LABELS, kind=LOG_PROBABILITIES)
    assert found == pytest.approx(CASES["nll"])
    # Logits that sum to 1 are logits all the same.
    found = value("nll", np.float32([[0.25, 0.75]]), np.array([0]), parts=1)
    assert found == pytest.approx(np.log(1 + np.exp(0.5)))


def test_nll_has_no_bound():
    label = np.array([1])
    for gap in (30, 500, 1e4):
        assert value("nll", np.float32([[gap, 0]]), label, parts=1) == pytest.approx(gap)
    assert value("nll", np.float32([[1e4, 0]]), np.array([0]), parts=1) == 0
    rare = np.float32([[1, 1e-30]])
    found = value("nll", rare, label, parts=1, kind=PROBABILITIES)
    assert found == pytest.approx(30 * np.log(10), rel=1e-6)
    # A probability of 0 counts as the smallest number that the type holds.
    for dtype, smallest in (np.float16, 2.0**-24), (np.float32, 2.0**-149), (float, 5e-324):
        sure = np.array([[1, 0]], dtype)
        found = value("nll", sure, label, parts=1, kind=PROBABILITIES)
        assert found == pytest.approx(-np.log(smallest))
        found = value("nll", sure, np.array([0]), parts=1, kind=PROBABILITIES)
        assert found == pytest.approx(0, abs=1e-7)


def test_classes_that_are_ruled_out():
    """By a logit of minus infinity, they add nothing."""
    masked = np.float32([[0, 0, -np.inf]])
    assert value("entropy", masked, parts=1) == pytest.approx(np.log(2))
    assert value("kl", masked, None, masked, parts=1) == 0


def test_calibration_error_by_hand():
    probabilities = np.float32([[0.95, 0.05], [0.95, 0.05], [0.65, 0.35], [0.35, 0.65]])
    labels = np.array([0, 1, 0, 0])
    expected = (2 * abs(0.95 - 0.5) + 2 * abs(0.65 - 0.5)) / 4
    found = value("ece", probabilities, labels, parts=2, kind=PROBABILITIES)
    assert found == pytest.approx(expected, rel=1e-6)
    sure = np.float32([[1, 0], [0, 1]])
    found = value("ece", sure, np.array([0, 1]), parts=1, kind=PROBABILITIES)
    assert found == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_miou_is_the_mean_jaccard_over_pixels(channels_last):
    scores = RNG.normal(size=(12, 3, 6, 5)).astype(np.float32)
    masks = RNG.integers(0, 3, (12, 6, 5))
    masks[0, 0] = 255
    seen = masks != 255
    expected = sklearn.jaccard_score(masks[seen], scores.argmax(1)[seen], average="macro")
    given = scores.transpose(0, 2, 3, 1) if channels_last else scores
    assert value("miou", given, masks, parts=5) == pytest.approx(expected, rel=1e-9)


def test_regression_is_scikit_learns():
    y = RNG.normal(size=(100, 2))
    p = (y + RNG.normal(scale=0.3, size=y.shape)).astype(np.float32)
    assert value("mse", p, y) == pytest.approx(sklearn.mean_squared_error(y, p))
    assert value("mae", p, y) == pytest.approx(sklearn.mean_absolute_error(y, p))
    assert value("r2", p, y) == pytest.approx(sklearn.r2_score(y, p))
    # (N, 1) outputs and (N,) labels go together.
    expected = sklearn.r2_score(y[:, 0], p[:, 0])
    assert value("r2", p[:, :1], y[:, 0]) == pytest.approx(expected)


def test_without_labels():
    before, after = softmax(LOGITS), softmax(OTHER)
    agreement = (LOGITS.argmax(1) == OTHER.argmax(1)).mean()
    assert value("agreement", OTHER, None, LOGITS) == agreement
    entropy = -(after * np.log(after)).sum(1).mean()
    assert value("entropy", OTHER) == pytest.approx(entropy, rel=1e-5)
    kl = (before * np.log(before / after)).sum(1).mean()
    assert value("kl", OTHER, None, LOGITS) == pytest.approx(kl, rel=1e-5)
    assert value("kl", LOGITS, None, LOGITS) == 0
    # Pixel by pixel for segmentation.
    planes = (
        LOGITS.reshape(2, 100, 5).transpose(0, 2, 1),
        OTHER.reshape(2, 100, 5).transpose(0, 2, 1),
    )
    assert value("agreement", planes[1], None, planes[0], parts=1) == pytest.approx(agreement)


def test_a_function_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def cost(outputs, labels): return abs(outputs['y'][:, 0] - labels)\n"
        "cost.higher_is_better = False\n"
        "def one(outputs, labels): return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    metric = metric_named("mine:cost")
    assert not metric.higher_is_better
    measured = metric.measure({"y": LOGITS}, LABELS, None)
    assert metric.value_of(measured) == pytest.approx(np.abs(LOGITS[:, 0] - LABELS).mean())
    with pytest.raises(UsageError, match=r"mine:one: gave float64\[\], expected a number per"):
        metric_named("mine:one").measure({"y": LOGITS}, LABELS, None)


MISFITS = [
    ("accuracy", LOGITS[:, :1], LABELS, "accuracy needs a score per class, (N, classes)"),
    ("accuracy", LOGITS, None, "accuracy needs labels, and none were found"),
    ("accuracy", LOGITS, LABELS + 1, "label 5 is out of range: the output has classes 0 to 4"),
    ("accuracy", LOGITS, LABELS - 1, "label -1 is out of range"),
    (
        "accuracy",
        LOGITS,
        np.append(LABELS[:-1] * 1.0, 2.5),
        "accuracy needs whole numbers as labels, got 2.5",
    ),
    ("nll", LOGITS, np.stack([LABELS, LABELS], 1), "nll needs one label per sample"),
    ("top5", LOGITS, LABELS, "top5 is always 1: the output has 5 classes"),
    ("f1", LOGITS, np.array(["a"] * 200), "f1 needs whole numbers as labels"),
    ("miou", LOGITS, LABELS, "miou needs scores (N, classes, H, W) and labels (N, H, W)"),
    ("mse", LOGITS, LABELS, "mse needs a number per output: the output is float32[200,5]"),
    ("entropy", LOGITS[:, 0], None, "entropy needs scores of classes in axis 1"),
]


@pytest.mark.parametrize(("name", "outputs", "labels", "line"), MISFITS)
def test_what_does_not_fit_is_one_clear_line(name, outputs, labels, line):
    with pytest.raises(UsageError) as caught:
        metric_named(name).measure(outputs, labels, outputs)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_mistakes():
    with pytest.raises(UsageError, match="no metric 'precision': choose among accuracy, f1"):
        metric_named("precision")
    assert np.isnan(value("r2", LOGITS[:, :1], np.ones(200)))


def test_nan_is_never_a_value():
    broken = LOGITS.copy()
    broken[3, 2] = np.nan
    for name in ("accuracy", "f1", "ece"):
        assert np.isnan(value(name, broken, LABELS))


@pytest.mark.parametrize("name", ["accuracy", "f1", "nll", "ece", "r2"])
def test_errors_are_those_of_resampling(name):
    """The standard error, and that of a paired difference, agree with the bootstrap."""
    metric, rng = metric_named(name), np.random.default_rng(1)
    labels, sides = LABELS, (LOGITS, OTHER)
    if name == "r2":
        labels = RNG.normal(size=200)
        sides = [labels[:, None] + RNG.normal(scale=s, size=(200, 1)) for s in (0.5, 0.6)]
    one, other = (metric.measure(np.float64(side), labels, None) for side in sides)
    draws = [rng.integers(0, 200, 200) for _ in range(300)]
    values = np.array([[metric.value_of(side[d]) for side in (one, other)] for d in draws])
    assert intervals.standard_error(metric, one) == pytest.approx(values[:, 0].std(), rel=0.4)
    difference, error, _ = paired_difference(metric, one, other)
    sign = 1 if metric.higher_is_better else -1
    assert difference == sign * (metric.value_of(one) - metric.value_of(other))
    assert error == pytest.approx((values[:, 0] - values[:, 1]).std(), rel=0.4)
    assert paired_difference(metric, one, one)[:2] == (0, 0)


def test_intervals_hold_what_they_promise():
    """Of 95 % intervals of a mean about 95 % hold the truth."""
    metric, rng = metrics.Metric("mean", None), np.random.default_rng(2)
    held = 0
    for _ in range(1000):
        one, other = rng.normal(size=(2, 20, 1))
        gain, low, high = intervals.gain(metric, one, other)
        assert gain == paired_difference(metric, one, other)[0]
        held += low <= 0 <= high
    assert 930 <= held <= 970


def test_one_sample_tells_a_gain_and_not_how_sure_it_is():
    metric, one, other = metrics.Metric("mean", None), np.ones((1, 1)), np.zeros((1, 1))
    np.testing.assert_equal(intervals.gain(metric, one, other), (1, np.nan, np.nan))
    assert intervals.gain(metric, one, one) == (0, 0, 0)
