"""Completion-only cross-entropy of a language model: at labeled positions alone, without storing all logits.

Labels are -100 at positions without a loss (in price data 176 of 180 tokens), so the labeled rows H of the hidden
states are gathered first, and then, C rows at a time, with the weight W and bias of the output layer (lm_head):

    z = softcap(scale * (H W^T + bias))    loss = sum logsumexp(z) - z[label]    G = d loss / d (H W^T)
    dH = G W                               dW += G^T H                           dbias += sum G

with G written over the logits by one kernel (softmax_rows.py). Gradients are computed in the forward, while the chunk's
logits exist; the backward multiplies them in place by the incoming gradient, so a second backward through one graph
raises. Until then they are those of the *sum*: divided by the number of tokens they would vanish in fp16.

Work: 4 M D V operations (6 with dW), and W is read once for each product of each chunk. The chunk follows a budget of
memory, see `chunk_rows` and docs/explanation/kernels.md. Sources: Liger Kernel's fused linear cross-entropy (Hsu et al.
2024: chunks, gradients in the forward), Cut Cross-Entropy (Wijmans et al. 2024: no logits in memory; its filter of
small gradients is not used).

Shapes: T positions, M of them labeled, D hidden width, V vocabulary, C positions in a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprice_kernels.ops._library import define_op
from fastprice_kernels.ops.softmax_rows import SoftmaxOptions, softmax_rows

__all__ = [
    "LossSums",
    "chunk_rows",
    "completion_cross_entropy",
    "cross_entropy_sums",
    "labeled_positions",
    "mean_loss",
    "shift_labels",
]

# Shares of the bytes of all logits that may be allocated, and the share of labels below which the smaller one holds.
_BUDGET, _SPARSE_BUDGET, _SPARSE = 0.045, 0.01, 0.05
_FEWEST_ROWS = 8


class LossSums(NamedTuple):
    """Sums over all labeled positions, 0-dim tensors; only `loss` has a gradient.

    Attributes:
        loss: of the cross-entropies, in nats.
        labeled: how many positions there are.
        correct: at how many the label is the first of the largest logits.
        entropy: of the Shannon entropies of the predicted distributions, in nats.
    """

    loss: Tensor
    labeled: Tensor
    correct: Tensor
    entropy: Tensor


def _chunk_rows(
    positions: int, labeled: int, vocabulary: int, width: int, itemsize: int, spare: int, grad_weight: bool, free: int
) -> int:
    """`chunk_rows` from sizes; `spare`: bytes that each logit needs beside its own."""
    logits = positions * vocabulary * itemsize
    if labeled <= _SPARSE * positions:
        budget = _SPARSE_BUDGET * logits
    else:
        budget = _BUDGET * logits - positions * width * itemsize
    row = vocabulary * (itemsize + spare) + 2 * width * itemsize
    rows = max(int(budget / row) // 8 * 8, _FEWEST_ROWS, width // 8 if grad_weight else 0)
    if free // row > rows:
        chunks = -(-labeled // (free // row)) or 1
        rows = max(rows, -(-labeled // chunks))  # no chunk of a few rows at the end, which reads W as a whole one does
    return min(max(labeled, 1), rows)


def chunk_rows(
    hidden: Tensor, weight: Tensor, positions: int, labeled: int, *, capped: bool, trains: bool, free: int = 0
) -> int:
    """The rows C of a chunk, for `labeled` of `positions` with hidden states like `hidden` (..., D).

    As many as fit 4.5 % of the bytes of all logits with dH inside it, or 1 % without dH where at most a twentieth is
    labeled. For 4,096 x 128,256 in bf16 with D = 4,096 that is 48 rows, or 32 where 82 positions are labeled. With
    `free` bytes of memory, which nothing else needs, as many as fit those, if more, in chunks of equal size: each chunk
    reads W twice, so 180 labeled rows at 32 a chunk read it twelve times and in one chunk (49 MB) twice: 2.9 and
    0.49 ms for that W on an H200 (4.3 TB/s), predicted from the bytes.

    Args:
        weight: (V, D).
        capped: whether the logits have a softcap.
        trains: whether `weight` gets a gradient. It adds up over chunks in the dtype of the weight, so a chunk then has
            at least D / 8 rows: few additions in bf16.
        free: bytes that a chunk may take at any rate.
    """
    on_cpu = not hidden.is_cuda
    spare = 4 * (hidden.itemsize < 4) + 4 * capped if on_cpu else 0
    return _chunk_rows(positions, labeled, weight.shape[0], weight.shape[1], hidden.itemsize, spare, trains, free)


def _sums_in_chunks(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
    positions_M: Tensor,
    options: SoftmaxOptions,
    chunk: int,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums over the rows `positions_M` and their gradients, as the operator below returns them."""
    wants_hidden, wants_weight, wants_bias = wants
    vocabulary = weight_VD.shape[0]
    wide = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
    dh = torch.zeros_like(hidden_TD, memory_format=torch.contiguous_format) if wants_hidden else hidden_TD.new_empty(0)
    dw = torch.zeros_like(weight_VD) if wants_weight else weight_VD.new_empty(0)
    db = torch.zeros(vocabulary if wants_bias else 0, dtype=wide, device=hidden_TD.device)
    count, capped = positions_M.shape[0], options.softcap is not None
    if not chunk:
        chunk = chunk_rows(hidden_TD, weight_VD, hidden_TD.shape[0], count, capped=capped, trains=wants_weight)
    labels_M = labels_T[positions_M]
    buffer = hidden_TD.new_empty(min(chunk, count), vocabulary)
    statistics = torch.empty(count, 3, dtype=wide, device=hidden_TD.device)
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        h = hidden_TD[positions_M[part]]
        logits = torch.mm(h, weight_VD.T, out=buffer[: h.shape[0]])
        if bias_V is not None:
            logits += bias_V
        softmax_rows(logits, labels_M[part], statistics[part], options)
        if wants_hidden:
            dh.index_copy_(0, positions_M[part], logits @ weight_VD)
        if wants_weight:
            dw.addmm_(logits.T, h)
        if wants_bias:
            db += logits.sum(0, dtype=wide)
    loss, correct, entropy = statistics.sum(0).unbind()
    labeled = (labels_M != options.ignore_index).sum().to(wide)
    return torch.stack([loss, labeled, correct, entropy]), dh, dw, db


