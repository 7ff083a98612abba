"""Folding corrections into the weights of a model, or making inputs of them."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

from ..model.graph import Scope
from ..model.names import FreshNames, node_names
from ..rewriting.parameters import add_initializer
from .constants import Constants
from .layers import Layer, Use
from .linear import bias_factor, scaled
from .moments import Correction


class _Changes:
    """The changes of the constants of one layer, which its uses may share."""

    def __init__(self, folding: "Folding", layer: Layer):
        self._folding = folding
        self._names: dict[tuple[int, bool], str | None] = {}
        self._reads = Counter(
            self._key(use, is_bias) for use in layer.uses for is_bias in (False, True)
        )

    def __call__(
        self, use: Use, function: Callable[[np.ndarray], np.ndarray], is_bias: bool = False
    ) -> None:
        """Change the constant that is the weight of a use, or its bias."""
        key, (node, place) = self._key(use, is_bias), use.bias if is_bias else use.weight
        if key not in self._names:
            name, reads = node.input[place], self._reads[key]
            self._names[key] = self._folding.replace(use.scope, name, reads, function)
        node.input[place] = self._names[key] or node.input[place]

    def _key(self, use: Use, is_bias: bool) -> tuple[int, bool]:
        # One constant may be both scale and shift of a BatchNormalization.
        node, place = use.bias if is_bias else use.weight
        name = node.input[place] if place < len(node.input) else ""
        return id(self._folding.constants.find(use.scope, name)), is_bias


class Folding:
    """Folds corrections into a model, in place.

    Args:
        model: the ModelProto that the layers are of.
        constants: its constants.
        folder: the folder of its external data.

    Attributes:
        changed: the names of the tensors that were changed or added, by the layers' order.
    """

    def __init__(self, model: ModelProto, constants: Constants, folder: str):
        self._graph, self.constants, self._folder = model.graph, constants, folder
        self._fresh, self._fresh_node = FreshNames(model), FreshNames(model, node_names)
        self.changed: list[str] = []

    def fold(self, layer: Layer, correction: Correction) -> None:
        """Let a layer compute its corrected output.

        Formula: with y = W x + b, scale · y + shift = (scale · W) x + (scale · b + shift).
        """
        scale, shift = correction.scale, correction.shift
        change = _Changes(self, layer)
        for use in layer.uses:
            node = use.node
            if node.op_type == "BatchNormalization":
                change(use, lambda array: scale * array)
                change(use, lambda array: scale * array + shift, is_bias=True)
                continue
            change(use, partial(scaled, node, scale=scale))
            if node.op_type == "MatMul":
                self._shift_product(use, change, scale, shift)
            else:
                self._shift(use, change, scale, shift)

    def _shift(self, use: Use, change: "_Changes", scale: np.ndarray, shift: np.ndarray) -> None:
        """Give a node with a bias, or room for one, its corrected bias."""
        node, factor = use.node, bias_factor(use.node)
        if factor != 0 and len(node.input) > 2 and node.input[2]:
            change(use, lambda array: scale * array + shift / factor, is_bias=True)
            return
        if factor == 0:  # Its bias counts for nothing.
            _set_float(node, "beta", 1.0)
            factor = 1.0
        del node.input[2:]
        node.input.append(self._added("bias", use, shift / factor))

    def _shift_product(
        self, use: Use, change: "_Changes", scale: np.ndarray, shift: np.ndarray
    ) -> None:
        """Correct the Add behind a MatMul, or add one."""
        node = use.node
        if use.adder is not None:
            change(use, lambda array: scale * array + shift, is_bias=True)
            return
        inner = self._fresh(f"{node.output[0]}_product")
        name = self._added("bias", use, shift)
        output, node.output[0] = node.output[0], inner
        label = self._fresh_node(f"{node.name}_bias") if node.name else ""
        added = helper.make_node("Add", [inner, name], [output], label)
        insert_behind(use.scope.graph, node, added)

    def replace(
        self, scope: Scope, name: str, reads: int, function: Callable[[np.ndarray], np.ndarray]
    ) -> str | None:
        """Change a constant: in place where it keeps its shape and no more than `reads` inputs of
        nodes read it, else as a new initializer.

        Returns:
            the name of the new one.
        """
        tensor = self.constants.find(scope, name)
        assert tensor is not None
        array = numpy_helper.to_array(tensor, self._folder)
        result = function(array.astype(np.float64)).astype(array.dtype)
        if self.constants.readers(tensor) > reads or result.shape != array.shape:
            return self._new(name, result)
        tensor.CopyFrom(numpy_helper.from_array(result, tensor.name))
        self.changed.append(tensor.name or name)
        return None

    def _added(self, base: str, use: Use, array: np.ndarray) -> str:
        dtype = self.constants.dtype(use.scope, use.node)
        return self._new(f"{use.node.input[1]}_{base}", array.astype(dtype))

    def _new(self, base: str, array: np.ndarray) -> str:
        name = self._fresh(base)
        add_initializer(self._graph, numpy_helper.from_array(array, name))
        self.changed.append(name)
        return name


def add_inputs(
    model: ModelProto, layers: Iterable[Layer], constants: Constants
) -> dict[Layer, tuple[str, str]]:
    """Make inputs of the corrections of layers, in place: two, for scale and shift, of each.

    Returns:
        the names of both inputs by layer.
    """
    fresh, fresh_node = FreshNames(model), FreshNames(model, node_names)
    names = {}
    for layer in layers:
        use = layer.uses[0]
        dtype = helper.np_dtype_to_tensor_dtype(constants.dtype(use.scope, use.node))
        pair = fresh("correction_scale"), fresh("correction_shift")
        names[layer] = pair
        for name in pair:
            value = helper.make_tensor_value_info(name, dtype, None)
            model.graph.input.append(value)
        for use in layer.uses:
            tail = use.tail
            output, scaled = tail.output[0], fresh(f"{tail.output[0]}_scaled")
            plain = tail.output[0] = fresh(f"{output}_plain")
            labels = (fresh_node("correct_scale"), fresh_node("correct_shift"))
            insert_behind(
                use.scope.graph,
                tail,
                helper.make_node("Mul", [plain, pair[0]], [scaled], labels[0]),
                helper.make_node("Add", [scaled, pair[1]], [output], labels[1]),
            )
    return names


def insert_behind(graph: GraphProto | FunctionProto, node: NodeProto, *added: NodeProto) -> None:
    """Insert nodes behind one of a graph."""
    place = next(i for i, each in enumerate(graph.node) if each is node)
    for offset, new in enumerate(added, start=1):
        graph.node.insert(place + offset, new)


def _set_float(node: NodeProto, name: str, value: float) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.f = value
