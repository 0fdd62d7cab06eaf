"""Gated activations of an MLP, forward and backward: `h = act(e) * g`.

T tokens, I intermediate width; `e` is the gate projection's output, `g` the up projection's.

SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020) takes act = silu, GeGLU takes gelu, exact ("gelu") or by tanh
("gelu_tanh", Hendrycks and Gimpel, 2016):

    silu(e)      = e * sigma(e)
    gelu(e)      = e * (1 + erf(e / sqrt 2)) / 2
    gelu_tanh(e) = e * sigma(2 u),   u = sqrt(2 / pi) * (e + 0.044715 e^3)

and the backward needs, from dh,

    dg = dh * act(e),   de = dh * g * act'(e),   and h again, for the gradient of what h is multiplied by.

All three results of the backward go where their inputs lay (h over dh, de over e, dg over g), so it allocates nothing.
The in-place trick is Unsloth's and Liger's. The tensors' version counters move, so that a second backward through the
same graph raises instead of reading overwritten values.

Floor, in elements of T x I moved: forward 2 read + 1 written, backward 3 read + 3 written; at 16 bits and 4.3 TB/s a
4,096 x 14,336 MLP costs 82 us and 164 us. Arithmetic is in fp32 whatever the dtype.

The ops are defined straight on the dispatcher: `torch.library.custom_op` costs 30 to 60 us a call in Python (measured,
one core), this way 4, and a 1B model has two of these calls in each layer.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprice_kernels.codegen.machine_code import Bars, CompileCase

__all__ = ["ACTIVATIONS", "glu_backward_", "glu_forward"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

_BLOCK = 1024
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _value_and_slope(e: tl.tensor, KIND: tl.constexpr) -> Any:
    """act(e) and act'(e), in fp32."""
    if KIND == "silu":
        gate = tl.sigmoid(e)
        value = e * gate
        slope = gate * (1.0 + e * (1.0 - gate))
    elif KIND == "gelu":
        below = 0.5 * (1.0 + tl.erf(e * _SQRT_HALF))
        value = e * below
        slope = below + e * _INV_SQRT_2PI * tl.exp(-0.5 * e * e)
    else:
        gate = tl.sigmoid(2.0 * _SQRT_2_OVER_PI * (e + _CUBIC * e * e * e))
        value = e * gate
        slope = gate + 2.0 * value * (1.0 - gate) * _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * e * e)
    return value, slope


