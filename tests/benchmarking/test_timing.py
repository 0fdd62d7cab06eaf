from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.benchmarking.fake_cuda import LAUNCH, FakeCuda

from fastprice.benchmarking.timing import interleave, ratios, seconds_per_launch, spread_of


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


def test_a_device_is_timed_by_its_events_with_its_cache_overwritten(cuda: FakeCuda) -> None:
    calls: list[str] = []
    samples = interleave({"a": lambda: calls.append("a")}, "cuda", seconds=0.0, warmup=1, min_rounds=3)
    assert calls == ["a"] * 4
    assert samples["a"] == pytest.approx([LAUNCH] * 3)
    assert "get_device_properties" in cuda.calls, "the size of the L2 cache"
    interleave({"a": lambda: calls.append("a")}, "cpu", seconds=0.0, min_rounds=1)
    before = cuda.calls.count("get_device_properties")
    interleave({"a": lambda: calls.append("a")}, "cuda", seconds=0.0, min_rounds=1, flush=False)
    assert cuda.calls.count("get_device_properties") == before


def test_short_launches_are_captured_in_one_graph(cuda: FakeCuda) -> None:
    calls: list[int] = []
    launches = [lambda number=number: calls.append(number) for number in range(4)]  # type: ignore[misc]
    seconds, how = seconds_per_launch(launches, "cuda", rounds=5)
    assert how == "graph"
    assert seconds == pytest.approx(LAUNCH / 4)
    assert calls == [0, 1, 2, 3] * 2, "once to compile, once captured, and never again by the host"
    assert cuda.replayed == 5 + 3
    cuda.capture_fails = True
    seconds, how = seconds_per_launch(launches, "cuda", rounds=5)
    assert (seconds, how) == (pytest.approx(LAUNCH / 4), "stream")
    assert cuda.replayed == 5 + 3
    assert calls.count(0) == 2 + 1 + 5 + 3


def test_short_launches_on_a_cpu_are_timed_one_after_another() -> None:
    ticks: list[int] = []
    seconds, how = seconds_per_launch([lambda: ticks.append(1)] * 3, "cpu", rounds=2)
    assert how == "stream"
    assert seconds > 0
    assert len(ticks) == 3 * (1 + 3 + 2)
