"""Training steps of fastprice and of its peers, each through the trainer and the settings that its users run.

Every peer loads one and the same folder (models.py), trains on the same rows, and is watched by the same `Probe`, which
replaces nothing but `training_step`: before the first step it takes loss and gradient norm of a fixed batch with fixed
adapters, by which `agreement` holds peers against each other; then it times steps without ever waiting for the device.

    trl-padded       transformers + PEFT + TRL, TRL's defaults, `batch` rows padded to the longest
    trl-packed       the same with packing=True ("bfd"), packs of `tokens`
    unsloth          FastLanguageModel and SFTTrainer as in Unsloth's notebooks, `batch` rows (it drops the padding)
    unsloth-tuned    no recomputation, packing=True, packs of `tokens`
    peft-off         fastprice on the peft engine, its kernels off, packs of `tokens`
    peft             fastprice on the peft engine, its kernels on
    unsloth-kernels  fastprice on the unsloth engine, its kernels on
"""

from __future__ import annotations

import gc
import inspect
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastprice.bench.cases import draw_rows
from fastprice.bench.models import seed_adapters
from fastprice.bench.timing import Stopwatch, spread_of
from fastprice.engines.peft import compute_dtype
from fastprice.methods import TARGETS
from fastprice.prompts import IGNORE, TrainingRow

__all__ = ["PEERS", "Enough", "Probe", "agreement", "train_steps"]

PEERS = ("trl-padded", "trl-packed", "unsloth", "unsloth-tuned", "peft-off", "peft", "unsloth-kernels")
_CHECK_ROWS = 8
_WARMUP = 4  # steps: autotuning, allocator growth, lazy compilation
# Two engines in one dtype differ by rounding alone: relative bands of loss and gradient norm.
_BANDS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 6e-2), torch.float16: (5e-3, 3e-2)}


class Enough(BaseException):
    """Ends a training run from inside once it has been measured; not an Exception, so that no trainer swallows it."""


