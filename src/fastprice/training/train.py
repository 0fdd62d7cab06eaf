"""Builds and runs TRL's `SFTTrainer` on packs, with the loss on the price alone.

The rows come tokenized, labeled and packed (prompts.py, packing.py), so that TRL and Unsloth, which prepare data sets
differently, both leave them as they are. An evaluation is not a loss: it is the error in dollars on validation items,
by the same prediction code that users call, and the checkpoint with the smallest one is kept.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastprice.errors import ConfigError, TrainingError
from fastprice.memory.activation_checkpointing import decoder_layers, keeping
from fastprice.memory.controller import CudaMeter, Keeper, Ladder, Meter, expected_bytes
from fastprice.memory.recompute_levels import parse_levels, write_levels
from fastprice.models.engine import Engine
from fastprice.models.peft_engine import compute_dtype
from fastprice.prompts.packing import StaticShape, pack_rows
from fastprice.prompts.template import IGNORE, TrainingRow
from fastprice.training.auxiliary_losses import Objective
from fastprice.training.callbacks import Curves, FiniteGuard, TrainingEvent
from fastprice.training.cuda_graphs import AUTO_PARAMETERS, hindrance, parameter_count
from fastprice.training.trainer import trainer_class

if TYPE_CHECKING:
    from fastprice_kernels import InstallReport

__all__ = ["TrainingResult", "train", "uses_kernels"]

_LIBRARIES = r"(accelerate|bitsandbytes|datasets|peft|torch|transformers|trl|unsloth|unsloth_zoo)\b"

_PRICE_HEAD = "price_head"  # its name in a model that trains


@dataclass(frozen=True)
class TrainingResult:
    """What a run left behind: every logged event, the kept step and its validation error in dollars, the cost.

    recompute: what each layer kept at the end (fastprice.memory.recompute_levels); None: the engine's own way, or
               everything on a CPU.
    moves: what was changed about that on the way, and why.
    """

    events: list[TrainingEvent]
    best_step: int | None
    best_mae: float | None
    tokens: int
    seconds: float
    recompute: str | None = None
    moves: tuple[str, ...] = ()


def train(
    engine: Engine,
    model: Any,
    tokenizer: Any,
    rows: Sequence[TrainingRow],
    validate: Callable[[], float] | None,
    *,
    epochs: float,
    learning_rate: float,
    pack_tokens: int,
    gradient_accumulation: int,
    evaluations: int,
    warmup_ratio: float,
    seed: int,
    kernels: str,
    cuda_graphs: str = "off",
    recompute: str = "auto",
    budget: int | None = None,
    streamed: int = 0,
    meter: Meter | None = None,
    objective: Objective | None = None,
    on_event: Callable[[TrainingEvent], None] | None = None,
) -> TrainingResult:
    """Trains whatever in `model` requires a gradient on `rows`, in place.

    validate      the validation error in dollars of the model as it stands; None: no evaluation, the last step is kept
    pack_tokens   tokens of one pack (a micro-batch); gradient_accumulation: packs an optimizer step
    evaluations   how many times `validate` runs over the whole training, evenly spread, the end included
    warmup_ratio  share of the steps over which the learning rate rises; it then falls along a cosine
    kernels       "on", "off", or "auto": fastprice_kernels under the model on CUDA, the stock path elsewhere
    cuda_graphs   "on": packs of one static shape and their steps replayed as CUDA graphs (graphs.py), ConfigError where
                  that is impossible; "auto": so where it is possible, for models that launches bound; "off"
    recompute     what each layer keeps for its backward pass (fastprice.memory.recompute_levels): a level, counts of
                  levels, or "auto": on CUDA what fits, on a CPU everything. On CUDA a micro-batch that runs out of memory is done
                  again with less kept, whatever was asked for (fastprice.memory.controller)
    budget        bytes of the GPU's memory that "auto" may use in all; None: what is free
    streamed      layers whose weights come from the host (fastprice.offload)
    meter         in place of the CUDA device's, for "auto"
    objective     what is added to the text's loss (fastprice.training.auxiliary_losses); its head trains and is kept with the model

    Raises TrainingError when no row carries a label, the loss stops being finite or memory runs out whatever is kept;
    ConfigError for graphs that are asked for and cannot be had, and for a `recompute` that the model or engine cannot
    do.
    """
    from datasets import Dataset
    from transformers import PrinterCallback

    if not any(label != IGNORE for row in rows for label in row.labels):
        raise TrainingError("no token carries loss: there is nothing to learn from; check the prices and max_tokens")
    packed = pack_rows(rows, pack_tokens, seed)
    packs = Dataset.from_list(packed)
    ours = uses_kernels(kernels)
    captures = _captures(cuda_graphs, model, engine, kernels=ours, objective=objective)
    layers = _layers(model, engine, recompute, captures=captures)
    collator = engine.collator()
    if ours and engine.name == "peft":
        collator = replace(collator, positions=True, static=StaticShape.of(packed) if captures else None)
    steps = max(1, round(epochs * -(-len(packs) // gradient_accumulation)))
    curves = Curves(on_event)
    with tempfile.TemporaryDirectory(prefix="fastprice-") as folder, _beside(model, objective):
        with _quiet():
            trainer = trainer_class()(
                validate=validate,
                engine=engine,
                own_loss=ours and engine.name == "peft",
                objective=objective,
                model=model,
                args=_arguments(
                    engine,
                    model,
                    folder,
                    steps=steps,
                    evaluate_every=max(1, -(-steps // evaluations)) if validate and evaluations else None,
                    learning_rate=learning_rate,
                    gradient_accumulation=gradient_accumulation,
                    warmup_steps=round(warmup_ratio * steps),
                    seed=seed,
                    loss_type="nll" if ours and engine.name == "peft" else None,
                    captures=captures,
                    # Layers that nobody can tell apart are recomputed all or none; Unsloth sets its own at load.
                    checkpoints=engine.name == "peft" and layers is None and torch.cuda.is_available(),
                ),
                train_dataset=packs,
                eval_dataset=packs.select([0]) if validate and evaluations else None,
                data_collator=collator if objective is None else objective.collator(collator),
                processing_class=tokenizer,
                callbacks=[curves, FiniteGuard()],
            )
            trainer.remove_callback(PrinterCallback)
        if engine.name == "peft":
            _restore_precision(model)
        engine.for_training(model)
        with (
            _kernels_under(model, engine, kernels) if ours else nullcontext() as report,
            _kept(
                model,
                layers,
                recompute,
                budget,
                streamed,
                meter,
                packed,
                gradient_accumulation,
                report is not None,
                captures,
            ) as keeper,
            _quiet(),
        ):
            trainer.keeper = keeper
            if captures and report is not None:
                trainer.captures = "completion_cross_entropy" in report.replaced.values()
                if not trainer.captures:
                    warnings.warn(
                        "CUDA graphs stay off: the model keeps its own loss, see the line above", stacklevel=2
                    )
            try:
                trainer.train()
            except torch.OutOfMemoryError as error:
                told = f" with recompute='{recompute}'; leave recompute='auto'," if recompute != "auto" else ";"
                raise TrainingError(f"out of memory{told} lower pack_tokens, or take a smaller base") from error
    best = trainer.state.best_metric
    return TrainingResult(
        events=curves.events,
        best_step=_step_of(trainer.state.best_model_checkpoint),
        best_mae=None if best is None else float(best),
        tokens=int(trainer._total_train_tokens),
        seconds=curves.seconds,
        recompute=write_levels(keeper.levels) if keeper is not None else None if recompute == "auto" else recompute,
        moves=tuple(keeper.moves) if keeper is not None else (),
    )


def _arguments(
    engine: Engine,
    model: Any,
    folder: str,
    *,
    steps: int,
    evaluate_every: int | None,
    learning_rate: float,
    gradient_accumulation: int,
    warmup_steps: int,
    seed: int,
    loss_type: str | None,
    captures: bool,
    checkpoints: bool,
) -> Any:
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    options: dict[str, Any] = {}
    if evaluate_every:
        options = {
            "eval_strategy": "steps",
            "eval_steps": evaluate_every,
            "save_strategy": "steps",
            "save_steps": evaluate_every,
            "save_total_limit": 1,
            "save_only_model": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_mae",
            "greater_is_better": False,
        }
    else:
        options = {"eval_strategy": "no", "save_strategy": "no"}
    if captures:  # the state of the random numbers cannot be read during a capture; a captured step draws none
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False, "preserve_rng_state": False}
    if cuda:  # from pinned memory: the host need not wait for the step before to end
        options["accelerator_config"] = {"non_blocking": True}
    return SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=gradient_accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 100),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
        data_seed=seed,
        bf16=bf16,
        fp16=cuda and not bf16,
        use_cpu=not cuda,
        gradient_checkpointing=checkpoints,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        **({"loss_type": loss_type} if loss_type else {}),
        **options,
    )


@contextmanager
def _beside(model: Any, objective: Objective | None) -> Iterator[None]:
    """The objective's head as a part of the model while it trains, so that the trainer finds its parameters."""
    if objective is None:
        yield
        return
    if objective.head is not None:
        model.add_module(_PRICE_HEAD, objective.head)
    try:
        with objective.watching(model):
            yield
    finally:
        if objective.head is not None:
            delattr(model, _PRICE_HEAD)


