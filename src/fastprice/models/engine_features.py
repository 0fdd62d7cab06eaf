"""What an engine may lack. Imports no engine, so that one can be chosen before Unsloth patches anything.

The PEFT engine has everything. `UNSLOTH_LACKS` is what Unsloth's has not; everything else that fastprice does to a
training step (recompute levels, the last layer at labeled positions, the completion-only loss, packs, CUDA graphs) it
does on both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

__all__ = ["UNSLOTH_FAMILIES", "UNSLOTH_LACKS", "Feature", "unsloth_lacks_model"]

Feature = Literal["full fine-tuning", "layers on the host", "hidden states"]

UNSLOTH_LACKS: Mapping[Feature, str] = {
    "full fine-tuning": "it is loaded for adapters alone",
    "layers on the host": "Unsloth places the weights itself",
    "hidden states": "its inference code was never seen to give the ones that heads and number losses train on",
}

# Model types whose attention in Unsloth is one function that takes a pack's texts (`unsloth_engine`). Gemma 2 is none:
# without flash-attn, its attention would run over a whole pack as over one text.
UNSLOTH_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")


def unsloth_lacks_model(model_type: str | None) -> str | None:
    """Why Unsloth's engine does not run models of this type (None: unknown, seen when it loads); None if it does."""
    if model_type is None or model_type in UNSLOTH_FAMILIES:
        return None
    return f"the texts of a pack would attend to each other in Unsloth's {model_type} models"
