"""What the kernels require of a model: the names of its modules, and what their code computes.

No class of a model library is imported or compared. A family is supported where its modules have the names below and
their code, run on symbols or numbers in place of tensors, computes the formulas below: a module is a gated MLP because
of what it does, not because of its name. To support a family with other names or formulas, change this file.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fastprice_kernels.ops.gated_activations import ACTIVATIONS
from fastprice_kernels.reference.lora import activation as reference_activation

__all__ = [
    "MLP",
    "OUTPUT",
    "QKV",
    "activation_of",
    "decoder_layers",
    "is_gated_mlp",
    "last_decoder_layer",
    "logit_transform",
    "unsupported_last_layer",
]

QKV = ("q_proj", "k_proj", "v_proj")  # the projections of the input of an attention layer
OUTPUT = "o_proj"  # the projection of its output
MLP = ("gate_proj", "up_proj", "down_proj")
ACTIVATION = "act_fn"  # of an MLP
LAYERS = "layers"  # of a decoder
ATTENTION, FEED_FORWARD = "self_attn", "mlp"  # of a layer
NORMS = ("input_layernorm", "post_attention_layernorm")  # of a layer: before attention, before the MLP
SOFTCAP = "final_logit_softcapping"  # of a configuration: Gemma's cap of the logits
FACTOR = "logit_scale"  # Cohere's factor of the logits
DIVISOR = "logits_scaling"  # Granite's divisor of the logits


class _Symbol:
    """Stands for a tensor while a module's code is run to see what it computes; + and * commute."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __mul__(self, other: _Symbol) -> _Symbol:
        return _Symbol("*", frozenset([self, other]))

    def __add__(self, other: _Symbol) -> _Symbol:
        return _Symbol("+", frozenset([self, other]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Symbol) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)


def _function(name: str) -> Any:
    return lambda x: _Symbol(name, x)


def _computes(kind: type[nn.Module], parts: dict[str, Any], want: _Symbol) -> bool:
    """Whether `kind.forward` with these parts, called on the symbol x, returns `want`."""
    try:
        return bool(kind.forward(SimpleNamespace(**parts), _Symbol("x")) == want)
    except (AttributeError, TypeError):  # it has other parts, or uses them in another way
        return False


def is_gated_mlp(kind: type[nn.Module]) -> bool:
    """Whether `kind.forward` is `down(act(gate(x)) * up(x))`."""
    gate, up, down = MLP
    x = _Symbol("x")
    want = _Symbol(down, _Symbol(ACTIVATION, _Symbol(gate, x)) * _Symbol(up, x))
    return _computes(kind, {name: _function(name) for name in (*MLP, ACTIVATION)}, want)


def activation_of(module: nn.Module) -> str | None:
    """Which of `ACTIVATIONS` the activation of an MLP is, by its values; None if it is another."""
    act = getattr(module, ACTIVATION, None)
    if not callable(act) or (isinstance(act, nn.Module) and next(act.parameters(), None) is not None):
        return None
    z = torch.linspace(-60, 60, 6001, dtype=torch.float64)
    with torch.no_grad():
        values = act(z)
    # Exact gelu and gelu_tanh differ by up to 5e-4, two implementations of one of them in fp64 by 1e-15.
    return next((kind for kind in ACTIVATIONS if (values - reference_activation(z, kind)).abs().max() < 1e-7), None)


def decoder_layers(causal: Any) -> list[nn.Module]:
    """The layers that the decoder of a causal language model runs, if they are in its list `layers`; else none."""
    layers = getattr(getattr(causal, causal.base_model_prefix, None), LAYERS, None)
    if not isinstance(layers, nn.ModuleList):
        return []
    return list(layers)[: causal.config.get_text_config().num_hidden_layers]


def last_decoder_layer(causal: Any) -> nn.Module | None:
    """The last one of `decoder_layers`."""
    layers = decoder_layers(causal)
    return layers[-1] if layers else None


def unsupported_last_layer(layer: nn.Module | None) -> str | None:
    """The reason why a layer cannot run at some positions alone after attention; None where it can."""
    if layer is None:
        return f"the decoder has no list of layers named {LAYERS!r}"
    if "forward" in layer.__dict__:
        return "its forward was replaced by something else"
    x = _Symbol("x")
    between = x + _Symbol(ATTENTION, _Symbol(NORMS[0], x))
    parts = {name: _function(name) for name in (*NORMS, FEED_FORWARD)}
    parts[ATTENTION] = lambda hidden_states, **_: (_Symbol(ATTENTION, hidden_states), None)
    if not _computes(type(layer), parts, between + _Symbol(FEED_FORWARD, _Symbol(NORMS[1], between))):
        return "its code is not x + attention(norm(x)), then x + mlp(norm(x))"
    if not isinstance(getattr(getattr(layer, ATTENTION, None), OUTPUT, None), nn.Module):
        return f"its attention has no {OUTPUT}"
    return None


def logit_transform(causal: Any) -> tuple[float | None, float]:
    """(softcap, scale) of the logits, from the configuration; (None, 1.0) for most families."""
    config = causal.config.get_text_config()
    softcap = getattr(config, SOFTCAP, None)
    scale = getattr(config, FACTOR, None)
    if scale is None:
        scale = 1 / getattr(config, DIVISOR, 1.0)
    return None if softcap is None else float(softcap), float(scale)
