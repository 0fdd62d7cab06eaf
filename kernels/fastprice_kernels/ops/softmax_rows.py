"""The softmax of rows of logits, each with a label: loss, correctness and entropy, and the gradient over the logits.

With z = softcap * tanh(scale * x / softcap), or scale * x without a cap, for a row x and its label:

    loss = logsumexp(z) - z[label]    entropy = logsumexp(z) - sum softmax(z) z
    dx   = (softmax(z) - onehot(label)) * dz/dx

Values to move: the kernel reads a row once for the maximum and the sums, and where the gradient is wanted once more to
write it over the row: 3 C V, or C V without gradient.

Shapes: C rows, V columns (the vocabulary).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprice_kernels.codegen.machine_code import CompileCase
from fastprice_kernels.ops._launching import launch
from fastprice_kernels.ops._library import on_own_device

__all__ = ["SoftmaxOptions", "compile_cases", "softmax_rows"]

_BLOCK = 4096
_WARPS = 8


class SoftmaxOptions(NamedTuple):
    """A row with the label `ignore_index` counts for nothing; `gradient`: whether it is wanted."""

    ignore_index: int = -100
    softcap: float | None = None
    scale: float = 1.0
    gradient: bool = True


@triton.jit
def _softmax_rows_kernel(
    logits_ptr: tl.tensor, labels_ptr: tl.tensor, statistics_ptr: tl.tensor, vocabulary: tl.tensor,
    row_stride: tl.tensor, ignore_index: tl.tensor, scale: tl.tensor, softcap: tl.tensor,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
) -> None:  # fmt: skip
    """One program computes one row: statistics (loss, correct, entropy), and the gradient over the logits if GRADIENT.

    BLOCKS, of BLOCK columns, is a constant because Triton's interpreter takes no other bound of a loop under numpy 2.4
    and later; a model has one vocabulary.
    """
    row = tl.program_id(0).to(tl.int64)
    at_row = logits_ptr + row * row_stride
    label = tl.load(labels_ptr + row)
    valid = label != ignore_index
    lanes = tl.arange(0, BLOCK)

    top = tl.full((), float("-inf"), tl.float32)
    best = tl.full((), 0, tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        start = block * BLOCK
        columns = start + lanes
        inside = columns < vocabulary
        z = tl.load(at_row + columns, mask=inside, other=0.0).to(tl.float32) * scale
        if CAPPED:
            z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
        value = z
        z = tl.where(inside, z, float("-inf"))
        block_top, block_best = tl.max(z, axis=0, return_indices=True, return_indices_tie_break_left=True)
        best = tl.where(block_top > top, start + block_best, best)
        above = tl.maximum(top, block_top)
        shrink = tl.exp(top - above)
        e = tl.exp(z - above)
        total = total * shrink + e
        weighted = weighted * shrink + e * value
        top = above
    denominator = tl.sum(total, axis=0)
    lse = top + tl.log(denominator)

    # A label outside the vocabulary would read from another row: its loss is NaN instead.
    known = valid & (label >= 0) & (label < vocabulary)
    z_label = tl.load(at_row + label, mask=known, other=float("nan")).to(tl.float32) * scale
    if CAPPED:
        z_label = softcap * (2.0 * tl.sigmoid(2.0 * z_label / softcap) - 1.0)
    loss = tl.where(valid, lse - z_label, 0.0)
    entropy = tl.where(valid, lse - tl.sum(weighted, axis=0) / denominator, 0.0)
    tl.store(statistics_ptr + row * 3, loss)
    tl.store(statistics_ptr + row * 3 + 1, tl.where(valid & (best == label), 1.0, 0.0))
    tl.store(statistics_ptr + row * 3 + 2, entropy)

    if GRADIENT:
        for block in range(BLOCKS):
            columns = block * BLOCK + lanes
            z = tl.load(at_row + columns, mask=columns < vocabulary, other=0.0).to(tl.float32) * scale
            slope = scale
            if CAPPED:
                capped = 2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0
                slope = scale * (1.0 - capped * capped)
                z = softcap * capped
            g = (tl.exp(z - lse) - tl.where(columns == label, 1.0, 0.0)) * slope
            g = tl.where(valid, g, 0.0)
            tl.store(at_row + columns, g.to(logits_ptr.dtype.element_ty), mask=columns < vocabulary)


def _launch(logits_CV: Tensor, labels_C: Tensor, statistics: Tensor, options: SoftmaxOptions) -> None:
    if not logits_CV.shape[0]:
        return
    launch(
        _softmax_rows_kernel,
        (logits_CV.shape[0],),
        logits_CV,
        labels_C,
        statistics,
        logits_CV.shape[1],
        logits_CV.stride(0),
        options.ignore_index,
        float(options.scale),
        1.0 if options.softcap is None else float(options.softcap),
        CAPPED=options.softcap is not None,
        GRADIENT=options.gradient,
        BLOCK=_BLOCK,
        BLOCKS=triton.cdiv(logits_CV.shape[1], _BLOCK),
        num_warps=_WARPS,
    )


_on_cuda = on_own_device(_launch)


def _on_cpu(logits_CV: Tensor, labels_C: Tensor, statistics: Tensor, options: SoftmaxOptions) -> None:
    """The same by PyTorch. It allocates, for each logit, 4 bytes where they are of 16 bits, and 4 with a cap."""
    z = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
    z.mul_(options.scale)
    slope = None
    if options.softcap is not None:
        z.div_(options.softcap).tanh_()
        slope = z.square().neg_().add_(1) if options.gradient else None
        z.mul_(options.softcap)
    valid = labels_C != options.ignore_index
    column = labels_C.where(valid, 0)[:, None]
    top, best = z.max(1)
    z.sub_(top[:, None])
    at_label = z.gather(1, column)[:, 0]
    total = z.exp_().sum(1)
    z.div_(total[:, None])
    statistics[:, 0] = total.log() - at_label
    statistics[:, 1] = best == labels_C
    statistics[:, 2] = 0
    for block in z.split(-(-z.shape[1] // 16), 1):  # entr allocates a tensor of its input's size
        statistics[:, 2] += torch.special.entr(block).sum(1)
    statistics.masked_fill_(~valid[:, None], 0)
    if options.gradient:
        z.scatter_add_(1, column, z.new_full((), -1.0).expand_as(column))
        if slope is not None:
            z.mul_(slope)
        z.mul_(options.scale).masked_fill_(~valid[:, None], 0)
        if z is not logits_CV:
            logits_CV.copy_(z)


def softmax_rows(logits_CV: Tensor, labels_C: Tensor, statistics: Tensor, options: SoftmaxOptions) -> None:
    """Fills `statistics` (C, 3: loss in nats, 1.0 where correct, entropy in nats), and the logits with their gradient.

    Args:
        logits_CV: floating, rows of stride 1. With `options.gradient` they hold d loss / d logits of each row
            afterwards; without it their contents are lost on a CPU.
        labels_C: int64. A label outside the vocabulary makes its row's loss NaN on CUDA.
        statistics: fp32, or fp64 for fp64 logits.
    """
    run = _on_cuda if logits_CV.is_cuda else _on_cpu
    run(logits_CV, labels_C, statistics, options)


def compile_cases() -> list[CompileCase]:
    """The kernel with and without gradient and cap."""
    return [
        CompileCase(
            name=f"completion_cross_entropy/{dtype}{'/capped' if capped else ''}{'' if gradient else '/loss only'}",
            fn=_softmax_rows_kernel,
            signature={
                "logits_ptr": f"*{dtype}",
                "labels_ptr": "*i64",
                "statistics_ptr": "*fp32",
                "vocabulary": "i32",
                "row_stride": "i32",
                "ignore_index": "i32",
                "scale": "fp32",
                "softcap": "fp32",
            },
            constexprs={"CAPPED": capped, "GRADIENT": gradient, "BLOCK": _BLOCK, "BLOCKS": 32},
            aligned=("logits_ptr", "labels_ptr", "statistics_ptr", "vocabulary", "row_stride"),
            num_warps=_WARPS,
        )
        for dtype in ("bf16", "fp16", "fp32")
        for capped in (False, True)
        for gradient in (True, False)
    ]
