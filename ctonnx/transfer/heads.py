"""The linear layer at the end of a classifier: finding it, and putting another in its place."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from ..errors import UsageError
from ..model.endings import ending_of
from ..model.flow import Flow
from ..model.graph import DEFAULT_DOMAINS, keep, node_label
from ..model.names import FreshNames, node_names
from ..rewriting.records import Metadata, original_op

# Ops that may stand between the linear layer and the output: a new head does without them.
_PASSED_OVER = {
    "Cast",
    "DequantizeLinear",
    "Dropout",
    "Flatten",
    "Identity",
    "LogSoftmax",
    "QuantizeLinear",
    "Reshape",
    "Sigmoid",
    "Softmax",
    "Squeeze",
    "Unsqueeze",
}

# Likewise, with a constant: a bias or a scale.
_PASSED_OVER_WITH_CONSTANTS = {"Add", "Div", "Mul", "Sub"}


@dataclass(frozen=True)
class HeadSite:
    """Where a new head goes: from the tensor `features` to the graph's output `output`.

    `layer` is the tensor that the old linear layer produces, None where the user named the features
    and no linear layer comes after them. `ending` is the op that turns the scores into
    probabilities, or None. `chosen_by_user` tells whether the user named the features.
    """

    features: str
    output: str
    layer: str | None
    ending: str | None
    chosen_by_user: bool = False


@dataclass(frozen=True)
class LinearHead:
    """The scores `features @ weight + bias`.

    `weight` is a float64 array (features, classes), `bias` one of (classes,).
    """

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class _Tail:
    """The nodes in front of an output, up to its linear layer.

    `layer` is that layer, or None, and then `stop` says what is there instead.
    """

    layer: NodeProto | None
    stop: str = ""


def find_head(model: ModelProto, outputs: Sequence[str], features: str | None = None) -> HeadSite:
    """Find the last linear layer in front of an output.

    That is a Gemm, a MatMul or a 1x1 Conv of a single pixel, with constant weights.

    Args:
        outputs: the names of the outputs that may be the class scores. The first that has a linear
            layer is taken, or the first of all.
        features: the name of the tensor to take instead of the layer's input.

    Raises:
        UsageError: there is no such layer, or no such tensor.
    """
    flow = Flow(model.graph)
    tails = {output: _tail_of(model, flow, output) for output in outputs}
    output = next((name for name, tail in tails.items() if tail.layer is not None), outputs[0])
    tail, ending = tails[output], ending_of(model, output).op
    if features is None:
        if tail.layer is None:
            raise UsageError(
                f"no linear layer produces the output {output!r}, which comes from {tail.stop}: "
                "name the tensor to take with --features"
            )
        return HeadSite(tail.layer.input[0], output, tail.layer.output[0], ending)
    _check_features(model, flow, features, output)
    layer = None if tail.layer is None else tail.layer.output[0]
    if layer is not None and features in flow.reached_from({layer}):
        layer = None
    return HeadSite(features, output, layer, ending, chosen_by_user=True)


def _check_features(model: ModelProto, flow: Flow, features: str, output: str) -> None:
    inputs = {value.name for value in model.graph.input}
    computed = (inputs | set(flow.producer)) - flow.constants
    if features not in computed:
        close = difflib.get_close_matches(features, computed, 3, 0.5)
        hint = f": did you mean {', '.join(close)}?" if close else ""
        raise UsageError(f"the model's graph computes no tensor {features!r}{hint}")
    if features in flow.reached_from({output}):
        raise UsageError(
            f"the features {features!r} are not in front of the output {output!r}: name a tensor "
            "that is"
        )


def _tail_of(model: ModelProto, flow: Flow, output: str) -> _Tail:
    values = {value.name: value for value in (*model.graph.value_info, *model.graph.input)}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    name, last = output, len(flow.nodes)
    while True:
        # Nodes are in order, so the index falls; without this check a cycle would never end.
        if flow.producer.get(name, last) >= last:
            return _Tail(None, repr(name))
        last = flow.producer[name]
        node = flow.nodes[last]
        op = node.op_type if node.domain in DEFAULT_DOMAINS else f"{node.domain}::{node.op_type}"
        varying = [n for n in node.input if n and n not in flow.constants]
        if varying == [*node.input[:1]] and _is_linear(op, node, tensors, values):
            return _Tail(node)
        if op in _PASSED_OVER:
            name = node.input[0]
        elif op in _PASSED_OVER_WITH_CONSTANTS and len(varying) == 1:
            (name,) = varying
        else:
            return _Tail(None, f"{original_op(node)} {node_label(node)!r}")


def _is_linear(op, node, tensors, values) -> bool:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if op == "Gemm":
        return not attributes.get("transA", 0)
    if op == "Conv":
        weight = tensors.get(node.input[1])
        kernel = list(weight.dims[2:]) if weight else attributes.get("kernel_shape", [0])
        value = values.get(node.input[0])
        pixels = value.type.tensor_type.shape.dim[2:] if value is not None else ()
        one = all(dim.dim_value == 1 or not dim.HasField("dim_value") for dim in pixels)
        return one and set(kernel) == {1} and attributes.get("group", 1) == 1
    return op == "MatMul"


def replace_head(
    model: ModelProto,
    site: HeadSite,
    head: LinearHead,
    classes: Sequence[int | str],
    dtype: np.dtype,
    flatten: bool,
) -> list[str]:
    """Put a linear head at a site of a model, in place.

    The output keeps its name and element type, and a Softmax or LogSoftmax at its end. The old
    layer goes, with everything that only it needs and the other outputs that depend on it.

    Args:
        classes: the labels in order of the head's scores.
        dtype: that of the features.
        flatten: whether a sample's features have more than one dimension.

    Returns:
        notes: lines that a user should see.
    """
    graph, flow, notes = model.graph, Flow(model.graph), []
    (output,) = (value for value in graph.output if value.name == site.output)
    old = flow.reached_from({site.output, *filter(None, [site.layer])})
    dropped = [v.name for v in graph.output if v.name in old and v.name != site.output]
    if dropped:
        notes.append(f"left out what depends on the old head: {', '.join(map(repr, dropped))}")
    _remove_old_head(model, flow, old, site.features, {*dropped, site.output})
    keep(graph.output, lambda value: value.name not in dropped)
    _append_head(model, site, head, output, dtype, flatten)
    _declare_output(output, len(classes))
    keep(graph.value_info, lambda value: value.name != site.output)
    if site.ending == "Sigmoid":
        notes.append("the old head ended in a Sigmoid: the new one gives class scores")
    numbered = list(classes) == list(range(len(classes)))
    Metadata(model).classes = None if numbered else list(classes)
    return notes


def _append_head(
    model: ModelProto,
    site: HeadSite,
    head: LinearHead,
    output: ValueInfoProto,
    dtype: np.dtype,
    flatten: bool,
) -> None:
    """Append the nodes of a head; `dtype` and `flatten` are as for `replace_head`."""
    element_type = output.type.tensor_type.elem_type
    steps: list[tuple[str, dict[str, Any]]] = []
    if flatten:
        steps.append(("Flatten", {"axis": 1}))
    if helper.np_dtype_to_tensor_dtype(dtype) != element_type:
        steps.append(("Cast", {"to": element_type}))
    steps.append(("Gemm", {}))
    if site.ending in ("Softmax", "LogSoftmax"):
        steps.append((site.ending, {"axis": 1}))

    fresh, fresh_node = FreshNames(model), FreshNames(model, node_names)
    tensor = site.features
    for i, (op, attributes) in enumerate(steps):
        inputs = [tensor]
        if op == "Gemm":
            for base, array in ("head_weight", head.weight), ("head_bias", head.bias):
                inputs.append(fresh(base))
                _add_initializer(model, inputs[-1], array, element_type)
        is_last = i == len(steps) - 1
        tensor = site.output if is_last else fresh(f"head_{op.lower()}")
        node = helper.make_node(op, inputs, [tensor], fresh_node(f"node_{op}"), **attributes)
        model.graph.node.append(node)


def _add_initializer(model: ModelProto, name: str, array: np.ndarray, element_type: int) -> None:
    array = array.astype(helper.tensor_dtype_to_np_dtype(element_type))
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    if model.ir_version < 4:  # Before IR 4 every initializer had to be an input too.
        value = helper.make_tensor_value_info(name, element_type, array.shape)
        model.graph.input.append(value)


def _declare_output(output: ValueInfoProto, count: int) -> None:
    """Give an output the shape (batch, count), with the batch's size or symbol that it had."""
    shape = output.type.tensor_type.shape.dim
    batch = (max(shape[0].dim_value, 0) or shape[0].dim_param or None) if shape else "batch"
    element_type = output.type.tensor_type.elem_type
    output.CopyFrom(helper.make_tensor_value_info(output.name, element_type, [batch, count]))


