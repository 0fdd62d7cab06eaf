"""Recompute levels: which of a decoder layer's activations the backward pass computes again. Imports no torch.

    none        nothing: every tensor that autograd saves stays in GPU memory
    selective   what is cheap to compute: norms with their fp32 copies, and the product inside the MLP
    mlp         that, and gate and up: half of what a layer saves, for a quarter more work
    full        the whole forward pass of the layer; only its input is saved
    offload     the whole forward pass; its input is saved in pinned host memory

Dequantized weights are saved at no level. The setting `recompute` is "auto", one level for every layer ("selective"),
or counts from the first layer on ("12 full, 20 selective").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from fastprice.errors import ConfigError, nearest_name

__all__ = [
    "RECOMPUTE_LEVELS",
    "check_recompute",
    "check_recompute_levels",
    "expand_recompute",
    "format_recompute_levels",
    "parse_recompute_levels",
]

RECOMPUTE_LEVELS = ("none", "selective", "mlp", "full", "offload")
_COUNT_AND_LEVEL = re.compile(r"([0-9]{1,6}) +([a-z]+)")


def check_recompute(text: str) -> str:
    """Returns `text` if it is a valid setting `recompute` for some model; raises ConfigError otherwise."""
    if text != "auto":
        _parse_runs(text)
    return text


def check_recompute_levels(levels: Sequence[str], layers: int) -> tuple[str, ...]:
    """Returns `levels` as a tuple; raises ConfigError unless it holds one known level for each of `layers` layers."""
    unknown = next((level for level in levels if level not in RECOMPUTE_LEVELS), None)
    if unknown is not None:
        raise ConfigError(
            f"recompute: {unknown!r} is not one of {', '.join(RECOMPUTE_LEVELS)}"
            f"{nearest_name(str(unknown), RECOMPUTE_LEVELS)}"
        )
    if len(levels) != layers:
        raise ConfigError(f"recompute: {len(levels):,} levels given for a model of {layers:,} layers; give one a layer")
    return tuple(levels)


def parse_recompute_levels(text: str, layers: int) -> tuple[str, ...]:
    """The level of each of `layers` layers, from "selective" or "12 full, 20 selective".

    Raises ConfigError for an unknown level, a malformed count, or counts that do not add up to `layers`.
    """
    runs = _parse_runs(text)
    if runs == [(None, text)]:
        return (text,) * layers
    if sum(count or 0 for count, _ in runs) != layers:
        raise ConfigError(f"recompute: the counts in {text!r} do not add up to the model's {layers:,} layers")
    return tuple(level for count, level in runs for _ in range(count or 0))


def expand_recompute(recompute: str | int | Sequence[str], layers: int) -> tuple[str, ...]:
    """The level of each of `layers` layers from text (`parse_recompute_levels`), from the number of layers to recompute
    in full (the first ones), or from the levels themselves. Raises ConfigError for anything else."""
    if isinstance(recompute, str):
        return parse_recompute_levels(recompute, layers)
    if isinstance(recompute, Sequence):
        return check_recompute_levels(recompute, layers)
    if not isinstance(recompute, int) or isinstance(recompute, bool) or not 0 <= recompute <= layers:
        raise ConfigError(f"recompute: {recompute!r} is not a whole number from 0 to {layers:,}")
    return ("full",) * recompute + ("none",) * (layers - recompute)


def format_recompute_levels(levels: Sequence[str]) -> str:
    """The inverse of `parse_recompute_levels`: "selective" if all levels are equal, else counts in layer order."""
    runs = [(level, len(list(run))) for level, run in groupby(levels)]
    return runs[0][0] if len(runs) == 1 else ", ".join(f"{count} {level}" for level, count in runs)


def _parse_runs(text: str) -> list[tuple[int | None, str]]:
    """(number of layers, level) of each run of layers; the number is None for one level for every layer."""
    if text in RECOMPUTE_LEVELS:
        return [(None, text)]
    runs: list[tuple[int | None, str]] = []
    for part in text.split(",") if isinstance(text, str) else [""]:
        match = _COUNT_AND_LEVEL.fullmatch(part.strip())
        if match is None:
            raise ConfigError(
                f"recompute: {text!r} is neither one of {', '.join(RECOMPUTE_LEVELS)}"
                f"{nearest_name(part.strip(), RECOMPUTE_LEVELS)} nor counts such as '12 full, 20 selective'"
            )
        check_recompute_levels([match[2]], 1)
        runs.append((int(match[1]), match[2]))
    return runs
