"""An NF4 weight as the operators take it, read from a bitsandbytes quant state and checked before a kernel runs.

A weight is checked once: what was found is kept by the quant state's identity, with weak references to the tensors that
were checked, and holds as long as they are the same tensors and the packed bytes are where they were. So a state that
gets other tensors (layers that are prefetched, moved or copied) is checked again, and nothing is kept alive.
"""

from __future__ import annotations

import weakref
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


class _Checked(NamedTuple):
    """What was found for a quant state: weak references to its tensors and its second state, and the rest."""

    absmax: weakref.ref[Tensor]
    code: weakref.ref[Tensor]
    absmax2: weakref.ref[Tensor] | None
    code2: weakref.ref[Tensor] | None
    offset: weakref.ref[Tensor] | None
    blocksize: int
    blocksize2: int
    dtype: torch.dtype
    size: torch.Size
    address: int
    bytes: int
    shape: tuple[int, int]


_CHECKED: dict[int, tuple[weakref.ref[Any], _Checked]] = {}  # by the id of a quant state that is alive


def read_weight(packed: Tensor, quant_state: Any) -> tuple[NF4Weight, tuple[int, int], torch.dtype]:
    """The weight of `packed` and its bitsandbytes `QuantState`, its shape (N, K), and its dtype before quantization.

    Reads attributes, never the values of a tensor.

    Raises:
        ValueError: another quantization, or dtypes, devices or sizes that do not fit together.
    """
    if torch.compiler.is_compiling():
        return _check_weight(packed, quant_state)
    # bitsandbytes' `Params4bit` overrides `__torch_function__`, which costs 2 to 4 us for each attribute of the tensor.
    with torch._C.DisableTorchFunctionSubclass():
        plain = packed.data
        entry = _CHECKED.get(id(quant_state))
        if entry is not None and entry[0]() is quant_state and type(plain) is Tensor:
            weight = _unchanged(entry[1], plain, vars(quant_state))
            if weight is not None:
                return weight, entry[1].shape, entry[1].dtype
        found = _check_weight(plain, quant_state)
        if type(plain) is Tensor and plain.is_contiguous():
            _remember(plain, quant_state, found)
        return found


def _unchanged(checked: _Checked, packed: Tensor, state: dict[str, Any]) -> NF4Weight | None:
    """The weight, if the state has the tensors and the settings that were checked."""
    absmax, code, state2 = state["absmax"], state["code"], state["state2"]
    if (
        absmax is not checked.absmax()
        or code is not checked.code()
        or packed.data_ptr() != checked.address
        or packed.numel() != checked.bytes
        or packed.dtype != torch.uint8
        or state["blocksize"] != checked.blocksize
        or state["dtype"] != checked.dtype
        or state["shape"] is not checked.size
        or state["quant_type"] != "nf4"
        or state.get("packing_format_for_cpu", False)
    ):
        return None
    if state2 is None:
        plain = NF4Weight(packed, state["code"], state["absmax"], None, None, None, checked.blocksize, 1)
        return plain if checked.absmax2 is None else None
    if checked.absmax2 is None or checked.code2 is None or checked.offset is None:
        return None
    absmax2, code2, offset = state2.absmax, state2.code, state["offset"]
    if (
        checked.absmax2() is not absmax2
        or checked.code2() is not code2
        or checked.offset() is not offset
        or state2.blocksize != checked.blocksize2
    ):
        return None
    small = state["code"], state["absmax"], state2.code, state2.absmax, state["offset"]
    return NF4Weight(packed, *small, checked.blocksize, checked.blocksize2)


def _remember(packed: Tensor, state: Any, found: tuple[NF4Weight, tuple[int, int], torch.dtype]) -> None:
    weight, shape, dtype = found
    if not (hasattr(state, "__dict__") and hasattr(state, "__weakref__")):
        return
    key = id(state)
    checked = _Checked(
        absmax=weakref.ref(weight.absmax),
        code=weakref.ref(weight.code),
        absmax2=None if weight.absmax2 is None else weakref.ref(weight.absmax2),
        code2=None if weight.code2 is None else weakref.ref(weight.code2),
        offset=None if weight.offset is None else weakref.ref(weight.offset),
        blocksize=weight.blocksize,
        blocksize2=weight.blocksize2,
        dtype=dtype,
        size=state.shape,
        address=packed.data_ptr(),
        bytes=packed.numel(),
        shape=shape,
    )
    _CHECKED[key] = weakref.ref(state, lambda _: _CHECKED.pop(key, None)), checked


def _check_weight(packed: Tensor, quant_state: Any) -> tuple[NF4Weight, tuple[int, int], torch.dtype]:
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
