"""Writing the statistics of batch norm that has adapted into a model."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from ..errors import UsageError
from ..model.graph import DEFAULT_DOMAINS, reads, scopes
from ..model.names import FreshNames
from ..rewriting.parameters import add_initializer


def check_normalizations(model: ModelProto, outputs: Mapping[str, object]) -> None:
    """Check that each BatchNormalization that adapts, by its output, is in the main graph.

    Raises:
        UsageError: one is in a model-local function.
    """
    there = {node.output[0] for node in model.graph.node if node.output}
    if outside := set(outputs) - there:
        raise UsageError(
            f"the BatchNormalization of {min(outside)!r} is in a model-local function, where batch "
            "norm cannot adapt: inline the functions, or leave batch norm frozen"
        )


def write_statistics(model: ModelProto, statistics: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Give each BatchNormalization its mean and variance, float arrays (channels,), in place.

    Args:
        statistics: output of a node -> its mean and variance.
    """
    graph, fresh = model.graph, FreshNames(model)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    readers = Counter(
        name for scope in scopes(model) for n in scope.graph.node for name in reads(n)
    )
    for node in graph.node:
        if node.op_type != "BatchNormalization" or node.domain not in DEFAULT_DOMAINS:
            continue
        for slot, array in zip((3, 4), statistics.get(node.output[0], ()), strict=False):
            name = node.input[slot]
            old = tensors.get(name)
            typed = next(filter(None, map(tensors.get, (name, *node.input[1:3]))), None)
            dtype = (
                np.float32 if typed is None else helper.tensor_dtype_to_np_dtype(typed.data_type)
            )
            array = array.astype(dtype)
            # Exporters share equal initializers.
            if old is not None and readers[name] == 1:
                old.CopyFrom(numpy_helper.from_array(array, name))
                continue
            node.input[slot] = fresh(name)
            new = numpy_helper.from_array(array, node.input[slot])
            add_initializer(graph, new)
            if model.ir_version < 4:  # Before IR 4 every initializer had to be an input too.
                value = helper.make_tensor_value_info(new.name, new.data_type, array.shape)
                graph.input.append(value)
