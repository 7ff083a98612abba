"""Train a small residual network on scikit-learn's handwritten digits and export it to ONNX.

The script writes digits.onnx (input `image`, output `logits`) and digits_test.npz, the held-out
images and labels. It takes well under a minute on one CPU core.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(x + self.norm2(self.conv2(y)))


class DigitNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.block1 = Block(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.block2 = Block(32)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, image):
        x = self.block1(self.stem(image))
        # A function instead of a module gives the same Relu in the ONNX graph.
        x = F.relu(self.down(x))
        return self.head(self.block2(x).mean(dim=(2, 3)))


def train(model, images, labels, epochs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def export(model, path):
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, 8, 8),),  # two images: the exporter may take a dimension of 1 as fixed
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        opset_version=18,
        dynamo=True,
        verbose=False,
    )
    # Stack traces hold the paths of the machine that exported the model.
    for node in program.model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    program.save(path, external_data=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    # One thread and one seed: a rerun gives the same weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)  # pixels are 0 to 16
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels.astype(np.int64), test_size=0.3, stratify=labels, random_state=0
    )

    model = DigitNet()
    train(model, torch.from_numpy(train_images), torch.from_numpy(train_labels), args.epochs)
    model.eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(test_images)).numpy()
    print(f"test accuracy, PyTorch:      {(expected.argmax(1) == test_labels).mean():.4f}")

    path = args.out / "digits.onnx"
    export(model, path)
    np.savez_compressed(args.out / "digits_test.npz", image=test_images, label=test_labels)

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": test_images})
    print(f"test accuracy, ONNX Runtime: {(logits.argmax(1) == test_labels).mean():.4f}")
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


if __name__ == "__main__":
    main()
