"""How a row becomes text.

Strings stay as they are. Lists of short strings are joined by ", ", lists with a string of more than 40 characters
(paragraphs) by newlines. Everything else gets its column's name: ``cas latency: 15``, ``modules: 2, 8``,
``modular: no``; an object becomes one ``key: value`` line per leaf. Nulls, NaN and blank strings are left out. CSV has
no types, so cells that look like a number, true or false get their column's name as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["RowRenderer", "cell_text", "is_missing"]

_PARAGRAPH_CHARACTERS = 40  # a string of more in a list is a paragraph
_LEAK_NAME = re.compile(r"price|msrp|usd|amount|cost(?!um)", re.IGNORECASE)
_CELL_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class RowRenderer:
    """Turns records into text, and collects the columns whose names suggest that they contain the price.

    columns   to render, in this order; None: all but the nameless and those of `excluded` and of suspicious names
    excluded  columns to leave out where `columns` is None
    typed     whether values have types; False for CSV
    """

    def __init__(self, columns: Sequence[str] | None, excluded: frozenset[str] = frozenset(), *, typed: bool) -> None:
        self.columns, self.excluded, self.typed = columns, excluded, typed
        self.leaks: dict[str, None] = {}

    def text(self, record: Mapping[str, Any]) -> str:
        names: Iterable[str] = record if self.columns is None else self.columns
        lines: list[str] = []
        for name in names:
            if self.columns is None and (not name or name in self.excluded):
                continue
            lines += self._lines(name, name, record.get(name), nested=False)
        # JSON can contain one half of a surrogate pair, which cannot be encoded.
        return "\n".join(lines).encode("utf-8", "replace").decode("utf-8")

    def notes(self) -> list[str]:
        """A message about the columns that may contain the price, of the records so far."""
        if not self.leaks:
            return []
        names = ", ".join(self.leaks)
        if self.columns is None:
            return [f"left out of the text, since they may contain the price: {names}"]
        return [f"the text contains {names}, which may contain the price: the model would learn to copy it"]

    def _lines(self, path: str, name: str, value: Any, *, nested: bool) -> list[str]:
        """The lines of one value; `path` is its full name ("attrs.price"), `name` the last part of it."""
        if is_missing(value):
            return []
        if _LEAK_NAME.search(name):
            self.leaks[path] = None
            if self.columns is None:
                return []
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        label = name.replace("_", " ").strip()
        if isinstance(value, str):
            if not self.typed and _CELL_NUMBER.fullmatch(value.strip()):
                return [f"{label}: {value.strip()}"]
            if not self.typed and value.strip().lower() in ("true", "false"):
                return [f"{label}: {cell_text(value.strip().lower() == 'true')}"]
            return [f"{label}: {value}" if nested else value]
        if isinstance(value, dict):
            return [
                line
                for key, inner in value.items()
                for line in self._lines(f"{path}.{key}", str(key), inner, nested=True)
            ]
        if isinstance(value, (list, tuple)):
            present = [inner for inner in value if not is_missing(inner)]
            if any(isinstance(inner, (dict, list, tuple)) for inner in present):
                return [line for inner in present for line in self._lines(path, name, inner, nested=nested)]
            texts = [cell_text(inner) for inner in present]
            if any(len(text) > _PARAGRAPH_CHARACTERS for text in texts):
                return texts
            joined = ", ".join(texts)
            unlabeled = not nested and all(isinstance(inner, str) for inner in present)
            return [joined if unlabeled else f"{label}: {joined}"] if texts else []
        return [f"{label}: {cell_text(value)}"]


def is_missing(value: Any) -> bool:
    """Whether a value is null, blank, NaN or infinite."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return value is None or (isinstance(value, (str, bytes)) and not value.strip())


def cell_text(value: Any) -> str:
    """A single value as text: yes or no for a boolean, no ".0" for a whole number."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value)
