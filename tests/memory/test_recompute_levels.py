"""Recompute levels: parsed, formatted, and checked."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprice.errors import ConfigError
from fastprice.memory.recompute_levels import (
    RECOMPUTE_LEVELS,
    check_recompute,
    expand_recompute,
    format_recompute_levels,
    parse_recompute_levels,
)


@given(st.lists(st.sampled_from(RECOMPUTE_LEVELS), min_size=1, max_size=40))
def test_formatted_levels_are_parsed_back(levels: list[str]) -> None:
    assert parse_recompute_levels(format_recompute_levels(levels), len(levels)) == tuple(levels)


@given(st.text(max_size=30), st.integers(1, 8))
def test_any_text_gives_levels_or_a_config_error(text: str, layers: int) -> None:
    with suppress(ConfigError):
        assert len(parse_recompute_levels(text, layers)) == layers
        assert check_recompute(text) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [("some", "neither one of none"), ("fulls", "did you mean 'full'"), ("", "neither"), ("4full", "neither"),
     ("3 full", "do not add up to the model's 4 layers"), ("9 full", "do not add up"), ("4 full, none", "neither"),
     ("2 full, 2 cheap", "'cheap' is not one of")],
)  # fmt: skip
def test_invalid_levels_are_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_recompute_levels(text, 4)
    assert "\n" not in str(error.value)


def test_levels_of_the_first_layers_by_number() -> None:
    assert expand_recompute(3, 4) == ("full", "full", "full", "none")
    assert expand_recompute(["none", "full"], 2) == ("none", "full")
    assert expand_recompute("1 full, 3 selective", 4) == ("full", *3 * ["selective"])
    for wrong in (5, -1, True, ["none"]):
        with pytest.raises(ConfigError, match="recompute: "):
            expand_recompute(wrong, 4)  # type: ignore[arg-type]
