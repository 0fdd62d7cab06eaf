"""`TrieWalk`: the probabilities of all prices after each prompt of a batch, from a sample of the price trie's nodes.

The walk goes down level by level. Of each level a systematic sample is scored: the nodes of an item are put in order of
price, and one of them is taken in every stretch of `tolerance` of the probability of writing a price's digits (so every
node with that share is taken), and the likeliest one always. What follows an unscored node is interpolated between its
scored neighbors, in the log of price. No price under an unscored node can be off by `tolerance`; the cumulative
distribution is off by far less, because a systematic sample has no side to err on.

Full-length prices, by far the widest level, need only p(end), which a trained model is sure of. So a coarser sample of
them is scored first, together with the inner nodes where there are any. Where every p(end) in it is 0.9 or more, others
are scored only if their share times 8 (1 - p(end)) is at least `tolerance`: an estimate of their error, and no bound.

Legend: B items of a batch, M nodes of the trie, U tokens of its alphabet, N pairs (item, node). Probabilities are
float64 on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastprice.common.arrays import FloatArray, IntArray
from fastprice.inference.price_distribution import PriceDistribution
from fastprice.inference.price_trie import PriceTrie
from fastprice.inference.scorers.scorer import ScoringSession

__all__ = ["TrieWalk"]

_END_SPACING = 0.25  # of probability: the coarser spacing of the first full-length prices whose p(end) is scored
_SURE_END = 0.9  # p(end) of all of them, from which on the others are taken to end as surely


@dataclass(frozen=True)
class _Nodes:
    """N pairs: `items` (N,) of the batch, `nodes` (N,) of the trie, and a probability `p` (N,) of each."""

    items: IntArray
    nodes: IntArray
    p: FloatArray

    def __getitem__(self, chosen: NDArray[np.bool_] | IntArray | slice) -> _Nodes:
        return _Nodes(self.items[chosen], self.nodes[chosen], self.p[chosen])

    def __add__(self, other: _Nodes) -> _Nodes:
        return _Nodes(
            np.concatenate([self.items, other.items]),
            np.concatenate([self.nodes, other.nodes]),
            np.concatenate([self.p, other.p]),
        )

    def __len__(self) -> int:
        return len(self.items)


class TrieWalk:
    """One walk over the trie, for the batch of prompts of a scoring session; `tolerance` 0 scores every node."""

    def __init__(self, trie: PriceTrie, session: ScoringSession, tolerance: float) -> None:
        self.trie, self.session, self.tolerance = trie, session, tolerance
        self.end_spacing = min(max(_END_SPACING, 8 * tolerance), 1.0)

    def distributions(self) -> list[PriceDistribution]:
        """p(price | prompt) of each of the B prompts."""
        after_trunk = np.exp(self.session.trunk_scores)
        batch, trunk = after_trunk.shape[:2]
        level = _Nodes(np.arange(batch), np.zeros(batch, np.int64), np.ones(batch))
        found = leaves = ends = level[:0]
        while len(level):
            if level.nodes[0] < trunk:
                prices, children = self._expand(level, after_trunk[level.items, level.nodes])
            else:
                after, sampled_ends = self._score_level(level, self._mass(batch, found, leaves, level))
                prices, children = self._expand(level, after)
                ends += sampled_ends
            found += prices
            is_leaf = (self.trie.children[children.nodes] == 0) & (children.nodes >= trunk)
            leaves += children[is_leaf]
            level = self._by_price(children[~is_leaf])
        leaves = self._by_price(leaves)
        return self._as_distributions(batch, found + self._score_ends(leaves, ends, self._mass(batch, found)))

    def _expand(self, parents: _Nodes, after: FloatArray) -> tuple[_Nodes, _Nodes]:
        """(Parents that are prices, with p(price); children, with p(reaching them)); `after` (N, U) the parents."""
        trie = self.trie
        prices = _Nodes(parents.items, parents.nodes, parents.p * after[:, -1])
        prices = prices[(trie.prices[parents.nodes] > 0) & (prices.p > 0)]
        counts = trie.children[parents.nodes]
        parent = np.repeat(np.arange(len(parents)), counts)
        nodes = np.arange(len(parent)) + (trie.first_child[parents.nodes] - np.cumsum(counts) + counts)[parent]
        children = _Nodes(parents.items[parent], nodes, parents.p[parent] * after[parent, trie.alphabet_index[nodes]])
        return prices, children[children.p > 0]

    def _score_level(self, level: _Nodes, mass: FloatArray) -> tuple[FloatArray, _Nodes]:
        """Probabilities (N, U) after the nodes of an inner level: scored, or interpolated between scored neighbors.

        In the same pass, p(end) of some full-length prices, one under each of a few nodes.
        """
        share = level.p / mass[level.items]
        with_end = self._sample(level, share, self.end_spacing) & (self.trie.middle_leaf[level.nodes] > 0)
        scored = self._sample(level, share, self.tolerance) | with_end
        ends = _Nodes(level.items[with_end], self.trie.middle_leaf[level.nodes[with_end]], share[with_end])
        probabilities = self._score(level[scored] + ends)
        count = len(probabilities) - len(ends)
        after = self._interpolate(level, scored, probabilities[:count])
        return after, _Nodes(ends.items, ends.nodes, probabilities[count:, -1])

    def _score_ends(self, leaves: _Nodes, ends: _Nodes, found: FloatArray) -> _Nodes:
        """p(price) of the full-length prices `leaves`: scored where it matters, else interpolated.

        ends   full-length prices whose p(end) is known, in any order
        found  probability (B,) of the prices of each item that are no leaves
        """
        trie = self.trie
        share = leaves.p / (found + self._mass(len(found), leaves))[leaves.items]
        key = leaves.items * len(trie.tokens) + leaves.nodes
        known = np.full(len(found) * len(trie.tokens), np.nan)
        known[ends.items * len(trie.tokens) + ends.nodes] = ends.p
        p_end = known[key]
        scored = ~np.isnan(p_end)
        # The ends of prices of one length say nothing about those of another.
        kind = leaves.items * trie.paths.shape[1] + trie.depths[leaves.nodes]
        kind_known = np.zeros(len(found) * trie.paths.shape[1], bool)
        kind_known[kind[scored]] = True
        self._score_missing(leaves, self._sample(leaves, share, self.end_spacing) & ~kind_known[kind], p_end, scored)
        # p(n) can be off by all of its share; where the scored ends are sure, by about eight times what they lack.
        estimate = self._interpolate(leaves, scored, p_end[scored, None])[:, 0]
        least = np.ones(len(found))
        np.minimum.at(least, leaves.items[scored], estimate[scored])
        sure = (least >= _SURE_END)[leaves.items]
        matters = sure & (share * 8 * (1 - estimate) >= self.tolerance)
        if not sure.all():
            matters |= ~sure & self._sample(leaves, share, self.tolerance)
        if (matters & ~scored).any():
            self._score_missing(leaves, matters & ~scored, p_end, scored)
            estimate = self._interpolate(leaves, scored, p_end[scored, None])[:, 0]
        return _Nodes(leaves.items, leaves.nodes, leaves.p * estimate)

    def _score_missing(
        self, leaves: _Nodes, missing: NDArray[np.bool_], p_end: FloatArray, scored: NDArray[np.bool_]
    ) -> None:
        """Writes p(end) of the `missing` leaves into `p_end` (N,) and marks them in `scored` (N,)."""
        if missing.any():
            p_end[missing] = self._score(leaves[missing])[:, -1]
            scored |= missing

    def _score(self, nodes: _Nodes) -> FloatArray:
        """Probabilities (N, U) after nodes, by the model."""
        probabilities: FloatArray = np.minimum(np.exp(self.session.score(nodes.items, nodes.nodes)), 1.0)
        return probabilities

    def _by_price(self, nodes: _Nodes) -> _Nodes:
        """The same nodes sorted by item, then by the lowest price that begins with a node's tokens."""
        key = nodes.items * (self.trie.highest + 1) + self.trie.lowest[nodes.nodes]
        return nodes[np.argsort(key, kind="stable")]

    def _sample(self, nodes: _Nodes, share: FloatArray, spacing: float) -> NDArray[np.bool_]:
        """Marks a systematic sample of the nodes (N,), which are in order: one in every `spacing` of an item's share.

        A node with a share of `spacing` is always in the sample; so is the likeliest of each item.
        """
        if not spacing or not len(nodes):
            return np.ones(len(nodes), bool)
        first = _first_of_runs(nodes.items)
        counts = np.append(first[1:], len(nodes)) - first
        upto = np.cumsum(share)
        upto -= np.repeat((upto - share)[first], counts)  # within the item
        sampled: NDArray[np.bool_] = np.floor(upto / spacing + 0.5) > np.floor((upto - share) / spacing + 0.5)
        largest = np.flatnonzero(share == np.repeat(np.maximum.reduceat(share, first), counts))
        sampled[largest[_first_of_runs(nodes.items[largest])]] = True
        return sampled

    def _interpolate(self, nodes: _Nodes, scored: NDArray[np.bool_], probabilities: FloatArray) -> FloatArray:
        """Probabilities (N, U) after all nodes, from those (scored, U) after the scored ones, all in order.

        The others are interpolated between the neighbors of the same item, in the log of the lowest price under a node.
        """
        known = np.flatnonzero(scored)
        items = nodes.items[known]
        upto = np.cumsum(scored)
        # The scored neighbors; a scored node itself.
        before, after = np.maximum(upto - scored - 1, 0), np.minimum(upto - scored, len(known) - 1)
        right = np.where(items[after] == nodes.items, after, before)
        left = np.where(items[before] == nodes.items, before, right)
        log_price = self.trie.log_lowest[nodes.nodes]
        low, high = log_price[known[left]], log_price[known[right]]
        weight = np.where(high > low, (log_price - low) / np.where(high > low, high - low, 1.0), 1.0)[:, None]
        between: FloatArray = weight * probabilities[right] + (1 - weight) * probabilities[left]
        return between

    def _as_distributions(self, batch: int, found: _Nodes) -> list[PriceDistribution]:
        found = self._by_price(found[found.p > 0])
        prices = self.trie.prices[found.nodes].astype(np.float64)
        bounds = np.searchsorted(found.items, np.arange(1, batch))
        return [
            PriceDistribution(*of_one)
            for of_one in zip(np.split(prices, bounds), np.split(found.p, bounds), strict=True)
        ]

    def _mass(self, batch: int, *nodes: _Nodes) -> FloatArray:
        """The probability of all `nodes` of each item (B,), never quite 0."""
        mass = sum((np.bincount(some.items, some.p, batch) for some in nodes), np.zeros(batch))
        return np.maximum(mass, np.finfo(float).tiny)


def _first_of_runs(items: IntArray) -> IntArray:
    """The index of the first of each run of equal `items` (N,)."""
    begins = np.ones(len(items), bool)
    np.not_equal(items[1:], items[:-1], out=begins[1:])
    return np.flatnonzero(begins)
