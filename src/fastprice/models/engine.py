"""Engines: a base model made ready to train, by Unsloth on a CUDA card or by stock transformers + PEFT anywhere.

`load_base` gives a model and its tokenizer, `attach` puts fresh adapters on it, `attach_saved` puts saved ones on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fastprice.errors import ConfigError, MissingDependencyError, nearest_name
from fastprice.models.adapters import Method

__all__ = ["ENGINES", "Engine", "EngineName", "Loaded", "choose_engine"]

EngineName = Literal["auto", "peft", "unsloth"]
ENGINES = ("auto", "peft", "unsloth")


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the base it was loaded from (a folder or a hub id)."""

    model: Any
    tokenizer: Any
    base: str


class Engine(Protocol):
    """What training and prediction ask of an engine."""

    name: str
    takes_masks: bool  # whether its models' forward pass takes a mask for each token, as fastprice.inference.scorers.scorer uses it

    def load_base(self, base: str, *, method: Method, max_tokens: int) -> Loaded:
        """The frozen base, in 4 bits for "qlora"; BaseModelError when it cannot be found or read."""

    def attach(self, model: Any, *, method: Method, rank: int, alpha: float, dropout: float, seed: int) -> Any:
        """`model` with fresh adapters, their weights drawn from `seed`; unchanged but trainable for "full"."""

    def attach_saved(self, model: Any, folder: str) -> Any:
        """`model` with the adapter saved in `folder`."""

    def for_training(self, model: Any) -> None:
        """Switches to the attention and mode that training on packs needs."""

    def for_prediction(self, model: Any) -> None:
        """Switches to the attention and mode that prediction on padded batches needs."""

    def collator(self) -> Any:
        """The collator whose batches this engine's attention understands."""


def choose_engine(name: str = "auto") -> Engine:
    """The engine of that name; "auto" takes Unsloth where there is a CUDA device and Unsloth is installed.

    Raises ConfigError for an unknown name, MissingDependencyError when Unsloth is asked for and cannot run here.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine: {name!r} is not one of {', '.join(ENGINES)}{nearest_name(name, ENGINES)}")
    missing = unsloth_missing()
    if name == "unsloth" and missing:
        raise MissingDependencyError(f"engine: unsloth cannot run here: {missing}; or use engine='peft'")
    if name == "unsloth" or (name == "auto" and not missing):
        from fastprice.models.unsloth_engine import UnslothEngine

        return UnslothEngine()
    from fastprice.models.peft_engine import PeftEngine

    return PeftEngine()


def unsloth_missing() -> str:
    """Why Unsloth cannot run here and what to do about it; empty when it can."""
    from importlib.util import find_spec

    import torch

    if not torch.cuda.is_available():
        return "it needs a CUDA device and PyTorch sees none"
    if find_spec("unsloth") is None:
        return "it is not installed; install it with: pip install 'fastprice[gpu]'"
    return ""
