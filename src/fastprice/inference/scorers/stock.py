"""`StockScorer`: scoring through transformers' own forward pass, which serves every model.

Batches are padded to their longest prompt: the last few tokens of padding cost less than a batch of their own. The
tokens that all prompts begin with (the question) are computed once for all batches, and the trunk of the trie in the
same pass as the prompts. The KV cache holds only these: a deeper node is computed together with its few uncached
ancestors each time, so that a pass can run on any subset of the items, grouped by the number of tokens.

Legend: B items of a batch, G items of a group, Q nodes of an item in one pass, M nodes of the trie, U tokens of its
alphabet, N pairs (item, node), T tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from fastprice.common.arrays import FloatArray, IntArray
from fastprice.inference.price_trie import PriceTrie
from fastprice.inference.scorers.scorer import TRUNK_NODES, Prompts, ScoringSession, common_prefix_length, to_host

__all__ = ["StockScorer"]

KVCache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, as transformers shapes them

_LOGITS = 2**25  # elements upcast to fp32 at once: 128 MiB
_PASS_TOKENS = {"cpu": 64, "cuda": 2048}  # a pass costs about as much as this many more tokens in another one


class StockScorer:
    """See `fastprice.inference.scorers.scorer.Scorer`; the model's forward pass must take a 4-D attention mask."""

    def __init__(self, model: Any, trie: PriceTrie) -> None:
        self.model, self.trie = model, trie
        self.device = model.device
        self.takes_bool_mask = model.config._attn_implementation == "sdpa"
        self.alphabet = torch.from_numpy(trie.alphabet).to(self.device)
        self.pass_tokens = _PASS_TOKENS["cuda" if self.device.type == "cuda" else "cpu"]
        self.trunk = trie.nodes_within(TRUNK_NODES)
        trunk = np.arange(self.trunk)
        self.trunk_mask = trie.paths[:, trie.depths[trunk]] == trunk  # (M, trunk): which trunk nodes a node attends to
        self.prefix: list[int] = []
        self.prefix_cache: KVCache = []

    def prepare(self, prompts: Prompts) -> None:
        prefix = _common_prefix(prompts)
        self.prefix, self.prefix_cache = [], []
        if (len(prompts) - 1) * len(prefix) > self.pass_tokens:
            self.prefix = prefix
            ids = np.array([self.prefix])
            _, self.prefix_cache = self.forward([], ids, np.arange(len(self.prefix))[None], None, keep=1)

    def batches(self, prompts: Prompts, batch_size: int) -> Iterator[list[int]]:
        lengths = np.array([len(prompt) for prompt in prompts])
        yield from (group.tolist() for group in _groups(lengths, self.pass_tokens, batch_size))

    def start_session(self, prompts: Prompts) -> ScoringSession:
        return _StockSession(self, prompts)

    def forward(
        self, cache: KVCache, ids: IntArray, positions: IntArray, mask: NDArray[np.bool_] | None, keep: int
    ) -> tuple[FloatArray, KVCache]:
        """One pass over `ids` (B, T) after `cache`: scores (B, keep, U) of the last `keep` tokens, and the new cache.

        `mask` (B, T, columns of the new cache) is True where a token attends; None is causal.
        """
        past = DynamicCache(cache)
        attention_mask: Tensor | None = None
        if mask is not None:
            attention_mask = torch.from_numpy(mask).to(self.device)[:, None]
            if not self.takes_bool_mask:
                dtype = self.model.get_input_embeddings().weight.dtype
                attention_mask = torch.zeros(attention_mask.shape, dtype=dtype, device=self.device).masked_fill_(
                    ~attention_mask, torch.finfo(dtype).min
                )
        logits = self.model(
            input_ids=torch.from_numpy(ids).to(self.device),
            position_ids=torch.from_numpy(positions).to(self.device),
            attention_mask=attention_mask,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        parts = []
        for part in logits.flatten(0, 1).split(max(1, _LOGITS // logits.shape[-1])):
            fp32 = part.float()  # in 16 bits a softmax over a vocabulary has two correct digits
            parts.append(fp32[:, self.alphabet] - fp32.logsumexp(-1, keepdim=True))
        scores = to_host(torch.cat(parts)).reshape(*logits.shape[:2], -1)
        return scores, [(layer.keys, layer.values) for layer in past.layers]


class _StockSession:
    """The KV cache of a batch over the columns [prefix | rest of the prompt | trunk]; the root is the last token."""

    def __init__(self, scorer: StockScorer, prompts: Prompts) -> None:
        """Computes the prompts and the trunk after each."""
        self.scorer, self.trie = scorer, scorer.trie
        trie, trunk, batch, prefix = scorer.trie, scorer.trunk, len(prompts), len(scorer.prefix)
        # Tokens of each prompt between the prefix and its last token.
        self.rest_lengths = rest_lengths = np.array([len(prompt) - 1 - prefix for prompt in prompts])
        self.width = width = int(rest_lengths.max())
        ids = np.zeros((batch, width + trunk), np.int64)
        ids[:, width + 1 :] = trie.tokens[1:trunk]
        for row, prompt in enumerate(prompts):
            ids[row, : rest_lengths[row]] = prompt[prefix:-1]
            ids[row, width] = prompt[-1]
        positions = np.empty_like(ids)
        positions[:, :width] = prefix + np.arange(width)
        positions[:, width:] = (prefix + rest_lengths)[:, None] + trie.depths[:trunk]
        mask = np.zeros((batch, width + trunk, prefix + width + trunk), bool)
        mask[:, :, :prefix] = True
        mask[:, :width, prefix : prefix + width] = np.tri(width, dtype=bool)
        mask[:, width:, prefix : prefix + width] = (np.arange(width) < rest_lengths[:, None])[:, None]
        mask[:, width:, prefix + width :] = scorer.trunk_mask[:trunk]
        cache = [
            (keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)) for keys, values in scorer.prefix_cache
        ]
        self.trunk_scores, self.cache = scorer.forward(cache, ids, positions, mask, keep=trunk)

    def score(self, items: IntArray, nodes: IntArray) -> FloatArray:
        """As `ScoringSession.score`; the nodes are below the trunk."""
        trie, size = self.trie, len(self.trie.tokens)
        if not len(items):
            return np.empty((0, len(trie.alphabet)))
        paths = trie.paths[nodes]  # each node and its ancestors, computed together as far as they are not cached
        keys = np.unique((items[:, None] * size + paths)[paths >= self.scorer.trunk])
        key_items, key_nodes = np.divmod(keys, size)
        counts = np.bincount(key_items, minlength=len(self.rest_lengths))
        place = np.arange(len(keys)) - (np.cumsum(counts) - counts)[key_items]
        scores = np.empty((len(keys), len(trie.alphabet)))
        widest = max(1, _LOGITS // self.scorer.model.config.vocab_size // counts.max())
        for group in _groups(counts, self.scorer.pass_tokens, widest):
            row_of = np.full(len(counts), -1)
            row_of[group] = np.arange(len(group))
            in_group = row_of[key_items] >= 0
            rows, places = row_of[key_items[in_group]], place[in_group]
            table = np.full((len(group), counts[group].max()), -1)
            table[rows, places] = key_nodes[in_group]
            scores[in_group] = self._score_group(group, table)[rows, places]
        result: FloatArray = scores[np.searchsorted(keys, items * size + nodes)]
        return result

    def _score_group(self, group: IntArray, table: IntArray) -> FloatArray:
        """Log-probabilities (G, Q, U) after the nodes `table` (G, Q; -1 is padding) of the items `group` (G,)."""
        trie, prefix, width = self.trie, len(self.scorer.prefix), self.width
        nodes = np.maximum(table, 0)
        paths = trie.paths[nodes]  # (G, Q, D + 1)
        rest_lengths = self.rest_lengths[group]
        below = prefix + width + self.scorer.trunk
        mask = np.zeros((*table.shape, below + table.shape[1]), bool)
        mask[:, :, :prefix] = True
        mask[:, :, prefix : prefix + width] = (np.arange(width) < rest_lengths[:, None])[:, None]
        mask[:, :, prefix + width : below] = self.scorer.trunk_mask[nodes]
        at_depth = np.broadcast_to(trie.depths[nodes][:, None], (*table.shape, table.shape[1]))
        mask[:, :, below:] = np.take_along_axis(paths, at_depth, axis=2) == table[:, None]
        # Padding attends to itself, since the softmax over an empty row is NaN; nothing attends to padding.
        mask[:, :, below:] |= np.eye(table.shape[1], dtype=bool)
        rows = torch.from_numpy(group).to(self.scorer.device)
        cache = [(keys[rows], values[rows]) for keys, values in self.cache]
        positions = (prefix + rest_lengths)[:, None] + trie.depths[nodes]
        ids = np.maximum(trie.tokens[nodes], 0)
        return self.scorer.forward(cache, ids, positions, mask, keep=table.shape[1])[0]


def _groups(counts: IntArray, pass_tokens: int, largest: int) -> Iterator[IntArray]:
    """Items with a count above 0 in groups of similar counts, of at most `largest`: padding costs less than a pass."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    while len(order):
        padding = np.cumsum(counts[order[0]] - counts[order[:largest]])
        group, order = np.split(order, [np.searchsorted(padding, pass_tokens, side="right")])
        yield group


def _common_prefix(prompts: Prompts) -> list[int]:
    """The tokens that all prompts begin with, fewer than the shortest prompt has."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    return first[: min(common_prefix_length(first, last), min(map(len, prompts)) - 1)]
