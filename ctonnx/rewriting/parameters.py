"""The initializers and inputs that hold beta, c and operands: adding and finding them."""

from collections.abc import Iterable, Sequence

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from .. import ctu
from ..errors import UsageError
from ..model.graph import Scope, functions_of, keep, key_of, node_label, scopes
from ..model.names import FreshNames, node_names
from . import records

# Where CTU nodes have their parameters among their inputs.
BETA_SLOT, COEFF_SLOT = 1, 2


def scalar(name: str, value: float, dtype: int = TensorProto.FLOAT) -> TensorProto:
    """A tensor without dimensions."""
    return helper.make_tensor(name, dtype, [], [value])


def scalar_input(name: str) -> ValueInfoProto:
    """The ValueInfoProto of a float32 input without dimensions."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [])


def make_inputs(graph: GraphProto, names: Iterable[str], shape: Sequence[int] | None = ()) -> None:
    """Make inputs that must be fed of the initializers and inputs `names`: of their element type,
    float32 where an input is required already, and of a shape, or of any where None."""
    types = dict.fromkeys(names, TensorProto.FLOAT)
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.name in types}
    keep(graph.initializer, lambda tensor: tensor.name not in types)
    keep(graph.input, lambda value: value.name not in types)
    graph.input.extend(
        helper.make_tensor_value_info(name, types[name], shape) for name in sorted(types)
    )


def add_initializer(graph: GraphProto, tensor: TensorProto) -> None:
    """Add an initializer before the last one: some tools know that by its place."""
    graph.initializer.insert(max(len(graph.initializer) - 1, 0), tensor)


def fill(model: ModelProto, names: Iterable[str], value: float) -> None:
    """Make scalars of `value` of the initializers `names`; names of inputs are passed over."""
    names = set(names)
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(scalar(tensor.name, value))


class NewParameters:
    """The initializers and inputs that steering adds to a model's graph, under fresh names.

    `names` lists them.
    """

    def __init__(self, model: ModelProto):
        self._graph = model.graph
        self._initializers = {}
        self.names: list[str] = []
        self.fresh_name = FreshNames(model)
        self.fresh_node_name = FreshNames(model, node_names)

    def add(self, base: str, array: np.ndarray) -> str:
        """Add a float32 array, and return its name; equal arrays share an initializer."""
        key = base, array.shape, array.tobytes()
        if key not in self._initializers:
            name = self._initializers[key] = self._new_name(base)
            tensor = helper.make_tensor(name, TensorProto.FLOAT, array.shape, array.ravel())
            add_initializer(self._graph, tensor)
        return self._initializers[key]

    def add_input(self, base: str, value: float, optional: bool) -> str:
        """Add a scalar graph input, with `value` as its default where it is optional."""
        name = self._new_name(base)
        self._graph.input.append(scalar_input(name))
        if optional:
            add_initializer(self._graph, scalar(name, value))
        return name

    def add_operand(self, value: float, dtype: int) -> str:
        """Add a number in an element type, and return its name; equal ones are shared."""
        if dtype == TensorProto.FLOAT16:  # A bound beyond its range bounds nothing.
            limits = np.finfo(np.float16)
            value = float(np.clip(value, limits.min, limits.max))
        if (value, dtype) not in self._initializers:
            name = self._initializers[value, dtype] = self._new_name("ctu_operand")
            add_initializer(self._graph, scalar(name, value, dtype))
        return self._initializers[value, dtype]

    def _new_name(self, base: str) -> str:
        name = self.fresh_name(base)
        self.names.append(name)
        return name


def pass_into_functions(model: ModelProto, parameters: list[str]) -> None:
    """Give each model-local function that uses `parameters` these as inputs, in all its calls.

    A function sees no names of the graph that calls it.
    """
    functions = functions_of(model)
    scopes_of = {key: [] for key in functions}
    for scope in scopes(model):
        if scope.function is not None:
            scopes_of[key_of(scope.function)].append(scope)
    needs = {
        key: {name for scope in inner for node in scope.graph.node for name in node.input}
        & set(parameters)
        for key, inner in scopes_of.items()
    }

    def callees(inner):
        for scope in inner:
            for node in scope.graph.node:
                if key_of(node) in functions:
                    yield node, key_of(node)

    # A caller needs what its callees need; functions cannot recurse, so this settles.
    changed = True
    while changed:
        changed = False
        for key, inner in scopes_of.items():
            wanted = needs[key].union(*(needs[callee] for _, callee in callees(inner)))
            changed |= wanted != needs[key]
            needs[key] = wanted

    arity = {key: len(function.input) for key, function in functions.items()}
    for node, key in list(callees(scopes(model))):
        if needs[key]:
            records.record_node(node)
            node.input.extend([""] * (arity[key] - len(node.input)))
            node.input.extend(name for name in parameters if name in needs[key])
    for key, function in functions.items():
        function.input.extend(name for name in parameters if name in needs[key])
        if any(ctu.is_ctu(node) for scope in scopes_of[key] for node in scope.graph.node):
            function.opset_import.append(helper.make_opsetid(ctu.DOMAIN, ctu.VERSION))


class Parameters:
    """The parameters of a model's CTUs: `betas` and `coeffs` are the names of the initializers and
    inputs that hold them.

    Args:
        model: ModelProto.
        ctus: its CTU nodes, those of its own and not of the op's function.
        beta_input: the input that the metadata name. A model lowered to primitives holds no CTU,
            but may have that input.
    """

    def __init__(self, model: ModelProto, ctus: list[NodeProto], beta_input: str | None = None):
        self._model = model
        self.betas = _inputs(ctus, BETA_SLOT)
        self.coeffs = _inputs(ctus, COEFF_SLOT)
        if not ctus and beta_input is not None:
            self.betas = {beta_input}

    @property
    def required(self) -> set[str]:
        """The betas that must be fed, as no initializer gives a default."""
        return self.betas - {tensor.name for tensor in self._model.graph.initializer}

    @property
    def inputs(self) -> set[str]:
        """The betas that are inputs of the graph."""
        return self.betas & {value.name for value in self._model.graph.input}

    def check_changeable(self, coeff: bool = False) -> None:
        """Refuse parameters that cannot change for all CTUs and nothing else.

        Args:
            coeff: whether c is to change as well as beta.

        Raises:
            UsageError: one lies outside the graph, something other than CTUs uses it, or another
                tool has given beta or c another type.
        """
        _check_types(self._model, self.betas | self.coeffs)
        _check_exclusive(self._model, self.betas, BETA_SLOT)
        if coeff:
            _check_exclusive(self._model, self.coeffs, COEFF_SLOT)

    def merge_betas(self, name: str) -> None:
        """Replace all betas by `name` in the CTUs, and in what is passed to functions."""
        model, betas = self._model, self.betas
        passed, sees = _passed(model, betas)

        def merge(inputs, positions):
            if positions:
                first, *others = sorted(positions)
                inputs[first] = name
                for i in reversed(others):
                    del inputs[i]

        for scope in scopes(model):
            for node in scope.graph.node if sees(scope) else ():
                merge(node.input, passed.get(key_of(node), ()))
                for i, parameter in enumerate(node.input):
                    if parameter in betas and ctu.is_ctu(node):
                        node.input[i] = name
        for function in model.functions:
            merge(function.input, passed.get(key_of(function), ()))


def _inputs(ctus, slot):
    return {name for node in ctus for name in node.input[slot : slot + 1]}


def _check_types(model, parameters):
    """Refuse `parameters` that are not float32: no kernel takes them."""
    types = {t.name: t.data_type for t in model.graph.initializer}
    types.update((v.name, v.type.tensor_type.elem_type) for v in model.graph.input)
    for name in sorted(parameters & types.keys()):
        if types[name] in ctu.FLOATING and types[name] != TensorProto.FLOAT:
            dtype = TensorProto.DataType.Name(types[name]).lower()
            raise UsageError(
                f"{name!r} is {dtype}, which a CTU does not take, as another tool has converted "
                "the steered model: `ctonnx unpatch` gives the converted original, to steer again"
            )


def _check_exclusive(model, parameters, slot):
    """Refuse `parameters` that are not the graph's, or more than input `slot` of CTUs: ONNX
    Runtime's optimiser shares equal constants."""
    graph = model.graph
    beyond = parameters - {value.name for value in (*graph.input, *graph.initializer)}
    if beyond:
        raise UsageError(
            f"{min(beyond)!r} is no input or initializer of the graph, so it cannot be changed: "
            "steer the original"
        )
    passed, sees = _passed(model, parameters)
    for scope in scopes(model):
        for node in scope.graph.node if sees(scope) else ():
            allowed = {slot} if ctu.is_ctu(node) else passed.get(key_of(node), ())
            for i, name in enumerate(node.input):
                if name in parameters and i not in allowed:
                    raise UsageError(
                        f"{name!r} is also an input of {node.op_type} {node_label(node)!r}, as the "
                        "optimiser shares equal constants: steer the original"
                    )


def _passed(model, parameters):
    """Which functions get `parameters` as `pass_into_functions` passes them: under the same name
    inside as in all calls.

    Returns:
        key of a function -> the indices of these inputs, and a function that tells whether a Scope
        sees the parameters.
    """
    functions = {key: f for key, f in functions_of(model).items() if not ctu.is_ctu(f)}
    passed = {
        key: {i for i, name in enumerate(function.input) if name in parameters}
        for key, function in functions.items()
    }
    for scope in scopes(model):
        for node in scope.graph.node:
            indices = passed.get(key_of(node))
            if indices:
                names = functions[key_of(node)].input
                indices -= {i for i in indices if node.input[i : i + 1] != [names[i]]}

    def sees(scope: Scope) -> bool:
        # A function that gets none may have tensors of its own under such names.
        return scope.function is None or bool(passed.get(key_of(scope.function)))

    return passed, sees
