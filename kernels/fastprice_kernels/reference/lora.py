"""LoRA layers and the gated MLP, for autograd to differentiate, usually in float64.

Shapes: T tokens, K input width, N output width, I the MLP's width, r rank.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["activation", "glu", "lora_linear", "lora_mlp"]


def activation(e: Tensor, kind: str) -> Tensor:
    """silu, gelu (exact) or gelu_tanh of `e`."""
    if kind == "silu":
        return F.silu(e)
    return F.gelu(e, approximate="tanh" if kind == "gelu_tanh" else "none")


def glu(e: Tensor, g: Tensor, kind: str) -> Tensor:
    """`activation(e) * g`, both (T, I)."""
    return activation(e, kind) * g


def lora_linear(
    x: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, scale: float, bias: Tensor | None = None
) -> Tensor:
    """`x W^T + scale (x A^T) B^T + bias` for x (..., K), W (N, K), A (r, K), B (N, r); A and B may be None."""
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
