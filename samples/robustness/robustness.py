"""Accuracy of a steered network under attacks and common corruptions, as a function of β, with
and without recalibration.

`python robustness.py` writes results.csv, table.md and robustness.png: see README.md. Attacks run
on the steered PyTorch model; every accuracy is that of the steered ONNX model.
"""

import argparse
import csv
import importlib.metadata
import io
import itertools
import multiprocessing
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import onnx
import onnxruntime as ort
import resnet
import torch
from pyautoattack import AutoAttack
from scipy import ndimage

import ctonnx
import ctonnx.torch
from ctonnx.measure import intervals, metrics

HERE = Path(__file__).resolve().parent
MODEL = HERE / "resnet.onnx"


class Threat(NamedTuple):
    """A norm and its bound `eps`, chosen so that about one digit in ten stays right at β = 1.

    With the bound `limit` no digit may stay right.
    """

    norm: str
    eps: float
    limit: float


THREATS = {"linf": Threat("Linf", 0.06, 0.5), "l2": Threat("L2", 0.8, 8.0)}
TITLES = {"linf": "L∞, ε = 0.06", "l2": "L2, ε = 0.8", "mixed": "corruptions, mixed"}


class Budget(NamedTuple):
    """The size of the experiment.

    Attributes:
        betas: β of the attacks.
        grid: β of the sweeps.
        digits: number of digits attacked; the first half chooses β, the second is reported.
        corrupted: number of digits corrupted, split alike.
        iterations: iterations of an attack.
        targets: target classes of the targeted attacks.
        queries: queries of Square.
    """

    betas: tuple
    grid: str
    digits: int
    corrupted: int
    iterations: int
    targets: int
    queries: int


