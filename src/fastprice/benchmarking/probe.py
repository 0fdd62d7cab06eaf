"""A watcher of one training run, whatever trainer runs it: it replaces `training_step`, and nothing else.

Before the first step it takes loss and gradient norm of a fixed batch with fixed adapters, in the trainer's own path
(its collator, autocast, scaling), by which runs are compared. Then it times steps and their phases without ever waiting
for the device, and last it samples the allocator over one more step.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastprice.benchmarking.analysis import PHASES
from fastprice.benchmarking.models import seed_adapters
from fastprice.benchmarking.timing import Stopwatch, spread_of
from fastprice.memory.recompute_levels import format_recompute_levels
from fastprice.models.peft_engine import compute_dtype
from fastprice.prompts.template import IGNORE

__all__ = ["WARMUP", "Enough", "Probe", "summarize_probe"]

WARMUP = 4  # steps: autotuning, allocator growth, lazy compilation


class Enough(BaseException):
    """Ends a training run from inside once it has been measured; not an Exception, so that no trainer swallows it."""


@dataclass
class Probe:
    """Watches the `training_step` of one run; see the module's docstring.

    check: the rows of the fixed batch, as the trainer's collator takes them, or None to take no check;
    steps: how many to time after the warm-up; seconds: stop timing after so long, at least two steps done.
    """

    check: Sequence[dict[str, Any]] | None
    steps: int
    seconds: float
    device: torch.device
    loss: float = float("nan")
    gradient_norm: float = float("nan")
    adapters: int = 0
    counts: list[tuple[Any, Any]] = field(default_factory=list)
    curve: list[tuple[float, int]] = field(default_factory=list)
    done: int = 0
    step_seconds: list[float] = field(default_factory=list)
    phase_seconds: dict[str, list[float]] = field(default_factory=dict)
    load_seconds: float = float("nan")
    load_host_bytes: int = 0
    keep: str | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None

    def __post_init__(self) -> None:
        self._watch = Stopwatch(self.device)
        self._began = 0.0
        self._forward_over = False
        self._phases_seen = True

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Times what loads the model, and takes the process's peak of host memory (VmHWM) after it."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.load_seconds = time.perf_counter() - began
        self.load_host_bytes = _host_peak()

    @contextmanager
    def watching(self, trainer_class: Any) -> Iterator[None]:
        """Puts the probe into `trainer_class` and takes it out again."""
        own = trainer_class.__dict__.get("training_step")
        original = trainer_class.training_step
        probe = self

        def training_step(
            trainer: Any, model: Any, inputs: Any, num_items_in_batch: Any = None, *rest: Any, **named: Any
        ) -> Any:
            def run(batch: Any, items: Any) -> Any:
                return original(trainer, model, batch, items, *rest, **named)

            return probe._step(trainer, model, inputs, num_items_in_batch, run)

        trainer_class.training_step = training_step
        try:
            yield
        finally:
            if own is None:
                del trainer_class.training_step
            else:
                trainer_class.training_step = own

    def _step(self, trainer: Any, model: Any, inputs: Any, items: Any, run: Callable[[Any, Any], Any]) -> Any:
        if self.done == 0 and self.check is not None:
            self._take_check(trainer, model, run)
        if self.done == WARMUP - 1:
            self._reset_memory()  # one step before the clock starts, as the allocator must grow again
        if self.done == WARMUP:
            self._began = time.perf_counter()
            self._mark_forward(trainer)
        if self.done >= WARMUP:
            self._watch.mark()  # also the end of the step before
            if self._finished():
                self._finish(trainer, inputs, items, run)
            self.counts.append(_count(inputs))
        self._forward_over = False
        result = run(inputs, items)
        self.done += 1
        if self.done > WARMUP:
            if not self._forward_over:
                self._phases_seen = False  # a trainer whose step does not go through compute_loss
                self._watch.mark()
            self._watch.mark()
        return result

    def _mark_forward(self, trainer: Any) -> None:
        """Lets the trainer's `compute_loss` mark its end, which parts forward from backward."""
        original = trainer.compute_loss

        def compute_loss(*arguments: Any, **named: Any) -> Any:
            result = original(*arguments, **named)
            if not self._forward_over:
                self._forward_over = True
                self._watch.mark()
            return result

        trainer.compute_loss = compute_loss

    def _take_check(self, trainer: Any, model: Any, run: Callable[[Any, Any], Any]) -> None:
        """Loss and gradient norm of the fixed rows, with adapters that are the same for every peer."""
        self.adapters = seed_adapters(model)
        batch = trainer.data_collator([dict(example) for example in self.check or ()])
        labeled = torch.tensor(_predicted(batch["labels"]), device=self.device)
        self.loss = float(run(batch, labeled))
        scaler = getattr(trainer.accelerator, "scaler", None)
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        squares = [
            float(parameter.grad.detach().double().pow(2).sum())
            for parameter in model.parameters()
            if parameter.grad is not None
        ]
        self.gradient_norm = sum(squares) ** 0.5 / scale
        for parameter in model.parameters():
            parameter.grad = None

    def _reset_memory(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what loading and the check had reserved is not the step's
            torch.cuda.reset_peak_memory_stats()

    def _finished(self) -> bool:
        timed = self.done - WARMUP
        return timed >= self.steps or (timed >= 2 and time.perf_counter() - self._began > self.seconds)

    def _finish(self, trainer: Any, inputs: Any, items: Any, run: Callable[[Any, Any], Any]) -> None:
        controller = getattr(trainer, "recompute_controller", None)  # of fastprice's own trainer
        self.keep = None if controller is None else format_recompute_levels(controller.levels)
        marks = self._watch.intervals()
        parts = {name: marks[place :: len(PHASES)] for place, name in enumerate(PHASES)}
        self.step_seconds = [sum(each) for each in zip(*parts.values(), strict=True)]
        self.phase_seconds = parts if self._phases_seen else {}
        if self.device.type == "cuda":
            self.peak_allocated = torch.cuda.max_memory_allocated()
            self.peak_reserved = torch.cuda.max_memory_reserved()
            self.curve = _memory_curve(lambda: run(inputs, items))
        raise Enough


def summarize_probe(probe: Probe) -> dict[str, Any]:
    """The figures of a run that ended in `Enough`: steps in seconds, real tokens and texts a second, peaks in bytes."""
    tokens = [int(count[0]) for count in probe.counts[: len(probe.step_seconds)]]
    items = [int(count[1]) for count in probe.counts[: len(probe.step_seconds)]]
    times = probe.step_seconds
    rates = spread_of([count / each for count, each in zip(tokens, times, strict=True)])
    return {
        "dtype": str(compute_dtype()).removeprefix("torch."),
        "check_loss": probe.loss,
        "check_gradient_norm": probe.gradient_norm,
        "adapters": probe.adapters,
        "steps": len(times),
        "step_seconds": spread_of(times).as_dict(),
        "phase_seconds": {name: spread_of(each).as_dict() for name, each in probe.phase_seconds.items()},
        "load_seconds": probe.load_seconds,
        "load_host_bytes": probe.load_host_bytes,
        "keep": probe.keep,
        "tokens_per_second": rates.as_dict(),
        "mean_tokens_per_second": sum(tokens) / sum(times),
        "items_per_second": sum(items) / sum(times),
        "tokens_per_step": sum(tokens) / len(tokens),
        "peak_allocated": probe.peak_allocated,
        "peak_reserved": probe.peak_reserved,
        "memory_curve": probe.curve,
    }


def _host_peak() -> int:
    """Bytes of the highest resident set of this process. Not ru_maxrss: a child's begins with its parent's peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (kibibytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(kibibytes)


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
    """(share of the step, bytes allocated) over one untimed step, by a thread that asks the allocator."""
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
