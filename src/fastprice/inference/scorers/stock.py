"""Reading through transformers' own forward pass, which serves every model; see `fastprice.inference.scorers.scorer`.

Batches are padded to their longest prompt (the last few tokens of padding are cheaper than a batch of their own). The
tokens that all prompts begin with (the question) are computed once, for all batches, and the first levels of the trie
in one pass with the prompts. The cache keeps those alone: a deeper node feeds its few ancestors again, so that a pass
can run on any subset of the items, grouped by need.

Legend: B items of a batch, G of a group, Q nodes of an item in one pass, M nodes of the trie, U its tokens and the end,
N pairs (item, node), T tokens of a pass.
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
from fastprice.inference.scorers.scorer import TRUNK, Prompts, Reading, common_length, on_host

__all__ = ["StockReader"]

Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, as transformers shapes them

_LOGITS = 2**25  # elements upcast to fp32 at once: 128 MiB
_PASS_TOKENS = {"cpu": 64, "cuda": 2048}  # a pass costs about as much as this many tokens more in another


class StockReader:
    """`model` is called as transformers models are, with a mask of its own for every token."""

    def __init__(self, model: Any, trie: PriceTrie) -> None:
        self.model, self.trie = model, trie
        self.device = model.device
        self.as_bool = model.config._attn_implementation == "sdpa"
        self.alphabet = torch.from_numpy(trie.alphabet).to(self.device)
        self.pass_tokens = _PASS_TOKENS["cuda" if self.device.type == "cuda" else "cpu"]
        self.trunk = trie.within(TRUNK)
        trunk = np.arange(self.trunk)
        self.sees_trunk = trie.paths[:, trie.depths[trunk]] == trunk  # (M, trunk)
        self.start: list[int] = []
        self.start_cache: Cache = []

    def begin(self, prompts: Prompts) -> None:
        start = _common_start(prompts)
        self.start, self.start_cache = [], []
        if (len(prompts) - 1) * len(start) > self.pass_tokens:
            self.start = start
            ids = np.array([self.start])
            _, self.start_cache = self.forward([], ids, np.arange(len(self.start))[None], None, keep=1)

    def batches(self, prompts: Prompts, batch_size: int) -> Iterator[list[int]]:
        lengths = np.array([len(prompt) for prompt in prompts])
        yield from (group.tolist() for group in _groups(lengths, self.pass_tokens, batch_size))

    def read(self, prompts: Prompts) -> Reading:
        return _StockReading(self, prompts)

    def forward(
        self, cache: Cache, ids: IntArray, positions: IntArray, mask: NDArray[np.bool_] | None, keep: int
    ) -> tuple[FloatArray, Cache]:
        """One pass over `ids` (B, T) after `cache`: scores (B, keep, U) of the last columns, and the longer cache.

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
        logits = self.model(
            input_ids=torch.from_numpy(ids).to(self.device),
            position_ids=torch.from_numpy(positions).to(self.device),
            attention_mask=seen,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        parts = []
        for part in logits.flatten(0, 1).split(max(1, _LOGITS // logits.shape[-1])):
            fp32 = part.float()  # in 16 bits a softmax over a vocabulary is good for two digits
            parts.append(fp32[:, self.alphabet] - fp32.logsumexp(-1, keepdim=True))
        scores = on_host(torch.cat(parts)).reshape(*logits.shape[:2], -1)
        return scores, [(layer.keys, layer.values) for layer in past.layers]


class _StockReading:
    """Keys and values of a batch, layer by layer, over the columns [start | rest of the prompt | trunk]."""

    def __init__(self, reader: StockReader, prompts: Prompts) -> None:
        """Computes the prompts and the trunk after each."""
        self.reader, self.trie = reader, reader.trie
        trie, trunk, batch, start = reader.trie, reader.trunk, len(prompts), len(reader.start)
        self.rests = rests = np.array([len(prompt) - 1 - start for prompt in prompts])  # tokens between start and root
        self.width = width = int(rests.max())
        ids = np.zeros((batch, width + trunk), np.int64)
        ids[:, width + 1 :] = trie.tokens[1:trunk]
        for row, prompt in enumerate(prompts):
            ids[row, : rests[row]] = prompt[start:-1]
            ids[row, width] = prompt[-1]
        positions = np.empty_like(ids)
        positions[:, :width] = start + np.arange(width)
        positions[:, width:] = (start + rests)[:, None] + trie.depths[:trunk]
        mask = np.zeros((batch, width + trunk, start + width + trunk), bool)
        mask[:, :, :start] = True
        mask[:, :width, start : start + width] = np.tri(width, dtype=bool)
        mask[:, width:, start : start + width] = (np.arange(width) < rests[:, None])[:, None]
        mask[:, width:, start + width :] = reader.sees_trunk[:trunk]
        cache = [
            (keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)) for keys, values in reader.start_cache
        ]
        self.scores, self.cache = reader.forward(cache, ids, positions, mask, keep=trunk)

    def ask(self, items: IntArray, nodes: IntArray) -> FloatArray:
        """As `Reading.ask`; the nodes are below the trunk."""
        trie, size = self.trie, len(self.trie.tokens)
        if not len(items):
            return np.empty((0, len(trie.alphabet)))
        lines = trie.paths[nodes]  # a node, and its ancestors that the cache does not hold
        keys = np.unique((items[:, None] * size + lines)[lines >= self.reader.trunk])
        fed_items, fed_nodes = np.divmod(keys, size)
        counts = np.bincount(fed_items, minlength=len(self.rests))
        place = np.arange(len(keys)) - (np.cumsum(counts) - counts)[fed_items]
        scores = np.empty((len(keys), len(trie.alphabet)))
        widest = max(1, _LOGITS // self.reader.model.config.vocab_size // counts.max())
        for group in _groups(counts, self.reader.pass_tokens, widest):
            row_of = np.full(len(counts), -1)
            row_of[group] = np.arange(len(group))
            mine = row_of[fed_items] >= 0
            rows, places = row_of[fed_items[mine]], place[mine]
            table = np.full((len(group), counts[group].max()), -1)
            table[rows, places] = fed_nodes[mine]
            scores[mine] = self._branch(group, table)[rows, places]
        result: FloatArray = scores[np.searchsorted(keys, items * size + nodes)]
        return result

    def _branch(self, group: IntArray, table: IntArray) -> FloatArray:
        """Log probabilities (G, Q, U) after the nodes `table` (G, Q; -1 is padding) of the items `group` (G,)."""
        trie, start, width = self.trie, len(self.reader.start), self.width
        nodes = np.maximum(table, 0)
        paths = trie.paths[nodes]  # (G, Q, D + 1)
        rests = self.rests[group]
        below = start + width + self.reader.trunk
        mask = np.zeros((*table.shape, below + table.shape[1]), bool)
        mask[:, :, :start] = True
        mask[:, :, start : start + width] = (np.arange(width) < rests[:, None])[:, None]
        mask[:, :, start + width : below] = self.reader.sees_trunk[nodes]
        at_depth = np.broadcast_to(trie.depths[nodes][:, None], (*table.shape, table.shape[1]))
        mask[:, :, below:] = np.take_along_axis(paths, at_depth, axis=2) == table[:, None]
        # Padding sees itself, so that no row of the mask is empty (its softmax would be NaN); nothing sees padding.
        mask[:, :, below:] |= np.eye(table.shape[1], dtype=bool)
        rows = torch.from_numpy(group).to(self.reader.device)
        cache = [(keys[rows], values[rows]) for keys, values in self.cache]
        positions = (start + rests)[:, None] + trie.depths[nodes]
        ids = np.maximum(trie.tokens[nodes], 0)
        return self.reader.forward(cache, ids, positions, mask, keep=table.shape[1])[0]


def _groups(counts: IntArray, pass_tokens: int, most: int) -> Iterator[IntArray]:
    """Items with a count above 0 in groups of like counts: at most `most`, and less padding than a pass costs."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    while len(order):
        padding = np.cumsum(counts[order[0]] - counts[order[:most]])
        group, order = np.split(order, [np.searchsorted(padding, pass_tokens, side="right")])
        yield group


def _common_start(prompts: Prompts) -> list[int]:
    """The tokens that all prompts begin with, less than the whole of the shortest."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    return first[: min(common_length(first, last), min(map(len, prompts)) - 1)]
