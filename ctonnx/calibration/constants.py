"""The constant tensors of a model, by the names under which its nodes see them."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper

from ..model.graph import Scope

_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


class Constants:
    """The initializers and Constant nodes of a model, outside its functions.

    Args:
        scopes: the model's scopes.
    """

    def __init__(self, scopes: Iterable[Scope]):
        self._tables: dict[int, dict[str, TensorProto]] = {}
        self._same: dict[int, dict[str, str]] = {}
        self._readers: Counter[int] = Counter()
        inside = [scope for scope in scopes if scope.function is None]
        for scope in inside:
            self._tables[id(scope.graph)] = dict(_tensors(scope))
            self._same[id(scope.graph)] = {
                node.output[0]: node.input[0]
                for node in scope.graph.node
                if node.op_type == "Identity" and node.input and node.output
            }
        for scope in inside:
            names = [value.name for value in _graph(scope).output]
            for node in scope.graph.node:
                names += [] if node.op_type == "Identity" else node.input
            for name in names:
                tensor = self.find(scope, name)
                if tensor is not None:
                    self._readers[id(tensor)] += 1

    def find(self, scope: Scope, name: str) -> TensorProto | None:
        """The tensor that nodes of a Scope see under a name, or None where it is computed."""
        at: Scope | None = scope
        while at is not None and name:
            key = id(at.graph)
            if name in self._tables[key]:
                return self._tables[key][name]
            if name in self._same[key]:
                # Names that nodes produce are those of one scope.
                name, at = self._same[key][name], scope
                continue
            at = at.parent
        return None

    def dtype(self, scope: Scope, node: NodeProto) -> np.dtype:
        """The NumPy dtype of a linear layer's weight."""
        weight = self.find(scope, node.input[1])
        assert weight is not None
        return helper.tensor_dtype_to_np_dtype(weight.data_type)

    def readers(self, tensor: TensorProto) -> int:
        """How many inputs of nodes read a tensor."""
        return self._readers[id(tensor)]

    def identity(self, scope: Scope, node: NodeProto) -> tuple:
        """What two uses of one layer have in common: their weight, all four of a batch norm's."""
        last = 5 if node.op_type == "BatchNormalization" else 2
        return tuple(id(self.find(scope, name)) for name in node.input[1:last])

    def reason_against(self, scope: Scope, node: NodeProto) -> str | None:
        """Why the weights of a linear layer cannot be corrected, or None."""
        last = 3 if node.op_type == "BatchNormalization" else 2
        found = (self.find(scope, name) for name in node.input[1:last])
        tensors = [tensor for tensor in found if tensor is not None]
        if len(tensors) < last - 1:
            return "its weight is no constant"
        if any(tensor.data_type not in _TYPES for tensor in tensors):
            return "its weight is of another element type than float, double and float16"
        if node.op_type == "MatMul" and len(tensors[0].dims) != 2:
            return "its weight is no matrix"
        if node.op_type == "BatchNormalization":
            if any(len(tensor.dims) != 1 for tensor in tensors):
                return "its parameters are not one per channel"
            if any(a.name == "training_mode" and a.i for a in node.attribute):
                return "it sets mean and variance itself, as in training"
        bias = node.input[2] if len(node.input) > 2 else ""
        if node.op_type != "BatchNormalization" and bias and self.find(scope, bias) is None:
            return "its bias is no constant"
        if node.op_type == "Gemm" and bias and not self._is_row(scope, bias):
            return "its bias differs by row"
        return None

    def is_bias(self, add: NodeProto, product: NodeProto, scope: Scope) -> bool:
        """Whether an Add adds a number, or one per column, to a MatMul's output."""
        other = [name for name in add.input if name != product.output[0]]
        return len(other) == 1 and self._is_row(scope, other[0])

    def _is_row(self, scope: Scope, name: str) -> bool:
        tensor = self.find(scope, name)
        return tensor is not None and all(dim == 1 for dim in tensor.dims[:-1])


def _tensors(scope: Scope) -> Iterator[tuple[str, TensorProto]]:
    graph = _graph(scope)
    fed = {value.name for value in graph.input} if scope.inputs_vary else set()
    for tensor in graph.initializer:
        if tensor.name not in fed:
            yield tensor.name, tensor
    for node in graph.node:
        if node.op_type == "Constant" and node.output:
            for attribute in node.attribute:
                if attribute.name == "value" and not attribute.ref_attr_name:
                    yield node.output[0], attribute.t


def _graph(scope: Scope) -> GraphProto:
    assert isinstance(scope.graph, GraphProto)
    return scope.graph
