from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprice.benchmarking.timing import interleave, ratios, spread_of


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=50))
def test_percentiles_are_ordered_and_inside_the_samples(samples: list[float]) -> None:
    spread = spread_of(samples)
    assert min(samples) <= spread.p20 <= spread.p50 <= spread.p80 <= max(samples)
    assert spread.noise >= 0


def test_percentiles_interpolate() -> None:
    spread = spread_of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (spread.p20, spread.p50, spread.p80) == (2.0, 3.5, 5.0)
    with pytest.raises(ValueError, match="at least one sample"):
        spread_of([])


def test_a_ratio_is_taken_round_by_round() -> None:
    # Both slow down by four in the second round: side by side that is no difference at all.
    assert ratios([2.0, 8.0], [1.0, 4.0]).noise == 0


def test_functions_run_in_turns_after_the_warmup() -> None:
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in ("a", "b")}  # type: ignore[misc]
    samples = interleave(ways, "cpu", seconds=0.0, warmup=2, min_rounds=3)
    assert calls == ["a", "b"] * 5
    assert [len(samples[name]) for name in ("a", "b")] == [3, 3]
