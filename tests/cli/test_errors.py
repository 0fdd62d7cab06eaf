"""Bad input on the command line: one line with what, where and what to do; status 2; nothing half-written."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]

CSV = "title,cost,brand\n" + "".join(f"a fine lamp number {n},{n + 5}.00,maker{n % 7}\n" for n in range(60))


@pytest.fixture
def products(tmp_path: Path) -> Path:
    path = tmp_path / "products.csv"
    path.write_text(CSV, encoding="utf-8")
    return path


def refused(outcome: tuple[int, str, str], *parts: str) -> None:
    status, _, output = outcome
    assert status == 2
    assert output.startswith("error: ")
    assert output.count("\n") == 1, output
    for part in parts:
        assert part in output, output


def test_a_missing_file_names_its_neighbor(fastprice: Run, products: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = fastprice("train", "--data", tmp_path / "product.csv", "--text", "title", "--price", "cost", "--out", out)
    refused(outcome, "product.csv", "products.csv")
    assert not out.exists()


def test_an_unknown_column_names_the_nearest(fastprice: Run, products: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = fastprice("train", "--data", products, "--text", "titel", "--price", "cost", "--out", out)
    refused(outcome, "titel", "title")
    assert not out.exists()


def test_several_columns_after_one_option(fastprice: Run, products: Path, tmp_path: Path) -> None:
    outcome = fastprice(
        "train", "--data", products, "--text", "title", "brnad", "--price", "cost", "--out", tmp_path / "o"
    )
    refused(outcome, "brnad", "brand")


def test_a_file_of_another_format_than_its_ending(fastprice: Run, tmp_path: Path) -> None:
    for name, content in (("a.parquet", CSV.encode()), ("a.jsonl", CSV.encode()), ("a.jsonl.gz", b"{}"),
                          ("a.csv", gzip.compress(CSV.encode()))):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(content)
        refused(fastprice("inspect", "--data", path, "--text", "title", "--price", "cost"), name)


@pytest.mark.parametrize(
    ("content", "word"),
    [("", "empty"), ("title,cost\n", "rows"), ("title,cost\na thing,unknown\nanother,\n", "cost")],
    ids=["empty", "header only", "no price"],
)
def test_files_with_nothing_usable(fastprice: Run, tmp_path: Path, content: str, word: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    refused(fastprice("inspect", "--data", path, "--text", "title", "--price", "cost"), "a.csv", word)


def test_prices_outside_the_range_leave_nothing_and_say_why(fastprice: Run, products: Path) -> None:
    outcome = fastprice(
        "inspect", "--data", products, "--text", "title", "--price", "cost", "--set", "clean.min_price=900"
    )
    refused(outcome, "no usable item", "price")


def test_too_few_items_to_split(fastprice: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("title,cost\na lamp,10\n")
    refused(fastprice("inspect", "--data", path, "--text", "title", "--price", "cost"), "split")


def test_settings_are_checked_before_anything_is_written(fastprice: Run, products: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    out = tmp_path / "out"
    config.write_text(f"data: {{file: {products}, text: title, price: cost}}\nout: {out}\ntrain: {{epohcs: 3}}\n")
    refused(fastprice("train", config), "train.epohcs", "epochs")
    config.write_text("data: [unclosed\n")
    refused(fastprice("train", config), "invalid YAML at line 2")
    refused(fastprice("train", config, "--set", "train.epochs"), "KEY=VALUE")
    assert not out.exists()


@pytest.mark.parametrize("base", ["./no/such/folder", "no-such-owner/no-such-model", "two words"])
def test_a_base_that_does_not_exist(fastprice: Run, products: Path, tmp_path: Path, base: str) -> None:
    out = tmp_path / "out"
    refused(
        fastprice("train", "--data", products, "--text", "title", "--price", "cost", "--out", out, "--base", base),
        "base", base,
    )  # fmt: skip
    assert not out.exists()


def test_methods_and_engines_that_do_not_exist_or_cannot_run(fastprice: Run, products: Path, tmp_path: Path) -> None:
    common = ("train", "--data", products, "--text", "title", "--price", "cost", "--out", tmp_path / "out")
    refused(fastprice(*common, "--method", "qlra"), "method", "qlora")
    refused(fastprice(*common, "--engine", "unslot"), "engine", "unsloth")
    refused(fastprice(*common, "--engine", "unsloth"), "CUDA", "peft")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_no_run_wrote_is_left_alone(fastprice: Run, products: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("years of work")
    refused(fastprice("train", "--data", products, "--text", "title", "--price", "cost", "--out", out), "thesis")
    assert [path.name for path in out.iterdir()] == ["chapter1.txt"]


def test_predict_and_evaluate_name_what_is_wrong_with_their_arguments(
    fastprice: Run, products: Path, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    refused(fastprice("predict", "--model", nowhere, "--item", "a lamp"), "nowhere", "fastprice.json")
    refused(fastprice("evaluate", products, "--model", nowhere, "--text", "title"), "nowhere", "fastprice.json")
    (tmp_path / "fastprice.json").write_text("{}")
    refused(fastprice("predict", "--model", tmp_path), "--item")
    refused(fastprice("predict", "--model", tmp_path, "--item", "a lamp"), "format None")
    target = tmp_path / "x.doc"
    refused(fastprice("predict", products, "--model", tmp_path, "--text", "title", "--out", target), ".parquet")
    refused(fastprice("evaluate", products, "--model", tmp_path, "--text", "title", "--price", "cots"), "cots", "cost")


def test_data_in_the_place_of_settings(fastprice: Run, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}"))
    refused(fastprice("train", path), "items.jsonl.gz", "--data")


def test_a_traceback_only_under_debug(fastprice: Run, tmp_path: Path) -> None:
    from fastprice.errors import DataError

    arguments = ("inspect", "--data", tmp_path / "none.csv", "--text", "title", "--price", "cost")
    refused(fastprice(*arguments), "none.csv")
    with pytest.raises(DataError):
        fastprice(*arguments, "--debug")


def test_doctor_names_what_is_there(fastprice: Run) -> None:
    status, output, _ = fastprice("doctor")
    assert status == 0
    for part in ("fastprice 0.", "torch ", "trl ", "GPU"):
        assert part in output
