"""The arithmetic of step times, and that the page holds what it gives now."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.paths import DOCS, ROOT

from fastprice.benchmarking import main
from fastprice.benchmarking.step_times import PEERS, step_time, step_time_page
from fastprice.benchmarking.traffic import LayerTraffic, read_traffic
from fastprice.memory.byte_sizes import GIB
from fastprice.memory.roofline import Gpu, find_gpu
from fastprice.models.shapes import read_shape

FIGURES = ROOT / "benchmarks" / "traffic.json"
H200 = find_gpu("H200")


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], LayerTraffic]:
    return {(row.model, row.peer): row for row in read_traffic(FIGURES)[1]}


def test_the_page_holds_the_present_figures(tmp_path: Path) -> None:
    page = DOCS / "explanation" / "step-time.md"
    assert page.read_text(encoding="utf-8") == step_time_page(FIGURES), f"fastprice bench traffic --page {page}"
    assert main(["traffic", str(FIGURES), "--page", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == step_time_page(FIGURES)


def test_the_parts_of_a_step_by_hand(rows: dict[tuple[str, str], LayerTraffic]) -> None:
    """Llama-3.1-8B on an H200, nothing recomputed: 6.98 B linear weights, 790 TFLOP/s at 90 %, 4.3 TB/s."""
    time = step_time("Llama-3.1-8B", "unsloth", H200, rows["Llama-3.1-8B", "unsloth"])
    assert time is not None
    assert (time.tokens, time.recompute) == (4096, "none")
    linear = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert time.parts["products"] == pytest.approx(4 * 4096 * linear / (0.9 * 790e12))
    assert time.parts["activation"] == pytest.approx(4096 * 32 * 18 * 14336 / 4.3e12)
    assert time.parts["dequantization"] == pytest.approx(2 * linear * 2.51587 / 4.3e12, rel=1e-4)
    assert time.parts["optimizer"] == pytest.approx(28 * 41_943_040 / 4.3e12)
    head = 128_256 * 4096
    assert time.parts["loss"] == pytest.approx(
        4 * 4096 * head / (0.9 * 790e12) + (8 * 4096 * 128_256 + 4 * head) / 4.3e12
    )
    assert time.host == pytest.approx(8e-6 * 32 * rows["Llama-3.1-8B", "unsloth"].sum()[0])
    assert time.seconds == sum(time.parts.values()), "the device takes longer than the host"


def test_ours_skips_what_the_last_layer_does_not_need(rows: dict[tuple[str, str], LayerTraffic]) -> None:
    times = {peer: step_time("Llama-3.2-1B", peer, H200, rows["Llama-3.2-1B", peer]) for peer in PEERS}
    ours, stock = times["fastprice"], times["peft"]
    assert ours is not None
    assert stock is not None
    after = read_shape("Llama-3.2-1B").linears[3:]
    skipped = 4 * (4096 - 91) * sum(linear.weights for linear in after) / (0.9 * 790e12)
    assert stock.parts["products"] - ours.parts["products"] == pytest.approx(skipped)


def small(gib: float, **changed: float) -> Gpu:
    return replace(find_gpu("RTX 4090"), memory=round(gib * GIB), **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("peer", ["unsloth", "peft"])
def test_less_memory_recomputes_then_takes_smaller_packs_then_does_not_fit(
    peer: str, rows: dict[tuple[str, str], LayerTraffic]
) -> None:
    row = rows["Llama-3.1-8B", peer]
    times = [step_time("Llama-3.1-8B", peer, small(gib), row) for gib in (48, 8, 4)]
    large, tight, none = times
    assert large is not None
    assert tight is not None
    assert none is None
    assert large.recompute == "none"
    assert (tight.tokens, tight.recompute) == ((4096, "offload") if peer == "unsloth" else (2048, "full"))
    forward, both = (row.kinds["forward"]["dequantization"][1], row.sum(["dequantization"])[1] * 1000)
    passes = (both + forward) / both * 4096 / tight.tokens
    assert tight.parts["dequantization"] == pytest.approx(passes * large.parts["dequantization"])
    assert tight.parts["products"] == pytest.approx(1.5 * large.parts["products"])


def test_a_slow_bus_or_host_is_what_a_step_takes(rows: dict[tuple[str, str], LayerTraffic]) -> None:
    tight = small(6)
    ours = step_time("Llama-3.1-8B", "fastprice", tight, rows["Llama-3.1-8B", "fastprice"])
    slow = step_time("Llama-3.1-8B", "fastprice", replace(tight, pcie=1e9), rows["Llama-3.1-8B", "fastprice"])
    assert ours is not None
    assert slow is not None
    assert 0 < ours.transfer < ours.seconds
    assert slow.transfer == pytest.approx(25 * ours.transfer)
    assert slow.seconds == slow.transfer
    fast = small(24, flops=1e18, bandwidth=1e18)
    bound = step_time("Llama-3.2-1B", "peft", fast, rows["Llama-3.2-1B", "peft"])
    assert bound is not None
    assert bound.seconds == bound.host
