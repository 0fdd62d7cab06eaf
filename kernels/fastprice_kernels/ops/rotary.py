"""Rotary position embedding of queries and keys, in place and in one launch, forward and backward.

A pair (a, b) of columns is turned by the angle of its position (Su et al., "RoFormer", 2021):

    a' = a cos - b sin        b' = b cos + a sin        backward: the same with -sin

    "half"               pairs (i, i + R/2), cos and sin of each column             Llama, Qwen, Gemma, Mistral
    "interleaved"        pairs (2i, 2i + 1), cos and sin of each column             Cohere
    "interleaved_half"   pairs (2i, 2i + 1), cos and sin of pair i in column i      GLM

cos and sin come from the model's own rotary embedding, so that every scaling (linear, Llama-3, YaRN) and every
numbering of positions, packed ones too, is in them. Columns from R on stay as they are (partial rotary). Only cos and
sin are saved, which all layers share.

Elements to move: each rotated one is read and written once; the stock code moves five to eight times as much.
Arithmetic is in fp32, with one rounding; the stock code in 16 bits rounds three times.

Shapes: B texts or packs, T tokens, H heads, D columns of a head, R of them rotated.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprice_kernels.codegen.machine_code import CompileCase, Requirements
from fastprice_kernels.ops._launching import launch
from fastprice_kernels.ops._library import define_op

__all__ = ["ROTARY_FORMS", "rotate_"]

ROTARY_FORMS = ("half", "interleaved", "interleaved_half")
_TILE = 2048  # elements of one program
_WARPS = 4


@triton.jit
def _turn(
    a: tl.tensor, b: tl.tensor, cos_a: tl.tensor, cos_b: tl.tensor, sin_a: tl.tensor, sin_b: tl.tensor,
    BACKWARD: tl.constexpr,
) -> Any:  # fmt: skip
    if BACKWARD:
        return a * cos_a + b * sin_b, b * cos_b - a * sin_a
    return a * cos_a - b * sin_a, b * cos_b + a * sin_b


@triton.jit
def _rotate_heads(
    x_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, first: tl.tensor, heads: tl.tensor, stride: tl.tensor,
    rotated: tl.tensor, FORM: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
) -> None:  # fmt: skip
    """Turns HEADS heads of one token from `first` on, `stride` elements apart."""
    head = first + tl.arange(0, HEADS)
    rows = x_ptr + head.to(tl.int64)[:, None] * stride
    half = rotated // 2
    pair = tl.arange(0, PAIRS)
    if FORM == "half":
        known = pair < half
        inside = (head < heads)[:, None] & known[None, :]
        at_a = rows + pair[None, :]
        at_b = at_a + half
        cos_a = tl.load(cos_ptr + pair, mask=known, other=0.0).to(tl.float32)[None, :]
        sin_a = tl.load(sin_ptr + pair, mask=known, other=0.0).to(tl.float32)[None, :]
        cos_b = tl.load(cos_ptr + half + pair, mask=known, other=0.0).to(tl.float32)[None, :]
        sin_b = tl.load(sin_ptr + half + pair, mask=known, other=0.0).to(tl.float32)[None, :]
        a = tl.load(at_a, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at_b, mask=inside, other=0.0).to(tl.float32)
        a, b = _turn(a, b, cos_a, cos_b, sin_a, sin_b, BACKWARD)
        tl.store(at_a, a.to(x_ptr.dtype.element_ty), mask=inside)
        tl.store(at_b, b.to(x_ptr.dtype.element_ty), mask=inside)
    else:
        column = tl.arange(0, 2 * PAIRS)
        inside = (head < heads)[:, None] & (column < rotated)[None, :]
        at = rows + column[None, :]
        a, b = tl.split(tl.reshape(tl.load(at, mask=inside, other=0.0).to(tl.float32), (HEADS, PAIRS, 2)))
        source = column if FORM == "interleaved" else column // 2
        cos = tl.load(cos_ptr + source, mask=column < rotated, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + source, mask=column < rotated, other=0.0).to(tl.float32)
        cos_a, cos_b = tl.split(tl.reshape(cos, (PAIRS, 2)))
        sin_a, sin_b = tl.split(tl.reshape(sin, (PAIRS, 2)))
        a, b = _turn(a, b, cos_a[None, :], cos_b[None, :], sin_a[None, :], sin_b[None, :], BACKWARD)
        turned = tl.reshape(tl.join(a, b), (HEADS, 2 * PAIRS))
        tl.store(at, turned.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor,
    tokens: tl.tensor, q_heads: tl.tensor, k_heads: tl.tensor, rotated: tl.tensor,
    q_batch: tl.tensor, q_head: tl.tensor, q_token: tl.tensor,
    k_batch: tl.tensor, k_head: tl.tensor, k_token: tl.tensor, table_batch: tl.tensor, q_programs: tl.tensor,
    FORM: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
) -> None:  # fmt: skip
    """One program turns HEADS heads of one token: of the queries, or from program `q_programs` on of the keys."""
    text = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    part = tl.program_id(1)
    table = text * table_batch + token * rotated
    if part < q_programs:
        at = q_ptr + text * q_batch + token * q_token
        _rotate_heads(at, cos_ptr + table, sin_ptr + table, part * HEADS, q_heads, q_head, rotated,
                      FORM, BACKWARD, HEADS, PAIRS)  # fmt: skip
    else:
        at = k_ptr + text * k_batch + token * k_token
        _rotate_heads(at, cos_ptr + table, sin_ptr + table, (part - q_programs) * HEADS, k_heads, k_head, rotated,
                      FORM, BACKWARD, HEADS, PAIRS)  # fmt: skip


def _rotate_cuda(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: str, backward: bool) -> None:
    batch, q_heads, tokens, _ = q.shape
    if q.numel() + k.numel():
        pairs = triton.next_power_of_2(cos.shape[-1] // 2)
        heads = max(1, min(_TILE // (2 * pairs), triton.next_power_of_2(q_heads)))
        q_programs = triton.cdiv(q_heads, heads)
        grid = (batch * tokens, q_programs + triton.cdiv(k.shape[1], heads))
        launch(
            _rotate_kernel, grid, q, k, cos, sin, tokens, q_heads, k.shape[1], cos.shape[-1],
            *q.stride()[:3], *k.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0, q_programs,
            FORM=form, BACKWARD=backward, HEADS=heads, PAIRS=pairs, num_warps=_WARPS,
        )  # fmt: skip
    torch.autograd.graph.increment_version([q, k])


def _rotate_cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: str, backward: bool) -> None:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    half = cos.shape[-1] // 2
    cos, sin = (each[:, None].to(wide) for each in (cos, sin))
    if form == "half":
        at_a, at_b = slice(half), slice(half, 2 * half)
    else:
        at_a, at_b = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    of_a, of_b = (slice(half), slice(half)) if form == "interleaved_half" else (at_a, at_b)
    cos_a, cos_b, sin_a, sin_b = cos[..., of_a], cos[..., of_b], sin[..., of_a], sin[..., of_b]
    for x in (q, k):
        a, b = x[..., at_a].to(wide), x[..., at_b].to(wide)
        if backward:
            turned = a * cos_a + b * sin_b, b * cos_b - a * sin_a
        else:
            turned = a * cos_a - b * sin_a, b * cos_b + a * sin_b
        x[..., at_a], x[..., at_b] = turned


def _fake(*arguments: Any) -> None:
    """It writes into its arguments and returns nothing."""


_rotate_op = define_op(
    "rotate(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, str form, bool backward) -> ()",
    cpu=_rotate_cpu,
    cuda=_rotate_cuda,
    fake=_fake,
)


class _Rotate(torch.autograd.Function):
    """From q and k, the same memory with rotated values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: str) -> tuple[Tensor, Tensor]:
        # Not marked as changed in place: autograd would then copy the gradient of the base that q is a view of.
        q, k = q.detach(), k.detach()
        _rotate_op(q, k, cos, sin, form, False)
        ctx.save_for_backward(cos, sin)
        ctx.form = form
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = _writable(dq), _writable(dk)
        _rotate_op(dq, dk, *ctx.saved_tensors, ctx.form, True)
        return dq, dk, None, None, None


