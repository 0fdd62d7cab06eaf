"""Sizes of memory as people write them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprice.errors import ConfigError
from fastprice.memory.byte_sizes import GIB, format_gib, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("24g", 24 * GIB), (" 8 gib ", 8 * GIB), ("512MiB", 512 << 20),
     ("1.5TiB", 3 << 39), ("1000", 1000), ("24Gi", 24 * GIB), (".5 GiB", GIB // 2), ("1000B", 1000), (77, 77)],
)  # fmt: skip
def test_sizes_are_parsed(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "24 apples", "-3GiB", "0", "0.0GiB", "24Gib2", "i", "5i", "5ib", "1e3", "٣x", 0, -1, True, 1.5]
)
def test_invalid_sizes_are_one_line(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"^memory: ") as error:
        parse_bytes(text)
    assert "\n" not in str(error.value)


@given(st.text(max_size=12))
def test_any_text_gives_a_size_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        assert parse_bytes(text) >= 1


@given(st.integers(1, 10**6), st.sampled_from(["GiB", "gib", " GiB", "g", "G"]))
def test_whole_gibibytes_are_exact(count: int, unit: str) -> None:
    assert parse_bytes(f"{count}{unit}") == count * GIB


def test_sizes_are_written_in_gib() -> None:
    assert [format_gib(size) for size in (24 * GIB, 15 * GIB // 2)] == ["24 GiB", "7.5 GiB"]
