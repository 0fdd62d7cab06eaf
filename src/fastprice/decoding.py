"""From a language model to prices: the whole distribution over whole dollars, or greedy text.

The text of the price n is str(n) and the end-of-sequence token (`fastprice.prompts.encode_row` trains on exactly that),
so its probability after a prompt is

    p(n) = p(t1 | prompt) p(t2 | prompt t1) ... p(end | prompt t1 ... tD),     t1 ... tD: the tokens of str(n).

The tokens come from the tokenizer itself, every price encoded once, and form a trie: one token deep where 0-999 are
tokens of their own (Llama 3), three where digits are (Llama 2, Qwen, Gemma), anything between for other merges. A batch
of prompts takes a few forward passes over it:

0. The tokens that all prompts begin with (the question) are computed once, for all batches.
1. trunk: the rest of each prompt, with the first levels of the trie after it: as many whole levels as fit in 16 nodes
   (all nine first digits cost less than a pass to find out which of them matter).
2. inner nodes below the trunk (the pairs of digits), one pass a level; none where a price is one token.
3. ends: full-length prices, which no further token extends within `max_price`, one or two passes.

The nodes of an item lie side by side after its prompt, and a mask lets each see the prompt and its own ancestors alone
(tree attention: Miao et al., "SpecInfer", 2023), so that a prompt's keys and values are computed once and read by all.
The cache keeps the trunk but no node below it: a deeper node feeds its few ancestors again, so that a pass can run on
any subset of the items, and items are grouped by need to hold little padding. So are batches, by length.

What is asked of the model, and what is not. A node is asked what follows it if its share of the probability of writing
a price's digits is `tolerance` or more; so is the likeliest child of every parent with such a share. What follows the
others is taken to be what follows their asked siblings on average: no price under them is off by `tolerance`.
Full-length prices, the widest level by far, need only p(end), which a trained model is sure of. The likeliest of those
that begin with the same token are asked, then all others with a share of `tolerance`; but where all of the first end
with 0.9 or more, 4 (1 - p(end)) of the share is taken as how far p(n) can be off, and only those where that is
`tolerance` are asked. (This is an estimate, all else is a bound.) `tolerance=0` asks everything: p(n) exactly. The
default is for distributions to keep; point estimates need far less (`QUICK`).

Cost. An item computes its prompt less the common beginning, the trunk and the nodes asked; generation computes the
prompt, with its batch's padding, and a token a step. The prompt is the floor of both, so where computing is what costs
(a CPU, or a large batch on any device) neither can be several times faster than the other. One CPU thread, processor
time, 256 catalogue items of 60 tokens, batches of 64, a nano model (128 wide, fp32) that had learnt little and spreads
its mass over all prices, the worst case here:

    greedy_prices        5.2 ms an item                     mean error of the greedy price   $153.8
    prompts and trunk    2.8                                (the floor)
    tolerance=QUICK      6.3    35 nodes beside the trunk   of the median                    $133.7
    tolerance=1e-3      17.7   191                                                           $134.1
    tolerance=1e-4      40.5   380                                                           $134.1

With NF4 weights and adapters beside them (128 items) QUICK takes 11.9 ms and greedy text 13.9; with the adapters merged
into dense weights first QUICK takes 7.6.

Legend: B items of a batch, G of a group, Q nodes of an item in one pass, V vocabulary, M nodes of the trie, U its
tokens and the end, N pairs (item, node), D depth. Log probabilities are natural, float64 on the host.
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

__all__ = ["QUICK", "PriceTrie", "greedy_prices", "price_distributions"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
_Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer: (B, heads, columns, head width)

QUICK = 0.02  # tolerance for point estimates

_TRUNK = 16  # nodes
_ENDS_ASKED = 4  # of an item, at least
_SURE = 0.9  # p(end) of all of them
_PASS_TOKENS = {"cpu": 64, "cuda": 2048}  # a pass costs about as much as this many tokens more in another
_LOGITS = 2**25  # elements upcast to fp32 at once: 128 MiB
_ANSWER_TOKENS = 8  # "$" is in the prompt; seven digits and an end


@dataclass(frozen=True, eq=False)
class PriceTrie:
    """The token sequences of the prices 1 to `max_price`, as a trie of M nodes; node 0 is the prompt's end.

    Nodes are in breadth-first order and the children of a node are neighbours: `first_child[n]` to
    `first_child[n] + children[n]`. `slots` (M,) says where a node's token stands in `alphabet` (U,), whose last entry
    is the end-of-sequence token. `paths` (M, D + 1) holds a node's ancestors by depth and itself, then -1. `prices`
    (M,) is 0 where the tokens so far are no price. `trunk` counts the nodes of the first levels that fit in a trunk.
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
    tolerance: float = 1e-4,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> list[PriceDistribution]:
    """p(price | prompt) over whole dollars from 1 to `max_price`, for each prompt (token ids, at least one).

    tolerance   how finely the trie is walked, see the module; 0 scores every price
    batch_size  prompts computed at once, at most: those of a batch are of like lengths, so that it holds little padding
    on_batch    is told how many prompts are done

    A model that gives no price any probability, or whose logits are not numbers, yields an empty distribution. Raises
    ConfigError for impossible settings, DataError for an empty prompt or a tokenizer that cannot spell the prices.
    """
    if max_price < 1 or batch_size < 1 or not 0.0 <= tolerance < 1.0:
        raise ConfigError(
            f"max_price ({max_price}) and batch_size ({batch_size}) must be at least 1, and tolerance "
            f"({tolerance}) from 0 to below 1"
        )
    if not prompts:
        return []
    if not all(len(prompt) for prompt in prompts):
        raise DataError("a prompt without tokens has no next token to predict; start it with the tokenizer's bos token")
    trie = PriceTrie.of(tokenizer, max_price)
    lengths = np.array([len(prompt) for prompt in prompts])
    _check_window(model.config, int(lengths.max() + trie.depths.max()))
    distributions: dict[int, PriceDistribution] = {}
    with torch.inference_mode():
        walk = _Walk(model, trie, prompts, tolerance)
        for batch in _groups(lengths, walk.pass_tokens, batch_size):
            distributions.update(zip(batch.tolist(), walk([prompts[index] for index in batch]), strict=True))
            if on_batch:
                on_batch(len(distributions))
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

    def __init__(self, model: Any, trie: PriceTrie, prompts: Sequence[Sequence[int]], tolerance: float) -> None:
        self.model, self.trie, self.tolerance = model, trie, tolerance
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
                prices, children = self._expand(
                    level, self._inner(prompted, level, self._mass(batch, found, leaves, level))
                )
            found += prices
            full = trie.children[children.nodes] == 0
            in_trunk = children.nodes < trie.trunk
            leaves += children[full & ~in_trunk]
            level = children[~full | in_trunk]
        return self._distributions(batch, found + self._ends(prompted, leaves, self._mass(batch, found)))

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
        if not len(asked):
            return np.empty((0, len(trie.alphabet)))
        lines = trie.paths[asked.nodes]  # a node, and its ancestors that the cache does not hold
        keys = np.unique((asked.items[:, None] * size + lines)[lines >= trie.trunk])
        items, nodes = np.divmod(keys, size)
        counts = np.bincount(items, minlength=len(prompted.rests))
        place = np.arange(len(keys)) - (np.cumsum(counts) - counts)[items]
        scores = np.empty((len(keys), len(trie.alphabet)))
        widest = max(1, _LOGITS // self.model.config.vocab_size // counts.max())
        for group in _groups(counts, self.pass_tokens, widest):
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

    def _inner(self, prompted: _Prompted, level: _Nodes, mass: FloatArray) -> FloatArray:
        """Log probabilities (N, U) after the nodes of a level: asked, or the mean after their siblings."""
        share = np.exp(level.log_p) / mass[level.items]
        family = self._family(level, self.trie.depths[level.nodes] - 1)
        asked = (share >= self.tolerance) | self._heads(family, share) | self._heads(level.items, share)
        scores = np.empty((len(level), len(self.trie.alphabet)))
        scores[asked] = self._ask(prompted, level[asked])
        scores[~asked] = _as_kin(level, family, share, asked, scores[asked])
        return scores

    def _ends(self, prompted: _Prompted, leaves: _Nodes, found: FloatArray) -> _Nodes:
        """p(price) of the full-length prices `leaves`: asked where it matters, else as of those that begin alike."""
        leaves = leaves[np.lexsort((-leaves.log_p, leaves.items))]
        rank = np.arange(len(leaves)) - np.searchsorted(leaves.items, leaves.items)
        family = self._family(leaves, np.minimum(self.trie.depths[leaves.nodes] - 1, 1))
        share = np.exp(leaves.log_p) / (found + self._mass(len(found), leaves))[leaves.items]
        asked = self._heads(family, share) | (rank < _ENDS_ASKED)
        end = np.empty((len(leaves), 1))
        end[asked] = self._ask(prompted, leaves[asked])[:, -1:]
        end[~asked] = _as_kin(leaves, family, share, asked, end[asked])
        # p(n) can be off by all of its share; by four times what the asked lack, where those end almost surely.
        ends = np.minimum(np.exp(end[:, 0]), 1.0)
        least = np.ones(len(found))
        np.minimum.at(least, leaves.items[asked], ends[asked])
        doubt = np.where((least >= _SURE)[leaves.items], 4 * (1 - ends), 1.0)
        unsure = ~asked & (share * doubt >= self.tolerance)
        end[unsure] = self._ask(prompted, leaves[unsure])[:, -1:]
        return _Nodes(leaves.items, leaves.nodes, leaves.log_p + end[:, 0])

    def _family(self, nodes: _Nodes, depths: IntArray) -> IntArray:
        """A number for each node (N,), the same for those of one item under one ancestor at `depths` (N,)."""
        return nodes.items * len(self.trie.tokens) + self.trie.paths[nodes.nodes, depths]

    def _heads(self, family: IntArray, share: FloatArray) -> NDArray[np.bool_]:
        """Marks the likeliest node of every family that matters as a whole."""
        families, member = np.unique(family, return_inverse=True)
        order = np.lexsort((-share, member))
        first = order[np.searchsorted(member[order], np.arange(len(families)))]
        heads = np.zeros(len(family), bool)
        heads[first] = np.bincount(member, share, len(families)) >= self.tolerance
        return heads

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

    def _mass(self, batch: int, *nodes: _Nodes) -> FloatArray:
        """Probability of all `nodes` of each item (B,), never quite 0."""
        mass = np.zeros(batch)
        for some in nodes:
            mass += np.bincount(some.items, np.exp(some.log_p), batch)
        return np.maximum(mass, np.finfo(float).tiny)


def _as_kin(
    nodes: _Nodes, family: IntArray, share: FloatArray, asked: NDArray[np.bool_], scores: FloatArray
) -> FloatArray:
    """Log probabilities after the nodes not asked: the mean after those of their family that were, by their share.

    `scores` (asked, U) are of those asked. A millionth of the mean over the item is mixed in: it decides where nobody
    of a family was asked. Where nobody of an item was, nothing is known, and its probabilities are 0.
    """
    said = share[asked, None] * np.append(np.exp(scores), np.ones((len(scores), 1)), axis=1)
    families, member = np.unique(family, return_inverse=True)
    by_family = np.zeros((len(families), said.shape[1]))
    np.add.at(by_family, member[asked], said)
    by_item = np.zeros((nodes.items.max(initial=0) + 1, said.shape[1]))
    np.add.at(by_item, nodes.items[asked], 1e-6 * said)
    kin = by_family[member[~asked]] + by_item[nodes.items[~asked]]
    with np.errstate(divide="ignore"):
        means: FloatArray = np.log(kin[:, :-1] / np.maximum(kin[:, -1:], np.finfo(float).tiny))
    return means


def _groups(counts: IntArray, pass_tokens: int, most: int) -> Iterator[IntArray]:
    """Items with a count above 0 in groups of like counts: at most `most`, and less padding than a pass costs."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    while len(order):
        padding = np.cumsum(counts[order[0]] - counts[order[:most]])
        group, order = np.split(order, [np.searchsorted(padding, pass_tokens, side="right")])
        yield group


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
