"""Packs: many short texts in one row of tokens, with no padding, and no text that sees another.

Price texts are short (about 100-180 tokens) and uneven, so a padded batch computes a third or more of its positions for
nothing. Here the texts of a micro-batch are laid end to end in one row of T tokens, position ids restart at each text,
and attention runs within each text alone (attention.py).

Rows are shuffled, then filled best-fit-decreasing (Johnson 1973; TRL calls it "bfd") within windows of a few hundred
rows. Best fit over the whole set would put texts of equal length, and so of like content, into one optimiser step.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastprice.errors import ConfigError
from fastprice.prompts import IGNORE, TrainingRow

__all__ = ["PackCollator", "best_fit", "pack_rows"]

_WINDOW = 512  # rows shuffled together before they are fitted


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` (tokens) in groups of at most `capacity` tokens, each index in exactly one group.

    A length above `capacity` raises ConfigError: nothing is cut here.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if order and lengths[order[0]] > capacity:
        raise ConfigError(
            f"a row of {lengths[order[0]]} tokens does not fit a pack of {capacity}: "
            "raise pack_tokens or lower max_tokens"
        )
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, group), sorted: the first that is large enough fits best
    for index in order:
        at = bisect_left(free, (lengths[index], -1))
        if at == len(free):
            groups.append([index])
            insort(free, (capacity - lengths[index], len(groups) - 1))
        else:
            left, group = free.pop(at)
            groups[group].append(index)
            insort(free, (left - lengths[index], group))
    return groups


def pack_rows(rows: Sequence[TrainingRow], capacity: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Packs of at most `capacity` tokens, as `{"input_ids", "labels", "lengths"}`, in an order drawn from `seed`.

    `lengths` holds the tokens of each text in the pack; each row is in exactly one pack.
    """
    draw = random.Random(seed)
    order = list(range(len(rows)))
    draw.shuffle(order)
    packs: list[dict[str, list[int]]] = []
    for start in range(0, len(order), _WINDOW):
        window = [rows[index] for index in order[start : start + _WINDOW]]
        for group in best_fit([len(row.ids) for row in window], capacity):
            draw.shuffle(group)
            packs.append(
                {
                    "input_ids": [token for index in group for token in window[index].ids],
                    "labels": [label for index in group for label in window[index].labels],
                    "lengths": [len(window[index].ids) for index in group],
                }
            )
    draw.shuffle(packs)
    return packs


@dataclass(frozen=True)
class PackCollator:
    """Lays the packs of a micro-batch end to end in one row: `input_ids`, `labels`, `position_ids` of shape (1, T).

    The lengths of the texts travel beside them under `lengths_key`, where the engine's attention looks for them: a
    tuple of ints for our own attention, an int32 tensor for Unsloth (`packed_seq_lengths`).
    """

    lengths_key: str = "pack_lengths"
    as_tensor: bool = False

    def __call__(self, packs: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        lengths = [length for pack in packs for length in pack["lengths"]]
        labels = torch.tensor([[label for pack in packs for label in pack["labels"]]])
        starts = torch.cumsum(torch.tensor([0, *lengths[:-1]]), 0)
        labels[0, starts] = IGNORE  # the last token of one text must never be asked for the first of the next
        return {
            "input_ids": torch.tensor([[token for pack in packs for token in pack["input_ids"]]]),
            "labels": labels,
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            self.lengths_key: torch.tensor(lengths, dtype=torch.int32) if self.as_tensor else tuple(lengths),
        }
