"""The plain PyTorch truth of the NF4 kernels: short, any device, no attention to speed or memory.

The kernels on CPU tensors are these functions, so the whole library works without a GPU; tests and benchmarks hold the
Triton kernels against them.

Layout (bitsandbytes): a weight (N, K) is flattened row by row; two neighbours share a byte, the even one in the high
four bits; `blocksize` neighbours share a scale. Legend: N rows, K columns, B blocks, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nf4_matmul_reference", "nf4_reference", "nf4_scales_reference"]


def nf4_scales_reference(
    absmax_B: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None, blocksize2: int
) -> Tensor:
    """The fp32 scale (B,) of every block. A nested scale is multiplied, rounded, then shifted: never fused."""
    if code2 is None or absmax2 is None or offset is None:
        return absmax_B
    scale_B = absmax2.repeat_interleave(blocksize2)[: absmax_B.numel()]
    return code2[absmax_B.int()] * scale_B + offset


def nf4_reference(
    packed: Tensor,
    code: Tensor,
    absmax_B: Tensor,
    code2: Tensor | None,
    absmax2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    blocksize2: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight (N, K): code[q] * scale in fp32, rounded once to `dtype`. Arguments as in `_checks.NF4State`."""
    elements = shape[0] * shape[1]
    bytes_ = packed.reshape(-1).int()
    q = torch.stack((bytes_ >> 4, bytes_ & 15), dim=1).reshape(-1)[:elements]
    scale_B = nf4_scales_reference(absmax_B, code2, absmax2, offset, blocksize2)
    scale = scale_B.repeat_interleave(blocksize)[:elements]
    return (code[q] * scale).to(dtype).view(shape)


def nf4_matmul_reference(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """`x W^T + bias`, (T, N) in x's dtype: products and sums in fp32, rounded once at the end."""
    y_TN = x_TK.float() @ w_NK.float().t()
    if bias_N is not None:
        y_TN = y_TN + bias_N.float()
    return y_TN.to(x_TK.dtype)
