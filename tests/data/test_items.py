"""Reading items: every format, how a row becomes an item, real files, large files."""

from __future__ import annotations

import copy
import csv
import gzip
import json
import pickle
import random
import subprocess
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path

import polars
import pytest
from tests.data.item_files import ROWS, jsonl, write
from tests.paths import SHARED

from fastprice.data.items import Item, Items, Reject, load_items, open_items
from fastprice.data.readers import open_table
from fastprice.errors import DataError

DATA = SHARED / "data"


# ---- Formats and values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.tsv", "a.tsv.gz", "a.parquet", "A.JSONL", "A.CSV.GZ"],
)
def test_every_format_gives_the_same_items(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name.lower(), ROWS).rename(tmp_path / name)
    items = load_items(path, text=["name", "about"], price="price", group="kind")
    assert items == [
        Item("Desk lamp\nbrass, 40 cm", 25.0, "light", 1),
        Item("Chair", 80.5, "seat", 2),
        Item("Sofa\nthree seats", 1299.99, None, 3),
    ]
    assert isinstance(items, Items)
    assert isinstance(items, list)
    assert items.rejects == []
    assert items.source == str(path)


def test_the_default_text_column_is_called_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "A lamp", "other": 1})
    assert load_items(path) == [Item("A lamp", None, None, 1)]
    assert load_items(str(path), text="text")[0].price is None


def test_values_are_rendered_with_their_columns_names(tmp_path: Path) -> None:
    row = {
        "name": "Vengeance 16 GB",
        "price": 50,
        "cas_latency": 15.0,
        "speed": [4, 3200],
        "modular": False,
        "backlit": True,
        "color": None,
        "ratio": 2.5,
        "os": ["Windows", "macOS"],
        "story": ["It has been in the family for forty long years.", "Short end."],
        "attrs": {"size": "L", "depth_cm": 10, "more": {"wheels": [20, 28]}, "none": None},
        "parts": [{"kind": "fan"}, {"kind": "duct"}],
        "broken": float("nan"),
        "empty": "  ",
        "nothing": [],
    }
    path = jsonl(tmp_path / "a.jsonl", row)
    expected = [
        "Vengeance 16 GB",
        "cas latency: 15",
        "speed: 4, 3200",
        "modular: no",
        "backlit: yes",
        "ratio: 2.5",
        "Windows, macOS",
        "It has been in the family for forty long years.",
        "Short end.",
        "size: L",
        "depth cm: 10",
        "wheels: 20, 28",
        "kind: fan",
        "kind: duct",
    ]
    assert load_items(path, text="*", price="price")[0].text.split("\n") == expected
    assert load_items(path, text=["speed", "name", "color"])[0].text == "speed: 4, 3200\nVengeance 16 GB"


