"""Transfer a small network to new digits by T-CT, and run the result in ONNX Runtime.

A network trained on the digits 0 to 4 learns 5 to 9, first with a new head only, then with a new
head and a pair (beta, c) per channel of its ReLUs. The script takes a few seconds on one CPU core.
"""

import logging
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import ctonnx
from ctonnx.check.validate import validate
from ctonnx.torch import export, trainable


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()),
            nn.Linear(16, 5),
        )


def fit(model, parameters, images, labels, epochs, rate):
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def transfer(source, images, labels, curvature):
    """A copy of `source` with a newly trained head and, if `curvature`, trained T-CT pairs."""
    torch.manual_seed(1)
    model = Net()
    model.load_state_dict(source.state_dict())
    model.requires_grad_(False)
    model[3] = nn.Linear(16, 5)
    if curvature:
        model = trainable(model, images[:1])  # starts from beta 0.8 and c 0.5
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return fit(model, trained, images, labels, epochs=15, rate=1e-2).eval()


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels / 16).float().reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(labels)
    known = labels < 5
    model = Net()
    source = fit(model, model.parameters(), images[known], labels[known], epochs=6, rate=3e-3)
    images, labels = images[~known], labels[~known] - 5
    train, test = train_test_split(np.arange(len(labels)), stratify=labels, random_state=0)

    for name, curvature in ("new head", False), ("new head and T-CT", True):
        model = transfer(source, images[train], labels[train], curvature)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            expected = model(images[test]).numpy()
        accuracy = (expected.argmax(1) == labels[test].numpy()).mean()
        print(f"{name:18} {count:3} parameters, accuracy {accuracy:.3f}")

    # Silence the exporter's messages about itself.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    export(
        model,
        images[test][:2],  # two images: the exporter may take a dimension of 1 as fixed
        "tuned.ct.onnx",
        force=True,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    session = ctonnx.session("tuned.ct.onnx")
    (logits,) = session.run(["logits"], {"image": images[test].numpy()})
    difference = abs(logits - expected).max()
    assert difference < 1e-5, difference
    print("ONNX Runtime computes the same from tuned.ct.onnx")
    # Compare the file with the method's formula, in each execution provider and layout.
    for run in validate("tuned.ct.onnx").runs:
        print(f"{run.name}: {'passed' if run.ok else 'FAILED'}")


if __name__ == "__main__":
    main()
