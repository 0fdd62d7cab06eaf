"""Asking a model what follows a prompt and some tokens of a price: through transformers, or through a dense copy.

The nodes of an item stand side by side after its prompt, and a mask lets each see the prompt and its own ancestors
alone (tree attention: Miao et al., "SpecInfer", 2023), so that a prompt's keys and values are computed once and read by
all. The tokens that all prompts begin with (the question) are computed once, for all batches.

`StockReader` serves every model: batches padded to their longest prompt (the last few tokens of padding are cheaper
than a batch of their own), the first levels of the trie computed in one pass with the prompts, and below them a cache
that keeps the prompts alone: a deeper node feeds its few ancestors again, so that a pass can run on any subset of the
items, grouped by need.

`DenseReader` serves the models that `fastprice.dense` knows. Tokens are packed, so that nothing but attention pads, and
a pass holds about as many as a CPU's caches like. Prompts are sorted, and what a prompt begins with as the one before
it does is computed once (as in radix trees of cached prefixes: Zheng et al., "SGLang", 2024). Beside the question, that
is 29 % of the tokens of 1,549 texts made of attributes (pc_parts) in batches of 64, and 8 % of 586 of the synthetic
catalogue. A node's key stays in the cache for its descendants.

Legend: B items of a batch, G of a group, Q nodes of an item in one pass, M nodes of the trie, U its tokens and the end,
N pairs (item, node), C columns of a cache, T tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from fastprice.dense import Cache, DenseDecoder, Queries, Tokens
from fastprice.trie import FloatArray, IntArray, PriceTrie

__all__ = ["DenseReader", "Reader", "Reading", "StockReader", "reader_of"]

Prompts = Sequence[Sequence[int]]

_TRUNK = 16  # nodes
_LOGITS = 2**25  # elements upcast to fp32 at once: 128 MiB
# A pass through transformers costs about as much as this many tokens more in another.
_STOCK_PASS = {"cpu": 64, "cuda": 2048}
# Tokens of a dense pass: on a CPU what its caches hold of them, a few hundred numbers each.
_DENSE_PASS = {"cpu": 512, "cuda": 2**15}
_WIDE = 64  # nodes of an item in one dense pass
_ROOM = 24  # columns for the nodes of an item, at first


class Reading(Protocol):
    """The prompts of a batch, computed."""

    scores: FloatArray  # (B, trunk, U): log probabilities after the first nodes of the trie

    def ask(self, items: IntArray, nodes: IntArray) -> FloatArray:
        """Log probabilities (N, U) of the trie's tokens and the end after nodes (N,) of items (N,)."""


class Reader(Protocol):
    """A model, and the trie of the prices that it is asked about."""

    trie: PriceTrie

    def begin(self, prompts: Prompts) -> None:
        """Computes what all `prompts` begin with, where that pays. `read` is then asked about some of them."""

    def batches(self, prompts: Prompts, batch_size: int) -> Iterator[list[int]]:
        """Indices of `prompts` to read together, at most `batch_size` at once."""

    def read(self, prompts: Prompts) -> Reading:
        """Computes `prompts`."""


def reader_of(model: Any, trie: PriceTrie, *, masks: bool = True) -> Reader | None:
    """The fastest reader that `model` and the free memory allow.

    masks: whether the model's own forward pass takes a mask for each token. Where it does not, a dense copy is the only
    way, and None says that there is none.
    """
    decoder = DenseDecoder.of(model)
    if decoder is not None:
        return DenseReader(decoder, trie)
    return StockReader(model, trie) if masks else None


