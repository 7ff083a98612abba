"""The linear layers of a steered model: which recalibration corrects, and why not the others.

A layer is corrected where a steered activation reaches it and a later layer, or a later activation,
reads it. The last layer of a classifier stays as it is: the mean and variance of a class's score
are what the network says of the data.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from onnx import GraphProto, NodeProto

from ..model.flow import Flow, reached_by_values
from ..model.graph import Scope, node_label
from .constants import Constants
from .flat import Flat
from .linear import axis_of, is_layer

# Linear layers in forms that are left alone, and why.
_QUANTIZED = "it is quantized"
_FUSED = "another tool has fused it with other ops"
_OTHERS = {
    "ConvInteger": _QUANTIZED,
    "DynamicQuantizeMatMul": _QUANTIZED,
    "FusedConv": _FUSED,
    "FusedGemm": _FUSED,
    "FusedMatMul": _FUSED,
    "MatMulInteger": _QUANTIZED,
    "MatMulIntegerToFloat": _QUANTIZED,
    "MatMulNBits": _QUANTIZED,
    "NhwcFusedConv": _FUSED,
    "QGemm": _QUANTIZED,
    "QLinearConv": _QUANTIZED,
    "QLinearMatMul": _QUANTIZED,
}

# Ops that set mean and variance themselves, and that which does so for every channel.
_INSTANCE = "InstanceNormalization"
_NORMALIZING = {
    "GroupNormalization",
    _INSTANCE,
    "LayerNormalization",
    "LpNormalization",
    "MeanVarianceNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}


@dataclass(eq=False)
class Use:
    """A node that computes a layer: `node` in its `scope` of the model.

    `output` is the tensor that is corrected, by its name in the flat graph. `adder` is the Add
    behind a MatMul that adds its bias.
    """

    scope: Scope
    node: NodeProto
    output: str
    adder: NodeProto | None = None

    @property
    def tail(self) -> NodeProto:
        """The node whose output is corrected."""
        return self.adder or self.node


@dataclass(eq=False)
class Layer:
    """A linear layer that is corrected, and all its uses: several where they share a weight.

    `axis` is that of the channels in the output. Layers of a `level` depend on those of lower ones.
    """

    name: str
    op: str
    axis: int
    uses: list[Use] = field(default_factory=list)
    level: int = 0


@dataclass(frozen=True)
class Skipped:
    """A linear layer that steering reaches and that is left alone, and the reason."""

    name: str
    op: str
    reason: str


def find_layers(
    flat: Flat, constants: Constants, parameters: Collection[str]
) -> tuple[list[Layer], list[Skipped]]:
    """The layers to correct, and those that are left alone.

    Args:
        flat: the model, flat.
        constants: the model's constants.
        parameters: the names of the inputs that hold β, and c where it changes.
    """
    finder = _Finder(flat, constants, parameters)
    layers: dict[tuple, Layer] = {}
    skipped = [*finder.hidden()]
    for node in finder.flow.nodes:
        if not finder.is_reached(node):
            continue
        reason = finder.reason_against(node)
        if reason is not None:
            skipped.append(Skipped(node_label(node), node.op_type, reason))
            continue
        use = finder.use(node)
        if use is None:
            continue
        key = constants.identity(use.scope, use.node)
        layer = layers.setdefault(key, Layer(node_label(node), node.op_type, axis_of(node)))
        layer.uses.append(use)
    for key, layer in list(layers.items()):
        reason = _reason_to_split(layer, constants)
        if reason is not None:
            skipped.append(Skipped(layer.name, layer.op, reason))
            del layers[key]
    return list(layers.values()), skipped


def _reason_to_split(layer: Layer, constants: Constants) -> str | None:
    """Why one correction does not serve all that reads a layer's weight, or None."""
    use = layer.uses[0]
    if len({(each.node.op_type, each.adder is None) for each in layer.uses}) > 1:
        return "its weight is shared by nodes of several kinds"
    if layer.op != "BatchNormalization":
        weight = constants.find(use.scope, use.node.input[1])
        if weight is not None and constants.readers(weight) > len(layer.uses):
            return "its weight serves other nodes too"
    return None


def level_layers(graph: GraphProto, layers: list[Layer]) -> tuple[dict[str, int], list[Skipped]]:
    """Give every layer its level, and drop from `layers` those whose uses depend on each other.

    Returns:
        the level from which on a tensor is final, by name, and the layers dropped.
    """
    flow, skipped = Flow(graph), []
    while True:
        for layer in layers:
            layer.level = 0
        layer_of = {use.output: layer for layer in layers for use in layer.uses}
        final_from, changed = {}, True
        while changed and all(layer.level <= len(layers) for layer in layers):
            final_from, changed = _raise_levels(flow, layer_of)
        circular = [layer for layer in layers if layer.level > len(layers)]
        if not circular:
            return final_from, skipped
        worst = max(circular, key=lambda layer: len(layer.uses))
        layers.remove(worst)
        reason = "its weight is shared by uses that depend on each other"
        skipped.append(Skipped(worst.name, worst.op, reason))


