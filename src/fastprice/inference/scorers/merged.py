"""Reading through a lean copy of the weights, for the models that `fastprice.inference.scorers.merged_decoder` knows; see `fastprice.inference.scorers.scorer`.

Tokens are packed, so that nothing but attention pads, and a pass holds about as many as a CPU's caches like. Prompts
are sorted, and what a prompt begins with as the one before it does is computed once, from one batch to the next too (as
in radix trees of cached prefixes: Zheng et al., "SGLang", 2024). Beside the question, that is 29 % of the tokens of
1,549 texts made of attributes (pc_parts), and 8 % of 586 of the synthetic catalogue. A node's key stays in the cache
for its descendants.

Legend: B items of a batch, R of a pass, Q nodes of an item in one pass, M nodes of the trie, U its tokens and the end,
N pairs (item, node), C columns of a cache, T tokens of a pass, D width of the model.
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
from fastprice.inference.scorers.merged_decoder import DenseDecoder, Queries, Tokens
from fastprice.inference.scorers.scorer import TRUNK, Prompts, Reading, common_length, on_host

__all__ = ["DenseReader"]

# Tokens of a pass: on a CPU what its caches hold of them, a few hundred numbers each.
_PASS_TOKENS = {"cpu": 512, "cuda": 2**15}
_WIDE = 64  # nodes of an item in one pass
_ROOM = 24  # columns for the nodes of an item, at first


class DenseReader:
    """`decoder` is a copy of the model at the time it was made."""

    def __init__(self, decoder: DenseDecoder, trie: PriceTrie) -> None:
        self.decoder, self.trie = decoder, trie
        self.device = decoder.device
        self.pass_tokens = _PASS_TOKENS["cuda" if self.device.type == "cuda" else "cpu"]
        self.trunk = trie.within(TRUNK)
        self.alphabet = torch.from_numpy(trie.alphabet).to(self.device)
        self.lines = np.maximum(trie.paths, 0)  # a node and its ancestors; the root again where there are no more
        self.is_leaf = trie.children == 0
        self._room = torch.empty(0)  # for the cache of one batch after the other
        self._masks: dict[int, Tensor] = {}
        self.begin([])

    def begin(self, prompts: Prompts) -> None:
        """What was read before is forgotten, so that the same prompts give the same scores, to the last bit."""
        self.above: tuple[Sequence[int], Tensor | None] = ((), None)

    def batches(self, prompts: Prompts, batch_size: int) -> Iterator[list[int]]:
        order = sorted(range(len(prompts)), key=lambda index: list(prompts[index]))
        for first in range(0, len(order), batch_size):
            yield order[first : first + batch_size]

    def read(self, prompts: Prompts) -> Reading:
        reading = _DenseReading(self, prompts, self.trunk)
        reading.scores = self.scores(reading.hidden).reshape(len(prompts), self.trunk, -1)
        return reading

    def last_states(self, prompts: Prompts) -> Tensor:
        """The hidden states (B, D) of the prompts' last tokens, after the last norm, in the model's dtype."""
        states = _DenseReading(self, prompts, 1).hidden
        self._forget_unless(states.isfinite().all())
        return states

    def cache(self, rows: int, columns: int) -> Tensor:
        """A cache that holds anything finite; the one before is lost."""
        if not len(self._room) or self._room.shape[2] < rows * columns:
            self._room = self.decoder.new_cache(1, rows * columns)
        cache: Tensor = self._room[:, 0, : rows * columns].unflatten(1, (rows, columns))
        return cache

    def tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def mask(self, sees: Tensor) -> Tensor:
        """(R, 1, Q, C) from (R, Q, C): what is added to the scores of what a query does not see."""
        hidden = (~sees).to(self.decoder.dtype)[:, None]
        added: Tensor = hidden * torch.finfo(hidden.dtype).min
        return added

    def scores(self, hidden: Tensor) -> FloatArray:
        """Log probabilities (N, U) of the trie's tokens and the end after hidden states (N, D)."""
        found = self.decoder.log_probabilities(hidden, self.alphabet)
        self._forget_unless(found.isfinite().all())
        return on_host(found)

    def _forget_unless(self, finite: Tensor) -> None:
        """What is not a number must not reach the next batch through a masked column."""
        if not bool(finite):
            self._room = torch.empty(0)
            self.begin([])

    def prompt_mask(self, trunk: int, length: int) -> Tensor:
        """Of prompts of P >= `length` tokens with `trunk` nodes after them: (P + trunk - 1, P + trunk), additive.

        What a shorter prompt and its nodes see stands in the lower right. The last column is seen by nobody.
        """
        known = self._masks.get(trunk)
        if known is None or len(known) < length + trunk - 1:
            longest = -(-length // 64) * 64
            count = longest + trunk - 1
            sees = np.tri(count, count + 1, dtype=bool)
            nodes = np.arange(trunk)
            below = (self.trie.paths[:trunk, :, None] == nodes).any(1)  # (trunk, trunk): itself and its ancestors
            sees[longest - 1 :, longest - 1 : count] = below
            known = self._masks[trunk] = self.mask(self.tensor(sees[None]))[0, 0]
        return known


class _DenseReading:
    """The cache of a batch: each item's prompt, then the nodes it was asked about that have children.

    `hidden` (B * trunk, D) are the states of the trunk, `scores` (B, trunk, U) what `DenseReader.read` makes of them.
    """

    scores: FloatArray

    def __init__(self, reader: DenseReader, prompts: Prompts, trunk: int) -> None:
        self.reader, self.trie, self.trunk = reader, reader.trie, trunk
        self.lengths = np.array([len(prompt) for prompt in prompts])
        self.columns = int(self.lengths.max()) + trunk - 1 + _ROOM
        self.cache = reader.cache(len(prompts), self.columns)
        self.column_of = np.full((len(prompts), len(self.trie.tokens)), -1)
        self.column_of[:, :trunk] = self.lengths[:, None] - 1 + np.arange(trunk)
        self.filled = self.lengths + trunk - 1
        # Columns that hold what they hold in the row before. The last token of a prompt is always computed: it asks.
        shared = [common_length(*pair) for pair in pairwise([reader.above[0], *prompts])]
        self.shared = np.minimum(shared, self.lengths - 1)
        chunks = _chunks((self.filled - self.shared).tolist(), reader.pass_tokens)
        self.hidden = torch.cat([self._prompts(prompts, rows) for rows in chunks])
        reader.above = (prompts[-1], self.cache[:, -1, : len(prompts[-1])].clone())

    def ask(self, items: IntArray, nodes: IntArray) -> FloatArray:
        """As `Reading.ask`."""
        if not len(items):
            return np.empty((0, len(self.trie.alphabet)))
        reader, size = self.reader, len(self.trie.tokens)
        lines = reader.lines[nodes]  # a node, and its ancestors that the cache does not hold
        missing = (self.column_of[items[:, None], lines] < 0) | (lines == nodes[:, None])
        # By item, and ancestors first: leaves are last, and the nodes of the trie in breadth-first order.
        keys = np.unique(((2 * items[:, None] + reader.is_leaf[lines]) * size + lines)[missing])
        asked = (2 * items + reader.is_leaf[nodes]) * size + nodes
        fed_items, fed_nodes = keys // (2 * size), keys % size
        counts = np.bincount(fed_items, minlength=len(self.lengths))
        place = np.arange(len(keys)) - (np.cumsum(counts) - counts)[fed_items]
        wanted = np.isin(keys, asked)
        scores = np.empty((len(keys), len(self.trie.alphabet)))
        for first in range(0, int(counts.max()), _WIDE):
            step = np.flatnonzero((place >= first) & (place < first + _WIDE))
            in_step = np.clip(counts - first, 0, _WIDE)
            self._reserve(int(np.max(self.filled + in_step)))
            for rows in _chunks(in_step.tolist(), reader.pass_tokens):
                chosen = step[slice(*np.searchsorted(fed_items[step], (rows.start, rows.stop)))]
                if len(chosen):
                    reads = wanted[chosen]
                    found = self._nodes(rows, fed_items[chosen], fed_nodes[chosen], place[chosen] - first, reads)
                    scores[chosen[reads]] = found
            stays = step[~reader.is_leaf[fed_nodes[step]]]
            self.filled += np.bincount(fed_items[stays], minlength=len(counts))
        result: FloatArray = scores[np.searchsorted(keys, asked)]
        return result

    def _prompts(self, prompts: Prompts, rows: slice) -> Tensor:
        """Computes the prompts of `rows` and their trunks: hidden states (R * trunk, D).

        A token of a prompt is at column k of its row, and computed in the first row that begins with the same k + 1.
        """
        reader, trie, trunk = self.reader, self.trie, self.trunk
        lengths, shared, filled = self.lengths[rows], self.shared[rows], self.filled[rows]
        held = int(shared[0])  # columns of the row above that are in the cache
        if held:
            above = reader.above[1] if rows.start == 0 else self.cache[:, rows.start - 1]
            assert above is not None
            self.cache[:, rows, :held] = above[:, None, :held]
        nodes, depths = trie.tokens[1:trunk], trie.depths[:trunk] - 1
        ids, positions, cells, sources = [], [], [], []
        index = np.full(held, -1)  # which token of the pass stands in each column of the row
        count = 0
        for row, prompt in enumerate(prompts[rows]):
            begin, length = int(shared[row]), int(lengths[row])
            own = np.arange(begin, filled[row])
            held = min(held, begin)
            index = np.concatenate([index[:begin], own + (count - begin)])
            count += len(own)
            ids += [np.array(prompt[begin:]), nodes]
            positions += [own[: length - 1 - begin], length + depths]
            cells.append((rows.start + row) * self.columns + np.arange(held, filled[row]))
            sources.append(index[held:])
        copied = np.concatenate(sources)
        ends = np.cumsum(filled - shared)
        reads = (ends[:, None] - trunk + np.arange(trunk)).ravel()
        return reader.decoder(
            self.cache,
            Tokens(
                reader.tensor(np.concatenate(ids)),
                reader.tensor(np.concatenate(positions)),
                int(filled.max()),
                reader.tensor(np.concatenate(cells)),
                None if len(copied) == count else reader.tensor(copied),
            ),
            self._prompt_queries(rows, filled - shared),
            reader.tensor(reads),
            self._prompt_queries(rows, np.full_like(filled, trunk)),
        )

    def _prompt_queries(self, rows: slice, counts: IntArray) -> Queries:
        """Of the tokens in the last `counts` (R,) columns of `rows`."""
        filled, tensor = self.filled[rows], self.reader.tensor
        whole = self.reader.prompt_mask(self.trunk, int(self.lengths[rows].max()))
        left, queries, columns = len(whole) - filled, int(counts.max()), int(filled.max())
        if len(filled) == 1:
            mask = whole[None, None, len(whole) - queries :, int(left[0]) :][..., :columns].contiguous()
        else:  # what is padding asks as the last token does, and beyond the last column nobody sees anything
            asks = np.minimum((len(whole) - counts)[:, None] + np.arange(queries), len(whole) - 1)
            seen = np.minimum(left[:, None] + np.arange(columns), len(whole))
            mask = whole[tensor(asks)[:, None, :, None], tensor(seen)[:, None, None]]
        return Queries(rows, self._places(counts, queries), mask)

    def _places(self, counts: IntArray, queries: int) -> Tensor | None:
        """Where tokens, `counts` (R,) of each row, stand in a grid (R, queries)."""
        if (counts == queries).all():
            return None
        return self.reader.tensor(np.flatnonzero(np.arange(queries) < counts[:, None]))

    def _nodes(
        self, rows: slice, items: IntArray, nodes: IntArray, place: IntArray, reads: NDArray[np.bool_]
    ) -> FloatArray:
        """Feeds nodes (T,) of items (T,), the place-th new one of each: log probabilities after those of `reads`."""
        trie, reader = self.trie, self.reader
        columns = self.filled[items] + place
        self.column_of[items, nodes] = columns
        sees = self.column_of[items[:, None], reader.lines[nodes]]
        leaves = reader.is_leaf[nodes]
        self.column_of[items[leaves], nodes[leaves]] = -1  # overwritten by the next that come
        used = int(columns.max()) + 1
        tokens = Tokens(
            reader.tensor(trie.tokens[nodes]),
            reader.tensor(self.lengths[items] - 1 + trie.depths[nodes]),
            used,
            reader.tensor(items * self.columns + columns),
        )
        row = items - rows.start
        queries = self._node_queries(rows, row, sees, used)
        if reads.all():
            return reader.scores(reader.decoder(self.cache, tokens, queries))
        last = self._node_queries(rows, row[reads], sees[reads], used)
        return reader.scores(reader.decoder(self.cache, tokens, queries, reader.tensor(np.flatnonzero(reads)), last))

    def _node_queries(self, rows: slice, row: IntArray, sees: IntArray, used: int) -> Queries:
        """Of tokens in `row` (T,) of `rows`, in order, that see the columns (T, D + 1) beside those of the prompt.

        A query that is padding sees the prompt: the softmax over nothing is not a number.
        """
        counts = np.bincount(row, minlength=rows.stop - rows.start)
        place = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
        queries = max(1, int(counts.max()))
        seen = np.empty((len(counts), queries, used), bool)
        seen[:] = (np.arange(used) < self.lengths[rows, None])[:, None]
        seen[row[:, None], place[:, None], sees] = True
        return Queries(rows, self._places(counts, queries), self.reader.mask(self.reader.tensor(seen)))

    def _reserve(self, columns: int) -> None:
        """Makes room for that many columns."""
        if columns > self.columns:
            grown = self.reader.decoder.new_cache(len(self.lengths), columns + _WIDE)
            grown[:, :, : self.columns] = self.cache
            self.cache, self.columns = grown, grown.shape[2]


def _chunks(counts: list[int], tokens: int) -> Iterator[slice]:
    """Neighboring rows whose counts sum to at most `tokens`, or one row."""
    first, held = 0, 0
    for row, count in enumerate(counts):
        if row > first and held + count > tokens:
            yield slice(first, row)
            first, held = row, 0
        held += count
    yield slice(first, len(counts))
