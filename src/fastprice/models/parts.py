"""The parts of a causal language model, with or without PEFT's wrapper. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastprice.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["decoder_layers", "decoder_of", "plain_model"]


def plain_model(model: Any) -> Any:
    """The transformers model itself, without PEFT's wrapper; its layers still have their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> Any:
    """The decoder, whose hidden states go into lm_head."""
    plain = plain_model(model)
    return plain.get_decoder() if hasattr(plain, "get_decoder") else plain


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's layers; raises ConfigError for a model that does not hold them in a list named `layers`."""
    from torch import nn

    layers = getattr(decoder_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"model: a {type(plain_model(model)).__name__} has no list of decoder layers; recompute levels and "
            "offloaded layers need one"
        )
    return layers