class DenseReader:
    """See the module; `decoder` is a copy of the model at the time it was made."""

    def __init__(self, decoder: DenseDecoder, trie: PriceTrie) -> None:
        self.decoder, self.trie = decoder, trie
        self.device = decoder.device
        self.alphabet = torch.from_numpy(trie.alphabet).to(self.device)
        self.pass_tokens = _DENSE_PASS["cuda" if self.device.type == "cuda" else "cpu"]
        self.trunk = trie.within(_TRUNK)
        self.start: list[int] = []
        self.start_cache: Cache = []
        self._room: Cache = []  # for the cache of one batch after the other

    def begin(self, prompts: Prompts) -> None:
        self.start, self.start_cache = (_common_start(prompts) if len(prompts) > 1 else []), []
        if self.start:
            count = len(self.start)
            self.start_cache = self.decoder.new_cache(1, count)
            places = np.arange(count)
            queries = self.queries(slice(0, 1), np.tri(count, dtype=bool)[None], None)
            self.decoder(self.start_cache, self.tokens(np.array(self.start), places, places), queries)

    def batches(self, prompts: Prompts, batch_size: int) -> Iterator[list[int]]:
        order = sorted(range(len(prompts)), key=lambda index: list(prompts[index]))
        for first in range(0, len(order), batch_size):
            yield order[first : first + batch_size]

    def read(self, prompts: Prompts) -> Reading:
        return _DenseReading(self, prompts)

    def cache(self, rows: int, columns: int) -> Cache:
        """A cache that holds anything finite; the one before is lost."""
        if not self._room or self._room[0][0].shape[1] < rows * columns:
            self._room = self.decoder.new_cache(1, rows * columns)
        return [
            (
                keys[0, : rows * columns].unflatten(0, (rows, columns)),
                values[0, : rows * columns].unflatten(0, (rows, columns)),
            )
            for keys, values in self._room
        ]

    def tokens(self, ids: IntArray, positions: IntArray, cells: IntArray, sources: IntArray | None = None) -> Tokens:
        span = int(positions.max()) + 1  # on the host: asking the device would wait for it
        copied = None if sources is None else self.tensor(sources)
        return Tokens(self.tensor(ids), self.tensor(positions), span, self.tensor(cells), copied)

    def tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def queries(self, rows: slice, sees: NDArray[np.bool_], places: IntArray | None) -> Queries:
        """`sees` (R or 1, Q, C): which columns each query sees; nobody may be blind, or its softmax is NaN."""
        hidden = self.tensor(~sees)[:, None]
        mask = torch.zeros(hidden.shape, dtype=self.decoder.dtype, device=self.device)
        mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)
        return Queries(rows, sees.shape[1], None if places is None else self.tensor(places), mask)

    def scores(self, hidden: Tensor) -> FloatArray:
        found = self.decoder.log_probabilities(hidden, self.alphabet)
        if not bool(found.isfinite().all()):
            self._room = []  # what is not a number must not reach the next batch through a masked column
        return _on_host(found)


