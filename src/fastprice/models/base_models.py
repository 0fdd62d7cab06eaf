"""Names of base models: the shipped nano model, a folder, or an id on the Hugging Face hub."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastprice.errors import BaseModelError

__all__ = ["NANO", "load_config", "load_tokenizer", "model_type_of", "resolve_base"]

NANO = "nano"


def resolve_base(base: str) -> str:
    """The folder or hub id that `base` names; "nano" is the model shipped with fastprice.

    Raises BaseModelError for a path that is no folder, a folder without a model, and an impossible hub id.
    """
    if base == NANO:
        return str(files("fastprice") / NANO)
    folder = Path(base).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BaseModelError(f"base: the folder {base} has no config.json, so it is not a transformers model")
        return str(folder)
    looks_local = base.startswith((".", "/", "~")) or base.count("/") > 1
    if looks_local or not base.strip() or any(character.isspace() for character in base):
        raise BaseModelError(
            f"base: {base!r} is neither a folder nor a hub id; give a folder with a transformers model, "
            f"an id such as Qwen/Qwen2.5-0.5B, or {NANO!r}"
        )
    return base


def model_type_of(base: str) -> str | None:
    """The `model_type` in the `config.json` of `base`; None if it cannot be read, which loading will explain.

    Without transformers, which Unsloth has to precede.
    """
    from huggingface_hub import hf_hub_download

    try:
        source = resolve_base(base)
        path = Path(source) / "config.json" if Path(source).is_dir() else Path(hf_hub_download(source, "config.json"))
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (BaseModelError, OSError, ValueError):
        return None
    found = settings.get("model_type") if isinstance(settings, dict) else None
    return found if isinstance(found, str) else None


def load_config(base: str) -> Any:
    """The transformers configuration of `base` (a name as in `resolve_base`). Raises BaseModelError."""
    from transformers import AutoConfig

    return _load(AutoConfig, base, "configuration")


def load_tokenizer(base: str) -> Any:
    """The tokenizer of `base`; without a padding token of its own, its end token pads. Raises BaseModelError."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, base, "tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(loader: Any, base: str, what: str) -> Any:
    try:
        return loader.from_pretrained(resolve_base(base))
    except (OSError, ValueError, KeyError) as error:
        raise base_error(base, what, error) from error


def base_error(base: str, what: str, error: Exception) -> BaseModelError:
    """One line for the exception that transformers raised while loading `what` ("weights", ...) of `base`."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return BaseModelError(
        f"base: no {what} could be loaded from {base!r} ({said[:160]}); check the name, whether the model is gated "
        "(hf auth login), and the network, or give a local folder"
    )