def _raise_levels(flow: Flow, layer_of: dict[str, Layer]) -> tuple[dict[str, int], bool]:
    """One pass over the nodes; whether a level has risen."""
    final_from, changed = {}, False
    for node, names in zip(flow.nodes, flow.reads, strict=True):
        level = max((final_from.get(name, 0) for name in names), default=0)
        for name in node.output:
            layer = layer_of.get(name)
            if layer is not None:
                changed |= level > layer.level
                layer.level = max(level, layer.level)
                final_from[name] = layer.level + 1
            else:
                final_from[name] = level
    return final_from, changed


class _Finder:
    """What is known of a flat graph's nodes: `flow` is its data flow."""

    def __init__(self, flat: Flat, constants: Constants, parameters: Collection[str]):
        graph = flat.model.graph
        self._flat, self._constants = flat, constants
        self.flow = Flow(graph)
        self._reached = reached_by_values(graph, parameters)
        self._moved = reached_by_values(graph, parameters, _NORMALIZING)
        self._readers = defaultdict(list)
        for node, names in zip(self.flow.nodes, self.flow.reads, strict=True):
            for name in names:
                self._readers[name].append(node)
        self._outputs = {value.name for value in graph.output}
        self._leading = self._leading_tensors(parameters)

    def _leading_tensors(self, parameters: Collection[str]) -> set[str]:
        """The names of the tensors that a linear layer or a steered activation depends on."""
        free = self.flow.constants.union(parameters)
        for node, names in zip(self.flow.nodes, self.flow.reads, strict=True):
            if names and names <= free:
                free.update(filter(None, node.output))
        steering = (free - self.flow.constants) | set(parameters)
        leading = set()
        for node, names in zip(reversed(self.flow.nodes), reversed(self.flow.reads), strict=True):
            steered = bool(names & steering) and not names <= free
            if is_layer(node) or steered or not leading.isdisjoint(node.output):
                leading |= names
        return leading

    def hidden(self) -> Iterator[Skipped]:
        """The linear layers that are not among the flat graph's nodes."""
        for scope, node in self._flat.hidden():
            if is_layer(node):
                yield Skipped(node_label(node), node.op_type, self._flat.reason(scope))

    def is_reached(self, node: NodeProto) -> bool:
        """Whether a node is a linear layer whose input steering changes."""
        linear = is_layer(node) or node.op_type in _OTHERS
        # Behind an attention's scores, a MatMul of two computed tensors is no layer.
        constant = len(self.flow.constants.intersection(node.input)) > 0
        return linear and constant and any(name in self._reached for name in node.input)

    def reason_against(self, node: NodeProto) -> str | None:
        """Why a linear layer that is reached is left alone, or None."""
        if node.op_type in _OTHERS:
            return _OTHERS[node.op_type]
        if not any(name in self._moved for name in node.input):
            return "a normalization in front of it sets mean and variance"
        if node.output[0] not in self._leading:
            return "it is the last layer"
        reason = self._constants.reason_against(*self._flat.origin(node))
        if reason is not None:
            return reason
        if self._followers(node) == [_INSTANCE]:
            return f"the {_INSTANCE} behind it sets mean and variance"
        return None

    def use(self, node: NodeProto) -> Use | None:
        """The Use of a node; None where a BatchNormalization behind it is corrected in its
        place."""
        followers = self._followers(node)
        scope, original = self._flat.origin(node)
        if followers == ["BatchNormalization"] and node.op_type != "BatchNormalization":
            (norm,) = self._readers[node.output[0]]
            if self._constants.reason_against(*self._flat.origin(norm)) is None:
                return None
        if node.op_type == "MatMul" and followers == ["Add"]:
            (add,) = self._readers[node.output[0]]
            found = self._flat.find(add)
            if found is not None and self._constants.is_bias(found[1], original, scope):
                return Use(scope, original, add.output[0], found[1])
        return Use(scope, original, node.output[0])

    def _followers(self, node: NodeProto) -> list[str]:
        """The op types of the nodes that read a node's output; none if it is an output itself."""
        name = node.output[0]
        return [] if name in self._outputs else [n.op_type for n in self._readers[name]]
