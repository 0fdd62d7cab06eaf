"""Callbacks of a training run: live progress, the events that the report plots, and a stop on NaN.

Stock training logs loss 0 for NaN and saves an adapter full of NaN (transformers' `logging_nan_inf_filter`). Here the
filter is off, and the first loss or gradient norm that is not finite ends the run with a one-line error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastprice.errors import TrainingError

__all__ = ["EventLog", "Progress", "StopOnNonFinite", "TrainingEvent"]


@dataclass(frozen=True)
class TrainingEvent:
    """What was logged at one step of a run; None for what was not measured then.

    Attributes:
        step: optimizer steps done, of `steps`.
        loss: mean negative log-likelihood of a labeled token (nats) since the last event, plus the weighted auxiliary
            losses (means over texts).
        eval_mae: validation error in dollars.
        learning_rate: of that step.
        tokens_per_second: trained tokens over training time, without evaluations.
        seconds_left: of training, without evaluations.
    """

    step: int
    steps: int
    loss: float | None = None
    eval_mae: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None


class EventLog(TrainerCallback):  # type: ignore[misc]
    """Turns the trainer's logs into TrainingEvents: a list of them, and a call of `on_event` for each."""

    def __init__(self, on_event: Callable[[TrainingEvent], None] | None = None) -> None:
        self.events: list[TrainingEvent] = []
        self.seconds = 0.0
        self._on_event = on_event
        self._step_began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._step_began

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" not in logs and "eval_mae" not in logs:
            return  # the summary at the end
        tokens = logs.get("num_tokens")
        event = TrainingEvent(
            step=state.global_step,
            steps=state.max_steps,
            loss=logs.get("loss"),
            eval_mae=logs.get("eval_mae"),
            learning_rate=logs.get("learning_rate"),
            tokens_per_second=tokens / self.seconds if tokens and self.seconds else None,
            seconds_left=self.seconds / state.global_step * (state.max_steps - state.global_step)
            if state.global_step
            else None,
        )
        self.events.append(event)
        if self._on_event:
            self._on_event(event)


class StopOnNonFinite(TrainerCallback):  # type: ignore[misc]
    """Raises TrainingError at the first logged loss or gradient norm that is not finite."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} at step {state.global_step} of {state.max_steps}: the run diverged and nothing "
                    f"was saved; lower learning_rate (now {args.learning_rate:.2g})"
                )


class Progress:
    """A progress bar for the terminal, fed with TrainingEvents: step, loss, validation error, tokens/s, time left."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[status]}")
        )
        self._task = self._bar.add_task("training", total=None, status="")
        self._status: dict[str, str] = {}

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: TrainingEvent) -> None:
        if event.loss is not None:
            self._status["loss"] = f"loss {event.loss:.3f}"
        if event.eval_mae is not None:
            self._status["eval"] = f"validation error ${event.eval_mae:.2f}"
        if event.tokens_per_second is not None:
            self._status["speed"] = f"{event.tokens_per_second:,.0f} tokens/s"
        if event.seconds_left is not None:
            self._status["left"] = f"{event.seconds_left:,.0f} s left"
        if not self._bar.console.is_terminal and event.eval_mae is not None:
            # Without a terminal the bar is drawn only once, at the end: print a line at each evaluation.
            self._bar.console.print(f"step {event.step}/{event.steps}  " + "  ".join(self._status.values()))
        status = "  ".join(self._status[key] for key in ("loss", "eval", "speed", "left") if key in self._status)
        self._bar.update(self._task, completed=event.step, total=event.steps, status=status)
