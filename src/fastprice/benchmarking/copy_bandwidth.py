"""How much of the machine's copy rate NF4 dequantization reaches, shape by shape, and the bar that it must pass.

The bar is 85 % for moves that take at least 40 microseconds at the copy rate. Below, the fixed cost of a launch (two to
five microseconds of filling and draining the card) is more than 15 % of the move, whatever the kernel does. The time is
of launches back to back in one CUDA graph, on weights that are together larger than the L2 cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fastprice.benchmarking.kernel_comparison import dtype_name, seeded_generator
from fastprice.benchmarking.random_models import random_nf4_weight
from fastprice.benchmarking.reporting.summaries import WORTH_TIMING
from fastprice.benchmarking.timing import seconds_per_launch
from fastprice.benchmarking.workload import NF4_BYTES
from fastprice_kernels.ops.nf4_dequantize import dequantize_nf4

__all__ = ["BAR", "HOLDS_FROM", "dequantize_bandwidth"]

BAR = 0.85
HOLDS_FROM = WORTH_TIMING  # seconds of the move at the copy rate
_ROTATED_BYTES = 2**28  # moved by one replay: more than any L2 cache
_MOST_LAUNCHES = 64


def dequantize_bandwidth(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, copy_bytes_per_second: float
) -> dict[str, Any]:
    """A row: seconds of one launch on a weight (N, K), its share of the copy rate, and whether that passes `BAR`:
    None for a move shorter than `HOLDS_FROM`."""
    moved = shape[0] * shape[1] * (NF4_BYTES + dtype.itemsize)
    count = min(_MOST_LAUNCHES, max(2, round(_ROTATED_BYTES / moved))) if device.type == "cuda" else 2
    generator = seeded_generator(device)
    launches = []
    for _ in range(count):
        packed, state = random_nf4_weight(shape, dtype, device, generator)
        out = torch.empty(shape, dtype=dtype, device=device)
        launches.append(partial(dequantize_nf4, packed, state, out=out))
    seconds, timed_by = seconds_per_launch(launches, device)
    at_copy_rate = moved / copy_bytes_per_second
    share = at_copy_rate / seconds
    return {
        "shape": f"{shape[0]}x{shape[1]} {dtype_name(dtype)}",
        "bytes_moved": moved,
        "seconds": seconds,
        "timed_by": timed_by,
        "launches": count,
        "share_of_copy": share,
        "passes": None if at_copy_rate < HOLDS_FROM else share >= BAR,
    }
