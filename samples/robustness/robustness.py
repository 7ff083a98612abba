"""Accuracy of a steered network under attacks and common corruptions, against β.

`python robustness.py` writes results.csv, table.md and robustness.png: see README.md. Attacks are
made on the steered PyTorch model; every accuracy is that of the steered ONNX model.
"""

import argparse
import csv
import importlib.metadata
import io
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
    """A norm and its bound, chosen so that about one digit in ten stays right at β = 1; with the
    bound `limit` nothing may."""

    norm: str
    eps: float
    limit: float


THREATS = {"linf": Threat("Linf", 0.06, 0.5), "l2": Threat("L2", 0.8, 8.0)}
TITLES = {"linf": "L∞, ε = 0.06", "l2": "L2, ε = 0.8", "mixed": "corruptions, mixed"}


class Budget(NamedTuple):
    """How much is done: β of the attacks and of the sweeps, digits attacked (the first half to
    choose β on, the second to report), and the attacks' iterations, target classes and queries."""

    betas: tuple
    grid: str
    digits: int
    corrupted: int
    iterations: int
    targets: int
    queries: int


FULL = Budget((0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "0.5:1:0.02", 400, 2000, 100, 3, 1000)
QUICK = Budget((0.8, 1.0), "0.8:1:0.1", 32, 220, 8, 2, 20)
SEVERITIES = 5


def held_out(count):
    """The first of the digits that nothing here was trained on: images from 0 to 1 and labels."""
    held = np.load(HERE.parent / "sweep" / "mnist_test.npz")
    return held["image"][:count] / np.float32(255), held["label"][:count].astype(np.int64)


# Attacks. Each runs in a process of its own, with one thread and a fixed seed.


def attack(job):
    """The examples that one attack makes of the digits.

    Args:
        job: the attack ("white-box", "square", "transfer" or "limit"), the name of a threat, the
            network's weights ("resnet" or "other"), its β, and the Budget.

    Returns:
        float32 images: what fooled the network, and the digit itself where nothing did. Those of
        "transfer" are the ones of highest loss, fooled or not.
    """
    kind, name, weights, beta, budget = job
    torch.set_num_threads(1)
    torch.manual_seed(0)  # One part of the library seeds itself, another does not.
    threat = THREATS[name]
    images, labels = map(torch.from_numpy, held_out(budget.digits))
    attacks = {
        "white-box": ["apgd-ce", "apgd-t", "fab-t"],
        "square": ["square"],
        "transfer": ["apgd-ce"],
        "limit": ["apgd-ce", "apgd-t"],
    }[kind]
    model = resnet.restored(HERE / f"{weights}.pt")
    eps = threat.limit if kind == "limit" else threat.eps
    with ctonnx.torch.steer(model, beta):
        auto = AutoAttack(
            model, norm=threat.norm, eps=eps, seed=0, version="custom", attacks=attacks
        )
        for each in auto.apgd, auto.apgd_targeted, auto.fab:
            each.n_restarts, each.n_iter = 1, budget.iterations
        auto.apgd_targeted.n_target_classes = auto.fab.n_target_classes = budget.targets
        auto.square.n_queries = budget.queries
        if kind == "transfer":
            auto.apgd.loss = "ce"
            made = auto.apgd.perturb(images, labels, best_loss=True)
        else:
            made, _ = auto.run_standard_evaluation(images, labels, batch_size=len(images))
    return checked(made.detach().numpy(), images.numpy(), threat.norm, eps)


def checked(made, images, norm, eps):
    """`made`, if it lies within `eps` of the images and in [0, 1]; else a ValueError."""
    difference = (made - images).reshape(len(made), -1).astype(np.float64)
    size = np.abs(difference).max() if norm == "Linf" else np.linalg.norm(difference, axis=1).max()
    if not (size <= eps * (1 + 1e-5) and made.min() >= 0 and made.max() <= 1):
        raise ValueError(f"examples leave the {norm} ball of {eps:g}, or [0, 1]: {size:g}")
    return made


class Network:
    """The steered network as ONNX in ONNX Runtime, and in PyTorch."""

    def __init__(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        steered = ctonnx.patch(onnx.load(MODEL), 1.0, beta_as="required-input")
        self.session = ctonnx.session(steered, session_options=options)
        self.model = resnet.restored(HERE / "resnet.pt")

    def right(self, images, labels, beta):
        """For each image whether the ONNX model is right, and how many verdicts of PyTorch
        differ."""
        feeds = {"image": images, "beta": np.array(beta, np.float32)}
        right = self.session.run(["logits"], feeds)[0].argmax(1) == labels
        with ctonnx.torch.steer(self.model, beta), torch.no_grad():
            theirs = self.model(torch.from_numpy(images)).numpy().argmax(1) == labels
        return right, int((right != theirs).sum())


def attacked(budget, pool):
    """Rows of results for each threat, half and β; and the most digits that the limit leaves."""
    betas = budget.betas
    images, labels = held_out(budget.digits)
    sources = [("resnet", beta) for beta in betas] + [("other", 1.0)]
    jobs = [
        (kind, t, "resnet", b, budget)
        for kind in ("white-box", "square")
        for t in THREATS
        for b in betas
    ]
    jobs += [("transfer", t, *source, budget) for t in THREATS for source in sources]
    few = budget._replace(digits=min(budget.digits, 100))
    limits = [("limit", t, "resnet", b, few) for t in THREATS for b in betas]
    made = dict(zip(jobs + limits, pool.map(attack, jobs + limits), strict=True))
    network, rows = Network(), []
    survivors = max(
        int(network.right(made[job], labels[: few.digits], job[3])[0].sum()) for job in limits
    )
    for threat in THREATS:
        held = {}
        for beta in betas:
            against = {"clean": images}
            for kind in "white-box", "square":
                against[kind] = made[kind, threat, "resnet", beta, budget]
            for weights, b in sources:
                if (weights, b) != ("resnet", beta):
                    name = "other network" if weights == "other" else f"β {b:g}"
                    against[name] = made["transfer", threat, weights, b, budget]
            verdicts = {name: network.right(x, labels, beta) for name, x in against.items()}
            right = {name: verdict for name, (verdict, _) in verdicts.items()}
            held[beta] = right, sum(count for _, count in verdicts.values())
        for half in "choose", "report":
            part = (
                slice(None, budget.digits // 2)
                if half == "choose"
                else slice(budget.digits // 2, None)
            )
            original = _all(held[1.0][0])[part]
            for beta in betas:
                right, differ = held[beta]
                row = _row(threat, half, beta, _all(right)[part], original)
                of = {name: float(values[part].mean()) for name, values in right.items()}
                white, square = of["white-box"], of["square"]
                others = min(v for name, v in of.items() if name.startswith("β "))
                missed = (_all(right) != (right["white-box"] & right["clean"]))[part].sum()
                row |= {"clean": of["clean"], "white_box": white, "square": square}
                row |= {"other_network": of["other network"], "other_betas": others}
                row |= {"missed": int(missed), "torch_differs": differ}
                masked = white > min(square, others, of["other network"])
                rows.append(row | {"masked": "yes" if masked else "no"})
    return rows, survivors


def _all(right):
    """Whether a digit stays right under everything that was tried on it."""
    return np.logical_and.reduce(list(right.values()))


def _row(threat, half, beta, right, original):
    """A row with the accuracy and the gain over the original on the same digits."""
    metric = metrics.metric_named("accuracy")
    one, other = (np.asarray(side, np.float64)[:, None] for side in (right, original))
    gain, low, high = intervals.gain(metric, one, other)
    row = {"threat": threat, "half": half, "beta": beta, "digits": len(right)}
    row |= {"accuracy": metric.value_of(one), "error": intervals.standard_error(metric, one)}
    return row | {"gain": gain, "low": low, "high": high}


# Corruptions: functions of images, a severity from 0 to 4 and a random generator. How far each goes
# was set once, by the original's accuracy: from nearly all right to few.


def _affine(images, severity, _, matrix):
    """Images through a 2 by 2 matrix about their middle."""
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
    """The images with a corruption, of each severity in turn: no digit is there twice, so that
    intervals over digits are right. "mixed" takes the corruptions in turn too."""
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
    """Rows of results for a kind of corruption: `ctonnx.sweep` on each half of the digits."""
    kind, budget = job
    images, labels = held_out(budget.corrupted)
    images, middle, rows = corrupted(kind, images), len(labels) // 2, []
    for half, part in ("choose", slice(middle)), ("report", slice(middle, None)):
        result = ctonnx.sweep(MODEL, (images[part], labels[part]), budget.grid, batch_size=50)
        for point in result.points:
            row = {"threat": kind, "half": half, "beta": point.beta, "digits": point.samples}
            row |= {"accuracy": point.value, "error": point.error, "gain": point.gain}
            rows.append(row | {"low": point.gain_low, "high": point.gain_high})
    return rows


# What is written.


def chosen(rows, threat):
    """The row to report: at the β that was best on the other half, of equals that nearest 1."""
    own = [row for row in rows if row["threat"] == threat]
    half = [row for row in own if row["half"] == "choose"]
    best = max(half, key=lambda row: (row["accuracy"], row["beta"]))
    return next(r for r in own if r["half"] == "report" and r["beta"] == best["beta"])


def _report(rows, threat):
    return [row for row in rows if (row["threat"], row["half"]) == (threat, "report")]


def _gain(row):
    if row["beta"] == 1:
        return "0"
    return f"{row['gain']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def _verdict(row):
    if row["low"] > 0:
        return "gain, but gradients are masked" if row.get("masked") == "yes" else "gain"
    return "loss" if row["high"] < 0 else "no gain" if row["beta"] == 1 else "neither"


def table(rows, survivors, budget, seconds):
    """table.md."""
    lines = [
        "| threat | original | β chosen | accuracy there | gain (95 %) | verdict |",
        "|-|-|-|-|-|-|",
    ]
    for threat in [*THREATS, "mixed", "clean", *CORRUPTIONS]:
        row, original = chosen(rows, threat), _report(rows, threat)[-1]
        lines.append(
            f"| {TITLES.get(threat, threat)} | {original['accuracy']:.3f} | {row['beta']:g} "
            f"| {row['accuracy']:.3f} | {_gain(row)} | {_verdict(row)} |"
        )
    for threat in THREATS:
        lines += [
            f"\n{TITLES[threat]}, {_report(rows, threat)[0]['digits']} digits:\n",
            "| β | clean | white-box | Square | other network's | other β's | all | gain (95 %) "
            "| masked | missed | PyTorch differs |",
            "|-|-|-|-|-|-|-|-|-|-|-|",
        ]
        for row in _report(rows, threat):
            names = "clean", "white_box", "square", "other_network", "other_betas", "accuracy"
            numbers = " | ".join(f"{row[name]:.3f}" for name in names)
            lines.append(
                f"| {row['beta']:g} | {numbers} | {_gain(row)} | {row['masked']} "
                f"| {row['missed']} | {row['torch_differs']} |"
            )
    limits = " and ".join(f"{t.limit:g} ({t.norm})" for t in THREATS.values())
    lines.append(
        f"\nWith ε {limits} at most {survivors} of {min(budget.digits, 100)} digits stay right at "
        f"any β.\n\n{machine()}; {seconds / 60:.1f} minutes."
    )
    return "\n".join(lines) + "\n"


def machine():
    """The machine and the packages that numbers depend on."""
    names = "ctonnx", "numpy", "onnxruntime", "pyautoattack", "scipy", "torch"
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    cpu = next((x.split(":")[1].strip() for x in text.splitlines() if "model name" in x), "")
    held = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    python = f"Python {platform.python_version()}"
    return f"{cpu or platform.machine()}, {os.cpu_count()} cores; {python}, {held}"


def draw(rows, path):
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    curves = {"white_box": "white-box", "square": "Square", "other_network": "other network's"}
    for axis, threat in zip(axes, [*THREATS, "mixed"], strict=True):
        own = _report(rows, threat)
        betas = [row["beta"] for row in own]
        for name, label in curves.items() if threat in THREATS else ():
            axis.plot(betas, [row[name] for row in own], "--", lw=1, label=label)
        accuracy = np.array([row["accuracy"] for row in own])
        reach = 1.96 * np.array([row["error"] for row in own])
        reach = np.minimum(reach, [accuracy, 1 - accuracy])  # no bar leaves 0 to 1
        axis.errorbar(betas, accuracy, reach, fmt="k.-", capsize=2, label="all attacks")
        axis.set(title=TITLES[threat], xlabel="β")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small part, in under a minute")
    parser.add_argument("--out", type=Path, help="folder to write to; by default here, or quick/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    budget, start = QUICK if args.quick else FULL, time.monotonic()
    out = args.out or (HERE / "quick" if args.quick else HERE)
    out.mkdir(parents=True, exist_ok=True)
    # Spawned: what PyTorch's threads hold does not survive a fork.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        sweeps = [(kind, budget) for kind in ("clean", *CORRUPTIONS, "mixed")]
        later = pool.map(swept, sweeps)
        rows, survivors = attacked(budget, pool)
        rows += [row for part in later for row in part]
    # Rounded once, so that the table and the plot are those of the file.
    rows = [
        {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in r.items()} for r in rows
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (out / "results.csv").write_text(text.getvalue())
    written = table(rows, survivors, budget, time.monotonic() - start)
    (out / "table.md").write_text(written)
    draw(rows, out / "robustness.png")
    print(written, end="")


if __name__ == "__main__":
    main()
