"""What the probes do around a trainer, on a CUDA device that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.benchmarking.fake_cuda import FakeCuda

from fastprice.benchmarking import model_loading, training_runs
from fastprice.benchmarking.host_memory import host_peak, reset_host_peak
from fastprice.benchmarking.model_loading import load_rounds
from fastprice.benchmarking.peers import LOADING_WAYS
from fastprice.benchmarking.step_probe import LOGGING_STEPS, WARMUP, MeasurementDone, StepProbe
from fastprice.benchmarking.training_runs import RunProbe

GPU = torch.device("cuda")


class Trainer:
    """As much of transformers.Trainer as a probe touches."""

    def __init__(self, logging: str = "no") -> None:
        from transformers import IntervalStrategy

        self.args = SimpleNamespace(
            logging_strategy=IntervalStrategy(logging), logging_steps=500, logging_first_step=True
        )
        self.model = torch.nn.Linear(2, 2)
        self.state = SimpleNamespace(global_step=7)
        self.callbacks: list[Any] = []

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def compute_loss(self) -> None:
        pass

    def training_step(self, model: Any, inputs: Any, items: Any) -> torch.Tensor:
        self.compute_loss()
        return torch.zeros(())


def batch() -> dict[str, Any]:
    return {"input_ids": torch.zeros(1, 10, dtype=torch.long), "pack_lengths": (4, 6)}


def test_steps_are_timed_by_events_after_the_memory_was_reset(cuda: FakeCuda) -> None:
    trainer, probe = Trainer(), StepProbe(GPU, 3, 60.0)
    probe.attach(trainer)
    for step in range(WARMUP + 3):
        trainer.training_step(None, batch(), None)
        resets = cuda.calls.count("reset_peak_memory_stats")
        assert resets == (step >= WARMUP - 1), "one step before the clock starts"
    with pytest.raises(MeasurementDone):
        trainer.training_step(None, batch(), None)
    figures = probe.figures()
    assert figures["steps"] == len(figures["step_samples"]) == 3
    assert set(figures["phase_seconds"]) == {"forward", "backward", "between"}
    assert (figures["peak_allocated"], figures["peak_reserved"]) == (700, 5000)
    assert figures["memory_curve"], "sampled over one more step"
    assert figures["tokens_per_step"] == 10
    assert figures["items_per_second"]["p50"] == pytest.approx(2 / figures["step_seconds"]["p50"])


@pytest.mark.parametrize("before", ["no", "steps", "epoch"])
def test_every_trainer_logs_as_often(before: str) -> None:
    trainer = Trainer(before)
    StepProbe(torch.device("cpu"), 1, 1.0).attach(trainer)
    assert trainer.args.logging_strategy == "steps"
    assert trainer.args.logging_steps == LOGGING_STEPS
    assert not trainer.args.logging_first_step


def test_a_whole_run_is_timed_when_the_device_is_done(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter((6.0, 3.0))
    monkeypatch.setattr(training_runs, "unseen_loss", lambda model, rows: next(losses))
    trainer, probe = Trainer(), RunProbe(GPU, [])
    with probe.loading():
        pass
    probe.attach(trainer)
    (times,) = trainer.callbacks
    cuda.calls.clear()
    times.on_train_begin(None, None, None)
    times.on_train_end(None, None, None)
    assert cuda.calls == ["synchronize", "empty_cache", "reset_peak_memory_stats", "synchronize"]
    figures = probe.figures()
    assert figures["train_seconds"] >= 0
    assert (figures["loss_before"], figures["loss_after"], figures["steps"]) == (6.0, 3.0, 7)
    assert (figures["peak_allocated"], figures["peak_reserved"]) == (700, 5000)
    assert trainer.args.logging_steps == LOGGING_STEPS


def test_loading_has_a_row_a_round_with_its_own_peaks(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(model_loading._LOADERS) == set(LOADING_WAYS)
    monkeypatch.setitem(model_loading._LOADERS, "fastprice", lambda folder: object())
    rows = list(load_rounds("fastprice", "folder", 2))
    assert [row["round"] for row in rows] == [0, 1]
    assert cuda.calls.count("reset_peak_memory_stats") == 2
    assert rows[0]["peak_reserved"] == 5000


def test_the_host_peak_is_that_since_the_reset() -> None:
    block = bytearray(200 << 20)
    high = host_peak()
    del block
    if not reset_host_peak():
        pytest.skip("this system forbids it")
    assert host_peak() < high - (100 << 20)
