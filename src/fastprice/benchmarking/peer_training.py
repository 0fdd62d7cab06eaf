"""Training of fastprice and of its peers (peers.py), each through the trainer and the settings of its users.

Every peer loads one and the same folder (random_models.py), trains on the same rows, and is measured by the same probe:
`StepProbe` for steps, which takes the place of the trainer's `training_step` and of nothing else, `RunProbe`
(training_runs.py) for whole runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch

from fastprice.benchmarking.peer_attention import choose_attention, register_torch_varlen
from fastprice.benchmarking.peer_kernels import unsloth_attention
from fastprice.benchmarking.peers import PEERS, Peer
from fastprice.benchmarking.step_probe import WARMUP, MeasurementDone, StepProbe
from fastprice.benchmarking.workload import draw_rows, shape_of, step_flops
from fastprice.errors import ConfigError, nearest_name
from fastprice.models.attention_backends import backend
from fastprice.models.families import lora_targets
from fastprice.models.peft_engine import compute_dtype
from fastprice.prompts.template import IGNORE, TrainingRow

__all__ = ["Probe", "TrainingCase", "known_peer", "run_peer", "train_steps"]

_CHECK_ROWS = 8
_MEAN_TOKENS = 140  # of a row of `draw_rows`


@dataclass(frozen=True)
class TrainingCase:
    """One timed run.

    folder           of the model
    tokens           of a pack
    batch            rows of a padded micro-batch
    rank             of the adapters; alpha is twice that
    steps, seconds   see `StepProbe`
    learning_rate    at the first step; it follows a cosine, as in fastprice's own training
    """

    folder: str
    tokens: int
    batch: int
    rank: int
    steps: int
    seconds: float
    learning_rate: float = 1e-5

    def rows_of(self, peer: Peer) -> int:
        """Rows of a padded micro-batch of `peer`."""
        return max(1, round(self.tokens / _MEAN_TOKENS)) if peer.equal_tokens else self.batch


class Probe(Protocol):
    """What measures a training: see `StepProbe`."""

    device: torch.device

    def loading(self) -> AbstractContextManager[None]:
        """Around what loads the model."""

    def attach(self, trainer: Any) -> None:
        """Before the trainer starts."""


def known_peer(name: str) -> Peer:
    """The peer of that name; ConfigError for an unknown one."""
    if name not in PEERS:
        raise ConfigError(f"peer: {name!r} is not one of {', '.join(PEERS)}{nearest_name(name, PEERS)}")
    return PEERS[name]


def run_peer(peer: Peer, case: TrainingCase, rows: Sequence[TrainingRow], probe: Probe) -> dict[str, Any]:
    """Trains on `rows` once, measured by `probe`; the settings on which the speed depends.

    Ends early where the probe raises `MeasurementDone`.
    """
    settings: dict[str, Any] = {}
    try:
        {"trl": _run_trl, "unsloth": _run_unsloth, "fastprice": _run_fastprice}[peer.trainer](
            peer, case, rows, probe, settings
        )
    except MeasurementDone:
        settings["ended_early"] = True
    return settings


def train_steps(name: str, case: TrainingCase) -> dict[str, Any]:
    """One timed run of the peer of that name: a row of figures.

    Raises ConfigError for an unknown name and whatever the peer itself raises.
    """
    from transformers import AutoConfig

    peer = known_peer(name)
    config = AutoConfig.from_pretrained(case.folder)
    # Every micro-batch of the run, one more, and some for what packing leaves unused.
    rows_a_step = case.rows_of(peer) if peer.padded else -(-case.tokens // 120)
    rows = draw_rows((WARMUP + case.steps + 5) * rows_a_step, config.vocab_size, config.eos_token_id)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probe = StepProbe(device, case.steps, case.seconds, _check_examples(peer, rows[:_CHECK_ROWS]))
    began = time.perf_counter()
    settings = run_peer(peer, case, rows, probe)
    if not settings.pop("ended_early", False):
        raise RuntimeError(f"the run of {name} ended after {probe.done} steps, before it was measured")
    lengths = [len(row.ids) for row in rows]
    labeled = sum(label != IGNORE for row in rows for label in row.labels)
    return {
        "peer": name,
        "settings": settings,
        **probe.figures(),
        "labeled_share": labeled / sum(lengths),
        "flops_per_token": step_flops(shape_of(config), lengths, labeled, case.rank) / sum(lengths),
        "seconds_in_all": time.perf_counter() - began,
    }


def _run_trl(
    peer: Peer, case: TrainingCase, rows: Sequence[TrainingRow], probe: Probe, settings: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTTrainer

    from fastprice.models.adapters import lora_config
    from fastprice.models.peft_engine import settle_four_bit

    set_seed(0)
    options: dict[str, Any] = {"dtype": compute_dtype(), "attn_implementation": "sdpa"}
    if probe.device.type == "cuda":
        options["device_map"] = {"": 0}
    attention = choose_attention(probe.device.type, compute_dtype(), packed=not peer.padded)
    register_torch_varlen()
    with probe.loading():
        model = AutoModelForCausalLM.from_pretrained(case.folder, **options)
    settle_four_bit(model, compute_dtype())
    model.set_attn_implementation(attention)
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            args=_sft_config(output, case, peer, gradient_checkpointing=peer.recompute),
            train_dataset=_dataset(rows),
            processing_class=AutoTokenizer.from_pretrained(case.folder),
            peft_config=lora_config(rank=case.rank, alpha=2 * case.rank, dropout=0.0),
        )
        settings |= {
            **_speed_settings(trainer.args),
            "attention": model.config._attn_implementation,
            # Under a dense mask, packed SDPA is not the best that TRL could have on a GPU.
            "best_attention": probe.device.type == "cpu" or peer.padded or attention not in ("sdpa", "eager"),
        }
        probe.attach(trainer)
        trainer.train()


def _run_unsloth(
    peer: Peer, case: TrainingCase, rows: Sequence[TrainingRow], probe: Probe, settings: dict[str, Any]
) -> None:
    engine = import_module("fastprice.models.unsloth_engine")  # first: Unsloth patches what comes after

    from trl import SFTTrainer  # isort: skip  (Unsloth's own class by now)

    # As in Unsloth's notebooks, and as tuned for texts this short: packs, nothing recomputed.
    checkpointing: Any = "unsloth" if peer.recompute else False
    with probe.loading():
        model, tokenizer = engine.FastLanguageModel.from_pretrained(
            model_name=case.folder,
            max_seq_length=case.tokens,
            dtype=None,
            load_in_4bit=True,
            use_gradient_checkpointing=checkpointing,
        )
    model = engine.FastLanguageModel.get_peft_model(
        model,
        r=case.rank,
        target_modules=lora_targets(model),
        lora_alpha=2 * case.rank,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=0,
    )
    options: dict[str, Any] = {"optim": "adamw_8bit"}  # as in its notebooks
    if not peer.recompute:
        options["gradient_checkpointing"] = False
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            args=_sft_config(output, case, peer, **options),
            train_dataset=_dataset(rows),
            processing_class=tokenizer,
        )
        attention, best = unsloth_attention()
        settings |= {
            **_speed_settings(trainer.args),
            "unsloth_checkpointing": str(checkpointing),
            "attention": attention,
            "best_attention": best,
        }
        probe.attach(trainer)
        trainer.train()


def _run_fastprice(
    peer: Peer, case: TrainingCase, rows: Sequence[TrainingRow], probe: Probe, settings: dict[str, Any]
) -> None:
    from fastprice.config import TrainConfig
    from fastprice.models.engine_choice import choose_engine
    from fastprice.training.step_options import StepOptions
    from fastprice.training.train import train

    engine = choose_engine(peer.engine)
    with probe.loading():
        loaded = engine.load_base(case.folder, method="qlora", max_tokens=case.tokens)
    model = engine.attach(loaded.model, method="qlora", rank=case.rank, alpha=2.0 * case.rank, dropout=0.0, seed=0)
    settings |= {"engine": engine.name, "kernels": peer.kernels, "pack_tokens": case.tokens}
    settings["best_attention"] = True
    # Packs of one static shape, which graphs need, are served by varlen_attn alone.
    settings["attention"] = "varlen" if peer.cuda_graphs == "on" else backend(probe.device.type, compute_dtype())
    trainers: list[Any] = []

    def start(trainer: Any) -> None:
        trainers.append(trainer)
        if trainer.installed is not None:  # so that no row claims kernels that were not installed
            settings["installed"] = str(trainer.installed)
        probe.attach(trainer)

    try:
        train(
            engine,
            model,
            loaded.tokenizer,
            rows,
            None,
            TrainConfig(
                learning_rate=case.learning_rate,
                pack_tokens=case.tokens,
                evaluations=0,
                warmup_ratio=0.0,
                cuda_graphs=peer.cuda_graphs,
            ),
            options=StepOptions(kernels=peer.kernels),
            on_trainer=start,
        )
    finally:
        if trainers and trainers[0].graph_state is not None:
            settings["graphs"] = trainers[0].graph_state


def _sft_config(output: str, case: TrainingCase, peer: Peer, **options: Any) -> Any:
    """TRL's settings: its defaults, except for what a benchmark must fix."""
    from trl import SFTConfig

    dtype = compute_dtype()
    if peer.padded:
        options["per_device_train_batch_size"] = case.rows_of(peer)
    else:
        options |= {"per_device_train_batch_size": 1, "packing": True}
    return SFTConfig(
        output_dir=output,
        num_train_epochs=1,
        max_length=case.tokens,
        completion_only_loss=True,
        learning_rate=case.learning_rate,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=dtype == torch.float32,
        lr_scheduler_type="cosine",  # as fastprice
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **options,
    )


def _speed_settings(arguments: Any) -> dict[str, Any]:
    """The settings of a trainer on which its speed depends, as it resolved them."""
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


def _check_examples(peer: Peer, rows: Sequence[TrainingRow]) -> list[dict[str, Any]]:
    """`rows` as the trainer's collator takes them, all in one micro-batch."""
    if peer.padded:
        return [{"input_ids": row.ids, "labels": row.labels} for row in rows]
    lengths = [len(row.ids) for row in rows]
    pack: dict[str, Any] = {
        "input_ids": [token for row in rows for token in row.ids],
        "labels": [label for row in rows for label in row.labels],
    }
    return [{**pack, "lengths" if peer.trainer == "fastprice" else "seq_lengths": lengths}]
