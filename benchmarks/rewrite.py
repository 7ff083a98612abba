"""Verify the rewriting of a large file, then time it against just reading and writing the file.

    python benchmarks/rewrite.py [--activations 20000] [--layers 96] [--rounds 3]

One model has many activations, the other many weights, in a sparse file that takes no disk space.
The baseline is `onnx` loading and saving the model without its external data.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import onnx
from onnx import TensorProto, helper

import ctonnx

WIDTH = 4096  # of a layer with weights, which take 64 MiB


def many_activations(path, count):
    """A chain in which each Add is followed by a Relu or a LeakyRelu, in turns."""
    nodes, tensors = [], []
    for i in range(count):
        kind = "LeakyRelu" if i % 2 else "Relu"
        nodes.append(helper.make_node("Add", [f"y{i}", f"w{i}"], [f"h{i}"]))
        nodes.append(helper.make_node(kind, [f"h{i}"], [f"y{i + 1}"]))
        tensors.append(helper.make_tensor(f"w{i}", TensorProto.FLOAT, [], [1]))
    write(path, nodes, tensors, [4])


def many_weights(path, layers):
    """A chain of MatMul and Relu."""
    each = 4 * WIDTH**2
    with open(path.with_suffix(".bin"), "wb") as stream:
        stream.truncate(each * layers)
    nodes, tensors = [], []
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", [f"y{i}", f"w{i}"], [f"h{i}"]))
        nodes.append(helper.make_node("Relu", [f"h{i}"], [f"y{i + 1}"]))
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT)
        tensor.dims[:] = [WIDTH, WIDTH]
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=f"{path.stem}.bin")
        tensor.external_data.add(key="offset", value=str(i * each))
        tensor.external_data.add(key="length", value=str(each))
        tensors.append(tensor)
    write(path, nodes, tensors, ["N", WIDTH])


def write(path, nodes, tensors, shape):
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
        for name in ("y0", nodes[-1].output[0])
    ]
    graph = helper.make_graph(nodes, "g", *ends, tensors)
    imports = [helper.make_opsetid("", 17)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()
    )


def verify(original, works):
    """Exit with a message if one of `works` writes something else than it should."""
    written = {name: onnx.load(work(), load_external_data=False) for name, work in works.items()}
    before = onnx.load(original, load_external_data=False)
    activations = sum(node.op_type in ("Relu", "LeakyRelu") for node in before.graph.node)
    expected = {"load and save": 0, "patch": activations, "primitives": activations, "unpatch": 0}
    for name, model in written.items():
        count = sum(a.status == "steered" for a in ctonnx.inspect(model))
        if count != expected[name]:
            sys.exit(f"{name}: {count} activations are steered, expected {expected[name]}")
    for name in "load and save", "unpatch":
        if written[name] != before:
            sys.exit(f"{name}: the model differs from the original")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--activations", type=int, default=20_000)
    parser.add_argument("--layers", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if min(args.activations, args.layers, args.rounds) < 1:
        parser.error("numbers must be at least 1")

    print(f"{'model':24} {'work':14} {'CPU s':>7} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        models = {
            f"{args.activations} activations": folder / "activations.onnx",
            f"{args.layers / 16:g} GiB of weights": folder / "weights.onnx",
        }
        many_activations(folder / "activations.onnx", args.activations)
        many_weights(folder / "weights.onnx", args.layers)
        for label, path in models.items():
            works = works_on(path)
            verify(path, works)
            times = {name: [] for name in works}
            for _ in range(args.rounds):
                for name, work in works.items():
                    start = time.process_time()
                    work()
                    times[name].append(time.process_time() - start)
            medians = {name: statistics.median(values) for name, values in times.items()}
            for name, value in medians.items():
                ratio = value / medians["load and save"]
                print(f"{label:24} {name:14} {value:7.3f} {ratio:6.1f}")


def works_on(path):
    """Name -> function that writes a file beside `path` and returns the file's path."""
    steered, out = path.with_name("steered.onnx"), path.with_name("out.onnx")

    def copied():
        onnx.save(onnx.load(path, load_external_data=False), out)
        return out

    def patched(to, **options):
        ctonnx.patch(path, 0.85, output=to, force=True, **options)
        return to

    def unpatched():
        ctonnx.unpatch(steered, out, force=True)
        return out

    return {
        "load and save": copied,
        "patch": lambda: patched(steered),
        "primitives": lambda: patched(out, lowering="primitives"),
        "unpatch": unpatched,
    }


if __name__ == "__main__":
    main()
