"""The last decoder layer at labeled positions alone.

Its output at a position without a label is not used: no later layer attends to it and no loss reads it. Its keys and
values are needed there, its output projection, its MLP and the final norm are not. So the labeled rows are gathered
between attention and output projection, and the rest of the model computes (1, M, D) hidden states in place of
(B, S, D), M labeled positions. For Llama-3.1-8B that leaves out 193 of the layer's 218 million weights at the other
positions: up to 2.8 % of the whole model's products, 5.6 % for Llama-3.2-1B.

The positions pass through the decoder as a keyword argument (its layers hand unknown ones to attention, which ignores
them), so that a layer that is recomputed in the backward gets the positions of its own forward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastprice_kernels.patching.structure import ATTENTION, FEED_FORWARD, NORMS, OUTPUT

__all__ = ["ROWS", "layer_forward"]

ROWS = "fastprice_rows"  # the keyword argument: int64 (M,), positions in the flattened batch


def layer_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of a decoder layer: (1, M, D) for the positions in the argument `ROWS`; without it the stock forward."""
    rows: Tensor | None = kwargs.pop(ROWS, None)
    if rows is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)

    def gather(x: Tensor) -> Tensor:
        return x.flatten(0, -2)[rows][None]

    if args:
        raise TypeError(f"{type(self).__name__} at labeled positions takes its arguments by name, got {len(args)} more")
    norm, second_norm = (getattr(self, name) for name in NORMS)
    attention, feed_forward = getattr(self, ATTENTION), getattr(self, FEED_FORWARD)
    hook = getattr(attention, OUTPUT).register_forward_pre_hook(lambda _, inputs: gather(inputs[0]))
    try:
        attended, _ = attention(hidden_states=norm(hidden_states), **kwargs)
    finally:
        hook.remove()
    between = gather(hidden_states) + attended
    return between + feed_forward(second_norm(between))
