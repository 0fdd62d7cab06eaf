"""The prices as a tokenizer writes them: a trie of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastprice.common.arrays import FloatArray, IntArray
from fastprice.errors import DataError
from fastprice.prompts.template import TEXT, Form

__all__ = ["PriceTrie"]


@dataclass(frozen=True, eq=False)
class PriceTrie:
    """The token sequences of the prices 1 to `max_price`, as a trie of M nodes; node 0 is the prompt's end.

    Nodes are in breadth-first order and the children of a node are neighbors: `first_child[n]` to
    `first_child[n] + children[n]`. `slots` (M,) says where a node's token stands in `alphabet` (U,), whose last entry
    is the token that ends a price. `paths` (M, D + 1) holds a node's ancestors by depth and itself, then -1. `prices`
    (M,) is 0 where the tokens so far are no price, and `lowest` (M,) the lowest price at or under a node, `log_lowest`
    its natural logarithm, `highest` the highest price. `middle_leaf` (M,) is the middle one of the children of a node
    that have no children, 0 where there is none.
    """

    tokens: IntArray
    slots: IntArray
    alphabet: IntArray
    depths: IntArray
    paths: IntArray
    prices: IntArray
    lowest: IntArray
    log_lowest: FloatArray
    highest: int
    first_child: IntArray
    children: IntArray
    middle_leaf: IntArray

    @classmethod
    def of(cls, tokenizer: Any, max_price: int, form: Form = TEXT) -> PriceTrie:
        """The trie of `tokenizer`; DataError if it has no end token or writes two prices alike."""
        end = form.end_id(tokenizer)
        spelt = tokenizer([str(price) for price in range(1, max_price + 1)], add_special_tokens=False)["input_ids"]
        price_of: dict[tuple[int, ...], int] = {}
        for price, ids in enumerate(spelt, start=1):
            other = price_of.setdefault(tuple(ids), price)
            if other != price or not ids:
                raise DataError(f"the tokenizer writes ${other} and ${price} alike, so no price can be read from it")
        prefixes = {ids[:length] for ids in price_of for length in range(len(ids) + 1)}
        nodes = sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
        number = {prefix: index for index, prefix in enumerate(nodes)}
        depths = np.array([len(prefix) for prefix in nodes])
        paths = np.full((len(nodes), depths.max() + 1), -1)
        for index, prefix in enumerate(nodes):
            paths[index, : len(prefix) + 1] = [number[prefix[:length]] for length in range(len(prefix) + 1)]
        parents = paths[np.arange(1, len(nodes)), depths[1:] - 1]
        tokens = np.array([prefix[-1] if prefix else -1 for prefix in nodes])
        alphabet = np.unique(tokens[1:])
        prices = np.array([price_of.get(prefix, 0) for prefix in nodes])
        lowest = np.full(len(nodes), max_price)
        for index in np.flatnonzero(prices):
            line = paths[index, : depths[index] + 1]
            lowest[line] = np.minimum(lowest[line], prices[index])
        first_child = 1 + np.searchsorted(parents, np.arange(len(nodes)))
        children = np.bincount(parents, minlength=len(nodes))
        middle_leaf = np.zeros(len(nodes), np.int64)
        for index, (first, count) in enumerate(zip(first_child, children, strict=True)):
            leaves = first + np.flatnonzero(children[first : first + count] == 0)
            if len(leaves):
                middle_leaf[index] = leaves[len(leaves) // 2]
        return cls(
            tokens=tokens,
            slots=np.searchsorted(alphabet, tokens),
            alphabet=np.append(alphabet, end),
            depths=depths,
            paths=paths,
            prices=prices,
            lowest=lowest,
            log_lowest=np.log(lowest),
            highest=max_price,
            first_child=first_child,
            children=children,
            middle_leaf=middle_leaf,
        )

    def within(self, count: int) -> int:
        """How many nodes the first levels have that hold at most `count` nodes (at least 1: the root) together."""
        whole_levels = np.cumsum(np.bincount(self.depths))
        return int(whole_levels[whole_levels <= count][-1])
