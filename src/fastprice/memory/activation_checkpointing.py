"""Activation checkpointing with a recompute level for each decoder layer (recompute_levels.py).

    with ActivationCheckpointing(model, ["full"] * 12 + ["selective"] * 20):
        loss = model(**batch).loss
        loss.backward()

Losses and gradients are the same numbers at every level: recomputed tensors come from the same operations on the same
values, under the autocast state and the random number generator state of the forward pass. "none" leaves a layer as it
is; "selective" and "mlp" are described in selective_recompute.py. "full" is `torch.utils.checkpoint`, non-reentrant,
around the layer's `__call__`: the backward pass runs the whole call again, with its forward pre-hooks and (unless it
stops early, once every saved tensor is there) its forward hooks. Code that swaps the storage of weights must have put
the layer's own weights in place by then; a full-backward pre-hook of the layer runs before. "offload" does the same
from a copy of the layer's input in pinned host memory (activation_offload.py).

Method: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from fastprice.errors import ConfigError
from fastprice.memory.activation_offload import ActivationOffload
from fastprice.memory.recompute_levels import check_recompute_levels
from fastprice.memory.selective_recompute import SelectiveRecompute
from fastprice.models.parts import decoder_layers, plain_model

__all__ = ["ActivationCheckpointing", "checkpointable_layers"]

# The two attributes through which a layer of transformers (a GradientCheckpointingLayer) is checkpointed.
_LAYER_ATTRIBUTES = ("gradient_checkpointing", "_gradient_checkpointing_func")
_MISSING = object()


def checkpointable_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model, with or without PEFT around it.

    Raises ConfigError if the model has none, or if transformers cannot checkpoint them one by one.
    """
    layers = list(decoder_layers(model))
    if not layers or not all(hasattr(layer, _LAYER_ATTRIBUTES[0]) for layer in layers):
        name = type(plain_model(model)).__name__
        raise ConfigError(f"recompute: the layers of a {name} cannot be checkpointed one by one; use recompute='none'")
    return layers


class ActivationCheckpointing:
    """The recompute levels in force on a model, as a context manager; `remove` ends it as well.

    layers                the decoder layers, first one first
    levels                their recompute levels, changed by `set_levels`
    offload               copies inputs of layers at level "offload" to the host (default: a new ActivationOffload)
    preserve_rng_state    whether layers draw random numbers (dropout), which recomputation must draw again. The state
                          of the generator cannot be read while a CUDA graph is captured.

    Raises ConfigError for a model without checkpointable layers, and for levels that do not match its layers.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Sequence[str],
        *,
        offload: ActivationOffload | None = None,
        preserve_rng_state: bool = True,
    ) -> None:
        self.layers = checkpointable_layers(model)
        offload = ActivationOffload() if offload is None else offload
        self._checkpoint_functions = {
            "full": partial(checkpoint, use_reentrant=False, preserve_rng_state=preserve_rng_state),
            "offload": partial(offload.checkpoint, preserve_rng_state=preserve_rng_state),
        }
        self._original = [
            {name: layer.__dict__.get(name, _MISSING) for name in _LAYER_ATTRIBUTES} for layer in self.layers
        ]
        self._preserve_rng_state = preserve_rng_state
        self._selective: dict[int, tuple[str, SelectiveRecompute]] = {}  # and its level
        self.levels: tuple[str, ...] = ()
        self.set_levels(levels)

    def set_levels(self, levels: Sequence[str]) -> None:
        """Changes the levels from the next forward pass on; raises ConfigError if they do not match the layers."""
        levels = check_recompute_levels(levels, len(self.layers))
        for i, (layer, level) in enumerate(zip(self.layers, levels, strict=True)):
            layer.__dict__["gradient_checkpointing"] = level in self._checkpoint_functions
            if level in self._checkpoint_functions:
                layer.__dict__["_gradient_checkpointing_func"] = self._checkpoint_functions[level]
            if i in self._selective and self._selective[i][0] != level:
                self._selective.pop(i)[1].remove()
            if level in ("selective", "mlp") and i not in self._selective:
                self._selective[i] = (
                    level,
                    SelectiveRecompute(layer, mlp=level == "mlp", preserve_rng_state=self._preserve_rng_state),
                )
        self.levels = levels

    def remove(self) -> None:
        """Restores the model; a second call does nothing."""
        for _, selective in self._selective.values():
            selective.remove()
        self._selective.clear()
        for layer, original in zip(self.layers, self._original, strict=True):
            for name, value in original.items():
                layer.__dict__.pop(name, None)
                if value is not _MISSING:
                    layer.__dict__[name] = value

    def __enter__(self) -> ActivationCheckpointing:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
