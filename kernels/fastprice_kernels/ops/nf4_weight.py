"""An NF4 weight as the operators take it, read from a bitsandbytes quant state and checked before a kernel runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "SCHEMA", "NF4Weight", "check_out", "read_weight"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The arguments of an operator that are an `NF4Weight`.
SCHEMA = (
    "Tensor packed, Tensor code, Tensor absmax, Tensor? code2, Tensor? absmax2, Tensor? offset, int blocksize, "
    "int blocksize2"
)


class NF4Weight(NamedTuple):
    """A weight of N x K elements in B blocks of `blocksize` consecutive elements.

    Attributes:
        packed: uint8, ceil(N * K / 2) bytes, contiguous; the element of even index is in the high four bits.
        code: the sixteen NF4 values, fp32 (16,).
        absmax: the scale of each block, (B,). Plain scales are fp32. Nested scales are uint8, an index into `code2`.
        code2: fp32 (256,), or None for plain scales, as the next two.
        absmax2: fp32 (ceil(B / blocksize2),), the scale of each block of nested scales.
        offset: fp32 (), added to a nested scale.
        blocksize: elements in a block.
        blocksize2: scales in a block of nested scales; 1 for plain scales.
    """

    packed: Tensor
    code: Tensor
    absmax: Tensor
    code2: Tensor | None
    absmax2: Tensor | None
    offset: Tensor | None
    blocksize: int
    blocksize2: int


def read_weight(packed: Tensor, quant_state: Any) -> tuple[NF4Weight, tuple[int, int], torch.dtype]:
    """The weight of `packed` and its bitsandbytes `QuantState`, its shape (N, K), and its dtype before quantization.

    Reads attributes, never the values of a tensor.

    Raises:
        ValueError: another quantization, or dtypes, devices or sizes that do not fit together.
    """
    kind, blocksize, dtype = quant_state.quant_type, quant_state.blocksize, quant_state.dtype
    if kind != "nf4":
        raise ValueError(f"the quant state is of type {kind!r}, this kernel reads 'nf4'")
    # bitsandbytes reorders weights in place on some CPUs (AVX512-BF16) at the first forward pass in eval mode.
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise ValueError("the weight was repacked by bitsandbytes for its CPU inference, this kernel reads plain NF4")
    if blocksize not in BLOCK_SIZES:
        raise ValueError(f"the quant state has blocks of {blocksize}, bitsandbytes makes {BLOCK_SIZES}")
    if dtype not in DTYPES:
        raise ValueError(f"the quant state is of a weight in {dtype}, this kernel writes {_names(DTYPES)}")
    if len(quant_state.shape) != 2:
        raise ValueError(f"the quant state is of a weight of shape {tuple(quant_state.shape)}, two dimensions are read")
    n, k = (int(size) for size in quant_state.shape)
    blocks = -(-n * k // blocksize)

    _check("packed", packed, torch.uint8, -(-n * k // 2), packed.device, f"a weight of shape ({n}, {k})")
    packed = packed.contiguous()
    absmax, code, state2 = quant_state.absmax, quant_state.code, quant_state.state2
    _check("code", code, torch.float32, 16, packed.device, "NF4")
    about = f"{n * k} elements in blocks of {blocksize}"
    if state2 is None:
        _check("absmax", absmax, torch.float32, blocks, packed.device, about)
        return NF4Weight(packed, code, absmax, None, None, None, blocksize, 1), (n, k), dtype

    _check("nested absmax", absmax, torch.uint8, blocks, packed.device, about)
    _check("state2.code", state2.code, torch.float32, 256, packed.device, "8-bit scales")
    blocksize2 = int(state2.blocksize)
    about = f"{blocks} scales in blocks of {blocksize2}"
    _check("state2.absmax", state2.absmax, torch.float32, -(-blocks // blocksize2), packed.device, about)
    _check("offset", quant_state.offset, torch.float32, 1, packed.device, "nested scales")
    nested = (state2.code, state2.absmax, quant_state.offset)
    return NF4Weight(packed, code, absmax, *nested, blocksize, blocksize2), (n, k), dtype


def check_out(out: Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Checks a caller's output: that shape, dtype and device, each row contiguous, no two rows overlapping.

    Raises:
        ValueError: it is anything else.
    """
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, the weight has {shape}")
    if out.dtype != dtype:
        raise ValueError(f"out is {out.dtype}, the weight is requested in {dtype}")
    if out.device != device:
        raise ValueError(f"out is on {out.device}, packed is on {device}")
    rows, columns = shape
    if (columns > 1 and out.stride(1) != 1) or (rows > 1 and out.stride(0) < columns):
        raise ValueError(
            f"out has strides {out.stride()}, rows of {columns} contiguous elements that do not overlap are written"
        )


def _check(name: str, tensor: Any, dtype: torch.dtype, size: int, device: torch.device, about: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {type(tensor).__name__}, {about} needs a {dtype} tensor")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, {about} needs {dtype}")
    if tensor.numel() != size:
        raise ValueError(f"{name} has {tensor.numel()} elements, {about} needs {size}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, packed is on {device}")
    # `packed` is made contiguous where it is not; the small tensors are read in place.
    if name != "packed" and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, a contiguous tensor is read")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
