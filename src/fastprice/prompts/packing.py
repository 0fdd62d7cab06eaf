"""Packing: many short texts in one row of tokens, without padding, and their collator.

Price texts are short (about 100-180 tokens) and uneven: in a padded batch a third or more of the positions are padding.
Here the texts of a micro-batch are concatenated into one row of T tokens, position ids restart at each text, and
attention stays within each text (`fastprice.models.packed_attention`). Rows are shuffled, then packed by best-fit-
decreasing (Johnson, 1973; "bfd" in TRL) within windows of a few hundred rows: over the whole set, texts of equal
length, and so of like content, would share an optimizer step. The emptiest pack of a window is reopened with the next
window, which fills packs to 98-99 % instead of 96-97 % (4,000 synthetic items, packs of 1,024 to 4,096 tokens).

CUDA graphs need packs of one static shape (`StaticShape`): padding texts without labels fill the row up to T tokens,
and padding entries fill `cu_seqlens` and the labeled positions. All packs of a run are known before it starts, so the
shape is the smallest that holds every one of them.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from fastprice.errors import ConfigError
from fastprice.prompts.template import IGNORE, TrainingRow

__all__ = ["HOST_IDS", "PackCollator", "StaticShape", "best_fit", "pack_rows"]

HOST_IDS = "host_input_ids"  # key of a batch, beside input_ids
_WINDOW = 512  # rows shuffled together before they are fitted


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` (tokens) in groups of at most `capacity` tokens, each index in exactly one group.

    Raises ConfigError for a length above `capacity`: rows are never truncated here.
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


def pack_rows(rows: Sequence[TrainingRow], capacity: int, seed: int = 0) -> list[dict[str, list[Any]]]:
    """Packs of at most `capacity` tokens, as `{"input_ids", "labels", "lengths", "prices"}`, in an order drawn from
    `seed`.

    `lengths` and `prices` hold the tokens and the dollars of each text in the pack; each row is in exactly one pack.
    """
    draw = random.Random(seed)
    order = list(range(len(rows)))
    draw.shuffle(order)
    packs: list[dict[str, list[Any]]] = []
    left_over: list[TrainingRow] = []
    for start in range(0, len(order), _WINDOW):
        window = left_over + [rows[index] for index in order[start : start + _WINDOW]]
        groups = best_fit([len(row.ids) for row in window], capacity)
        if start + _WINDOW < len(order):
            fills = [sum(len(window[index].ids) for index in group) for group in groups]
            left_over = [window[index] for index in groups.pop(fills.index(min(fills)))]
        for group in groups:
            draw.shuffle(group)
            packs.append(
                {
                    "input_ids": [token for index in group for token in window[index].ids],
                    "labels": [label for index in group for label in window[index].labels],
                    "lengths": [len(window[index].ids) for index in group],
                    "prices": [window[index].price for index in group],
                }
            )
    draw.shuffle(packs)
    return packs


@dataclass(frozen=True)
class StaticShape:
    """One shape for every pack of a run.

    tokens: of the row; texts: that `cu_seqlens` has room for, padding being split into texts of at most `longest`
    tokens; labels: labeled positions; longest: tokens of the longest text.
    """

    tokens: int
    texts: int
    labels: int
    longest: int

    @classmethod
    def of(cls, packs: Iterable[Mapping[str, Any]]) -> StaticShape:
        """The smallest shape that holds each of `packs` (`pack_rows`), tokens rounded up to a multiple of 16."""
        sizes = [(pack["lengths"], len(_predicting(pack["labels"], pack["lengths"]))) for pack in packs]
        longest = max(max(lengths) for lengths, _ in sizes)
        tokens = -(-max(sum(lengths) for lengths, _ in sizes) // 16) * 16
        texts = max(len(lengths) + -(-(tokens - sum(lengths)) // longest) for lengths, _ in sizes)
        return cls(tokens, texts, max(labels for _, labels in sizes), longest)

    def pad(self, lengths: list[int]) -> list[int]:
        """`lengths` followed by those of the padding texts, zeros last: `texts` numbers that add up to `tokens`.

        Raises ConfigError for a pack that exceeds the shape.
        """
        padded = list(lengths)
        while sum(padded) < self.tokens:
            padded.append(min(self.longest, self.tokens - sum(padded)))
        if max(lengths) > self.longest or sum(padded) > self.tokens or len(padded) > self.texts:
            size = f"{len(lengths)} texts, {sum(lengths)} tokens, the longest {max(lengths)}"
            raise ConfigError(f"a pack of {size}, exceeds the static shape {self}")
        return padded + [0] * (self.texts - len(padded))


def _predicting(labels: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The positions of a row whose next token is labeled and belongs to the same text."""
    firsts = set(accumulate(lengths, initial=0))
    return [at - 1 for at, label in enumerate(labels) if label != IGNORE and at not in firsts]


@dataclass(frozen=True)
class PackCollator:
    """Concatenates the packs of a micro-batch into one row: `input_ids`, `labels`, `position_ids` of shape (1, T).

    Attention reads the lengths of the texts, `pack_lengths`, a tuple of ints, their borders `cu_seqlens`, int32
    (texts + 1,), and the longest, `max_seqlen`: made from the lengths in a layer, borders would be a copy that waits
    for the device.

    positions   add the labeled positions, `label_positions` of int64 (M,), so that the loss need not search for them
    host_ids    add the token ids once more, `host_input_ids` of shape (1, T) as a NumPy array, which trainers leave on
                the host: for an embedding that is there (`fastprice.offload.host_embedding`)
    static      pad every batch to this shape, which implies `positions`: M is its `labels`, the borders are those of
                the padded row. ConfigError for a batch that exceeds it.
    """

    positions: bool = False
    host_ids: bool = False
    static: StaticShape | None = None

    def __call__(self, packs: Sequence[dict[str, list[Any]]]) -> dict[str, Any]:
        lengths = [length for pack in packs for length in pack["lengths"]]
        ids = [token for pack in packs for token in pack["input_ids"]]
        labels = [label for pack in packs for label in pack["labels"]]
        for start in accumulate(lengths[:-1], initial=0):
            labels[start] = IGNORE  # the last token of a text must not predict the first of the next
        predicting = _predicting(labels, lengths) if self.positions or self.static else []
        batch: dict[str, Any] = {"pack_lengths": tuple(lengths)}
        longest = max(lengths)
        if self.static is not None:
            shape, spare = self.static, self.static.tokens - len(ids)
            lengths, longest = shape.pad(lengths), shape.longest
            if len(predicting) > shape.labels:
                raise ConfigError(f"a pack of {len(predicting)} labeled positions exceeds the static shape {shape}")
            ids, labels = ids + [0] * spare, labels + [IGNORE] * spare
            predicting = predicting + [shape.tokens - 1] * (shape.labels - len(predicting))  # the last predicts nothing
        batch["cu_seqlens"] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        batch["max_seqlen"] = longest
        if self.positions or self.static:
            batch["label_positions"] = torch.tensor(predicting, dtype=torch.long)
        if self.host_ids:
            batch[HOST_IDS] = np.array([ids])
        return batch | {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
