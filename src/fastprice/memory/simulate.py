"""Simulates a training step's memory with the real model code, to check `estimate_memory` against.

    python -m fastprice.memory.simulate --table docs/memory-errors.md     (some twenty minutes of CPU time)

transformers' model, PEFT's adapters, TRL's loss, accelerate's autocast and PyTorch's AdamW run on fake tensors
(`torch._subclasses.FakeTensorMode`): shapes, dtypes, autograd and lifetimes are real, the numbers are not there, so a
70B model needs no memory. A dispatch mode adds the bytes of each new storage and takes them off when it is freed.
Nothing of the estimate is used here, and nothing of this there.

Where a CUDA device would run other code than the CPU on which this runs, a stand-in does what CUDA's would:

- attention (`Flash` in standins.py): what Flash Attention saves and allocates, instead of what the CPU's does.
  Soft-capped scores (Gemma 2) have no flash kernel with a backward; they run through fastprice's own attention;
- 4-bit layers (`linear4bit`): packed bytes and statistics as bitsandbytes holds them, dequantized into a temporary in
  forward and again in backward, as its `MatMul4Bit` does on CUDA; PEFT's 4-bit layer wraps them as it wraps the real;
- the chunked loss: TRL's own chunk function, in a loop whose length does not depend on the labels' values;
- inputs that a layer keeps on the host: not counted while they are there.

What each layer keeps is arranged by fastprice's own code (checkpointing.py), as in training.

What it cannot see: the CUDA context, cuBLAS's workspace, the allocator's rounding and fragmentation.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from trl.trainer import sft_trainer
from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _patch_chunked_ce_lm_head
from trl.trainer.utils import entropy_from_logits

from fastprice.memory.activation_checkpointing import keeping
from fastprice.memory.estimate import MemoryEstimate, estimate_memory, levels_of
from fastprice.memory.recompute_levels import LEVELS, write_levels
from fastprice.memory.stand_ins import HostStandIn, Live, attention, linear4bit
from fastprice.models.parts import plain_model
from fastprice.models.shapes import read_shape, settings_of

__all__ = ["Case", "cases", "kept_bytes", "markdown", "simulate"]

MODELS = (
    "Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B", "Qwen2.5-0.5B", "Qwen2.5-7B", "gemma-2-2b", "Mistral-7B-v0.3",
)  # fmt: skip

_ATTENTION = "fastprice_simulated"


@dataclass(frozen=True)
class Case:
    """One training step: the arguments of `estimate_memory` that it is simulated and estimated with.

    layers, vocabulary   so many instead of the model's own, for a quick look (None: the model's)
    """

    base: str
    method: str
    tokens: int
    recompute: str | int | tuple[str, ...]
    loss_head: str
    sequences: int = 1
    rank: int = 16
    labeled: float = 1.0
    phase: str = "train"
    layers: int | None = None
    vocabulary: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration of the model, as the keys of its `config.json`."""
        own = {"num_hidden_layers": self.layers, "vocab_size": self.vocabulary}
        return {**settings_of(self.base), **{key: value for key, value in own.items() if value is not None}}

    @property
    def recomputed(self) -> str:
        """`recompute` as people write it."""
        return write_levels(self.recompute) if isinstance(self.recompute, tuple) else str(self.recompute)

    def estimate(self) -> MemoryEstimate:
        """What `estimate_memory` says of this step."""
        return estimate_memory(
            self.settings, method=self.method, rank=self.rank, tokens=self.tokens, sequences=self.sequences,
            recompute=self.recompute, loss_head=self.loss_head, labeled=self.labeled, phase=self.phase,
        )  # fmt: skip


def build(case: Case) -> Any:
    """The model of the case as fastprice's stock engine makes it, with adapters, on the meta device."""
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastprice.models.adapters import lora_config

    settings = case.settings
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if case.method == "full":
        return model.float().requires_grad_(True)
    model.requires_grad_(False)
    if case.method == "qlora":
        for parent in list(model.model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, linear4bit(layer))
        model.is_loaded_in_4bit = True
    return get_peft_model(model, lora_config(rank=case.rank, alpha=2 * case.rank, dropout=0.0))


