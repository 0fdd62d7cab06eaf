"""Reading items, by random files: no row is lost, and every error is one line."""

from __future__ import annotations

import csv
import gzip
import json
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.data.item_files import ROWS, write

from fastprice.data.items import load_items
from fastprice.errors import DataError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["$5", "1,299", "0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.sampled_from(["name", "price", "a", "b c", "unit_cost"]), VALUES, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.lists(OBJECTS | VALUES | st.just("{bad"), max_size=12), st.booleans(), st.sampled_from(["*", "name"]))
def test_no_row_of_json_lines_is_lost(rows: list, priced: bool, text: str) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows if row != ""]
    lines = [line.replace("\n", " ") for line in lines if line.strip()]
    lines += [json.dumps({"name": "last", "price": 5})]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass", newline="")
        try:
            items = load_items(path, text=text, price="price" if priced else None)
        except DataError as error:
            assert "is not JSON" in str(error)  # noqa: PT017 (five lines in a row that are not JSON)
            return
    assert len(items) + len(items.rejects) == len(lines)
    assert sorted([item.row for item in items] + [reject.row for reject in items.rejects]) == list(
        range(1, len(lines) + 1)
    )
    for item in items:
        assert item.text.strip()
        item.text.encode("utf-8")
        assert (item.price is None) != priced
        assert item.price is None or 0 < item.price < float("inf")


CELLS = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=12))
@example([["FALSE", "1"]])
@example([["x", "\n"], ['"', "5"], ["a\rb", "6", ""]])
def test_no_row_of_csv_is_lost(rows: list[list[str]]) -> None:
    rows = [row for row in rows if row != [""]] + [["last", "5"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([["name", "price"], *rows])
        items = load_items(path, text="name", price="price")
    assert len(items) + len(items.rejects) == len(rows)
    for row, item in ((rows[item.row - 1], item) for item in items):
        assert len(row) == 2
        # A CSV file has no booleans: a cell that spells one is written as a word, as those of JSON Lines are.
        assert {"true": "yes", "false": "no"}.get(row[0].strip().lower(), row[0].strip()) in item.text


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["a.jsonl", "a.csv", "a.tsv", "a.csv.gz", "a.parquet"]), st.booleans())
def test_any_bytes_give_items_or_an_error_of_one_line(junk: bytes, name: str, packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(gzip.compress(junk) if packed else junk)
        try:
            load_items(path, text="*")
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert str(path) in str(error)  # noqa: PT017


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_parquet_and_gzip_give_items_or_an_error_of_one_line(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / data.draw(st.sampled_from(["a.parquet", "a.jsonl.gz"])), ROWS * 20)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(4, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
        try:
            load_items(path, text="*", price="price")
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017
