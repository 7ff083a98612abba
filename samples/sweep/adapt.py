"""What recalibration and β each gain on shifted digits.

`python adapt.py` writes table.md and prints it. β is chosen on the first 1,000 digits, of which the
first 128 also give the statistics, without labels; every accuracy is that on the other 1,000.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import shifts
from onnx import TensorProto, helper, numpy_helper

import ctonnx
from ctonnx.measure import intervals, metrics

HERE = Path(__file__).resolve().parent
MODEL = HERE / "mnist.onnx"
BETAS = np.linspace(1, 0.3, 15).round(2).tolist()
SAMPLES = 128


def digits(name):
    """Images and labels of a factory of shifts.py."""
    return tuple(map(np.concatenate, zip(*getattr(shifts, name)(), strict=True)))


def layers(model):
    """The linear layers but the last one, in running order."""
    return [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")][:-1]


def run(model, images, names=("logits",)):
    """The tensors `names` of a model, of which all but the logits become outputs."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    inner = [name for name in names if name != "logits"]
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inner
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ctonnx.session(model, session_options=options).run(list(names), {"image": images})


def statistics(model, images, nodes):
    """Mean and standard deviation per channel of the outputs of nodes."""
    outputs = run(model, images, [node.output[0] for node in nodes])
    axes = [tuple(axis for axis in range(output.ndim) if axis != 1) for output in outputs]
    return [
        (output.mean(axis, np.float64), output.std(axis, np.float64))
        for output, axis in zip(outputs, axes, strict=True)
    ]


def adapted(beta, clean, shifted):
    """The steered model whose layers have the statistics on `shifted` images that the original has
    on `clean` ones.

    Source: Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation", arXiv
    1603.04779 (AdaBN), which does so for batch normalization at β = 1.
    """
    original = onnx.load(MODEL)
    model = ctonnx.patch(original, beta)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted = statistics(original, clean, layers(original))
    for node, (mean, deviation) in zip(layers(model), wanted, strict=True):
        # The layers before this one are corrected already.
        ((present, spread),) = statistics(model, shifted, [node])
        scale = deviation / spread
        weight, bias = (tensors[name] for name in node.input[1:3])
        scaled = numpy_helper.to_array(weight) * scale.reshape(-1, *[1] * (len(weight.dims) - 1))
        moved = (numpy_helper.to_array(bias) - present) * scale + mean
        for tensor, array in (weight, scaled), (bias, moved):
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return model


def plain(beta):
    """The steered model with its weights as they are."""
    return ctonnx.patch(onnx.load(MODEL), beta)


def calibrated(beta, images):
    """The steered model with the original's statistics on these images."""
    return ctonnx.patch(onnx.load(MODEL), beta, calibration=images)


def gain(right, other):
    """How much better `right` is, with a 95 % interval."""
    if right is other:
        return "0"
    sides = (np.asarray(side, np.float64)[:, None] for side in (right, other))
    value, low, high = intervals.gain(metrics.metric_named("accuracy"), *sides)
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def rows():
    """The table's lines."""
    yield (
        "| digits | statistics restored | original | at β = 1 | best β | there | gain | β's part |"
    )
    yield "|-|-|-|-|-|-|-|-|"
    clean = digits("clean")[0][:SAMPLES]
    for shift in "blurred", "noisy", "rotated":
        (images, labels), (check_images, check_labels) = digits(shift), digits(f"{shift}_check")
        own = images[:SAMPLES]
        makers = {
            "none": plain,
            "of clean digits on clean digits": partial(calibrated, images=clean),
            f"of {shift} digits on {shift} digits": partial(calibrated, images=own),
            f"of clean digits on {shift} digits": partial(adapted, clean=clean, shifted=own),
        }
        original = run(plain(1.0), check_images)[0].argmax(1) == check_labels
        for name, maker in makers.items():
            right, at = {}, {}
            for beta in BETAS:
                model = maker(beta)
                right[beta] = (run(model, images)[0].argmax(1) == labels).mean()
                at[beta] = run(model, check_images)[0].argmax(1) == check_labels
            best = max(BETAS, key=lambda beta: (right[beta], beta))
            yield (
                f"| {shift} | {name} | {original.mean():.3f} | {at[1.0].mean():.3f} | {best:g} "
                f"| {at[best].mean():.3f} | {gain(at[best], original)} "
                f"| {gain(at[best], at[1.0])} |"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to; default: here")
    out = parser.parse_args().out
    lines = []
    for line in rows():
        print(line, flush=True)
        lines.append(f"{line}\n")
    (out / "table.md").write_text("".join(lines))


if __name__ == "__main__":
    main()
