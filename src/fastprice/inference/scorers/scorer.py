"""Asking a model what follows a prompt and some tokens of a price.

The nodes of an item stand side by side after its prompt, and a mask lets each see the prompt and its own ancestors
alone (tree attention: Miao et al., "SpecInfer", 2023), so that a prompt's keys and values are computed once and read by
all. There are two ways: `fastprice.inference.scorers.stock` calls any transformers model, `fastprice.inference.scorers.merged` a lean copy
of the weights, several times as fast, of the models that `fastprice.inference.scorers.merged_decoder` knows.

Legend: B items of a batch, M nodes of the trie, U its tokens and the end, N pairs (item, node).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastprice.common.arrays import FloatArray, IntArray
from fastprice.inference.price_trie import PriceTrie

__all__ = ["TRUNK", "Prompts", "Reader", "Reading", "common_length", "on_host"]

Prompts = Sequence[Sequence[int]]

TRUNK = 16  # nodes of the trie at most, in whole levels, that are computed with every prompt


class Reading(Protocol):
    """The prompts of a batch, computed."""

    # (B, trunk, U): log probabilities after the first nodes of the trie, as many levels as fit in `TRUNK`
    scores: FloatArray

    def ask(self, items: IntArray, nodes: IntArray) -> FloatArray:
        """Log probabilities (N, U) of the trie's tokens and the end after nodes (N,) of items (N,)."""


class Reader(Protocol):
    """A model, and the trie of the prices that it is asked about."""

    trie: PriceTrie

    def begin(self, prompts: Prompts) -> None:
        """Computes what all `prompts` begin with, where that pays. `read` is then asked about some of them."""

    def batches(self, prompts: Prompts, batch_size: int) -> Iterator[list[int]]:
        """Indices of `prompts` to read together, at most `batch_size` at once."""

    def read(self, prompts: Prompts) -> Reading:
        """Computes `prompts`."""


def on_host(scores: Tensor) -> FloatArray:
    """float64; not a number is no probability."""
    found: FloatArray = scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf).double().cpu().numpy()
    return found


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    most = min(len(one), len(other))
    return next((at for at in range(most) if one[at] != other[at]), most)
