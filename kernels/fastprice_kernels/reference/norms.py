"""Norms of rows, for autograd to differentiate, usually in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["norm"]


def norm(x: Tensor, weight: Tensor, eps: float, kind: str, bias: Tensor | None = None) -> Tensor:
    """The norm `kind` ("rms", "rms_plus_one" or "layer") of the rows of x (..., W), weight and bias (W,)."""
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = normed * (weight + 1 if kind == "rms_plus_one" else weight)
    return y if bias is None else y + bias
