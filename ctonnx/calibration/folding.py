"""Folding corrections into the weights of a model, or making inputs of them."""

from collections.abc import Callable, Iterable

import numpy as np
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

from ..model.names import FreshNames, node_names
from ..rewriting.parameters import add_initializer
from .constants import Constants
from .layers import Layer, Use
from .moments import Correction


class Folder:
    """Folds corrections into a model, in place.

    Args:
        model: the ModelProto that the layers are of.
        constants: its constants.
        folder: the folder of its external data.

    Attributes:
        changed: the names of the tensors that were changed or added, by the layers' order.
    """

    def __init__(self, model: ModelProto, constants: Constants, folder: str | None):
        self._graph, self._constants = model.graph, constants
        self._folder = "" if folder is None else folder
        self._fresh, self._fresh_node = FreshNames(model), FreshNames(model, node_names)
        self.changed: list[str] = []

    def fold(self, layer: Layer, correction: Correction) -> None:
        """Let a layer compute its corrected output.

        Formula: with y = W x + b, scale · y + shift = (scale · W) x + (scale · b + shift).
        """
        self._done: dict[int, str] = {}
        self._uses = len(layer.uses)
        for use in layer.uses:
            self._fold_use(use, correction.scale, correction.shift)

    def _fold_use(self, use: Use, scale: np.ndarray, shift: np.ndarray) -> None:
        node = use.node
        if node.op_type == "BatchNormalization":
            self._change(use, 1, lambda array: scale * array)
            self._change(use, 2, lambda array: scale * array + shift)
            return
        self._change(use, 1, lambda array: _scaled(node, array, scale))
        if node.op_type == "MatMul":
            self._shift_product(use, scale, shift)
            return
        weight = _attributes(node).get("beta", 1.0) if node.op_type == "Gemm" else 1.0
        if weight == 0:
            _set_float(node, "beta", 1.0)
        self._shift(use, scale, shift, weight)

    def _shift(self, use: Use, scale: np.ndarray, shift: np.ndarray, weight: float) -> None:
        """Give a node with a bias, or room for one, its corrected bias."""
        node = use.node
        if weight != 0 and len(node.input) > 2 and node.input[2]:
            self._change(use, 2, lambda array: scale * array + shift / weight)
            return
        del node.input[2:]
        node.input.append(self._added("bias", use, shift / (weight or 1.0)))

    def _shift_product(self, use: Use, scale: np.ndarray, shift: np.ndarray) -> None:
        """Correct the Add behind a MatMul, or add one."""
        node, add = use.node, use.adder
        if add is not None:
            place = 1 if add.input[0] == node.output[0] else 0
            self._change(use, place, lambda array: scale * array + shift, add)
            return
        inner = self._fresh(f"{node.output[0]}_product")
        name = self._added("bias", use, shift)
        output, node.output[0] = node.output[0], inner
        label = self._fresh_node(f"{node.name}_bias") if node.name else ""
        insert_behind(
            use.scope.graph, node, helper.make_node("Add", [inner, name], [output], label)
        )

    def _change(
        self,
        use: Use,
        place: int,
        function: Callable[[np.ndarray], np.ndarray],
        node: NodeProto | None = None,
    ) -> None:
        """Change the constant that is an input of a node: in place where nothing else reads it."""
        node = node or use.node
        tensor = self._constants.find(use.scope, node.input[place])
        assert tensor is not None
        if id(tensor) in self._done:
            if self._done[id(tensor)]:
                node.input[place] = self._done[id(tensor)]
            return
        array = numpy_helper.to_array(tensor, self._folder)
        result = function(array.astype(np.float64)).astype(array.dtype)
        alone = self._constants.readers(tensor) <= self._uses
        if alone and result.shape == array.shape:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(result, name))
            self._done[id(tensor)] = ""
            self.changed.append(name or node.input[place])
        else:
            self._done[id(tensor)] = node.input[place] = self._new(node.input[place], result)

    def _added(self, base: str, use: Use, array: np.ndarray) -> str:
        dtype = self._constants.dtype(use.scope, use.node)
        return self._new(f"{use.node.input[1]}_{base}", array.astype(dtype))

    def _new(self, base: str, array: np.ndarray) -> str:
        name = self._fresh(base)
        add_initializer(self._graph, numpy_helper.from_array(array, name))
        self.changed.append(name)
        return name


def add_inputs(
    model: ModelProto, layers: Iterable[Layer], constants: Constants
) -> dict[int, tuple[str, str]]:
    """Make inputs of the corrections of layers, in place: two, for scale and shift, of each.

    Returns:
        the names of both inputs by the id of the layer.
    """
    fresh, fresh_node = FreshNames(model), FreshNames(model, node_names)
    names = {}
    for layer in layers:
        use = layer.uses[0]
        dtype = helper.np_dtype_to_tensor_dtype(constants.dtype(use.scope, use.node))
        pair = fresh("correction_scale"), fresh("correction_shift")
        names[id(layer)] = pair
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


def _scaled(node: NodeProto, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """A weight whose output channels are scaled."""
    attributes = _attributes(node)
    if node.op_type == "Conv":
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    if node.op_type == "ConvTranspose":
        groups = attributes.get("group", 1)
        inner, outer = weight.shape[0] // groups, weight.shape[1]
        split = weight.reshape(groups, inner, outer, -1) * scale.reshape(groups, 1, outer, 1)
        return split.reshape(weight.shape)
    by_row = node.op_type == "Gemm" and attributes.get("transB", 0)
    return weight * (scale[:, None] if by_row else scale)


def _attributes(node: NodeProto) -> dict:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _set_float(node: NodeProto, name: str, value: float) -> None:
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.f = value
