"""Which engine runs: the one that is named, or for "auto" the one that this machine can run."""

from __future__ import annotations

from fastprice.errors import ConfigError, MissingDependencyError, nearest_name
from fastprice.models.engine import Engine

__all__ = ["ENGINES", "choose_engine", "unsloth_missing"]

ENGINES = ("auto", "peft", "unsloth")


def choose_engine(name: str = "auto") -> Engine:
    """The engine of that name; "auto" is Unsloth where there is a CUDA device and Unsloth is installed.

    Raises ConfigError for an unknown name, MissingDependencyError for "unsloth" where it cannot run.
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
