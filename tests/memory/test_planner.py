"""Plans: sizes as people write them, arithmetic limits, what fits, and the settings to run it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.paths import DOCS

from fastprice.config import read_config
from fastprice.errors import ConfigError
from fastprice.memory import estimate_memory, find_plan, make_plan, next_larger, parse_bytes, plan_table
from fastprice.memory.estimate import kept_bytes
from fastprice.memory.planner import HEADROOM, choose_levels, table
from fastprice.memory.recompute_levels import LEVELS, parse_levels
from fastprice.memory.roofline import NF4_BYTES, Step, flops_per_token, known_gpu, step_seconds
from fastprice.models.shapes import read_shape

GIB = 1 << 30
LABELED = 4 / 180


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("24g", 24 * GIB), (" 8 gib ", 8 * GIB), ("512MiB", 512 << 20),
     ("1.5TiB", 3 << 39), ("1000", 1000), ("24Gi", 24 * GIB), (".5 GiB", GIB // 2), ("1000B", 1000), (77, 77)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "24 apples", "-3GiB", "0", "0.0GiB", "24Gib2", "i", "5i", "5ib", "1e3", "٣x", 0, -1, True, 1.5]
)
def test_other_sizes_are_refused_in_one_line(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"^memory: ") as error:
        parse_bytes(text)
    assert "\n" not in str(error.value)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        assert parse_bytes(text) >= 1


@given(st.integers(1, 10**6), st.sampled_from(["GiB", "gib", " GiB", "g", "G"]))
def test_whole_gibibytes_are_exact(count: int, unit: str) -> None:
    assert parse_bytes(f"{count}{unit}") == count * GIB


class TestLimits:
    """The published arithmetic for Llama-3.1-8B, r=16 on all linear layers, texts of 180 tokens, 4 of the price."""

    shape = read_shape("Llama-3.1-8B")

    def test_operations_for_each_token(self) -> None:
        stock = flops_per_token(self.shape, Step(4096, 32, 1.0))
        best = flops_per_token(self.shape, Step(4096, 0, LABELED))
        assert round(stock / 1e9, 1) == 44.5
        assert round(best / 1e9, 1) == 28.4
        assert round(stock / best, 2) == 1.57

    def test_a_budget_that_fits_everything_saves_what_the_arithmetic_says(self) -> None:
        """8B, 4,096 packed tokens: the plan against recomputing everything with logits for every token."""
        plan = make_plan("Llama-3.1-8B", "80GiB", tokens=4096)
        assert plan.levels == ("all",) * 32
        step = Step(4096, plan.recomputed, LABELED, costly=plan.levels.count("costly"))
        stock = flops_per_token(self.shape, Step(4096, 32, 1.0))
        assert stock / flops_per_token(self.shape, step) == pytest.approx(1.57, abs=0.005)

    def test_cheap_things_cost_their_bytes_and_inputs_on_the_host_the_bus(self) -> None:
        gpu = known_gpu("RTX 4090")
        plain = step_seconds(self.shape, Step(4096, 0, LABELED), gpu)
        cheap = step_seconds(self.shape, Step(4096, 0, LABELED, costly=32), gpu)
        # Two norms read and written (8 h), gate and up read, their product written (6 i)
        assert cheap - plain == pytest.approx(32 * 4096 * (8 * 4096 + 6 * 14336) / 1.0e12)
        assert 0.01 < cheap / plain - 1 < 0.03
        fused = step_seconds(self.shape, Step(4096, 0, LABELED, costly=32, fused=True), gpu)
        assert fused - plain == pytest.approx(32 * 4096 * 8 * 4096 / 1.0e12)
        again = step_seconds(self.shape, Step(4096, 32, LABELED), gpu)
        assert step_seconds(self.shape, Step(4096, 32, LABELED, hosted=32), gpu) == again
        slow = replace(gpu, pcie=5e8)
        assert step_seconds(self.shape, Step(4096, 32, LABELED, hosted=32), slow) == pytest.approx(
            32 * 4096 * 8192 / 5e8
        )

    @pytest.mark.parametrize(("name", "again", "once"), [("8B", 4.7, 6.9), ("3B", 8.4, 12.0), ("1B", 14.9, 20.8)])
    def test_share_of_the_head(self, name: str, again: float, once: float) -> None:
        shape = read_shape("Llama-3.1-8B" if name == "8B" else f"Llama-3.2-{name}")
        for recomputed, share in ((shape.layers, again), (0, once)):
            full = flops_per_token(shape, Step(4096, recomputed, 1.0))
            none = flops_per_token(shape, Step(4096, recomputed, 0.0))
            assert 100 * (full - none) / full == pytest.approx(share, abs=0.06)

    @pytest.mark.parametrize(("tokens", "floor"), [(2048, 128), (4096, 243), (8192, 474)])
    def test_floor_of_a_step_on_an_h200(self, tokens: int, floor: int) -> None:
        assert round(1e3 * step_seconds(self.shape, Step(tokens, 32, 1.0), known_gpu("H200"))) == floor

    @pytest.mark.parametrize(
        ("gpu", "tokens", "recomputed", "labeled", "thousands"),
        [
            ("H200", 2048, 32, 1.0, 16.0), ("H200", 4096, 32, 1.0, 16.8), ("H200", 8192, 32, 1.0, 17.3),
            ("H200", 2048, 0, LABELED, 25.1), ("H200", 4096, 0, LABELED, 26.4), ("H200", 8192, 0, LABELED, 27.1),
            ("RTX 4090", 2048, 32, 1.0, 3.4), ("RTX 4090", 4096, 32, 1.0, 3.5), ("RTX 4090", 8192, 32, 1.0, 3.6),
            ("RTX 4090", 2048, 0, LABELED, 5.3), ("RTX 4090", 4096, 0, LABELED, 5.5),
            ("RTX 4090", 8192, 0, LABELED, 5.7),
        ],
    )  # fmt: skip
    def test_ceilings(self, gpu: str, tokens: int, recomputed: int, labeled: float, thousands: float) -> None:
        step = Step(tokens, recomputed, labeled)
        assert round(tokens / step_seconds(self.shape, step, known_gpu(gpu)) / 1e3, 1) == thousands

    def test_three_dequantization_passes_move_53_gigabytes(self) -> None:
        weights = self.shape.layers * self.shape.layer_linear_weights
        assert 3 * weights * (NF4_BYTES + 2) == pytest.approx(52.7e9, rel=0.001)

    def test_a_70b_step_brings_71_gigabytes_over_the_bus(self) -> None:
        shape, gpu = read_shape("Llama-3.1-70B"), known_gpu("rtx4090")
        tiny = Step(16, 80, LABELED, streamed=80)
        assert step_seconds(shape, tiny, gpu) == pytest.approx(70.6e9 / 25e9, rel=0.001)
        large = Step(4096, 80, LABELED, streamed=80)
        assert step_seconds(shape, large, gpu) == step_seconds(shape, Step(4096, 80, LABELED), gpu)

    def test_unknown_cards_are_told_the_nearest(self) -> None:
        assert known_gpu("NVIDIA GeForce RTX-4090").name == "RTX 4090"
        with pytest.raises(ConfigError, match=r"did you mean 'RTX 4090'"):
            known_gpu("RTX 4091")


@pytest.mark.parametrize("size", ["7.5GiB", "12GiB", "16GiB", "80GiB"])
@pytest.mark.parametrize("engine", ["peft", "unsloth", "fastprice"])
def test_a_plan_fits_and_recomputes_no_more_than_it_must(size: str, engine: str) -> None:
    plan = make_plan("Llama-3.1-8B", size, engine=engine, tokens=2048)
    budget = parse_bytes(size) * (1 - HEADROOM)

    def estimate(levels: Any) -> Any:
        return estimate_memory(
            "Llama-3.1-8B", recompute=levels, engine=engine, tokens=plan.tokens, sequences=plan.tokens // 180,
            loss_head="completion", labeled=LABELED,
        )  # fmt: skip

    assert plan.estimate == estimate("all" if engine == "unsloth" else plan.levels)
    assert plan.estimate.peak_bytes <= budget
    assert plan.tokens * plan.accumulation == 2048
    assert plan.tokens_per_second <= plan.limit
    if engine == "unsloth":
        assert plan.recomputed == 32
        return
    # One layer less at a level, with the next dearer level for all that follow, does not fit.
    host, again = plan.levels.count("host"), plan.recomputed
    cheap = again + plan.levels.count("costly")
    for end, level, dearer in ((host, "host", "input"), (again, "input", "costly"), (cheap, "costly", "all")):
        if level in plan.levels:
            levels = [*plan.levels[: end - 1], *[dearer] * (33 - end)]
            assert estimate(levels).peak_bytes > budget


def test_cheap_recomputation_comes_first_and_the_host_last() -> None:
    def levels(size: str) -> tuple[str, ...]:
        return make_plan("Qwen2.5-14B", size, tokens=1024).levels

    seen = [set(levels(size)) for size in ("80GiB", "20GiB", "16GiB", "12GiB")]
    assert seen == [{"all"}, {"all", "costly"}, {"costly", "input"}, {"input", "host"}]


def test_levels_that_fit_nowhere_and_everywhere() -> None:
    assert choose_levels(4, lambda levels: False) is None
    assert choose_levels(4, lambda levels: True) == ("all",) * 4
    cost = {"all": 8, "costly": 4, "input": 1, "host": 0}
    for budget in range(33):
        levels = choose_levels(4, lambda levels, budget=budget: sum(cost[level] for level in levels) <= budget)
        assert levels is not None
        assert sum(cost[level] for level in levels) in (budget, budget - 1, budget - 2, budget - 3)


def test_more_memory_is_never_slower() -> None:
    speeds = [make_plan("Llama-3.2-3B", f"{size}GiB", gpu="RTX 4090").tokens_per_second for size in (8, 12, 16, 24, 48)]
    assert speeds == sorted(speeds)
    assert make_plan("Llama-3.2-3B", "80GiB").recomputed == 0


def test_the_method_may_be_left_to_the_plan() -> None:
    assert make_plan("Llama-3.2-1B", "24GiB", method="auto").method == "lora"  # no dequantization, and it fits
    assert make_plan("Llama-3.1-8B", "12GiB", method="auto").method == "qlora"


def test_70b_fits_24_gib_only_streamed() -> None:
    assert find_plan("Llama-3.1-70B", "24GiB") is None
    plan = make_plan("Llama-3.1-70B", "24GiB", streaming=True, engine="fastprice")
    assert plan.recomputed >= plan.layers - 1
    assert "host" in plan.levels
    assert 0 < plan.streamed < 80
    assert plan.resident == 80 - plan.streamed
    assert plan.estimate.peak_bytes <= 24 * GIB * (1 - HEADROOM)
    assert "streamed from the host" in plan.summary()


def test_what_does_not_fit_is_told_with_what_is_needed_and_what_fits() -> None:
    with pytest.raises(
        ConfigError, match=r"Llama-3\.1-70B does not fit in 24 GiB: the smallest plan needs .* GiB; .* fits"
    ) as error:
        make_plan("meta-llama/Llama-3.1-70B", "24GiB")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"tokens": 5}, "tokens: 5"), ({"text": 0}, "text: 0"), ({"method": "qlorra"}, "did you mean 'qlora'"),
     ({"gpu": "H300"}, "gpu: 'H300'"), ({"rank": 0}, "rank: 0")],
)  # fmt: skip
def test_impossible_settings_are_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_plan("Llama-3.1-8B", "24GiB", **options)


def test_the_yaml_is_a_config_that_only_wants_data_and_out(tmp_path: Path) -> None:
    plan = make_plan("unsloth/Llama-3.1-8B", "16GiB", rank=32)
    (tmp_path / "plan.yaml").write_text(plan.yaml())
    config = read_config(tmp_path / "plan.yaml", {"data.synthetic": 100, "out": "run"})
    assert config.model.base == "unsloth/Llama-3.1-8B"
    assert (config.model.method, config.model.rank) == ("qlora", 32)
    assert parse_levels(config.model.recompute, plan.layers) == plan.levels
    assert f"keep: {config.model.recompute}" in plan.summary()
    assert (config.train.pack_tokens, config.train.gradient_accumulation) == (plan.tokens, plan.accumulation)


def test_the_next_larger_model() -> None:
    need = next_larger("Llama-3.1-8B", "8GiB")
    assert need is not None
    assert need.base == "gemma-2-9b"
    assert need.least_bytes > 8 * GIB
    assert need.plan is None
    assert find_plan(need.base, need.least_bytes + 1) is not None
    assert next_larger("Qwen2.5-72B", "24GiB") is None


def test_the_table_of_models_and_sizes() -> None:
    sizes = ["8GiB", "24GiB"]
    rows = plan_table(sizes, ["Qwen2.5-0.5B", "Llama-3.1-70B"])
    assert [name for name, _ in rows] == ["Qwen2.5-0.5B", "Llama-3.1-70B"]
    assert rows[1][1] == [None, None]
    lines = table(rows, sizes).splitlines()
    assert lines[0] == "| model | 8 GiB | 24 GiB |"
    assert lines[3] == "| Llama-3.1-70B | - | - |"
    everything = plan_table(sizes)
    assert len(everything) > 20
    assert all(small is None or large is not None for _, (small, large) in everything)


def test_the_figures_of_the_guide_are_what_the_arithmetic_says() -> None:
    shape, gpu = read_shape("Llama-3.1-8B"), known_gpu("RTX 4090")
    text = (DOCS / "fit.md").read_text(encoding="utf-8")
    for level in LEVELS:
        cells = [f"`{level}`"]
        again = 32 if level in ("input", "host") else 0
        for engine in ("peft", "fastprice"):
            kept = kept_bytes(shape, level, tokens=4096, sequences=22, engine=engine) / 4096 / 1024
            peak = estimate_memory(
                shape, tokens=4096, sequences=22, engine=engine, recompute=[level] * 32, loss_head="completion",
                labeled=LABELED,
            ).peak_bytes  # fmt: skip
            step = Step(4096, again, LABELED, costly=32 * (level == "costly"), fused=engine != "peft")
            rate = 4096 / step_seconds(shape, step, gpu)
            cells += [f"{kept:.1f}", f"{peak / GIB:.1f} GiB", f"{rate:,.0f}"]
        assert f"| {' | '.join(cells)} |" in text