class _DenseReading:
    """The cache of a batch: each item's prompt, then the nodes it was asked about that have children."""

    def __init__(self, reader: DenseReader, prompts: Prompts) -> None:
        self.reader, self.trie = reader, reader.trie
        self.lengths = np.array([len(prompt) for prompt in prompts])
        self.columns = int(self.lengths.max()) + reader.trunk - 1 + _ROOM
        self.cache = reader.cache(len(prompts), self.columns)
        for (keys, values), (start_keys, start_values) in zip(self.cache, reader.start_cache, strict=False):
            keys[:, : len(reader.start)], values[:, : len(reader.start)] = start_keys, start_values
        self.column_of = np.full((len(prompts), len(self.trie.tokens)), -1)
        self.column_of[:, : reader.trunk] = self.lengths[:, None] - 1 + np.arange(reader.trunk)
        self.filled = self.lengths + reader.trunk - 1
        # Columns that hold what they hold in the row before. The last token of a prompt is always computed: it asks.
        self.shared = np.maximum(np.minimum(_shared(prompts), self.lengths - 1), len(reader.start))
        tokens = self.filled - self.shared
        parts = [self._prompts(prompts, rows) for rows in _chunks(tokens, reader.pass_tokens)]
        self.scores = np.concatenate(parts).reshape(len(prompts), reader.trunk, -1)

    def ask(self, items: IntArray, nodes: IntArray) -> FloatArray:
        trie, size = self.trie, len(self.trie.tokens)
        if not len(items):
            return np.empty((0, len(trie.alphabet)))
        lines = trie.paths[nodes]  # a node, and its ancestors that the cache does not hold
        missing = (lines >= 0) & (self.column_of[items[:, None], lines] < 0) | (lines == nodes[:, None])
        keys = np.unique((items[:, None] * size + lines)[missing])
        wanted = np.isin(keys, items * size + nodes)
        scores = np.empty((len(keys), len(trie.alphabet)))
        fed_items, fed_nodes = np.divmod(keys, size)
        is_leaf = trie.children[fed_nodes] == 0
        order = np.lexsort((fed_nodes, is_leaf, fed_items))  # ancestors first
        counts = np.bincount(fed_items, minlength=len(self.lengths))
        place = np.empty_like(order)
        place[order] = np.arange(len(keys)) - (np.cumsum(counts) - counts)[fed_items[order]]
        for first in range(0, int(counts.max()), _WIDE):
            step = order[(place[order] >= first) & (place[order] < first + _WIDE)]
            in_step = np.bincount(fed_items[step], minlength=len(self.lengths))
            self._reserve(int(np.max(self.filled + in_step)))
            for rows in _chunks(in_step, self.reader.pass_tokens):
                chosen = step[(fed_items[step] >= rows.start) & (fed_items[step] < rows.stop)]
                if len(chosen):
                    reads = wanted[chosen]
                    found = self._nodes(rows, fed_items[chosen], fed_nodes[chosen], place[chosen] - first, reads)
                    scores[chosen[reads]] = found
            stays = step[~is_leaf[step]]
            np.add.at(self.filled, fed_items[stays], 1)
        result: FloatArray = scores[np.searchsorted(keys, items * size + nodes)]
        return result

    def _prompts(self, prompts: Prompts, rows: slice) -> FloatArray:
        """Computes the prompts of `rows` and their trunks: log probabilities (R * trunk, U).

        A token of a prompt is at column k of its row, and computed in the first row that begins with the same k + 1.
        """
        reader, trie, trunk = self.reader, self.trie, self.reader.trunk
        lengths, shared, filled = self.lengths[rows], self.shared[rows], self.filled[rows]
        for keys, values in self.cache if rows.start else ():  # the row before is complete
            for room in (keys, values):
                room[rows, : shared[0]] = room[rows.start - 1, : shared[0]]
        column = np.arange(filled.max())
        owner = np.arange(len(lengths))[:, None] * (column >= shared[:, None])
        owner = np.maximum.accumulate(owner, axis=0)  # (R, C): the row in which a column is computed
        node = np.clip(column - lengths[:, None] + 1, 0, trunk - 1)
        ids = trie.tokens[node]
        for row, prompt in enumerate(prompts[rows]):
            ids[row, : lengths[row]] = prompt
        positions = np.minimum(column, lengths[:, None] - 1) + trie.depths[node]
        stands = column < filled[:, None]
        own = stands & (column >= shared[:, None])
        index = np.cumsum(own).reshape(own.shape) - 1  # of each token in the pass
        copied = stands & own[owner, column]
        width = int((filled - shared).max())
        asks = np.minimum(shared[:, None] + np.arange(width), filled[:, None] - 1)  # (R, Q): the column that asks
        sees = column <= np.minimum(asks, lengths[:, None] - 1)[..., None]  # (R, Q, C): the prompt before it
        if trunk > 1:
            stood = np.where((column >= lengths[:, None]) & stands, node, -2)  # (R, C)
            of_asking = trie.paths[np.take_along_axis(node, asks, axis=1)]  # (R, Q, D + 1)
            sees |= (of_asking[..., None] == stood[:, None, None]).any(2)
        reads = lengths[:, None] - 1 + np.arange(trunk)
        even = bool((filled - shared == width).all())
        every = np.arange(len(lengths))[:, None]
        hidden = reader.decoder(
            self.cache,
            reader.tokens(
                ids[own],
                positions[own],
                (np.arange(rows.start, rows.stop)[:, None] * self.columns + column)[copied],
                index[owner, column][copied],
            ),
            reader.queries(rows, sees, None if even else np.flatnonzero(np.arange(width) < (filled - shared)[:, None])),
            reader.tensor(index[every, reads].ravel()),
            reader.queries(rows, sees[every, reads - shared[:, None]], None),
        )
        return reader.scores(hidden)

    def _nodes(
        self, rows: slice, items: IntArray, nodes: IntArray, place: IntArray, reads: NDArray[np.bool_]
    ) -> FloatArray:
        """Feeds nodes (T,) of items (T,), the place-th new one of each: log probabilities after those of `reads`."""
        trie, reader = self.trie, self.reader
        columns = self.filled[items] + place
        self.column_of[items, nodes] = columns
        sees = np.arange(columns.max() + 1) < self.lengths[items, None]  # (T, C)
        lines = trie.paths[nodes, 1:]
        token, depth = np.nonzero(lines >= 0)
        sees[token, self.column_of[items[token], lines[token, depth]]] = True
        leaves = trie.children[nodes] == 0
        self.column_of[items[leaves], nodes[leaves]] = -1  # overwritten by the next that come
        row = items - rows.start
        hidden = reader.decoder(
            self.cache,
            reader.tokens(
                trie.tokens[nodes], self.lengths[items] - 1 + trie.depths[nodes], items * self.columns + columns
            ),
            self._grid(rows, row, sees),
            reader.tensor(np.flatnonzero(reads)),
            self._grid(rows, row[reads], sees[reads]),
        )
        return reader.scores(hidden)

    def _grid(self, rows: slice, row: IntArray, sees: NDArray[np.bool_]) -> Queries:
        """The queries of tokens in `row` (T,) of `rows` that see columns (T, C), in a grid padded to the most of a row.

        A query that is padding sees everything.
        """
        order = np.argsort(row, kind="stable")
        counts = np.bincount(row, minlength=rows.stop - rows.start)
        place = np.empty_like(row)
        place[order] = np.arange(len(row)) - (np.cumsum(counts) - counts)[row[order]]
        grid = np.ones((len(counts), max(1, int(counts.max())), sees.shape[1]), bool)
        grid[row, place] = sees
        places = row * grid.shape[1] + place
        return self.reader.queries(rows, grid, None if np.array_equal(places, np.arange(grid[..., 0].size)) else places)

    def _reserve(self, columns: int) -> None:
        """Makes room for that many columns."""
        if columns > self.columns:
            grown = self.reader.decoder.new_cache(len(self.lengths), columns + _WIDE)
            for new, old in zip(grown, self.cache, strict=True):
                for room, held in zip(new, old, strict=True):
                    room[:, : self.columns] = held
            self.cache, self.columns = grown, grown[0][0].shape[1]


