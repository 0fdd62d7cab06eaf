"""`MergedScorer`: scoring through `MergedDecoder`, a dense copy of the weights with the adapters merged.

Tokens are packed, so that only attention pads, and a pass holds about as many tokens as suit a CPU's caches. Prompts
are sorted, and the tokens that a prompt shares with the prompt before it are computed once, from one batch to the next
too (as in radix trees of cached prefixes: Zheng et al., "SGLang", 2024; docs/LOG.md says how many that is). The key and
value of a node stay in the cache for its descendants.

Legend: B items of a batch, R rows (items) of a pass, Q nodes of an item in one pass, M nodes of the trie, U tokens of
its alphabet, N pairs (item, node), C columns of a row of the cache, T tokens of a pass, D width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastprice.common.arrays import FloatArray, IntArray
from fastprice.inference.price_trie import PriceTrie
from fastprice.inference.scorers.merged_decoder import MergedDecoder, PassTokens, QueryPositions
from fastprice.inference.scorers.scorer import TRUNK_NODES, Prompts, ScoringSession, common_prefix_length, to_host

__all__ = ["MergedScorer"]

# Tokens of a pass: on a CPU as many as its caches hold, at a few hundred numbers each.
_PASS_TOKENS = {"cpu": 512, "cuda": 2**15}
_NODES = 64  # nodes of an item in one pass
_SPARE_COLUMNS = 24  # of the cache, for the nodes of an item at first


class MergedScorer:
    """See `fastprice.inference.scorers.scorer.Scorer`; `decoder` holds the weights at the time it was made."""

    def __init__(self, decoder: MergedDecoder, trie: PriceTrie) -> None:
        self.decoder, self.trie = decoder, trie
        self.device = decoder.device
        self.pass_tokens = _PASS_TOKENS["cuda" if self.device.type == "cuda" else "cpu"]
        self.trunk = trie.nodes_within(TRUNK_NODES)
        self.alphabet = torch.from_numpy(trie.alphabet).to(self.device)
        self.paths = np.maximum(trie.paths, 0)  # a node and its ancestors, padded with the root
        self.is_leaf = trie.children == 0
        self._buffer = torch.empty(0)  # of the KV cache, reused from batch to batch
        self._masks: dict[int, Tensor] = {}
        self.prepare([])

    def prepare(self, prompts: Prompts) -> None:
        """Forgets earlier prompts, so that equal prompts get equal scores, to the last bit."""
        # The last prompt of the batch before, with its keys and values.
        self.previous: tuple[Sequence[int], Tensor | None] = ((), None)

    def batches(self, prompts: Prompts, batch_size: int) -> Iterator[list[int]]:
        order = sorted(range(len(prompts)), key=lambda index: list(prompts[index]))
        for first in range(0, len(order), batch_size):
            yield order[first : first + batch_size]

    def start_session(self, prompts: Prompts) -> ScoringSession:
        session = _MergedSession(self, prompts, self.trunk)
        session.trunk_scores = self.scores(session.hidden).reshape(len(prompts), self.trunk, -1)
        return session

    def last_hidden_states(self, prompts: Prompts) -> Tensor:
        """The hidden states (B, D) of the prompts' last tokens, after the last norm, in the model's dtype."""
        hidden = _MergedSession(self, prompts, 1).hidden
        self._forget_unless(hidden.isfinite().all())
        return hidden

    def cache(self, rows: int, columns: int) -> Tensor:
        """A KV cache with arbitrary finite contents; it reuses the memory of the one before."""
        if not len(self._buffer) or self._buffer.shape[2] < rows * columns:
            self._buffer = self.decoder.new_cache(1, rows * columns)
        cache: Tensor = self._buffer[:, 0, : rows * columns].unflatten(1, (rows, columns))
        return cache

    def tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def additive_mask(self, attends: Tensor) -> Tensor:
        """(R, 1, Q, C) from booleans (R, Q, C): what is added to attention scores, 0 where a query attends."""
        blocked = (~attends).to(self.decoder.dtype)[:, None]
        added: Tensor = blocked * torch.finfo(blocked.dtype).min
        return added

    def scores(self, hidden: Tensor) -> FloatArray:
        """Log-probabilities (N, U) of the trie's alphabet after hidden states (N, D)."""
        found = self.decoder.log_probabilities(hidden, self.alphabet)
        self._forget_unless(found.isfinite().all())
        return to_host(found)

    def _forget_unless(self, finite: Tensor) -> None:
        """Drops the cache after a pass that gave NaN: masked columns reach the next batch too, and 0 * NaN is NaN."""
        if not bool(finite):
            self._buffer = torch.empty(0)
            self.prepare([])

    def prompt_mask(self, trunk: int, length: int) -> Tensor:
        """For prompts of P >= `length` tokens and `trunk` nodes after them: (P + trunk - 1, P + trunk), additive.

        The mask of a shorter prompt and its nodes is the lower right part. Nothing attends to the last column.
        """
        mask = self._masks.get(trunk)
        if mask is None or len(mask) < length + trunk - 1:
            longest = -(-length // 64) * 64
            count = longest + trunk - 1
            attends = np.tri(count, count + 1, dtype=bool)
            nodes = np.arange(trunk)
            # (trunk, trunk): a node attends to itself and to its ancestors
            attends[longest - 1 :, longest - 1 : count] = (self.trie.paths[:trunk, :, None] == nodes).any(1)
            mask = self._masks[trunk] = self.additive_mask(self.tensor(attends[None]))[0, 0]
        return mask


class _MergedSession:
    """The KV cache of a batch: each item's prompt, then those of its scored nodes that have children.

    `hidden` (B * trunk, D) are the hidden states of the trunk, from which `start_session` makes `trunk_scores`.
    """

    trunk_scores: FloatArray

    def __init__(self, scorer: MergedScorer, prompts: Prompts, trunk: int) -> None:
        self.scorer, self.trie, self.trunk = scorer, scorer.trie, trunk
        self.lengths = np.array([len(prompt) for prompt in prompts])
        self.columns = int(self.lengths.max()) + trunk - 1 + _SPARE_COLUMNS
        self.cache = scorer.cache(len(prompts), self.columns)
        self.column_of = np.full((len(prompts), len(self.trie.tokens)), -1)
        self.column_of[:, :trunk] = self.lengths[:, None] - 1 + np.arange(trunk)
        self.filled = self.lengths + trunk - 1
        # Columns equal to those of the row before. The last token of a prompt is always computed: it is a query.
        shared = [common_prefix_length(*pair) for pair in pairwise([scorer.previous[0], *prompts])]
        self.shared = np.minimum(shared, self.lengths - 1)
        chunks = _chunks((self.filled - self.shared).tolist(), scorer.pass_tokens)
        self.hidden = torch.cat([self._compute_prompts(prompts, rows) for rows in chunks])
        scorer.previous = (prompts[-1], self.cache[:, -1, : len(prompts[-1])].clone())

    def score(self, items: IntArray, nodes: IntArray) -> FloatArray:
        """As `ScoringSession.score`."""
        if not len(items):
            return np.empty((0, len(self.trie.alphabet)))
        scorer, size = self.scorer, len(self.trie.tokens)
        paths = scorer.paths[nodes]  # each node and its ancestors, computed as far as they are not cached
        missing = (self.column_of[items[:, None], paths] < 0) | (paths == nodes[:, None])
        # Sorted by item, ancestors first: leaves come last, and nodes of the trie are in breadth-first order.
        keys = np.unique(((2 * items[:, None] + scorer.is_leaf[paths]) * size + paths)[missing])
        requested = (2 * items + scorer.is_leaf[nodes]) * size + nodes
        key_items, key_nodes = keys // (2 * size), keys % size
        counts = np.bincount(key_items, minlength=len(self.lengths))
        place = np.arange(len(keys)) - (np.cumsum(counts) - counts)[key_items]
        is_requested = np.isin(keys, requested)
        scores = np.empty((len(keys), len(self.trie.alphabet)))
        for first in range(0, int(counts.max()), _NODES):
            step = np.flatnonzero((place >= first) & (place < first + _NODES))
            in_step = np.clip(counts - first, 0, _NODES)
            self._reserve(int(np.max(self.filled + in_step)))
            for rows in _chunks(in_step.tolist(), scorer.pass_tokens):
                chosen = step[slice(*np.searchsorted(key_items[step], (rows.start, rows.stop)))]
                if len(chosen):
                    scored = is_requested[chosen]
                    found = self._score_nodes(rows, key_items[chosen], key_nodes[chosen], place[chosen] - first, scored)
                    scores[chosen[scored]] = found
            kept = step[~scorer.is_leaf[key_nodes[step]]]
            self.filled += np.bincount(key_items[kept], minlength=len(counts))
        result: FloatArray = scores[np.searchsorted(keys, requested)]
        return result

    def _compute_prompts(self, prompts: Prompts, rows: slice) -> Tensor:
        """Computes the prompts of `rows` and the trunk after each: hidden states of the trunk (R * trunk, D).

        Token k of a prompt is at column k of its row, and computed in the first row with the same first k + 1 tokens.
        """
        scorer, trie, trunk = self.scorer, self.trie, self.trunk
        lengths, shared, filled = self.lengths[rows], self.shared[rows], self.filled[rows]
        cached = int(shared[0])  # columns that the row before the first one has in the cache
        if cached:
            previous = scorer.previous[1] if rows.start == 0 else self.cache[:, rows.start - 1]
            assert previous is not None
            self.cache[:, rows, :cached] = previous[:, None, :cached]
        nodes, depths = trie.tokens[1:trunk], trie.depths[:trunk] - 1
        ids, positions, cells, sources = [], [], [], []
        index = np.full(cached, -1)  # which token of the pass is at each column of the row
        count = 0
        for row, prompt in enumerate(prompts[rows]):
            begin, length = int(shared[row]), int(lengths[row])
            own = np.arange(begin, filled[row])
            cached = min(cached, begin)
            index = np.concatenate([index[:begin], own + (count - begin)])
            count += len(own)
            ids += [np.array(prompt[begin:]), nodes]
            positions += [own[: length - 1 - begin], length + depths]
            cells.append((rows.start + row) * self.columns + np.arange(cached, filled[row]))
            sources.append(index[cached:])
        copied = np.concatenate(sources)
        ends = np.cumsum(filled - shared)
        outputs = (ends[:, None] - trunk + np.arange(trunk)).ravel()
        return scorer.decoder(
            self.cache,
            PassTokens(
                scorer.tensor(np.concatenate(ids)),
                scorer.tensor(np.concatenate(positions)),
                int(filled.max()),
                scorer.tensor(np.concatenate(cells)),
                None if len(copied) == count else scorer.tensor(copied),
            ),
            self._prompt_queries(rows, filled - shared),
            scorer.tensor(outputs),
            self._prompt_queries(rows, np.full_like(filled, trunk)),
        )

    def _prompt_queries(self, rows: slice, counts: IntArray) -> QueryPositions:
        """Of queries that are the tokens in the last `counts` (R,) columns of `rows`."""
        filled, tensor = self.filled[rows], self.scorer.tensor
        whole = self.scorer.prompt_mask(self.trunk, int(self.lengths[rows].max()))
        left, queries, columns = len(whole) - filled, int(counts.max()), int(filled.max())
        if len(filled) == 1:
            mask = whole[None, None, len(whole) - queries :, int(left[0]) :][..., :columns].contiguous()
        else:  # padding has the mask of the last token; nothing attends beyond the last column
            mask_rows = np.minimum((len(whole) - counts)[:, None] + np.arange(queries), len(whole) - 1)
            mask_columns = np.minimum(left[:, None] + np.arange(columns), len(whole))
            mask = whole[tensor(mask_rows)[:, None, :, None], tensor(mask_columns)[:, None, None]]
        return QueryPositions(rows, self._places(counts, queries), mask)

    def _places(self, counts: IntArray, queries: int) -> Tensor | None:
        """Flat places in a grid (R, queries) of the rows' tokens, `counts` (R,) of each; None: the grid is full."""
        if (counts == queries).all():
            return None
        return self.scorer.tensor(np.flatnonzero(np.arange(queries) < counts[:, None]))

    def _score_nodes(
        self, rows: slice, items: IntArray, nodes: IntArray, place: IntArray, scored: NDArray[np.bool_]
    ) -> FloatArray:
        """Computes nodes (T,) of items (T,), each the place-th new one of its item: scores after the `scored` ones."""
        trie, scorer = self.trie, self.scorer
        columns = self.filled[items] + place
        self.column_of[items, nodes] = columns
        attends = self.column_of[items[:, None], scorer.paths[nodes]]
        leaves = scorer.is_leaf[nodes]
        self.column_of[items[leaves], nodes[leaves]] = -1  # their columns are overwritten by the next nodes
        used = int(columns.max()) + 1
        tokens = PassTokens(
            scorer.tensor(trie.tokens[nodes]),
            scorer.tensor(self.lengths[items] - 1 + trie.depths[nodes]),
            used,
            scorer.tensor(items * self.columns + columns),
        )
        row = items - rows.start
        queries = self._node_queries(rows, row, attends, used)
        if scored.all():
            return scorer.scores(scorer.decoder(self.cache, tokens, queries))
        last = self._node_queries(rows, row[scored], attends[scored], used)
        return scorer.scores(scorer.decoder(self.cache, tokens, queries, scorer.tensor(np.flatnonzero(scored)), last))

    def _node_queries(self, rows: slice, row: IntArray, attends: IntArray, used: int) -> QueryPositions:
        """Of queries in `row` (T,) of `rows`, in order; each attends to its prompt and to `attends` (T, depth + 1).

        A query that is padding attends to the prompt, since the softmax over nothing is NaN.
        """
        counts = np.bincount(row, minlength=rows.stop - rows.start)
        place = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
        queries = max(1, int(counts.max()))
        mask = np.empty((len(counts), queries, used), bool)
        mask[:] = (np.arange(used) < self.lengths[rows, None])[:, None]
        mask[row[:, None], place[:, None], attends] = True
        return QueryPositions(rows, self._places(counts, queries), self.scorer.additive_mask(self.scorer.tensor(mask)))

    def _reserve(self, columns: int) -> None:
        """Grows the cache to at least that many columns."""
        if columns > self.columns:
            grown = self.scorer.decoder.new_cache(len(self.lengths), columns + _NODES)
            grown[:, :, : self.columns] = self.cache
            self.cache, self.columns = grown, grown.shape[2]


def _chunks(counts: list[int], tokens: int) -> Iterator[slice]:
    """Neighboring rows whose counts sum to at most `tokens`, or one row."""
    first, total = 0, 0
    for row, count in enumerate(counts):
        if row > first and total + count > tokens:
            yield slice(first, row)
            first, total = row, 0
        total += count
    yield slice(first, len(counts))
