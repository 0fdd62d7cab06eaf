"""What a scorer is: log-probabilities of price tokens after prompts and after nodes of the price trie.

The queried nodes of an item stand side by side after its prompt, and an attention mask lets each attend to the prompt
and to its own ancestors only (tree attention: Miao et al., "SpecInfer", 2023). So the keys and values of a prompt are
computed once and read by all of its nodes.

Two implementations: `stock.StockScorer` calls the forward pass of any transformers model, `merged.MergedScorer` runs a
dense copy of the weights with the adapters merged into it, several times as fast, for the families that
`fastprice.models.families` lists with a merged decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastprice.common.arrays import FloatArray, IntArray
from fastprice.inference.price_trie import PriceTrie

__all__ = ["TRUNK_NODES", "Prompts", "Scorer", "ScoringSession", "common_prefix_length", "to_host"]

Prompts = Sequence[Sequence[int]]

TRUNK_NODES = 16  # nodes of the trie at most, in whole levels, that are computed together with every prompt


class ScoringSession(Protocol):
    """A batch of B prompts whose keys and values are cached, ready to score nodes of the trie after them.

    trunk_scores  float64 (B, trunk, U): natural log-probabilities of the trie's alphabet after the first nodes of the
                  trie, as many whole levels as fit in `TRUNK_NODES`
    """

    trunk_scores: FloatArray

    def score(self, items: IntArray, nodes: IntArray) -> FloatArray:
        """Log-probabilities, float64 (N, U), of the trie's alphabet after nodes (N,) of items (N,) of the batch."""


class Scorer(Protocol):
    """A model, and the trie of the prices that it scores."""

    trie: PriceTrie

    def prepare(self, prompts: Prompts) -> None:
        """Forgets earlier prompts, and computes the common prefix of `prompts` where that pays.

        `start_session` is then called with some of them at a time.
        """

    def batches(self, prompts: Prompts, batch_size: int) -> Iterator[list[int]]:
        """Indices of `prompts` to compute together, at most `batch_size` at once."""

    def start_session(self, prompts: Prompts) -> ScoringSession:
        """Computes `prompts` and the trunk of the trie after each; an earlier session is no longer valid."""


def to_host(scores: Tensor) -> FloatArray:
    """Log-probabilities as float64 on the host, NaN as -inf: what is not a number is no probability."""
    found: FloatArray = scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf).double().cpu().numpy()
    return found


def common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens that both begin with."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)
