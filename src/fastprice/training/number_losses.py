"""Number losses: added to the cross-entropy of a price's digits, they know which numbers are close.

To cross-entropy every wrong digit is equally wrong. Both kinds here are the expected cost of the model's own answer at
each step of the true price: the sum of probability x cost over the tokens that may come next.

"number", the number-token loss NTL-WAS (Zausinger et al., "Regress, Don't Guess", 2024): over the ten digits, the cost
of a digit is its distance from the true one; "number_mse" is their NTL-MSE, the squared distance of the expected digit.
They ignore places: a wrong hundreds digit costs as much as a wrong last one. "wasserstein" is the distance in log
price, which includes places and the end of a number. The Wasserstein-1 distance between the model's distribution over
prices and the truth n is the expected |ln m - ln n| over its answers m. An answer departs from the digits of n at one
step, by a token j, so the expectation is

    sum over steps s of   p(first s tokens of n)  x  sum over j of p(j | them) E[|ln m - ln n| | m begins so, then j]

Only the last factor would need forward passes on digits that are not in the text; the mean over all prices that begin
so approximates it. Probabilities are renormalized over the tokens that the step allows (the digits; the children of the
trie's node and its end), as in the paper: cross-entropy already penalizes mass on others.

Legend: N texts, S steps of the longest answer, U tokens of the trie's alphabet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastprice.errors import ConfigError
from fastprice.inference.price_trie import PriceTrie

__all__ = ["NumberLoss", "expected_cost"]

_TABLES = 4096  # prices whose tables are cached


class NumberLoss:
    """The costs of answers under one tokenizer's price trie; `alphabet` (U,) holds the token ids whose logits it needs.

    Raises ConfigError when `kind` compares digits and the tokenizer does not write numbers digit by digit.
    """

    def __init__(self, kind: str, trie: PriceTrie, tokenizer: Any) -> None:
        self.kind, self._trie = kind, trie
        self.alphabet = torch.from_numpy(trie.alphabet)
        self._node_of = {int(price): node for node, price in enumerate(trie.prices) if price}
        self._log_prices = np.log(np.maximum(trie.prices, 1))
        if kind != "wasserstein":
            words = [str(word).strip(" ▁") for word in tokenizer.batch_decode(trie.alphabet[:-1, None].tolist())]
            many = next((word for word in words if len(word) > 1 or (word and word not in "0123456789")), None)
            if many is not None:
                raise ConfigError(
                    f"text_loss: {kind!r} compares digits, and this tokenizer has {many!r} as one token of a price; "
                    "use text_loss='wasserstein', which takes any tokenizer"
                )
            # A token that is no digit (Llama 2 begins numbers with one for a space) is no step of this loss.
            self._digits = np.array([float(word) if word else np.nan for word in words] + [np.nan])
        self.costs = lru_cache(maxsize=_TABLES)(self._costs)

    def _costs(self, price: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """For the answer `price`: which of its tokens are steps (S,), their places in the alphabet (S,), costs (S, U).

        A cost is infinite where the token cannot come; those of "number_mse" are signed.
        """
        trie = self._trie
        path = trie.paths[self._node_of[price]]
        path = path[path >= 0]
        right = np.append(trie.alphabet_index[path[1:]], len(trie.alphabet) - 1)  # the last step is the end
        if self.kind == "wasserstein":
            tables = [self._places_below(int(node), price) for node in path]
            for table, slot in zip(tables, right, strict=True):
                table[slot] = 0.0  # the cost after the right token is counted at the next step
            return np.arange(len(right)), right, np.array(tables, dtype=np.float32)
        steps = np.flatnonzero(np.isfinite(self._digits[right]))
        distances = self._digits - self._digits[right[steps], None]
        if self.kind == "number":
            distances = np.abs(distances)
        return steps, right[steps], np.where(np.isnan(distances), np.inf, distances).astype(np.float32)

    def _places_below(self, node: int, price: int) -> NDArray[np.float64]:
        """The mean |ln m - ln price| (U,) over the prices m that begin with the tokens of `node`, then each token."""
        trie = self._trie
        costs = np.full(len(trie.alphabet), np.inf)
        distances = np.abs(self._log_prices - np.log(price))
        if trie.prices[node]:
            costs[-1] = distances[node]
        if trie.children[node]:
            kin = trie.paths[:, trie.depths[node] + 1]
            below = (trie.prices > 0) & (kin >= 0)
            first = trie.first_child[node]
            children = np.arange(first, first + trie.children[node])
            sums = np.bincount(kin[below], distances[below], len(kin))[children]
            costs[trie.alphabet_index[children]] = sums / np.bincount(kin[below], minlength=len(kin))[children]
        return costs

    def batch(self, prices: list[int]) -> dict[str, Tensor]:
        """Tables for N whole-dollar prices: `steps`, `right` int64 (N, S), `costs` fp32 (N, S, U), `counts` int64 (N,).

        Steps beyond a text's `counts` are padding: they repeat token 0 at no cost.
        """
        tables = [self.costs(price) for price in prices]
        counts = [len(steps) for steps, _, _ in tables]
        most, width = max(counts), len(self.alphabet)
        steps, right = np.zeros((len(prices), most), np.int64), np.zeros((len(prices), most), np.int64)
        costs = np.zeros((len(prices), most, width), np.float32)
        for row, (which, slots, table) in enumerate(tables):
            steps[row, : len(which)], right[row, : len(which)], costs[row, : len(which)] = which, slots, table
        found = {"steps": steps, "right": right, "costs": costs, "counts": np.array(counts)}
        return {name: torch.from_numpy(values) for name, values in found.items()}


def expected_cost(kind: str, logits: Tensor, right: Tensor, costs: Tensor, counts: Tensor) -> Tensor:
    """The loss (N,) of each text, from logits (N, S, U) and what `NumberLoss.batch` gives.

    Log dollars for "wasserstein"; digits, a mean over the steps of a text, for "number", squared for "number_mse".
    """
    allowed = costs.isfinite()
    p = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    expected = (p * costs.masked_fill(~allowed, 0.0)).sum(-1)  # (N, S)
    if kind == "wasserstein":
        onwards = p.gather(-1, right[..., None]).squeeze(-1).cumprod(-1)
        reached = torch.cat([torch.ones_like(onwards[:, :1]), onwards[:, :-1]], dim=1)
        return (reached * expected).sum(-1)
    return (expected if kind == "number" else expected.square()).sum(-1) / counts
