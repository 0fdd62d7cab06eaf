"""Measures the training steps of one run, whatever trainer runs it.

Before the first step it takes loss and gradient norm of a fixed batch with fixed adapters, in the trainer's own path
(its collator, autocast, scaling), by which runs are compared, and the losses of a few updates on that batch. Then it
times steps and their phases without ever waiting for the device, and last it samples the allocator over one more step.
`MeasurementDone` then ends the run. Every trainer logs as often: reading a loss makes the host wait for the device.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastprice.benchmarking.host_memory import host_peak, reset_host_peak
from fastprice.benchmarking.random_models import seed_adapters
from fastprice.benchmarking.reporting.summaries import PHASES
from fastprice.benchmarking.timing import Stopwatch, spread_of
from fastprice.memory.recompute_levels import format_recompute_levels
from fastprice.models.peft_engine import compute_dtype
from fastprice.prompts.template import IGNORE

__all__ = ["LOGGING_STEPS", "WARMUP", "MeasurementDone", "StepProbe", "log_alike"]

WARMUP = 4  # steps: autotuning, allocator growth, lazy compilation

LOGGING_STEPS = 10  # TRL's default
_TRAJECTORY = 3  # updates on the fixed batch
_TRAJECTORY_RATE = 1e-3  # learning rate of these


class MeasurementDone(BaseException):
    """Ends a training run from inside once it was measured; not an Exception, so that no trainer catches it."""


class StepProbe:
    """Measures one training run; see the module's docstring.

    device   that the run trains on
    steps    how many to time after the warm-up; timing stops after `seconds`, when at least two steps were timed
    check    the rows of the fixed batch, as the trainer's collator takes them; None: no check
    """

    def __init__(
        self, device: torch.device, steps: int, seconds: float, check: Sequence[dict[str, Any]] | None = None
    ) -> None:
        self.device = device
        self.done = 0
        self._steps = steps
        self._seconds = seconds
        self._check = check
        self._watch = Stopwatch(device)
        self._began = 0.0
        self._forward_over = False
        self._phases_seen = True
        self._counts: list[tuple[Any, Any]] = []  # tokens and texts of each timed micro-batch
        self._phases: dict[str, list[float]] = {}
        self._figures: dict[str, Any] = {}

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Times what loads the model, and takes its peak of host memory (VmHWM)."""
        reset_host_peak()
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._figures |= {"load_seconds": time.perf_counter() - began, "load_host_bytes": host_peak()}

    def attach(self, trainer: Any) -> None:
        """Lets every `training_step` of this trainer, a transformers.Trainer that was not started yet, run here."""
        log_alike(trainer)
        original = trainer.training_step

        def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None, *rest: Any, **named: Any) -> Any:
            def run(batch: Any, items: Any) -> Any:
                return original(model, batch, items, *rest, **named)

            return self._step(trainer, model, inputs, num_items_in_batch, run)

        trainer.training_step = training_step

    def figures(self) -> dict[str, Any]:
        """The figures of a run that ended in `MeasurementDone`: times in seconds, memory in bytes, real tokens and
        texts (padding left out) a second."""
        times = [sum(each) for each in zip(*self._phases.values(), strict=True)]
        tokens, texts = ([int(count[place]) for count in self._counts[: len(times)]] for place in (0, 1))
        phases = self._phases if self._phases_seen else {}
        return {
            "dtype": str(compute_dtype()).removeprefix("torch."),
            **self._figures,
            "steps": len(times),
            "step_seconds": spread_of(times).as_dict(),
            "phase_seconds": {name: spread_of(each).as_dict() for name, each in phases.items()},
            "step_samples": times,
            "tokens_per_second": spread_of([n / each for n, each in zip(tokens, times, strict=True)]).as_dict(),
            "items_per_second": spread_of([n / each for n, each in zip(texts, times, strict=True)]).as_dict(),
            "tokens_per_step": sum(tokens) / len(tokens),
            "texts_per_step": sum(texts) / len(texts),
        }

    def _step(self, trainer: Any, model: Any, inputs: Any, items: Any, run: Callable[[Any, Any], Any]) -> Any:
        if self.done == 0 and self._check is not None:
            self._take_check(self._check, trainer, model, run)
        if self.done == WARMUP - 1:
            self._reset_memory()  # one step before the clock starts, as the allocator must grow again
        if self.done == WARMUP:
            self._began = time.perf_counter()
            self._mark_end_of_forward(trainer)
        if self.done >= WARMUP:
            self._watch.mark()  # also the end of the step before
            if self._finished():
                self._finish(trainer, inputs, items, run)
            self._counts.append(_count(inputs))
        self._forward_over = False
        result = run(inputs, items)
        self.done += 1
        if self.done > WARMUP:
            if not self._forward_over:
                self._phases_seen = False  # a trainer whose step does not go through compute_loss
                self._watch.mark()
            self._watch.mark()
        return result

    def _mark_end_of_forward(self, trainer: Any) -> None:
        """Marks the end of the trainer's `compute_loss`, where forward ends and backward begins."""
        original = trainer.compute_loss

        def compute_loss(*arguments: Any, **named: Any) -> Any:
            result = original(*arguments, **named)
            if not self._forward_over:
                self._forward_over = True
                self._watch.mark()
            return result

        trainer.compute_loss = compute_loss

    def _take_check(
        self, rows: Sequence[dict[str, Any]], trainer: Any, model: Any, run: Callable[[Any, Any], Any]
    ) -> None:
        """Loss and gradient norm of the fixed rows, with adapters that are the same for every peer."""
        adapters = seed_adapters(model)
        batch = trainer.data_collator([dict(row) for row in rows])
        labeled = torch.tensor(_predicted(batch["labels"]), device=self.device)
        loss = float(run(batch, labeled))
        scaler = getattr(trainer.accelerator, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        squares = [
            float(parameter.grad.detach().double().pow(2).sum())
            for parameter in model.parameters()
            if parameter.grad is not None
        ]
        norm = sum(squares) ** 0.5 / scale
        self._figures |= {"check_loss": loss, "check_gradient_norm": norm, "adapters": adapters, "trajectory": []}
        for parameter in model.parameters():
            parameter.grad = None
        if not getattr(trainer, "captures", False):  # a CUDA graph being recorded keeps its gradients where they are
            self._figures["trajectory"] = _trajectory(trainer.optimizer, lambda: float(run(dict(batch), labeled)))
            seed_adapters(model)

    def _reset_memory(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what loading and the check had reserved is not the step's
            torch.cuda.reset_peak_memory_stats()

    def _finished(self) -> bool:
        timed = self.done - WARMUP
        return timed >= self._steps or (timed >= 2 and time.perf_counter() - self._began > self._seconds)

    def _finish(self, trainer: Any, inputs: Any, items: Any, run: Callable[[Any, Any], Any]) -> None:
        controller = getattr(trainer, "recompute_controller", None)  # of fastprice's own trainer
        marks = self._watch.intervals()
        self._phases = {name: marks[place :: len(PHASES)] for place, name in enumerate(PHASES)}
        self._figures |= {
            "recompute": None if controller is None else format_recompute_levels(controller.levels),
            "peak_allocated": None,
            "peak_reserved": None,
            "memory_curve": [],
        }
        if self.device.type == "cuda":
            self._figures |= {
                "peak_allocated": torch.cuda.max_memory_allocated(),
                "peak_reserved": torch.cuda.max_memory_reserved(),
            }
            self._figures["memory_curve"] = _memory_curve(lambda: run(inputs, items))
        raise MeasurementDone


def log_alike(trainer: Any) -> None:
    """Makes a transformers.Trainer that was not started yet log every `LOGGING_STEPS` steps and nothing else."""
    trainer.args.logging_strategy = type(trainer.args.logging_strategy)("steps")
    trainer.args.logging_steps = LOGGING_STEPS
    trainer.args.logging_first_step = False


def _trajectory(optimizer: Any, loss: Callable[[], float]) -> list[float]:
    """The losses before each of a few updates on one batch by the trainer's own optimizer, which is as new after it.

    `loss` runs forward and backward.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for group in optimizer.param_groups:
        group["lr"] = _TRAJECTORY_RATE
    for _ in range(_TRAJECTORY):
        losses.append(loss())
        optimizer.step()
        optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.state.clear()
    return losses


def _predicted(labels: torch.Tensor) -> int:
    """How many positions are predicted: the first of each row predicts nothing."""
    return int((labels[:, 1:] != IGNORE).sum())


def _count(inputs: Any) -> tuple[Any, Any]:
    """(real tokens, texts) of a micro-batch; tensors on the device stay there until the end."""
    ids = inputs["input_ids"]
    if "pack_lengths" in inputs:
        return sum(inputs["pack_lengths"]), len(inputs["pack_lengths"])
    if "packed_seq_lengths" in inputs:
        return inputs["packed_seq_lengths"].sum(), len(inputs["packed_seq_lengths"])
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum(), ids.shape[0]
    return ids.numel(), (inputs["position_ids"] == 0).sum()


def _memory_curve(step: Callable[[], object]) -> list[tuple[float, int]]:
    """(share of the step, bytes allocated) over one untimed step, sampled by a thread."""
    samples: list[tuple[float, int]] = []
    running = True

    def sample() -> None:
        while running:
            samples.append((time.perf_counter(), torch.cuda.memory_allocated()))
            time.sleep(2e-4)

    thread = threading.Thread(target=sample, daemon=True)
    began = time.perf_counter()
    thread.start()
    step()
    torch.cuda.synchronize()
    running = False
    thread.join()
    length = time.perf_counter() - began
    every = max(1, len(samples) // 200)
    return [(round((moment - began) / length, 4), allocated) for moment, allocated in samples[::every]]
