"""What is known of each linear op: where its channels are, and how they are scaled."""

import numpy as np
from onnx import AttributeProto, NodeProto

from ..model.graph import DEFAULT_DOMAINS
from ..rewriting.activations import attribute

OPS = ("BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul")


def is_layer(node: NodeProto) -> bool:
    """Whether a node is a linear layer."""
    return node.op_type in OPS and node.domain in DEFAULT_DOMAINS


def axis_of(node: NodeProto) -> int:
    """The axis of the channels in a layer's output."""
    return -1 if node.op_type == "MatMul" else 1


def scaled(node: NodeProto, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """A layer's weight with its output channels scaled.

    Args:
        weight: float64, as the node reads it.
        scale: float64 (channels,).
    """
    if node.op_type == "Conv":
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    if node.op_type == "ConvTranspose":
        groups = attribute(node, "group", 1, AttributeProto.INT)
        inner, outer = weight.shape[0] // groups, weight.shape[1]
        split = weight.reshape(groups, inner, outer, -1) * scale.reshape(groups, 1, outer, 1)
        return split.reshape(weight.shape)
    by_row = node.op_type == "Gemm" and attribute(node, "transB", 0, AttributeProto.INT)
    return weight * (scale[:, None] if by_row else scale)


def bias_factor(node: NodeProto) -> float:
    """The number that a layer multiplies its bias by."""
    return attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
