"""Attention as in ONNX Runtime's domain com.microsoft."""

import math

import torch
from torch import Tensor

from .base import op
from .contrib import MICROSOFT

# Added to the scores of what is masked, where the node does not say.
MASKED = -10000.0


def _heads(x: Tensor, count: int) -> Tensor:
    """[batch, length, hidden] -> [batch, heads, length, size]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of heads, [batch, heads, length, size] each.

    Args:
        scale: of the scores; 1 / sqrt(size) where None or 0.
        bias: added to the scores.
        mask: added too, [batch, 1, length or 1, total length].
        causal: whether each query sees no keys behind its own place.

    Returns:
        The result, [batch, length, hidden], and the scores.
    """
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores if bias is None else scores + bias
    if causal:
        length, total = scores.shape[-2:]
        seen = torch.ones(length, total, dtype=torch.bool).tril(total - length)
        scores = torch.where(seen, scores, -torch.inf)
    scores = scores if mask is None else scores + mask
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2), scores


def _padding_mask(mask: Tensor | None, batch: int, total: int, value: float) -> Tensor | None:
    """The mask to add: of lengths [batch], ends and begins [2 * batch], or ones and zeros."""
    if mask is None:
        return None
    if mask.ndim == 1:
        places = torch.arange(total)
        begins = mask[batch:, None] if len(mask) == 2 * batch else 0
        mask = (places >= begins) & (places < mask[:batch, None])
    if mask.ndim == 2:
        mask = mask[:, None]
    return torch.where(mask[:, None] != 0, 0.0, value)


def _unpacked(x: Tensor) -> list[Tensor]:
    """What [batch, length, heads, 2 or 3, size] holds, a part each [batch, heads, length, size]."""
    return [part.transpose(1, 2) for part in x.unbind(3)] if x.ndim == 5 else [x]


@op("MultiHeadAttention", domain=MICROSOFT)
def _multi_head_attention(
    self,
    query,
    key=None,
    value=None,
    bias=None,
    padding=None,
    attention_bias=None,
    past_key=None,
    past_value=None,
    *,
    num_heads,
    scale=None,
    mask_filter_value=MASKED,
    unidirectional=0,
):
    q, k, v = (
        part if part.ndim == 4 else _heads(part, num_heads)
        for packed in (query, key, value)
        if packed is not None
        for part in _unpacked(packed)
    )
    if bias is not None:
        sizes = [x.shape[1] * x.shape[3] for x in (q, k, v)]
        parts = bias.split(sizes)
        q, k, v = (
            x + part.reshape(num_heads, 1, -1) for x, part in zip((q, k, v), parts, strict=True)
        )
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    mask = _padding_mask(padding, len(q), k.shape[2], mask_filter_value)
    y, scores = attend(q, k, v, scale=scale, bias=attention_bias, mask=mask, causal=unidirectional)
    return y, k, v, scores


@op("Attention", domain=MICROSOFT)
def _attention(
    self,
    x,
    weights,
    bias=None,
    mask=None,
    past=None,
    attention_bias=None,
    *,
    num_heads,
    scale=None,
    mask_filter_value=MASKED,
    unidirectional=0,
    qkv_hidden_sizes=None,
):
    return fused_attention(
        x,
        weights,
        bias,
        mask,
        past,
        attention_bias,
        num_heads=num_heads,
        scale=scale,
        mask_filter_value=mask_filter_value,
        unidirectional=unidirectional,
        sizes=qkv_hidden_sizes,
    )


def fused_attention(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    past: Tensor | None,
    attention_bias: Tensor | None,
    *,
    num_heads: int,
    scale: float | None,
    mask_filter_value: float,
    unidirectional: int,
    sizes: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one input with one matrix of weights, for query, key and value together."""
    packed = x @ weights if bias is None else x @ weights + bias
    parts = packed.split(sizes or packed.shape[-1] // 3, -1)
    q, k, v = (_heads(part, num_heads) for part in parts)
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    y, _ = attend(
        q,
        k,
        v,
        scale=scale,
        bias=attention_bias,
        mask=_padding_mask(mask, len(x), k.shape[2], mask_filter_value),
        causal=unidirectional,
    )
    return y, torch.stack([k, v]) if k.shape == v.shape else k


@op("RotaryEmbedding", domain=MICROSOFT)
def _rotary_embedding(
    self,
    x,
    places,
    cos,
    sin,
    *,
    interleaved=0,
    num_heads=0,
    rotary_embedding_dim=0,
    scale=1.0,
    is_packed_batching=0,
):
    size = rotary_embedding_dim or 2 * cos.shape[-1]
    flat = x.ndim == 3
    heads = _heads(x, num_heads or x.shape[-1] // size) if flat else x
    if places.numel() == 1:
        places = places.reshape(1, 1) + torch.arange(heads.shape[2])
    c, s = (cache[places.long()][:, None] for cache in (cos, sin))
    turned, rest = heads[..., :size], heads[..., size:]
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1))
    axis = -1 if interleaved else -2
    a, b = pairs.unbind(axis)
    turned = torch.stack([a * c - b * s, b * c + a * s], axis).flatten(-2)
    y = torch.cat([turned, rest], -1)
    return y.transpose(1, 2).flatten(2) if flat else y
