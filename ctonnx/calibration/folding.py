"""Folding corrections into the weights of a model, or making inputs of them."""

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

    def __init__(self, folding: "Folding", uses: int):
        self._folding, self._uses = folding, uses
        self._names: dict[int, str | None] = {}

    def __call__(
        self,
        scope: Scope,
        node: NodeProto,
        place: int,
        function: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Change the constant that is an input of a node."""
        key = id(self._folding.constants.find(scope, node.input[place]))
        if key not in self._names:
            name = node.input[place]
            self._names[key] = self._folding.replace(scope, name, self._uses, function)
        node.input[place] = self._names[key] or node.input[place]


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
        change = _Changes(self, len(layer.uses))
        for use in layer.uses:
            node = use.node
            if node.op_type == "BatchNormalization":
                change(use.scope, node, 1, lambda array: scale * array)
                change(use.scope, node, 2, lambda array: scale * array + shift)
                continue
            change(use.scope, node, 1, partial(scaled, node, scale=scale))
            if node.op_type == "MatMul":
                self._shift_product(use, change, scale, shift)
            else:
                self._shift(use, change, scale, shift)

    def _shift(self, use: Use, change: "_Changes", scale: np.ndarray, shift: np.ndarray) -> None:
        """Give a node with a bias, or room for one, its corrected bias."""
        node, factor = use.node, bias_factor(use.node)
        if factor != 0 and len(node.input) > 2 and node.input[2]:
            change(use.scope, node, 2, lambda array: scale * array + shift / factor)
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
        node, add = use.node, use.adder
        if add is not None:
            place = 1 if add.input[0] == node.output[0] else 0
            change(use.scope, add, place, lambda array: scale * array + shift)
            return
        inner = self._fresh(f"{node.output[0]}_product")
        name = self._added("bias", use, shift)
        output, node.output[0] = node.output[0], inner
        label = self._fresh_node(f"{node.name}_bias") if node.name else ""
        added = helper.make_node("Add", [inner, name], [output], label)
        insert_behind(use.scope.graph, node, added)

    def replace(
        self, scope: Scope, name: str, uses: int, function: Callable[[np.ndarray], np.ndarray]
    ) -> str | None:
        """Change a constant: in place where it keeps its shape and no more nodes than `uses` read
        it, else as a new initializer.

        Returns:
            the name of the new one.
        """
        tensor = self.constants.find(scope, name)
        assert tensor is not None
        array = numpy_helper.to_array(tensor, self._folder)
        result = function(array.astype(np.float64)).astype(array.dtype)
        if self.constants.readers(tensor) > uses or result.shape != array.shape:
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