FULL = Budget((0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "0.3:1:0.05", 400, 2000, 100, 3, 1000)
QUICK = Budget((0.8, 1.0), "0.8:1:0.1", 32, 220, 8, 2, 20)
SEVERITIES = 5
KINDS, HALVES = ("plain", "recalibrated"), ("choose", "report")

# The held-out digits that recalibration gets, without labels: none of them is reported.
CALIBRATION = slice(400, 528)


class Variant(NamedTuple):
    """A steered network.

    Attributes:
        kind: "plain" or "recalibrated", or "other": the plain network from another seed.
        beta: its β.
    """

    kind: str
    beta: float


def variants(budget):
    """The networks that are attacked; at β = 1 recalibration changes nothing."""
    kinds = {beta: ("plain", "recalibrated")[: 1 + (beta < 1)] for beta in budget.betas}
    return [Variant(kind, beta) for beta in budget.betas for kind in kinds[beta]]


def held_out(count):
    """The first `count` held-out digits, which no network saw: images from 0 to 1, and labels."""
    arrays = np.load(HERE.parent / "sweep" / "mnist_test.npz")
    return arrays["image"][:count] / np.float32(255), arrays["label"][:count].astype(np.int64)


def calibration(kind):
    """What the networks of a kind are calibrated on; None for plain ones."""
    return held_out(CALIBRATION.stop)[0][CALIBRATION] if kind == "recalibrated" else None


def steered(variant):
    """The ModelProto of a plain or recalibrated network."""
    model = onnx.load(MODEL)
    return ctonnx.patch(model, variant.beta, calibration=calibration(variant.kind))


def in_torch(variant):
    """The PyTorch module with the weights of a network, not yet steered."""
    if variant.kind == "other":
        return resnet.restored(HERE / "other.pt")
    return resnet.loaded(steered(variant))


# Attacks. Each runs in its own process, with one thread and a fixed seed.


def attack(job):
    """The adversarial examples of one attack.

    Args:
        job: the attack ("white-box", "square", "transfer" or "limit"), the name of a threat, the
            Variant, and the Budget.

    Returns:
        float32 images: an example that fools the network, or the digit itself if none does. For
        "transfer", the example of the highest loss.
    """
    kind, name, variant, budget = job
    torch.set_num_threads(1)
    torch.manual_seed(0)  # Only a part of the library seeds itself.
    threat = THREATS[name]
    images, labels = map(torch.from_numpy, held_out(budget.digits))
    attacks = {
        "white-box": ["apgd-ce", "apgd-t", "fab-t"],
        "square": ["square"],
        "transfer": ["apgd-ce"],
        "limit": ["apgd-ce", "apgd-t"],
    }[kind]
    model = in_torch(variant)
    eps = threat.limit if kind == "limit" else threat.eps
    with ctonnx.torch.steer(model, variant.beta):
        auto = AutoAttack(
            model, norm=threat.norm, eps=eps, seed=0, version="custom", attacks=attacks
        )
        for method in auto.apgd, auto.apgd_targeted, auto.fab:
            method.n_restarts, method.n_iter = 1, budget.iterations
        auto.apgd_targeted.n_target_classes = auto.fab.n_target_classes = budget.targets
        auto.square.n_queries = budget.queries
        if kind == "transfer":
            auto.apgd.loss = "ce"
            examples = auto.apgd.perturb(images, labels, best_loss=True)
        else:
            examples, _ = auto.run_standard_evaluation(images, labels, batch_size=len(images))
    return checked(examples.detach().numpy(), images.numpy(), threat.norm, eps)


def checked(examples, images, norm, eps):
    """The examples; raises ValueError unless they lie within `eps` of the images and in [0, 1]."""
    difference = (examples - images).reshape(len(examples), -1).astype(np.float64)
    size = np.abs(difference).max() if norm == "Linf" else np.linalg.norm(difference, axis=1).max()
    if not (size <= eps * (1 + 1e-5) and examples.min() >= 0 and examples.max() <= 1):
        raise ValueError(f"examples leave the {norm} ball of {eps:g}, or [0, 1]: {size:g}")
    return examples


class Network:
    """A steered network, in ONNX Runtime and in PyTorch."""

    def __init__(self, variant):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ctonnx.session(steered(variant), session_options=options)
        self.model, self.beta = in_torch(variant), variant.beta

    def right(self, images, labels):
        """Whether ONNX Runtime is right on each image; how often PyTorch disagrees with that."""
        right = self.session.run(["logits"], {"image": images})[0].argmax(1) == labels
        with ctonnx.torch.steer(self.model, self.beta), torch.no_grad():
            again = self.model(torch.from_numpy(images)).numpy().argmax(1) == labels
        return right, int((right != again).sum())


def attacked(budget, pool):
    """Rows of results per threat, kind of network, half and β; and the most digits right under the
    bound `limit`."""
    images, labels = held_out(budget.digits)
    targets = variants(budget)
    sources = [*targets, Variant("other", 1.0)]
    few = budget._replace(digits=min(budget.digits, 100))
    jobs = [(k, t, v, budget) for k in ("white-box", "square") for t in THREATS for v in targets]
    jobs += [("transfer", t, v, budget) for t in THREATS for v in sources]
    limits = [("limit", t, v, few) for t in THREATS for v in targets]
    examples = dict(zip(jobs + limits, pool.map(attack, jobs + limits), strict=True))
    networks, rows = {v: Network(v) for v in targets}, []
    survivors = max(
        int(networks[job[2]].right(examples[job], labels[: few.digits])[0].sum()) for job in limits
    )
    for threat in THREATS:
        verdicts_at = {}
        for target, network in networks.items():
            against = {"clean": images}
            for kind in "white-box", "square":
                against[kind] = examples[kind, threat, target, budget]
            for source in sources:
                if source != target:
                    against[source] = examples["transfer", threat, source, budget]
            verdicts = {name: network.right(x, labels) for name, x in against.items()}
            right = {name: verdict for name, (verdict, _) in verdicts.items()}
            verdicts_at[target] = right, sum(count for _, count in verdicts.values())
        for kind, half, beta in itertools.product(KINDS, HALVES, budget.betas):
            middle = budget.digits // 2
            part = slice(middle) if half == "choose" else slice(middle, budget.digits)
            right, differ = verdicts_at[Variant(kind if beta < 1 else "plain", beta)]
            original = _all(verdicts_at[Variant("plain", 1.0)][0])[part]
            shares = {name: float(values[part].mean()) for name, values in right.items()}
            white, square = shares["white-box"], shares["square"]
            other = shares[Variant("other", 1.0)]
            elsewhere = min(v for k, v in shares.items() if getattr(k, "kind", "other") != "other")
            missed = (_all(right) != (right["white-box"] & right["clean"]))[part].sum()
            rows.append(
                _row(threat, kind, half, beta, _all(right)[part], original)
                | {
                    "clean": shares["clean"],
                    "white_box": white,
                    "square": square,
                    "other_network": other,
                    "other_betas": elsewhere,
                    "missed": int(missed),
                    "torch_differs": differ,
                    "masked": "yes" if white > min(square, elsewhere, other) else "no",
                }
            )
    return rows, survivors


def _all(right):
    """Whether each digit stays right under all attacks."""
    return np.logical_and.reduce(list(right.values()))


def _row(threat, kind, half, beta, right, original):
    """A row with the accuracy, and the gain over the original on the same digits."""
    metric = metrics.metric_named("accuracy")
    one, other = (np.asarray(side, np.float64)[:, None] for side in (right, original))
    gain, low, high = intervals.gain(metric, one, other)
    return {
        "threat": threat,
        "kind": kind,
        "half": half,
        "beta": beta,
        "digits": len(right),
        "accuracy": metric.value_of(one),
        "error": intervals.standard_error(metric, one),
        "gain": gain,
        "low": low,
        "high": high,
    }


# Corruptions: functions of images, a severity from 0 to 4 and a random generator. Their strengths
# were set once, so that the original's accuracy falls from nearly 1 to a low value.


def _affine(images, severity, _, matrix):
    """Transform images about their centre by a 2 by 2 matrix."""
    linear = np.eye(4)
    linear[2:, 2:] = matrix(severity)
    middle = np.array([0, 0, 13.5, 13.5])
    return ndimage.affine_transform(images, linear, middle - linear @ middle, order=1)


CORRUPTIONS = {
    "noise": lambda x, s, rng: x + rng.normal(scale=(0.05, 0.1, 0.15, 0.2, 0.25)[s], size=x.shape),
    "shot": lambda x, s, rng: rng.poisson(x * (most := (4, 2, 1, 0.7, 0.5)[s])) / most,
    "impulse": lambda x, s, rng: np.where(
        rng.random(x.shape) < (0.02, 0.05, 0.1, 0.15, 0.25)[s], rng.integers(0, 2, x.shape), x
    ),
    "blur": lambda x, s, _: ndimage.gaussian_filter(x, (0.75, 1, 1.25, 1.5, 2)[s], axes=(2, 3)),
    "motion": lambda x, s, _: ndimage.uniform_filter1d(x, (3, 5, 7, 9, 11)[s], axis=3),
    "brightness": lambda x, s, _: x + (0.02, 0.05, 0.08, 0.1, 0.15)[s],
    "contrast": lambda x, s, _: (
        (m := x.mean((2, 3), keepdims=True)) + (x - m) * (0.9, 0.8, 0.7, 0.6, 0.5)[s]
    ),
    "rotation": lambda x, s, _: ndimage.rotate(
        x, (10, 20, 30, 40, 50)[s], axes=(2, 3), reshape=False, order=1
    ),
    "shear": partial(_affine, matrix=lambda s: [[1, (0.2, 0.3, 0.4, 0.5, 0.6)[s]], [0, 1]]),
    "scale": partial(_affine, matrix=lambda s: np.eye(2) / (0.9, 0.8, 0.7, 0.6, 0.5)[s]),
    "translation": lambda x, s, _: ndimage.shift(x, (0, 0, s + 1, -s - 1), order=0),
}


def corrupted(kind, images):
    """The images with a corruption, cycling through the severities.

    Each digit occurs once, so that intervals over digits are valid. "mixed" cycles through the
    corruptions too.
    """
    if kind == "clean":
        return images
    if kind == "mixed":
        every = np.stack([corrupted(name, images) for name in CORRUPTIONS])
        index = np.arange(len(images))
        return every[index // SEVERITIES % len(CORRUPTIONS), index]
    rng, out = np.random.default_rng(0), np.empty_like(images)
    for severity in range(SEVERITIES):
        part = slice(severity, None, SEVERITIES)
        out[part] = np.clip(CORRUPTIONS[kind](images[part], severity, rng), 0, 1)
    return out


def swept(job):
    """Rows of results for one corruption and kind of network, by `ctonnx.sweep` on each half of the
    digits."""
    corruption, kind, budget = job
    images, labels = held_out(budget.corrupted)
    images, middle, rows = corrupted(corruption, images), len(labels) // 2, []
    for half, part in zip(HALVES, (slice(middle), slice(middle, None)), strict=True):
        data = images[part], labels[part]
        result = ctonnx.sweep(
            MODEL, data, budget.grid, batch_size=50, calibration=calibration(kind)
        )
        for point in result.points:
            rows.append(
                {
                    "threat": corruption,
                    "kind": kind,
                    "half": half,
                    "beta": point.beta,
                    "digits": point.samples,
                    "accuracy": point.value,
                    "error": point.error,
                    "gain": point.gain,
                    "low": point.gain_low,
                    "high": point.gain_high,
                }
            )
    return rows


# Output.


def chosen(rows, threat, kind):
    """The row to report: at the β that is best on the other half, of equals the nearest to 1."""
    own = [row for row in rows if (row["threat"], row["kind"]) == (threat, kind)]
    half = [row for row in own if row["half"] == "choose"]
    best = max(half, key=lambda row: (row["accuracy"], row["beta"]))
    return next(r for r in own if r["half"] == "report" and r["beta"] == best["beta"])


def _report(rows, threat, kind):
    wanted = (threat, kind, "report")
    return [row for row in rows if (row["threat"], row["kind"], row["half"]) == wanted]


def _gain(row):
    if row["beta"] == 1:
        return "0"
    return f"{row['gain']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def _verdict(row):
    if row["low"] > 0:
        return "gain, but gradients are masked" if row.get("masked") == "yes" else "gain"
    return "loss" if row["high"] < 0 else "no gain" if row["beta"] == 1 else "neither"


def table(rows, survivors, budget, seconds):
    """The text of table.md."""
    lines = [
        "| threat | network | original | β chosen | accuracy there | gain (95 %) | verdict "
        "| clean there |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for threat, kind in itertools.product([*THREATS, "mixed", "clean", *CORRUPTIONS], KINDS):
        row, original = chosen(rows, threat, kind), _report(rows, threat, kind)[-1]
        clean = next(r for r in _report(rows, "clean", kind) if r["beta"] == row["beta"])
        lines.append(
            f"| {TITLES.get(threat, threat)} | {kind} | {original['accuracy']:.3f} "
            f"| {row['beta']:g} | {row['accuracy']:.3f} | {_gain(row)} | {_verdict(row)} "
            f"| {clean['accuracy']:.3f} |"
        )
    for threat in THREATS:
        own = [_report(rows, threat, kind) for kind in KINDS]
        lines += [
            f"\n{TITLES[threat]}, {own[0][0]['digits']} digits:\n",
            "| β | network | clean | white-box | Square | other network's | other β's | all "
            "| gain (95 %) | masked | missed | PyTorch differs |",
            "|-|-|-|-|-|-|-|-|-|-|-|-|",
        ]
        for row in itertools.chain(*zip(*own, strict=True)):
            if row["beta"] == 1 and row["kind"] != "plain":
                continue
            kind = "original" if row["beta"] == 1 else row["kind"]
            names = "clean", "white_box", "square", "other_network", "other_betas", "accuracy"
            numbers = " | ".join(f"{row[name]:.3f}" for name in names)
            lines.append(
                f"| {row['beta']:g} | {kind} | {numbers} | {_gain(row)} | {row['masked']} "
                f"| {row['missed']} | {row['torch_differs']} |"
            )
    limits = " and ".join(f"{t.limit:g} ({t.norm})" for t in THREATS.values())
    lines.append(
        f"\nWith ε {limits} at most {survivors} of {min(budget.digits, 100)} digits stay right at "
        f"any β.\n\n{machine()}; {seconds / 60:.1f} minutes."
    )
    return "\n".join(lines) + "\n"


def machine():
    """The machine and the package versions, on which the numbers depend."""
    names = "ctonnx", "numpy", "onnxruntime", "pyautoattack", "scipy", "torch"
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    cpu = next((x.split(":")[1].strip() for x in text.splitlines() if "model name" in x), "")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    python = f"Python {platform.python_version()}"
    return f"{cpu or platform.machine()}, {os.cpu_count()} cores; {python}, {versions}"


def draw(rows, path):
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3.6), sharey=True, layout="constrained")
    for axis, threat in zip(axes, ["clean", *THREATS, "mixed"], strict=True):
        for kind, colour in zip(KINDS, ("0.45", "C0"), strict=True):
            own = _report(rows, threat, kind)
            betas = [row["beta"] for row in own]
            accuracy = np.array([row["accuracy"] for row in own])
            reach = 1.96 * np.array([row["error"] for row in own])
            reach = np.minimum(reach, [accuracy, 1 - accuracy])  # bars stay within 0 to 1
            style = {"color": colour, "marker": ".", "capsize": 2, "label": kind}
            axis.errorbar(betas, accuracy, reach, **style)
            if threat in THREATS:
                for name, line in {"square": "--", "other_network": ":"}.items():
                    axis.plot(betas, [row[name] for row in own], line, color=colour, lw=1)
        axis.set(title=TITLES.get(threat, threat), xlabel="β", ylim=(0, 1))
        axis.grid(alpha=0.3)
    axes[0].plot([], [], "k--", lw=1, label="Square alone")
    axes[0].plot([], [], "k:", lw=1, label="other network's alone")
    axes[0].set_ylabel("accuracy")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="run a small part, in under a minute")
    parser.add_argument(
        "--out", type=Path, help="folder to write to; default: here, or quick/ with --quick"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    budget, start = QUICK if args.quick else FULL, time.monotonic()
    out = args.out or (HERE / "quick" if args.quick else HERE)
    out.mkdir(parents=True, exist_ok=True)
    # Spawn, since PyTorch's threads do not survive a fork.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        conditions = "clean", *CORRUPTIONS, "mixed"
        sweeps = [(each, kind, budget) for each in conditions for kind in KINDS]
        later = pool.map(swept, sweeps)
        rows, survivors = attacked(budget, pool)
        rows += [row for part in later for row in part]
    # Round once, so that the table and the plot agree with the file.
    rows = [
        {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in r.items()} for r in rows
    ]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (out / "results.csv").write_text(buffer.getvalue())
    text = table(rows, survivors, budget, time.monotonic() - start)
    (out / "table.md").write_text(text)
    draw(rows, out / "robustness.png")
    print(text, end="")


if __name__ == "__main__":
    main()
