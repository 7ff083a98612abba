"""The reference run: any ONNX model in float64, by onnx's ReferenceEvaluator with PyTorch bodies.

It shares no code with ONNX Runtime, nor with what ctonnx writes into a model: a CTU is the paper's
formula, whatever function the model holds. The ops are in `ops`.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    helper,
    inliner,
    numpy_helper,
)
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import RuntimeContextError

from .. import ctu
from ..errors import ModelError, UsageError, first_line
from ..model import files
from ..model.external import has_external_data, read_external_data
from ..model.graph import DEFAULT_DOMAINS, functions_of, key_of, node_label, scopes
from ..model.inference import check_calls
from ..model.values import arrays
from ..optional import require
from ..rewriting.renamed import give_back_names

# What to do where the reference run does not work.
REMEDY = "compare with the original, --against ORIGINAL"

# Attributes that name an element type: of an output, or of the computation.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_datatype", "output_dtype", "softmax_precision")

# Ops whose output is float32 where this attribute is absent.
_FLOAT_BY_DEFAULT = {
    **dict.fromkeys(("RandomNormal", "RandomUniform"), "dtype"),
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), "output_datatype"),
    "MelWeightMatrix": "output_datatype",
}


class Evaluator(ReferenceEvaluator):
    """onnx's evaluator in float64, with the ops of `ops`. It widens `proto` in place.

    onnx makes another Evaluator for each subgraph and function, including the functions that define
    some of its ops, so each widens its own nodes.
    """

    def __init__(
        self,
        proto: ModelProto | GraphProto | FunctionProto,
        new_ops: Iterable[type] | None = None,
        **options: Any,
    ) -> None:
        from .ops import OPS

        _widen(proto.graph if isinstance(proto, ModelProto) else proto)
        super().__init__(proto, new_ops=[*(new_ops or ()), *OPS], **options)
        for node in self.rt_nodes_:
            node.run = partial(_run_named, node.run, node.onnx_node)

    def _load_impl(self, node: NodeProto, input_types: Any = None) -> Any:
        try:
            return super()._load_impl(node, input_types)
        except RuntimeContextError:  # The evaluator tries again with types.
            raise
        except Exception as error:  # NotImplementedError and other, by op and domain.
            raise ModelError(
                f"the reference run cannot take op {op_name(node)}: {REMEDY}"
            ) from error


def _run_named(run: Callable[..., Any], node: NodeProto, *inputs: Any, **options: Any) -> Any:
    """Run a node; a message of what fails in it names it."""
    try:
        return run(*inputs, **options)
    except ModelError:  # in its subgraph
        raise
    except Exception as error:  # The evaluator, NumPy and PyTorch raise many types.
        cause = error
        while cause.__cause__ is not None:  # The evaluator's own message says less.
            cause = cause.__cause__
        where = f"{op_name(node)} {node_label(node)!r}"
        raise ModelError(
            f"the reference run failed at {where}: {first_line(cause)}: {REMEDY}"
        ) from error


def op_name(node: NodeProto) -> str:
    """The op of a node, with its domain where that is not the default one."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _widen(body: GraphProto | FunctionProto) -> None:
    """Make float64 of all floating-point constants, and of the types that attributes name."""
    for tensor in getattr(body, "initializer", ()):
        _widen_tensor(tensor)
    for node in body.node:
        if node.op_type in _FLOAT_BY_DEFAULT:
            _set_default(node, _FLOAT_BY_DEFAULT[node.op_type], TensorProto.FLOAT)
        elif node.op_type == "ConstantOfShape":
            _set_default(node, "value", numpy_helper.from_array(np.zeros(1)))
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
            elif attribute.name in ("value_float", "value_floats") and not attribute.ref_attr_name:
                value = np.float64(helper.get_attribute_value(attribute))
                attribute.CopyFrom(
                    helper.make_attribute("value", numpy_helper.from_array(np.asarray(value)))
                )
            elif (
                attribute.name in _TYPE_ATTRIBUTES
                and attribute.i in ctu.FLOATING
                and node.op_type != "BitCast"
            ):
                attribute.i = TensorProto.DOUBLE


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in ctu.FLOATING:
        array = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _set_default(node: NodeProto, name: str, value: Any) -> None:
    if all(attribute.name != name for attribute in node.attribute):
        node.attribute.append(helper.make_attribute(name, value))


