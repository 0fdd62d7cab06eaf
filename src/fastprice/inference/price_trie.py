"""`PriceTrie`: the token sequences of all whole-dollar prices, as a given tokenizer writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastprice.common.arrays import FloatArray, IntArray
from fastprice.errors import DataError
from fastprice.prompts.template import TEXT, AnswerFormat

__all__ = ["PriceTrie"]


@dataclass(frozen=True, eq=False)
class PriceTrie:
    """The token sequences of the prices 1 to `highest`: a trie of M nodes of depth 0 to D; node 0 is the prompt's end.

    Nodes are in breadth-first order, and the children of a node are neighbors. Arrays are int64 but for `log_lowest`.

    tokens          (M,) the token of a node; -1 for the root
    alphabet        (U,) the distinct tokens of prices, ascending, and last the token that ends a price
    alphabet_index  (M,) the index of a node's token in `alphabet`
    depths          (M,) number of tokens from the root
    paths           (M, D + 1) the ancestors of a node by depth, the root first, then the node itself, then -1
    prices          (M,) dollars; 0 where the tokens so far are no price
    lowest          (M,) the lowest price at or under a node, dollars; log_lowest: its natural logarithm, float64
    highest         the highest price, dollars
    first_child     (M,) the first child of a node; children: how many it has
    middle_leaf     (M,) the middle one of the childless children of a node; 0 where there is none
    """

    tokens: IntArray
    alphabet_index: IntArray
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
    def of(cls, tokenizer: Any, max_price: int, form: AnswerFormat = TEXT) -> PriceTrie:
        """The trie of the prices 1 to `max_price` dollars under `tokenizer`, ended as `form` ends a price.

        Raises DataError for a tokenizer without an end token, or one that writes two prices with the same tokens.
        """
        end = form.end_id(tokenizer)
        sequences = tokenizer([str(price) for price in range(1, max_price + 1)], add_special_tokens=False)["input_ids"]
        price_of: dict[tuple[int, ...], int] = {}
        for price, ids in enumerate(sequences, start=1):
            other = price_of.setdefault(tuple(ids), price)
            if other != price or not ids:
                raise DataError(
                    f"the tokenizer writes ${other} and ${price} with the same tokens, so no price can be read from "
                    "it; use another base model"
                )
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
            path = paths[index, : depths[index] + 1]
            lowest[path] = np.minimum(lowest[path], prices[index])
        first_child = 1 + np.searchsorted(parents, np.arange(len(nodes)))
        children = np.bincount(parents, minlength=len(nodes))
        middle_leaf = np.zeros(len(nodes), np.int64)
        for index, (first, count) in enumerate(zip(first_child, children, strict=True)):
            leaves = first + np.flatnonzero(children[first : first + count] == 0)
            if len(leaves):
                middle_leaf[index] = leaves[len(leaves) // 2]
        return cls(
            tokens=tokens,
            alphabet_index=np.searchsorted(alphabet, tokens),
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

    def nodes_within(self, count: int) -> int:
        """The number of nodes in the first levels that together have at most `count` nodes (at least 1: the root)."""
        whole_levels = np.cumsum(np.bincount(self.depths))
        return int(whole_levels[whole_levels <= count][-1])
