"""The comparison of strategies, and `fastprice compare`."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastprice import ConfigError, Item, PriceEstimator
from fastprice.config import read_config
from fastprice.data.splitting import Split
from fastprice.data.synthetic import make_synthetic_items
from fastprice.evaluation.metrics import score
from fastprice.prompting import make_strategy
from fastprice.prompting.compare import StrategyComparison, StrategyResult, compare_strategies
from fastprice.prompting.few_shot import FewShot
from fastprice.prompting.retrieval import Retrieval
from fastprice.run import prepare_items, train_and_evaluate

Run = Callable[..., tuple[int, str, str]]
COLUMNS = ("--text", "text", "--price", "price", "--group", "sku")


def write_products(path: Path, count: int) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "price", "sku"])
        writer.writerows([item.text, item.price, item.group] for item in make_synthetic_items(count, seed=6))
    return path


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_products(tmp_path_factory.mktemp("data") / "products.csv", 90)


def test_strategies_and_baselines_are_ranked_on_the_same_items(nano: PriceEstimator, split: Split) -> None:
    seen: list[tuple[str, int]] = []
    strategies = [make_strategy(name) for name in ("zero-shot", "retrieval:2")]
    comparison = compare_strategies(
        nano, strategies, split.train, [], split.test, on_items=lambda name, more: seen.append((name, more))
    )
    names = [entry.name for entry in comparison.results]
    assert sorted(names) == ["constant (median)", "median of retrieval:2", "retrieval:2", "zero-shot"]
    errors = [float(entry.scores.mae) for entry in comparison.results]
    assert errors == sorted(errors)
    by_name = {entry.name: entry for entry in comparison.results}
    truths = np.array([item.price for item in split.test])
    zero_shot = np.abs(nano.predict(split.test) - truths).mean()
    assert float(by_name["zero-shot"].scores.mae) == pytest.approx(zero_shot)
    constant = np.abs(np.median([item.price or 0 for item in split.train]) - truths).mean()
    assert float(by_name["constant (median)"].scores.mae) == pytest.approx(constant)
    best, worst = comparison.results[0], comparison.results[-1]
    difference = comparison.difference(worst, best)
    assert float(difference) == pytest.approx(errors[-1] - errors[0])
    assert difference.low <= float(difference) <= difference.high
    assert by_name["retrieval:2"].prompt_tokens > by_name["zero-shot"].prompt_tokens > 0
    assert by_name["constant (median)"].prompt_tokens == 0
    for name in ("zero-shot", "retrieval:2"):
        assert sum(more for who, more in seen if who == name) == len(split.test)
    assert json.loads(json.dumps(comparison.as_dict()))["entries"][0]["to_best"]["value"] == 0


def test_the_table_fits_80_columns() -> None:
    truths = np.array([250.0, 300.0, 800.0] * 40)
    names = ["median of retrieval:16", "few-shot:16", "[red]mine[/red]"]
    entries = []
    for name, factor in zip(names, (0.5, 0.45, 0.01), strict=True):
        guesses = truths * factor
        costs = (1.23, 0.5, 1234.0, 123.4)
        entries.append(StrategyResult(name, guesses, score(truths, guesses), *costs, coverage=1.0, median_width=990.0))
    comparison = StrategyComparison(truths, entries, "mae")
    out = io.StringIO()
    Console(file=out, width=80).print(comparison.table())
    shown = out.getvalue()
    assert "…" not in shown
    words = shown.split()
    for cells in (comparison.headings(), *comparison.rows()):
        for cell in cells:
            assert shown.count(cell) >= (2 if cell == cells[0] else 1), cell
    assert words.index("few-shot:16") < words.index("[red]mine[/red]")


def test_hits_are_ranked_from_the_highest_and_names_must_differ(nano: PriceEstimator, split: Split) -> None:
    comparison = compare_strategies(nano, [make_strategy("zero-shot")], split.train, [], split.test, criterion="hits")
    hits = [float(entry.scores.hit_rate) for entry in comparison.results]
    assert hits == sorted(hits, reverse=True)
    assert "median of retrieval:4" in [entry.name for entry in comparison.results]
    with pytest.raises(ConfigError, match="'few-shot:2' is named more than once"):
        compare_strategies(nano, [FewShot(2), FewShot(2)], split.train, [], split.test)
    with pytest.raises(ConfigError, match="did you mean 'rmsle'"):
        compare_strategies(nano, [], split.train, [], split.test, criterion="rmsl")


def test_intervals_are_calibrated_for_each_strategy(nano: PriceEstimator, split: Split) -> None:
    comparison = compare_strategies(nano, [make_strategy("zero-shot")], split.train, split.train[:12], split.train[:12])
    (entry,) = [entry for entry in comparison.results if entry.name == "zero-shot"]
    assert entry.coverage is not None
    assert entry.coverage >= 11 / 12, "the interval of 12 calibration items contains all of them, but for rounding"
    assert entry.median_width is not None
    assert entry.median_width > 0


def test_a_base_model_is_compared_from_the_command_line(fastprice: Run, products: Path, tmp_path: Path) -> None:
    status, shown, said = fastprice(
        "compare", "--data", products, *COLUMNS, "--method", "lora", "--strategies", "zero-shot", "few-shot:2",
        "--items", 6, "--calibrate", 0, "--out", tmp_path / "out", "--plot", tmp_path / "out" / "compare.svg",
    )  # fmt: skip
    assert status == 0, said
    assert "6 unseen items, ranked by MAE $" in shown
    assert "12 examples shown" in shown
    assert str(tmp_path / "out" / "compare.svg") in shown
    assert "</svg>" in (tmp_path / "out" / "compare.svg").read_text()
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (written["model"], written["items"], written["ranked_by"]) == ("nano", 6, "mae")
    entries = written["entries"]
    assert {entry["name"]: entry["baseline"] for entry in entries} == {
        "zero-shot": False, "few-shot:2": False, "constant (median)": True, "median of retrieval:4": True,
    }  # fmt: skip
    errors = [entry["scores"]["mae"]["value"] for entry in entries]
    assert errors == sorted(errors)
    for entry in entries:
        mae = entry["scores"]["mae"]
        assert entry["to_best"]["value"] == pytest.approx(mae["value"] - errors[0])
        assert f"{mae['value']:.1f} ({mae['low']:.1f}–{mae['high']:.1f})" in shown
        costs = [
            f"{entry['ms_per_item']:.1f}",
            f"{entry['prompt_tokens_per_item']:.0f}",
            f"{entry['generated_tokens_per_item']:.1f}",
        ]
        assert any(line.startswith(entry["name"]) and line.split()[-3:] == costs for line in shown.splitlines())


@pytest.fixture(scope="module")
def trained(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few steps."""
    out = tmp_path_factory.mktemp("run") / "first"
    settings = {
        "data.file": str(products), "data.group": "sku", "model.method": "lora", "train.epochs": 0.3,
        "train.evaluations": 0, "seed": 3, "out": str(out),
    }  # fmt: skip
    train_and_evaluate(read_config(None, settings), Console(quiet=True))
    return out


