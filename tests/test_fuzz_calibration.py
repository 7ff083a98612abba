"""Fuzzing calibration: in random networks of linear layers, whose weights and biases are shared at
random, every layer gets back its statistics, and nothing else changes."""

import random

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from test_calibration import Watched, axes_of, outputs_of
from test_fuzz import FACTOR, SEED

import ctonnx
from ctonnx.calibration import folding

NETWORKS = 25 * FACTOR
DATA = np.random.default_rng(SEED).normal(size=(16, 6, 4, 4)).astype(np.float32)


class Network:
    """A random network whose tensors all have six channels, so that weights fit anywhere."""

    def __init__(self, rng):
        self.rng, self.nodes, self.weights, self.tensors = rng, [], {}, {}
        for op, rank, weights in (
            *(("Conv", 4, [(6, 6, 1, 1)]), ("Relu", 4, []), ("Conv", 4, [(6, 6, 1, 1)])),
            *(("Relu", 4, []), ("GlobalAveragePool", 0, []), ("Flatten", 2, [])),
        ):
            last = self.nodes[-1].output[0] if self.nodes else "x"
            self.add(op, rank, last, *[self.weight(*shape) for shape in weights])
        for _ in range(rng.randint(6, 20)):
            self.grow()

    def add(self, op, rank, *inputs, **attributes):
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"n_{name}", **attributes))
        self.tensors.setdefault(rank, []).append(name)
        return name

    def weight(self, *shape, positive=False):
        """The name of a new constant, or of one that is there, perhaps by another name."""
        key = shape, positive
        found = [name for name, (kind, _) in self.weights.items() if kind == key]
        if found and self.rng.random() < 0.3:
            return self.rng.choice(found)
        name = f"w{len(self.weights)}"
        values = np.random.default_rng(self.rng.randrange(1 << 30)).normal(size=shape)
        values *= 1 if len(shape) < 2 else (len(shape) - 1) / np.sqrt(np.prod(shape[1:]))
        self.weights[name] = key, np.abs(values) + 0.5 if positive else values
        return name

    def grow(self):
        rng, rank = self.rng, self.rng.choice((2, 4))
        one, other = (rng.choice(self.tensors[rank][-4:]) for _ in range(2))
        op = rng.choice(("Relu", "Relu", "Sum", "Norm", *["Linear"] * 3))
        bias = [self.weight(6)] if rng.random() < 0.6 else []
        match op, rank:
            case "Relu", _:
                self.add(rng.choice(("Relu", "Relu", "Abs", "Tanh")), rank, one)
            case "Sum", _:
                self.add("Add", rank, one, rng.choice((other, self.weight(*[1] * rank))))
            case "Norm", _:
                three = [self.weight(6) for _ in range(3)]
                self.add("BatchNormalization", rank, one, *three, self.weight(6, positive=True))
            case "Linear", 4:
                op, group = rng.choice(("Conv", "ConvTranspose")), rng.choice((1, 2, 6))
                self.add(op, rank, one, self.weight(6, 6 // group, 1, 1), *bias, group=group)
            case _ if rng.random() < 0.6:
                how = {
                    "alpha": -0.5,
                    "beta": rng.choice((1.0, 2.0, 0.0)),
                    "transB": rng.choice((0, 1)),
                }
                self.add("Gemm", 2, one, self.weight(6, 6), *bias, **how)
            case _:
                product = self.add("MatMul", 2, one, self.weight(6, 6))
                row = self.weight(*rng.choice(((6,), (1, 6), (1,), ())))
                if bias:
                    self.add("Add", 2, *rng.sample((product, row), 2))
                    self.tensors[2].remove(product)

    def model(self):
        nodes = self.rng.sample(self.nodes, len(self.nodes))  # In any order.
        read = {name for node in nodes for name in node.input}
        value = helper.make_tensor_value_info
        ends = [value(n.output[0], 1, None) for n in self.nodes if n.output[0] not in read]
        image = value("x", TensorProto.FLOAT, ["N", *DATA.shape[1:]])
        graph = helper.make_graph(nodes, "g", [image], ends)
        for name, (_, array) in self.weights.items():
            graph.initializer.append(numpy_helper.from_array(array.astype("f4"), name))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def corrected_by_nodes(steered, folded):
    """A steered model with every correction as two nodes: as it is to be without folding."""
    model = onnx.ModelProto()
    model.CopyFrom(steered)
    places = {use.output: found for layer, found in folded for use in layer.uses}
    for node in list(model.graph.node):
        name = node.output[0]
        if name in places:
            node.output[0] = f"{name}_plain"
            for kind, array in zip("ab", places[name].arrays(np.dtype("f4")), strict=True):
                model.graph.initializer.append(numpy_helper.from_array(array, name + kind))
            for op, a, b, c in (("Mul", "_plain", "a", "_scaled"), ("Add", "_scaled", "b", "")):
                model.graph.node.add(op_type=op, input=[name + a, name + b], output=[name + c])
    return model


def test_random_networks(monkeypatch):
    watched, rng, corrected = Watched(monkeypatch), random.Random(SEED), 0
    folded, fold = [], folding.Folding.fold
    monkeypatch.setattr(folding.Folding, "fold", lambda *a: (folded.append(a[1:]), fold(*a))[1])
    for number in range(NETWORKS):
        model, beta = Network(rng).model(), rng.choice((0.0, 0.3, 0.7))
        folded.clear()
        calibrated = ctonnx.patch(model, beta, calibration=DATA)
        corrected += len(folded)
        expected = corrected_by_nodes(ctonnx.patch(model, beta), folded)
        names = {value.name: 0 for value in model.graph.output} | axes_of(watched.last)
        runs = [outputs_of(each, names, {"x": DATA}) for each in (expected, calibrated)]
        for name, before, after in zip(names, *runs, strict=True):
            close = 1e-3 * (np.abs(before).max() + 1e-3)
            np.testing.assert_allclose(after, before, atol=close, err_msg=f"{number} {name}")
    assert corrected > NETWORKS