def uses_kernels(kernels: str) -> bool:
    """Whether fastprice_kernels run under the model: `kernels` is "on", "off" or "auto" (on CUDA)."""
    return kernels == "on" or (kernels == "auto" and torch.cuda.is_available())


def _layers(model: Any, engine: Engine, recompute: str, *, captures: bool) -> int | None:
    """How many layers the model has, each of which can keep what it is told; None if none can. ConfigError where
    `recompute` asks for it all the same, or for what a CUDA graph cannot do."""
    if engine.name != "peft":
        if recompute != "auto":
            raise ConfigError(
                f"recompute: {engine.name} recomputes every layer itself; use recompute='auto', or engine='peft'"
            )
        return None
    try:
        layers = len(decoder_layers(model))
    except ConfigError:
        if recompute != "auto":
            raise
        return None
    if recompute != "auto" and captures and "host" in parse_levels(recompute, layers):
        raise ConfigError(
            "recompute: inputs on the host cannot be part of a CUDA graph; use recompute='input', or cuda_graphs='off'"
        )
    return layers


@contextmanager
def _kept(
    model: Any,
    layers: int | None,
    recompute: str,
    budget: int | None,
    streamed: int,
    meter: Meter | None,
    packed: Sequence[dict[str, list[int]]],
    gradient_accumulation: int,
    kernels: bool,
    captures: bool,
) -> Iterator[Keeper | None]:
    """The layers keep what `recompute` says for the time of the training; gives what watches over it on a device."""
    adapters = getattr(model, "peft_config", {}).values()
    dropout = any(getattr(adapter, "lora_dropout", 0.0) for adapter in adapters)
    levels = None if recompute == "auto" or layers is None else parse_levels(recompute, layers)
    if layers is None or (meter is None and not torch.cuda.is_available()):
        with nullcontext() if levels is None else keeping(model, levels):
            yield None
        return
    sizes = [len(pack["input_ids"]) for pack in packed]
    labels = sum(label != IGNORE for pack in packed for label in pack["labels"])
    expected = expected_bytes(
        model,
        tokens=max(sizes),
        sequences=max(1, round(sum(len(pack["lengths"]) for pack in packed) / len(packed))),
        labeled=labels / sum(sizes),
        kernels=kernels and not dropout,
        streamed=streamed,
    )
    keeper = Keeper(
        model,
        Ladder(layers, expected, host=not captures, first=levels),
        CudaMeter(budget) if meter is None else meter,
        warmup=gradient_accumulation,
        measures=levels is None and not captures,  # what was captured stays as it is
        random=not captures,
    )
    try:
        yield keeper
    finally:
        keeper.remove()


