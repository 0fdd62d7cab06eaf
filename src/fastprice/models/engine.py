"""What an engine is: it loads a base model, attaches adapters, and switches between training and prediction.

There are two: stock transformers + PEFT, which runs anywhere (`peft_engine`), and Unsloth on CUDA (`unsloth_engine`).
`engine_choice` picks one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from fastprice.models.adapters import Method
from fastprice.models.engine_features import Feature

__all__ = ["Engine", "LoadedModel"]


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and the base it was loaded from (a folder or a hub id)."""

    model: Any
    tokenizer: Any
    base: str


class Engine(Protocol):
    """What training and prediction need of an engine."""

    name: str
    takes_masks: bool  # whether the model's forward pass takes a mask for each token, as tree attention needs it

    def unsupported(self, feature: Feature) -> str | None:
        """Why this engine does not have `feature`; None if it has it."""

    def load_base(self, base: str, *, method: Method, max_tokens: int) -> LoadedModel:
        """The frozen base, in 4 bits for "qlora"; BaseModelError when it cannot be found or read."""

    def attach(self, model: Any, *, method: Method, rank: int, alpha: float, dropout: float, seed: int) -> Any:
        """`model` with fresh adapters, their weights drawn from `seed`; unchanged but trainable for "full"."""

    def attach_saved(self, model: Any, folder: str) -> Any:
        """`model` with the adapter saved in `folder`."""

    def for_training(self, model: Any) -> None:
        """Switches to the attention and mode that training on packs needs; recompute levels in force stay."""

    def for_prediction(self, model: Any) -> None:
        """Switches to the attention and mode that prediction on padded batches needs; levels in force stay."""

    def collator(self) -> Any:
        """The collator whose batches this engine's attention reads."""
