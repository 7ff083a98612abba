"""Steer the digits model in a graphsurgeon pipeline: new head, `ctonnx.patch`, one CTU by hand."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

import ctonnx
import ctonnx.graphsurgeon  # registers Graph.ctu

DIGITS = Path(__file__).parent.parent / "digits"


def build():
    """The steered gs.Graph: image [batch, 1, 8, 8] float32 -> digit [batch] int64."""
    graph = gs.import_onnx(onnx.load(DIGITS / "digits.onnx")).fold_constants()

    # Output the digit instead of the logits.
    (logits,) = graph.outputs
    digit = gs.Variable("digit", np.int64, ["batch"])
    graph.layer(op="ArgMax", inputs=[logits], outputs=[digit], attrs={"axis": 1, "keepdims": 0})
    graph.outputs = [digit]

    # One beta for all activations but the last.
    graph = ctonnx.patch(graph, 0.9, exclude="^node_relu_6$")

    # The last one has 32 features: half of them stay ReLU, the others get a smaller beta.
    relu = next(node for node in graph.nodes if node.name == "node_relu_6")
    beta = np.repeat([1.0, 0.7], 16)
    graph.ctu(relu.inputs[0], beta, output=relu.outputs[0], name=relu.name)
    return graph.cleanup().toposort()


if __name__ == "__main__":
    onnx.save(gs.export_onnx(build()), "digits_gs.ct.onnx")
    test = np.load(DIGITS / "digits_test.npz")
    (digit,) = ctonnx.session("digits_gs.ct.onnx").run(["digit"], {"image": test["image"]})
    print(f"accuracy {(digit == test['label']).mean():.4f}")
