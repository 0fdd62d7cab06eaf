"""Memory plans: what fits, how fast it can be at most, and the settings to run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.paths import DOCS

from fastprice.config import read_config
from fastprice.errors import ConfigError
from fastprice.memory import (
    estimate_memory,
    find_plan,
    format_plan_table,
    next_larger_model,
    parse_bytes,
    plan_memory,
    plan_table,
)
from fastprice.memory.byte_sizes import GIB
from fastprice.memory.estimate import saved_bytes
from fastprice.memory.planner import HEADROOM, choose_recompute_levels
from fastprice.memory.recompute_levels import RECOMPUTE_LEVELS, parse_recompute_levels
from fastprice.memory.roofline import TrainingStep, find_gpu, step_seconds
from fastprice.models.shapes import read_shape

LABELED = 4 / 180


@pytest.mark.parametrize("size", ["7.5GiB", "12GiB", "16GiB", "80GiB"])
@pytest.mark.parametrize("engine", ["peft", "unsloth", "fastprice"])
def test_a_plan_fits_and_recomputes_as_little_as_possible(size: str, engine: str) -> None:
    plan = plan_memory("Llama-3.1-8B", size, engine=engine, tokens=2048)
    budget = parse_bytes(size) * (1 - HEADROOM)

    def estimate(levels: Any) -> Any:
        return estimate_memory(
            "Llama-3.1-8B", recompute=levels, engine="fastprice" if engine == "unsloth" else engine,
            tokens=plan.tokens, sequences=plan.tokens // 180, loss_head="completion", labeled=LABELED,
            dense_layers=plan.dense_layers,
        )  # fmt: skip

    assert plan.estimate == estimate(plan.levels)
    assert bool(plan.dense_layers) == (engine == "fastprice" and set(plan.levels) == {"none"})
    assert plan.estimate.peak_bytes <= budget
    assert plan.tokens * plan.gradient_accumulation == 2048
    assert plan.tokens_per_second <= plan.best_tokens_per_second
    # With one layer less at a level, and all that follow at the one before, it does not fit.
    offload, full = plan.levels.count("offload"), plan.recomputed_layers
    mlp = full + plan.levels.count("mlp")
    selective = mlp + plan.levels.count("selective")
    for end, level, previous in (
        (offload, "offload", "full"),
        (full, "full", "mlp"),
        (mlp, "mlp", "selective"),
        (selective, "selective", "none"),
    ):
        if level in plan.levels:
            levels = [*plan.levels[: end - 1], *[previous] * (33 - end)]
            assert estimate(levels).peak_bytes > budget


def test_selective_recomputation_comes_first_and_offload_last() -> None:
    def levels(size: str) -> tuple[str, ...]:
        return plan_memory("Qwen2.5-14B", size, tokens=1024).levels

    seen = [set(levels(size)) for size in ("80GiB", "20GiB", "16GiB", "12GiB")]
    assert seen == [{"none"}, {"none", "selective"}, {"selective", "mlp"}, {"full", "offload"}]


def test_levels_by_a_budget() -> None:
    assert choose_recompute_levels(4, lambda levels: False) is None
    assert choose_recompute_levels(4, lambda levels: True) == ("none",) * 4
    cost = {"none": 8, "selective": 4, "mlp": 2, "full": 1, "offload": 0}
    for budget in range(33):
        levels = choose_recompute_levels(
            4, lambda levels, budget=budget: sum(cost[level] for level in levels) <= budget
        )
        assert levels is not None
        assert sum(cost[level] for level in levels) in (budget, budget - 1, budget - 2, budget - 3)


def test_more_memory_is_never_slower() -> None:
    speeds = [
        plan_memory("Llama-3.2-3B", f"{size}GiB", gpu="RTX 4090").tokens_per_second for size in (8, 12, 16, 24, 48)
    ]
    assert speeds == sorted(speeds)
    assert plan_memory("Llama-3.2-3B", "80GiB").recomputed_layers == 0


def test_gradient_accumulation_makes_up_for_a_smaller_micro_batch() -> None:
    plan = plan_memory("Llama-3.1-8B", "10GiB", engine="fastprice")
    assert (plan.tokens, plan.gradient_accumulation) == (1024, 4)
    assert plan_memory("Llama-3.1-8B", "10GiB", engine="fastprice", min_tokens=2048).tokens == 2048


def test_method_auto() -> None:
    assert plan_memory("Llama-3.2-1B", "24GiB", method="auto").method == "lora"  # no dequantization, and it fits
    assert plan_memory("Llama-3.1-8B", "12GiB", method="auto").method == "qlora"


def test_70b_fits_24_gib_only_with_layer_offload() -> None:
    assert find_plan("Llama-3.1-70B", "24GiB") is None
    plan = plan_memory("Llama-3.1-70B", "24GiB", layer_offload=True, engine="fastprice")
    assert plan.recomputed_layers >= plan.layers - 1
    assert "offload" in plan.levels
    assert 0 < plan.offloaded_layers < 80
    assert plan.resident_layers == 80 - plan.offloaded_layers
    assert plan.estimate.peak_bytes <= 24 * GIB * (1 - HEADROOM)
    assert "offloaded to the host" in plan.summary()


def test_a_model_that_does_not_fit_is_one_line_with_what_is_needed_and_what_fits() -> None:
    with pytest.raises(
        ConfigError, match=r"Llama-3\.1-70B does not fit in 24 GiB: the smallest plan needs .* GiB; .* fits"
    ) as error:
        plan_memory("meta-llama/Llama-3.1-70B", "24GiB")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tokens": 5}, "tokens: 5"), ({"text_tokens": 0}, "text_tokens: 0"),
     ({"method": "qlorra"}, "did you mean 'qlora'"),
     ({"gpu": "H300"}, "gpu: 'H300'"), ({"rank": 0}, "rank: 0")],
)  # fmt: skip
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_memory("Llama-3.1-8B", "24GiB", **options)


def test_the_yaml_is_a_config_without_data_and_out(tmp_path: Path) -> None:
    plan = plan_memory("unsloth/Llama-3.1-8B", "16GiB", rank=32)
    (tmp_path / "plan.yaml").write_text(plan.yaml())
    config = read_config(tmp_path / "plan.yaml", {"data.synthetic": 100, "out": "run"})
    assert config.model.base == "unsloth/Llama-3.1-8B"
    assert (config.model.method, config.model.rank) == ("qlora", 32)
    assert parse_recompute_levels(config.model.recompute, plan.layers) == plan.levels
    assert f"recompute of 32 layers: {config.model.recompute}" in plan.summary()
    assert (config.train.pack_tokens, config.train.gradient_accumulation) == (plan.tokens, plan.gradient_accumulation)


def test_the_next_larger_model() -> None:
    larger = next_larger_model("Llama-3.1-8B", "8GiB")
    assert larger is not None
    assert larger.base == "gemma-2-9b"
    assert larger.least_bytes > 8 * GIB
    assert larger.plan is None
    assert find_plan(larger.base, larger.least_bytes + 1) is not None
    assert next_larger_model("Qwen2.5-72B", "24GiB") is None


def test_the_table_of_models_and_sizes() -> None:
    sizes = ["8GiB", "24GiB"]
    rows = plan_table(sizes, ["Qwen2.5-0.5B", "Llama-3.1-70B"])
    assert [name for name, _ in rows] == ["Qwen2.5-0.5B", "Llama-3.1-70B"]
    assert rows[1][1] == [None, None]
    lines = format_plan_table(rows, sizes).splitlines()
    assert lines[0] == "| model | 8 GiB | 24 GiB |"
    assert lines[3] == "| Llama-3.1-70B | - | - |"
    everything = plan_table(sizes)
    assert len(everything) > 20
    assert all(small is None or large is not None for _, (small, large) in everything)


def test_the_figures_of_the_guide_are_what_the_arithmetic_says() -> None:
    shape, gpu = read_shape("Llama-3.1-8B"), find_gpu("RTX 4090")
    text = (DOCS / "fit.md").read_text(encoding="utf-8")
    for level in RECOMPUTE_LEVELS:
        cells = [f"`{level}`"]
        recomputed = 32 if level in ("full", "offload") else 0
        for engine in ("peft", "fastprice"):
            saved = saved_bytes(shape, level, tokens=4096, sequences=22, engine=engine) / 4096 / 1024
            peak = estimate_memory(
                shape, tokens=4096, sequences=22, engine=engine, recompute=[level] * 32, loss_head="completion",
                labeled=LABELED,
            ).peak_bytes  # fmt: skip
            step = TrainingStep(
                4096, recomputed, LABELED, selective_layers=32 * (level == "selective"),
                mlp_layers=32 * (level == "mlp"), fused=engine != "peft",
            )  # fmt: skip
            rate = 4096 / step_seconds(shape, step, gpu)
            cells += [f"{saved:.1f}", f"{peak / GIB:.1f} GiB", f"{rate:,.0f}"]
        assert f"| {' | '.join(cells)} |" in text
    plain, dense = (step_seconds(shape, TrainingStep(4096, 0, LABELED, dense_layers=n), gpu) for n in (0, 32))
    assert f"{plain / dense - 1:.0%}".replace("%", " %") + " on an RTX 4090" in text
