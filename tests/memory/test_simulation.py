"""The memory estimate against a simulation with the real model code (tests/memory/simulation)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.memory.simulation.__main__ import published_steps, table_row
from tests.memory.simulation.step import (
    LiveBytes,
    SimulatedStep,
    build_model,
    simulated_peak_bytes,
    simulated_saved_bytes,
)
from tests.paths import DOCS
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprice.memory.estimate import saved_bytes
from fastprice.memory.recompute_levels import RECOMPUTE_LEVELS
from fastprice.models.shapes import read_shape

STEPS: list[dict[str, Any]] = [
    {"base": "Llama-3.2-1B", "method": "qlora", "tokens": 1024, "recompute": "none", "loss_head": "completion"},
    {"base": "Llama-3.2-1B", "method": "lora", "tokens": 4096, "recompute": "full", "loss_head": "completion",
     "labeled": 0.02},
    {"base": "Llama-3.2-1B", "method": "qlora", "tokens": 512, "recompute": "full", "loss_head": "full"},
    {"base": "Qwen2.5-0.5B", "method": "qlora", "tokens": 8192, "recompute": "full", "loss_head": "completion",
     "labeled": 0.02},
    {"base": "Qwen2.5-0.5B", "method": "lora", "tokens": 2048, "recompute": 1, "loss_head": "completion"},
    {"base": "Qwen3-0.6B", "method": "lora", "tokens": 2048, "recompute": "none", "loss_head": "full"},
    {"base": "gemma-2-2b", "method": "qlora", "tokens": 2048, "recompute": "none", "loss_head": "full", "sequences": 2},
    {"base": "gemma-2-2b", "method": "lora", "tokens": 2048, "recompute": "full", "loss_head": "completion"},
    {"base": "Qwen2.5-0.5B", "method": "qlora", "tokens": 2048, "recompute": "full", "loss_head": "full",
     "sequences": 4, "phase": "eval"},
    {"base": "Llama-3.2-1B", "method": "full", "tokens": 512, "recompute": "full", "loss_head": "completion"},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", STEPS, ids=lambda settings: "-".join(str(part) for part in settings.values()))
def test_the_estimate_agrees_with_the_real_model_code(settings: dict[str, Any]) -> None:
    step = SimulatedStep(**settings, layers=2)
    assert step.estimate().tensor_bytes == pytest.approx(simulated_peak_bytes(step), rel=0.015)


MIXED_LEVELS = [
    ("Llama-3.1-8B", "lora", ("offload", "full", "mlp", "none")), ("gemma-2-2b", "qlora", ("selective",) * 4),
    ("Llama-3.1-8B", "qlora", ("offload",) * 4), ("Qwen3-8B", "lora", ("none", "selective", "offload", "full")),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("base", "method", "levels"), MIXED_LEVELS, ids=str)
def test_levels_agree_with_the_real_model_code(base: str, method: str, levels: tuple[str, ...]) -> None:
    """With so small a vocabulary the peak is in a layer, and not in the loss head."""
    step = SimulatedStep(base, method, 4096, levels, "completion", sequences=4, labeled=0.02, layers=4, vocabulary=256)
    assert step.estimate().moment != "loss head"
    assert step.estimate().tensor_bytes == pytest.approx(simulated_peak_bytes(step), rel=0.015)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", RECOMPUTE_LEVELS)
@pytest.mark.parametrize(
    ("base", "method"),
    [("Llama-3.2-1B", "qlora"), ("Qwen3-0.6B", "lora"), ("gemma-2-2b", "qlora"), ("Llama-3.1-8B", "qlora")],
)
def test_the_estimate_agrees_with_the_kernels(base: str, method: str, level: str) -> None:
    step = SimulatedStep(base, method, 4096, (level,) * 3, "completion", sequences=4, labeled=0.02, layers=3,
                         vocabulary=256, engine="fastprice")  # fmt: skip
    shape = read_shape(step.settings)
    kept_casts = 2 * 3 * shape.adapter_weights(step.rank)  # which are not kept of fake tensors
    assert step.estimate().tensor_bytes - kept_casts == pytest.approx(simulated_peak_bytes(step), rel=0.002)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", ["none", "full"])
def test_the_estimate_agrees_with_a_tiled_mlp(level: str) -> None:
    step = SimulatedStep("Llama-3.1-8B", "qlora", 32768, (level,) * 2, "completion", sequences=64, labeled=0.002,
                         layers=2, vocabulary=256, engine="fastprice", mlp_tile=4096)  # fmt: skip
    whole = replace(step, mlp_tile=None)
    assert step.estimate().tensor_bytes == pytest.approx(simulated_peak_bytes(step), rel=0.02)
    assert step.estimate().tensor_bytes < 0.75 * whole.estimate().tensor_bytes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["peft", "fastprice"])
@pytest.mark.parametrize(
    ("base", "method"), [("Llama-3.2-1B", "qlora"), ("Qwen3-0.6B", "lora"), ("gemma-2-2b", "lora")]
)
def test_a_layer_saves_exactly_the_estimated_bytes(base: str, method: str, engine: str) -> None:
    """What one more layer adds to the bytes alive after the forward pass: the real model, autograd and our hooks."""

    def saved(levels: tuple[str, ...]) -> int:
        step = SimulatedStep(base, method, 1024, levels, "completion", sequences=2, labeled=0.02, layers=len(levels),
                    vocabulary=256, engine=engine)  # fmt: skip
        return simulated_saved_bytes(step) - _weight_bytes(step)

    for level in RECOMPUTE_LEVELS:
        estimate = saved_bytes(base, level, method=method, tokens=1024, sequences=2, engine=engine)
        assert saved((level,) * 3) - saved((level,) * 2) == estimate


def _weight_bytes(step: SimulatedStep) -> int:
    """Bytes of the model alone."""
    model = build_model(step)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.filterwarnings("ignore")
def test_the_simulation_counts_storages_not_tensors() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.empty(1000, requires_grad=True)
        y = x.exp()
        view = y.view(10, 100)
        assert live.bytes == 8000
        del y
        assert live.bytes == 8000  # the view holds it
        z = view + 1
        del view
        assert live.bytes == 12000  # autograd holds it
        z.sum().backward()
        del z
        assert live.bytes == 8000  # x and its gradient
        assert x.grad is not None
    assert live.peak > 12000


def test_the_published_table_holds_the_present_estimates() -> None:
    lines = (DOCS / "memory-errors.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and "lora |" in line]
    for step, row in zip(published_steps(), rows, strict=True):
        simulated_gib, error = row.split(" | ")[5], row.split(" | ")[7]
        assert row == table_row(step, round(float(simulated_gib) * 2**30), step.estimate(), error)
