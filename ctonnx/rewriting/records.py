"""What a steered model's metadata record: how to undo the steering, and its parameters.

Each steered node keeps the part of it that steering changed as a serialized NodeProto, in base64,
under the key `ctonnx.original` of its metadata. The model keeps its IR version, inputs and imports
likewise, and the parameters under other `ctonnx.*` keys, which `Metadata` reads and writes.
"""

import base64
import json
from typing import Any, TypeVar

from google.protobuf.message import Message
from onnx import GraphProto, ModelProto, NodeProto, helper

from ..errors import ModelError
from ..model.graph import check_text, keep, node_label

# Stands for beta or coeff where it is not one number.
PER_ACTIVATION = "per activation"

_PREFIX = "ctonnx."
_ORIGINAL = "ctonnx.original"

# Lowering to primitives marks the last op of an activation with the activation's op type, and the
# ops inside that look like activations themselves with an empty text.
_LOWERED = "ctonnx.lowered"

# What the weights were calibrated on.
_CALIBRATION = "ctonnx.calibration"

# Marks what takes an element for the body of a SequenceMap, in its Loop, with the input's place.
_ELEMENT = "ctonnx.element"

# The labels of a head that `ctonnx probe` has put in: no record of steering.
_CLASSES = "ctonnx.classes"

_Proto = TypeVar("_Proto", bound=Message)


class Metadata:
    """The `ctonnx.*` keys in the metadata of a ModelProto, as values.

    `beta` and `coeff` are numbers, None where they differ by activation or are not recorded.
    `beta_input` is the name of the graph input that holds beta, if there is one.
    """

    def __init__(self, model: ModelProto):
        self._model = model

    @property
    def beta(self) -> float | None:
        return self._number("beta")

    @property
    def coeff(self) -> float | None:
        return self._number("coeff")

    @property
    def beta_input(self) -> str | None:
        return get(self._model, f"{_PREFIX}beta_input")

    @property
    def beta_per_activation(self) -> bool:
        """Whether the activations were steered with different betas."""
        return get(self._model, f"{_PREFIX}beta") == PER_ACTIVATION

    @property
    def calibration(self) -> dict[str, Any] | None:
        """What is recorded of the calibration; None where there was none.

        Raises:
            ModelError: the record is damaged.
        """
        text = get(self._model, _CALIBRATION)
        try:
            found = None if text is None else json.loads(text)
            if not isinstance(found, dict | None):
                raise ValueError
        except (ValueError, RecursionError):
            raise ModelError(f"the record {_CALIBRATION} in the model is damaged") from None
        return found

    @calibration.setter
    def calibration(self, record: dict[str, Any]) -> None:
        self._write(_CALIBRATION, json.dumps(record, ensure_ascii=False))

    @property
    def records_steering(self) -> bool:
        """Whether any key but that of a head's labels is there."""
        return has_record(self._model)

    @property
    def classes(self) -> list | None:
        """The labels of the classes of a head, int or str, in the order of the scores."""
        text = get(self._model, _CLASSES)
        return None if text is None else json.loads(text)

    @classes.setter
    def classes(self, labels: list | None) -> None:
        text = None if labels is None else json.dumps(labels, ensure_ascii=False)
        self._write(_CLASSES, text)

    def update(self, **entries: str | None) -> None:
        """Write entries, such as `beta="0.85"`; None removes one."""
        for name, text in entries.items():
            self._write(f"{_PREFIX}{name}", text)

    def original(self) -> ModelProto:
        """What steering changed of the model besides its nodes; empty where nothing did.

        Raises:
            ModelError: the record is damaged.
        """
        text = get(self._model, _ORIGINAL)
        return ModelProto() if text is None else _decode(ModelProto, text)

    def set_original(self, before: ModelProto) -> None:
        """Record what steering changed of the model; nothing where that is empty."""
        self._write(_ORIGINAL, _encode(before) if before.ByteSize() else None)

    def drop_original_inputs(self, names: set[str]) -> None:
        """Drop inputs from the record of the original, so that undoing does not put them back."""
        before = self.original()
        keep(before.graph.input, lambda value: value.name not in names)
        self.set_original(before)

    def clear(self) -> None:
        """Drop every record of steering."""
        keep(self._model.metadata_props, lambda entry: not _is_record(entry))

    def _number(self, name: str) -> float | None:
        try:
            return float(get(self._model, f"{_PREFIX}{name}") or "")
        except ValueError:
            return None

    def _write(self, key: str, text: str | None) -> None:
        entries = self._model.metadata_props
        if text is None:
            keep(entries, lambda entry: entry.key != key)
            return
        for entry in entries:
            if entry.key == key:
                entry.value = text
                return
        entries.add(key=key, value=text)


