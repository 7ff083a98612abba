"""Verify a sweep, then time its overhead over the bare runs.

    python benchmarks/sweep.py MODEL.onnx [--points 5] [--images 64] [--rounds 3]

MODEL takes one image, and its first output holds a score per class. A sweep over a folder of PNG
images, which it decodes, takes turns with bare `session.run` loops, one per β, over batches in
memory. The time of the sweep includes opening the session; a row without it follows. CPU time is
that of the process, and steadier than the clock on a shared machine.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import ctonnx
from ctonnx.data.open import DataOptions, open_source
from ctonnx.measure import engine

SIZE = 32


def write_images(folder, count):
    """Write smooth random images of 256x256 pixels in two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        target = folder / f"class{i % 2}" / f"{i:04}.png"
        target.parent.mkdir(exist_ok=True)
        small.resize((256, 256), Image.Resampling.BICUBIC).save(target)


def timed(function):
    """Wall-clock and CPU seconds of a call, and its result."""
    start = np.array([time.perf_counter(), time.process_time()])
    result = function()
    return np.array([time.perf_counter(), time.process_time()]) - start, result


def bare(session, model, batches, betas):
    """The outputs, a list of batches for each β."""
    return [
        [
            session.run([model.output], {**inputs, model.betas[0]: np.array(beta, np.float32)})[0]
            for inputs in batches
        ]
        for beta in betas
    ]


def verify(result, outputs, labels, betas):
    """Exit with a message if the sweep's values differ from those of the bare runs."""
    values = {point.beta: point.value for point in result.points}
    for beta, parts in zip(betas, outputs, strict=True):
        expected = (np.concatenate(parts).argmax(1) == labels).mean()
        if values[beta] != expected:
            sys.exit(f"beta {beta}: accuracy {values[beta]} in the sweep, {expected} in bare runs")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    betas = np.linspace(0.7, 1.0, args.points).round(6).tolist()

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_images(folder, args.images)
        opening, (model, session) = timed(lambda: opened(args.model))
        source = open_source(folder, model.inputs, DataOptions(batch_size=SIZE))
        batches = [source.batch(i) for i in range(len(source))]
        labels = np.concatenate([batch.labels for batch in batches])
        inputs = [batch.inputs for batch in batches]
        times = {"sweep": [], "bare": []}
        for turn in range(args.rounds):
            seconds, result = timed(lambda: ctonnx.sweep(args.model, folder, betas))
            times["sweep"].append(seconds)
            seconds, outputs = timed(lambda: bare(session, model, inputs, betas))
            times["bare"].append(seconds)
            if not turn:
                verify(result, outputs, labels, betas)
                print("outputs agree, timing", file=sys.stderr)

    sweep, loops = (np.median(values, axis=0) for values in times.values())
    print(f"{args.points} points, {args.images} images; clock and CPU seconds, medians")
    for name, value, ratio in [
        ("bare loops", loops, loops / loops),
        ("sweep", sweep, sweep / loops),
        ("without opening", sweep - opening, (sweep - opening) / loops),
    ]:
        print(f"{name:16} {value[0]:8.2f} {value[1]:8.2f}   ratio {ratio[0]:.3f} {ratio[1]:.3f}")


def opened(path):
    model = engine.prepare(path)
    return model, model.open()


if __name__ == "__main__":
    main()
