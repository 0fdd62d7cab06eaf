"""The loss and the last decoder layer of a model that runs Unsloth's code.

Unsloth's forwards are functions on transformers' classes. Its causal language model hands unknown keyword arguments to
its decoder, and that to its layers and their attention, as transformers' does: so the labeled positions reach the last
layer in the same way (decoder_layer.py). It differs in three points: a layer returns a tuple, calls a function on its
norms instead of the norms themselves, and its attention calls `apply_o` instead of its output projection.

What a layer computes is read from its code, run on numbers; the function for its norms and the options that it passes
are Unsloth's own. Written for Unsloth 2026.10.7; what is not as expected is a reason, in words.
"""

from __future__ import annotations

import inspect
from types import FunctionType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from fastprice_kernels.patching.decoder_layer import ROWS
from fastprice_kernels.patching.structure import ATTENTION, FEED_FORWARD, OUTPUT, logit_transform

__all__ = ["layer_forward", "unsupported_last_layer", "unsupported_loss"]

_NORMS = ("input_layernorm", "post_attention_layernorm")  # of a layer: before attention, before the MLP
_NORM = "fast_rms_layernorm"  # (norm, x, **options): Unsloth's function for the norms of a layer
_TRANSFORMS = "resolve_logit_transforms"  # (config) -> softcap, factor, divisor of the logits; 0 where there is none
_APPLY_OUTPUT, _STOCK_OUTPUT = "apply_o", "original_apply_o"  # (attention, x), attached or in the module


def unsupported_loss(causal: Any) -> str | None:
    """The reason why `completion_cross_entropy` cannot replace output layer and loss of an Unsloth model, or None."""
    lm_head = causal.get_output_embeddings()
    if type(lm_head) is not nn.Linear:
        return f"its output layer is a {type(lm_head).__name__}, not a plain Linear"
    if not isinstance(getattr(causal, causal.base_model_prefix, None), nn.Module):
        return "it has no decoder of its own"
    if "forward" in causal.__dict__:
        return "its forward was replaced by something else"
    transforms = _globals(type(causal).forward).get(_TRANSFORMS)
    if transforms is None:
        return f"its forward, which is Unsloth's, does not call {_TRANSFORMS}"
    softcap, factor, divisor = transforms(causal.config)
    theirs = (softcap or None, (factor or 1.0) / (divisor or 1.0))
    if theirs != logit_transform(causal):
        return f"Unsloth caps and scales its logits by {theirs}, its configuration says {logit_transform(causal)}"
    return None


def unsupported_last_layer(layer: nn.Module | None) -> str | None:
    """The reason why a layer with Unsloth's forward cannot run at some positions alone after attention, or None."""
    if layer is None:
        return "the decoder has no list of layers"
    if "forward" in layer.__dict__:
        return "its forward was replaced by something else"
    attention = getattr(layer, ATTENTION, None)
    if not isinstance(getattr(attention, OUTPUT, None), nn.Module):
        return f"its attention has no {OUTPUT}"
    if _APPLY_OUTPUT not in attention.__dict__ and _stock_output(attention) is None:
        return f"its attention does not call {_APPLY_OUTPUT}"
    if _norm_options(type(layer)) is None:
        return "its code is not x + attention(norm(x)), then x + mlp(norm(x))"
    return None


def layer_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of a decoder layer: ((1, M, D),) for the positions in the argument `ROWS`; without it Unsloth's forward."""
    rows: Tensor | None = kwargs.pop(ROWS, None)
    if rows is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    if args:
        raise TypeError(f"{type(self).__name__} at labeled positions takes its arguments by name, got {len(args)} more")

    def gather(x: Tensor) -> Tensor:
        return x.flatten(0, -2)[rows][None]

    options = _norm_options(type(self))
    assert options is not None  # `unsupported_last_layer` said so
    norm = _globals(type(self).forward)[_NORM]
    first, second = (getattr(self, name) for name in _NORMS)
    attention = getattr(self, ATTENTION)
    attached = attention.__dict__.get(_APPLY_OUTPUT)
    output = _stock_output(attention) if attached is None else attached
    attention.__dict__[_APPLY_OUTPUT] = lambda module, x: output(module, gather(x))
    try:
        attended = attention(hidden_states=norm(first, hidden_states, **options[0]), **kwargs)[0]
    finally:
        del attention.__dict__[_APPLY_OUTPUT]
        if attached is not None:
            attention.__dict__[_APPLY_OUTPUT] = attached
    between = gather(hidden_states) + attended
    return (between + getattr(self, FEED_FORWARD)(norm(second, between, **options[1])),)


def _globals(function: Any) -> dict[str, Any]:
    """The names that a function of Unsloth's sees in its module."""
    return getattr(inspect.unwrap(function), "__globals__", {})


def _stock_output(attention: Any) -> Any:
    """What attention calls where nothing is attached; None if its code knows no such function."""
    return _globals(type(attention).forward).get(_STOCK_OUTPUT)


def _norm_options(kind: type[nn.Module]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The options that a layer's code passes for its two norms; None if it computes anything else than
    x + attention(norm(x)), then x + mlp(norm(x))."""
    options: list[dict[str, Any]] = []

    def norm(parts: tuple[int, int], x: int, **given: Any) -> int:
        options.append(given)
        return parts[0] * x + parts[1]

    function = inspect.unwrap(kind.forward)
    names = {**_globals(function), _NORM: norm}
    first, second = (7, 3), (5, -2)
    layer = SimpleNamespace(**dict(zip(_NORMS, (first, second), strict=True)))
    setattr(layer, ATTENTION, lambda hidden_states, **_: (hidden_states**3 + 1, None, None))
    setattr(layer, FEED_FORWARD, lambda x: x**2 - 4)
    between = 11 + (7 * 11 + 3) ** 3 + 1
    try:
        code = FunctionType(function.__code__, names, None, function.__defaults__, function.__closure__)
        if code(layer, 11)[0] == between + (5 * between - 2) ** 2 - 4:
            return options[0], options[1]
    except (AttributeError, TypeError, IndexError, NameError):  # it uses its parts in another way
        pass
    return None
