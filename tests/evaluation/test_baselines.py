"""The baselines learn prices from words, are silent and repeatable, and work on tiny and odd sets."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from tests.paths import SHARED

from fastprice.data.items import load_items
from fastprice.data.splitting import split_items
from fastprice.errors import DataError, NotFittedError
from fastprice.evaluation.baselines import (
    Baseline,
    ConstantBaseline,
    LightGBMBaseline,
    RidgeBaseline,
    default_baselines,
)
from fastprice.evaluation.metrics import score

PC_PARTS = SHARED / "data" / "pc_parts" / "pc_parts_2025-07-23.jsonl.gz"
LEARNERS = [RidgeBaseline(), LightGBMBaseline(trees=100)]
ALL = [ConstantBaseline(), *LEARNERS]


def by_name(baseline: Baseline) -> str:
    return type(baseline).__name__


def shop(n: int, seed: int) -> tuple[list[str], list[float]]:
    """Texts whose words set the price: kind x size x condition, with 10 % noise."""
    random = np.random.default_rng(seed)
    kinds, sizes, conditions = {"lamp": 20, "desk": 150, "sofa": 600}, [1, 2, 8], {"new": 1.0, "used": 0.5}
    texts, prices = [], []
    for _ in range(n):
        kind, size, condition = random.choice(list(kinds)), int(random.choice(sizes)), random.choice(list(conditions))
        texts.append(f"{condition} {kind}, size {size}, lot {random.integers(20)}")
        prices.append(float(kinds[kind] * (1 + size / 4) * conditions[condition] * random.lognormal(0, 0.1)))
    return texts, prices


@pytest.mark.parametrize("baseline", LEARNERS, ids=by_name)
def test_they_learn_prices_from_words_and_single_digits(baseline: Baseline) -> None:
    train, test = shop(800, seed=1), shop(200, seed=2)
    error = score(test[1], clone(baseline).fit(*train).predict(test[0])).mape
    constant = score(test[1], ConstantBaseline().fit(*train).predict(test[0])).mape
    assert error < 15  # the noise alone costs 8 %; not seeing the size costs over 30 %
    assert error < constant / 5


def test_the_constant_is_the_median() -> None:
    guesses = ConstantBaseline().fit(["a", "b", "c"], [1.0, 7.5, 1000.0]).predict(["x", "y"])
    assert guesses == pytest.approx([7.5, 7.5])


@pytest.mark.parametrize("baseline", ALL, ids=by_name)
@pytest.mark.parametrize(
    "texts",
    [
        ["one red lamp", "two blue desks", "three green sofas", "four old tables", "five new chairs"],
        ["same"] * 5,
        [""] * 5,
        ["", "!!!", "…", "\t", "🎸"],
        ["a", "b", "c", "d", "e"],
        ["only one item"],
    ],
    ids=["disjoint", "same", "empty", "no words", "letters", "single"],
)
def test_tiny_and_odd_training_sets(baseline: Baseline, texts: list[str]) -> None:
    prices = [5.0, 10.0, 20.0, 40.0, 80.0][: len(texts)]
    guesses = clone(baseline).fit(texts, prices).predict([*texts, "words never seen", "", "\x00"])
    assert guesses.shape == (len(texts) + 3,)
    assert guesses.dtype == np.float64
    assert (guesses >= min(prices) * (1 - 1e-9)).all()
    assert (guesses <= max(prices) * (1 + 1e-9)).all()


@pytest.mark.parametrize("baseline", LEARNERS, ids=by_name)
def test_five_items_are_enough_to_learn_from(baseline: Baseline) -> None:
    texts = ["cheap pen", "cheap cup", "dear ring", "dear watch", "dear chain"]
    cheap, dear = clone(baseline).fit(texts, [2.0, 3.0, 900.0, 800.0, 850.0]).predict(["cheap bowl", "dear bowl"])
    assert cheap < dear / 2


@pytest.mark.parametrize("baseline", ALL, ids=by_name)
def test_they_are_repeatable_and_silent(baseline: Baseline, capfd: pytest.CaptureFixture[str]) -> None:
    texts, prices = shop(300, seed=3)
    first, second = (clone(baseline).fit(texts, prices).predict(texts) for _ in range(2))
    assert (first == second).all()
    assert capfd.readouterr() == ("", "")


def test_threads_do_not_change_the_trees() -> None:
    texts, prices = shop(300, seed=3)
    one, two = (LightGBMBaseline(trees=20, threads=threads).fit(texts, prices).predict(texts) for threads in (1, 2))
    assert (one == two).all()


@pytest.mark.parametrize("baseline", ALL, ids=by_name)
def test_they_are_scikit_learn_regressors(baseline: Baseline) -> None:
    texts, prices = shop(60, seed=4)
    scores = cross_val_score(baseline, texts, prices, cv=3, scoring="neg_mean_absolute_error")
    assert scores.shape == (3,)
    assert (scores < 0).all()
    assert clone(baseline).get_params() == baseline.get_params()


@pytest.mark.parametrize("baseline", ALL, ids=by_name)
def test_refusals(baseline: Baseline) -> None:
    fresh = clone(baseline)
    with pytest.raises(NotFittedError, match="call fit first"):
        fresh.predict(["a"])
    with pytest.raises(DataError, match="one price for each text"):
        fresh.fit(["a", "b"], [1.0])
    with pytest.raises(DataError, match="one price for each text"):
        fresh.fit([], [])
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="not a finite number above"):
            fresh.fit(["a", "b"], [1.0, bad])
    assert len(fresh.fit(["a", "b"], [1.0, 2.0]).predict([])) == 0


def test_default_baselines_have_different_names() -> None:
    baselines = default_baselines(seed=5, threads=2)
    assert len({baseline.name for baseline in baselines}) == 3
    assert baselines[-1].get_params() == {"trees": 400, "seed": 5, "threads": 2}


@pytest.mark.skipif(not PC_PARTS.exists(), reason="the shared price data is not beside this checkout")
def test_they_learn_real_prices(tmp_path: Path) -> None:
    with gzip.open(PC_PARTS, "rt", encoding="utf-8") as lines:
        priced = [line for line in lines if '"price":null' not in line]
    sample = tmp_path / "sample.jsonl"
    sample.write_text("".join(priced[::10]), encoding="utf-8")
    items = load_items(sample, text="*", price="price", group=["category", "name"], drop=["price_per_gb"])
    usable = [item for item in items if item.price is not None and 0.5 <= item.price <= 999.49]
    split = split_items(usable, validation=0, test=0.2, near_duplicates=False)
    texts, prices = [item.text for item in split.train], [item.price for item in split.train]
    truths = [item.price for item in split.test]
    constant, ridge, trees = (
        score(truths, baseline.fit(texts, prices).predict([item.text for item in split.test])).mae
        for baseline in (ConstantBaseline(), RidgeBaseline(), LightGBMBaseline(trees=50))
    )
    assert ridge < 0.65 * constant
    assert trees < 0.75 * constant
