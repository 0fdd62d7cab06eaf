"""Simulates a training step's memory with the real model code, to check `estimate_memory` against.

transformers' model, PEFT's adapters, TRL's loss, accelerate's autocast and PyTorch's AdamW run on fake tensors
(`torch._subclasses.FakeTensorMode`): shapes, dtypes, autograd and lifetimes are real, the values do not exist, so a 70B
model needs no memory. A dispatch mode adds the bytes of each new storage and subtracts them when it is freed. The
simulation uses nothing of the estimate, and the estimate nothing of the simulation; recompute levels are applied by
fastprice's own code, as in training.

Where a CUDA device would run other code than the CPU on which this runs, a replacement allocates and saves what CUDA's
would (cuda_replacements.py): Flash Attention, 4-bit layers, inputs offloaded to the host, which are not counted while
they are there. The chunked loss is TRL's own chunk function in a loop whose length does not depend on the labels'
values. The CUDA context, cuBLAS's workspace, the allocator's rounding and its fragmentation cannot be seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import convert_outputs_to_fp32
from tests.memory.simulation.cuda_replacements import UncountedOffload, flash_attention, give_quant_states, linear4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from trl.trainer import sft_trainer
from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _patch_chunked_ce_lm_head
from trl.trainer.utils import entropy_from_logits

from fastprice.memory import MemoryEstimate, estimate_memory
from fastprice.memory.activation_checkpointing import ActivationCheckpointing
from fastprice.memory.recompute_levels import expand_recompute
from fastprice.models.adapters import lora_config
from fastprice.models.parts import plain_model
from fastprice.models.shapes import settings_of
from fastprice_kernels import installed

__all__ = ["LiveBytes", "SimulatedStep", "build_model", "simulated_peak_bytes", "simulated_saved_bytes"]

_ATTENTION = "fastprice_simulated"


@dataclass(frozen=True)
class SimulatedStep:
    """One training step: the arguments of `estimate_memory` that it is simulated and estimated with.

    engine               "peft", or "fastprice": with the kernels installed, but TRL's loss
    layers, vocabulary   in place of the model's own, for a quick simulation (None: the model's)
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
    engine: str = "peft"
    mlp_tile: int | None = None
    layers: int | None = None
    vocabulary: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration of the model, as the keys of its `config.json`."""
        own = {"num_hidden_layers": self.layers, "vocab_size": self.vocabulary}
        return {**settings_of(self.base), **{key: value for key, value in own.items() if value is not None}}

    def estimate(self) -> MemoryEstimate:
        """The estimate that the simulation checks."""
        return estimate_memory(
            self.settings, method=self.method, rank=self.rank, tokens=self.tokens, sequences=self.sequences,
            recompute=self.recompute, loss_head=self.loss_head, labeled=self.labeled, phase=self.phase,
            engine=self.engine, mlp_tile=self.mlp_tile,
        )  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made while it is on: the sum of those alive, `bytes`, and its highest value, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.bytes -= size


def build_model(step: SimulatedStep) -> Any:
    """The model as fastprice's stock engine makes it, with adapters, on the meta device."""
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = step.settings
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if step.method == "full":
        return model.float().requires_grad_(True)
    model.requires_grad_(False)
    if step.method == "qlora":
        for parent in list(model.model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, linear4bit(layer))
        model.is_loaded_in_4bit = True
    return get_peft_model(model, lora_config(rank=step.rank, alpha=2 * step.rank, dropout=0.0))


def simulated_peak_bytes(step: SimulatedStep) -> int:
    """Peak bytes of all tensors in the step, in its steady state.

    Training: with the optimizer's states and the gradients of an earlier micro-batch, a forward pass, a backward pass
    and an optimizer step. Evaluation: with the optimizer's states, a forward pass with a KV cache.
    """
    model = build_model(step)
    with _as_on_cuda(), FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        _fill(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(parameters, foreach=True, weight_decay=0.0)
        optimizer.step()
        live.peak = live.bytes
        if step.phase == "eval":
            optimizer.zero_grad()
            _evaluate(model, step)
        else:
            _train(model, step, live)
            optimizer.step()
    peak: int = live.peak
    return peak


def simulated_saved_bytes(step: SimulatedStep) -> int:
    """Bytes of all tensors between the forward and the backward pass of the step."""
    model = build_model(step)
    with _as_on_cuda(), FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        _fill(model)
        return _train(model, step, live)


def _fill(model: nn.Module) -> None:
    """Fake tensors on the CPU in place of the meta ones; tied weights stay tied."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in parameters:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    parameters[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = parameters[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _train(model: Any, step: SimulatedStep, live: LiveBytes) -> int:
    """Forward and backward of one micro-batch, as TRL's trainer runs them: texts packed in one row, bf16 autocast.

    Returns the bytes alive between the two.
    """
    inner = plain_model(model)
    inner.set_attn_implementation(_ATTENTION)
    model.train()
    if step.loss_head == "completion":
        _patch_chunked_ce_lm_head(inner, chunk_size=_CHUNKED_LM_HEAD_CHUNK_SIZE)
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    ids = torch.zeros(1, step.tokens, dtype=torch.int64)
    positions, labels = torch.zeros_like(ids), torch.zeros_like(ids)
    length = -(-step.tokens // step.sequences)
    lengths = tuple(min(length, step.tokens - start) for start in range(0, step.tokens, length))
    levels = expand_recompute(step.recompute, inner.config.num_hidden_layers)
    with ExitStack() as stack:
        if step.engine == "fastprice":
            give_quant_states(model)
            with unset_fake_temporarily():  # it tries the model's functions on numbers
                stack.enter_context(installed(model, mlp_tile=step.mlp_tile))
        stack.enter_context(_chunked_loss_over(round(step.labeled * step.tokens)))
        stack.enter_context(ActivationCheckpointing(inner, levels, offload=UncountedOffload()))
        loss = _loss(model, ids, positions, labels, lengths)
        saved = live.bytes
        loss.backward()
    return saved


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


def _evaluate(model: Any, step: SimulatedStep) -> None:
    """One forward pass over a batch of texts with a KV cache, as in prediction during training."""
    inner = plain_model(model)
    inner.set_attn_implementation(_ATTENTION)
    model.eval()
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    ids = torch.zeros(step.sequences, step.tokens // step.sequences, dtype=torch.int64)
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, logits_to_keep=1 if step.loss_head == "completion" else 0)


@contextmanager
def _chunked_loss_over(rows: int) -> Iterator[None]:
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
    """Sets what differs between a CUDA device and a CPU: the attention, and CUDA's autocast state, which PEFT reads."""
    AttentionInterface.register(_ATTENTION, flash_attention)
    enabled = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        # AdamW reads its step count from a tensor, and a fake one has no value.
        with patch("torch.optim.adam._get_value", lambda _: 1.0):
            yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
