"""From a language model to prices: the whole distribution over whole dollars, or greedy text.

The text of the price n is str(n) and an end: the end-of-sequence token, or "}" where JSON is asked for
(`fastprice.prompts.template.encode_row` trains on exactly that). So its probability after a prompt is

    p(n) = p(t1 | prompt) p(t2 | prompt t1) ... p(end | prompt t1 ... tD),     t1 ... tD: the tokens of str(n).

The tokens come from the tokenizer itself, every price encoded once, and form a trie: one token deep where 0-999 are
tokens of their own (Llama 3), three where digits are (Llama 2, Qwen, Gemma), anything between for other merges. A batch
of prompts takes a few forward passes over it:

0. The tokens that all prompts begin with (the question) are computed once, for all batches.
1. trunk: the rest of each prompt, with the first levels of the trie after it: as many whole levels as fit in 16 nodes
   (all nine first digits cost less than a pass to find out which of them matter).
2. inner nodes below the trunk (the pairs of digits), one pass a level, and with them a few full-length prices, which no
   further token extends within `max_price`: the middle one under each of some nodes. None where a price is one token.
3. ends: full-length prices that p(end) is still wanted of, one or two passes, or none.

How a model is asked, and what its passes hold, is in `fastprice.inference.scorers.scorer`; here is what is asked. Of each level a
systematic sample: the nodes of an item stand in order of price, and one is asked in every stretch of `tolerance` of the
probability of writing a price's digits (so every node with that share is); so is the likeliest. What follows a node
that was not asked lies between what follows its neighbors that were, in the log of price. No price under a node not
asked can be off by `tolerance`; the cumulative distribution is off by far less, because a sample has no side to err on.
Full-length prices, the widest level by far, need only p(end), which a trained model is sure of: a coarser sample is
asked first, with the inner nodes where there are such, and where all of it end with 0.9 or more, only those are asked
whose share times 8 (1 - p(end)) is `tolerance`, which is an estimate of how far off they are and no bound.
`tolerance=0` asks everything: p(n) exactly. The default is for distributions to keep; estimates and intervals need far
less (`QUICK`).

What QUICK costs in accuracy, on 800 unseen items each of two nano models tuned for one or two epochs, whose
distributions are broad, against every price scored. The cumulative distribution is off at its worst price by 1.4 %
(pc_parts) and 0.9 % (synthetic catalogue) on average, 6.0 and 4.1 % at most. Mean errors, exact and with QUICK: median
$88.50 and $89.05, $102.88 and $102.91; mean $91.80 and $92.82, $104.14 and $104.15; log-mean $88.40 and $88.93, $103.32
and $103.40. Twice that tolerance asks 11.7 nodes an item beside the trunk for 20.8 (13.8 for 24.3), which saves 4 to 12
% of the time, and its median had $1.50 more error on pc_parts: too much for that.

That was measured once; each run of the prediction benchmark holds the median to QUICK
(`fastprice.benchmarking.prediction.check_prediction`). What it costs in time is in docs/LOG.md beside `generate`.

Legend: B items of a batch, M nodes of the trie, U its tokens and the end, N pairs (item, node), D depth. Log
probabilities are natural, float64 on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprice.common.arrays import FloatArray, IntArray
from fastprice.errors import ConfigError, DataError
from fastprice.inference.greedy import write_greedily
from fastprice.inference.price_distribution import PriceDistribution
from fastprice.inference.price_trie import PriceTrie
from fastprice.inference.scorers.merged import DenseReader
from fastprice.inference.scorers.merged_decoder import DenseDecoder
from fastprice.inference.scorers.scorer import Reader, Reading
from fastprice.inference.scorers.stock import StockReader
from fastprice.prompts.template import TEXT, Form

__all__ = ["QUICK", "PriceDecoder", "PriceTrie", "greedy_prices", "price_distributions"]

QUICK = 0.0625  # tolerance for point estimates

_ENDS_APART = 0.25  # of probability: how far apart the first full-length prices are that are asked for their end
_SURE = 0.9  # p(end) of all of them
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
        """Takes the fastest reader that the model and the free memory allow (`fastprice.inference.scorers.scorer`).

        form   in which prompts ask for the price, and so how it ends
        masks  whether the model's forward pass takes a mask for each token

        Raises ConfigError for an impossible `max_price` (dollars) and for a model without masks of which there is no
        dense copy, DataError for a tokenizer that cannot spell the prices.
        """
        if max_price < 1:
            raise ConfigError(f"max_price ({max_price}) must be at least 1")
        trie, dense = PriceTrie.of(tokenizer, max_price, form), DenseDecoder.of(model)
        if dense is not None:
            return cls(DenseReader(dense, trie), model.config)
        if not masks:
            raise ConfigError("this model gives no distributions here: it takes no masks, and has no dense copy")
        return cls(StockReader(model, trie), model.config)

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
        if not 0.0 <= tolerance < 1.0:
            raise ConfigError(f"tolerance ({tolerance}) must be from 0 to below 1")
        distributions: dict[int, PriceDistribution] = {}
        for batch in self._batches(prompts, batch_size):
            walk = _Walk(self.trie, self.reader.read([prompts[index] for index in batch]), tolerance)
            distributions.update(zip(batch, walk(), strict=True))
            if on_batch:
                on_batch(len(distributions))
        return [distributions[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def last_states(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int = 64,
        on_batch: Callable[[int], None] | None = None,
    ) -> torch.Tensor | None:
        """What a head reads: the hidden states (N, width) of the last tokens of N prompts, after the last norm.

        In the model's dtype and on its device, equal to transformers' within rounding. None where there is no dense
        copy. Arguments and errors are those of `price_distributions`.
        """
        if not isinstance(self.reader, DenseReader):
            return None
        states, done = self.reader.decoder.embeddings.new_empty(len(prompts), len(self.reader.decoder.norm)), 0
        for batch in self._batches(prompts, batch_size):
            found = self.reader.last_states([prompts[index] for index in batch])
            states[torch.tensor(batch, device=states.device)] = found
            done += len(batch)
            if on_batch:
                on_batch(done)
        return states

    def _batches(self, prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
        """Indices of prompts to read together; errors as `price_distributions` tells them."""
        if batch_size < 1:
            raise ConfigError(f"batch_size ({batch_size}) must be at least 1")
        if not prompts:
            return
        if not all(len(prompt) for prompt in prompts):
            raise DataError(
                "a prompt without tokens has no next token to predict; start it with the tokenizer's bos token"
            )
        _check_window(self.config, int(max(map(len, prompts)) + self.trie.depths.max()))
        self.reader.begin(prompts)
        yield from self.reader.batches(prompts, batch_size)


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
    """N pairs: `items` (N,) of the batch, `nodes` (N,) of the trie, `p` (N,) of what each stands for."""

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


class _Walk:
    """Walks the trie for a batch whose prompts are computed."""

    def __init__(self, trie: PriceTrie, reading: Reading, tolerance: float) -> None:
        self.trie, self.reading, self.tolerance = trie, reading, tolerance
        self.ends_apart = min(max(_ENDS_APART, 8 * tolerance), 1.0)

    def __call__(self) -> list[PriceDistribution]:
        after_trunk = np.exp(self.reading.scores)
        batch, trunk = after_trunk.shape[:2]
        level = _Nodes(np.arange(batch), np.zeros(batch, np.int64), np.ones(batch))
        found = leaves = ends = level[:0]
        while len(level):
            if level.nodes[0] < trunk:
                prices, children = self._expand(level, after_trunk[level.items, level.nodes])
            else:
                after, guessed = self._inner(level, self._mass(batch, found, leaves, level))
                prices, children = self._expand(level, after)
                ends += guessed
            found += prices
            is_leaf = (self.trie.children[children.nodes] == 0) & (children.nodes >= trunk)
            leaves += children[is_leaf]
            level = self._by_price(children[~is_leaf])
        leaves = self._by_price(leaves)
        return self._distributions(batch, found + self._ends(leaves, ends, self._mass(batch, found)))

    def _expand(self, parents: _Nodes, after: FloatArray) -> tuple[_Nodes, _Nodes]:
        """(Nodes that are prices, with p(price)), (children, with p(reaching them)); `after` (N, U) the parents."""
        trie = self.trie
        prices = _Nodes(parents.items, parents.nodes, parents.p * after[:, -1])
        prices = prices[(trie.prices[parents.nodes] > 0) & (prices.p > 0)]
        counts = trie.children[parents.nodes]
        parent = np.repeat(np.arange(len(parents)), counts)
        nodes = np.arange(len(parent)) + (trie.first_child[parents.nodes] - np.cumsum(counts) + counts)[parent]
        children = _Nodes(parents.items[parent], nodes, parents.p[parent] * after[parent, trie.slots[nodes]])
        return prices, children[children.p > 0]

    def _inner(self, level: _Nodes, mass: FloatArray) -> tuple[FloatArray, _Nodes]:
        """Probabilities (N, U) after the nodes of a level: asked, or between those of its neighbors that were.

        With them, some full-length prices, one under each of a few nodes, with p(end) after each.
        """
        share = level.p / mass[level.items]
        guessed = self._sampled(level, share, self.ends_apart) & (self.trie.middle_leaf[level.nodes] > 0)
        asked = self._sampled(level, share, self.tolerance) | guessed
        guesses = _Nodes(level.items[guessed], self.trie.middle_leaf[level.nodes[guessed]], share[guessed])
        answers = self._ask(level[asked] + guesses)
        count = len(answers) - len(guesses)
        after = self._between(level, asked, answers[:count])
        return after, _Nodes(guesses.items, guesses.nodes, answers[count:, -1])

    def _ends(self, leaves: _Nodes, ends: _Nodes, found: FloatArray) -> _Nodes:
        """p(price) of the full-length prices `leaves`: asked where it matters, else between their neighbors'.

        ends   those whose p(end) is known, in any order
        found  probability (B,) of the prices of each item that are no leaves
        """
        trie = self.trie
        share = leaves.p / (found + self._mass(len(found), leaves))[leaves.items]
        place = leaves.items * len(trie.tokens) + leaves.nodes
        known = np.full(len(found) * len(trie.tokens), np.nan)
        known[ends.items * len(trie.tokens) + ends.nodes] = ends.p
        end = known[place]
        asked = ~np.isnan(end)
        # Of prices of another length nothing is known by those.
        kind = leaves.items * trie.paths.shape[1] + trie.depths[leaves.nodes]
        kind_known = np.zeros(len(found) * trie.paths.shape[1], bool)
        kind_known[kind[asked]] = True
        self._ask_ends(leaves, self._sampled(leaves, share, self.ends_apart) & ~kind_known[kind], end, asked)
        # p(n) can be off by all of its share; by eight times what the asked lack, where those end almost surely.
        p_end = self._between(leaves, asked, end[asked, None])[:, 0]
        least = np.ones(len(found))
        np.minimum.at(least, leaves.items[asked], p_end[asked])
        sure = (least >= _SURE)[leaves.items]
        matters = sure & (share * 8 * (1 - p_end) >= self.tolerance)
        if not sure.all():
            matters |= ~sure & self._sampled(leaves, share, self.tolerance)
        if (matters & ~asked).any():
            self._ask_ends(leaves, matters & ~asked, end, asked)
            p_end = self._between(leaves, asked, end[asked, None])[:, 0]
        return _Nodes(leaves.items, leaves.nodes, leaves.p * p_end)

    def _ask_ends(self, leaves: _Nodes, wanted: NDArray[np.bool_], end: FloatArray, asked: NDArray[np.bool_]) -> None:
        """Writes p(end) of the `wanted` leaves into `end` (N,) and marks them in `asked` (N,)."""
        if wanted.any():
            end[wanted] = self._ask(leaves[wanted])[:, -1]
            asked |= wanted

    def _ask(self, nodes: _Nodes) -> FloatArray:
        """Probabilities (N, U) after nodes."""
        probabilities: FloatArray = np.minimum(np.exp(self.reading.ask(nodes.items, nodes.nodes)), 1.0)
        return probabilities

    def _by_price(self, nodes: _Nodes) -> _Nodes:
        """The same by item, then by the lowest price that begins with a node's tokens."""
        key = nodes.items * (self.trie.highest + 1) + self.trie.lowest[nodes.nodes]
        return nodes[np.argsort(key, kind="stable")]

    def _sampled(self, nodes: _Nodes, share: FloatArray, apart: float) -> NDArray[np.bool_]:
        """Marks a sample of the nodes (N,), which are in order: one in every stretch of `apart` of an item's share.

        A node with a share of `apart` is in the sample for sure. So is the likeliest of each item.
        """
        if not apart or not len(nodes):
            return np.ones(len(nodes), bool)
        first = _firsts(nodes.items)
        counts = np.append(first[1:], len(nodes)) - first
        upto = np.cumsum(share)
        upto -= np.repeat((upto - share)[first], counts)  # within the item
        sampled: NDArray[np.bool_] = np.floor(upto / apart + 0.5) > np.floor((upto - share) / apart + 0.5)
        largest = np.flatnonzero(share == np.repeat(np.maximum.reduceat(share, first), counts))
        sampled[largest[_firsts(nodes.items[largest])]] = True
        return sampled

    def _between(self, nodes: _Nodes, asked: NDArray[np.bool_], answers: FloatArray) -> FloatArray:
        """Probabilities (N, U) after nodes, from `answers` (asked, U) after those that were asked, all in order.

        Others are interpolated between the neighbors of an item, in the log of the lowest price under a node.
        """
        known = np.flatnonzero(asked)
        items = nodes.items[known]
        upto = np.cumsum(asked)
        before, after = np.maximum(upto - asked - 1, 0), np.minimum(upto - asked, len(known) - 1)  # itself if asked
        right = np.where(items[after] == nodes.items, after, before)
        left = np.where(items[before] == nodes.items, before, right)
        log_price = self.trie.log_lowest[nodes.nodes]
        low, high = log_price[known[left]], log_price[known[right]]
        weight = np.where(high > low, (log_price - low) / np.where(high > low, high - low, 1.0), 1.0)[:, None]
        between: FloatArray = weight * answers[right] + (1 - weight) * answers[left]
        return between

    def _distributions(self, batch: int, found: _Nodes) -> list[PriceDistribution]:
        found = self._by_price(found[found.p > 0])
        prices = self.trie.prices[found.nodes].astype(np.float64)
        bounds = np.searchsorted(found.items, np.arange(1, batch))
        return [
            PriceDistribution(*of_one)
            for of_one in zip(np.split(prices, bounds), np.split(found.p, bounds), strict=True)
        ]

    def _mass(self, batch: int, *nodes: _Nodes) -> FloatArray:
        """Probability of all `nodes` of each item (B,), never quite 0."""
        mass = sum((np.bincount(some.items, some.p, batch) for some in nodes), np.zeros(batch))
        return np.maximum(mass, np.finfo(float).tiny)


def _firsts(items: IntArray) -> IntArray:
    """Where the first of each run of equal `items` (N,) stands."""
    begins = np.ones(len(items), bool)
    np.not_equal(items[1:], items[:-1], out=begins[1:])
    return np.flatnonzero(begins)


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
) -> FloatArray:
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
