"""What a quantised weight must look like before a kernel touches it; every complaint names both sides."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["NF4State", "check_out", "read_state"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class NF4State(NamedTuple):
    """The plain parts of a bitsandbytes `QuantState` (B blocks of `blocksize` elements over a weight (n, k)).

    `absmax` is fp32 (B,) where the scales are stored plainly. Where they are nested it is uint8 (B,), a code into
    `code2`, fp32 (256,), scaled by `absmax2`, fp32 (ceil(B / blocksize2),), and shifted by `offset`, fp32 ().
    `code` is the sixteen NF4 values, fp32 (16,). `dtype` is the dtype the weight had before.
    """

    code: Tensor
    absmax: Tensor
    code2: Tensor | None
    absmax2: Tensor | None
    offset: Tensor | None
    blocksize: int
    blocksize2: int
    n: int
    k: int
    dtype: torch.dtype


def read_state(packed: Tensor, quant_state: Any) -> NF4State:
    """Takes a quant state apart, having checked that it is NF4 and fits `packed`. Reads no tensor's values.

    Raises:
        ValueError: another quantisation, or dtypes, devices or sizes that do not fit together.
    """
    kind, blocksize, dtype = quant_state.quant_type, quant_state.blocksize, quant_state.dtype
    if kind != "nf4":
        raise ValueError(f"the quant state is of type {kind!r}, this kernel reads 'nf4'")
    # bitsandbytes turns weights over in place on some CPUs (AVX512-BF16) at the first forward in eval mode.
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

    _expect("packed", packed, torch.uint8, -(-n * k // 2), packed.device, f"a weight of shape ({n}, {k})")
    absmax, code, state2 = quant_state.absmax, quant_state.code, quant_state.state2
    _expect("code", code, torch.float32, 16, packed.device, "NF4")
    if state2 is None:
        _expect("absmax", absmax, torch.float32, blocks, packed.device, f"{n * k} elements in blocks of {blocksize}")
        return NF4State(code, absmax, None, None, None, blocksize, 1, n, k, dtype)

    _expect("nested absmax", absmax, torch.uint8, blocks, packed.device, f"{n * k} elements in blocks of {blocksize}")
    _expect("state2.code", state2.code, torch.float32, 256, packed.device, "8-bit scales")
    blocks2 = -(-blocks // state2.blocksize)
    about = f"{blocks} scales in blocks of {state2.blocksize}"
    _expect("state2.absmax", state2.absmax, torch.float32, blocks2, packed.device, about)
    _expect("offset", quant_state.offset, torch.float32, 1, packed.device, "nested scales")
    return NF4State(
        code, absmax, state2.code, state2.absmax, quant_state.offset, blocksize, int(state2.blocksize), n, k, dtype
    )


def check_out(out: Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Checks a caller's output: that shape, dtype and device, its rows contiguous and apart from one another.

    Raises:
        ValueError: it is anything else.
    """
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, the weight has {shape}")
    if out.dtype != dtype:
        raise ValueError(f"out is {out.dtype}, the weight is asked for in {dtype}")
    if out.device != device:
        raise ValueError(f"out is on {out.device}, packed is on {device}")
    rows, columns = shape
    if (columns > 1 and out.stride(1) != 1) or (rows > 1 and out.stride(0) < columns):
        raise ValueError(
            f"out has strides {out.stride()}, rows of {columns} contiguous elements that do not overlap are written"
        )


def _expect(name: str, tensor: Any, dtype: torch.dtype, size: int, device: torch.device, about: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {type(tensor).__name__}, {about} needs a {dtype} tensor")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}, {about} needs {dtype}")
    if tensor.numel() != size:
        raise ValueError(f"{name} has {tensor.numel()} elements, {about} needs {size}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, packed is on {device}")
    # `packed` is made contiguous by whoever reads it; the small tensors are read as they lie.
    if name != "packed" and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, a contiguous tensor is read")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
