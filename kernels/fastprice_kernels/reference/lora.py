"""The plain PyTorch truth of the LoRA products, the gated activations and the loss head.

Autograd differentiates these, so tests and benchmarks take outputs and gradients from them, usually in float64.
T tokens, K input width, N output width, I intermediate width, V vocabulary, r rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["activation", "completion_cross_entropy", "glu", "lora_linear", "lora_mlp"]


def activation(e: Tensor, kind: str) -> Tensor:
    """silu, gelu (exact) or gelu_tanh of `e`."""
    if kind == "silu":
        return F.silu(e)
    return F.gelu(e, approximate="tanh" if kind == "gelu_tanh" else "none")


def glu(e: Tensor, g: Tensor, kind: str) -> Tensor:
    return activation(e, kind) * g


def lora_linear(
    x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float, bias: Tensor | None = None
) -> Tensor:
    """`x W^T + scale (x A^T) B^T + bias` for x (..., K), W (N, K), A (r, K), B (N, r); A and B may be absent."""
    y = F.linear(x, weight, bias)
    return y if a is None or b is None else y + scale * F.linear(F.linear(x, a), b)


def lora_mlp(
    x: Tensor,
    gate: tuple[Tensor, Tensor, Tensor, float],
    up: tuple[Tensor, Tensor, Tensor, float],
    down: tuple[Tensor, Tensor, Tensor, float],
    kind: str,
) -> Tensor:
    """`down(act(gate(x)) * up(x))`, each projection given as (W, A, B, scale)."""
    return lora_linear(glu(lora_linear(x, *gate), lora_linear(x, *up), kind), *down)


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
) -> Tensor:
    """Cross-entropy of full logits: hidden (..., S, D), head (V, D), labels (..., S); 0 where nothing is labelled."""
    if shift:
        labels = torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)], -1)
    logits = F.linear(hidden, head_weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    flat = labels.reshape(-1)
    total = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), flat, ignore_index=ignore_index, reduction="sum")
    if num_items is not None:
        return total / num_items
    return total if reduction == "sum" else total / (flat != ignore_index).sum().clamp(min=1)
