"""One training step of the real model code on tensors without values, counted by `TrafficCounter`.

transformers' layers, PEFT's adapters on every linear layer (fp32, as they train), NF4 weights of bitsandbytes with
double quantization, bf16 autocast, packed texts, nothing recomputed. The tensors are fake
(`torch._subclasses.FakeTensorMode`): shapes and dtypes are real, so published widths need no memory.

What differs from CUDA: the device is a CPU, so `x.is_cuda` is false and what decides by it takes the other branch; our
operators are counted before they decompose, and autocast is on for both devices, so neither changes a figure. Attention
is a stand-in that counts one launch each way: q, k, v read and the output and its logsumexp written; backward these and
the output's gradient read and dq, dk, dv written (Flash Attention's own temporaries are not counted).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprice.benchmarking.traffic_counter import Launch, TrafficCounter
from fastprice.models.adapters import lora_config
from fastprice.models.families import lora_targets
from fastprice.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from fastprice.models.parts import decoder_of, plain_model

__all__ = ["count_training_step"]

_BLOCK, _BLOCK2 = 64, 256  # of bitsandbytes' NF4 and of its nested scales


def count_training_step(
    settings: Mapping[str, Any], *, tokens: int, labeled: int, rank: int, kernels: bool
) -> list[Launch]:
    """The launches of one micro-batch, forward and backward.

    Args:
        settings: the model's configuration, as the keys of its `config.json`.
        tokens: of the pack; labeled: how many of them have a loss; rank: of the adapters.
        kernels: whether fastprice_kernels are installed, with loss head and last layer. Without them the step ends at
            the decoder: its loss is a sum over the hidden states.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _build(dict(settings), rank)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _fill(model)
    if kernels:
        from fastprice_kernels import install

        install(model, loss_head=True, last_layer=True)
    counter = TrafficCounter(rank)
    with mode, _attention(counter), _autocast_as_on_cuda(), counter:
        _step(model, counter, tokens, labeled, loss_head=kernels)
    return counter.launches


def _build(settings: dict[str, Any], rank: int) -> Any:
    """The model with its adapters on the meta device."""
    import bitsandbytes
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        for parent in list(decoder_of(model).layers.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    bias = layer.bias is not None
                    four_bit = bitsandbytes.nn.Linear4bit(
                        layer.in_features, layer.out_features, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4"
                    )
                    four_bit.bias = layer.bias
                    four_bit.compute_type_is_set = True
                    setattr(parent, name, four_bit)
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    return get_peft_model(
        model, lora_config(rank=rank, alpha=2 * rank, dropout=0.0, targets=lora_targets(model))
    ).train()


def _fill(model: nn.Module) -> None:
    """Fake tensors in place of the meta ones; 4-bit layers get packed weights and their statistics."""
    import bitsandbytes

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
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module._parameters["weight"] = _nf4_weight(module.out_features, module.in_features)


def _nf4_weight(rows: int, columns: int) -> nn.Parameter:
    from bitsandbytes.functional import QuantState

    blocks = -(-rows * columns // _BLOCK)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // _BLOCK2)), code=torch.empty(256), blocksize=_BLOCK2, dtype=torch.float32
    )
    weight: Any = nn.Parameter(torch.empty(-(-rows * columns // 2), 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8), shape=torch.Size((rows, columns)), code=torch.empty(16),
        blocksize=_BLOCK, quant_type="nf4", dtype=torch.bfloat16, offset=torch.empty(()), state2=nested,
    )  # fmt: skip
    weight.compress_statistics, weight.quant_type, weight.bnb_quantized = True, "nf4", True
    return weight


def _step(model: Any, counter: TrafficCounter, tokens: int, labeled: int, *, loss_head: bool) -> None:
    plain_model(model).set_attn_implementation(PACKED_ATTENTION)
    ids = torch.empty(1, tokens, dtype=torch.int64)
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": torch.empty_like(ids), "use_cache": False}
    batch["pack_lengths"] = (tokens,)
    # check_nan would read values, and the mode's only purpose here is the forward line that it keeps at each node.
    with torch.autograd.set_detect_anomaly(True, check_nan=False), torch.autocast("cpu", torch.bfloat16):
        if loss_head:
            positions = torch.empty(labeled, dtype=torch.int64)
            output = model(**batch, labels=torch.empty_like(ids), label_positions=positions, num_items_in_batch=labeled)
            loss = output.loss
        else:
            loss = decoder_of(model)(**batch).last_hidden_state.sum()
    with counter.phase("backward"):
        loss.backward()


@contextmanager
def _autocast_as_on_cuda() -> Iterator[None]:
    """PEFT reads the autocast state of CUDA, whatever the device."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@contextmanager
def _attention(counter: TrafficCounter) -> Iterator[None]:
    """Packed attention as one counted launch each way, in place of one call a text."""
    from transformers import AttentionInterface

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        return _CountedAttention.apply(counter, *(side.transpose(1, 2) for side in (query, key, value))), None

    AttentionInterface.register(PACKED_ATTENTION, attention)
    try:
        yield
    finally:
        register_packed_attention()


class _CountedAttention(torch.autograd.Function):
    """q (1, T, H, D), k and v (1, T, G, D) -> (1, T, H, D)."""

    @staticmethod
    def forward(ctx: Any, counter: TrafficCounter, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = q.new_empty(q.shape)
        logsumexp = q.new_empty(q.shape[:-1], dtype=torch.float32)
        counter.kernel("attention", "attention", (q, k, v), (output, logsumexp))
        ctx.save_for_backward(q, k, v, output, logsumexp)
        ctx.counter = counter
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        saved: Sequence[Tensor] = ctx.saved_tensors
        dq, dk, dv = (side.new_empty(side.shape) for side in saved[:3])
        ctx.counter.kernel("attention", "attention_backward", (*saved, *gradients), (dq, dk, dv))
        return None, dq, dk, dv
