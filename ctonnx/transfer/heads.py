"""The linear layer at a classifier's end: finding it, and putting another in its place."""

import difflib
from dataclasses import dataclass

import numpy as np
from onnx import helper, numpy_helper

from ..errors import UsageError
from ..model.flow import Flow
from ..model.graph import DEFAULT_DOMAINS, keep, node_label
from ..model.names import FreshNames
from ..rewriting.records import Metadata, original_op

# What stands between a linear layer and the class scores as they are given out.
_PASSED = {
    *("Identity", "Cast", "Dropout", "Flatten", "Reshape", "Squeeze", "Unsqueeze"),
    *("Softmax", "LogSoftmax", "Sigmoid", "QuantizeLinear", "DequantizeLinear"),
}
_ENDINGS = ("Softmax", "LogSoftmax", "Sigmoid")
_WITH_CONSTANT = {"Add", "Sub", "Mul", "Div"}


@dataclass(frozen=True)
class Head:
    """Where a new head goes: from the tensor `features` to the graph's output `output`.

    `layer` is what the linear layer found makes, None where the features were named and none is
    behind them. `ending` is the op that makes probabilities of scores, or None. `named` tells that
    the user named the features.
    """

    features: str
    output: str
    layer: str | None
    ending: str | None
    named: bool = False


def find(model, outputs, features=None):
    """The Head of a ModelProto: its last linear layer in front of an output, a Gemm, a MatMul or
    a 1x1 Conv of one pixel with constant weights.

    Args:
        outputs: the names of the outputs that may hold the class scores: the first that a linear
            layer makes does, or the first of all.
        features: the name of the tensor to take instead of the layer's input.

    Raises:
        UsageError: there is none, or no such tensor.
    """
    flow = Flow(model.graph)
    found = {output: _linear(model, flow, output) for output in outputs}
    output = next((name for name, (layer, *_) in found.items() if layer is not None), outputs[0])
    layer, ending, met = found[output]
    if features is None:
        if layer is None:
            raise UsageError(
                f"no linear layer makes the output {output!r}, {met}: name the tensor to take "
                "with --features"
            )
        return Head(layer.input[0], output, layer.output[0], ending)
    given = {value.name for value in model.graph.input}
    known = (given | set(flow.producer)) - flow.constants
    if features not in known:
        near = difflib.get_close_matches(features, known, 3, 0.5)
        hint = f": did you mean {', '.join(near)}?" if near else ""
        raise UsageError(f"the model's graph computes no tensor {features!r}{hint}")
    if features in flow.reached_from({output}):
        raise UsageError(f"features {features!r}: name a tensor in front of the output {output!r}")
    made = layer and layer.output[0]
    if made is not None and features in flow.reached_from({made}):
        made = None
    return Head(features, output, made, ending, named=True)


def _linear(model, flow, output):
    """The linear layer and the ending before `output`, None each where there is none, and what was
    met instead of a layer."""
    shapes = {value.name: value for value in (*model.graph.value_info, *model.graph.input)}
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    name, ending, last = output, None, len(flow.nodes)
    while True:
        # A graph's nodes are in order; in one that is not this would go round.
        if flow.producer.get(name, last) >= last:
            return None, ending, f"it comes from {name!r}"
        last = flow.producer[name]
        node = flow.nodes[last]
        op = node.op_type if node.domain in DEFAULT_DOMAINS else f"{node.domain}::{node.op_type}"
        varying = [n for n in node.input if n and n not in flow.constants]
        if varying == [*node.input[:1]] and _is_linear(op, node, held, shapes):
            return node, ending, None
        if op in _ENDINGS:
            ending = ending or op
        if op in _PASSED:
            name = node.input[0]
        elif op in _WITH_CONSTANT and len(varying) == 1:
            (name,) = varying
        else:
            return None, ending, f"it comes from {original_op(node)} {node_label(node)!r}"


def _is_linear(op, node, held, shapes):
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if op == "Gemm":
        return not attributes.get("transA", 0)
    if op == "Conv":
        weight = held.get(node.input[1])
        kernel = list(weight.dims[2:]) if weight else attributes.get("kernel_shape", [0])
        value = shapes.get(node.input[0])
        pixels = value.type.tensor_type.shape.dim[2:] if value is not None else ()
        one = all(dim.dim_value == 1 or not dim.HasField("dim_value") for dim in pixels)
        return one and set(kernel) == {1} and attributes.get("group", 1) == 1
    return op == "MatMul"


