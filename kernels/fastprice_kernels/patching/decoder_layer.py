"""A decoder layer whose residual additions are computed with the norms behind them, at all or at labeled positions.

The stock layer adds the attention's output to the residual stream and then reads the sum again to normalize it; here
one kernel does both (ops/norms.py). Norms and parts of the layer are called as modules, so that whatever runs under
them (other kernels, adapters, hooks) runs as before.

The last layer may run at labeled positions alone. Its output at a position without a label is not used: no later layer
attends to it and no loss reads it. Its keys and values are needed there, its output projection, its MLP and the final
norm are not. So the labeled rows are gathered between attention and output projection, and the rest of the model
computes (1, M, D) hidden states in place of (B, S, D), M labeled positions. For Llama-3.1-8B that leaves out 193 of the
layer's 218 million weights at the other positions: up to 2.8 % of the whole model's products, 5.6 % for Llama-3.2-1B.
The positions pass through the decoder as a keyword argument (its layers hand unknown ones to attention, which ignores
them), so that a layer that is recomputed in the backward gets the positions of its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastprice_kernels.patching.installation import PATCH
from fastprice_kernels.patching.norms import add_norm
from fastprice_kernels.patching.structure import ATTENTION, FEED_FORWARD, OUTPUT, LayerNorms

__all__ = ["ROWS", "LayerPatch", "layer_forward"]

ROWS = "fastprice_rows"  # the keyword argument: int64 (M,), positions in the flattened batch


@dataclass
class LayerPatch:
    """What the new forward of a decoder layer reads.

    Attributes:
        norms: the names of its norms.
        takes_rows: whether it runs at the positions in the argument `ROWS`, which every layer is given.
    """

    norms: LayerNorms
    takes_rows: bool = False


def layer_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of a decoder layer: (B, S, D), or (1, M, D) for the positions in the argument `ROWS`."""
    patch: LayerPatch = self.__dict__[PATCH]
    rows: Tensor | None = kwargs.pop(ROWS, None) if patch.takes_rows else None
    if args:
        if rows is None:
            return type(self).forward(self, hidden_states, *args, **kwargs)
        raise TypeError(f"{type(self).__name__} at labeled positions takes its arguments by name, got {len(args)} more")
    norms = patch.norms
    attention, feed_forward = getattr(self, ATTENTION), getattr(self, FEED_FORWARD)
    residual, normed = add_norm(getattr(self, norms.before_attention), hidden_states)
    hook = None
    if rows is not None:
        residual = _gather(residual, rows)
        hook = getattr(attention, OUTPUT).register_forward_pre_hook(lambda _, inputs: _gather(inputs[0], rows))
    try:
        attended, _ = attention(hidden_states=normed, **kwargs)
    finally:
        if hook is not None:
            hook.remove()
    if norms.after_attention is not None:
        attended = getattr(self, norms.after_attention)(attended)
    between, normed = add_norm(getattr(self, norms.before_feed_forward), residual, attended)
    del attended  # not needed while the MLP runs, which takes the most memory
    mixed = feed_forward(normed)
    if norms.after_feed_forward is not None:
        mixed = getattr(self, norms.after_feed_forward)(mixed)
    return between + mixed


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    return x.flatten(0, -2)[rows][None]
