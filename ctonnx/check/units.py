"""Holding every CTU of a model to the op's numeric contract, by itself."""

from collections import defaultdict

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from .. import ctu
from ..model.graph import node_label
from ..model.names import unique_name
from ..ort.compare import within

# The X at which they are tried: every magnitude and both signs.
_PROBES = np.concatenate([-np.geomspace(50, 1e-6, 200), [0.0], np.geomspace(1e-6, 50, 200)])


class Units:
    """The CTUs of a model, each set of parameters once, as a model with an X and a Y for each.

    Those in model-local functions, and those whose parameters are computed or in another file, are
    left out: `left_out` is their number.

    Args:
        steered: SteeredModel.
        fed: input name -> array, of what is fed for a parameter.
    """

    def __init__(self, steered, fed):
        model = steered.proto
        held = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            tensors = [attribute.t for attribute in node.attribute if attribute.HasField("t")]
            if node.op_type == "Constant" and node.output and tensors:
                held[node.output[0]] = TensorProto()
                held[node.output[0]].CopyFrom(tensors[0])
                held[node.output[0]].name = node.output[0]
        held.update((name, numpy_helper.from_array(array, name)) for name, array in fed.items())
        external = TensorProto.EXTERNAL
        held = {name: t for name, t in held.items() if t.data_location != external}
        found, self.left_out = defaultdict(list), 0
        for site in steered.sites:
            node, scope = site.node, site.scope
            if ctu.is_ctu(node):
                names = tuple(node.input[1:])
                if scope.function is None and held.keys() >= set(names):
                    found[node.op_type, names, _type(node, scope, held)].append(node)
                else:
                    self.left_out += 1
        self._model = ModelProto(
            ir_version=model.ir_version,
            opset_import=model.opset_import,
            functions=[f for f in model.functions if ctu.is_ctu(f)],
        )
        graph, usual = self._model.graph, _usual_type(found)
        graph.name = "units"
        self._inputs, self._scales, self._factors, self._low = {}, {}, {}, {}
        taken = {name for _, names, _ in found for name in names}
        graph.initializer.extend(held[name] for name in sorted(taken))
        for (op_type, names, dtype), nodes in found.items():
            first = node_label(nodes[0])
            y = unique_name(f"{first} and {len(nodes) - 1} alike" if nodes[1:] else first, taken)
            x = unique_name(f"x of {y}", taken)
            taken.update((x, y))
            node = graph.node.add(op_type=op_type, domain=ctu.DOMAIN, input=[x, *names], output=[y])
            node.attribute.extend(nodes[0].attribute)
            for name, values in (x, graph.input), (y, graph.output):
                values.append(helper.make_tensor_value_info(name, dtype or usual, None))
            parameters = [numpy_helper.to_array(held[name]) for name in names]
            shape = np.broadcast_shapes(*(p.shape for p in parameters))
            probes = _PROBES.reshape(-1, *[1] * len(shape)) * np.ones(shape)
            self._inputs[x] = probes.astype(helper.tensor_dtype_to_np_dtype(dtype or usual))
            # A slope below 0 makes terms cancel, and each kink adds its error.
            negative = op_type == ctu.OP_TYPE and any(np.any(p < 0) for p in parameters[2:])
            self._scales[y] = np.maximum(1.0, np.abs(probes)) if negative else 1.0
            self._factors[y] = 1 if op_type == ctu.OP_TYPE else 3
            self._low[y] = bool(np.any(parameters[0] < ctu.FALLBACK_FROM_BETA))
        self._expected = None

    def __len__(self):
        return len(self._factors)

    def compare(self, way, library):
        """Compare with the exact formula.

        Args:
            way: a function from a ModelProto to something with `run`, as runs.Model.
            library: whether that uses the op library: the kernel's bound holds, not the fallback's.

        Returns:
            list of compare.Comparison, named as the nodes are.
        """
        if self._expected is None:
            from .reference import Reference

            self._expected = Reference(self._model).run(self._inputs)
        actual = way(self._model).run(self._inputs)
        allowed = {}
        for value in self._model.graph.output:
            y, exact = value.name, self._expected[value.name]
            bounds = ctu.LOW_FALLBACK_BOUNDS if self._low[y] and not library else ctu.BOUNDS
            bound = self._factors[y] * bounds[value.type.tensor_type.elem_type]
            allowed[y] = bound * np.maximum(np.abs(exact), self._scales[y])
        return within(self._expected, actual, allowed)


def _type(node, scope, held):
    """The element type of a CTU's X, or 0: that of its slope or bounds, if it has any."""
    operands = [held[name].data_type for name in node.input[3:]]
    return next(iter((*operands, *scope.types.get(node.input[0], ()))), 0)


def _usual_type(found):
    """That of most CTUs whose type is known."""
    known = [dtype for _, _, dtype in found if dtype]
    return max(known, key=known.count, default=TensorProto.FLOAT)