def replace(model, head, weight, bias, dtype, flatten, classes):
    """Put a linear layer in the place of a Head, in place.

    The output keeps its name and element type, and a Softmax or LogSoftmax at its end. What the old
    layer alone needed is taken out, and so are the other outputs that depend on it.

    Args:
        weight, bias: arrays (features, classes) and (classes,).
        dtype: numpy dtype of the features.
        flatten: whether the features have more than one dimension per sample.
        classes: list of labels, str or int.

    Returns:
        list of notes.
    """
    graph, flow, notes = model.graph, Flow(model.graph), []
    (output,) = (value for value in graph.output if value.name == head.output)
    hung = flow.reached_from({head.output, *filter(None, [head.layer])})
    dropped = [v.name for v in graph.output if v.name in hung and v.name != head.output]
    if dropped:
        notes.append(f"left out what depends on the old head: {', '.join(map(repr, dropped))}")
    _take_out(model, flow, hung, head.features, {*dropped, head.output})
    keep(graph.output, lambda value: value.name not in dropped)

    fresh = FreshNames(model)
    kind = output.type.tensor_type.elem_type
    rows, last = "batch", head.features
    shape = output.type.tensor_type.shape.dim
    if shape:
        rows = max(shape[0].dim_value, 0) or shape[0].dim_param or None
    ends = head.ending in ("Softmax", "LogSoftmax")
    steps = [("Flatten", {"axis": 1})] if flatten else []
    if helper.np_dtype_to_tensor_dtype(dtype) != kind:
        steps.append(("Cast", {"to": kind}))
    steps.append(("Gemm", {}))
    steps += [(head.ending, {"axis": 1})] if ends else []
    exact = helper.tensor_dtype_to_np_dtype(kind)
    for i, (op, attributes) in enumerate(steps):
        inputs = [last]
        last = head.output if i == len(steps) - 1 else fresh(f"head_{op.lower()}")
        if op == "Gemm":
            for base, array in ("head_weight", weight), ("head_bias", bias):
                inputs.append(fresh(base))
                graph.initializer.append(numpy_helper.from_array(array.astype(exact), inputs[-1]))
                if model.ir_version < 4:  # Until then initializers were inputs too.
                    value = helper.make_tensor_value_info(inputs[-1], kind, array.shape)
                    graph.input.append(value)
        graph.node.append(helper.make_node(op, inputs, [last], fresh(f"node_{op}"), **attributes))
    output.CopyFrom(helper.make_tensor_value_info(head.output, kind, [rows, len(classes)]))
    keep(graph.value_info, lambda value: value.name != head.output)
    if head.ending == "Sigmoid":
        notes.append("the old head ended in a Sigmoid: the new one gives scores of classes")
    Metadata(model).classes = None if classes == list(range(len(classes))) else classes
    return notes


def _take_out(model, flow, hung, features, gone):
    """Take out the nodes that make tensors of `hung`, all that only they, or the outputs `gone`,
    needed, and what no output needs that reads of these."""
    graph = model.graph
    outputs = [value.name for value in graph.output]
    before = set(flow.needed_for(outputs))
    hanging = {i for i, node in enumerate(flow.nodes) if not hung.isdisjoint(node.output)}
    after = set(flow.needed_for([features, *(name for name in outputs if name not in gone)]))
    made = flow.reached_from(
        name for i in hanging | (before - after) for name in flow.nodes[i].output if name
    )
    leaving = {i for i, node in enumerate(flow.nodes) if not made.isdisjoint(node.output)}
    staying = set(range(len(flow.nodes))) - leaving

    def needed(indices):
        return set().union(*(flow.reads[i] for i in indices))

    unused = needed(leaving) - needed(staying) - {features, *outputs}
    tensors = {tensor.name for tensor in graph.initializer}
    keep(graph.initializer, lambda tensor: tensor.name not in unused)
    keep(graph.sparse_initializer, lambda tensor: tensor.values.name not in unused)
    # Until IR 4 initializers were inputs too; other inputs stay, for callers feed them.
    keep(graph.input, lambda value: value.name not in unused & tensors)
    Metadata(model).drop_original_inputs(unused & tensors)
    keep(graph.value_info, lambda value: value.name not in made)
    keep(graph.quantization_annotation, lambda entry: entry.tensor_name not in made | unused)
    keep(graph.node, lambda node: made.isdisjoint(node.output))


def folded(scaler, regression):
    """A standardization and a logistic regression as one linear layer: arrays (features, classes)
    and (classes,), float64, whose largest score is that of the class predicted.

    Args:
        scaler: sklearn.preprocessing.StandardScaler.
        regression: sklearn.linear_model.LogisticRegression, which holds one row for two classes.
    """
    rows, bias = regression.coef_, regression.intercept_
    if len(rows) == 1:
        rows, bias = np.concatenate([-rows, rows]) / 2, np.concatenate([-bias, bias]) / 2
    weight = rows / scaler.scale_
    return weight.T, bias - weight @ scaler.mean_