def test_csv_numbers_and_booleans_are_labeled_too(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('name,cas_latency,modular,price\nLamp,15,True,"$1,299.99"\n"a ""quoted""\nname",007,x,5\n')
    items = load_items(path, text=["name", "cas_latency", "modular"], price="price")
    assert items[0] == Item("Lamp\ncas latency: 15\nmodular: yes", 1299.99, None, 1)
    assert items[1] == Item('a "quoted"\nname\ncas latency: 007\nx', 5.0, None, 2)


def test_parquet_types_of_every_kind_are_read(tmp_path: Path) -> None:
    frame = polars.DataFrame(
        {
            "name": [b"Lamp", b"Chair"],
            "price": [Decimal("10.50"), None],
            "made": [date(2020, 1, 2), None],
            "tags": [["red", "tall"], []],
            "spec": [{"watts": 40}, {"watts": None}],
        }
    )
    frame.write_parquet(tmp_path / "a.parquet")
    items = load_items(tmp_path / "a.parquet", text="*", price="price")
    assert items == [Item("Lamp\nmade: 2020-01-02\nred, tall\nwatts: 40", 10.5, None, 1)]
    assert items.rejects == [Reject(2, "no price", "Chair")]


def test_every_column_excludes_those_that_may_contain_the_price(tmp_path: Path) -> None:
    row = {"name": "SSD", "price": 80, "price_per_gb": 0.08, "MSRP": 99, "costume": "cow", "attrs": {"price": "$80"}}
    path = jsonl(tmp_path / "a.jsonl", row)
    items = load_items(path, text="*", price="price", drop=["name"])
    assert items[0].text == "cow"
    assert items.notes == ["left out of the text, since they may contain the price: price_per_gb, MSRP, attrs.price"]
    named = load_items(path, text=["name", "price_per_gb"], price="price")
    assert named[0].text == "SSD\nprice per gb: 0.08"
    assert len(named.notes) == 1
    assert "price_per_gb" in named.notes[0]
    assert load_items(path, text="name", price="price").notes == []


def test_groups_of_several_columns_are_joined_and_none_when_one_is_missing(tmp_path: Path) -> None:
    rows = [{"text": "x", "a": "lamp", "b": 5.0}, {"text": "x", "a": "lamp"}, {"text": "x", "a": " ", "b": 1}]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert [item.group for item in load_items(path, group=["a", "b"])] == ["lamp | 5", None, None]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no price"),
        ("", "no price"),
        ("  ", "no price"),
        ("abc", "price 'abc' is not a price"),
        ("N/A", "price 'N/A' is not a price"),
        (True, "price True is not a price"),
        ([5], "price [5] is not a price"),
        ({"usd": 5}, "price '{\"usd\": 5}' is not a price"),
        (0, "price is 0"),
        ("0.00", "price is 0"),
        ("$0.00", "price is 0"),
        (-5, "price is negative (-5)"),
        ("-5", "price is negative (-5)"),
        (float("nan"), "price is nan"),
        ("nan", "price is nan"),
        (float("inf"), "price is infinite"),
        ("1e400", "price is infinite"),
        (10**400, "price is infinite"),
    ],
)
def test_a_row_without_a_usable_price_is_a_reject(tmp_path: Path, value: object, reason: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"name": "good", "price": 5}, {"name": "bad", "price": value})
    items = load_items(path, text="name", price="price")
    assert items == [Item("good", 5.0, None, 1)]
    (reject,) = items.rejects
    assert (reject.row, reject.text) == (2, "bad")
    assert reject.reason.replace("price {", "price '{").replace("} is not", "}' is not") == reason
    assert len(load_items(path, text="name")) == 2  # without a price column no price is needed


@pytest.mark.parametrize(
    ("value", "price"), [(5, 5.0), ("$1,299.99", 1299.99), ("15 dollars", 15.0), ("1e2", 100.0), ("12.5 USD", 12.5)]
)
def test_a_price_is_a_number_or_text(tmp_path: Path, value: object, price: float) -> None:
    items = load_items(jsonl(tmp_path / "a.jsonl", {"text": "x", "price": value}), price="price")
    assert items[0].price == price
    assert type(items[0].price) is float


def test_prices_in_other_currencies_are_noted(tmp_path: Path) -> None:
    items = load_items(
        jsonl(tmp_path / "a.jsonl", {"text": "x", "price": "5 €"}, {"text": "y", "price": "$5"}), price="price"
    )
    assert items.notes == ["1 prices are in another currency than dollars and were not converted"]


def test_bad_lines_are_rejects_with_their_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    deep = b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}"
    lines = [
        b'{"text": "one"}',
        b"",
        b"{oops",
        b"[1, 2]",
        b'"text"',
        b'{"text": "\xff"}',
        b'{"text": " "}',
        b"null",
        b"7",
        deep,
    ]
    path.write_bytes(b"\r\n".join([*lines, b'{"text": "two \\ud800"}']))
    items = load_items(path)
    assert items == [Item("one", row=1), Item("two ?", row=11)]
    reasons = {reject.row: reject.reason for reject in items.rejects}
    assert list(reasons) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert reasons[3].startswith("not JSON: Expecting property name")
    assert reasons[4].startswith("not a JSON object but a list")
    assert reasons[5] == "not a JSON object but a string"
    assert reasons[6].startswith("not JSON: 'utf-8' codec can't decode byte 0xff")
    assert reasons[7] == "no text"
    assert reasons[8] == "not a JSON object but null"
    assert reasons[9] == "not a JSON object but a number"
    assert "recursion" in reasons[10] or "nested" in reasons[10]
    assert all(len(reject.text) <= 200 for reject in items.rejects)


def test_ragged_and_broken_csv_rows_are_rejects_with_their_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfname, price\n\nLamp,5\nChair\nSofa,6,7\n"Bed,8\nTable"x,8\nCaf\xe9,9\n"two\nlines",10\n'
    )
    items = load_items(path, text="name", price="price")
    assert items == [Item("Lamp", 5.0, None, 1), Item("two\nlines", 10.0, None, 6)]
    assert [(reject.row, reject.reason) for reject in items.rejects] == [
        (2, "1 fields where the header has 2"),
        (3, "3 fields where the header has 2"),
        (4, "line 6 to 7 is not CSV: ',' expected after '\"'"),
        (5, "line 8 is not UTF-8; save the file as UTF-8"),
    ]
    assert [reject.text for reject in items.rejects] == ["Chair", "Sofa,6,7", '"Bed,8\nTable"x,8', "Caf?,9"]


