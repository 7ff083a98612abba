"""The reference run: any ONNX model in float64, by onnx's ReferenceEvaluator with PyTorch bodies.

It shares no code with ONNX Runtime, nor with what ctonnx writes into a model: a CTU is the paper's
formula, whatever function the model holds. The ops are in `reference_ops`.
"""

from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper, inliner, numpy_helper
from onnx.reference import ReferenceEvaluator

from .. import ctu
from ..errors import ModelError, UsageError, first_line
from ..model import files
from ..model.external import has_external_data, read_external_data
from ..model.graph import DEFAULT_DOMAINS, functions_of, key_of, scopes
from ..model.inference import check_calls
from ..model.values import arrays
from ..optional import require

# Attributes that name the element type of an output, or of what is computed with.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_datatype", "output_dtype", "softmax_precision")

# Ops whose output is float32 where this attribute is absent.
_FLOAT_BY_DEFAULT = {
    **dict.fromkeys(("RandomNormal", "RandomUniform"), "dtype"),
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), "output_datatype"),
    "MelWeightMatrix": "output_datatype",
}


class Evaluator(ReferenceEvaluator):
    """onnx's evaluator in float64, with the ops of `reference_ops`. It changes what it is given.

    It makes one of its class for each graph, body and function, those of the ops that onnx defines
    as functions among them: so each widens its own nodes, and gets the ops.
    """

    def __init__(self, proto, new_ops=None, **options):
        from .ops import OPS

        _widen(proto.graph if isinstance(proto, ModelProto) else proto)
        super().__init__(proto, new_ops=[*(new_ops or ()), *OPS], **options)


def _widen(body):
    """Make the constants of a GraphProto or FunctionProto float64, and what its nodes ask for."""
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
            elif attribute.name in _TYPE_ATTRIBUTES and attribute.i in ctu.FLOATING:
                attribute.i = TensorProto.DOUBLE


def _widen_tensor(tensor):
    if tensor.data_type in ctu.FLOATING:
        array = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _set_default(node, name, value):
    if all(attribute.name != name for attribute in node.attribute):
        node.attribute.append(helper.make_attribute(name, value))


class Reference:
    """A model to run in float64.

    Args:
        model: a path, or a ModelProto, which is not changed.

    Raises:
        MissingDependency: PyTorch is not installed.
        ModelError: the model cannot be read, holds an op that is not known, or is a ModelProto
            with external data.
        UsageError: it is neither a path nor a ModelProto.
    """

    def __init__(self, model):
        require("torch")
        model = _prepared(model)
        held = {tensor.name for tensor in model.graph.initializer}
        self._inputs = {value.name for value in model.graph.input}
        self._required = self._inputs - held
        outputs = (name for node in model.graph.node for name in node.output)
        self._names = {*self._inputs, *held, *outputs}
        try:
            self._evaluator = Evaluator(model)
        except Exception as error:  # It has an exception for each of its reasons.
            # An op that is unknown is named first, then all that are known.
            reason = first_line(error).partition(", known functions")[0]
            raise ModelError(f"the reference run cannot take the model: {reason}") from error

    def run(self, inputs, names=None):
        """Run the model.

        Args:
            inputs: input name -> array; those with a default may be left out.
            names: values of the main graph to give instead of the outputs.

        Returns:
            dict from name to array, float64 where it is floating-point. The arrays of a sequence or
            map have names of their own, see `runs.arrays`.

        Raises:
            UsageError: an input is missing, or a name is none of the model's.
            ModelError: an op fails, as where shapes do not fit.
        """
        names = self._evaluator.output_names if names is None else list(names)
        if missing := self._required - set(inputs):
            raise UsageError(f"the model's input {min(missing)!r} is missing")
        if unknown := (set(inputs) - self._inputs) | (set(names) - self._names):
            raise UsageError(f"the model has no {min(unknown)!r}")
        feeds = {name: _widened(value) for name, value in inputs.items()}
        try:
            with np.errstate(all="ignore"):
                values = self._evaluator.run(names, feeds)
        except Exception as error:  # As above.
            cause = error
            while cause.__cause__ is not None:  # The evaluator wraps them, and says less.
                cause = cause.__cause__
            raise ModelError(f"the reference run failed: {first_line(cause)}") from error
        return arrays(zip(names, map(_widened, values), strict=True))


def _widened(value):
    """An input or output with float64 in place of other floating-point."""
    if isinstance(value, list):
        return [_widened(element) for element in value]
    if isinstance(value, dict):
        return {key: _widened(element) for key, element in value.items()}
    if value is None:
        return None
    array = np.asarray(value)
    # NumPy does not take bfloat16 for a floating-point type.
    floating = np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"
    return array.astype(np.float64) if floating else array


def _prepared(model):
    """A copy of a ModelProto, or what is at a path, with its data and without functions."""
    copy = files.own(model)
    _name_default_domain(copy)
    _check_broadcast(copy)
    kept = [f for f in copy.functions if not ctu.is_ctu(f)]
    del copy.functions[:]
    copy.functions.extend(kept)
    if kept:
        check_calls(copy, list(scopes(copy)))  # before the inliner, which follows every call
        # The evaluator knows no overloads of functions, nor inputs and attributes left out.
        _give_defaults(copy)
        copy = inliner.inline_local_functions(copy)
    if not isinstance(model, ModelProto):
        read_external_data(copy, Path(model).parent)
    elif has_external_data(copy):
        raise ModelError("the model's external data are not at hand: give its path")
    return copy


def _give_defaults(model):
    """Write the defaults of functions into the calls that leave out an attribute, which the
    inliner takes for absent."""
    functions = functions_of(model)
    for scope in scopes(model):
        for node in scope.graph.node:
            if (function := functions.get(key_of(node))) is not None:
                given = {attribute.name for attribute in node.attribute}
                node.attribute.extend(a for a in function.attribute_proto if a.name not in given)


def _check_broadcast(model):
    """Raise ModelError where operands broadcast as they did before opset 7."""
    for scope in scopes(model):
        for node in scope.graph.node:
            if {"axis", "broadcast"} <= {attribute.name for attribute in node.attribute}:
                # The evaluator would pass over it.
                raise ModelError(
                    f"the reference run does not know the attribute axis of {node.op_type}, "
                    "which went with opset 7: convert the model to a newer opset"
                )


def _name_default_domain(model):
    """Give the default domain the one of its two names that the evaluator knows."""
    for owner in (model, *model.functions):
        for entry in owner.opset_import:
            entry.domain = "" if entry.domain in DEFAULT_DOMAINS else entry.domain
    for scope in scopes(model):
        for node in scope.graph.node:
            node.domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