@triton.jit
def _glu_forward_kernel(
    e_ptr: tl.tensor,
    g_ptr: tl.tensor,
    h_ptr: tl.tensor,
    width: tl.tensor,
    stride_e: tl.tensor,
    stride_g: tl.tensor,
    stride_h: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program writes BLOCK columns of one row; `width` is I."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    e = tl.load(e_ptr + row * stride_e + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * stride_g + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(e, KIND)
    tl.store(h_ptr + row * stride_h + columns, (value * g).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _glu_backward_kernel(
    dh_ptr: tl.tensor,
    e_ptr: tl.tensor,
    g_ptr: tl.tensor,
    width: tl.tensor,
    stride_d: tl.tensor,
    stride_e: tl.tensor,
    stride_g: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program overwrites BLOCK columns of one row of dh, e and g with h, de and dg."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at_d = dh_ptr + row * stride_d + columns
    at_e = e_ptr + row * stride_e + columns
    at_g = g_ptr + row * stride_g + columns
    dh = tl.load(at_d, mask=inside, other=0.0).to(tl.float32)
    e = tl.load(at_e, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(at_g, mask=inside, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(e, KIND)
    tl.store(at_d, (value * g).to(dh_ptr.dtype.element_ty), mask=inside)
    tl.store(at_e, (dh * g * slope).to(e_ptr.dtype.element_ty), mask=inside)
    tl.store(at_g, (dh * value).to(g_ptr.dtype.element_ty), mask=inside)


def _launch_forward(e: Tensor, g: Tensor, out: Tensor, kind: str) -> None:
    rows, width = e.shape
    if rows and width:
        strides = (e.stride(0), g.stride(0), out.stride(0))
        _glu_forward_kernel[(rows, triton.cdiv(width, _BLOCK))](e, g, out, width, *strides, KIND=kind, BLOCK=_BLOCK)


def _launch_backward(dh: Tensor, e: Tensor, g: Tensor, kind: str) -> None:
    rows, width = e.shape
    if rows and width:
        strides = (dh.stride(0), e.stride(0), g.stride(0))
        _glu_backward_kernel[(rows, triton.cdiv(width, _BLOCK))](dh, e, g, width, *strides, KIND=kind, BLOCK=_BLOCK)


def _torch_value_and_slope(e: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """act(e) and act'(e) in the dtype of `e`, as the kernel has them."""
    if kind == "silu":
        gate = torch.sigmoid(e)
        return e * gate, gate * (1 + e * (1 - gate))
    if kind == "gelu":
        below = 0.5 * (1 + torch.erf(e * _SQRT_HALF.value))
        return e * below, below + e * _INV_SQRT_2PI.value * torch.exp(-0.5 * e * e)
    gate = torch.sigmoid(2 * _SQRT_2_OVER_PI.value * (e + _CUBIC.value * e**3))
    value = e * gate
    return value, gate + 2 * value * (1 - gate) * _SQRT_2_OVER_PI.value * (1 + 3 * _CUBIC.value * e * e)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _forward_cuda(e: Tensor, g: Tensor, out: Tensor, kind: str) -> None:
    _launch_forward(e, g, out, kind)
    torch.autograd.graph.increment_version(out)


def _backward_cuda(dh: Tensor, e: Tensor, g: Tensor, kind: str) -> None:
    _launch_backward(dh, e, g, kind)
    torch.autograd.graph.increment_version([dh, e, g])


def _forward_cpu(e: Tensor, g: Tensor, out: Tensor, kind: str) -> None:
    value, _ = _torch_value_and_slope(_wide(e), kind)
    out.copy_(value * _wide(g))


def _backward_cpu(dh: Tensor, e: Tensor, g: Tensor, kind: str) -> None:
    value, slope = _torch_value_and_slope(_wide(e), kind)
    wide_d, wide_g = _wide(dh), _wide(g)
    h, de, dg = value * wide_g, wide_d * wide_g * slope, wide_d * value
    dh.copy_(h)
    e.copy_(de)
    g.copy_(dg)


_LIBRARY = torch.library.Library("fastprice", "FRAGMENT")
_LIBRARY.define("glu_forward(Tensor e, Tensor g, Tensor(a!) out, str kind) -> ()")
_LIBRARY.define("glu_backward(Tensor(a!) dh, Tensor(b!) e, Tensor(c!) g, str kind) -> ()")
_LIBRARY.impl("glu_forward", _forward_cpu, "CPU")
_LIBRARY.impl("glu_forward", _forward_cuda, "CUDA")
_LIBRARY.impl("glu_backward", _backward_cpu, "CPU")
_LIBRARY.impl("glu_backward", _backward_cuda, "CUDA")


@torch.library.register_fake("fastprice::glu_forward", lib=_LIBRARY)
def _(e: Tensor, g: Tensor, out: Tensor, kind: str) -> None:
    return None


@torch.library.register_fake("fastprice::glu_backward", lib=_LIBRARY)
def _(dh: Tensor, e: Tensor, g: Tensor, kind: str) -> None:
    return None


def _check(kind: str, **tensors: Tensor) -> None:
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation {kind!r} is none of {', '.join(ACTIVATIONS)}")
    (first, e), *rest = tensors.items()
    for name, x in rest:
        if x.shape != e.shape or x.dtype != e.dtype or x.device != e.device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}, "
                f"{first} is {tuple(e.shape)} {e.dtype} on {e.device}"
            )
    for name, x in tensors.items():
        if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
            raise ValueError(f"{name} has shape {tuple(x.shape)} and strides {x.stride()}; rows of stride 1 are needed")


def glu_forward(e: Tensor, g: Tensor, kind: str, *, out: Tensor | None = None) -> Tensor:
    """`act(e) * g`, without autograd.

    Args:
        e, g: (T, I), one dtype and device, rows of stride 1.
        kind: "silu", "gelu" or "gelu_tanh".
        out: where to write, (T, I) with rows of any stride, such as the first I columns of a wider buffer.

    Raises:
        ValueError: an unknown activation, or tensors that differ in shape, dtype or device.
    """
    out = torch.empty_like(e, memory_format=torch.contiguous_format) if out is None else out
    _check(kind, e=e, g=g, out=out)
    torch.ops.fastprice.glu_forward(e, g, out, kind)
    return out


def glu_backward_(dh: Tensor, e: Tensor, g: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrites dh with h, e with de and g with dg (see the module's docstring); returns the three as (h, de, dg).

    Args:
        dh, e, g: (T, I), one dtype and device, rows of stride 1; none may overlap another.

    Raises:
        ValueError: an unknown activation, or tensors that differ in shape, dtype or device.
    """
    _check(kind, e=e, g=g, dh=dh)
    torch.ops.fastprice.glu_backward(dh, e, g, kind)
    return dh, e, g


def compile_cases() -> list[CompileCase]:
    """Every activation in both directions; 128-bit stores, no trip through shared memory."""
    cases = []
    for dtype in ("bf16", "fp16", "fp32"):
        for kind in ACTIVATIONS:
            for direction, fn, names in (
                ("forward", _glu_forward_kernel, ("e", "g", "h")),
                ("backward", _glu_backward_kernel, ("dh", "e", "g")),
            ):
                pointers = [f"{name}_ptr" for name in names]
                sizes = ["width", *(f"stride_{name[0]}" for name in names)]
                cases.append(
                    CompileCase(
                        name=f"glu_{direction}/{kind}/{dtype}",
                        fn=fn,
                        signature={**dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys(sizes, "i32")},
                        constexprs={"KIND": kind, "BLOCK": _BLOCK},
                        aligned=(*pointers, *sizes),
                        elements=_BLOCK,
                        bars=Bars(store_bits=128, shared_stores=False),
                    )
                )
    return cases
