"""The fused attention kernels for packs on CUDA, and which of them runs on the device at hand.

xformers' memory-efficient attention under a `BlockDiagonalCausalMask`, or PyTorch's `varlen_attn` (Flash Attention).
`attention_choice` finds out by a run of each, once; `choose_attention` does so before training and warns.

Legend: T tokens of the pack, H query heads, G key heads, D head dimension. q is (1, H, T, D); k, v are (1, G, T, D).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "AttentionChoice",
    "attention_choice",
    "backend",
    "borders_of",
    "choose_attention",
    "varlen_attention",
    "varlen_works",
    "xformers_attention",
]

_NOT_INSTALLED = "it is not installed"
_REMEDIES = {
    "xformers": "install an xformers built for this PyTorch: pip install 'fastprice[gpu]'",
    "varlen": "Flash Attention needs compute capability 8.0 and PyTorch 2.11",
}


@dataclass(frozen=True)
class AttentionChoice:
    """The attention of packs on one kind of device in one dtype.

    Attributes:
        backend: "xformers", "varlen" or "texts" (one call a text).
        failures: why each backend that would be faster does not run here.
    """

    backend: str
    failures: dict[str, str]

    @property
    def shortfall(self) -> str:
        """One line about a worse backend than could be had: what runs instead, why, and what to do; else empty.

        An xformers that is not installed is no shortfall where `varlen_attn` runs.
        """
        failures = {
            name: why
            for name, why in self.failures.items()
            if self.backend == "texts" or why != _NOT_INSTALLED  # one of the two is enough
        }
        if not failures:
            return ""
        instead = "one call a text, which is slower" if self.backend == "texts" else self.backend
        reasons = "; ".join(f"{name}: {why} ({_REMEDIES[name]})" for name, why in failures.items())
        return f"attention of packs is {instead}, because {reasons}"


@cache
def attention_choice(device: str, dtype: torch.dtype) -> AttentionChoice:
    """The fastest attention of packs that runs forward and backward on this kind of device in this dtype.

    Each is run on a tiny input: xformers may import without a kernel for this card or this PyTorch, and Flash Attention
    needs compute capability 8.0. The run leaves no trace in an autograd graph, a checkpointed layer's included.
    """
    failures: dict[str, str] = {}
    if not _may_have_kernels(device, dtype):
        return AttentionChoice("texts", failures)
    for name in ("xformers", "varlen"):
        failure = _failure(name, device, dtype)
        if failure is None:
            return AttentionChoice(name, failures)
        failures[name] = failure
    return AttentionChoice("texts", failures)


def backend(device: str, dtype: torch.dtype) -> str:
    """The `attention_choice` by name."""
    return attention_choice(device, dtype).backend


def choose_attention(device: str, dtype: torch.dtype) -> AttentionChoice:
    """`attention_choice`, made before training and not in its first layer, with one warning of a slow backend."""
    choice = attention_choice(device, dtype)
    _warn_once(choice.shortfall)
    return choice


@cache
def _warn_once(message: str) -> None:
    if message:
        warnings.warn(message, stacklevel=3)


def varlen_works(device: str, dtype: torch.dtype) -> bool:
    """Whether PyTorch's `varlen_attn` runs forward and backward on this kind of device in this dtype."""
    return _may_have_kernels(device, dtype) and _failure("varlen", device, dtype) is None


def _may_have_kernels(device: str, dtype: torch.dtype) -> bool:
    return device == "cuda" and dtype in (torch.float16, torch.bfloat16)


@cache
def _failure(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why this backend does not run forward and backward; None if it does."""
    lengths = (8, 8)
    try:
        with _apart_from_other_graphs(device):
            borders = borders_of(lengths, torch.device(device))
            q = torch.zeros(1, 2, sum(lengths), 64, device=device, dtype=dtype, requires_grad=True)
            k = v = q[:, :1]
            if name == "xformers":
                output = xformers_attention(q, k, v, borders, lengths, None, None)
            else:
                output = varlen_attention(q, k, v, borders, max(lengths), None, None)
            torch.autograd.grad(output.sum(), q)
    except torch.OutOfMemoryError:
        raise  # says nothing about the backend
    except ModuleNotFoundError as error:
        return _NOT_INSTALLED if error.name == name else _first_line(error)
    except (ImportError, NotImplementedError, RuntimeError, AttributeError, ValueError) as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


@contextmanager
def _apart_from_other_graphs(device: str) -> Iterator[None]:
    """Autograd as it is outside of any layer.

    A layer that is checkpointed counts the tensors saved inside of it and finds others when it is recomputed. Only the
    newest saved-tensor hooks are called, so hooks that do nothing hide those of the layer.
    """
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device, enabled=False),
    ):
        yield


def xformers_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """xformers' attention: (1, T, H, D), of texts of these lengths, with their borders `cu_seqlens` on the device."""
    from xformers.ops import memory_efficient_attention

    heads, key_heads = query.shape[1], key.shape[1]
    # xformers' grouped form: (1, T, G, H / G, D), the keys and values of a group being one expanded tensor.
    grouped = query.transpose(1, 2).unflatten(2, (key_heads, heads // key_heads))
    k, v = (side.transpose(1, 2)[:, :, :, None].expand_as(grouped) for side in (key, value))
    mask = _block_mask(cu_seqlens, lengths, window)
    output: Tensor = memory_efficient_attention(grouped, k, v, attn_bias=mask, scale=scaling)
    return output.flatten(2, 3)


_block_masks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # cu_seqlens -> window -> mask


def _block_mask(cu_seqlens: Tensor, lengths: Sequence[int], window: int | None) -> Any:
    """xformers' mask of these texts: made once a pack, shared by its layers, its borders on the device already."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    masks = _block_masks.setdefault(cu_seqlens, {})
    if window not in masks:
        mask = BlockDiagonalCausalMask.from_seqlens(list(lengths), device=torch.device("cpu"))
        # Detached: another tensor of the same memory, as the dictionary would never forget a key that its value holds.
        borders = replace(mask.q_seqinfo, seqstart=cu_seqlens.detach()[: len(lengths) + 1])
        mask = replace(mask, q_seqinfo=borders, k_seqinfo=borders)
        masks[window] = mask if window is None else mask.make_local_attention(window)
    return masks[window]


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """`varlen_attn`: (1, T, H, D), of texts between the borders `cu_seqlens`, int32 on the device (texts + 1,)."""
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
def borders_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """`cu_seqlens` for callers without a collator: int32 (texts + 1,), copied to the device at each new lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
