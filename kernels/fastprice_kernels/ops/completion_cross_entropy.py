"""Cross-entropy of a language model's head at labelled positions alone, storing neither logits nor a copy of the head.

T positions, M of them labelled, D hidden width, V vocabulary, C positions a chunk. Labels say -100 where there is
nothing to learn (in price data: 176 of 180 tokens), so the labelled rows H of the hidden states are gathered first, and
then, C at a time,

    z = softcap(scale * (H W^T + bias))    loss = sum logsumexp(z) - z[label]    G = d loss / d (H W^T)
    dH = G W                               dW += G^T H                           dbias += sum G

with G written over the logits by one kernel (softmax_rows.py). Gradients are made in the forward, when the chunk's
logits are there; the backward only multiplies them by what arrives, in place. They stay those of the *sum* until then,
so that fp16 does not lose them to a division by the number of tokens. Gradients of gradients are not supported, and a
second backward through one graph raises.

Sources: Liger Kernel's fused linear cross-entropy (Hsu et al. 2024: chunks, gradients in the forward), Cut
Cross-Entropy (Wijmans et al. 2024: no logits in memory; its filtering of small gradients is not used here).

Chunks. All logits are T V values; a chunk holds C V of them, and the result dH is T D in any method. Left to itself the
chunk is as large as a budget of 4.5 % of T V values allows with dH inside it, or of 1 % without dH where at most a
twentieth is labelled. For 4,096 x 128,256 in bf16 with D = 4,096 that is 48 rows of everything (46.7 MB; all logits
are 1,051 MB), or 32 rows where 82 are labelled. A trainable head adds up dW over chunks in the head's dtype; its chunks
have at least D / 8 rows (an eighth of dW's bytes), so that bf16 sums stay short.

Floor: 4 M D V operations (6 with dW) and one read of W for each product of each chunk. On an H200 a chunk is bound by
reading W (2 x 1.05 GB = 0.49 ms for the 8B head) until it has some 180 rows; so where every token carries a label and
memory is no concern, a larger `chunk` is faster: by that arithmetic 4,096 rows cost 42 ms in chunks of 48 and 11 ms in
chunks of 512. At 2 % labelled it is 1.5 ms, against 11 ms and 1 GB for all logits.

Finding the labelled rows asks the device how many there are, which waits for it once. `positions`, made where the
batch is collated, avoids that wait, and with one static length (padded with any unlabelled position) the whole call can
be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprice_kernels.ops.softmax_rows import softmax_rows, softmax_rows_cpu

__all__ = [
    "LossStatistics",
    "chunk_rows",
    "completion_cross_entropy",
    "completion_cross_entropy_with_statistics",
    "labelled_positions",
    "shifted_labels",
]

_SHARE, _SPARSE_SHARE, _SPARSE = 0.045, 0.01, 0.05
_FEWEST_ROWS = 8


class LossStatistics(NamedTuple):
    """Over all labelled positions, 0-dim tensors without gradient: how many they are; how many have the label as the
    first of the largest logits; the sum of the predicted distributions' Shannon entropies in nats."""

    labelled: Tensor
    correct: Tensor
    entropy: Tensor