def simulate(case: Case) -> int:
    """Peak bytes of all tensors in the step, in its steady state.

    Training: the optimizer's states and the gradients of an earlier micro-batch are there; then a forward pass, a
    backward pass and an optimizer step. Evaluation: the states alone; then a forward pass with a cache.
    """
    model = build(case)
    with _as_on_cuda(), FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        _fill(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(parameters, foreach=True, weight_decay=0.0)
        optimizer.step()
        live.peak = live.bytes
        if case.phase == "eval":
            optimizer.zero_grad()
            _evaluate(model, case)
        else:
            _train(model, case, live)
            optimizer.step()
    peak: int = live.peak
    return peak


def kept_bytes(case: Case) -> int:
    """Bytes of all tensors between the forward and the backward pass of the step."""
    model = build(case)
    with _as_on_cuda(), FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        _fill(model)
        return _train(model, case, live)


def _fill(model: nn.Module) -> None:
    """Fake tensors on the CPU in place of the meta ones; tied weights stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _train(model: Any, case: Case, live: Live) -> int:
    """Forward and backward of one micro-batch, as TRL's trainer runs them: texts packed in one row, bf16 autocast.

    Gives the bytes alive between the two.
    """
    inner = plain_model(model)
    inner.set_attn_implementation(_ATTENTION)
    model.train()
    if case.loss_head == "completion":
        _patch_chunked_ce_lm_head(inner, chunk_size=_CHUNKED_LM_HEAD_CHUNK_SIZE)
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    ids = torch.zeros(1, case.tokens, dtype=torch.int64)
    positions, labels = torch.zeros_like(ids), torch.zeros_like(ids)
    length = -(-case.tokens // case.sequences)
    lengths = tuple(min(length, case.tokens - start) for start in range(0, case.tokens, length))
    levels = levels_of(case.recompute, read_shape(case.settings))
    with _chunks_of(round(case.labeled * case.tokens)), keeping(inner, levels, host=HostStandIn()):
        loss = _loss(model, ids, positions, labels, lengths)
        kept = live.bytes
        loss.backward()
    return kept


def _loss(model: Any, ids: Tensor, positions: Tensor, labels: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The loss, with the metrics that TRL takes from full logits; the outputs are gone before the backward pass."""
    outputs = model(input_ids=ids, position_ids=positions, labels=labels, pack_lengths=lengths,
                    num_items_in_batch=ids.numel(), use_cache=False)  # fmt: skip
    if outputs.logits is not None:
        with torch.no_grad():
            entropy_from_logits(outputs.logits[..., :-1, :])
            outputs.logits[..., :-1, :].argmax(dim=-1)
    loss: Tensor = outputs.loss
    return loss


def _evaluate(model: Any, case: Case) -> None:
    """One forward pass over a batch of texts, keys and values cached, as in prediction during training."""
    inner = plain_model(model)
    inner.set_attn_implementation(_ATTENTION)
    model.eval()
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    ids = torch.zeros(case.sequences, case.tokens // case.sequences, dtype=torch.int64)
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, logits_to_keep=1 if case.loss_head == "completion" else 0)


@contextmanager
def _chunks_of(rows: int) -> Iterator[None]:
    """TRL's chunked loss over `rows` labeled rows: its own chunk function, in a loop of known length."""

    def chunked(hidden: Tensor, weight: Tensor, size: int, labels: Tensor, shift_labels: None = None,
                num_items_in_batch: int = 1, logit_scale: float = 1.0, final_logit_softcapping: float | None = None,
                lm_head_bias: Tensor | None = None) -> tuple[Tensor, ...]:  # fmt: skip
        hidden = hidden[..., :-1, :].reshape(-1, hidden.size(-1))
        labels = labels[..., 1:].reshape(-1)
        order = (labels != -100).to(torch.int8).argsort(descending=True, stable=True)
        hidden, labels = hidden[order], labels[order]
        loss, correct, entropy = (hidden.new_zeros((), dtype=torch.float32) for _ in range(3))
        for start in range(0, max(1, rows), size):
            one, two, three = torch.utils.checkpoint.checkpoint(
                sft_trainer._chunk, hidden[start : start + size], weight, lm_head_bias, labels[start : start + size],
                logit_scale, final_logit_softcapping, use_reentrant=False,
            )  # fmt: skip
            loss, correct, entropy = loss + one, correct + two, entropy + three
        return loss / num_items_in_batch, correct, entropy, labels.new_zeros(())

    with patch.object(sft_trainer, "_chunked_cross_entropy_loss", chunked):
        yield


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """What differs between a CUDA device and the CPU: the attention, and that PEFT asks for CUDA's autocast state."""
    AttentionInterface.register(_ATTENTION, attention)
    enabled = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        # AdamW reads its step count from a tensor, and a fake one has no value.
        with patch("torch.optim.adam._get_value", lambda _: 1.0):
            yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)