class StockReader:
    """See the module. `model` is called as transformers models are, with a mask of its own for every token."""

    def __init__(self, model: Any, trie: PriceTrie) -> None:
        self.model, self.trie = model, trie
        self.device = model.device
        self.as_bool = model.config._attn_implementation == "sdpa"
        self.alphabet = torch.from_numpy(trie.alphabet).to(self.device)
        self.pass_tokens = _STOCK_PASS["cuda" if self.device.type == "cuda" else "cpu"]
        self.trunk = trie.within(_TRUNK)
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
        scores = _on_host(torch.cat(parts)).reshape(*logits.shape[:2], -1)
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


def _on_host(scores: Tensor) -> FloatArray:
    """float64; not a number is no probability."""
    found: FloatArray = scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf).double().cpu().numpy()
    return found


def _groups(counts: IntArray, pass_tokens: int, most: int) -> Iterator[IntArray]:
    """Items with a count above 0 in groups of like counts: at most `most`, and less padding than a pass costs."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    while len(order):
        padding = np.cumsum(counts[order[0]] - counts[order[:most]])
        group, order = np.split(order, [np.searchsorted(padding, pass_tokens, side="right")])
        yield group


def _chunks(counts: IntArray, tokens: int) -> Iterator[slice]:
    """Neighbouring rows whose counts sum to at most `tokens`, or one row."""
    first, held = 0, 0
    for row, count in enumerate(counts.tolist()):
        if row > first and held + count > tokens:
            yield slice(first, row)
            first, held = row, 0
        held += count
    yield slice(first, len(counts))


def _shared(prompts: Prompts) -> IntArray:
    """How many tokens each begins with that the one before it begins with too (B,)."""
    return np.array([0, *(_same(*pair) for pair in pairwise(prompts))])


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    most = min(len(one), len(other))
    return next((at for at in range(most) if one[at] != other[at]), most)


def _common_start(prompts: Prompts) -> list[int]:
    """The tokens that all prompts begin with, less than the whole of the shortest."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    return first[: min(_same(first, last), min(map(len, prompts)) - 1)]
