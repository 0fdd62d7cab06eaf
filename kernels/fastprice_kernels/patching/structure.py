"""What the kernels require of a model: the names of its modules, and what their code computes.

No class of a model library is imported or compared. A family is supported where its modules have the names below and
their code, run on symbols or numbers in place of tensors, computes the formulas below: a module is a gated MLP because
of what it does, not because of its name. To support a family with other names or formulas, change this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fastprice_kernels import reference
from fastprice_kernels.ops.gated_activations import ACTIVATIONS
from fastprice_kernels.ops.norms import NORMS, norm
from fastprice_kernels.ops.rotary import ROTARY_FORMS

__all__ = [
    "ATTENTION",
    "FEED_FORWARD",
    "MLP",
    "OUTPUT",
    "QKV",
    "ROTARY",
    "LayerNorms",
    "activation_of",
    "causal_model",
    "decoder_layers",
    "is_gated_mlp",
    "layer_norms",
    "logit_transform",
    "norm_kind",
    "rotary_form",
]

QKV = ("q_proj", "k_proj", "v_proj")  # the projections of the input of an attention layer
OUTPUT = "o_proj"  # the projection of its output
MLP = ("gate_proj", "up_proj", "down_proj")
ACTIVATION = "act_fn"  # of an MLP
LAYERS = "layers"  # of a decoder
ATTENTION, FEED_FORWARD = "self_attn", "mlp"  # of a layer
ROTARY = "apply_rotary_pos_emb"  # the function that an attention layer calls
EPS = ("variance_epsilon", "eps")  # of a norm, one of the two
SOFTCAP = "final_logit_softcapping"  # of a configuration: Gemma's cap of the logits
FACTOR = "logit_scale"  # Cohere's factor of the logits
DIVISOR = "logits_scaling"  # Granite's divisor of the logits


@dataclass(frozen=True)
class LayerNorms:
    """The names of a decoder layer's norms; the two after attention and MLP are None in most families."""

    before_attention: str
    before_feed_forward: str
    after_attention: str | None = None
    after_feed_forward: str | None = None


_LAYER_NORMS = (
    LayerNorms("input_layernorm", "post_attention_layernorm"),
    LayerNorms(
        "input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
    ),
)


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
    return next((kind for kind in ACTIVATIONS if (values - reference.activation(z, kind)).abs().max() < 1e-7), None)


def causal_model(model: Any) -> Any:
    """The causal language model itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(causal: Any) -> list[nn.Module]:
    """The layers that the decoder of a causal language model runs, if they are in its list `layers`; else none."""
    layers = getattr(getattr(causal, getattr(causal, "base_model_prefix", ""), None), LAYERS, None)
    if not isinstance(layers, nn.ModuleList):
        return []
    return list(layers)[: causal.config.get_text_config().num_hidden_layers]


@functools.cache
def layer_norms(kind: Any) -> LayerNorms | None:
    """The norms of a layer class that computes x + attention(norm(x)), then x + mlp(norm(x)), both of them perhaps
    normalized before they are added; None for one that computes something else."""
    return next((norms for norms in _LAYER_NORMS if _computes_layer(kind, norms)), None)


def _computes_layer(kind: type[nn.Module], norms: LayerNorms) -> bool:
    def after(name: str | None, part: _Symbol) -> _Symbol:
        return part if name is None else _Symbol(name, part)

    x = _Symbol("x")
    attended = _Symbol(ATTENTION, _Symbol(norms.before_attention, x))
    between = x + after(norms.after_attention, attended)
    mixed = _Symbol(FEED_FORWARD, _Symbol(norms.before_feed_forward, between))
    names = [name for name in vars(norms).values() if name is not None]
    parts = {name: _function(name) for name in (*names, FEED_FORWARD)}
    parts[ATTENTION] = lambda hidden_states, **_: (_Symbol(ATTENTION, hidden_states), None)
    return _computes(kind, parts, between + after(norms.after_feed_forward, mixed))


def norm_kind(module: Any) -> tuple[str, str] | None:
    """(one of `NORMS`, the name of the attribute with its eps) of a norm, by its values; None for any other module."""
    eps = next((name for name in EPS if isinstance(getattr(module, name, None), float)), None)
    weight = module._parameters.get("weight")
    if eps is None or weight is None or weight.dim() != 1 or not type(module).__name__.endswith("Norm"):
        return None
    if {name for name, each in module._parameters.items() if each is not None} - {"weight", "bias"}:
        return None
    module_class: Any = type(module)
    kind = _norm_kind_of(module_class, eps, getattr(module, "bias", None) is not None)
    return None if kind is None else (kind, eps)


@functools.cache
def _norm_kind_of(kind: Any, eps: str, biased: bool) -> str | None:
    """Which norm a class computes, told by rows of very different size and, in bf16, by where it rounds."""
    generator = torch.Generator().manual_seed(0)
    width, value = 96, 0.01
    x = torch.randn(8, width, generator=generator) * torch.logspace(-3, 1, 8)[:, None] + 0.5
    parameters = {"weight": torch.rand(width, generator=generator) + 0.5}
    if biased:
        parameters["bias"] = torch.randn(width, generator=generator)
    for name in NORMS:
        if biased and name != "layer":
            continue
        # A stand-in that holds no weights of the model and shares nothing with it.
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        module.__dict__.update({eps: value, "normalized_shape": (width,)})
        agrees = True
        for dtype, least in ((torch.float32, 1.0), (torch.bfloat16, 0.97)):
            module.__dict__["_parameters"] = {"bias": None, **{n: p.to(dtype) for n, p in parameters.items()}}
            source = x.to(dtype)
            try:
                with torch.no_grad():
                    got = kind.forward(module, source)
            except (AttributeError, TypeError, RuntimeError):  # it has other parts, or takes other arguments
                return None
            bias = module.__dict__["_parameters"]["bias"]
            want: torch.Tensor = norm(source, module.__dict__["_parameters"]["weight"], value, kind=name, bias=bias)
            band = 1e-5 if dtype is torch.float32 else 0.0
            agrees = agrees and got.shape == want.shape and got.dtype == want.dtype
            agrees = agrees and (got - want).abs().le(band * want.abs() + band).float().mean().item() >= least
        if agrees:
            return name
    return None


@functools.cache
def rotary_form(function: Callable[..., Any]) -> str | None:
    """Which of `ROTARY_FORMS` a model library's `apply_rotary_pos_emb(q, k, cos, sin)` computes; None if another."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    try:
        got = function(q, k, cos, sin)
    except (TypeError, RuntimeError, ValueError):  # it takes other arguments
        return None
    for form in ROTARY_FORMS:
        want = [reference.rotate(x, cos, sin, form) for x in (q, k)]
        if all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True)):
            return form
    return None


def logit_transform(causal: Any) -> tuple[float | None, float]:
    """(softcap, scale) of the logits, from the configuration; (None, 1.0) for most families."""
    config = causal.config.get_text_config()
    softcap = getattr(config, SOFTCAP, None)
    scale = getattr(config, FACTOR, None)
    if scale is None:
        scale = 1 / getattr(config, DIVISOR, 1.0)
    return None if softcap is None else float(softcap), float(scale)
