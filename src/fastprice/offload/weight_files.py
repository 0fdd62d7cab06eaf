"""The safetensors files of a base model: what is in them, read through mmap, one file at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastprice.errors import BaseModelError
from fastprice.models.base_models import base_error, resolve_base

__all__ = ["INDEX", "SINGLE", "Checkpoint", "find_file", "opened"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """`files`: every shard, in order; `where`: the shard that holds each tensor; `size`: bytes of all tensors."""

    def __init__(self, base: str) -> None:
        """`base` is a folder, a hub id or "nano", as a user gives it.

        Raises BaseModelError when it has no safetensors weights, or a shard is missing or damaged.
        """
        index = find_file(base, INDEX)
        names = [SINGLE] if index is None else _shards_of(index)
        self.files: list[Path] = []
        for name in names:
            path = find_file(base, name)
            if path is None:
                what = "it has no model.safetensors" if index is None else f"its shard {name} is missing"
                raise BaseModelError(f"base: {base!r} cannot be read: {what}; only whole safetensors models are")
            self.files.append(path)
        self.where: dict[str, Path] = {}
        self.size = 0
        for path in self.files:
            with opened(path) as shard:
                self.where.update(dict.fromkeys(shard.keys(), path))
            self.size += path.stat().st_size


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The safetensors file, mapped: its tensors are views of the mapping, which ends with the last of them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise BaseModelError(
            f"{path} is damaged or unreadable ({' '.join(str(error).split())[:160]}); get it again"
        ) from error


def find_file(base: str, name: str) -> Path | None:
    """The file of that name in `base` (folder, hub id or "nano"), fetched if need be; None if it has no such file."""
    from transformers.utils import cached_file

    try:
        found = cached_file(resolve_base(base), name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise base_error(base, "weights", error) from error
    return None if found is None else Path(found)


def _shards_of(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"{index} is damaged ({type(error).__name__}: {error}); get it again") from error
