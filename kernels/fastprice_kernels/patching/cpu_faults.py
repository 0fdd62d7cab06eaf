"""Two faults of bitsandbytes (0.50.2) on CPUs with AVX-512: detection, prevention and repair.

With BF16 as well (`avx512_bf16` in /proc/cpuinfo) a 4-bit layer repacks its weight in place at its first forward in
eval mode without gradient. Only its inference kernel reads that layout: after such an evaluation, training goes on with
wrong gradients. `prevent_repacking` prevents it and `unpack` reverts it.

And `dequantize_4bit` takes the scale `row * (K // block) + column // block`, which is that of another block where rows
are a multiple of 16 but not of the block. `stock_is_exact` finds out whether it does so on this CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["is_at_risk", "is_repacked", "prevent_repacking", "stock_is_exact", "unpack", "unpacked_warning"]

_REMEDY = (
    "load the model again, and install the kernels (or set support_avx512bf16_for_cpu = False on its 4-bit layers) "
    "before its first evaluation"
)


def is_repacked(layer: nn.Module) -> bool:
    """Whether the 4-bit weight of `layer` is in the layout of bitsandbytes' inference kernel for CPUs."""
    # A LoRA layer of PEFT has the weight of its base layer as well, but is no layer of bitsandbytes.
    if not hasattr(layer, "support_avx512bf16_for_cpu"):
        return False
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def prevent_repacking(model: nn.Module) -> list[nn.Module]:
    """Prevents bitsandbytes from repacking the 4-bit layers of `model`; returns those that it was free to repack."""
    layers = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return layers


def unpack(layer: Any) -> None:
    """Reverts a repacked weight (N, K), in place, to the layout that every kernel reads, with plain fp32 scales.

    The 4-bit codes are those of before; the scales are as repacking rounded them, to bf16. bitsandbytes' own reversal
    (when a layer is saved) reverts the codes; it would quantize nested scales again and leave plain ones transposed.

    Raises:
        RuntimeError: the scales are not stored as bitsandbytes 0.50.2 stores them, or it does not revert the codes.
    """
    state = layer.weight.quant_state
    n, k = state.shape
    scales = state.absmax
    if tuple(scales.shape) == (k // state.blocksize, n):
        layer.state_dict()  # reverts the codes
    if is_repacked(layer):
        raise RuntimeError(f"bitsandbytes repacked 4-bit weights for this CPU in an unknown layout: {_REMEDY}")
    state.absmax = scales.t().reshape(-1).float()
    state.nested, state.state2, state.offset = False, None, None


def unpacked_warning(count: int) -> str:
    """The text of a warning after `count` layers were unpacked."""
    return (
        f"{count} 4-bit layers had been repacked for this CPU in an evaluation; they are unpacked, but their scales "
        f"remain rounded to bf16, by up to 0.2 %. For the exact weights {_REMEDY}"
    )


def is_at_risk(quant_state: Any) -> bool:
    """Whether bitsandbytes may dequantize this weight with wrong scales on a CPU."""
    columns = quant_state.shape[-1]
    return bool(columns % 16 == 0 and columns % quant_state.blocksize)


def stock_is_exact(columns: int, blocksize: int) -> bool:
    """Whether bitsandbytes, on this CPU, dequantizes weights with rows of `columns` elements with the right scales.

    Tried on a weight whose elements are all 1 times the index of their block.
    """
    rows = 4 * blocksize // columns + 2
    blocks = -(-rows * columns // blocksize)
    packed = torch.full((-(-rows * columns // 2), 1), 255, dtype=torch.uint8)
    scales = torch.arange(blocks, dtype=torch.float32)
    shape = (rows, columns)
    found = torch.ops.bitsandbytes.dequantize_4bit.default(packed, scales, blocksize, "nf4", shape, torch.float32)
    return torch.equal(found.flatten(), scales.repeat_interleave(blocksize)[: rows * columns])