def _remove_old_head(
    model: ModelProto, flow: Flow, old: set[str], features: str, outputs: set[str]
) -> None:
    """Remove the nodes of the old head and what no output needs without it.

    That is: the nodes that produce the tensors `old`, the nodes that were needed for these or for
    the graph's outputs `outputs` alone, and the nodes that read from any of them.
    """
    graph = model.graph
    all_outputs = [value.name for value in graph.output]
    others = [name for name in all_outputs if name not in outputs]
    before = set(flow.needed_for(all_outputs))
    after = set(flow.needed_for([features, *others]))
    of_head = {i for i, node in enumerate(flow.nodes) if not old.isdisjoint(node.output)}
    gone = flow.reached_from(
        name for i in of_head | (before - after) for name in flow.nodes[i].output if name
    )
    read_by_gone, read_by_rest = set(), set()
    for node, names in zip(flow.nodes, flow.reads, strict=True):
        (read_by_rest if gone.isdisjoint(node.output) else read_by_gone).update(names)
    unused = read_by_gone - read_by_rest - {features, *all_outputs}
    tensors = {tensor.name for tensor in graph.initializer}
    keep(graph.initializer, lambda tensor: tensor.name not in unused)
    keep(graph.sparse_initializer, lambda tensor: tensor.values.name not in unused)
    # Before IR 4 initializers are inputs too. Other inputs stay: callers feed them.
    keep(graph.input, lambda value: value.name not in unused & tensors)
    Metadata(model).drop_original_inputs(unused & tensors)
    keep(graph.value_info, lambda value: value.name not in gone)
    keep(graph.quantization_annotation, lambda entry: entry.tensor_name not in gone | unused)
    keep(graph.node, lambda node: gone.isdisjoint(node.output))


def fold(scaler: Any, regression: Any) -> LinearHead:
    """A standardization and a logistic regression as one linear head.

    Its largest score is that of the class that the regression predicts.

    Args:
        scaler: sklearn.preprocessing.StandardScaler, fitted.
        regression: sklearn.linear_model.LogisticRegression, fitted. For two classes it has one row
            of weights.
    """
    rows, bias = regression.coef_, regression.intercept_
    if len(rows) == 1:
        rows, bias = np.concatenate([-rows, rows]) / 2, np.concatenate([-bias, bias]) / 2
    weight = rows / scaler.scale_
    return LinearHead(weight.T, bias - weight @ scaler.mean_)
