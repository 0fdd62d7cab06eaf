"""The parts of a causal language model, with or without PEFT's wrapper. Importing this imports no torch."""

from __future__ import annotations

from typing import Any

__all__ = ["decoder_of", "layers_of", "plain_model"]


def plain_model(model: Any) -> Any:
    """The transformers model itself, without PEFT's wrapper; its layers still have their adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> Any:
    """The decoder, whose hidden states go into lm_head."""
    plain = plain_model(model)
    return plain.get_decoder() if hasattr(plain, "get_decoder") else plain


def layers_of(model: Any) -> Any:
    """The decoder's layers, a ModuleList; None if they are not its attribute `layers`."""
    from torch import nn

    layers = getattr(decoder_of(model), "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else None
