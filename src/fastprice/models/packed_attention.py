"""Causal attention within each text of a pack, as one of transformers' attention implementations.

On CUDA a fused kernel (`fastprice.models.attention_backends`). On a CPU, and for soft-capped scores
(Gemma 2), for which no such kernel has a backward pass: one call a text, which still beats a padded batch, where the
padding would be computed too.

The collator gives the borders of the texts as `cu_seqlens`, so that no layer copies them to the device. Packs of one
static shape (`fastprice.prompts.packing.StaticShape`) are padded beyond the lengths that the host knows; they go to
`varlen_attn`, which reads the borders on the device alone: lengths on the host would be frozen in a CUDA graph. On a
CPU they go through one masked call over the whole pack.

Legend: T tokens of the pack, H query heads, G key heads, D head dimension. q is (1, H, T, D); k, v are (1, G, T, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprice.errors import ConfigError
from fastprice.models.attention_backends import borders_of, choose_attention, varlen_attention, xformers_attention

__all__ = ["PACKED_ATTENTION", "packed_attention", "register_packed_attention"]

PACKED_ATTENTION = "fastprice_packed"


def register_packed_attention() -> None:
    """Registers `PACKED_ATTENTION` with transformers; `model.set_attn_implementation(PACKED_ATTENTION)` selects it.

    No mask function is registered under that name, so transformers builds no (T, T) mask.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack_lengths: Sequence[int] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' interface: q, k, v as in the legend; returns ((1, T, H, D), None).

    `pack_lengths` are the tokens of each text, adding up to T, and `cu_seqlens` their borders on the device, int32
    (texts + 1,) from 0 to T, with no text above `max_seqlen` tokens; without it each new lengths cost a copy.
    `sliding_window` includes the query's own position. A pack of one static shape has `cu_seqlens` of T tokens, and
    lengths of fewer or none. Raises ConfigError without either: attention over a whole pack would be silently wrong.
    """
    if cu_seqlens is None and pack_lengths is None:
        raise ConfigError(
            "packed attention was called without pack_lengths: collate batches with "
            "fastprice.prompts.packing.PackCollator"
        )
    longest = max(pack_lengths or ()) if cu_seqlens is None else max_seqlen
    window = None if sliding_window is None or longest <= sliding_window else sliding_window
    if pack_lengths is None or sum(pack_lengths) != query.shape[2]:
        if cu_seqlens is None:
            raise ConfigError(f"pack_lengths add up to {sum(pack_lengths or ())}, the pack has {query.shape[2]} tokens")
        if softcap is not None or dropout:
            raise ConfigError(
                "packs of one static shape: this model caps or drops attention scores; use cuda_graphs='off'"
            )
        if query.is_cuda:
            return varlen_attention(query, key, value, cu_seqlens, longest, scaling, window), None
        return _masked_attention(query, key, value, cu_seqlens, scaling, window), None
    capped = softcap is not None or dropout > 0
    chosen = "texts" if capped else choose_attention(query.device.type, query.dtype).backend
    if chosen == "texts":
        outputs = [
            _text_attention(q, k, v, scaling=scaling, dropout=dropout, window=window, softcap=softcap)
            for q, k, v in zip(
                query.split(pack_lengths, dim=2),
                key.split(pack_lengths, dim=2),
                value.split(pack_lengths, dim=2),
                strict=True,
            )
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None
    borders = borders_of(tuple(pack_lengths), query.device) if cu_seqlens is None else cu_seqlens
    if chosen == "xformers":
        return xformers_attention(query, key, value, borders, pack_lengths, scaling, window), None
    return varlen_attention(query, key, value, borders, longest, scaling, window), None


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Attention over a whole pack under a (T, T) mask, (1, T, H, D) out; never reads `cu_seqlens` on the host."""
    at = torch.arange(query.shape[2], device=query.device)
    text = torch.searchsorted(cu_seqlens, at.to(cu_seqlens.dtype), right=True)
    allowed = (text[:, None] == text[None, :]) & (at[:, None] >= at[None, :])
    if window is not None:
        allowed = allowed & (at[:, None] - at[None, :] < window)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous()


def _text_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention over one text, (1, H, tokens, D) out; the window matters only where the text exceeds it."""
    tokens = query.shape[2]
    banded = window is not None and tokens > window
    if softcap is None and not banded:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )
    allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    if banded:
        assert window is not None
        allowed = allowed.triu(1 - window)
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value