def _compute(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, positions: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ignore_index, softcap, scale, chunk, *wants = options
    outside = ((labels < 0) | (labels >= weight.shape[0])) & (labels != ignore_index)
    if hidden.is_cuda:
        torch._assert_async(~outside.any(), "completion_cross_entropy: a label outside the vocabulary")
    elif outside.any():
        wrong = labels[outside][0].item()
        raise ValueError(f"label {wrong} is neither {ignore_index} nor one of the {weight.shape[0]} tokens")
    if positions is None:
        positions = (labels != ignore_index).nonzero().squeeze(1)
    softmax = SoftmaxOptions(ignore_index, softcap, scale, any(wants))
    return _sums_in_chunks(hidden, weight, bias, labels, positions, softmax, chunk, (wants[0], wants[1], wants[2]))


def _fake(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wants_hidden, wants_weight, wants_bias = others[-3:]
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(4, dtype=wide),
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
        hidden.new_empty(weight.shape[0] if wants_bias else 0, dtype=wide),
    )


# hidden (T, D), weight (V, D), bias (V,), labels (T,), positions (M,) -> `LossSums` as one tensor (4,), and the
# gradients of the loss: dh (T, D), dw (V, D), db (V,), each empty where it is not wanted. chunk 0: `chunk_rows`.
_sums_op = define_op(
    "completion_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? positions, "
    "int ignore_index, float? softcap, float scale, int chunk, bool wants_hidden, bool wants_weight, bool wants_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_compute,
    cuda=_compute,
    fake=_fake,
)


class _SumOverLabels(torch.autograd.Function):
    """The sum of the losses, and (labeled, correct, entropy), of (T, D) hidden states."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *others: Any
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            sums, dh, dw, db = _sums_op(hidden, weight, bias, labels, *others, *ctx.needs_input_grad[:3])
        ctx.save_for_backward(dh, dw, db)
        ctx.bias_dtype = None if bias is None else bias.dtype
        statistics = sums[1:].clone()
        ctx.mark_non_differentiable(statistics)
        return sums[0].clone(), statistics

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


def labeled_positions(labels: Tensor, *, ignore_index: int = -100, shift: bool = True) -> Tensor:
    """The positions of (..., S) labels, flattened, whose prediction has a loss: int64 (M,). Waits for the device.

    With `shift` that is the position before each label, as `completion_cross_entropy` counts them.
    """
    labels = shift_labels(labels, ignore_index) if shift else labels
    return (labels.reshape(-1) != ignore_index).nonzero().squeeze(1)


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The label that each of the (..., S) positions predicts, that of the next one: (..., S)."""
    shifted = torch.full_like(labels, ignore_index)
    shifted[..., :-1] = labels[..., 1:]
    return shifted


def completion_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
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
    """The cross-entropy of `softcap(logit_scale * (hidden W^T + bias))` at labeled positions: a 0-dim fp32 tensor.

    Args:
        hidden: (..., S, D), floating.
        lm_head_weight: W (V, D) in the dtype of `hidden`; under autocast both are cast, as `torch.nn.Linear` does. It
            gets a gradient if it requires one.
        labels: (..., S), integer; `ignore_index` at positions without a loss.
        bias: (V,) or None.
        reduction: "mean" over labeled positions, or "sum".
        num_items: divide the sum by this instead: the number of labels over all micro-batches of an optimizer step.
        softcap: z becomes `softcap * tanh(z / softcap)` (Gemma).
        logit_scale: multiplies the logits before the cap (Cohere; the inverse of Granite's divisor).
        shift: position t predicts the label at t + 1, as in transformers; False where labels are shifted already.
        positions: int64 (M,), the result of `labeled_positions`: every labeled position once, and any unlabeled ones.
            Without it the host waits for the device to count them; with it, at one static length, the call can be
            captured in a CUDA graph.
        chunk: rows at a time; by default `chunk_rows`.

    Without any label the loss is 0 and so are all gradients. The loss is fp64 for fp64 inputs. Gradients of gradients
    are not supported.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, an unknown reduction; on a CPU also a label that
            is not in the vocabulary. On CUDA such a label makes the loss NaN and fails a device-side assertion.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is neither 'mean' nor 'sum'")
    labels = _as_indices(labels)
    sums = cross_entropy_sums(
        hidden,
        lm_head_weight,
        shift_labels(labels, ignore_index) if shift else labels,
        bias=bias,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        positions=positions,
        chunk=chunk,
    )
    return sums.loss if reduction == "sum" and num_items is None else mean_loss(sums, num_items)


def cross_entropy_sums(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    positions: Tensor | None,
    chunk: int | None,
) -> LossSums:
    """The sums behind `completion_cross_entropy`, with its arguments; each position has the label that it predicts."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, lm_head_weight = hidden.to(dtype), lm_head_weight.to(dtype)
    _check(hidden, lm_head_weight, labels, bias, softcap, chunk)
    loss, statistics = _SumOverLabels.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        lm_head_weight,
        bias,
        _as_indices(labels).reshape(-1),
        positions,
        ignore_index,
        softcap,
        float(logit_scale),
        chunk or 0,
    )
    return LossSums(loss, *statistics.unbind())


def mean_loss(sums: LossSums, num_items: Tensor | float | None = None) -> Tensor:
    """The loss divided by `num_items`, or by the number of labeled positions; 0 where that is 0."""
    loss = sums.loss
    if num_items is None:
        return loss / sums.labeled.clamp(min=1)
    if isinstance(num_items, Tensor):
        items = num_items.to(loss.device, loss.dtype)
        return loss / items.where(items != 0, 1)
    return loss / (num_items or 1)


def _as_indices(labels: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}, integers are needed")
    return labels.long()


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, chunk: int | None
) -> None:
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} has other positions than labels {tuple(labels.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"hidden is {hidden.shape[-1]} wide, lm_head_weight is {tuple(weight.shape)}")
    if not hidden.is_floating_point() or weight.dtype != hidden.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, lm_head_weight {weight.dtype}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit a vocabulary of {weight.shape[0]} tokens")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap {softcap} is not positive")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk {chunk} is not positive")
    for name, part in (("lm_head_weight", weight), ("labels", labels), ("bias", bias)):
        if part is not None and part.device != hidden.device:
            raise ValueError(f"{name} is on {part.device}, hidden is on {hidden.device}")