def cases() -> list[Case]:
    """The cases of the published table: every model, precision, token count and recomputation, in texts of 512 tokens.

    The loss head alternates, so that each head meets each value of the other settings. Then levels of every kind.
    """
    made = []
    for model in MODELS:
        for at, (method, tokens, recompute) in enumerate(
            itertools.product(("qlora", "lora"), (512, 2048, 8192), ("all", "none"))
        ):
            head = ("full", "completion")[(at + at // 2) % 2]
            made.append(Case(model, method, tokens, recompute, head, sequences=tokens // 512))
        layers = read_shape(model).layers
        mixed = tuple(LEVELS[3 - 4 * i // layers] for i in range(layers))
        for method, tokens, levels, head in (
            ("qlora", 8192, ("costly",) * layers, "completion"), ("lora", 2048, mixed, "full"),
            ("qlora", 2048, ("host",) * layers, "completion"),
        ):  # fmt: skip
            made.append(Case(model, method, tokens, levels, head, sequences=tokens // 512))
    return made


def markdown(results: Sequence[tuple[Case, int, MemoryEstimate]]) -> str:
    """The page of errors: each case with its simulated peak (bytes) and its estimate."""
    # Rounded, and -0.0 made 0.0
    errors = [round(100 * (estimate.tensor_bytes / simulated - 1), 2) + 0.0 for _, simulated, estimate in results]
    worst, lowest = max(errors, key=abs), min(errors)
    rows = [
        f"| {case.base} | {case.method} | {case.tokens:,} | {case.recomputed} | {case.loss_head} | "
        f"{simulated / 2**30:.3f} | {estimate.tensor_bytes / 2**30:.3f} | {error:+.2f} % | {estimate.moment} |"
        for (case, simulated, estimate), error in zip(results, errors, strict=True)
    ]
    return "\n".join(
        [
            "# How far the memory estimate is off",
            "",
            "Made by `python -m fastprice.memory.simulate --table docs/memory-errors.md`; not written by hand.",
            "",
            f"{len(results)} training steps: **median error {statistics.median(map(abs, errors)):.2f} %, worst "
            f"{worst:+.2f} %, furthest under {min(lowest, 0.0):+.2f} %.**",
            "",
            "The estimate (`fastprice.memory.estimate_memory`) is arithmetic on a model's configuration. The",
            "simulation runs transformers' model code, PEFT's adapters, TRL's loss, accelerate's autocast and",
            "PyTorch's AdamW on fake tensors and adds up every storage. Neither uses the other, and nothing is",
            "fitted; but the estimate's list of operations was corrected against this simulation while it was",
            "written, so the table shows that the two agree, and would show when a library changes what it keeps.",
            "",
            "**No figure here was measured on a GPU.** Both sides count tensors, what PyTorch calls *allocated*. The",
            "CUDA context, cuBLAS's workspace and the allocator's rounding and fragmentation are seen by neither;",
            "`estimate_memory` adds assumed amounts for them. Where a CUDA device runs other code than a CPU, the",
            "simulation has stand-ins: attention saves what Flash Attention saves, and 4-bit layers hold what",
            "bitsandbytes holds and dequantize into a temporary, forward and backward. Only the engine `peft` is here;",
            "for `unsloth` and `fastprice` the estimate is arithmetic alone.",
            "",
            f"Versions: torch {torch.__version__.partition('+')[0]}, transformers {version('transformers')}, peft "
            f"{version('peft')}, trl {version('trl')}.",
            "Rank 16 on all linear layers, adapters in fp32, bf16 autocast, texts of 512 tokens in one packed row,",
            "every token labeled, AdamW's states and an earlier micro-batch's gradients present.",
            "",
            "Recompute: `all` or `none` of the layers, or what each layer keeps, the first ones first: everything",
            "(`all`), everything but norms and products of activations (`costly`), its input (`input`), its input on",
            "the host (`host`). `costly` or `host` alone means every layer.",
            "",
            "| model | method | tokens | recompute | loss head | simulated GiB | estimated GiB | error | peak at |",
            "|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _compare(case: Case) -> tuple[Case, int, MemoryEstimate]:
    warnings.simplefilter("ignore")
    simulated, estimate = simulate(case), case.estimate()
    error = 100 * (estimate.tensor_bytes / simulated - 1)
    print(f"{case.base} {case.method} {case.tokens} {case.recomputed} {case.loss_head}: {error:+.2f} %", flush=True)
    return case, simulated, estimate


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the memory estimate against a simulation of the real code.")
    parser.add_argument("--table", type=Path, required=True, metavar="FILE", help="Markdown file to write")
    parser.add_argument("--jobs", type=int, default=1, help="processes to run at once")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(_compare, cases()))
    options.table.write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
