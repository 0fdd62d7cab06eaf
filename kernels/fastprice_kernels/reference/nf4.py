"""NF4 weights and their products with a few rows; on CPU tensors the operators are these functions.

Layout (bitsandbytes): a weight (N, K) is flattened in row-major order; two consecutive elements share a byte, the one
of even index in the high four bits; `blocksize` consecutive elements share a scale.

Shapes: N rows, K columns, B blocks, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dequantize_nf4", "matmul_fp32"]


def _scales(
    absmax_B: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None, blocksize2: int
) -> Tensor:
    """The fp32 scale (B,) of each block. A nested scale is rounded after the product and again after the sum."""
    if code2 is None or absmax2 is None or offset is None:
        return absmax_B
    scale_B = absmax2.repeat_interleave(blocksize2)[: absmax_B.numel()]
    return code2[absmax_B.int()] * scale_B + offset


def dequantize_nf4(
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
    """The weight (N, K): code[q] * scale in fp32, rounded once to `dtype`. Arguments as in `NF4Weight`."""
    elements = shape[0] * shape[1]
    byte = packed.reshape(-1).int()
    q = torch.stack((byte >> 4, byte & 15), dim=1).reshape(-1)[:elements]
    scale_B = _scales(absmax_B, code2, absmax2, offset, blocksize2)
    scale = scale_B.repeat_interleave(blocksize)[:elements]
    return (code[q] * scale).to(dtype).view(shape)


def matmul_fp32(x_TK: Tensor, w_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """`x W^T + bias`, (T, N) in x's dtype: products and sums in fp32, rounded once at the end."""
    y_TN = x_TK.float() @ w_NK.float().t()
    if bias_N is not None:
        y_TN = y_TN + bias_N.float()
    return y_TN.to(x_TK.dtype)
