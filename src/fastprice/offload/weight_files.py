"""The safetensors files of a base model: their contents, read through mmap, one file at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastprice.errors import BaseModelError
from fastprice.models.base_models import base_error, resolve_base

__all__ = ["INDEX_FILE", "SINGLE_FILE", "Checkpoint", "find_file", "open_safetensors"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Checkpoint:
    """The safetensors weights of `base` (folder, hub id or "nano").

    files     every shard, in order
    file_of   the shard that holds each tensor, by the tensor's name
    size      bytes of all files

    Raises BaseModelError if there are no safetensors weights, or a shard is missing or damaged.
    """

    def __init__(self, base: str) -> None:
        index = find_file(base, INDEX_FILE)
        names = [SINGLE_FILE] if index is None else _shard_names(index)
        self.files: list[Path] = []
        for name in names:
            path = find_file(base, name)
            if path is None:
                problem = "it has no model.safetensors" if index is None else f"its shard {name} is missing"
                raise BaseModelError(f"base: {base!r} cannot be read: {problem}; give a complete safetensors model")
            self.files.append(path)
        self.file_of: dict[str, Path] = {}
        self.size = 0
        for path in self.files:
            with open_safetensors(path) as shard:
                self.file_of.update(dict.fromkeys(shard.keys(), path))
            self.size += path.stat().st_size


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """The safetensors file, memory-mapped: its tensors are views of the mapping, which ends with the last of them.

    Raises BaseModelError if the file is damaged or unreadable, also inside the block.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise BaseModelError(
            f"{path} is damaged or unreadable ({' '.join(str(error).split())[:160]}); download it again"
        ) from error


def find_file(base: str, name: str) -> Path | None:
    """The file of that name in `base` (folder, hub id or "nano"), downloaded if necessary; None if there is none.

    Raises BaseModelError for a base that cannot be read.
    """
    from transformers.utils import cached_file

    try:
        found = cached_file(resolve_base(base), name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise base_error(base, "weights", error) from error
    return None if found is None else Path(found)


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"{index} is damaged ({type(error).__name__}: {error}); download it again") from error