# --- nodes


def record_node(node: NodeProto, output: bool = False) -> None:
    """Record what steering changes of a node, and its outputs where `output`."""
    # Nothing else: fields that this onnx does not know stay on the node, and would come twice.
    before = NodeProto(input=node.input, attribute=node.attribute)
    for name in ("op_type", "domain"):
        if node.HasField(name):
            setattr(before, name, getattr(node, name))
    if output:
        before.output.extend(node.output)
    _add(node, _ORIGINAL, _encode(before))


def record_op_type(node: NodeProto) -> None:
    """Record the op type of a node that had no place of its own: it was fused into another."""
    _add(node, _ORIGINAL, _encode(NodeProto(op_type=node.op_type)))


def record_sequence_map(node: NodeProto, body: GraphProto) -> None:
    """Record what a SequenceMap has and the Loop in its place has not."""
    before = NodeProto(op_type=node.op_type, input=node.input)
    values = GraphProto(input=body.input, output=body.output)
    before.attribute.append(helper.make_attribute("body", values))
    _add(node, _ORIGINAL, _encode(before))


def original_node(node: NodeProto) -> NodeProto:
    """What the record of a node holds: the node as it was, with the names of that time.

    Raises:
        ModelError: there is no record, or it is damaged.
    """
    text = get(node, _ORIGINAL)
    if text is None:
        raise ModelError(
            f"CTU {node_label(node)!r} has no record of what it replaced, as some tools drop the "
            "metadata of nodes: cannot undo: go back to the original"
        )
    return _decode(NodeProto, text)


def drop_record(node: NodeProto) -> None:
    """Drop the record of a node."""
    keep(node.metadata_props, lambda entry: entry.key != _ORIGINAL)


def is_recorded(node: NodeProto) -> bool:
    """Whether a node has a record of what it was."""
    return get(node, _ORIGINAL) is not None


def original_op(node: NodeProto) -> str:
    """The op type that a node had before it was steered."""
    text = get(node, _ORIGINAL)
    return node.op_type if text is None else _decode(NodeProto, text).op_type


def mark_lowered(node: NodeProto, op_type: str) -> None:
    """Mark a standard op as the last of a lowered activation, or with "" as a part of one."""
    _add(node, _LOWERED, op_type)


def lowered_op(node: NodeProto) -> str | None:
    """The op type given to `mark_lowered`; None for a node that is no part of an activation."""
    return get(node, _LOWERED)


def has_record(proto: ModelProto | NodeProto) -> bool:
    """Whether the metadata of a model or node tell of steering."""
    return any(map(_is_record, proto.metadata_props))


def mark_element(node: NodeProto, place: int) -> None:
    """Mark a node as what gives the body of a SequenceMap its input at `place`."""
    _add(node, _ELEMENT, str(place))


def element_place(node: NodeProto) -> str | None:
    """The place given to `mark_element`, as text; None for any other node."""
    return get(node, _ELEMENT)


# --- entries


def get(proto: ModelProto | NodeProto, key: str) -> str | None:
    """The value of a key in the metadata of a model or node."""
    return next((entry.value for entry in proto.metadata_props if entry.key == key), None)


def _add(node: NodeProto, key: str, value: str) -> None:
    node.metadata_props.add(key=key, value=value)


def _is_record(entry) -> bool:
    return entry.key.startswith(_PREFIX) and entry.key != _CLASSES


def _encode(proto: Message) -> str:
    return base64.b64encode(proto.SerializeToString(deterministic=True)).decode()


def _decode(kind: type[_Proto], text: str) -> _Proto:
    try:
        proto = kind.FromString(base64.b64decode(text, validate=True))
        if isinstance(proto, NodeProto):
            check_text(proto.op_type, proto.domain, *proto.input, *proto.output)
            check_text(*(attribute.name for attribute in proto.attribute))
        elif isinstance(proto, ModelProto):
            check_text(*(value.name for value in proto.graph.input))
            check_text(*(entry.domain for entry in proto.opset_import))
        return proto
    except Exception:  # base64 and protobuf have errors of their own for damage.
        raise ModelError(f"the record {_ORIGINAL} in the model is damaged: cannot undo") from None
