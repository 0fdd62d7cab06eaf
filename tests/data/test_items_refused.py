"""Reading items: every way a file or its columns can be bad, each told in one line or a reject."""

from __future__ import annotations

import gzip
from pathlib import Path

import polars
import pytest
from tests.data.item_files import ROWS, error, jsonl, write

from fastprice.data.items import load_items
from fastprice.errors import DataError


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    jsonl(tmp_path / "products.jsonl", ROWS[0])
    assert error(tmp_path / "product.jsonl") == "FILE: no such file (did you mean 'products.jsonl'?)"
    assert "no folder" in error(tmp_path / "nowhere" / "a.jsonl")


def test_files_that_are_no_data_at_all(tmp_path: Path) -> None:
    assert "is a folder" in error(tmp_path)
    (tmp_path / "a.xlsx").write_bytes(b"PK\x03\x04")
    assert "its ending is none of .jsonl" in error(tmp_path / "a.xlsx")
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
        assert error(tmp_path / name) == "FILE: has a header and no rows; is it the right file?"
    (tmp_path / "a.jsonl").write_text("\n \n")
    assert error(tmp_path / "a.jsonl") == "FILE: has no rows; is it the right file?"
    (tmp_path / "b.csv").write_text("\n\n")
    assert error(tmp_path / "b.csv") == "FILE: has no rows; is it the right file?"


CSV_TEXT = b"name,price\nLamp,5\nChair,6\n"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.parquet", CSV_TEXT, "is not Parquet, as its ending says, but text"),
        ("a.parquet", gzip.compress(CSV_TEXT, mtime=0), "is not Parquet, as its ending says, but gzip"),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "the Parquet data is damaged or cut off"),
        ("a.parquet", b"PAR1", "the Parquet data is damaged or cut off"),
        ("a.csv.gz", CSV_TEXT, "is not gzip, as its ending says"),
        ("a.csv.gz", gzip.compress(CSV_TEXT * 500, mtime=0)[:-40], "gzip data is damaged or cut off"),
        ("a.csv.gz", gzip.compress(bytes(range(256)) * 9, mtime=0)[:60] + b"junk" * 9, "damaged or cut off"),
        (
            "a.csv",
            gzip.compress(CSV_TEXT, mtime=0),
            "is not CSV text, as its ending says, but gzip; end its name in .gz",
        ),
        ("a.csv", b"PAR1xxxx", "but Parquet; end its name in .parquet"),
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
def test_a_file_that_is_not_what_its_ending_says(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert said in error(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_an_unknown_column_names_the_nearest_and_all(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    columns = "its columns are: name, about, kind, price"
    assert error(path, price="prise") == f"FILE: no column 'prise' (did you mean 'price'?); {columns}"
    for option in ({"text": ["name", "abuot"]}, {"group": "abuot"}, {"text": "*", "drop": ["abuot"]}):
        assert error(path, **option) == f"FILE: no column 'abuot' (did you mean 'about'?); {columns}"


def test_a_column_that_only_some_lines_have_is_known(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"name": "x", "price": 5}, {"name": "y", "price": 6, "late": "z"})
    assert [item.text for item in load_items(path, text=["name", "late"], price="price")] == ["x", "y\nz"]


def test_the_wrong_separator_is_hinted_at(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("name;price\nLamp;5\n")
    assert "is ';' what separates its fields?" in error(tmp_path / "a.csv")


def test_a_file_without_a_usable_price_says_why_and_where(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", {"name": "x", "price": "ask"}, {"name": "y", "price": None}, {"name": "z", "price": None}
    )
    assert error(path) == (
        "FILE: none of its 3 rows is usable; the most frequent reason, in 2 of them: no price (column 'price', "
        "first in row 2); name another column or mend the file"
    )
    assert "no text (text of 'about', first in row 1)" in error(jsonl(path, {"about": "", "price": 5}), text="about")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": []}, "no text column is named"),
        ({"text": ["*", "name"]}, "not both"),
        ({"text": ["name", "price"]}, "both the price and part of the text"),
        ({"text": ["name", "about"], "drop": ["about"]}, "both dropped and part of the text"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, options: dict, said: str) -> None:
    assert said in error(write(tmp_path / "a.jsonl", ROWS), **options)
