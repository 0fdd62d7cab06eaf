"""Training steps of fastprice and of its peers, each through the trainer and the settings that its users run.

Every peer loads one and the same folder (models.py), trains on the same rows, and is watched by the same `Probe`, which
replaces nothing but `training_step`: before the first step it takes loss and gradient norm of a fixed batch with fixed
adapters, by which analysis.py holds peers against each other; then it times steps without ever waiting for the device.

    trl-padded       transformers + PEFT + TRL, TRL's defaults, `batch` rows padded to the longest
    trl-packed       the same with packing=True ("bfd"), packs of `tokens`
    unsloth          FastLanguageModel and SFTTrainer as in Unsloth's notebooks, `batch` rows (it drops the padding)
    unsloth-tuned    no recomputation, packing=True, packs of `tokens`
    peft-off         fastprice on the peft engine, its kernels off, packs of `tokens`
    peft             fastprice on the peft engine, its kernels on
    peft-graphs      the same, its steps replayed as CUDA graphs (the row's settings say whether they were)
    unsloth-kernels  fastprice on the unsloth engine, its kernels on
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch

from fastprice.benchmarking.cases import draw_rows, shape_of, step_flops
from fastprice.benchmarking.probe import WARMUP, Enough, Probe, summarize_probe
from fastprice.models.families import lora_targets
from fastprice.models.peft_engine import compute_dtype
from fastprice.prompts.template import IGNORE, TrainingRow

__all__ = ["PEERS", "train_steps"]

PEERS = ("trl-padded", "trl-packed", "unsloth", "unsloth-tuned", "peft-off", "peft", "peft-graphs", "unsloth-kernels")
_CHECK_ROWS = 8


def train_steps(
    peer: str,
    folder: str,
    *,
    tokens: int,
    batch: int,
    rank: int,
    steps: int,
    seconds: float,
    config: Any,
) -> dict[str, Any]:
    """One timed run of `peer` on the model in `folder`: a row of figures.

    tokens: of a pack; batch: rows of a padded micro-batch; rank: of the adapters (alpha is twice that); steps, seconds:
    see `Probe`. Raises ValueError for an unknown peer and whatever the peer itself raises.
    """
    if peer not in PEERS:
        raise ValueError(f"peer {peer!r} is not one of {', '.join(PEERS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    padded = peer in ("trl-padded", "unsloth")
    # Every micro-batch of the run, one more, and some for the loss in packing; a padded one holds `batch` rows.
    rows_a_step = batch if padded else -(-tokens // 120)
    rows = draw_rows((WARMUP + steps + 5) * rows_a_step, config.vocab_size, config.eos_token_id)
    probe = Probe(_check_examples(peer, rows[:_CHECK_ROWS], padded), steps, seconds, device)
    began = time.perf_counter()
    settings: dict[str, Any] = {}
    run = {"trl": _run_trl, "unsloth": _run_unsloth, "peft": _run_fastprice}[peer.split("-")[0]]
    if peer == "unsloth-kernels":
        run = _run_fastprice
    try:
        run(peer, folder, rows, probe, settings, tokens=tokens, batch=batch, rank=rank)
    except Enough:
        pass
    else:
        raise RuntimeError(f"the run of {peer} ended after {probe.done} steps, before it was measured")
    lengths = [len(row.ids) for row in rows]
    labeled = sum(label != IGNORE for row in rows for label in row.labels)
    return {
        "peer": peer,
        "settings": settings,
        **summarize_probe(probe),
        "labeled_share": labeled / sum(lengths),
        "flops_per_token": step_flops(shape_of(config), lengths, labeled, rank) / sum(lengths),
        "seconds_in_all": time.perf_counter() - began,
    }


def _run_trl(
    peer: str, folder: str, rows: Sequence[TrainingRow], probe: Probe, settings: dict[str, Any],
    *, tokens: int, batch: int, rank: int,
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTTrainer

    from fastprice.models.adapters import lora_config
    from fastprice.models.peft_engine import settle_four_bit

    set_seed(0)
    options: dict[str, Any] = {"dtype": compute_dtype(), "attn_implementation": "sdpa"}
    if probe.device.type == "cuda":
        options["device_map"] = {"": 0}
    with probe.loading():
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    settle_four_bit(model, compute_dtype())
    chosen: dict[str, Any] = (
        {"per_device_train_batch_size": batch}
        if peer == "trl-padded"
        else {"per_device_train_batch_size": 1, "packing": True}
    )
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            args=_sft_config(output, tokens, chosen),
            train_dataset=_dataset(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=lora_config(rank=rank, alpha=2 * rank, dropout=0.0),
        )
        settings |= {**_told(trainer.args), "attention": model.config._attn_implementation}
        with probe.watching(type(trainer)):
            trainer.train()


def _run_unsloth(
    peer: str, folder: str, rows: Sequence[TrainingRow], probe: Probe, settings: dict[str, Any],
    *, tokens: int, batch: int, rank: int,
) -> None:  # fmt: skip
    engine = import_module("fastprice.models.unsloth_engine")  # first: Unsloth patches what comes after

    from trl import SFTTrainer  # isort: skip  (the class that Unsloth has put there)

    tuned = peer == "unsloth-tuned"
    checkpointing: Any = False if tuned else "unsloth"
    with probe.loading():
        model, tokenizer = engine.FastLanguageModel.from_pretrained(
            model_name=folder,
            max_seq_length=tokens,
            dtype=None,
            load_in_4bit=True,
            use_gradient_checkpointing=checkpointing,
        )
    model = engine.FastLanguageModel.get_peft_model(
        model,
        r=rank,
        target_modules=lora_targets(model),
        lora_alpha=2 * rank,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=0,
    )
    chosen: dict[str, Any] = (
        {"per_device_train_batch_size": 1, "packing": True, "gradient_checkpointing": False}
        if tuned
        else {"per_device_train_batch_size": batch}
    )
    chosen["optim"] = "adamw_8bit"  # as in its notebooks
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            args=_sft_config(output, tokens, chosen),
            train_dataset=_dataset(rows),
            processing_class=tokenizer,
        )
        settings |= {**_told(trainer.args), "unsloth_checkpointing": str(checkpointing)}
        with probe.watching(type(trainer)):
            trainer.train()


def _run_fastprice(
    peer: str, folder: str, rows: Sequence[TrainingRow], probe: Probe, settings: dict[str, Any],
    *, tokens: int, batch: int, rank: int,
) -> None:  # fmt: skip
    from fastprice.models.engine_choice import choose_engine

    engine = choose_engine("unsloth" if peer == "unsloth-kernels" else "peft")
    with probe.loading():
        loaded = engine.load_base(folder, method="qlora", max_tokens=tokens)
    model = engine.attach(loaded.model, method="qlora", rank=rank, alpha=2.0 * rank, dropout=0.0, seed=0)

    from fastprice.config import TrainConfig
    from fastprice.training import train as training
    from fastprice.training.step_options import StepOptions

    mode = "off" if peer == "peft-off" else "on"
    settings |= {"engine": engine.name, "kernels": mode, "pack_tokens": tokens}
    with _watched_training(probe, training, settings), _told_what_is_installed(settings):
        training.train(
            engine,
            model,
            loaded.tokenizer,
            rows,
            None,
            TrainConfig(
                learning_rate=1e-5,
                pack_tokens=tokens,
                evaluations=0,
                warmup_ratio=0.0,
                cuda_graphs="on" if peer == "peft-graphs" else "off",
            ),
            options=StepOptions(kernels=mode),
        )


@contextmanager
def _watched_training(probe: Probe, training: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Watches the trainer that `training` makes, and keeps what became of its graphs."""
    trainer: Any = import_module("fastprice.training.trainer")
    trainer_class, graphed = training.price_trainer_class, trainer.GraphedStep

    class Told(graphed):  # type: ignore[misc, valid-type]
        def __call__(self, batch: Any) -> Any:
            result = super().__call__(batch)
            settings["graphs"] = self.failure or self.state
            return result

    with ExitStack() as watches:

        def watched() -> Any:
            made = trainer_class()
            watches.enter_context(probe.watching(made))
            return made

        training.price_trainer_class, trainer.GraphedStep = watched, Told
        try:
            yield
        finally:
            training.price_trainer_class, trainer.GraphedStep = trainer_class, graphed