class Reference:
    """A model to run in float64.

    Args:
        model: a path, or a ModelProto, which stays as it is.

    Raises:
        MissingDependency: PyTorch is not installed.
        ModelError: the model cannot be read, has an unknown op, or is a ModelProto with external
            data.
        UsageError: `model` is neither a path nor a ModelProto.
    """

    def __init__(self, model: str | os.PathLike[str] | ModelProto) -> None:
        require("torch")
        model = prepare(model)
        initializers = {tensor.name for tensor in model.graph.initializer}
        outputs = {name for node in model.graph.node for name in node.output}
        self._inputs: set[str] = {value.name for value in model.graph.input}
        self._required = self._inputs - initializers
        self._names = self._inputs | initializers | outputs
        try:
            self._evaluator = Evaluator(model)
        except ModelError:
            raise
        except (
            Exception
        ) as error:  # The evaluator raises many types, NotImplementedError and other.
            reason = first_line(error)
            raise ModelError(
                f"the reference run cannot take the model: {reason}: {REMEDY}"
            ) from error

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        names: Iterable[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run the model.

        Args:
            inputs: input name -> array, of any floating-point type where the input has one; inputs
                with a default may be left out.
            names: values of the main graph to return instead of the outputs.

        Returns:
            dict from name to array, float64 where it is floating-point. The arrays of a sequence or
            map have names of their own, see `model.values.arrays`.

        Raises:
            UsageError: an input is missing, or the model has no value of a name.
            ModelError: an op fails, for example because shapes do not fit.
        """
        names = [str(n) for n in (self._evaluator.output_names if names is None else names)]
        if missing := self._required - set(inputs):
            raise UsageError(f"the model's input {min(missing)!r} is missing")
        if unknown := (set(inputs) - self._inputs) | (set(names) - self._names):
            raise UsageError(f"the model has no {min(unknown)!r}")
        feeds = {name: _to_float64(value) for name, value in inputs.items()}
        try:
            with np.errstate(all="ignore"):
                values = self._evaluator.run(names, feeds)
        except ModelError:
            raise
        except Exception as error:  # The evaluator raises many types.
            raise ModelError(f"the reference run failed: {first_line(error)}: {REMEDY}") from error
        outputs = arrays(zip(names, map(_to_float64, values), strict=True))
        return {name: _as_in_onnxruntime(array) for name, array in outputs.items()}


def _to_float64(value: Any) -> Any:
    """An input or output (array, sequence or map) with float64 in place of other floating-point."""
    if isinstance(value, list):
        return [_to_float64(element) for element in value]
    if isinstance(value, dict):
        return {key: _to_float64(element) for key, element in value.items()}
    if value is None:
        return None
    array = np.asarray(value)
    # To NumPy bfloat16 is no floating-point type.
    floating = np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"
    return array.astype(np.float64) if floating else array


def _as_in_onnxruntime(array: np.ndarray) -> np.ndarray:
    """Strings as objects, and float8 as its bits."""
    if array.dtype.kind == "U":
        return array.astype(object)
    return array.view(np.uint8) if array.dtype.name.startswith("float8") else array


def prepare(model: str | os.PathLike[str] | ModelProto) -> ModelProto:
    """A copy of a ModelProto, or the model at a path: with its data, without functions."""
    copy = files.own(model)
    give_back_names(copy)
    _name_default_domain(copy)
    _fill_sparse(copy)
    _check_broadcast(copy)
    functions = [f for f in copy.functions if not ctu.is_ctu(f)]
    del copy.functions[:]
    copy.functions.extend(functions)
    if functions:
        check_calls(copy, list(scopes(copy)))  # before the inliner, which follows every call
        # The evaluator supports no overloads of functions, and no omitted inputs and attributes.
        _write_defaults(copy)
        copy = inliner.inline_local_functions(copy)
    if not isinstance(model, ModelProto):
        read_external_data(copy, Path(model).parent)
    elif has_external_data(copy):
        raise ModelError("the model's external data is not in the ModelProto: give its path")
    return copy


def _fill_sparse(model: ModelProto) -> None:
    """Make sparse initializers and constants dense, as the evaluator passes over them."""
    for scope in scopes(model):
        if isinstance(scope.graph, GraphProto):
            scope.graph.initializer.extend(map(_dense, scope.graph.sparse_initializer))
            del scope.graph.sparse_initializer[:]
        for node in scope.graph.node:
            for attribute in node.attribute:
                if attribute.HasField("sparse_tensor"):
                    value = _dense(attribute.sparse_tensor)
                    attribute.CopyFrom(helper.make_attribute("value", value))


def _dense(sparse: SparseTensorProto) -> TensorProto:
    values, indices = (numpy_helper.to_array(t) for t in (sparse.values, sparse.indices))
    array = np.zeros(tuple(sparse.dims), values.dtype)
    array[np.unravel_index(indices, array.shape) if indices.ndim == 1 else tuple(indices.T)] = (
        values
    )
    return numpy_helper.from_array(array, sparse.values.name)


def _write_defaults(model: ModelProto) -> None:
    """Write default attributes of functions into the calls, as the inliner ignores defaults."""
    functions = functions_of(model)
    for scope in scopes(model):
        for node in scope.graph.node:
            if (function := functions.get(key_of(node))) is not None:
                names = {attribute.name for attribute in node.attribute}
                node.attribute.extend(a for a in function.attribute_proto if a.name not in names)


def _check_broadcast(model: ModelProto) -> None:
    """Raise ModelError where operands broadcast by an attribute, as before opset 7."""
    for scope in scopes(model):
        for node in scope.graph.node:
            if {"axis", "broadcast"} <= {attribute.name for attribute in node.attribute}:
                # The evaluator would ignore it.
                raise ModelError(
                    f"the reference run does not support the attribute axis of {node.op_type}, "
                    "which opset 7 removed: convert the model to a newer opset"
                )


def _name_default_domain(model: ModelProto) -> None:
    """Call the default domain "", the one of its two names that the evaluator knows."""
    for owner in (model, *model.functions):
        for entry in owner.opset_import:
            entry.domain = "" if entry.domain in DEFAULT_DOMAINS else entry.domain
    for scope in scopes(model):
        for node in scope.graph.node:
            node.domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