def _captures(cuda_graphs: str, model: Any, engine: Engine, *, kernels: bool, objective: Objective | None) -> bool:
    """Whether steps are to be captured: `cuda_graphs` is "on", "off" or "auto". ConfigError for "on" that cannot be."""
    if cuda_graphs == "off" or (cuda_graphs == "auto" and parameter_count(model) > AUTO_PARAMETERS):
        return False
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    trouble = hindrance(model, engine.name, kernels=kernels, dtype=compute_dtype(), processes=processes)
    if objective is not None:
        trouble = "a head or a number loss reads hidden states beside the model's own loss"
    if trouble is not None and cuda_graphs == "on":
        raise ConfigError(f"cuda_graphs: on, but {trouble}; use cuda_graphs='auto' or 'off'")
    return trouble is None


@contextmanager
def _kernels_under(model: Any, engine: Engine, kernels: str) -> Iterator[InstallReport | None]:
    """fastprice_kernels under the model for the time of the training, our loss head with them.

    Gives the report of what was replaced, or None where nothing was.

    Under "auto" an Unsloth of another shape than the one the kernels were written for keeps the stock path, with a
    warning; under "on" that is an error.
    """
    from fastprice_kernels.patching.install import install, uninstall

    try:
        ours = engine.name == "peft"
        report = install(model, loss_head=True, last_layer=ours, keep_dense=ours and _room_for_dense(model))
    except RuntimeError as error:
        if kernels == "on":
            raise TrainingError(f"kernels: {error}; use kernels='off'") from error
        warnings.warn(f"fastprice_kernels stay out: {error}", stacklevel=2)
        yield None
        return
    try:
        yield report
    finally:
        uninstall(model)


def _room_for_dense(model: Any) -> bool:
    """Whether a recomputed layer may keep its dequantized weights until its backward, which takes two dequantizations a
    step in place of three: where they are at most a twentieth of what the card has left beside the loaded model."""
    layers = getattr(model.get_decoder(), "layers", []) if torch.cuda.is_available() else []
    dense = max((2 * parameter_count(layer) for layer in layers), default=0)
    return 0 < dense <= torch.cuda.mem_get_info()[0] / 20


def _restore_precision(model: Any) -> None:
    """Puts the trainable weights of a 4-bit model back into fp32.

    SFTTrainer turns them into bf16, where an update smaller than 1/256 of a weight is lost; optimizer steps on adapters
    of a few megabytes deserve fp32. Under autocast the matrix products run in bf16 all the same.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _step_of(checkpoint: str | None) -> int | None:
    return None if checkpoint is None else int(Path(checkpoint).name.rpartition("-")[2])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the log lines and warnings of the libraries below off the screen; errors raise, our own warnings show."""
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
