"""From a language model to prices: the whole distribution over whole dollars, or greedy text.

The text of the price n is str(n) and an end: the end-of-sequence token, or "}" where JSON is asked for
(`fastprice.prompts.encode_row` trains on exactly that). So its probability after a prompt is

    p(n) = p(t1 | prompt) p(t2 | prompt t1) ... p(end | prompt t1 ... tD),     t1 ... tD: the tokens of str(n).

The tokens come from the tokenizer itself, every price encoded once, and form a trie: one token deep where 0-999 are
tokens of their own (Llama 3), three where digits are (Llama 2, Qwen, Gemma), anything between for other merges. A batch
of prompts takes a few forward passes over it:

0. The tokens that all prompts begin with (the question) are computed once, for all batches.
1. trunk: the rest of each prompt, with the first levels of the trie after it: as many whole levels as fit in 16 nodes
   (all nine first digits cost less than a pass to find out which of them matter).
2. inner nodes below the trunk (the pairs of digits), one pass a level; none where a price is one token.
3. ends: full-length prices, which no further token extends within `max_price`, one or two passes.

How a model is asked, and what its passes hold, is in `fastprice.reading`; here is what is asked. Of each level a
systematic sample: the nodes of an item stand in order of price, and one is asked in every stretch of `tolerance` of the
probability of writing a price's digits (so every node with that share is); so is the likeliest. What follows a node
that was not asked lies between what follows its neighbours that were, in the log of price. No price under a node not
asked can be off by `tolerance`; the cumulative distribution is off by far less, because a sample has no side to err on.
Full-length prices, the widest level by far, need only p(end), which a trained model is sure of: a coarser sample is
asked first, and where all of it end with 0.9 or more, only those whose share times 8 (1 - p(end)) is `tolerance` after
it, which is an estimate of how far off they are and no bound. `tolerance=0` asks everything: p(n) exactly. The default
is for distributions to keep; estimates and intervals need far less (`QUICK`).

What QUICK costs in accuracy. On 64 unseen items each of two nano models, tuned on real pc_parts and on the synthetic
catalogue, against every price scored: the cumulative distribution is off by at most 0.3 and 1.6 % at its worst price on
average, 0.9 and 3.4 % at most; the mean errors of the five estimates differ by at most $0.4 (errors of $27 to $149).
Mean error of the median $27.07 and $109.61 (exact: $27.05 and $109.31). At 1e-4 no price was off
by more than 1.1e-4. The rule before, every node with a share of 2 % and else the mean after its siblings, asked three
times as many and was off by up to 12 % at the median.

That was measured once; each run of the prediction benchmark holds the median to QUICK
(`fastprice.bench.prediction.check_prediction`). What it costs in time is in docs/LOG.md beside `generate`.

Legend: B items of a batch, M nodes of the trie, U its tokens and the end, N pairs (item, node), D depth. Log
probabilities are natural, float64 on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprice.distribution import PriceDistribution
from fastprice.errors import ConfigError, DataError
from fastprice.prompts import TEXT, Form
from fastprice.reading import Reader, Reading, reader_of
from fastprice.trie import FloatArray, IntArray, PriceTrie
from fastprice.writing import write_greedily

__all__ = ["QUICK", "PriceDecoder", "PriceTrie", "greedy_prices", "price_distributions"]

QUICK = 0.125  # tolerance for point estimates

_TRUNK = 16  # nodes
_NOTHING = -700.0  # exp of it is hardly above 0
_ENDS_APART = 0.25  # of probability: how far apart the first full-length prices are that are asked for their end
_SURE = 0.9  # p(end) of all of them
_PASS_TOKENS = {"cpu": 64, "cuda": 2048}  # a pass costs about as much as this many tokens more in another
_LOGITS = 2**25  # elements upcast to fp32 at once: 128 MiB
_ANSWER_TOKENS = 8  # "$" is in the prompt; seven digits and an end


class PriceDecoder:
    """A model made ready to say prices: the trie of them, and where it fits a dense copy of the weights.

    Made once, it serves any number of calls, until the model trains on: what it copied is then out of date. Making one
    takes about as long as a batch.
    """

    def __init__(self, reader: Reader, config: Any) -> None:
        self.reader, self.trie, self.config = reader, reader.trie, config

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, *, max_price: int = 999, form: Form = TEXT, masks: bool = True
    ) -> PriceDecoder:
        """Takes the fastest reader that the model and the free memory allow (`fastprice.reading`).

        form   in which prompts ask for the price, and so how it ends
        masks  whether the model's forward pass takes a mask for each token

        Raises ConfigError for an impossible `max_price` (dollars) and for a model without masks of which there is no
        dense copy, DataError for a tokenizer that cannot spell the prices.
        """
        if max_price < 1:
            raise ConfigError(f"max_price ({max_price}) must be at least 1")
        reader = reader_of(model, PriceTrie.of(tokenizer, max_price, form), masks=masks)
        if reader is None:
            raise ConfigError("this model gives no distributions here: it takes no masks, and has no dense copy")
        return cls(reader, model.config)

    @torch.inference_mode()
    def distributions(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        tolerance: float = 1e-4,
        batch_size: int = 64,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[PriceDistribution]:
        """See `price_distributions`."""
        if batch_size < 1 or not 0.0 <= tolerance < 1.0:
            raise ConfigError(
                f"batch_size ({batch_size}) must be at least 1, and tolerance ({tolerance}) from 0 to below 1"
            )
        if not prompts:
            return []
        if not all(len(prompt) for prompt in prompts):
            raise DataError(
                "a prompt without tokens has no next token to predict; start it with the tokenizer's bos token"
            )
        _check_window(self.config, int(max(map(len, prompts)) + self.trie.depths.max()))
        distributions: dict[int, PriceDistribution] = {}
        self.reader.begin(prompts)
        for batch in self.reader.batches(prompts, batch_size):
            walk = _Walk(self.trie, self.reader.read([prompts[index] for index in batch]), tolerance)
            distributions.update(zip(batch, walk(), strict=True))
            if on_batch:
                on_batch(len(distributions))
        return [distributions[index] for index in range(len(prompts))]


def price_distributions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_price: int = 999,
    tolerance: float = 1e-4,
    batch_size: int = 64,
    form: Form = TEXT,
    on_batch: Callable[[int], None] | None = None,
) -> list[PriceDistribution]:
    """p(price | prompt) over whole dollars from 1 to `max_price`, for each prompt (token ids, at least one).

    tolerance   how finely the trie is walked, see the module; 0 scores every price
    batch_size  prompts computed at once, at most
    form        in which prompts ask for the price, and so how it ends
    on_batch    is told how many prompts are done

    A model that gives no price any probability, or whose logits are not numbers, yields an empty distribution. Raises
    ConfigError for impossible settings, DataError for an empty prompt or a tokenizer that cannot spell the prices.
    """
    decoder = PriceDecoder.of(model, tokenizer, max_price=max_price, form=form)
    return decoder.distributions(prompts, tolerance=tolerance, batch_size=batch_size, on_batch=on_batch)


@dataclass(frozen=True)
class _Nodes:
    """N pairs: `items` (N,) of the batch, `nodes` (N,) of the trie, `log_p` (N,) of what each stands for."""

    items: IntArray
    nodes: IntArray
    log_p: FloatArray

    def __getitem__(self, chosen: NDArray[np.bool_] | IntArray) -> _Nodes:
        return _Nodes(self.items[chosen], self.nodes[chosen], self.log_p[chosen])

    def __add__(self, other: _Nodes) -> _Nodes:
        return _Nodes(
            np.concatenate([self.items, other.items]),
            np.concatenate([self.nodes, other.nodes]),
            np.concatenate([self.log_p, other.log_p]),
        )

    def __len__(self) -> int:
        return len(self.items)


class _Walk:
    """Walks the trie for a batch whose prompts are computed."""

    def __init__(self, trie: PriceTrie, reading: Reading, tolerance: float) -> None:
        self.trie, self.reading, self.tolerance = trie, reading, tolerance

    def __call__(self) -> list[PriceDistribution]:
        scores = self.reading.scores
        batch, trunk = scores.shape[:2]
        level = _Nodes(np.arange(batch), np.zeros(batch, np.int64), np.zeros(batch))
        found = leaves = level[np.zeros(batch, bool)]
        while len(level):
            if level.nodes[0] < trunk:
                prices, children = self._expand(level, scores[level.items, level.nodes])
            else:
                prices, children = self._expand(level, self._inner(level, self._mass(batch, found, leaves, level)))
            found += prices
            full = self.trie.children[children.nodes] == 0
            in_trunk = children.nodes < trunk
            leaves += children[full & ~in_trunk]
            level = self._by_price(children[~full | in_trunk])
        leaves = self._by_price(leaves)
        return self._distributions(batch, found + self._ends(leaves, self._mass(batch, found)))

    def _expand(self, parents: _Nodes, scores: FloatArray) -> tuple[_Nodes, _Nodes]:
        """(Nodes that are prices, with p(price)), (children, with p(reaching them)); scores (N, U) after `parents`."""
        trie = self.trie
        prices = _Nodes(parents.items, parents.nodes, parents.log_p + scores[:, -1])[trie.prices[parents.nodes] > 0]
        counts = trie.children[parents.nodes]
        parent = np.repeat(np.arange(len(parents)), counts)
        sibling = np.arange(len(parent)) - np.repeat(np.cumsum(counts) - counts, counts)
        nodes = trie.first_child[parents.nodes[parent]] + sibling
        children = _Nodes(parents.items[parent], nodes, parents.log_p[parent] + scores[parent, trie.slots[nodes]])
        return prices[np.isfinite(prices.log_p)], children[np.isfinite(children.log_p)]

    def _inner(self, level: _Nodes, mass: FloatArray) -> FloatArray:
        """Log probabilities (N, U) after the nodes of a level: asked, or between those of its neighbours that were."""
        asked = self._sampled(level, np.exp(level.log_p) / mass[level.items], self.tolerance)
        scores = np.empty((len(level), len(self.trie.alphabet)))
        scores[asked] = self._ask(level[asked])
        scores[~asked] = self._between(level, asked, scores[asked])
        return scores

    def _ends(self, leaves: _Nodes, found: FloatArray) -> _Nodes:
        """p(price) of the full-length prices `leaves`: asked where it matters, else between their neighbours'."""
        share = np.exp(leaves.log_p) / (found + self._mass(len(found), leaves))[leaves.items]
        asked = self._sampled(leaves, share, min(max(_ENDS_APART, 8 * self.tolerance), 1.0))
        end = np.empty((len(leaves), 1))
        end[asked] = self._ask(leaves[asked])[:, -1:]
        end[~asked] = self._between(leaves, asked, end[asked])
        # p(n) can be off by all of its share; by eight times what the asked lack, where those end almost surely.
        ends = np.minimum(np.exp(end[:, 0]), 1.0)
        least = np.ones(len(found))
        np.minimum.at(least, leaves.items[asked], ends[asked])
        sure = (least >= _SURE)[leaves.items]
        unsure = np.where(sure, share * 8 * (1 - ends) >= self.tolerance, self._sampled(leaves, share, self.tolerance))
        unsure &= ~asked
        end[unsure] = self._ask(leaves[unsure])[:, -1:]
        asked |= unsure
        end[~asked] = self._between(leaves, asked, end[asked])
        return _Nodes(leaves.items, leaves.nodes, leaves.log_p + end[:, 0])

    def _by_price(self, nodes: _Nodes) -> _Nodes:
        """The same by item, then by the lowest price that begins with a node's tokens."""
        key = nodes.items * (self.trie.lowest.max() + 1) + self.trie.lowest[nodes.nodes]
        return nodes[np.argsort(key, kind="stable")]

    def _sampled(self, nodes: _Nodes, share: FloatArray, apart: float) -> NDArray[np.bool_]:
        """Marks a sample of the nodes (N,), which are in order: one in every stretch of `apart` of an item's share.

        A node with a share of `apart` is in the sample for sure. So is the likeliest of each item.
        """
        if not apart or not len(nodes):
            return np.ones(len(nodes), bool)
        first = np.flatnonzero(np.diff(nodes.items, prepend=-1))
        which = np.repeat(np.arange(len(first)), np.diff(first, append=len(nodes)))
        upto = np.cumsum(share)
        before = upto - share
        begin = before[first][which]
        sampled: NDArray[np.bool_] = np.floor((upto - begin) / apart + 0.5) > np.floor((before - begin) / apart + 0.5)
        largest = np.flatnonzero(share == np.maximum.reduceat(share, first)[which])
        sampled[largest[np.flatnonzero(np.diff(which[largest], prepend=-1))]] = True
        return sampled

    def _between(self, nodes: _Nodes, asked: NDArray[np.bool_], scores: FloatArray) -> FloatArray:
        """Log probabilities after the nodes not asked, from `scores` (asked, U) after those that were, all in order.

        Probabilities are interpolated between the neighbours of an item, in the log of the lowest price under a node.
        """
        log_price = np.log(self.trie.lowest[nodes.nodes])
        known, wanted = np.flatnonzero(asked), np.flatnonzero(~asked)
        place = np.cumsum(asked)[wanted]  # of the asked stand before it
        item, left, right = nodes.items[wanted], np.maximum(place - 1, 0), np.minimum(place, len(known) - 1)
        right = np.where(nodes.items[known[right]] == item, right, left)
        left = np.where(nodes.items[known[left]] == item, left, right)
        low, high = log_price[known[left]], log_price[known[right]]
        weight = ((log_price[wanted] - low) / np.where(high > low, high - low, 1.0))[:, None]
        probabilities = np.exp(scores)
        with np.errstate(divide="ignore"):
            between: FloatArray = np.log((1 - weight) * probabilities[left] + weight * probabilities[right])
        return between

    def _ask(self, asked: _Nodes) -> FloatArray:
        return self.reading.ask(asked.items, asked.nodes)

    def _distributions(self, batch: int, found: _Nodes) -> list[PriceDistribution]:
        found = self._by_price(found[found.log_p > _NOTHING])
        prices, probabilities = self.trie.prices[found.nodes].astype(np.float64), np.exp(found.log_p)
        bounds = np.searchsorted(found.items, np.arange(1, batch))
        return [
            PriceDistribution(*of_one)
            for of_one in zip(np.split(prices, bounds), np.split(probabilities, bounds), strict=True)
        ]

    def _mass(self, batch: int, *nodes: _Nodes) -> FloatArray:
        """Probability of all `nodes` of each item (B,), never quite 0."""
        mass = np.zeros(batch)
        for some in nodes:
            mass += np.bincount(some.items, np.exp(some.log_p), batch)
        return np.maximum(mass, np.finfo(float).tiny)


def _check_window(config: Any, tokens: int) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and tokens > window and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ConfigError(
            f"a prompt and its price take {tokens} tokens, more than the {window} that layers of this base model look "
            "back: lower max_tokens"
        )


def greedy_prices(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    form: Form = TEXT,
    on_batch: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """The price a model writes after each prompt (token ids) in its `form`, in dollars; NaN where it writes none.

    Prompts are sorted by length, so that batches hold little padding; `on_batch` is told how many are done.
    """
    guesses = np.full(len(prompts), np.nan)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = write_greedily(model, tokenizer, [prompts[index] for index in batch], most=_ANSWER_TOKENS)
        for index, answer in zip(batch, tokenizer.batch_decode(rows, skip_special_tokens=True), strict=True):
            price = form.read(answer)
            guesses[index] = np.nan if price is None else price
        if on_batch:
            on_batch(start + len(batch))
    return guesses
