"""Arithmetic of the benchmarks: spreads, floors, who agrees with whom, verdicts, tables."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprice.benchmarking.analysis import agreement, summarize_kernels, summarize_steps
from fastprice.benchmarking.cases import DEQUANTIZE_SHAPES, NF4_BYTES, draw_rows, shape_of, step_flops
from fastprice.benchmarking.memory import largest
from fastprice.benchmarking.page import write_page
from fastprice.benchmarking.report import compare, find_results, limits_table, load_result, markdown, paste_line
from fastprice.benchmarking.static import drift, read_static, static_table, write_static
from fastprice.benchmarking.timing import ratios, spread_of
from fastprice.errors import ConfigError, DataError
from fastprice.prompts.template import IGNORE

LIMITS = {"copy_bytes_per_second": 1e12, "matmul_flops": 1e14, "matmul": "8192^3 bfloat16"}


def step_row(peer: str, rate: float, *, loss: float = 11.0, norm: float = 2.0, noise: float = 0.01) -> dict[str, Any]:
    return {
        "stage": "steps",
        "case": {"kind": "step", "peer": peer, "model": "llama-3.2-1b", "tokens": 4096, "rank": 16},
        "status": "ok",
        "peer": peer,
        "dtype": "bfloat16",
        "check_loss": loss,
        "check_gradient_norm": norm,
        "mean_tokens_per_second": rate,
        "items_per_second": rate / 140,
        "step_seconds": {"p20": 1.0, "p50": 1.0, "p80": 1.0, "count": 9, "noise": noise, "noisy": noise > 0.05},
        "phase_seconds": {"forward": {"p50": 0.3}, "backward": {"p50": 0.6}, "between": {"p50": 0.1}},
        "load_seconds": 12.0,
        "load_host_bytes": 5 * 2**30,
        "flops_per_token": 4e9,
        "peak_allocated": 2 * 2**30,
        "peak_reserved": 3 * 2**30,
        "memory_curve": [[0.0, 2**30], [0.5, 2 * 2**30], [1.0, 2**30]],
        "steps": 9,
    }


def kernel_row(ours: float, peer: float) -> dict[str, Any]:
    took = {"fastprice": {"p50": ours, "noise": 0.01}, "bitsandbytes": {"p50": peer, "noise": 0.01}}
    return {
        "stage": "kernels",
        "case": {"kind": "kernels"},
        "status": "ok",
        "family": "dequantize",
        "name": "4096x4096 bfloat16",
        "unsloth": False,
        "seconds": took,
        "ratios": {"bitsandbytes": {"p50": peer / ours}},
        "share_of_limit": {"fastprice": 0.8, "bitsandbytes": 0.5},
        "flops": 1e9,
        "bytes_moved": 1e7,
        "noisy": [],
    }


def result(*rows: dict[str, Any], kind: str = "gpu", device: str = "Some GPU", time: str = "2026-11-21") -> Any:
    about = {
        "kind": kind,
        "device": device,
        "time": f"{time}T00:00:00",
        "commit": "abc",
        "versions": {"torch": "2.11.0"},
    }
    return {"format": 1, "environment": about, "limits": LIMITS, "rows": list(rows)}


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


def test_flop_and_bytes_are_those_of_the_published_model() -> None:
    shape = shape_of("llama-3.1-8b")
    assert shape.linear_weights == 6_979_321_856
    texts = [140] * 29
    # 28.4 GFLOP a token: 4 x 6.98 G frozen, the rest adapters, attention and 2 % of the head.
    assert step_flops(shape, texts, 87, 16) / sum(texts) == pytest.approx(28.4e9, rel=0.01)
    assert shape.linear_weights * NF4_BYTES == pytest.approx(3.60e9, rel=0.01)
    every_token = step_flops(shape, texts, sum(texts), 16) - step_flops(shape, texts, 0, 16)
    assert every_token == pytest.approx(4 * sum(texts) * 128256 * 4096)


def test_every_layer_of_the_named_models_is_dequantized_once() -> None:
    assert ((14336, 4096), "bfloat16") in DEQUANTIZE_SHAPES
    assert ((8192, 28672), "bfloat16") in DEQUANTIZE_SHAPES
    assert len(set(DEQUANTIZE_SHAPES)) == len(DEQUANTIZE_SHAPES)
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3.1-8b'"):
        shape_of("llama-3.1-8")


@given(st.integers(0, 1000))
def test_rows_are_as_long_as_price_texts_and_labeled_on_the_answer(seed: int) -> None:
    for row in draw_rows(20, 2048, 2, seed):
        assert 60 <= len(row.ids) <= 256
        answer = [label for label in row.labels if label != IGNORE]
        assert 2 <= len(answer) <= 4
        assert row.ids[-len(answer) :] == answer
        assert answer[-1] == 2
        assert min(row.ids[:-1]) >= 16


@given(st.integers(1, 100), st.integers(0, 30_000), st.integers(1, 300))
def test_the_largest_that_fits_is_found(first: int, limit: int, steps: int) -> None:
    probes = []

    def fits(size: int) -> bool:
        probes.append(size)
        return size <= limit

    most = first * steps
    assert largest(fits, first, most) == min(limit, most) // first * first
    assert len(probes) <= 2 * math.log2(steps) + 2


def test_a_check_off_the_band_gives_no_ratio() -> None:
    stock = step_row("trl-packed", 1000.0)
    assert agreement(step_row("peft", 2000.0, loss=11.05), stock)["ok"]
    for wrong in ({"loss": 11.5}, {"norm": 2.3}, {"loss": float("nan")}):
        off = step_row("peft", 2000.0, **wrong)
        assert not agreement(off, stock)["ok"]
        entries = summarize_steps([stock, off], LIMITS)
        assert all(entry["ratio"] is None for entry in entries)
        assert "x as fast" not in markdown(result(stock, off))
        assert "check failed" in markdown(result(stock, off))


def test_ratios_are_of_the_best_fastprice_with_the_spread_of_rounds() -> None:
    rows = [
        step_row("peft", 1900.0),
        step_row("trl-packed", 1000.0),
        step_row("peft", 2100.0),
        step_row("trl-packed", 1100.0),
    ]
    stock, ours = summarize_steps(rows, LIMITS)
    assert ours["ratio"] is None
    assert stock["ratio"]["of"] == "peft"
    assert stock["ratio"]["mid"] == pytest.approx(2000 / 1050)
    assert stock["ratio"]["low"] == pytest.approx(1900 / 1100)
    assert stock["ratio"]["high"] == pytest.approx(2100 / 1000)
    assert ours["flop_utilization"] == pytest.approx(2000 * 4e9 / 1e14)
    assert stock["noisy"], "rounds that differ by 9.5 % are flagged"


def test_kernels_are_summed_up_by_geometric_mean() -> None:
    (entry,) = summarize_kernels([kernel_row(1.0, 2.0), kernel_row(1.0, 0.5)])
    assert entry["mean"] == pytest.approx(1.0)
    assert entry["smallest"] == 0.5


def test_verdicts_respect_noise() -> None:
    before = result(step_row("peft", 1000.0, noise=0.06), kernel_row(1.0, 2.0))
    near = result(step_row("peft", 1070.0, noise=0.06), kernel_row(1.02, 2.0))
    far = result(step_row("peft", 1200.0, noise=0.06), kernel_row(1.5, 2.0))
    assert [entry["verdict"] for entry in compare(before, near)] == ["same", "same"]
    assert [entry["verdict"] for entry in compare(before, far)] == ["faster", "slower"]
    with pytest.raises(DataError, match="two devices"):
        compare(before, result(device="Another GPU"))


def test_a_cpu_result_says_so_wherever_it_is_shown(tmp_path: Path) -> None:
    cpu = result(step_row("peft", 10.0), step_row("trl-packed", 9.0), kind="cpu", device="CPU, x")
    assert "no GPU figure" in markdown(cpu)
    assert "no GPU figure" in paste_line(cpu)
    page = write_page(cpu, tmp_path / "page.html").read_text()
    assert "Nothing on this page says how fast fastprice is on a GPU" in page
    assert "Nothing on this page" not in write_page(result(step_row("peft", 10.0)), tmp_path / "gpu.html").read_text()


def test_the_page_plots_what_was_measured_and_escapes_the_rest(tmp_path: Path) -> None:
    measured = result(step_row("peft", 10.0), step_row("trl-packed", 9.0), kernel_row(1.0, 2.0), device="<b>GPU</b>")
    page = write_page(measured, tmp_path / "page.html", measured).read_text()
    assert page.count("data:image/svg+xml") == 4
    assert "<b>GPU</b>" not in page
    assert "Arithmetic limits (not measured)" in page
    empty = write_page(result(), tmp_path / "empty.html").read_text()
    assert "data:image" not in empty


def test_phases_are_shares_of_the_step_and_absent_where_unseen() -> None:
    unseen = {**step_row("trl-packed", 9.0), "phase_seconds": {}}
    text = markdown(result(step_row("peft", 10.0), unseen))
    assert "| peft | 30% | 60% | 10% | 12.0 s | 5.00 GiB |" in text
    assert "| trl-packed | - | - | - | 12.0 s | 5.00 GiB |" in text


def static_row(case: str = "nf4", target: int = 90, **changed: Any) -> dict[str, Any]:
    return {
        "case": case, "target": target, "registers": 40, "spills": 0, "shared_bytes": 1024, "store_bits": 128,
        "instructions_per_element": 6.4, "tensor_cores": {"HGMMA": 2}, **changed,
    }  # fmt: skip


def test_worse_machine_code_is_told_and_better_is_not() -> None:
    before = [static_row(), static_row(target=80)]
    assert drift(before, before) == []
    assert drift(before, [static_row(instructions_per_element=6.0, registers=30)]) == []
    assert drift(before, [static_row(instructions_per_element=6.5)]) == [], "within what does not matter"
    assert drift(before, [static_row(instructions_per_element=7.0)]) == [
        "nf4 on sm_90: instructions per element 6.4 before, 7 now"
    ]
    assert drift(before, [static_row(spills=1)]) == ["nf4 on sm_90: spills 0 before, 1 now"]
    assert drift(before, [static_row("new")]) == ["new on sm_90 has no figures yet"]


def test_static_figures_are_kept_and_shown_as_read_off_not_measured(tmp_path: Path) -> None:
    rows = [static_row(), static_row(target=80, registers=64)]
    write_static(tmp_path / "static.json", rows, "triton 3.6.0")
    assert read_static(tmp_path / "static.json") == ("triton 3.6.0", rows)
    assert "| nf4 | 6.40 | 128 | 1,024 | HGMMA | 64 | 0 |" in static_table(rows)
    page = write_page(result(step_row("peft", 10.0)), tmp_path / "page.html", static=rows).read_text()
    assert "read off, not measured" in page
    (tmp_path / "static.json").write_text("{}")
    with pytest.raises(DataError, match="no static figures"):
        read_static(tmp_path / "static.json")


def test_arithmetic_ceilings_match_the_known_ones() -> None:
    table = limits_table(["llama-3.1-8b"])
    # 26.4 k and 5.5 k tokens/s at 4,096 tokens, by an independent reckoning.
    _, _, row = table.splitlines()
    h200, rtx4090 = (float(cell.replace(",", "")) for cell in row.strip("|").split("|")[2:])
    assert h200 == pytest.approx(26_400, rel=0.03)
    assert rtx4090 == pytest.approx(5_500, rel=0.03)


def test_results_are_found_oldest_first_and_anything_else_is_refused(tmp_path: Path) -> None:
    for name, time in (("b", "2026-11-20"), ("a", "2026-11-21")):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(time=time)))
    assert [path.stem for path in find_results(tmp_path)] == ["b", "a"]
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(DataError, match="is no benchmark result"):
        load_result(tmp_path / "c.json")
    with pytest.raises(DataError, match="no benchmark results"):
        find_results(tmp_path / "nowhere")


def test_tables_hold_for_rows_that_failed() -> None:
    failed = {"stage": "steps", "case": {"kind": "step", "peer": "unsloth"}, "status": "failed", "reason": "no CUDA"}
    whole = result(copy.deepcopy(failed), step_row("peft", 10.0))
    assert "peft" in markdown(whole)
    assert "unsloth |" not in markdown(whole)
