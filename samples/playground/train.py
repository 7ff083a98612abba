"""Train the playground's two small networks and write the files that its page loads.

spiral.onnx classifies points of a plane, regression.onnx fits a noisy curve, digits.onnx is the
model of samples/digits. All are steered, with beta and c (`coeff`) as inputs; `ctonnx unpatch`
restores the original networks. The corrections of recalibration are inputs of digits.onnx too.
data.json holds the points, the curve without noise, held-out digits, and these corrections over a
grid of beta and c. The script takes half a minute on one CPU core.
"""

import argparse
import base64
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

import ctonnx
from ctonnx.calibration.calibrator import Calibrator
from ctonnx.rewriting.steered import SteeredModel

HERE = Path(__file__).resolve().parent
DIGITS = HERE.parent / "digits"

# The grid between whose points the page interpolates corrections; the digits that these are from;
# and the standard deviation of the blur, in pixels.
BETAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COEFFS = (0.0, 0.25, 0.5, 0.75, 1.0)
CALIBRATION = 128
BLUR = 0.7


def network(inputs, width, depth):
    layers = []
    for i in range(depth):
        layers += [nn.Linear(width if i else inputs, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def spiral(count, rng):
    """Points of two arms of one and a half turns: points (count, 2) and arms, 0 or 1, (count,)."""
    arm = np.arange(count) % 2
    radius = np.sqrt(rng.uniform(0.02, 1, count))
    angle = 3 * np.pi * radius + np.pi * arm
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    points += rng.normal(scale=0.06, size=points.shape)
    # The scale sets the effect of beta, which is smaller relative to larger numbers.
    return (4 * points).astype(np.float32), arm


def curve(x):
    return np.sin(x / 2) + 0.4 * np.sin(x + 1)


def train(model, x, y, loss, steps):
    x, y = torch.from_numpy(x), torch.from_numpy(y.astype(np.float32))[:, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def exported(model, inputs):
    """The ModelProto of a network on rows of `inputs` numbers."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, inputs),),
        input_names=["x"],
        output_names=["y"],
        dynamic_shapes={"input": {0: torch.export.Dim("batch")}},
        opset_version=18,
        dynamo=True,
        verbose=False,
    )
    for node in program.model.graph:
        # Stack traces hold the paths of the machine that exported the model.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    with tempfile.TemporaryDirectory() as folder:
        program.save(f"{folder}/model.onnx", external_data=False)
        return onnx.load(f"{folder}/model.onnx")


def steered(model):
    """A steered ModelProto with the inputs beta and coeff.

    Both inputs are required: onnxruntime-web takes no values for optional ones.
    """
    model = ctonnx.patch(model, 1.0, beta_as="required-input")
    model_with_inputs = SteeredModel(model)
    model_with_inputs.require_inputs(model_with_inputs.parameters.coeffs)
    onnx.checker.check_model(model, full_check=True)
    return model


def training_digits():
    """Digits that the model of samples/digits was trained on, (128, 1, 8, 8), from 0 to 1."""
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    split = train_test_split(images, labels, test_size=0.3, stratify=labels, random_state=0)
    return split[0][:CALIBRATION]


def blurred(images):
    return ndimage.gaussian_filter(images, BLUR, axes=(2, 3))


def parameters(beta, coeff):
    return {"beta": np.array(beta, np.float32), "coeff": np.array(coeff, np.float32)}


class Samples:
    """What a Calibrator runs a model on: images that may change."""

    batches = 1

    def __init__(self, images):
        self.images = images

    def arrays(self, _, names):
        return {"image": self.images} if "image" in names else {}


def add_corrections(model):
    """Make inputs of a steered model's corrections, in place, and compute these.

    They give each layer the statistics that the original has on sharp digits: on sharp digits, and
    on blurred ones.

    Returns:
        what data.json holds of them.
    """
    original, sharp = parameters(1, 0.5), training_digits()
    samples, found = Samples(sharp), {}
    calibrator = Calibrator(model, original, samples)
    # The first corrections fix the statistics that all others restore.
    for kind, images in {"sharp": sharp, "blurred": blurred(sharp)}.items():
        samples.images = images
        points = [parameters(beta, coeff) for beta in BETAS for coeff in COEFFS]
        found[kind] = [calibrator.corrections(point) for point in points]
    inputs = calibrator.add_inputs()
    feeds = {kind: [inputs.feeds(each) for each in all_] for kind, all_ in found.items()}
    shapes = {name: array.shape for name, array in feeds["sharp"][0].items()}
    for value in model.graph.input:
        if value.name in shapes:
            value.CopyFrom(
                helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shapes[value.name])
            )
    onnx.checker.check_model(model, full_check=True)
    return {
        "inputs": list(shapes.items()),
        "betas": BETAS,
        "coeffs": COEFFS,
        **{
            kind: base64.b64encode(
                b"".join(array.tobytes() for point in points for array in point.values())
            ).decode()
            for kind, points in feeds.items()
        },
    }


def seeded():
    """A NumPy generator with a fixed seed; PyTorch is seeded too."""
    torch.manual_seed(0)
    return np.random.default_rng(0)


def rounded(array, decimals=3):
    return np.round(array.astype(float), decimals).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    # One thread and one seed: a rerun gives the same weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    rng = seeded()
    points, arms = spiral(240, rng)
    test_points, test_arms = spiral(600, rng)
    classifier = network(2, width=16, depth=3)
    train(classifier, points, arms, F.binary_cross_entropy_with_logits, steps=2000)
    onnx.save(steered(exported(classifier, 2)), out / "spiral.onnx")

    rng = seeded()
    x = (np.linspace(-8, 8, 40) + rng.uniform(-0.16, 0.16, 40)).astype(np.float32)
    y = (curve(x) + rng.normal(scale=0.25, size=40)).astype(np.float32)
    line = np.linspace(-8, 8, 401)
    fit = network(1, width=32, depth=3)
    train(fit, x[:, None], y, F.mse_loss, steps=3000)
    onnx.save(steered(exported(fit, 1)), out / "regression.onnx")

    reader = steered(onnx.load(DIGITS / "digits.onnx"))
    corrections = add_corrections(reader)
    onnx.save(reader, out / "digits.onnx")
    test = np.load(DIGITS / "digits_test.npz")
    pixels = np.rint(test["image"] * 16).astype(np.uint8)  # 0 to 16

    data = {
        "spiral": {
            "points": rounded(points),
            "arms": arms.tolist(),
            "held_points": rounded(test_points),
            "held_arms": test_arms.tolist(),
        },
        "regression": {
            "x": rounded(x),
            "y": rounded(y),
            "line": rounded(line),
            "curve": rounded(curve(line), 5),
        },
        "digits": {
            "pixels": base64.b64encode(pixels.tobytes()).decode(),
            "labels": test["label"].tolist(),
            "blur": rounded(ndimage.gaussian_filter1d(np.eye(8), BLUR, axis=0), 6),
            "corrections": corrections,
        },
    }
    (out / "data.json").write_text(json.dumps(data, separators=(",", ":")) + "\n")

    for beta in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        feeds = {"beta": np.float32(beta), "coeff": np.float32(0.5)}
        logits = run(out / "spiral.onnx", test_points, feeds)
        accuracy = ((logits > 0) == test_arms).mean()
        error = ((run(out / "regression.onnx", line[:, None], feeds) - curve(line)) ** 2).mean()
        print(f"beta {beta:.1f}  spiral accuracy {accuracy:.3f}  squared error {error:.4f}")


def run(path, x, feeds):
    feeds = {name: np.asarray(value) for name, value in feeds.items()}
    (y,) = ctonnx.session(path).run(["y"], {"x": x.astype(np.float32), **feeds})
    return y[:, 0]


if __name__ == "__main__":
    main()
