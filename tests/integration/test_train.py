"""`fastprice train` and what follows it, as a user runs them: files, table, report, predictions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from fastprice.data.synthetic import make_synthetic_items

Run = Callable[..., tuple[int, str, str]]

QUICK = ("--set", "train.evaluations=2", "train.validation_items=32", "train.pack_tokens=1024", "model.max_tokens=96")


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Products as a CSV file of one's own: several text columns, prices as text, some rows that cannot be used."""
    path = tmp_path_factory.mktemp("data") / "products.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sku", "title", "details", "asking"])
        for item in make_synthetic_items(240, seed=11):
            title, _, details = item.text.partition("\n")
            writer.writerow([item.group, title, details, f"${item.price:,.2f}"])
        writer.writerow(["x", "a thing without a price", "", "call us"])
        writer.writerow(["y", "a thing too dear", "", "$12,000"])
        writer.writerow(["z", "", "", "$5"])
    return path


@pytest.fixture(scope="module")
def trained(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one quick run, made through the pipeline that the command calls."""
    from rich.console import Console

    from fastprice.config import read_config
    from fastprice.run import train_and_evaluate

    out = tmp_path_factory.mktemp("runs") / "first"
    config = read_config(
        None,
        {
            "data.file": str(products), "data.text": ["title", "details"], "data.price": "asking", "data.group": "sku",
            "out": str(out), "train.evaluations": 2, "train.validation_items": 32, "train.pack_tokens": 1024,
            "model.max_tokens": 96,
        },
    )  # fmt: skip
    train_and_evaluate(config, Console(quiet=True))
    return out


def test_a_run_leaves_its_files_whole(trained: Path) -> None:
    assert sorted(path.name for path in trained.iterdir()) == [
        "config.yaml", "model", "rejects.jsonl", "report.html", "results.json",
    ]  # fmt: skip
    results = json.loads((trained / "results.json").read_text())
    names = [model["name"] for model in results["evaluation"]["models"]]
    assert {"base model", "tuned model", "tuned, greedy text"} <= set(names)
    assert len(names) == 6
    counts = results["counts"]
    used = counts["train"] + counts["validation"] + counts["test"]
    rejected = sum(count for name, count in counts.items() if name.startswith("rejected"))
    assert counts["read"] == used + rejected == 243
    assert any("loss" in point for point in results["curves"])
    assert sum("eval_mae" in point for point in results["curves"]) == 2


def test_no_row_vanishes(trained: Path) -> None:
    rejects = [json.loads(line) for line in (trained / "rejects.jsonl").read_text().splitlines()]
    reasons = {reject["row"]: reject["reason"] for reject in rejects}
    assert {241, 242, 243} <= set(reasons)
    assert all(reasons.values())


def test_the_report_holds_the_table_and_the_plots(trained: Path) -> None:
    page = (trained / "report.html").read_text(encoding="utf-8")
    for part in ("tuned model", "base model", "MAE", "worst"):
        assert part in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_predict_reads_the_columns_that_train_read(
    fastprice: Run, trained: Path, products: Path, tmp_path: Path
) -> None:
    for ending, read in ((".csv", pl.read_csv), (".parquet", pl.read_parquet), (".jsonl", pl.read_ndjson)):
        out = tmp_path / f"prices{ending}"
        status, output, _ = fastprice("predict", products, "--model", trained, "--out", out)
        assert status == 0
        frame = read(out)
        assert frame.columns == ["row", "estimate", "reason", "text"]
        assert frame["row"].to_list() == list(range(1, 244))
        assert frame.row(242)[:3] == (243, None, "no text")
        assert frame["estimate"].null_count() == 1
        assert "row 243 has no estimate: no text" in output
        assert frame["estimate"].min() > 0


def test_predict_prints_the_prices_of_texts(fastprice: Run, trained: Path) -> None:
    status, output, _ = fastprice("predict", "--model", trained, "--item", "a fine lamp", "an old [red]bike[/red]")
    assert status == 0
    lines = [line for line in output.splitlines() if line.startswith("$")]
    assert len(lines) == 2
    assert lines[1].endswith("an old [red]bike[/red]")


def test_predict_with_intervals(fastprice: Run, trained: Path, products: Path, tmp_path: Path) -> None:
    out = tmp_path / "prices.csv"
    status, _, error = fastprice(
        "predict", products, "--model", trained, "--out", out, "--interval", 0.8, "--criterion", "rmsle"
    )
    assert status == 0, error
    frame = pl.read_csv(out)
    assert frame.columns == ["row", "estimate", "low", "high", "reason", "text"]
    assert (frame["low"] < frame["high"]).sum() == 242
    status, output, _ = fastprice("predict", "--model", trained, "--item", "a lamp", "--interval", 0.8)
    assert " to $" in output
    status, _, error = fastprice("predict", "--model", trained, "--item", "a lamp", "--interval", 0.9999)
    assert status == 2
    assert "0.9999" in error


def test_evaluate_scores_a_file_with_prices(fastprice: Run, trained: Path, products: Path) -> None:
    status, output, _ = fastprice("evaluate", products, "--model", trained)
    assert status == 0
    assert "234 items" in output
    assert "MAE $" in output


def test_the_written_settings_repeat_the_run(fastprice: Run, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    status, output, error = fastprice("train", trained / "config.yaml", "--out", out)
    assert status == 0, error
    assert "tuned" in output
    first, again = (json.loads((run / "results.json").read_text()) for run in (trained, out))
    assert [m["scores"]["mae"] for m in first["evaluation"]["models"]] == [
        m["scores"]["mae"] for m in again["evaluation"]["models"]
    ]


def test_inspect_shows_what_carries_loss(fastprice: Run, trained: Path) -> None:
    status, output, _ = fastprice("inspect", trained / "config.yaml", "--examples", 2)
    assert status == 0
    assert output.count("Price is $") == 2
    assert "labeled" in output


def test_the_demo_is_the_same_job_on_the_catalogue(fastprice: Run, tmp_path: Path) -> None:
    status, output, error = fastprice("demo", "--items", 120, "--out", tmp_path / "demo")
    assert status == 0, error
    assert "tuned model" in output
    assert (tmp_path / "demo" / "report.html").is_file()


def test_training_on_real_parts(fastprice: Run, shared: Path, tmp_path: Path) -> None:
    """The short form of the run in the README: the same command on a few hundred rows."""
    data = shared / "data" / "pc_parts" / "pc_parts_2025-07-23.jsonl.gz"
    status, output, error = fastprice(
        "train", "--data", data, "--text", "*", "--price", "price", "--group", "category", "name", "--limit", 400,
        "--out", tmp_path / "pc", *QUICK,
    )  # fmt: skip
    assert status == 0, error
    assert "price_per_gb" in output  # left out, and error
    text = (tmp_path / "pc" / "rejects.jsonl").read_text()
    assert '"no price"' in text
    results = json.loads((tmp_path / "pc" / "results.json").read_text())
    assert results["counts"]["read"] == 66_778
    assert results["counts"]["not drawn: data.limit"] == 15_488 - 400
