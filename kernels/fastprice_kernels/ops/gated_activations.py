"""The gated activations of an MLP, forward and backward: `h = act(e) * g`.

SwiGLU (Shazeer, "GLU Variants Improve Transformer", 2020) takes act = silu; GeGLU takes gelu, exact ("gelu") or with
tanh ("gelu_tanh", Hendrycks and Gimpel, 2016). From dh the backward computes three results, each written over one of
its inputs (h over dh, de over e, dg over g), so that it allocates nothing, as Unsloth and Liger do:

    silu(e)      = e * sigma(e)                           dg = dh * act(e)
    gelu(e)      = e * (1 + erf(e / sqrt 2)) / 2          de = dh * g * act'(e)
    gelu_tanh(e) = e * sigma(2 u)                         h  = act(e) * g, an input of the next gradient
                   u = sqrt(2 / pi) * (e + 0.044715 e^3)

Elements to move, for T x I: forward 2 read and 1 written, backward 3 read and 3 written. Arithmetic is in fp32 for
every dtype. The tensors' version counters increase, so that a second backward through the same graph raises an error
instead of reading overwritten values.

Shapes: T tokens, I the MLP's width; `e` is the output of the gate projection, `g` that of the up projection.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprice_kernels.codegen.machine_code import CompileCase, Requirements
from fastprice_kernels.ops._launching import launch
from fastprice_kernels.ops._library import define_op

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
        share = 0.5 * (1.0 + tl.erf(e * _SQRT_HALF))
        value = e * share
        slope = share + e * _INV_SQRT_2PI * tl.exp(-0.5 * e * e)
    else:
        gate = tl.sigmoid(2.0 * _SQRT_2_OVER_PI * (e + _CUBIC * e * e * e))
        value = e * gate
        slope = gate + 2.0 * value * (1.0 - gate) * _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * e * e)
    return value, slope


@triton.jit
def _tile(width: tl.tensor, BLOCK: tl.constexpr) -> Any:
    """The row of a program, its BLOCK columns, and which of them are inside the `width`."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(0).to(tl.int64), columns, columns < width


@triton.jit
def _glu_forward_kernel(
    e_ptr: tl.tensor, g_ptr: tl.tensor, h_ptr: tl.tensor,
    width: tl.tensor, stride_e: tl.tensor, stride_g: tl.tensor, stride_h: tl.tensor,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program writes BLOCK columns of one row; `width` is I."""
    row, columns, inside = _tile(width, BLOCK)
    e = tl.load(e_ptr + row * stride_e + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * stride_g + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(e, KIND)
    tl.store(h_ptr + row * stride_h + columns, (value * g).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _glu_backward_kernel(
    dh_ptr: tl.tensor, e_ptr: tl.tensor, g_ptr: tl.tensor,
    width: tl.tensor, stride_d: tl.tensor, stride_e: tl.tensor, stride_g: tl.tensor,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program overwrites BLOCK columns of one row of dh, e and g with h, de and dg."""
    row, columns, inside = _tile(width, BLOCK)
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
        grid = (rows, triton.cdiv(width, _BLOCK))
        launch(_glu_forward_kernel, grid, e, g, out, width, *strides, KIND=kind, BLOCK=_BLOCK)


def _launch_backward(dh: Tensor, e: Tensor, g: Tensor, kind: str) -> None:
    rows, width = e.shape
    if rows and width:
        strides = (dh.stride(0), e.stride(0), g.stride(0))
        grid = (rows, triton.cdiv(width, _BLOCK))
        launch(_glu_backward_kernel, grid, dh, e, g, width, *strides, KIND=kind, BLOCK=_BLOCK)


def _torch_value_and_slope(e: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """act(e) and act'(e) in the dtype of `e`, by the formulas of the kernel."""
    if kind == "silu":
        gate = torch.sigmoid(e)
        return e * gate, gate * (1 + e * (1 - gate))
    if kind == "gelu":
        share = 0.5 * (1 + torch.erf(e * _SQRT_HALF.value))
        return e * share, share + e * _INV_SQRT_2PI.value * torch.exp(-0.5 * e * e)
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


def _fake(*arguments: Any) -> None:
    """Both write into their arguments and return nothing."""


_forward_op = define_op(
    "glu_forward(Tensor e, Tensor g, Tensor(a!) out, str kind) -> ()",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_fake,
)
_backward_op = define_op(
    "glu_backward(Tensor(a!) dh, Tensor(b!) e, Tensor(c!) g, str kind) -> ()",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_fake,
)


def _check(kind: str, **tensors: Tensor) -> None:
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation {kind!r} is not one of {', '.join(ACTIVATIONS)}")
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
        out: (T, I) to write into, or None; its rows may be apart, as the first I columns of a wider buffer are.

    Returns:
        `out`, or a new contiguous tensor.

    Raises:
        ValueError: an unknown activation, or tensors that differ in shape, dtype or device.
    """
    out = torch.empty_like(e, memory_format=torch.contiguous_format) if out is None else out
    _check(kind, e=e, g=g, out=out)
    _forward_op(e, g, out, kind)
    return out


def glu_backward_(dh: Tensor, e: Tensor, g: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrites dh with h, e with de and g with dg, and returns the three as (h, de, dg).

    Args:
        dh, e, g: (T, I), one dtype and device, rows of stride 1; none may overlap another.

    Raises:
        ValueError: an unknown activation, or tensors that differ in shape, dtype or device.
    """
    _check(kind, e=e, g=g, dh=dh)
    _backward_op(dh, e, g, kind)
    return dh, e, g


def compile_cases() -> list[CompileCase]:
    """Every activation in both directions: 128-bit stores, no stores to shared memory."""
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
                        requirements=Requirements(store_bits=128, shared_stores=False),
                    )
                )
    return cases
