"""Splitting into train, validation and test parts that have no product in common.

Items that belong together are joined into clusters first, and clusters are dealt out as a whole: the same group, the
same text (without regard to case and white space), and near-duplicates (Jaccard similarity of the sets of three-word
shingles, digits included, of at least 0.8). These are found by MinHash with locality-sensitive hashing (Broder 1997;
Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3) and verified on the shingles, so that none is
false; a pair at the threshold is compared with a probability of 0.9999. Texts of a dozen words, such as rows of
attributes, are near-duplicates only when almost no word differs: one changed word in the middle changes three shingles.
The same product in other words is not found. The part of an item depends on the items' content and the seed, not on
the order of the rows.

datasketch computes the hashes. Its index, MinHashLSH, returns every text of a bucket, so its work grows with the square
of the number of texts from one template: 23 s of CPU for 10,000 of them, where comparing a few neighbors in each bucket
takes 5 s and grows linearly. So the buckets are formed here, by sorting.

Near-duplication is not transitive: texts from one template can chain, each similar to the next, into one cluster of
half the data. A cluster of more than `MAX_CLUSTER_SHARE` of the items is therefore joined again at 0.9, then at 0.95;
one that is still too large is reduced to its groups and equal texts, with a note. Very similar items can then be in
different parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from typing import TYPE_CHECKING

from fastprice.data.cleaning import text_key
from fastprice.data.items import Item
from fastprice.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from scipy.cluster.hierarchy import DisjointSet

__all__ = ["MAX_CLUSTER_SHARE", "Split", "near_duplicate_mask", "split_items"]

MAX_CLUSTER_SHARE = 0.05  # of all items, in one cluster of near-duplicates,
_MIN_CLUSTER_LIMIT = 20  # or this many items in a small set, but never more than a quarter of it
_THRESHOLDS = (0.8, 0.9, 0.95)  # Jaccard similarity
_SHINGLE_WORDS = 3
_NEIGHBORS = 4  # compared on either side within a bucket
_BANDS, _ROWS = 24, 5  # a pair of similarity s is compared with probability 1 - (1 - s^5)^24: 0.99994 at 0.8


@dataclass(frozen=True)
class Split:
    """Three parts, each in the order of the rows, and messages for a person about how they were made."""

    train: list[Item]
    validation: list[Item]
    test: list[Item]
    notes: list[str] = field(default_factory=list)


def split_items(
    items: Sequence[Item],
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    near_duplicates: bool = True,
) -> Split:
    """Splits items into three parts without separating a group.

    Args:
        items: with or without prices and groups.
        validation, test: share of the items in each, 0 for none; met to within the size of one cluster.
        seed: of the order in which clusters are dealt out.
        near_duplicates: keep items of nearly the same text together as well, at about 0.2 ms of CPU time a text
            (15,488 rows of attributes 2.7 s, 5,565 advertisements 1.4 s).

    Raises ConfigError for impossible shares, DataError for too few clusters to fill the parts.
    """
    from scipy.cluster.hierarchy import DisjointSet

    if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
        raise ConfigError(
            f"validation {validation} and test {test}: write shares of at least 0 that sum to less than 1"
        )
    # Sorted by content, so that nothing below depends on the order of the rows.
    digests = [_digest(f"{item.group}\n{item.price}\n{text_key(item.text)}") for item in items]
    order = sorted(range(len(items)), key=digests.__getitem__)
    clusters = DisjointSet(range(len(items)))
    notes: list[str] = []
    first: dict[tuple[str, str], int] = {}
    for index in order:
        item = items[index]
        clusters.merge(index, first.setdefault(("text", text_key(item.text)), index))
        if item.group is not None:
            clusters.merge(index, first.setdefault(("group", item.group), index))
    if near_duplicates and len(items) > 1:
        clusters, notes = _join_near_duplicates([text_key(item.text) for item in items], order, clusters)

    members: dict[int, list[int]] = {}
    for index in order:
        members.setdefault(clusters[index], []).append(index)
    shuffled = sorted(members.values(), key=lambda cluster: _digest(f"{seed} {digests[cluster[0]]}"))
    shares = {name: share for name, share in (("test", test), ("validation", validation)) if share > 0}
    if len(shuffled) <= len(shares):
        raise DataError(
            f"cannot split {len(items)} items into {len(shares) + 1} parts: by group and text they have only "
            f"{len(shuffled)} separable clusters; give more items, a finer group or fewer parts"
        )
    parts: dict[str, list[list[int]]] = {"train": shuffled}
    for position, (name, share) in enumerate(shares.items()):
        to_leave = len(shares) - position
        parts[name], parts["train"] = _take(parts["train"], round(share * len(items)), to_leave)
    chosen = {name: [items[index] for index in sorted(chain.from_iterable(part))] for name, part in parts.items()}
    return Split(chosen["train"], chosen.get("validation", []), chosen.get("test", []), notes)


def near_duplicate_mask(text: str, others: Sequence[str]) -> NDArray[np.bool_]:
    """Which of `others` are equal to `text` or near-duplicates of it, as in `split_items`: bool (len(others),)."""
    import numpy as np

    keys = [text_key(text), *map(text_key, others)]
    values, starts = _shingles(keys)
    own, *sets = np.split(values, starts[1:])
    common = np.array([len(np.intersect1d(own, each, assume_unique=True)) for each in sets], dtype=np.int64)
    sizes = np.array([len(each) for each in sets], dtype=np.int64)
    return common >= _THRESHOLDS[0] * (len(own) + sizes - common)


def _take(clusters: list[list[int]], target: int, to_leave: int) -> tuple[list[list[int]], list[list[int]]]:
    """(Clusters that bring a part nearer to `target` items, at least 1; the others, at least `to_leave`)."""
    taken: list[list[int]] = []
    left: list[list[int]] = []
    missing = target
    for cluster in clusters:
        nearer = len(cluster) < 2 * missing and len(taken) < len(clusters) - to_leave
        (taken if nearer else left).append(cluster)
        missing -= len(cluster) if nearer else 0
    if not taken:
        smallest = min(left, key=len)
        taken, left = [smallest], [cluster for cluster in left if cluster is not smallest]
    return taken, left


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


# ---- Near-duplicates -----------------------------------------------------------------------------------------------


def _join_near_duplicates(keys: list[str], order: list[int], groups: DisjointSet) -> tuple[DisjointSet, list[str]]:
    """(`groups` with near-duplicates joined where the cluster stays small enough, notes on the others)."""
    pairs = _similar_pairs([keys[index] for index in order])
    edges = [(order[one], order[other], similarity) for one, other, similarity in pairs]
    largest = int(min(max(MAX_CLUSTER_SHARE * len(keys), _MIN_CLUSTER_LIMIT), len(keys) / 4))
    joined = deepcopy(groups)
    for threshold in _THRESHOLDS:
        near = [(one, other) for one, other, similarity in edges if similarity >= threshold]
        trial = deepcopy(joined)
        for one, other in near:
            trial.merge(one, other)
        for one, other in near:
            if trial.subset_size(one) <= largest:
                joined.merge(one, other)
    edges = [edge for edge in edges if not joined.connected(edge[0], edge[1])]
    if not edges:
        return joined, []
    separable = len({index for one, other, _ in edges for index in (one, other)})
    return joined, [
        f"{separable:,} of {len(keys):,} items have near-duplicates that may be in another part: joining them would "
        f"chain more than {largest:,} items together, so only groups and equal texts were kept together there"
    ]


def _similar_pairs(keys: list[str]) -> list[tuple[int, int, float]]:
    """Pairs of texts whose shingles have a Jaccard similarity of at least 0.8, enough of them to join every cluster."""
    import numpy as np

    values, starts = _shingles(keys)
    sets = np.split(values, starts[1:])
    signatures_KN = _min_hashes(sets)
    seen: set[tuple[int, int]] = set()
    pairs = []
    for band in range(_BANDS):
        # Sorted by this band and then the next, so that in a large bucket the most similar texts are adjacent.
        # Comparing only a few neighbors keeps the work linear where all pairs of a bucket would make it quadratic.
        order = np.lexsort(np.roll(signatures_KN, -band * _ROWS, axis=0)[2 * _ROWS - 1 :: -1])
        band_RN = signatures_KN[band * _ROWS : (band + 1) * _ROWS, order]
        for step in range(1, _NEIGHBORS + 1):
            same = (band_RN[:, step:] == band_RN[:, :-step]).all(axis=0)
            ones, others = order[:-step][same], order[step:][same]
            for one, other in zip(np.minimum(ones, others).tolist(), np.maximum(ones, others).tolist(), strict=True):
                if (one, other) in seen:
                    continue
                seen.add((one, other))
                common = len(np.intersect1d(sets[one], sets[other], assume_unique=True))
                similarity = common / (len(sets[one]) + len(sets[other]) - common)
                if similarity >= _THRESHOLDS[0]:
                    pairs.append((one, other, similarity))
    return pairs


def _shingles(keys: list[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(64-bit hashes of every text's runs of three words, one text after the other; where each text starts)."""
    import numpy as np

    multipliers = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
    numbers: dict[str, int] = {}
    values, starts, total = [], [], 0
    for key in keys:
        words = key.split() or [""]
        words += [""] * (_SHINGLE_WORDS - len(words))
        hashes = []
        for word in words:
            number = numbers.get(word)
            if number is None:
                number = numbers[word] = int.from_bytes(
                    blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little"
                )
            hashes.append(number)
        line = np.array(hashes, dtype=np.uint64)
        windows = np.lib.stride_tricks.sliding_window_view(line, _SHINGLE_WORDS)
        found = np.unique((windows * multipliers).sum(axis=1, dtype=np.uint64))
        values.append(found)
        starts.append(total)
        total += len(found)
    return np.concatenate(values), np.array(starts, dtype=np.int64)


def _min_hashes(sets: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint32]:
    """MinHash signatures of sets of shingles, (hashes, texts)."""
    import numpy as np
    from datasketch import MinHash

    # The upper halves of the shingles are hashes already: `int` leaves them as they are, datasketch permutes them.
    halves = ((each >> np.uint64(32)).tolist() for each in sets)
    found = MinHash.generator(halves, num_perm=_BANDS * _ROWS, seed=1, hashfunc=int, scheme="affine32")
    return np.stack([each.hashvalues for each in found], axis=1)