def _chunk_rows(
    positions: int, labelled: int, vocabulary: int, width: int, itemsize: int, spare: int, grad_weight: bool
) -> int:
    """Rows of a chunk by the budget in the module's docstring; `spare`: bytes a logit needs beside its own."""
    logits = positions * vocabulary * itemsize
    if labelled <= _SPARSE * positions:
        budget = _SPARSE_SHARE * logits
    else:
        budget = _SHARE * logits - positions * width * itemsize
    rows = int(budget / (vocabulary * (itemsize + spare) + 2 * width * itemsize)) // 8 * 8
    return min(max(labelled, 1), max(rows, _FEWEST_ROWS, width // 8 if grad_weight else 0))


def chunk_rows(hidden: Tensor, weight: Tensor, positions: int, labelled: int, *, capped: bool, trains: bool) -> int:
    """Rows of a chunk for `labelled` of `positions`, whose hidden states are like `hidden` (..., D), by the budget in
    the module's docstring; `capped`: with a softcap; `trains`: with a gradient for `weight` (V, D)."""
    on_cpu = not hidden.is_cuda
    spare = 4 * (hidden.itemsize < 4) + 4 * capped if on_cpu else 0
    return _chunk_rows(positions, labelled, weight.shape[0], weight.shape[1], hidden.itemsize, spare, trains)


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    positions: Tensor,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    chunk: int,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums over rows `positions` of `hidden` (T, D), and their gradients; see `completion_ce` for both sides."""
    wants_hidden, wants_weight, wants_bias = wants
    vocabulary = weight.shape[0]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    dh = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wants_hidden else hidden.new_empty(0)
    dw = torch.zeros_like(weight) if wants_weight else weight.new_empty(0)
    db = torch.zeros(vocabulary if wants_bias else 0, dtype=wide, device=hidden.device)
    count, on_cpu = positions.shape[0], not hidden.is_cuda
    if not chunk:
        chunk = chunk_rows(hidden, weight, hidden.shape[0], count, capped=softcap is not None, trains=wants_weight)
    labels = labels[positions]
    room = hidden.new_empty(min(chunk, count), vocabulary)
    statistics = torch.empty(count, 3, dtype=wide, device=hidden.device)
    run = softmax_rows_cpu if on_cpu else softmax_rows
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        h = hidden[positions[part]]
        logits = torch.mm(h, weight.T, out=room[: h.shape[0]])
        if bias is not None:
            logits += bias
        run(logits, labels[part], statistics[part], ignore_index, softcap, scale, any(wants))
        if wants_hidden:
            dh.index_copy_(0, positions[part], logits @ weight)
        if wants_weight:
            dw.addmm_(logits.T, h)
        if wants_bias:
            db += logits.sum(0, dtype=wide)
    loss, correct, entropy = statistics.sum(0).unbind()
    labelled = (labels != ignore_index).sum().to(wide)
    return torch.stack([loss, labelled, correct, entropy]), dh, dw, db


def _completion_ce(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    positions: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    chunk: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outside = ((labels < 0) | (labels >= weight.shape[0])) & (labels != ignore_index)
    if not hidden.is_cuda:
        if outside.any():
            wrong = labels[outside][0].item()
            raise ValueError(f"label {wrong} is neither {ignore_index} nor inside the head's {weight.shape[0]} tokens")
    else:
        torch._assert_async(~outside.any(), "completion_cross_entropy: a label outside the head's tokens")
    if positions is None:
        positions = (labels != ignore_index).nonzero().squeeze(1)
    return _in_chunks(
        hidden,
        weight,
        bias,
        labels,
        positions,
        ignore_index,
        softcap,
        scale,
        chunk,
        (wants_hidden, wants_weight, wants_bias),
    )


# hidden (T, D), weight (V, D), bias (V,), labels (T,), positions (M,) -> the sums of loss, labels, correct and entropy
# (4,), and the gradients of the loss's sum: dh (T, D), dw (V, D), db (V,), each empty where it is not wanted.
_LIBRARY = torch.library.Library("fastprice", "FRAGMENT")
_LIBRARY.define(
    "completion_ce(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? positions, int ignore_index, "
    "float? softcap, float scale, int chunk, bool wants_hidden, bool wants_weight, bool wants_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("completion_ce", _completion_ce, "CPU")
_LIBRARY.impl("completion_ce", _completion_ce, "CUDA")


@torch.library.register_fake("fastprice::completion_ce", lib=_LIBRARY)
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    positions: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    chunk: int,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(4, dtype=wide),
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
        hidden.new_empty(weight.shape[0] if wants_bias else 0, dtype=wide),
    )


class _SumOverLabels(torch.autograd.Function):
    """The loss summed, and (labelled, correct, entropy), of (T, D) hidden states."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        positions: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            totals, dh, dw, db = torch.ops.fastprice.completion_ce(
                hidden, weight, bias, labels, positions, *options, *ctx.needs_input_grad[:3]
            )
        ctx.save_for_backward(dh, dw, db)
        ctx.bias_dtype = None if bias is None else bias.dtype
        statistics = totals[1:].clone()
        ctx.mark_non_differentiable(statistics)
        return totals[0].clone(), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Any, ...]:
        dh, dw, db = ctx.saved_tensors
        # In place: a second backward through this graph then raises, and the largest tensors exist once.
        grads = [
            part.mul_(d_loss) if wanted else None
            for part, wanted in zip((dh, dw, db), ctx.needs_input_grad[:3], strict=True)
        ]
        if grads[2] is not None:
            grads[2] = grads[2].to(ctx.bias_dtype)
        return *grads, None, None, None, None, None, None


