"""Reading items: every problem of a file or its columns, and its message of one line."""

from __future__ import annotations

import gzip
from pathlib import Path

import polars
import pytest
from tests.data.item_files import ROWS, error, jsonl, write

from fastprice.data.items import load_items
from fastprice.errors import DataError


def test_the_message_of_a_missing_file_has_the_nearest_name(tmp_path: Path) -> None:
    jsonl(tmp_path / "products.jsonl", ROWS[0])
    assert error(tmp_path / "product.jsonl") == "FILE: no such file (did you mean 'products.jsonl'?)"
    assert "no folder" in error(tmp_path / "nowhere" / "a.jsonl")


def test_folders_other_endings_and_impossible_names_are_refused(tmp_path: Path) -> None:
    assert "is a folder" in error(tmp_path)
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04")
    assert "the ending must be .jsonl" in error(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match="no such file"):
        load_items("a\0b.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "a.tsv"])
def test_empty_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert error(tmp_path / name) == "FILE: the file is empty"
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"", mtime=0))
        assert error(tmp_path / name) == "FILE: the file is empty"


def test_files_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("name,price\n")
    polars.DataFrame({"name": [], "price": []}).write_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        assert error(tmp_path / name) == "FILE: has a header and no rows; check that it is the right file"
    (tmp_path / "a.jsonl").write_text("\n \n")
    assert error(tmp_path / "a.jsonl") == "FILE: has no rows; check that it is the right file"
    (tmp_path / "b.csv").write_text("\n\n")
    assert error(tmp_path / "b.csv") == "FILE: has no rows; check that it is the right file"


CSV_TEXT = b"name,price\nLamp,5\nChair,6\n"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.parquet", CSV_TEXT, "is not Parquet, as its ending says, but text"),
        ("a.parquet", gzip.compress(CSV_TEXT, mtime=0), "is not Parquet, as its ending says, but gzip"),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "the Parquet data is damaged or truncated"),
        ("a.parquet", b"PAR1", "the Parquet data is damaged or truncated"),
        ("a.csv.gz", CSV_TEXT, "is not gzip, as its ending says"),
        ("a.csv.gz", gzip.compress(CSV_TEXT * 500, mtime=0)[:-40], "gzip data is damaged or truncated"),
        ("a.csv.gz", gzip.compress(bytes(range(256)) * 9, mtime=0)[:60] + b"junk" * 9, "damaged or truncated"),
        (
            "a.csv",
            gzip.compress(CSV_TEXT, mtime=0),
            "is not CSV text, as its ending says, but gzip; add .gz to its name",
        ),
        ("a.csv", b"PAR1xxxx", "but Parquet; rename it to .parquet"),
        ("a.csv", b"PK\x03\x04xxxx", "but a zip archive or spreadsheet"),
        ("a.csv", bytes(range(256)), "but binary data"),
        ("a.csv", CSV_TEXT.decode().encode("utf-16"), "but UTF-16 text; save it as UTF-8"),
        ("a.csv", CSV_TEXT.decode().encode("utf-16-le"), "but UTF-16 text; save it as UTF-8"),
        ("a.jsonl", '{"name": "x"}'.encode("utf-16"), "but UTF-16 text; save it as UTF-8"),
        ("a.csv", b"<!DOCTYPE html><html>", "but a web page"),
        ("a.csv", b'{"name": "Lamp", "price": 5}\n', "looks like JSON"),
        ("a.csv", b"na\xffme,price\nLamp,5\n", "the header is not UTF-8"),
        ("a.csv", b'"name"x,price\nLamp,5\n', "the header (line 1) is not CSV"),
        ("a.csv", b"name,price,name\nLamp,5,x\n", "the header names column 'name' twice (fields 1, 3)"),
        (
            "a.csv",
            b"name,price\nLamp,5\n" + b"x" * (2**24 + 1) + b",6\n",
            "row 2 (line 3): a field runs over 16,777,216 characters",
        ),
        (
            "a.csv",
            b'name,price\nLamp,5\n"Chair,6\nSofa,7\n',
            "row 2 (line 3 to 4): a field runs to the end of the file",
        ),
        ("a.jsonl", CSV_TEXT, "is not JSON Lines, as its ending says"),
        ("a.jsonl", CSV_TEXT * 10, "is not JSON Lines, as its ending says: row 5"),
        ("a.jsonl", b'[{"name": "Lamp", "price": 5}]', "not a JSON object but a list (is the file one JSON array?"),
        ("a.jsonl", b"[\n  {\n", "is not JSON Lines"),
    ],
)
def test_a_file_that_is_not_what_its_ending_says(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert message in error(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_the_message_of_an_unknown_column_has_the_nearest_name_and_all_names(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    columns = "its columns are: name, about, kind, price"
    assert error(path, price="prise") == f"FILE: no column 'prise' (did you mean 'price'?); {columns}"
    for option in ({"text": ["name", "abuot"]}, {"group": "abuot"}, {"text": "*", "drop": ["abuot"]}):
        assert error(path, **option) == f"FILE: no column 'abuot' (did you mean 'about'?); {columns}"


def test_a_column_that_only_some_lines_have_can_be_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"name": "x", "price": 5}, {"name": "y", "price": 6, "late": "z"})
    assert [item.text for item in load_items(path, text=["name", "late"], price="price")] == ["x", "y\nz"]


def test_another_separator_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("name;price\nLamp;5\n")
    assert "are its fields separated by ';'?" in error(tmp_path / "a.csv")


def test_a_file_without_a_usable_row_has_the_most_frequent_reason_and_its_first_row(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", {"name": "x", "price": "ask"}, {"name": "y", "price": None}, {"name": "z", "price": None}
    )
    assert error(path) == (
        "FILE: none of its 3 rows is usable; the most frequent reason, in 2 of them: no price (column 'price', "
        "first in row 2); name another column or correct the file"
    )
    assert "no text (text of 'about', first in row 1)" in error(jsonl(path, {"about": "", "price": 5}), text="about")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": []}, "no text column is named"),
        ({"text": ["*", "name"]}, "give one of them"),
        ({"text": ["name", "price"]}, "both the price and part of the text"),
        ({"text": ["name", "about"], "drop": ["about"]}, "both dropped and part of the text"),
    ],
)
def test_contradictory_options_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    assert message in error(write(tmp_path / "a.jsonl", ROWS), **options)