def test_a_runs_model_is_compared_on_the_items_it_has_not_seen(
    fastprice: Run, trained: Path, products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queried: list[Item] = []
    fit_on: list[Item] = []
    fit, build_prompts = Retrieval.fit, Retrieval.build_prompts
    monkeypatch.setattr(Retrieval, "fit", lambda self, train: fit_on.extend(train) or fit(self, train))
    monkeypatch.setattr(
        Retrieval,
        "build_prompts",
        lambda self, estimator, items: queried.extend(items) or build_prompts(self, estimator, items),
    )
    moved = tmp_path / "moved.csv"
    shutil.copy(products, moved)
    status, _, said = fastprice("compare", "--model", trained, "--data", moved, "--strategies", "retrieval:2")
    assert status == 0, said
    split = prepare_items(read_config(trained / "config.yaml")).split
    assert set(fit_on) == set(split.train)
    assert set(queried) <= set(split.test) | set(split.validation)
    assert set(split.test) <= set(queried)


def test_options_that_would_compare_on_training_items_are_refused(
    fastprice: Run, trained: Path, products: Path, tmp_path: Path
) -> None:
    other = write_products(tmp_path / "other.csv", 70)
    bare = tmp_path / "bare"
    shutil.copytree(trained / "model", bare)
    for arguments, expected in [
        (("--model", trained, "--data", other), "not the items that"),
        (("--model", trained, "--seed", 4), "other settings for seed"),
        (("--model", trained, "--price", "sku"), "other settings for data.price"),
        (("--model", trained, "--base", "nano"), "not both"),
        (("--model", bare, "--data", products, *COLUMNS), "no config.yaml beside it"),
        (("--model", tmp_path), "neither a run's folder nor a saved estimator"),
        (("--data", products, *COLUMNS, "--strategies", "few-shot:x"), "a whole number from 1"),
        (("--data", "no.csv", "--strategies", "retreival:4"), "unknown name (did you mean 'retrieval'?)"),
        (("--data", "no.csv", "--strategies", "few-shot", "few-shot:4"), "'few-shot:4' is named more than once"),
        (("--data", "no.csv", "--plot", tmp_path / "p.doc"), "one of .png, .svg, .pdf"),
        (("--model", trained, "--plot", tmp_path / "no" / "p.png"), "does not exist"),
        (("--data", products, *COLUMNS, "--criterion", "rmsl"), "did you mean 'rmsle'"),
        (("--data", "no.csv", "--out", products / "out"), "no folder can be made there"),
        (("--strategies", "zero-shot"), "no data"),
    ]:
        status, _, said = fastprice("compare", *arguments)
        assert (status, said.count("\n")) == (2, 1), said
        assert expected in said


def test_a_plot_without_matplotlib_is_refused_before_any_file_is_read(
    fastprice: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, said = fastprice("compare", "--data", "no.csv", "--plot", tmp_path / "p.png")
    assert (status, said.count("\n")) == (2, 1), said
    assert "pip install matplotlib" in said


def test_a_run_without_its_counts_is_compared_with_a_warning(fastprice: Run, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    status, shown, said = fastprice(
        "compare", "--model", tmp_path / "run", "--strategies", "zero-shot", "--items", 3, "--calibrate", 0
    )
    assert status == 0, said
    assert "was not checked" in shown
    assert "3 unseen items" in shown