def _writable(x: Tensor) -> Tensor:
    """x, or a copy where its rows are not contiguous or share memory, as those of an expanded gradient do."""
    if x.is_contiguous() or x.transpose(1, 2).is_contiguous():
        return x
    sizes = sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    end = 1
    for stride, size in sizes:
        if stride < end:
            return x.clone(memory_format=torch.contiguous_format)
        end = stride * (size - 1) + end
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rotate_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: str = "half") -> tuple[Tensor, Tensor]:
    """Rotates q (B, H, T, D) and k (B, G, T, D) by their positions, in place where their rows are contiguous.

    Use the results, not the arguments, which autograd does not know to have changed: code that saved one of them for
    its backward gets PyTorch's error about a tensor modified in place.

    Args:
        q, k: one dtype and device, any strides; usually views of (B, T, H D).
        cos, sin: (B or 1, T, R) with R even and at most D, without gradients.
        form: one of `ROTARY_FORMS`.

    Raises:
        ValueError: an unknown form, or shapes, dtypes or devices that do not fit together.
    """
    _check(q, k, cos, sin, form)
    if torch.compiler.is_compiling():
        q, k = q.clone(), k.clone()
    results: tuple[Tensor, Tensor] = _Rotate.apply(_writable(q), _writable(k), cos.contiguous(), sin.contiguous(), form)
    return results


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: str) -> None:
    if form not in ROTARY_FORMS:
        raise ValueError(f"rotary form {form!r} is not one of {', '.join(ROTARY_FORMS)}")
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q is {tuple(q.shape)} and k {tuple(k.shape)}, (B, H, T, D) and (B, G, T, D) are rotated")
    if q.dtype != k.dtype or len({each.device for each in (q, k, cos, sin)}) > 1:
        raise ValueError(f"q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, cos on {cos.device}")
    batch, _, tokens, width = q.shape
    rotated = cos.shape[-1]
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens:
        raise ValueError(f"cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}; q {tuple(q.shape)} needs (B or 1, T, R)")
    if rotated % 2 or rotated > width:
        raise ValueError(f"{rotated} columns are to be rotated, an even number of up to {width} can be")


