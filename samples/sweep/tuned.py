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
BETAS = [round(0.3 + 0.05 * i, 2) for i in range(15)]
COEFFS = [0.0, 0.5, 1.0]
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


def shown(pair):
    return f"β {pair['beta']:.2f}, c {pair['coeff']:.2f}"


def rows(name):
    """What was done -> how many β and c, and who is right, on digits with a shift."""
    data = digits(name)
    train, val = (
        tuple(array[part] for array in data) for part in (slice(TRAIN), slice(TRAIN, None))
    )
    beta = ctonnx.sweep(MODEL, data, "0.5:1:0.02").best.beta
    swept = ctonnx.sweep(MODEL, data, BETAS, coeffs=COEFFS, per="stage")
    both = {"beta": swept.best.beta, "coeff": swept.best.coeff}
    assert swept.grouped is not None
    stages = swept.grouped.params
    models = {
        "original": (0, MODEL),
        "one β, swept": (1, ctonnx.patch(MODEL, beta)),
        "one β and c, swept": (2, ctonnx.patch(MODEL, **both)),
        "per stage, swept": (2 * len(stages), ctonnx.patch(MODEL, params=stages)),
    }
    print(f"{name}: swept {shown(both)}; by stage {'; '.join(map(shown, stages.values()))}")
    for row, options in TUNED.items():
        result = ctonnx.tune(MODEL, train, val, **OPTIONS, **options)
        models[row] = 0 if "beta" in options else result.parameters, result.model
        if options == {"per": "model"}:
            print(f"{name}: trained {shown(vars(result.activations[0]))}")
    held_out = digits(f"{name}_check")
    return {row: (count, correct(model, *held_out)) for row, (count, model) in models.items()}


def main():
    warnings.simplefilter("ignore")
    accuracy = metrics.METRICS["accuracy"]
    for name in SHIFTS:
        found = rows(name)
        _, original = found["original"]
        print(f"{name} | β and c | accuracy | gain (95 %)")
        for row, (count, right) in found.items():
            gain, low, high = intervals.gain(accuracy, right, original)
            ends = "" if row == "original" else f"{gain:+.3f} ({low:+.3f} to {high:+.3f})"
            print(f"{row} | {count} | {right.mean():.3f} | {ends}")


if __name__ == "__main__":
    main()
