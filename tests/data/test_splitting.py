"""Splitting: properties over random items, near-duplicates, chains of them, and real data."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.paths import SHARED

from fastprice.data.cleaning import clean_items, text_key
from fastprice.data.items import Item, load_items
from fastprice.data.splitting import MAX_CLUSTER_SHARE, Split, _min_hashes, _shingles, split_items
from fastprice.errors import ConfigError, DataError

DATA = SHARED / "data"
WORDS = st.lists(st.sampled_from(["red", "blue", "green", "big", "lamp", "desk"]), min_size=1, max_size=5)
ITEMS = st.lists(
    st.builds(Item, WORDS.map(" ".join), st.floats(1, 900), st.none() | st.integers(0, 30).map(str)),
    min_size=1,
    max_size=80,
)


def parts(split: Split) -> tuple[list[Item], ...]:
    return split.train, split.validation, split.test


def contents(part: list[Item]) -> Counter[tuple[str, float | None, str | None]]:
    return Counter((item.text, item.price, item.group) for item in part)


@settings(max_examples=60, deadline=None)
@given(
    ITEMS,
    st.integers(0, 5),
    st.sampled_from([0.0, 0.1, 0.3]),
    st.sampled_from([0.0, 0.1, 0.6]),
    st.randoms(),
    st.booleans(),
)
def test_no_group_and_no_text_spans_two_parts(items, seed, validation, test, random, near_duplicates) -> None:
    options = {"validation": validation, "test": test, "seed": seed, "near_duplicates": near_duplicates}
    try:
        split = split_items(items, **options)
    except DataError:
        # Only when the clusters are too few to fill the parts; without near-duplicates this is easy to check.
        assert (
            len({item.group or text_key(item.text) for item in items}) <= 5
            or len({text_key(i.text) for i in items}) <= 20
        )
        return
    assert contents(items) == sum((contents(part) for part in parts(split)), Counter())
    for kind in (lambda item: item.group, lambda item: text_key(item.text)):
        seen = [{kind(item) for item in part} - {None} for part in parts(split)]
        assert len(set().union(*seen)) == sum(map(len, seen))
    assert split.train
    assert [bool(split.validation), bool(split.test)] == [validation > 0, test > 0]
    # The order of the rows does not matter; the seed repeats.
    shuffled = random.sample(items, len(items))
    again = split_items(shuffled, **options)
    assert [contents(part) for part in parts(again)] == [contents(part) for part in parts(split)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=12, max_size=60), st.integers(0, 3))
def test_shares_are_met_to_within_the_size_of_one_group(sizes: list[int], seed: int) -> None:
    items = [Item(f"group {g} item {i} {g * 31 + i}", 5.0, str(g)) for g, size in enumerate(sizes) for i in range(size)]
    split = split_items(items, validation=0.2, test=0.2, seed=seed, near_duplicates=False)
    for part in (split.validation, split.test):
        assert abs(len(part) - 0.2 * len(items)) <= max(sizes)


def test_parts_keep_the_order_of_the_rows() -> None:
    items = [Item(f"thing {n} {n * 7919}", 1.0, None, n) for n in range(200)]
    for part in parts(split_items(items)):
        rows = [item.row for item in part]
        assert rows == sorted(rows)


def test_seeds_differ() -> None:
    items = [Item(f"thing {n}", 1.0) for n in range(200)]
    tests = {tuple(item.text for item in split_items(items, seed=seed).test) for seed in range(5)}
    assert len(tests) == 5


def long_text(product: int, words: int = 60) -> list[str]:
    return [f"w{product * 1000 + index}" for index in range(words)]


def test_near_duplicates_stay_together_if_the_option_is_on() -> None:
    items = []
    for product in range(150):
        words = long_text(product)
        items.append(Item(" ".join(words), 5.0))
        items.append(Item(" ".join([*words[:-1], "changed"]).upper(), 6.0))
    assert pairs_apart(split_items(items)) == 0
    assert split_items(items).notes == []
    assert pairs_apart(split_items(items, near_duplicates=False)) > 10


def pairs_apart(split: Split) -> int:
    where = {item.text.casefold().split()[0]: set() for part in parts(split) for item in part}
    for name, part in zip("abc", parts(split), strict=True):
        for item in part:
            where[item.text.casefold().split()[0]].add(name)
    return sum(len(places) > 1 for places in where.values())


def test_a_chain_of_near_duplicates_is_not_joined_into_one_large_cluster() -> None:
    chain = [Item(" ".join(f"w{word}" for word in range(start, start + 40)), 5.0) for start in range(400)]
    split = split_items(chain)
    assert (len(split.train), len(split.validation), len(split.test)) == (320, 40, 40)
    assert len(split.notes) == 1
    assert " of 400 items have near-duplicates that may be in another part" in split.notes[0]
    assert f"more than {MAX_CLUSTER_SHARE * 400:.0f} items" in split.notes[0]


def test_texts_of_similarity_0_6_are_not_near_duplicates() -> None:
    # Each has 60 of its 80 words in common with the next: a Jaccard similarity of 0.6. Joining them would add a note.
    similar = [Item(" ".join(f"w{word}" for word in range(start, start + 80)), 5.0) for start in range(0, 4000, 20)]
    assert split_items(similar).notes == []


def test_the_nearest_duplicates_within_a_long_chain_stay_joined() -> None:
    # A chain at 0.8 (a shift by two words), each item of which has a nearly identical copy (above 0.95).
    items = []
    for start in range(0, 600, 4):
        words = [f"w{word}" for word in range(start, start + 80)]
        items += [Item(" ".join(words), 5.0), Item(" ".join([*words, "end"]), 5.0)]
    assert pairs_apart(split_items(items)) == 0
    assert len(split_items(items).notes) == 1


def test_the_hashes_are_the_same_in_every_process_and_on_every_platform() -> None:
    # With other hashes the same file could be split differently.
    values, starts = _shingles(["a red bicycle with a bell", "a blue bicycle"])
    signatures = _min_hashes(np.split(values, starts[1:]))
    assert signatures.shape == (120, 2)
    assert signatures[:3].tolist() == [[2145440359, 3327280000], [1220276839, 3044249823], [294451687, 3743891183]]


def test_equal_hashes_estimate_the_similarity_of_texts() -> None:
    words = [f"w{word}" for word in range(400)]
    values, starts = _shingles([" ".join(words[:300]), " ".join(words[100:])])
    signatures = _min_hashes(np.split(values, starts[1:]))
    # 198 of 398 shingles are common: 0.497; the standard error of 120 hashes is 0.046.
    assert (signatures[:, 0] == signatures[:, 1]).mean() == pytest.approx(0.497, abs=0.14)


def test_too_few_clusters_and_impossible_shares_are_refused() -> None:
    same = [Item(f"thing {n}", 5.0, "one group") for n in range(50)]
    with pytest.raises(
        DataError, match="cannot split 50 items into 3 parts: by group and text they have only 1 separable cluster"
    ):
        split_items(same)
    with pytest.raises(DataError, match="0 items"):
        split_items([])
    assert len(split_items(same, validation=0, test=0).train) == 50
    for validation, test in ((-0.1, 0.1), (0.5, 0.5), (float("nan"), 0.1), (0.1, 1.0)):
        with pytest.raises(ConfigError, match="shares"):
            split_items(same, validation=validation, test=test)


def test_three_large_groups_fill_three_parts() -> None:
    items = [Item(f"{group} {n} {n * 97}", 5.0, group) for group in "abc" for n in range(50)]
    assert [len(part) for part in parts(split_items(items, validation=0.1, test=0.8))] == [50, 50, 50]


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are missing")
def test_craigslist_splits_without_chaining() -> None:
    items = load_items(DATA / "craigslist/craigslist.jsonl.gz", text=["title", "description"], price="price")
    split = split_items(clean_items(items)[:2000])
    assert [len(part) for part in parts(split)] == [1600, 200, 200]
    assert split.notes == []