def labelled_positions(labels: Tensor, *, ignore_index: int = -100, shift: bool = True) -> Tensor:
    """The positions of (..., S) labels, flattened, whose prediction is scored: int64 (M,). Waits for the device.

    With `shift` that is the position before each label, as `completion_cross_entropy` counts them.
    """
    return (shifted_labels(labels, ignore_index, shift) != ignore_index).nonzero().squeeze(1)


def shifted_labels(labels: Tensor, ignore_index: int, shift: bool) -> Tensor:
    """The label that each of the (..., S) positions predicts, flattened."""
    if not shift:
        return labels.reshape(-1)
    shifted = torch.full_like(labels, ignore_index)
    shifted[..., :-1] = labels[..., 1:]
    return shifted.reshape(-1)


def completion_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool = True,
    positions: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The cross-entropy of `softcap(logit_scale * (hidden W^T + bias))` at labelled positions: a 0-dim fp32 tensor.

    Args:
        hidden: (..., S, D), floating.
        head_weight: (V, D) in the dtype of `hidden`; under autocast both are cast, as `torch.nn.Linear` does. It gets a
            gradient if it wants one.
        labels: (..., S), integer; `ignore_index` where there is nothing to learn.
        bias: (V,) or None.
        reduction: "mean" over labelled positions, or "sum".
        num_items: divide the sum by this in place of the above: the number of labels in a whole accumulated batch.
        softcap: z becomes `softcap * tanh(z / softcap)` (Gemma).
        logit_scale: multiplies the logits before the cap (Cohere; Granite's divisor inverted).
        shift: position t is scored against the label at t + 1, as transformers does; False where that has been done.
        positions: int64 (M,), what `labelled_positions` gives: every labelled position once, and any unlabelled ones.
        chunk: rows at a time; by default what fits the budget in the module's docstring.

    Without any label the loss is 0 and so are all gradients. The loss is fp64 for fp64 inputs.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown reduction; on a CPU also a label that
            is not in the vocabulary. On CUDA such a label makes the loss NaN and fails a device-side assertion.
    """
    loss, _ = completion_cross_entropy_with_statistics(
        hidden,
        head_weight,
        labels,
        bias=bias,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
        softcap=softcap,
        logit_scale=logit_scale,
        shift=shift,
        positions=positions,
        chunk=chunk,
    )
    return loss


def completion_cross_entropy_with_statistics(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool = True,
    positions: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, LossStatistics]:
    """`completion_cross_entropy`, and what the same pass over the logits tells besides, at no cost."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
    _check(hidden, head_weight, labels, bias, reduction, softcap, chunk)
    width = hidden.shape[-1]
    flat_labels = shifted_labels(labels.long(), ignore_index, shift)
    total, statistics = _SumOverLabels.apply(
        hidden.reshape(-1, width),
        head_weight,
        bias,
        flat_labels,
        positions,
        ignore_index,
        softcap,
        float(logit_scale),
        chunk or 0,
    )
    labelled, correct, entropy = statistics.unbind()
    if num_items is not None:
        # No label in the whole batch: 0, not 0 / 0.
        if isinstance(num_items, Tensor):
            items = num_items.to(total.device, total.dtype)
            total = total / items.where(items != 0, 1)
        else:
            total = total / (num_items or 1)
    elif reduction == "mean":
        total = total / labelled.clamp(min=1)
    return total, LossStatistics(labelled, correct, entropy)


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    reduction: str,
    softcap: float | None,
    chunk: int | None,
) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is neither 'mean' nor 'sum'")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} has other positions than labels {tuple(labels.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"hidden is {hidden.shape[-1]} wide, the head's weight is {tuple(weight.shape)}")
    if not hidden.is_floating_point() or weight.dtype != hidden.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, the head's weight {weight.dtype}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}, integers are needed")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit a head of {weight.shape[0]} tokens")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap {softcap} is not positive")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk {chunk} is not positive")
    for name, part in (("the head's weight", weight), ("labels", labels), ("bias", bias)):
        if part is not None and part.device != hidden.device:
            raise ValueError(f"{name}: on {part.device}, hidden is on {hidden.device}")
