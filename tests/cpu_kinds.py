"""The two kinds of CPU that bitsandbytes 0.50.2 tells apart, on any machine.

With AVX-512 its `dequantize_4bit` takes the scale `row * (K // block) + column // block`: wrong where rows are a
multiple of 16 but not of the block. With BF16 as well a 4-bit layer repacks its weight in place at its first forward in
eval mode without a gradient, rounds its scales to bf16, and nothing but one inference kernel can read the result.
Elsewhere a weight's scale is that of its block of neighbors, and nothing is repacked.

`emulate` gives the CPU at hand either behavior. `FASTPRICE_TEST_CPU=avx512_bf16 pytest` runs a whole session with it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

KINDS = ("avx2", "avx512_bf16")

# The layout of a repacked weight: groups of 32 rows, a byte holds the same column of two of them.
_ROWS = 32


@contextmanager
def emulate(kind: str) -> Iterator[None]:
    """bitsandbytes behaves on CPU tensors as on a CPU of that kind; 4-bit layers must be made inside."""
    from bitsandbytes.nn import modules

    avx512 = {"avx2": False, "avx512_bf16": True}[kind]
    library = torch.library.Library("bitsandbytes", "IMPL")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        patch.setattr(modules, "has_avx512bf16", lambda: avx512)
        library.impl("dequantize_4bit", _dequantize_by_rows if avx512 else _dequantize, "CPU", allow_override=True)
        library.impl("gemv_4bit", _packed_product, "CPU", allow_override=True)
        try:
            yield
        finally:
            library._destroy()


def _dequantize(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """code[q] * absmax[block], blocks counted over the flat weight: what the format says."""
    block = torch.arange(math.prod(shape)) // blocksize
    return _scaled(packed, absmax, block, quant_type, shape, dtype)


def _dequantize_by_rows(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    columns = shape[-1]
    if columns % 16 or blocksize >= 2048:
        return _dequantize(packed, absmax, blocksize, quant_type, shape, dtype)
    rows = torch.arange(math.prod(shape) // columns)[:, None]
    block = rows * (columns // blocksize) + torch.arange(columns) // blocksize
    return _scaled(packed, absmax, block.reshape(-1), quant_type, shape, dtype)


def _scaled(
    packed: Tensor, absmax: Tensor, block: Tensor, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    nibbles = packed.contiguous().view(torch.uint8).reshape(-1).int()
    q = torch.stack((nibbles >> 4, nibbles & 15), dim=1).reshape(-1)[: len(block)]
    w = get_4bit_type(quant_type, device="cpu")[q] * absmax.float().reshape(-1)[block]
    return w.to(dtype).reshape(tuple(shape))


@torch.no_grad()  # as machine code that autograd knows nothing of
def _packed_product(
    x: Tensor, packed: Tensor, shape: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    """x W^T in bf16 of a weight (N, K) that was repacked; absmax (K / blocksize, N) in bf16."""
    n, k = shape
    bytes_ = packed.view(torch.uint8).reshape(-1, _ROWS)
    q = torch.cat((bytes_ & 15, bytes_ >> 4), dim=1).reshape(n // _ROWS, k // 2, _ROWS, 2)
    q = q.transpose(1, 2).reshape(n, k).int()
    w = code[q] * absmax.float().t().repeat_interleave(blocksize, dim=1)
    return torch.nn.functional.linear(x.bfloat16(), w.bfloat16()).to(x.dtype)