@pytest.mark.parametrize(("name", "data"), [("a.csv.gz", b'"text"\nLamp\n'), ("a.jsonl.gz", b'{"text": "Lamp"}')])
def test_a_byte_order_mark_is_skipped(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"\xef\xbb\xbf" + data))
    assert load_items(tmp_path / name) == [Item("Lamp", row=1)]


def test_every_column_excludes_a_nameless_index(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",name,kind\n0,Lamp,light\n")
    assert load_items(tmp_path / "a.csv", text="*")[0].text == "Lamp\nlight"


# ---- Items ---------------------------------------------------------------------------------------------------------


def test_rejects_are_written_atomically(tmp_path: Path) -> None:
    items = Items([], rejects=[Reject(3, "no price", "Café"), Reject(None, "x")])
    target = tmp_path / "rejects.jsonl"
    items.write_rejects(target)
    assert [json.loads(line) for line in target.read_text("utf-8").splitlines()] == [
        {"row": 3, "reason": "no price", "text": "Café"},
        {"row": None, "reason": "x", "text": ""},
    ]
    broken = Items([], rejects=[Reject(1, "fine"), Reject(2, object())])  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        broken.write_rejects(target)
    assert len(target.read_text("utf-8").splitlines()) == 2
    with pytest.raises(DataError, match="cannot write the rejects"):
        items.write_rejects(tmp_path / "nowhere" / "rejects.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["rejects.jsonl"]


def test_items_survive_copying_and_pickling() -> None:
    items = Items([Item("x", 5.0)], rejects=[Reject(2, "no price")], source="here", notes=["note"])
    for copied in (copy.copy(items), copy.deepcopy(items), pickle.loads(pickle.dumps(items))):
        assert (copied, copied.rejects, copied.source, copied.notes) == (items, items.rejects, "here", ["note"])


def test_importing_items_imports_no_heavy_library() -> None:
    code = "import sys, fastprice.data.items; print(*{name.partition('.')[0] for name in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"polars", "pyarrow", "pandas", "numpy", "torch", "datasets"}.intersection(modules)


# ---- The shared real data ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are missing")
def test_pc_parts() -> None:
    path = DATA / "pc_parts" / "pc_parts_2025-07-23.jsonl.gz"
    items = load_items(path, text="*", price="price", group=["category", "name"])
    assert (len(items), len(items.rejects)) == (16_222, 50_556)
    assert {reject.reason for reject in items.rejects} == {"no price"}
    assert "price_per_gb" in items.notes[0]
    assert not any("price per gb" in item.text for item in items)
    assert all(item.group and item.group.count(" | ") >= 1 for item in items)


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data sets are missing")
def test_walmart_amazon() -> None:
    path = DATA / "er_products" / "walmart_amazon.csv"
    items = load_items(path, text=["title", "brand"], price="price", group="modelno")
    reasons = [reject.reason for reject in items.rejects]
    assert (len(items), reasons.count("no price"), reasons.count("price is 0")) == (6_137, 771, 27)
    assert len(items) + len(items.rejects) == 6_935


# ---- Large files ---------------------------------------------------------------------------------------------------


def test_a_csv_field_may_be_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    before = csv.field_size_limit()
    path.write_text(f"name,price\n{'long ' * 40_000},5\nLamp,6\n")
    items = load_items(path, text="name", price="price")
    assert [len(item.text) for item in items] == [200_000, 4]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_rows_are_read_one_at_a_time_with_the_fraction_read(tmp_path: Path, name: str) -> None:
    rng = random.Random(0)
    path = write(tmp_path / name, [{"name": rng.randbytes(60).hex(), "about": "", "price": n} for n in range(5000)])
    with open_items(path, text="name") as rows:
        fractions = [rows.fraction_read()]
        for row in rows:
            assert isinstance(row, Item)
            fractions.append(rows.fraction_read())
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.4 < fractions[2500] < fractions[-1] == 1  # a little is read ahead


def test_only_the_named_columns_of_parquet_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    with open_table(path, frozenset({"about", "none"})) as table:
        assert list(table.columns) == ["name", "about", "kind", "price"]
        assert [record for _, record, _ in table.rows] == [{"about": row["about"]} for row in ROWS]
