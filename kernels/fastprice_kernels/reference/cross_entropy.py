"""Completion-only cross-entropy over full logits, for autograd to differentiate, usually in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["completion_cross_entropy"]


def completion_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    shift: bool = True,
    num_items: Tensor | float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of hidden states (..., S, D), an output layer (V, D) and labels (..., S); 0 where nothing is labeled."""
    if shift:
        labels = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], -1)
    logits = F.linear(hidden, lm_head_weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    flat = labels.reshape(-1)
    total = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), flat, ignore_index=ignore_index, reduction="sum")
    if num_items is not None:
        return total / num_items
    return total if reduction == "sum" else total / (flat != ignore_index).sum().clamp(min=1)
