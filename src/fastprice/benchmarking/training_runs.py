"""Whole training runs of fastprice and its peers: the same texts, once each, from the same adapters.

Every run sees every text of a synthetic catalogue once, in steps of as many tokens: packs of `tokens`, or as many
padded rows as hold so many. The time is that of the trainer's `train()`, with its data loading, optimizer and logging.
The loss on unseen texts, before and after, is computed by one function for all, so that a run that learns less shows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from fastprice.benchmarking.host_memory import host_peak, reset_host_peak
from fastprice.benchmarking.peer_training import TrainingCase, known_peer, run_peer
from fastprice.benchmarking.random_models import save_model, seed_adapters
from fastprice.benchmarking.step_probe import log_alike
from fastprice.benchmarking.timing import synchronize
from fastprice.models.adapters import suggested_learning_rate
from fastprice.models.parts import plain_model
from fastprice.prompts.template import IGNORE, TrainingRow

__all__ = ["RunProbe", "run_training", "save_shipped_nano"]

_MAX_TOKENS = 200  # of a text
_UNSEEN = 24  # texts of the loss before and after


def run_training(name: str, *, folder: str, items: int, tokens: int, rank: int) -> dict[str, Any]:
    """One run of the peer of that name over `items` texts in steps of `tokens` tokens: a row of figures.

    Raises ConfigError for an unknown name and whatever the peer itself raises.
    """
    from transformers import AutoConfig

    peer = known_peer(name)
    rows = catalogue_rows(folder, items + _UNSEEN)
    train, unseen = rows[:items], rows[items:]
    real_tokens = sum(len(row.ids) for row in train)
    case = TrainingCase(
        folder=folder,
        tokens=tokens,
        batch=max(1, round(tokens * items / real_tokens)),
        rank=rank,
        steps=0,
        seconds=0.0,
        learning_rate=suggested_learning_rate(AutoConfig.from_pretrained(folder).hidden_size, "qlora"),
    )
    probe = RunProbe(torch.device("cuda" if torch.cuda.is_available() else "cpu"), unseen)
    settings = run_peer(peer, case, train, probe)
    figures = probe.figures()
    seconds = figures["train_seconds"]
    return {
        "peer": name,
        "settings": settings,
        "items": items,
        "tokens": real_tokens,
        "items_per_second": items / seconds,
        "tokens_per_second": real_tokens / seconds,
        **figures,
    }


def save_shipped_nano(folder: Path) -> Path:
    """Writes the nano model that fastprice ships, in 4 bits, as a folder that every peer loads."""
    from fastprice.models.peft_engine import PeftEngine

    loaded = PeftEngine().load_base("nano", method="qlora", max_tokens=_MAX_TOKENS)
    return save_model(loaded.model, folder)


@cache
def catalogue_rows(folder: str, count: int) -> tuple[TrainingRow, ...]:
    """The first `count` synthetic products as training rows of the tokenizer in `folder`."""
    from fastprice.data.synthetic import make_synthetic_items
    from fastprice.models.base_models import load_tokenizer
    from fastprice.prompts.template import encode_rows

    return tuple(encode_rows(load_tokenizer(folder), make_synthetic_items(count), _MAX_TOKENS))


class RunProbe:
    """Measures one whole run, whatever trainer runs it; `unseen` are the rows of the loss before and after."""

    def __init__(self, device: torch.device, unseen: Sequence[TrainingRow]) -> None:
        self.device = device
        self._unseen = unseen
        self._trainer: Any = None
        self._times: dict[str, float] = {}
        self._figures: dict[str, Any] = {}

    @contextmanager
    def loading(self) -> Iterator[None]:
        reset = reset_host_peak()
        began = time.perf_counter()
        yield
        synchronize(self.device)
        self._figures |= {"load_seconds": time.perf_counter() - began, "own_host_peak": reset}

    def attach(self, trainer: Any) -> None:
        """Lets this trainer, a transformers.Trainer that was not started yet, be timed from beginning to end."""
        log_alike(trainer)
        self._trainer = trainer
        self._figures["adapters"] = seed_adapters(trainer.model, zero_b=True)
        self._figures["loss_before"] = unseen_loss(trainer.model, self._unseen)
        trainer.add_callback(_Times(self._times, self.device))

    def figures(self) -> dict[str, Any]:
        """The figures of a run that ended: seconds, bytes, losses in nats a labeled token."""
        model = self._trainer.model
        figures = {
            **self._figures,
            "train_seconds": self._times["end"] - self._times["begin"],
            "steps": int(self._trainer.state.global_step),
            "loss_after": unseen_loss(model, self._unseen),
            "host_peak": host_peak(),
            "peak_allocated": None,
            "peak_reserved": None,
        }
        if self.device.type == "cuda":
            figures |= {
                "peak_allocated": torch.cuda.max_memory_allocated(),
                "peak_reserved": torch.cuda.max_memory_reserved(),
            }
        return figures


class _Times(TrainerCallback):  # type: ignore[misc]
    """Notes when training begins, all set up, and when its last step is done on the device."""

    def __init__(self, times: dict[str, float], device: torch.device) -> None:
        self._times = times
        self._device = device

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._times["begin"] = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize(self._device)
        self._times["end"] = time.perf_counter()


@torch.no_grad()
def unseen_loss(model: Any, rows: Sequence[TrainingRow]) -> float:
    """Mean loss of a labeled token of `rows`, a text at a time, by the layers alone: trainers replace `forward`."""
    plain = plain_model(model)
    attention, training = plain.config._attn_implementation, plain.training
    plain.set_attn_implementation("sdpa")
    plain.eval()
    device = next(plain.parameters()).device
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row.ids], device=device), torch.tensor(row.labels[1:], device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            hidden = plain.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
            logits = plain.lm_head(hidden[labels != IGNORE]).float()
        labels = labels[labels != IGNORE]
        total += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    plain.set_attn_implementation(attention)
    plain.train(training)
    return total / count
