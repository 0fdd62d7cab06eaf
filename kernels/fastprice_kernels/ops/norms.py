"""RMSNorm and LayerNorm of rows, with the residual addition before them, forward and backward.

    "rms"            y = round(x / rms) * w        Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019
    "rms_plus_one"   y = x / rms * (1 + w)         Gemma's: one rounding, at the end
    "layer"          y = (x - mean) / std * w + b  Ba et al., "Layer Normalization", 2016

`add_norm` is for a residual stream, which is used twice: s = x + r goes on, and y = norm(s) into the projections. Its
backward takes the gradients of both, so that autograd need not add them. Saved are the input of the norm (s), which the
residual stream holds anyway, and one or two fp32 numbers a row: no fp32 copy of the rows, as the stock code saves.

Elements to move for T x W: `norm` forward 1 read and 1 written, backward 2 and 1; `add_norm` forward 2 and 2, backward
3 and 1. In 16 bits a norm's 4 bytes an element forward and 6 backward are 36 and 90 in the stock code. A row is one
tile, read once; arithmetic is in fp32 for every dtype. Per-head norms of queries and keys are rows of the head's width.

Shapes: T rows, W columns (the width), S statistics of a row: 1/rms, or mean and 1/std.
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

__all__ = ["NORMS", "add_norm", "norm", "norm_dtype"]

NORMS = ("rms", "rms_plus_one", "layer")
_TILE = 2048  # elements of one program where rows are narrower
_WIDEST = 8192  # 16,384 columns in fp32 do not fit the registers of one program
_PROGRAMS = 512  # that sum up a weight's gradient, each its share of the rows


@triton.jit
def _tile(rows: tl.tensor, width: tl.tensor, tile: tl.tensor, ROWS: tl.constexpr, BLOCK: tl.constexpr) -> Any:
    """The rows of a tile, its columns, where its elements are, and which of them exist."""
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * width + column[None, :]
    return row, column, at, (row[:, None] < rows) & (column[None, :] < width)


@triton.jit
def _norm_forward_kernel(
    x_ptr: tl.tensor, residual_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, y_ptr: tl.tensor,
    total_ptr: tl.tensor, statistics_ptr: tl.tensor, rows: tl.tensor, width: tl.tensor, eps: tl.tensor,
    KIND: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program normalizes ROWS rows of up to BLOCK columns."""
    row, column, at, inside = _tile(rows, width, tl.program_id(0), ROWS, BLOCK)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if KIND == "layer":
        mean = tl.sum(x, axis=1) / width
        tl.store(statistics_ptr + rows + row, mean, mask=row < rows)
        x = tl.where(inside, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(statistics_ptr + row, scale, mask=row < rows)
    y = x * scale[:, None]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if KIND == "rms":
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
    if KIND == "rms_plus_one":
        weight += 1.0
    y *= weight[None, :]
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _input_gradient(
    dy_ptr: tl.tensor, x_ptr: tl.tensor, dtotal_ptr: tl.tensor, statistics_ptr: tl.tensor, dx_ptr: tl.tensor,
    weight: tl.tensor, rows: tl.tensor, width: tl.tensor, tile: tl.tensor,
    KIND: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Writes dx of one tile; returns dy and the normalized x, fp32, 0 outside the rows."""
    row, _, at, inside = _tile(rows, width, tile, ROWS, BLOCK)
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(statistics_ptr + row, mask=row < rows, other=0.0)
    g = dy * weight[None, :]
    if KIND == "layer":
        mean = tl.load(statistics_ptr + rows + row, mask=row < rows, other=0.0)
        x = tl.where(inside, x - mean[:, None], 0.0)
    normed = x * scale[:, None]
    dx = g - normed * (tl.sum(g * normed, axis=1) / width)[:, None]
    if KIND == "layer":
        dx -= (tl.sum(g, axis=1) / width)[:, None]
    dx *= scale[:, None]
    if RESIDUAL:
        dx += tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    return dy, normed


@triton.jit
def _norm_backward_kernel(
    dy_ptr: tl.tensor, x_ptr: tl.tensor, dtotal_ptr: tl.tensor, weight_ptr: tl.tensor, statistics_ptr: tl.tensor,
    dx_ptr: tl.tensor, dweight_ptr: tl.tensor, rows: tl.tensor, width: tl.tensor,
    KIND: tl.constexpr, RESIDUAL: tl.constexpr, PARAMETERS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program computes dx of ROWS rows; with PARAMETERS of TILES times as many, and their share of dw and db.

    TILES is a constant because Triton's interpreter takes no other bound of a loop under numpy 2.4 and later.
    """
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if KIND == "rms_plus_one":
        weight += 1.0
    program = tl.program_id(0)
    if PARAMETERS:
        dweight = tl.zeros((BLOCK,), tl.float32)
        dbias = tl.zeros((BLOCK,), tl.float32)
        for i in range(TILES):
            dy, normed = _input_gradient(
                dy_ptr, x_ptr, dtotal_ptr, statistics_ptr, dx_ptr, weight, rows, width, program * TILES + i,
                KIND, RESIDUAL, ROWS, BLOCK,
            )  # fmt: skip
            if KIND == "rms":
                normed = normed.to(x_ptr.dtype.element_ty).to(tl.float32)
            dweight += tl.sum(dy * normed, axis=0)
            dbias += tl.sum(dy, axis=0)
        at = program.to(tl.int64) * 2 * width + column
        tl.store(dweight_ptr + at, dweight, mask=column < width)
        tl.store(dweight_ptr + at + width, dbias, mask=column < width)
    else:
        _input_gradient(
            dy_ptr, x_ptr, dtotal_ptr, statistics_ptr, dx_ptr, weight, rows, width, program,
            KIND, RESIDUAL, ROWS, BLOCK,
        )  # fmt: skip


def _tiling(width: int) -> dict[str, int]:
    """A tile holds whole rows: 16 elements a thread, at least two warps, at most 16."""
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    return {"BLOCK": block, "ROWS": rows, "num_warps": min(16, max(2, block * rows // 512))}


def _forward_cuda(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, y: Tensor, total: Tensor | None,
    statistics: Tensor, eps: float, kind: str,
) -> None:  # fmt: skip
    rows, width = x.shape
    tiling = _tiling(width)
    if rows:
        launch(
            _norm_forward_kernel, (triton.cdiv(rows, tiling["ROWS"]),),
            x, residual, weight, bias, y, total, statistics, rows, width, eps,
            KIND=kind, RESIDUAL=residual is not None, BIAS=bias is not None, **tiling,
        )  # fmt: skip


def _backward_cuda(
    dy: Tensor, x: Tensor, dtotal: Tensor | None, weight: Tensor, statistics: Tensor, dx: Tensor,
    dparameters: Tensor | None, kind: str,
) -> None:  # fmt: skip
    rows, width = x.shape
    tiling = _tiling(width)
    tiles, programs = 1, triton.cdiv(rows, tiling["ROWS"])
    if dparameters is not None:
        tiles, programs = triton.cdiv(programs, dparameters.shape[0]), dparameters.shape[0]
    if rows:
        launch(
            _norm_backward_kernel, (programs,), dy, x, dtotal, weight, statistics, dx, dparameters, rows, width,
            KIND=kind, RESIDUAL=dtotal is not None, PARAMETERS=dparameters is not None, TILES=tiles, **tiling,
        )  # fmt: skip
    elif dparameters is not None:
        dparameters.zero_()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _factor(weight: Tensor, kind: str) -> Tensor:
    return 1.0 + _wide(weight) if kind == "rms_plus_one" else _wide(weight)


def _forward_cpu(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, y: Tensor, total: Tensor | None,
    statistics: Tensor, eps: float, kind: str,
) -> None:  # fmt: skip
    if residual is not None:
        assert total is not None
        torch.add(x, residual, out=total)
        x = total
    wide = _wide(x)
    if kind == "layer":
        statistics[1] = wide.mean(1)
        wide = wide - statistics[1, :, None]
    statistics[0] = torch.rsqrt(wide.square().mean(1) + eps)
    normed = wide * statistics[0, :, None]
    result = normed.to(x.dtype) * weight if kind == "rms" else normed * _factor(weight, kind)
    y.copy_(result if bias is None else result + bias)


def _backward_cpu(
    dy: Tensor, x: Tensor, dtotal: Tensor | None, weight: Tensor, statistics: Tensor, dx: Tensor,
    dparameters: Tensor | None, kind: str,
) -> None:  # fmt: skip
    wide_dy, wide_x, scale = _wide(dy), _wide(x), statistics[0, :, None]
    normed = (wide_x - statistics[1, :, None] if kind == "layer" else wide_x) * scale
    g = wide_dy * _factor(weight, kind)
    result = g - normed * (g * normed).mean(1, keepdim=True)
    if kind == "layer":
        result -= g.mean(1, keepdim=True)
    result *= scale
    dx.copy_(result if dtotal is None else result + _wide(dtotal))
    if dparameters is not None:
        dparameters.zero_()
        dparameters[0, 0] = (wide_dy * (normed.to(x.dtype) if kind == "rms" else normed)).sum(0)
        dparameters[0, 1] = wide_dy.sum(0)


def _fake(*arguments: Any) -> None:
    """Both write into their arguments and return nothing."""


_forward_op = define_op(
    "norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, Tensor(a!) y, Tensor(b!)? total, "
    "Tensor(c!) statistics, float eps, str kind) -> ()",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_fake,
)
_backward_op = define_op(
    "norm_backward(Tensor dy, Tensor x, Tensor? dtotal, Tensor weight, Tensor statistics, Tensor(a!) dx, "
    "Tensor(b!)? dparameters, str kind) -> ()",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_fake,
)


def norm_dtype(x: torch.dtype, weight: torch.dtype, kind: str) -> torch.dtype:
    """The dtype of y in the stock code of each kind."""
    return torch.promote_types(x, weight) if kind == "rms" else x


class _Norm(torch.autograd.Function):
    """From x (T, W), the residual or None, weight and bias: s = x + residual (x itself without) if `keep`, and y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str,
        dtype: torch.dtype, keep: bool,
    ) -> Any:  # fmt: skip
        rows, width = x.shape
        y = torch.empty(rows, width, dtype=dtype, device=x.device)
        total = None if residual is None else torch.empty_like(x)
        precision = torch.float64 if x.dtype == torch.float64 else torch.float32
        statistics = torch.empty(2 if kind == "layer" else 1, rows, dtype=precision, device=x.device)
        _forward_op(x, residual, weight, bias, y, total, statistics, eps, kind)
        ctx.save_for_backward(x if total is None else total, weight, statistics)
        ctx.kind, ctx.bias_dtype = kind, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if not keep:
            return y
        return x.detach() if total is None else total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, statistics = ctx.saved_tensors
        dtotal, dy = gradients if len(gradients) == 2 else (None, gradients[0])
        if dy is None:  # the norm's output was not used
            return dtotal, dtotal if ctx.needs_input_grad[1] else None, *[None] * 6
        parameters = None
        if any(ctx.needs_input_grad[2:4]):
            programs = min(_PROGRAMS, max(1, x.shape[0])) if x.is_cuda else 1
            parameters = statistics.new_empty(programs, 2, x.shape[1])
        dx = torch.empty_like(x)
        dtotal = None if dtotal is None else dtotal.contiguous()
        _backward_op(dy.contiguous(), x, dtotal, weight, statistics, dx, parameters, ctx.kind)
        dweight = dbias = None
        if parameters is not None:
            sums = parameters.sum(0)
            dweight = sums[0].to(weight.dtype) if ctx.needs_input_grad[2] else None
            dbias = sums[1].to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, dbias, *[None] * 4


def norm(
    x: Tensor, weight: Tensor, eps: float, *, kind: str = "rms", bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The norm of x (..., W).

    Args:
        weight, bias: (W,), of any floating dtype; a bias for "layer" alone. They get gradients if they require them.
        eps: added to the mean square.
        kind: one of `NORMS`.
        dtype: of the result; by default that of the stock code, see `norm_dtype`.

    Raises:
        ValueError: an unknown kind, or shapes or devices that do not fit together.
    """
    _check(x, None, weight, bias, kind)
    dtype = norm_dtype(x.dtype, weight.dtype, kind) if dtype is None else dtype
    y: Tensor = _Norm.apply(x.reshape(-1, x.shape[-1]).contiguous(), None, weight, bias, eps, kind, dtype, False)
    return y.view(x.shape)


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, kind: str = "rms", bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s = x + residual, rounded to their common dtype, and its norm: (s, y), both (..., W).

    Arguments and errors as for `norm`; `residual` has the shape and dtype of x. Without one s is x, in its memory.
    """
    _check(x, residual, weight, bias, kind)
    dtype = norm_dtype(x.dtype, weight.dtype, kind) if dtype is None else dtype
    flat = [None if each is None else each.reshape(-1, x.shape[-1]).contiguous() for each in (x, residual)]
    total, y = _Norm.apply(*flat, weight, bias, eps, kind, dtype, True)
    return total.view(x.shape), y.view(x.shape)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str) -> None:
    if kind not in NORMS:
        raise ValueError(f"norm {kind!r} is not one of {', '.join(NORMS)}")
    if bias is not None and kind != "layer":
        raise ValueError(f"a norm of kind {kind!r} has no bias, only 'layer' has")
    width = x.shape[-1]
    if not 0 < width <= _WIDEST:
        raise ValueError(f"rows of {width} columns, 1 to {_WIDEST:,} are normalized")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (tuple(parameter.shape) != (width,) or parameter.device != x.device):
            raise ValueError(
                f"{name} is {tuple(parameter.shape)} on {parameter.device}, the rows are {width} wide on {x.device}"
            )
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype} on {residual.device}, "
            f"x is {tuple(x.shape)} {x.dtype} on {x.device}"
        )


def compile_cases() -> list[CompileCase]:
    """Every kind in both directions at the widths of a head and of models: 128-bit accesses, no spills."""
    cases = [_case("bf16", kind, 4096, "backward/parameters") for kind in NORMS]
    for direction in ("forward", "backward"):
        cases += [_case("bf16", kind, width, direction) for kind in NORMS for width in (128, 4096, 8192)]
        cases += [_case(dtype, "rms", 4096, direction) for dtype in ("fp16", "fp32")]
    return cases


def _case(dtype: str, kind: str, width: int, direction: str) -> CompileCase:
    tiling = _tiling(width)
    warps = tiling.pop("num_warps")
    forward, parameters = direction == "forward", direction.endswith("parameters")
    residual = width != 128
    values = ["x", "residual", "y", "total"] if forward else ["dy", "x", "dtotal", "dx"]
    signature = {f"{name}_ptr": f"*{dtype}" for name in (*values, "weight")} | {"statistics_ptr": "*fp32"}
    constexprs: dict[str, Any] = {"KIND": kind, "RESIDUAL": residual, **tiling}
    absent = [] if residual else (["residual_ptr", "total_ptr"] if forward else ["dtotal_ptr"])
    if forward:
        constexprs |= {"BIAS": False}
        signature |= {"rows": "i32", "width": "i32", "eps": "fp32"}
        absent.append("bias_ptr")
    else:
        constexprs |= {"PARAMETERS": parameters, "TILES": 8 if parameters else 1}
        signature |= {"rows": "i32", "width": "i32", "dweight_ptr": "*fp32"}
        absent += [] if parameters else ["dweight_ptr"]
    for name in absent:
        signature.pop(name, None)
        constexprs[name] = None
    return CompileCase(
        name=f"norm_{direction}/{kind}/{width}/{dtype}",
        fn=_norm_forward_kernel if forward else _norm_backward_kernel,
        signature=signature,
        constexprs=constexprs,
        aligned=tuple(name for name in signature if name.endswith("_ptr") or name == "width"),
        num_warps=warps,
        elements=None if parameters else tiling["ROWS"] * tiling["BLOCK"],
        requirements=Requirements(
            store_bits=128,
            narrow_stores=(2 if kind == "layer" else 1) if forward else 0,
        ),
    )
