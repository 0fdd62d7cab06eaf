"""Builds and runs TRL's `SFTTrainer` on packs, with a completion-only loss on the price.

Rows arrive tokenized, labeled and packed (`fastprice.prompts`), so TRL and Unsloth, which prepare data sets
differently, both use them as they are. An evaluation is not a loss but the error in dollars on validation items, by the
prediction code that users call; the checkpoint of the best evaluation is restored at the end.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastprice.config import TrainConfig
from fastprice.errors import ConfigError, TrainingError
from fastprice.memory.recompute_levels import format_recompute_levels
from fastprice.models.engine import Engine
from fastprice.offload.host_embedding import has_host_embedding
from fastprice.prompts.packing import StaticShape, pack_rows
from fastprice.prompts.template import IGNORE, TrainingRow
from fastprice.training.auxiliary_losses import AuxiliaryLosses
from fastprice.training.callbacks import EventLog, StopOnNonFinite, TrainingEvent
from fastprice.training.sft_config import sft_config
from fastprice.training.step_options import (
    PackStatistics,
    StepOptions,
    controlled_recomputation,
    count_checkpointable_layers,
    installed_kernels,
    uses_cuda_graphs,
    uses_kernels,
)
from fastprice.training.trainer import price_trainer_class

__all__ = ["TrainingResult", "train"]

_LIBRARIES = r"(accelerate|bitsandbytes|datasets|peft|torch|transformers|trl|unsloth|unsloth_zoo)\b"


@dataclass(frozen=True)
class TrainingResult:
    """What a training did.

    Attributes:
        events: every logged TrainingEvent.
        best_step: the step whose weights were restored; None without evaluations.
        best_mae: its validation error in dollars; None without evaluations.
        tokens: trained tokens.
        seconds: time of the steps, without evaluations.
        recompute: the recompute levels at the end; None: of a model whose layers have none, or none on a CPU.
        recompute_changes: each change of them on the way and its reason.
    """

    events: list[TrainingEvent]
    best_step: int | None
    best_mae: float | None
    tokens: int
    seconds: float
    recompute: str | None = None
    recompute_changes: tuple[str, ...] = ()


def train(
    engine: Engine,
    model: Any,
    tokenizer: Any,
    rows: Sequence[TrainingRow],
    validate: Callable[[], float] | None,
    settings: TrainConfig,
    *,
    seed: int = 0,
    options: StepOptions = StepOptions(),
    auxiliary: AuxiliaryLosses | None = None,
    on_event: Callable[[TrainingEvent], None] | None = None,
    on_trainer: Callable[[Any], None] | None = None,
) -> TrainingResult:
    """Trains every parameter of `model` that requires a gradient on `rows`, in place.

    validate     returns the validation error in dollars of the model as it is now; None: no evaluations, and the
    weights
                 of the last step stay
    settings     its `learning_rate` must be set
    auxiliary    losses added to that of the text; their price head trains, and is saved and restored, with the model
    on_event     called with every logged TrainingEvent
    on_trainer   called with the `PriceTrainer` before its first step

    Raises TrainingError if no token is labeled, the loss becomes non-finite, or memory runs out with everything
    recomputed; ConfigError for unsupported CUDA graphs or recompute levels.
    """
    from datasets import Dataset
    from transformers import PrinterCallback

    if settings.learning_rate is None:
        raise ConfigError("learning_rate: train() needs a number; PriceEstimator computes a default")
    if not any(label != IGNORE for row in rows for label in row.labels):
        raise TrainingError("no token is labeled, so there is nothing to learn; check the prices and max_tokens")
    packed = pack_rows(rows, settings.pack_tokens, seed)
    packs = Dataset.from_list(packed)
    own_loss = uses_kernels(options.kernels)
    graphs = uses_cuda_graphs(
        settings.cuda_graphs,
        model,
        kernels=own_loss,
        auxiliary=auxiliary is not None,
        recompute=options.recompute,
        micro_batches=round(settings.epochs * len(packed)),
    )
    layers = count_checkpointable_layers(model, options.recompute, cuda_graphs=graphs)
    collator = engine.collator()
    collator = replace(collator, host_ids=has_host_embedding(model))
    if own_loss:
        collator = replace(collator, positions=True, static=StaticShape.of(packed) if graphs else None)
    steps = max(1, round(settings.epochs * -(-len(packs) // settings.gradient_accumulation)))
    evaluates = validate is not None and settings.evaluations > 0
    event_log = EventLog(on_event)
    with tempfile.TemporaryDirectory(prefix="fastprice-") as folder, _attached(auxiliary, model):
        with _quiet_libraries():
            trainer = price_trainer_class()(
                validate=validate,
                engine=engine,
                own_loss=own_loss,
                auxiliary=auxiliary,
                model=model,
                args=sft_config(
                    folder,
                    settings,
                    steps=steps,
                    evaluate_every=max(1, -(-steps // settings.evaluations)) if evaluates else None,
                    seed=seed,
                    own_loss=own_loss,
                    cuda_graphs=graphs,
                    # Without layers that can have levels of their own.
                    checkpoint_all_layers=layers is None and torch.cuda.is_available(),
                ),
                train_dataset=packs,
                eval_dataset=packs.select([0]) if evaluates else None,
                data_collator=collator if auxiliary is None else auxiliary.collator(collator),
                processing_class=tokenizer,
                callbacks=[event_log, StopOnNonFinite()],
            )
            trainer.remove_callback(PrinterCallback)
        _restore_precision(model)
        engine.for_training(model)
        with (
            installed_kernels(
                model, options.kernels, memory_budget=options.memory_budget, mlp_tile=options.mlp_tile
            ) as report,
            controlled_recomputation(
                model,
                layers,
                options,
                PackStatistics.of(packed),
                gradient_accumulation=settings.gradient_accumulation,
                kernels=report is not None,
                cuda_graphs=graphs,
            ) as controller,
            _quiet_libraries(),
        ):
            trainer.recompute_controller, trainer.installed = controller, report
            if graphs and report is not None:
                trainer.captures = "completion_cross_entropy" in report.replaced.values()
                if not trainer.captures:
                    warnings.warn(
                        "CUDA graphs stay off: the model computes its own loss, see the warning above", stacklevel=2
                    )
            if on_trainer is not None:
                on_trainer(trainer)
            try:
                trainer.train()
            except torch.OutOfMemoryError as error:
                fixed = options.recompute != "auto"
                remedy = f" with recompute={options.recompute!r}; use recompute='auto'," if fixed else ";"
                raise TrainingError(f"out of memory{remedy} lower pack_tokens, or take a smaller base") from error
    best = trainer.state.best_metric
    recompute = None if options.recompute == "auto" else options.recompute
    return TrainingResult(
        events=event_log.events,
        best_step=_step_of(trainer.state.best_model_checkpoint),
        best_mae=None if best is None else float(best),
        tokens=trainer.trained_tokens,
        seconds=event_log.seconds,
        recompute=recompute if controller is None else format_recompute_levels(controller.levels),
        recompute_changes=() if controller is None else tuple(controller.changes),
    )


@contextmanager
def _attached(auxiliary: AuxiliaryLosses | None, model: Any) -> Iterator[None]:
    """Attaches the auxiliary losses, if any, to the model while it trains."""
    if auxiliary is None:
        yield
    else:
        with auxiliary.attached(model):
            yield


def _restore_precision(model: Any) -> None:
    """Casts the trainable weights of a 4-bit model back to fp32.

    SFTTrainer casts them to bf16, where an update smaller than 1/256 of a weight is lost. Under autocast the matrix
    products run in bf16 all the same.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _step_of(checkpoint: str | None) -> int | None:
    return None if checkpoint is None else int(Path(checkpoint).name.rpartition("-")[2])


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silences log lines and warnings of the libraries underneath; errors raise, and our own warnings show."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("trl", "accelerate", "peft")]
    levels = [logger.level for logger in loggers]
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_LIBRARIES)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
