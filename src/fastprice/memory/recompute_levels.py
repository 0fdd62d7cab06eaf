"""What a layer keeps from its forward pass for its backward pass: four levels, and how people write them. No torch.

    all      everything that autograd saves
    costly   everything but what is cheap to compute again: norms with their fp32 copies, products of activations
    input    the layer's input alone: its forward pass is done again in the backward pass
    host     the same, with that input in pinned host memory until its turn

Dequantized weights are kept on no level. Written as one level for every layer ("costly"), or as counts from the first
layer on ("12 input, 20 costly").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from fastprice.errors import ConfigError, nearest_name

__all__ = ["LEVELS", "check_keep", "check_levels", "parse_levels", "write_levels"]

LEVELS = ("all", "costly", "input", "host")
_COUNTED = re.compile(r"([0-9]{1,6}) +([a-z]+)")


def check_levels(levels: Sequence[str], layers: int, name: str = "recompute") -> tuple[str, ...]:
    """`levels` itself as a tuple; ConfigError unless there are `layers` of them, each known."""
    unknown = next((level for level in levels if level not in LEVELS), None)
    if unknown is not None:
        raise ConfigError(f"{name}: {unknown!r} is not one of {', '.join(LEVELS)}{nearest_name(str(unknown), LEVELS)}")
    if len(levels) != layers:
        raise ConfigError(f"{name}: {len(levels):,} levels for a model of {layers:,} layers")
    return tuple(levels)


def check_keep(text: str) -> str:
    """`text` itself when it can be a setting `recompute`: "auto", or what `parse_levels` reads; else ConfigError."""
    if text != "auto":
        _runs(text, "recompute")
    return text


def parse_levels(text: str, layers: int, name: str = "recompute") -> tuple[str, ...]:
    """The level of each of `layers` layers from "costly" or "12 input, 20 costly"; ConfigError for anything else."""
    runs = _runs(text, name)
    if runs == [(None, text)]:
        return (text,) * layers
    if sum(count or 0 for count, _ in runs) != layers:
        raise ConfigError(f"{name}: {text!r} does not name the model's {layers:,} layers, each once")
    return tuple(level for count, level in runs for _ in range(count or 0))


def _runs(text: str, name: str) -> list[tuple[int | None, str]]:
    """(how many layers, level), the number None where one level stands for every layer."""
    if text in LEVELS:
        return [(None, text)]
    found: list[tuple[int | None, str]] = []
    for part in text.split(",") if isinstance(text, str) else [""]:
        match = _COUNTED.fullmatch(part.strip())
        if match is None:
            near = nearest_name(part.strip(), LEVELS)
            raise ConfigError(
                f"{name}: {text!r} is neither one of {', '.join(LEVELS)}{near} nor counts such as '12 input, 20 costly'"
            )
        check_levels([match[2]], 1, name)
        found.append((int(match[1]), match[2]))
    return found


def write_levels(levels: Sequence[str]) -> str:
    """What `parse_levels` reads: "costly" when all are equal, else counts in the order of the layers."""
    runs = [(level, len(list(run))) for level, run in groupby(levels)]
    return runs[0][0] if len(runs) == 1 else ", ".join(f"{count} {level}" for level, count in runs)
