"""What bitsandbytes (0.50.2) does wrong on CPUs with AVX-512, found out and undone.

With BF16 too (`avx512_bf16` in /proc/cpuinfo) a 4-bit layer repacks its weight in place at its first forward in eval
mode without a gradient. Only its inference kernel reads what is there then: from that evaluation on, training goes on
with wrong gradients. `spare` prevents it and `unpack` undoes it.

And `dequantize_4bit` takes the scale `row * (K // block) + column // block` of a weight, which is that of another block
where rows are a multiple of 16 but not of the block. `stock_is_exact` says whether it does so on this CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["is_at_risk", "is_repacked", "spare", "stock_is_exact", "unpack", "unpacked_warning"]

_AWAY = "load the model again, and put the kernels under it (or set support_avx512bf16_for_cpu = False on its 4-bit "
_AWAY += "layers) before its first evaluation"


def is_repacked(layer: nn.Module) -> bool:
    """Whether the 4-bit weight of `layer` is in the layout of bitsandbytes' inference kernel for CPUs."""
    # A LoRA layer of PEFT's has its base layer's weight as well, and is none of bitsandbytes'.
    if not hasattr(layer, "support_avx512bf16_for_cpu"):
        return False
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def spare(model: nn.Module) -> list[nn.Module]:
    """Keeps every 4-bit layer in `model` from being repacked; gives those that would have been."""
    spared = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    for module in spared:
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return spared


def unpack(layer: Any) -> None:
    """Turns a repacked weight (N, K) back, in place, into one that every kernel reads, with plain fp32 scales.

    The sixteen values are those of before; the scales are as repacking rounded them, to bf16. The way back of
    bitsandbytes' own (taken before it saves a layer) would quantize nested scales once more, and leave others turned.

    Raises:
        RuntimeError: the scales are not stored as bitsandbytes 0.50.2 stores them, or its way back is gone.
    """
    state = layer.weight.quant_state
    n, k = state.shape
    scales = state.absmax
    if tuple(scales.shape) == (k // state.blocksize, n):
        layer.state_dict()  # turns the weight back first
    if is_repacked(layer):
        raise RuntimeError(f"bitsandbytes repacked 4-bit weights for this CPU in an unknown layout: {_AWAY}")
    state.absmax = scales.t().reshape(-1).float()
    state.nested, state.state2, state.offset = False, None, None


def unpacked_warning(count: int) -> str:
    """What to say after `count` layers were unpacked."""
    return (
        f"{count} 4-bit layers had been repacked for this CPU in an evaluation; they are unpacked, but their scales "
        f"stay rounded to bf16, by up to 0.2 %. For the exact weights {_AWAY}"
    )


def is_at_risk(quant_state: Any) -> bool:
    """Whether the weight is one that bitsandbytes may dequantize by wrong scales on a CPU."""
    columns = quant_state.shape[-1]
    return bool(columns % 16 == 0 and columns % quant_state.blocksize)


def stock_is_exact(columns: int, blocksize: int) -> bool:
    """Whether bitsandbytes, on this CPU, dequantizes weights with rows of `columns` by the scales of their blocks.

    Found by doing it: weights that are all 1 times the number of their block.
    """
    rows = 4 * blocksize // columns + 2
    blocks = -(-rows * columns // blocksize)
    packed = torch.full((-(-rows * columns // 2), 1), 255, dtype=torch.uint8)
    scales = torch.arange(blocks, dtype=torch.float32)
    shape = (rows, columns)
    found = torch.ops.bitsandbytes.dequantize_4bit.default(packed, scales, blocksize, "nf4", shape, torch.float32)
    return torch.equal(found.flatten(), scales.repeat_interleave(blocksize)[: rows * columns])
