"""Sizes of memory in bytes, as people write them: "24GiB", "24 GB", "24g"."""

from __future__ import annotations

import re

from fastprice.errors import ConfigError

__all__ = ["GIB", "format_gib", "parse_bytes"]

GIB = 1 << 30

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:([kmgt]?)(b)|([kmgt]?)|([kmgt])ib?)\s*", re.IGNORECASE)


def parse_bytes(size: str | int) -> int:
    """Bytes of "24GiB" (2^30), "24 GB" (10^9), "24g" or a plain number; raises ConfigError for anything else.

    A bare g is GiB, the unit in which GPU memory is sold.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise ConfigError(f"memory: {size!r} is not a size; write it like 24GiB, 24GB or 24g")
    number, decimal, is_decimal, bare, binary = match.groups()
    power = _POWERS[(decimal or bare or binary or "").lower()]
    parsed = int(float(number) * (1000 if is_decimal else 1024) ** power)
    if parsed < 1:
        raise ConfigError(f"memory: {size!r} is less than one byte; write a size like 24GiB")
    return parsed


def format_gib(size: int) -> str:
    """ "24 GiB" or "7.5 GiB" from bytes."""
    return f"{size / GIB:.1f} GiB".replace(".0 ", " ")
