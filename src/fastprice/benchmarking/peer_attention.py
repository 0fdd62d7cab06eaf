"""The fastest attention that each peer can have on this machine, so that no ratio comes from a slow one.

TRL recommends a Flash Attention implementation for packs ("Reducing memory usage", packing; `FLASH_ATTENTION_VARIANTS`
of its SFT trainer) and warns of every other. Where none of them is installed, stock TRL would run SDPA under a dense
(T, T) mask, some ten times slower on price texts; it then gets PyTorch's `varlen_attn` here, the same Flash Attention
kernel, as transformers' attention implementation `TORCH_VARLEN`. The choice stands in each row's settings.
"""

from __future__ import annotations

import weakref
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastprice.models.attention_backends import varlen_works
from fastprice.models.packed_attention import packed_attention

__all__ = ["TORCH_VARLEN", "choose_attention", "position_borders", "register_torch_varlen", "varlen_from_positions"]

TORCH_VARLEN = "torch_varlen"
HUB_KERNEL = "kernels-community/flash-attn2"


def choose_attention(device: str, dtype: torch.dtype, *, packed: bool) -> str:
    """transformers' `attn_implementation` for stock training on "cuda" or "cpu": Flash Attention 3 or 2 where it is
    installed, its hub kernel where it lies in the local cache, then `TORCH_VARLEN` for packs, then "sdpa"."""
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "sdpa"
    major = torch.cuda.get_device_capability()[0]
    if major == 9 and find_spec("flash_attn_interface") is not None:
        return "flash_attention_3"
    if major >= 8 and find_spec("flash_attn") is not None:
        return "flash_attention_2"
    if packed and major >= 8 and _hub_kernel_is_cached():
        return HUB_KERNEL
    return TORCH_VARLEN if packed and varlen_works(device, dtype) else "sdpa"


def register_torch_varlen() -> None:
    """Registers `TORCH_VARLEN` with transformers, without a mask function, so that no (T, T) mask is built."""
    from transformers import AttentionInterface

    AttentionInterface.register(TORCH_VARLEN, varlen_from_positions)


def varlen_from_positions(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within each text of a pack in transformers' interface; a text begins wherever `position_ids` (1, T)
    is 0. q is (1, H, T, D); returns ((1, T, H, D), None)."""
    borders, longest = position_borders(position_ids)
    kept = {name: options[name] for name in ("scaling", "dropout", "sliding_window", "softcap") if name in options}
    return packed_attention(module, query, key, value, None, cu_seqlens=borders, max_seqlen=longest, **kept)


_LAST: tuple[weakref.ref[Tensor], Tensor, int] | None = None


def position_borders(position_ids: Tensor) -> tuple[Tensor, int]:
    """(cu_seqlens int32 (texts + 1,), tokens of the longest text); read off the device once for all layers of a step,
    where transformers' own Flash Attention path does it in each."""
    global _LAST
    if _LAST is not None and _LAST[0]() is position_ids:
        return _LAST[1], _LAST[2]
    flat = position_ids.reshape(-1)
    begins = (flat == 0).nonzero()[:, 0].to(torch.int32)
    borders = torch.cat([begins, begins.new_tensor([flat.numel()])])
    longest = int(borders.diff().max())
    _LAST = (weakref.ref(position_ids), borders, longest)
    return borders, longest


def _hub_kernel_is_cached() -> bool:
    """Whether the `kernels` library is here and its Flash Attention 2 in the hub's local cache: no download."""
    if find_spec("kernels") is None:
        return False
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return any(repository.repo_id == HUB_KERNEL for repository in scan_cache_dir().repos)
    except CacheNotFound:
        return False
