"""Rotary position embedding, for autograd to differentiate, usually in float64."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotate"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, form: str) -> Tensor:
    """The first R columns of x (B, H, T, D) rotated by `cos` and `sin` (B, T, R); the others unchanged.

    `form`: which columns are a pair, and which column of cos and sin is theirs (see `ops.rotary`).
    """
    r = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    turned, passed = x[..., :r], x[..., r:]
    if form == "half":
        a, b = turned.chunk(2, -1)
        partner = torch.cat((-b, a), -1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        partner = torch.stack((-b, a), -1).flatten(-2)
        if form == "interleaved_half":
            cos, sin = (each[..., : r // 2].repeat_interleave(2, -1) for each in (cos, sin))
    return torch.cat((turned * cos + partner * sin, passed), -1)
