"""The `SFTConfig` of a training on packs: what is fixed, what follows from the settings, what depends on the device."""

from __future__ import annotations

from typing import Any

import torch

from fastprice.config import TrainConfig

__all__ = ["sft_config"]


def sft_config(
    folder: str,
    settings: TrainConfig,
    *,
    steps: int,
    evaluate_every: int | None,
    seed: int,
    own_loss: bool,
    cuda_graphs: bool,
    checkpoint_all_layers: bool,
) -> Any:
    """TRL's `SFTConfig` for `steps` optimizer steps, with checkpoints in `folder` where there are evaluations.

    evaluate_every          optimizer steps between evaluations; None: neither evaluations nor checkpoints
    own_loss                the model computes its completion-only loss itself (fastprice_kernels)
    checkpoint_all_layers   stock activation checkpointing of every layer
    """
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    options: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no"}
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
    if cuda_graphs:  # the random number generator cannot be read during a capture; a captured step draws nothing
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False, "preserve_rng_state": False}
    if cuda:  # from pinned memory: the host need not wait for the previous step
        options["accelerator_config"] = {"non_blocking": True}
    if own_loss:
        options["loss_type"] = "nll"
    return SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup_ratio * steps),
        optim="adamw_torch_fused" if cuda else "adamw_torch",
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
        gradient_checkpointing=checkpoint_all_layers,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        **options,
    )