def compile_cases() -> list[CompileCase]:
    """Every form in both directions, heads of 128 and of 64: 128-bit stores, no spills."""
    return [
        CompileCase(
            name=f"rotate{'_backward' if backward else ''}/{form}/{width}/{dtype}",
            fn=_rotate_kernel,
            signature={
                **dict.fromkeys(("q_ptr", "k_ptr", "cos_ptr", "sin_ptr"), f"*{dtype}"),
                **dict.fromkeys(("tokens", "q_heads", "k_heads", "rotated"), "i32"),
                **dict.fromkeys((f"{x}_{of}" for x in "qk" for of in ("batch", "head", "token")), "i32"),
                **dict.fromkeys(("table_batch", "q_programs"), "i32"),
            },
            constexprs={"FORM": form, "BACKWARD": backward, "HEADS": _TILE // width, "PAIRS": width // 2},
            aligned=(
                "q_ptr", "k_ptr", "cos_ptr", "sin_ptr", "rotated", "q_batch", "q_head", "q_token", "k_batch", "k_head",
                "k_token", "table_batch",
            ),
            num_warps=_WARPS,
            elements=_TILE,
            requirements=Requirements(store_bits=128),
        )
        for dtype in ("bf16", "fp16", "fp32")
        for form in ROTARY_FORMS
        for width in (128, 64)
        for backward in (False, True)
        if (dtype == "bf16", width == 128, form == "half").count(True) >= 2
    ]  # fmt: skip
