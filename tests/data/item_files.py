"""Files of items in every format, and the error message of a bad one."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import polars
import pytest

from fastprice.data.items import load_items
from fastprice.errors import DataError

ROWS = [
    {"name": "Desk lamp", "about": "brass, 40 cm", "kind": "light", "price": 25},
    {"name": "Chair", "about": None, "kind": "seat", "price": 80.5},
    {"name": "Sofa", "about": "three seats", "kind": None, "price": 1299.99},
]


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path: Path, rows: list[dict]) -> Path:
    """The rows in the format of the path's ending."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        polars.DataFrame(rows, infer_schema_length=None).write_parquet(path)
        return path
    text = io.StringIO()
    if kind in ("csv", "tsv"):
        writer = csv.DictWriter(text, rows[0], delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    else:
        text.writelines(json.dumps(row) + "\n" for row in rows)
    data = text.getvalue().encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def error(path: Path, **options: object) -> str:
    """The message of the DataError that loading raises: one line, with the file (here "FILE")."""
    with pytest.raises(DataError) as caught:
        load_items(path, **{"text": "name", "price": "price", **options})
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), "FILE")