@contextmanager
def _told_what_is_installed(settings: dict[str, Any]) -> Iterator[None]:
    """Keeps what the kernels' `install` says it replaced, so that no row claims kernels that stayed out."""
    module: Any = import_module("fastprice_kernels.patching.install")  # the package exports a function of that name
    original = module.install

    def install(*arguments: Any, **options: Any) -> Any:
        report = original(*arguments, **options)
        settings["installed"] = str(report)
        return report

    module.install = install
    try:
        yield
    finally:
        module.install = original


def _sft_config(output: str, tokens: int, chosen: dict[str, Any]) -> Any:
    """TRL's settings, its defaults but for what a benchmark must fix."""
    from trl import SFTConfig

    dtype = compute_dtype()
    return SFTConfig(
        output_dir=output,
        num_train_epochs=1,
        max_length=tokens,
        completion_only_loss=True,
        learning_rate=1e-5,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=dtype == torch.float32,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **chosen,
    )


def _told(arguments: Any) -> dict[str, Any]:
    """The settings of a trainer that bear on speed, as it resolved them."""
    names = (
        "per_device_train_batch_size", "packing", "padding_free", "gradient_checkpointing", "optim", "loss_type",
        "max_length",
    )  # fmt: skip
    return {name: str(getattr(arguments, name, None)) for name in names}


def _dataset(rows: Sequence[TrainingRow]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [{"input_ids": row.ids, "completion_mask": [int(label != IGNORE) for label in row.labels]} for row in rows]
    )


def _check_examples(peer: str, rows: Sequence[TrainingRow], padded: bool) -> list[dict[str, Any]]:
    """`rows` as the trainer's collator takes them, all in one micro-batch."""
    if padded:
        return [{"input_ids": row.ids, "labels": row.labels} for row in rows]
    lengths = [len(row.ids) for row in rows]
    pack: dict[str, Any] = {
        "input_ids": [token for row in rows for token in row.ids],
        "labels": [label for row in rows for label in row.labels],
    }
    theirs = peer in ("trl-packed", "unsloth-tuned")
    return [{**pack, "seq_lengths" if theirs else "lengths": lengths}]
