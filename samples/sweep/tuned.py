"""Find and train β and c on 1,000 shifted digits, and compare on 1,000 others.

It prints the table of docs/results.md, and takes some minutes on one CPU core.
"""

import warnings

import numpy as np
import onnx
import onnxruntime
import shifts

import ctonnx
from ctonnx.measure import intervals, metrics

MODEL = onnx.load("mnist.onnx")
# Of the digits to train on; the others stop the training.
TRAIN = 800
SHIFTS = "blurred", "noisy", "rotated"
GRID = [round(0.5 + 0.02 * i, 2) for i in range(26)]
OPTIONS = {"epochs": 60, "patience": 10}
# Row of the table -> options of `ctonnx.tune`.
TUNED = {
    "one β and c, trained": {"per": "model"},
    "per stage, trained": {"per": "stage"},
    "per channel (T-CT)": {"per": "channel"},
    # β stays at 1.
    "new head alone": {"per": "model", "head": True, "beta": 1.0, "rate": 1e-12},
    "new head and T-CT": {"per": "channel", "head": True},
}


def digits(name):
    """All images and labels of a factory of `shifts`."""
    images, labels = zip(*getattr(shifts, name)(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def correct(model, images, labels):
    """1 for each digit that a model reads correctly in plain ONNX Runtime, else 0."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (scores,) = session.run(None, {session.get_inputs()[0].name: images})
    return (scores.argmax(1) == labels).astype(float)[:, None]


def search(beta, images, labels):
    """A β for each stage by forward passes alone, one stage after the other, twice.

    Each of the network's ReLUs is a stage of its own.
    """
    betas = {activation.name: beta for activation in ctonnx.inspect(MODEL)}
    for name in [*betas, *betas]:
        steered = {b: ctonnx.patch(MODEL, params={**betas, name: b}) for b in GRID}
        betas[name] = max(GRID, key=lambda b: correct(steered[b], images, labels).mean())
    return betas


def rows(name):
    """What was done -> the numbers of β and c, and who is right, on digits with a shift."""
    images, labels = digits(name)
    train, val = (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])
    best = ctonnx.sweep(MODEL, (images, labels), GRID).best.beta
    betas = search(best, images, labels)
    models = {
        "original": (0, MODEL),
        f"one β, swept: {best:g}": (1, ctonnx.patch(MODEL, best)),
        "per stage, searched": (len(betas), ctonnx.patch(MODEL, params=betas)),
    }
    print(f"{name}: β by stage {', '.join(map(str, betas.values()))}")
    for row, options in TUNED.items():
        result = ctonnx.tune(MODEL, train, val, **OPTIONS, **options)
        models[row] = 0 if "beta" in options else result.parameters, result.model
        if options == {"per": "model"}:
            one, *_ = result.activations
            print(f"{name}: trained β {one.beta:.2f}, c {one.coeff:.2f}")
    held_out = digits(f"{name}_check")
    return {row: (count, correct(model, *held_out)) for row, (count, model) in models.items()}


def main():
    warnings.simplefilter("ignore")
    accuracy = metrics.METRICS["accuracy"]
    for name in SHIFTS:
        found = rows(name)
        _, original = found["original"]
        print(f"{name} | numbers | accuracy | gain (95 %)")
        for row, (count, right) in found.items():
            gain, low, high = intervals.gain(accuracy, right, original)
            shown = "" if row == "original" else f"{gain:+.3f} ({low:+.3f} to {high:+.3f})"
            print(f"{row} | {count} | {right.mean():.3f} | {shown}")


if __name__ == "__main__":
    main()
