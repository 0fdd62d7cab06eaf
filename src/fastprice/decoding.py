"""From a language model to prices: the whole distribution over whole dollars, or greedy text.

The text of the price n is str(n) and the end-of-sequence token (`fastprice.prompts.encode_row` trains on exactly that),
so its probability after a prompt is

    p(n) = p(t1 | prompt) p(t2 | prompt t1) ... p(end | prompt t1 ... tD),     t1 ... tD: the tokens of str(n).

The tokens come from the tokenizer itself, every price encoded once, and form a trie: one token deep where 0-999 are
tokens of their own (Llama 3), three where digits are (Llama 2, Qwen, Gemma), anything between for other merges. A batch
of prompts takes four forward passes over it, whatever the tokenizer:

1. The tokens that all prompts begin with (the question) are computed once, for all batches.
2. trunk: the rest of each prompt, with the first levels of the trie after it: as many whole levels as fit in 16 nodes
   (all ten first digits cost less than finding out which of them matter).
3. branches: the inner nodes below the trunk that matter (the pairs of digits), one pass a level.
4. ends: full-length prices, which no further token extends within `max_price`.

The nodes of one item lie side by side after its prompt; a mask lets each see the prompt and its own ancestors alone
(tree attention: Miao et al., "SpecInfer", 2023), so the prompt's keys and values are computed once and read by all.
A pass keeps no keys or values of the nodes below the trunk: a deeper one feeds their few ancestors again, which lets it
run on any subset of the items, and items are grouped so that a pass holds little padding.

What is left out. A node is expanded if its own probability, or that of all smaller ones of the item together, exceeds
`tolerance`; so no price that was not reached had more than `tolerance`. Full-length prices are the widest level, and a
trained model is sure that they end: it is asked for the ends of the `_ENDS_ASKED` likeliest ones of an item, and where
the others cannot be wrong by more than a quarter of `tolerance` at that rate they are taken to end at it; else they are
asked too. All of it is relative to what an item has in the trie at all, so that a model that knows no prices is walked
as carefully. `tolerance=0` walks everything: p(n) of every price, exactly.

Cost: an item computes its prompt less the common beginning, plus its nodes. That is the floor, and as long as nodes
are fewer than prompt tokens, about that of `generate`'s first step: @MEASURED@

Legend: B items of a batch, G of a group, Q nodes of an item in one pass, V vocabulary, U tokens of the trie and the end,
N pairs (item, node), W columns of the longest prompt, D depth. Log probabilities are natural, float64 on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from fastprice.distribution import PriceDistribution
from fastprice.errors import ConfigError, DataError
from fastprice.money import parse_price

__all__ = ["PriceTrie", "greedy_prices", "price_distributions"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
_Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer: (B, heads, columns, head width)

_TRUNK = 16  # nodes
_ENDS_ASKED = 2  # an item
_PASS_TOKENS = {"cpu": 64, "cuda": 2048}  # a pass costs about as much as this many tokens more in another
_LOGITS = 2**25  # elements upcast to fp32 at once: 128 MiB
_ANSWER_TOKENS = 8  # "$" is in the prompt; seven digits and an end


@dataclass(frozen=True, eq=False)
class PriceTrie:
    """The token sequences of the prices 1 to `max_price`, as a trie of M nodes; node 0 is the prompt's end.

    Nodes are in breadth-first order and the children of a node are neighbours: `first_child[n]` to
    `first_child[n] + children[n]`. `slots` (M,) says where a node's token stands in `alphabet` (U,), whose last entry is
    the end-of-sequence token. `paths` (M, D + 1) holds a node's ancestors by depth and itself, then -1. `prices` (M,) is
    0 where the tokens so far are no price. `trunk` counts the nodes of the first levels that fit in a trunk.
    """

    tokens: IntArray
    slots: IntArray
    alphabet: IntArray
    depths: IntArray
    paths: IntArray
    prices: IntArray
    first_child: IntArray
    children: IntArray
    trunk: int

    @classmethod
    def of(cls, tokenizer: Any, max_price: int) -> PriceTrie:
        """The trie of `tokenizer`; DataError if it has no end token or writes two prices alike."""
        if tokenizer.eos_token_id is None:
            raise DataError("the base model's tokenizer has no end-of-sequence token; set tokenizer.eos_token first")
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
        whole_levels = np.cumsum(np.bincount(depths))
        return cls(
            tokens=tokens,
            slots=np.searchsorted(alphabet, tokens),
            alphabet=np.append(alphabet, tokenizer.eos_token_id),
            depths=depths,
            paths=paths,
            prices=np.array([price_of.get(prefix, 0) for prefix in nodes]),
            first_child=1 + np.searchsorted(parents, np.arange(len(nodes))),
            children=np.bincount(parents, minlength=len(nodes)),
            trunk=int(whole_levels[whole_levels <= _TRUNK][-1]),
        )


def price_distributions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_price: int = 999,
    mass: float = 0.99,
    tolerance: float = 1e-4,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> list[PriceDistribution]:
    """p(price | prompt) over whole dollars from 1 to `max_price`, for each prompt (token ids, at least one).

    mass, tolerance  how much is walked, see the module; `mass=1, tolerance=0` scores every price
    batch_size       prompts computed at once; they are sorted by length, so that a batch holds little padding
    on_batch         is told how many prompts are done

    A model that gives no price any probability, or whose logits are not numbers, yields an empty distribution. Raises
    ConfigError for impossible settings, DataError for an empty prompt or a tokenizer that cannot spell the prices.
    """
    if max_price < 1 or batch_size < 1 or not 0.0 < mass <= 1.0 or not 0.0 <= tolerance < 1.0:
        raise ConfigError(
            f"max_price ({max_price}) and batch_size ({batch_size}) must be at least 1, mass ({mass}) above 0 and "
            f"at most 1, tolerance ({tolerance}) from 0 to below 1"
        )
    if not prompts:
        return []
    if not all(len(prompt) for prompt in prompts):
        raise DataError("a prompt without tokens has no next token to predict; start it with the tokenizer's bos token")
    trie = PriceTrie.of(tokenizer, max_price)
    _check_window(model.config, max(map(len, prompts)) + int(trie.depths.max()))
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    distributions: dict[int, PriceDistribution] = {}
    with torch.inference_mode():
        walk = _Walk(model, trie, prompts, mass, tolerance)
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            distributions.update(zip(batch, walk([prompts[index] for index in batch]), strict=True))
            if on_batch:
                on_batch(first + len(batch))
    return [distributions[index] for index in range(len(prompts))]


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


@dataclass(frozen=True)
class _Prompted:
    """Keys and values of a batch, layer by layer, over the columns [start | rest of the prompt | trunk]."""

    cache: _Cache
    rests: IntArray  # (B,) tokens of each prompt between start and root
    width: int  # of the columns for them


class _Walk:
    """Walks the trie for batches of `prompts`."""

    def __init__(
        self, model: Any, trie: PriceTrie, prompts: Sequence[Sequence[int]], mass: float, tolerance: float
    ) -> None:
        self.model, self.trie, self.mass, self.tolerance = model, trie, mass, tolerance
        self.device = model.device
        self.as_bool = model.config._attn_implementation == "sdpa"
        self.alphabet = torch.from_numpy(trie.alphabet).to(self.device)
        self.pass_tokens = _PASS_TOKENS["cuda" if self.device.type == "cuda" else "cpu"]
        trunk = np.arange(trie.trunk)
        self.sees_trunk = trie.paths[:, trie.depths[trunk]] == trunk  # (M, trunk)
        self.start = _common_start(prompts)
        self.start_cache: _Cache = []
        if (len(prompts) - 1) * len(self.start) <= self.pass_tokens:
            self.start = []
        if self.start:
            ids = np.array([self.start])
            _, self.start_cache = self._forward([], ids, np.arange(len(self.start))[None], None, keep=1)

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[PriceDistribution]:
        trie, batch = self.trie, len(prompts)
        prompted, scores = self._trunk(prompts)
        level = _Nodes(np.arange(batch), np.zeros(batch, np.int64), np.zeros(batch))
        found = leaves = level[np.zeros(batch, bool)]
        while len(level):
            if level.nodes[0] < trie.trunk:
                prices, children = self._expand(level, scores[level.items, level.nodes])
            else:
                reachable = self._mass_of(batch, found + level + leaves)
                level = level[_matter(level, reachable, self.mass, self.tolerance)]
                prices, children = self._expand(level, self._ask(prompted, level))
            found += prices
            full = trie.children[children.nodes] == 0
            in_trunk = children.nodes < trie.trunk
            leaves += children[full & ~in_trunk]
            level = children[~full | in_trunk]
        found += self._ends(prompted, leaves, self._mass_of(batch, found + leaves))
        return self._distributions(batch, found)

    def _trunk(self, prompts: Sequence[Sequence[int]]) -> tuple[_Prompted, FloatArray]:
        """Computes the prompts and the trunk after each; log probabilities (B, trunk, U) after its nodes."""
        trie, batch, start = self.trie, len(prompts), len(self.start)
        rests = np.array([len(prompt) - 1 - start for prompt in prompts])
        width = int(rests.max())
        ids = np.zeros((batch, width + trie.trunk), np.int64)
        ids[:, width + 1 :] = trie.tokens[1 : trie.trunk]
        for row, prompt in enumerate(prompts):
            ids[row, : rests[row]] = prompt[start:-1]
            ids[row, width] = prompt[-1]
        positions = np.empty_like(ids)
        positions[:, :width] = start + np.arange(width)
        positions[:, width:] = (start + rests)[:, None] + trie.depths[: trie.trunk]
        mask = np.zeros((batch, width + trie.trunk, start + width + trie.trunk), bool)
        mask[:, :, :start] = True
        mask[:, :width, start : start + width] = np.tri(width, dtype=bool)
        mask[:, width:, start : start + width] = (np.arange(width) < rests[:, None])[:, None]
        mask[:, width:, start + width :] = self.sees_trunk[: trie.trunk]
        cache = [
            (keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)) for keys, values in self.start_cache
        ]
        logits, cache = self._forward(cache, ids, positions, mask, keep=trie.trunk)
        return _Prompted(cache, rests, width), self._scores(logits)

    def _ask(self, prompted: _Prompted, asked: _Nodes) -> FloatArray:
        """Log probabilities (N, U) of the trie's tokens after each of the nodes, all of them below the trunk."""
        trie, size = self.trie, len(self.trie.tokens)
        lines = trie.paths[asked.nodes]  # a node, and its ancestors that the cache does not hold
        keys = np.unique((asked.items[:, None] * size + lines)[lines >= trie.trunk])
        items, nodes = np.divmod(keys, size)
        counts = np.bincount(items, minlength=len(prompted.rests))
        place = np.arange(len(keys)) - (np.cumsum(counts) - counts)[items]
        scores = np.empty((len(keys), len(trie.alphabet)))
        for group in _groups(counts, self.pass_tokens, _LOGITS // self.model.config.vocab_size):
            row_of = np.full(len(counts), -1)
            row_of[group] = np.arange(len(group))
            mine = row_of[items] >= 0
            rows, places = row_of[items[mine]], place[mine]
            table = np.full((len(group), counts[group].max()), -1)
            table[rows, places] = nodes[mine]
            scores[mine] = self._branch(prompted, group, table)[rows, places]
        result: FloatArray = scores[np.searchsorted(keys, asked.items * size + asked.nodes)]
        return result

    def _branch(self, prompted: _Prompted, group: IntArray, table: IntArray) -> FloatArray:
        """Log probabilities (G, Q, U) after the nodes `table` (G, Q; -1 is padding) of the items `group` (G,)."""
        trie, start, width = self.trie, len(self.start), prompted.width
        nodes = np.maximum(table, 0)
        paths = trie.paths[nodes]  # (G, Q, D + 1)
        rests = prompted.rests[group]
        below = start + width + trie.trunk
        mask = np.zeros((*table.shape, below + table.shape[1]), bool)
        mask[:, :, :start] = True
        mask[:, :, start : start + width] = (np.arange(width) < rests[:, None])[:, None]
        mask[:, :, start + width : below] = self.sees_trunk[nodes]
        at_depth = np.broadcast_to(trie.depths[nodes][:, None], (*table.shape, table.shape[1]))
        mask[:, :, below:] = np.take_along_axis(paths, at_depth, axis=2) == table[:, None]
        # Padding sees itself, so that no row of the mask is empty (its softmax would be NaN); nothing sees padding.
        mask[:, :, below:] |= np.eye(table.shape[1], dtype=bool)
        rows = torch.from_numpy(group).to(self.device)
        cache = [(keys[rows], values[rows]) for keys, values in prompted.cache]
        positions = (start + rests)[:, None] + trie.depths[nodes]
        logits, _ = self._forward(cache, np.maximum(trie.tokens[nodes], 0), positions, mask, keep=table.shape[1])
        return self._scores(logits)

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

    def _ends(self, prompted: _Prompted, leaves: _Nodes, reachable: FloatArray) -> _Nodes:
        """p(price) of the full-length prices `leaves`: asked, or at the rate of the likeliest (see the module)."""
        batch = len(reachable)
        order = np.lexsort((-leaves.log_p, leaves.items))
        leaves = leaves[order]
        rank = np.arange(len(leaves)) - np.searchsorted(leaves.items, leaves.items)
        asked = leaves[rank < _ENDS_ASKED]
        ended = self._end(prompted, asked)
        share = np.exp(asked.log_p - reachable[asked.items])
        rate = np.bincount(asked.items, share * np.exp(ended.log_p - asked.log_p), batch)
        rate = rate / np.maximum(np.bincount(asked.items, share, batch), np.finfo(float).tiny)
        rest = leaves[rank >= _ENDS_ASKED]
        share = np.exp(rest.log_p - reachable[rest.items])
        doubt = np.zeros(batch)
        np.maximum.at(doubt, rest.items, share)
        unsure = (doubt * (1 - rate) > self.tolerance / 4)[rest.items]
        unsure &= _matter(rest, reachable, self.mass, self.tolerance)
        certain = rest[~unsure]
        with np.errstate(divide="ignore"):
            at_rate = _Nodes(certain.items, certain.nodes, certain.log_p + np.log(rate)[certain.items])
        return ended + self._end(prompted, rest[unsure]) + at_rate

    def _end(self, prompted: _Prompted, leaves: _Nodes) -> _Nodes:
        return _Nodes(leaves.items, leaves.nodes, leaves.log_p + self._ask(prompted, leaves)[:, -1])

    def _distributions(self, batch: int, found: _Nodes) -> list[PriceDistribution]:
        prices = self.trie.prices[found.nodes]
        probabilities = np.exp(found.log_p)
        order = np.lexsort((prices, found.items))
        order = order[probabilities[order] > 0]
        bounds = np.searchsorted(found.items[order], np.arange(1, batch))
        return [
            PriceDistribution(prices[chosen].astype(np.float64), probabilities[chosen])
            for chosen in np.split(order, bounds)
        ]

    def _forward(
        self, cache: _Cache, ids: IntArray, positions: IntArray, mask: NDArray[np.bool_] | None, keep: int
    ) -> tuple[Tensor, _Cache]:
        """One pass over `ids` (B, T) after `cache`: logits (B, keep, V) of the last columns, and the longer cache.

        `mask` (B, T, columns) says what each token sees; None is causal.
        """
        past = DynamicCache(cache)
        seen: Tensor | None = None
        if mask is not None:
            seen = torch.from_numpy(mask).to(self.device)[:, None]
            if not self.as_bool:
                dtype = self.model.get_input_embeddings().weight.dtype
                seen = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(
                    ~seen, torch.finfo(dtype).min
                )
        output = self.model(
            input_ids=torch.from_numpy(ids).to(self.device),
            position_ids=torch.from_numpy(positions).to(self.device),
            attention_mask=seen,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits, [(layer.keys, layer.values) for layer in past.layers]

    def _scores(self, logits: Tensor) -> FloatArray:
        """Log probabilities (B, Q, U) of the trie's tokens and the end from logits (B, Q, V); not a number is 0."""
        parts = []
        for part in logits.flatten(0, 1).split(max(1, _LOGITS // logits.shape[-1])):
            fp32 = part.float()  # in 16 bits a softmax over a vocabulary is good for two digits
            parts.append(fp32[:, self.alphabet] - fp32.logsumexp(-1, keepdim=True))
        scores = torch.cat(parts).nan_to_num(nan=-torch.inf, neginf=-torch.inf).double().cpu().numpy()
        return scores.reshape(*logits.shape[:2], -1)

    def _mass_of(self, batch: int, nodes: _Nodes) -> FloatArray:
        """Log of the probability of `nodes` together, for each item (B,)."""
        mass = np.bincount(nodes.items, np.exp(nodes.log_p), batch).astype(np.float64)
        log_mass: FloatArray = np.log(np.maximum(mass, np.finfo(float).tiny))
        return log_mass


def _matter(nodes: _Nodes, reachable: FloatArray, mass: float, tolerance: float) -> NDArray[np.bool_]:
    """Which of the nodes (N,) must be expanded: see the module."""
    share = np.exp(nodes.log_p - reachable[nodes.items])
    order = np.lexsort((share, nodes.items))
    below = np.cumsum(share[order])
    first = np.searchsorted(nodes.items[order], nodes.items[order])
    below -= below[first] - share[order][first]
    matters = np.empty(len(nodes), bool)
    matters[order] = below > 1 - mass
    matters |= share > tolerance
    return matters


def _groups(counts: IntArray, pass_tokens: int, most: int) -> Iterator[IntArray]:
    """Items with a count above 0 in groups of like counts: none pads more than a pass costs, or holds `most` tokens."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    first = 0
    while first < len(order):
        widest = counts[order[first]]
        padding = np.cumsum(widest - counts[order[first:]])
        size = int(min(np.searchsorted(padding, pass_tokens, side="right"), max(1, most // widest)))
        yield order[first : first + size]
        first += size


def _common_start(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all prompts begin with, less than the whole of the shortest."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    most = min(map(len, prompts)) - 1
    same = next((at for at in range(most) if first[at] != last[at]), most)
    return first[:same]


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
    on_batch: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """The price a model writes after each prompt (token ids), in dollars; NaN where it writes none.

    Prompts are sorted by length, so that batches hold little padding; `on_batch` is told how many are done.
    """
    guesses = np.full(len(prompts), np.nan)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for index, answer in zip(batch, _continue(model, tokenizer, [prompts[index] for index in batch]), strict=True):
            # The prompt ended with "Price is $": only what follows without a gap is its number.
            if answer[:1].isdigit() and (price := parse_price(answer.split("\n")[0])) is not None:
                guesses[index] = price
        if on_batch:
            on_batch(start + len(batch))
    return guesses


@torch.inference_mode()
def _continue(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """What the model writes after each prompt, greedily, as text; prompts are padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=_ANSWER_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    answers: list[str] = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    return answers
