"""The softmax of rows of logits at a label each: loss, correctness and entropy, with the gradient over the logits.

C rows, V columns. With z = softcap * tanh(scale * x / softcap), or scale * x without a cap, for a row x and its label:

    loss = logsumexp(z) - z[label]    entropy = logsumexp(z) - sum softmax(z) z
    dx   = (softmax(z) - onehot(label)) * dz/dx

A row whose label is `ignore_index` gives zeros. The kernel reads a row twice (once for the maximum and the sums, once
for the gradient, where it is wanted) and writes the gradient over it: with gradients 3 C V values move, else C V.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprice_kernels.codegen.machine_code import CompileCase

__all__ = ["compile_cases", "softmax_rows", "softmax_rows_cpu"]

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _softmax_rows_kernel(
    logits_ptr: tl.tensor,
    labels_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    vocabulary: tl.tensor,
    row_stride: tl.tensor,
    ignore_index: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """One program takes one row: statistics (loss, correct, entropy), and the gradient over the logits if GRADIENT.

    BLOCKS, of BLOCK columns, is a constant because the interpreter takes no other bound of a loop under numpy 2.4 and
    later; a model has one vocabulary.
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

    # A label outside the vocabulary would read another row: its loss is NaN instead.
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
                bent = 2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0
                slope = scale * (1.0 - bent * bent)
                z = softcap * bent
            g = (tl.exp(z - lse) - tl.where(columns == label, 1.0, 0.0)) * slope
            g = tl.where(valid, g, 0.0)
            tl.store(at_row + columns, g.to(logits_ptr.dtype.element_ty), mask=columns < vocabulary)


def softmax_rows(
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    gradient: bool,
) -> None:
    """Fills `statistics` (C, 3: loss, correct, entropy) for the rows of `logits` (C, V), on CUDA or in the interpreter.

    With `gradient` the logits hold afterwards d loss / d logits of each row; labels are int64 (C,). A label outside the
    vocabulary makes its row's loss NaN.
    """
    if logits.shape[0]:
        _softmax_rows_kernel[(logits.shape[0],)](
            logits,
            labels,
            statistics,
            logits.shape[1],
            logits.stride(0),
            ignore_index,
            float(scale),
            1.0 if softcap is None else float(softcap),
            CAPPED=softcap is not None,
            GRADIENT=gradient,
            BLOCK=_BLOCK,
            BLOCKS=triton.cdiv(logits.shape[1], _BLOCK),
            num_warps=_WARPS,
        )


def softmax_rows_cpu(
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    gradient: bool,
) -> None:
    """What `softmax_rows` does, by PyTorch. Beside the logits: 4 bytes each for 16-bit ones, and 4 with a cap."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    z.mul_(scale)
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = z.square().neg_().add_(1) if gradient else None
        z.mul_(softcap)
    valid = labels != ignore_index
    column = labels.where(valid, 0)[:, None]
    top, best = z.max(1)
    z.sub_(top[:, None])
    at_label = z.gather(1, column)[:, 0]
    total = z.exp_().sum(1)
    z.div_(total[:, None])
    statistics[:, 0] = total.log() - at_label
    statistics[:, 1] = best == labels
    statistics[:, 2] = 0
    for block in z.split(-(-z.shape[1] // 16), 1):  # entr makes a tensor of its input's size
        statistics[:, 2] += torch.special.entr(block).sum(1)
    statistics.masked_fill_(~valid[:, None], 0)
    if gradient:
        z.scatter_add_(1, column, z.new_full((), -1.0).expand_as(column))
        if slope is not None:
            z.mul_(slope)
        z.mul_(scale).masked_fill_(~valid[:, None], 0)
        if z is not logits:
            logits.copy_(z)


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
