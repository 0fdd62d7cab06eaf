"""Causal attention within each text of a pack, as one of transformers' attention implementations.

On CUDA: xformers' memory-efficient attention under a `BlockDiagonalCausalMask` where xformers has a kernel for the
inputs, else PyTorch's `varlen_attn` (Flash Attention). On a CPU, and for soft-capped scores (Gemma 2), for which
neither has a backward pass: one call a text, which still beats a padded batch, where the padding would be computed too.

Packs of one static shape (`fastprice.prompts.packing.StaticShape`) carry `cu_seqlens` as a device tensor whose values
the host never reads, so they go to `varlen_attn`: a `BlockDiagonalCausalMask` is built from lengths on the host, which
a CUDA graph would freeze. On a CPU they go through one masked call over the whole pack.

Legend: T tokens of the pack, H query heads, G key heads, D head dimension. q is (1, H, T, D); k, v are (1, G, T, D).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastprice.errors import ConfigError

__all__ = ["PACKED_ATTENTION", "backend", "packed_attention", "register_packed_attention", "varlen_works"]

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
    pack_lengths: tuple[int, ...] | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' interface: q, k, v as in the legend; returns ((1, T, H, D), None).

    `pack_lengths` are the tokens of each text, adding up to T; `sliding_window` includes the query's own position. A
    pack of one static shape has `cu_seqlens` instead: int32 (texts + 1,) from 0 to T, no text above `max_seqlen`
    tokens. Raises ConfigError without either: attention over a whole pack would be silently wrong.
    """
    if cu_seqlens is not None:
        if softcap is not None or dropout:
            raise ConfigError(
                "packs of one static shape: this model caps or drops attention scores; use cuda_graphs='off'"
            )
        window = None if sliding_window is None or max_seqlen <= sliding_window else sliding_window
        if query.is_cuda:
            return _varlen_attention(query, key, value, cu_seqlens, max_seqlen, scaling, window), None
        return _masked_attention(query, key, value, cu_seqlens, scaling, window), None
    if pack_lengths is None:
        raise ConfigError(
            "packed attention was called without pack_lengths: collate batches with "
            "fastprice.prompts.packing.PackCollator"
        )
    window = None if sliding_window is None or max(pack_lengths) <= sliding_window else sliding_window
    chosen = "texts" if softcap is not None or dropout else backend(query.device.type, query.dtype)
    if chosen == "xformers":
        return _xformers_attention(query, key, value, pack_lengths, scaling, window), None
    if chosen == "varlen":
        offsets = _cu_seqlens(pack_lengths, query.device)
        return _varlen_attention(query, key, value, offsets, max(pack_lengths), scaling, window), None
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


@cache
def backend(device: str, dtype: torch.dtype) -> str:
    """ "xformers", "varlen" or "texts" (one call a text): the attention of packs on this device in this dtype.

    A backend is chosen only after it ran forward and backward on a tiny input: xformers may import without a kernel
    for this card or this PyTorch, and Flash Attention needs compute capability 8.0.
    """
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "texts"
    if _works(lambda x: _xformers_attention(x, x[:, :1], x[:, :1], (8, 8), None, None), device, dtype):
        return "xformers"
    return "varlen" if varlen_works(device, dtype) else "texts"


@cache
def varlen_works(device: str, dtype: torch.dtype) -> bool:
    """Whether PyTorch's `varlen_attn` runs forward and backward on this device in this dtype."""
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    offsets = _cu_seqlens((8, 8), torch.device(device))
    return _works(lambda x: _varlen_attention(x, x[:, :1], x[:, :1], offsets, 8, None, None), device, dtype)


def _works(attention: Callable[[Tensor], Tensor], device: str, dtype: torch.dtype) -> bool:
    probe = torch.zeros(1, 2, 16, 64, device=device, dtype=dtype, requires_grad=True)
    try:
        attention(probe).sum().backward()
    except (ImportError, NotImplementedError, RuntimeError, AttributeError, ValueError):
        return False
    return True


def _xformers_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float | None, window: int | None
) -> Tensor:
    from xformers.ops import memory_efficient_attention

    heads, key_heads = query.shape[1], key.shape[1]
    # xformers' grouped form: (1, T, G, H / G, D), the keys and values of a group being one expanded tensor.
    grouped = query.transpose(1, 2).unflatten(2, (key_heads, heads // key_heads))
    k, v = (side.transpose(1, 2)[:, :, :, None].expand_as(grouped) for side in (key, value))
    mask = _block_mask(lengths, window)
    output: Tensor = memory_efficient_attention(grouped, k, v, attn_bias=mask, scale=scaling)
    return output.flatten(2, 3)


@lru_cache(maxsize=8)
def _block_mask(lengths: tuple[int, ...], window: int | None) -> Any:
    """xformers' mask for texts of these lengths; all layers of a step share one or two."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    mask = BlockDiagonalCausalMask.from_seqlens(list(lengths))
    return mask if window is None else mask.make_local_attention(window)


def _varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (side[0].transpose(0, 1) for side in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    if k.shape[1] != q.shape[1]:
        if _varlen_groups():
            options["enable_gqa"] = True
        else:
            k, v = (side.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for side in (k, v))
    output = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    assert isinstance(output, Tensor)  # a tuple only with auxiliary outputs
    return output[None]


@cache
def _varlen_groups() -> bool:
    """Whether this PyTorch's `varlen_attn` takes grouped heads (from 2.12 on)."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


@lru_cache(maxsize=8)
def _cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


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
