"""Holding each CTU of a model to the op's numeric contract, by itself."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .. import ctu
from ..model.graph import Scope, node_label
from ..model.names import unique_name
from ..ort.compare import Comparison, within
from ..ort.runs import Model
from ..rewriting.steered import SteeredModel

# X has every magnitude and both signs.
_PROBES = np.concatenate([-np.geomspace(50, 1e-6, 200), [0.0], np.geomspace(1e-6, 50, 200)])

# Op type, names of the inputs behind X, element type of X or 0: what CTUs that compute the same
# share.
_Group = tuple[str, tuple[str, ...], int]


@dataclass(frozen=True)
class _Contract:
    """What a group may err by: `bounds` of the contract times `factor`, relative to `scale` or
    |Y|, whichever is larger. `low_beta` tells that a beta is below ctu.FALLBACK_FROM_BETA."""

    dtype: int
    scale: np.ndarray | float
    factor: int
    low_beta: bool

    def allowed(self, expected: np.ndarray, library: bool) -> np.ndarray:
        bounds = ctu.LOW_FALLBACK_BOUNDS if self.low_beta and not library else ctu.BOUNDS
        return self.factor * bounds[self.dtype] * np.maximum(np.abs(expected), self.scale)


class Units:
    """The CTUs of a model, one for each set of parameters, as a model with an X and a Y for each.

    `left_out` is the number of those that are not in it: CTUs in model-local functions, and those
    whose parameters are computed or in another file.

    Args:
        steered: the model.
        feeds: input name -> array, of parameters that are inputs.
    """

    def __init__(self, steered: SteeredModel, feeds: Mapping[str, np.ndarray]):
        tensors = _constants(steered.proto)
        tensors.update((name, numpy_helper.from_array(a, name)) for name, a in feeds.items())
        external = TensorProto.EXTERNAL
        tensors = {name: t for name, t in tensors.items() if t.data_location != external}
        groups, self.left_out = _groups(steered, tensors)
        self._model = ModelProto(
            ir_version=steered.proto.ir_version,
            opset_import=steered.proto.opset_import,
            functions=[f for f in steered.proto.functions if ctu.is_ctu(f)],
        )
        self._model.graph.name = "units"
        self._inputs: dict[str, np.ndarray] = {}
        self._contracts: dict[str, _Contract] = {}
        self._expected: dict[str, np.ndarray] | None = None
        self._fill(groups, tensors)

    def __len__(self) -> int:
        return len(self._contracts)

    def _fill(self, groups: dict[_Group, list[NodeProto]], tensors: dict[str, TensorProto]) -> None:
        """Give the model a node for each group, with an input, an output and a contract."""
        graph, commonest = self._model.graph, _commonest_type(groups)
        taken = {name for _, names, _ in groups for name in names}
        graph.initializer.extend(tensors[name] for name in sorted(taken))
        for (op_type, names, dtype), nodes in groups.items():
            dtype = dtype or commonest
            label = node_label(nodes[0])
            label = f"{label} and {len(nodes) - 1} alike" if nodes[1:] else label
            y = unique_name(label, taken)
            x = unique_name(f"x of {y}", taken)
            taken.update((x, y))
            node = graph.node.add(op_type=op_type, domain=ctu.DOMAIN, input=[x, *names], output=[y])
            node.attribute.extend(nodes[0].attribute)
            for name, values in (x, graph.input), (y, graph.output):
                values.append(helper.make_tensor_value_info(name, dtype, None))
            parameters = [numpy_helper.to_array(tensors[name]) for name in names]
            shape = np.broadcast_shapes(*(p.shape for p in parameters))
            probes = _PROBES.reshape(-1, *[1] * len(shape)) * np.ones(shape)
            self._inputs[x] = probes.astype(helper.tensor_dtype_to_np_dtype(dtype))
            # A slope below 0 makes terms cancel, and each kink adds its error.
            is_unit = op_type == ctu.OP_TYPE
            negative = is_unit and any(np.any(p < 0) for p in parameters[2:])
            self._contracts[y] = _Contract(
                dtype,
                scale=np.maximum(1.0, np.abs(probes)) if negative else 1.0,
                factor=1 if is_unit else 3,
                low_beta=bool(np.any(parameters[0] < ctu.FALLBACK_FROM_BETA)),
            )

    def compare(self, way: Callable[[ModelProto], Model], library: bool) -> list[Comparison]:
        """Compare the units with the exact formula.

        Args:
            way: opens a ModelProto.
            library: whether that uses the op library: the kernel's bound holds, not the fallback's.

        Returns:
            Comparisons, named as the nodes are.
        """
        if self._expected is None:
            from .reference import Reference

            self._expected = Reference(self._model).run(self._inputs)
        allowed = {
            y: contract.allowed(self._expected[y], library)
            for y, contract in self._contracts.items()
        }
        return within(self._expected, way(self._model).run(self._inputs), allowed)


def _constants(model: ModelProto) -> dict[str, TensorProto]:
    """The initializers and Constant tensors of the main graph, by name."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        values = [attribute.t for attribute in node.attribute if attribute.HasField("t")]
        if node.op_type == "Constant" and node.output and values:
            tensor = tensors[node.output[0]] = TensorProto()
            tensor.CopyFrom(values[0])
            tensor.name = node.output[0]
    return tensors


def _groups(
    steered: SteeredModel, tensors: dict[str, TensorProto]
) -> tuple[dict[_Group, list[NodeProto]], int]:
    """The CTUs whose parameters are in `tensors`, by what they compute, and how many others."""
    groups, left_out = defaultdict(list), 0
    for site in steered.sites:
        node = site.node
        if not ctu.is_ctu(node):
            continue
        names = tuple(node.input[1:])
        if site.scope.function is None and tensors.keys() >= set(names):
            groups[node.op_type, names, _type(node, site.scope, tensors)].append(node)
        else:
            left_out += 1
    return groups, left_out


def _type(node: NodeProto, scope: Scope, tensors: dict[str, TensorProto]) -> int:
    """The element type of a CTU's X, or 0: that of its slope or bounds, if it has any."""
    operands = [tensors[name].data_type for name in node.input[3:]]
    return next(iter((*operands, *scope.types.get(node.input[0], ()))), 0)


def _commonest_type(groups: dict[_Group, list[NodeProto]]) -> int:
    """The element type of most groups, of those that know it."""
    types = [dtype for _, _, dtype in groups if dtype]
    return max(types, key=types.count, default=TensorProto.FLOAT)