@dataclass
class Probe:
    """Watches the `training_step` of one run; see the module's docstring.

    steps: how many to time after the warm-up; seconds: stop timing after so long, at least two steps done.
    """

    check: Sequence[dict[str, Any]]
    steps: int
    seconds: float
    device: torch.device
    loss: float = float("nan")
    gradient_norm: float = float("nan")
    adapters: int = 0
    counts: list[tuple[Any, Any]] = field(default_factory=list)
    curve: list[tuple[float, int]] = field(default_factory=list)
    peak_allocated: int | None = None
    peak_reserved: int | None = None

    def __post_init__(self) -> None:
        self._watch = Stopwatch(self.device)
        self._done = 0
        self._began = 0.0

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
        if self._done == 0:
            self._take_check(trainer, model, run)
        if self._done == _WARMUP:
            self._start()
        if self._done > _WARMUP:
            self._watch.mark()  # the end of the step before: its optimiser and the loading of data are in it
            if self._finished():
                self._finish(inputs, items, run)
        if self._done >= _WARMUP:
            self.counts.append(_count(inputs))
        result = run(inputs, items)
        self._done += 1
        return result

    def _take_check(self, trainer: Any, model: Any, run: Callable[[Any, Any], Any]) -> None:
        """Loss and gradient norm of the fixed rows, with adapters that are the same for every peer."""
        self.adapters = seed_adapters(model)
        batch = trainer.data_collator([dict(example) for example in self.check])
        labelled = torch.tensor(_predicted(batch["labels"]), device=self.device)
        self.loss = float(run(batch, labelled))
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

    def _start(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what loading and the check had reserved is not the step's
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()
        self._watch.mark()

    def _finished(self) -> bool:
        timed = self._done - _WARMUP
        return timed >= self.steps or (timed >= 2 and time.perf_counter() - self._began > self.seconds)

    def _finish(self, inputs: Any, items: Any, run: Callable[[Any, Any], Any]) -> None:
        self.step_seconds = self._watch.intervals()
        if self.device.type == "cuda":
            self.peak_allocated = torch.cuda.max_memory_allocated()
            self.peak_reserved = torch.cuda.max_memory_reserved()
            self.curve = _memory_curve(lambda: run(inputs, items))
        raise Enough


def train_steps(
    peer: str,
    folder: str,
    *,
    tokens: int,
    batch: int,
    rank: int,
    steps: int,
    seconds: float,
    vocabulary: int,
    end_token: int,
) -> dict[str, Any]:
    """One timed run of `peer` on the model in `folder`: a row of figures.

    tokens: of a pack; batch: rows of a padded micro-batch; rank: of the adapters (alpha = 2 x rank); steps, seconds: see
    `Probe`. Raises ValueError for an unknown peer and whatever the peer itself raises.
    """
    if peer not in PEERS:
        raise ValueError(f"peer {peer!r} is not one of {', '.join(PEERS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    padded = peer in ("trl-padded", "unsloth")
    # Every micro-batch of the run, one more, and some for the loss in packing; a padded one holds `batch` rows.
    rows_a_step = batch if padded else -(-tokens // 120)
    rows = draw_rows((_WARMUP + steps + 3) * rows_a_step + 2 * rows_a_step, vocabulary, end_token)
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
        raise RuntimeError(f"the run of {peer} ended after {probe._done} steps, before it was measured")
    return _row(peer, probe, settings, time.perf_counter() - began)


def agreement(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """How far the check of `row` lies from that of `reference`, and whether that is within the dtype's band."""
    loss_band, norm_band = _BANDS[getattr(torch, row["dtype"])]
    loss = abs(row["check_loss"] - reference["check_loss"]) / abs(reference["check_loss"])
    norm = abs(row["check_gradient_norm"] - reference["check_gradient_norm"]) / reference["check_gradient_norm"]
    return {
        "against": reference["peer"],
        "loss_error": loss,
        "gradient_norm_error": norm,
        "ok": bool(loss <= loss_band and norm <= norm_band),  # False for NaN
    }


def _run_trl(
    peer: str, folder: str, rows: Sequence[TrainingRow], probe: Probe, settings: dict[str, Any],
    *, tokens: int, batch: int, rank: int,
) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTTrainer

    from fastprice.engines.peft import _keep_layout
    from fastprice.methods import lora_config

    set_seed(0)
    options: dict[str, Any] = {"dtype": compute_dtype(), "attn_implementation": "sdpa"}
    if probe.device.type == "cuda":
        options["device_map"] = {"": 0}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    _keep_layout(model)
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
    import fastprice.engines.unsloth  # noqa: F401  (imports unsloth first, with its cache out of the way)
    from unsloth import FastLanguageModel

    from trl import SFTTrainer  # isort: skip  (the class that Unsloth has put there)

    tuned = peer == "unsloth-tuned"
    checkpointing: Any = False if tuned else "unsloth"
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=folder,
        max_seq_length=tokens,
        dtype=None,
        load_in_4bit=True,
        use_gradient_checkpointing=checkpointing,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=rank,
        target_modules=list(TARGETS),
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
    from fastprice.engines import choose_engine

    engine = choose_engine("unsloth" if peer == "unsloth-kernels" else "peft")
    loaded = engine.load_base(folder, method="qlora", max_tokens=tokens)
    model = engine.attach(loaded.model, method="qlora", rank=rank, alpha=2.0 * rank, dropout=0.0, seed=0)

    from trl import SFTTrainer

    from fastprice import training

    options: dict[str, Any] = {}
    mode = "off" if peer == "peft-off" else "on"
    if "kernels" in inspect.signature(training.train).parameters:
        options["kernels"] = mode
    elif mode == "on":
        from fastprice_kernels import install

        settings["installed"] = str(install(model))
    settings |= {"engine": engine.name, "kernels": mode, "pack_tokens": tokens}
    with probe.watching(SFTTrainer):
        training.train(
            engine,
            model,
            loaded.tokenizer,
            rows,
            None,
            epochs=1.0,
            learning_rate=1e-5,
            pack_tokens=tokens,
            accumulation=1,
            evaluations=0,
            warmup=0.0,
            seed=0,
            **options,
        )


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


def _predicted(labels: torch.Tensor) -> int:
    """How many positions are predicted: the first of each row predicts nothing."""
    return int((labels[:, 1:] != IGNORE).sum())


def _count(inputs: Any) -> tuple[Any, Any]:
    """(real tokens, texts) of a micro-batch; tensors on the device stay there until the end."""
    ids = inputs["input_ids"]
    for name in ("pack_lengths", "packed_seq_lengths"):
        if name in inputs:
            return ids.numel(), len(inputs[name])
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


def _row(peer: str, probe: Probe, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    tokens = [int(count[0]) for count in probe.counts[: len(probe.step_seconds)]]
    items = [int(count[1]) for count in probe.counts[: len(probe.step_seconds)]]
    times = probe.step_seconds
    rates = spread_of([count / each for count, each in zip(tokens, times, strict=True)])
    return {
        "peer": peer,
        "dtype": str(compute_dtype()).removeprefix("torch."),
        "settings": settings,
        "check_loss": probe.loss,
        "check_gradient_norm": probe.gradient_norm,
        "adapters": probe.adapters,
        "steps": len(times),
        "step_seconds": spread_of(times).as_dict(),
        "tokens_per_second": rates.as_dict(),
        "mean_tokens_per_second": sum(tokens) / sum(times),
        "items_per_second": sum(items) / sum(times),
        "tokens_per_step": sum(tokens) / len(tokens),
        "peak_allocated": probe.peak_allocated,
        "peak_reserved": probe.peak_reserved,
        "memory_curve": probe.curve,
        "seconds_in_all": seconds,
    }
