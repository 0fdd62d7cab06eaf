"""One training step of the real model code, whose launches are counted by `TrafficCounter` and never computed.

transformers' layers, PEFT's adapters on every linear layer (fp32, as they train), NF4 weights of bitsandbytes with
double quantization, bf16 autocast, packed texts, nothing recomputed. Nothing writes into weights or activations, so
published widths need no memory.

What differs from CUDA: `device.type` is "cpu" (autocast is on for both devices), but `is_cuda` is made true, so that
our code takes the branches of CUDA. Attention is a stand-in that counts one launch each way: q, k, v read, the output
and its logsumexp written; backward these and the output's gradient read, dq, dk, dv written. Flash Attention's
temporaries, and soft-capped scores (Gemma 2), which have no kernel, are not counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprice.benchmarking.traffic_counter import Launch, TrafficCounter
from fastprice.models.adapters import lora_config
from fastprice.models.families import lora_targets
from fastprice.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from fastprice.models.parts import decoder_of, plain_model

__all__ = ["count_training_step"]

_BLOCK, _BLOCK2 = 64, 256  # of bitsandbytes' NF4 and of its nested scales
_SMALL = 2**16  # elements: norms and biases, which `install` may read


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
        if kernels:
            from fastprice_kernels import install

            install(model, loss_head=True, last_layer=True)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    batch = {"input_ids": ids, "position_ids": ids, "pack_lengths": (tokens,), "use_cache": False}
    if kernels:
        positions = torch.arange(labeled)
        batch |= {"labels": ids, "label_positions": positions, "num_items_in_batch": labeled}
    counter = TrafficCounter(rank)
    with _as_on_cuda(), _attention(counter), counter:
        _step(model, counter, batch)
    return counter.launches


def _build(settings: dict[str, Any], rank: int) -> Any:
    """The model with its adapters; large parameters are never written, small ones are 1, buffers as in the model."""
    import bitsandbytes
    from accelerate import init_empty_weights
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        for parent in list(decoder_of(model).layers.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    four_bit = bitsandbytes.nn.Linear4bit(
                        layer.in_features,
                        layer.out_features,
                        bias=False,
                        compute_dtype=torch.bfloat16,
                        quant_type="nf4",
                    )
                    four_bit.bias, four_bit.compute_type_is_set = layer.bias, True
                    setattr(parent, name, four_bit)
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    model = get_peft_model(model, lora_config(rank=rank, alpha=2 * rank, dropout=0.0, targets=lora_targets(model)))
    _fill(model)
    return model.train()


def _fill(model: nn.Module) -> None:
    """Parameters on the CPU in place of those on the meta device; tied ones stay tied."""
    import bitsandbytes

    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in parameters:
                small = parameter.numel() <= _SMALL
                filled = (torch.ones if small else torch.empty)(parameter.shape, dtype=parameter.dtype)
                parameters[id(parameter)] = nn.Parameter(filled, requires_grad=parameter.requires_grad)
            module._parameters[name] = parameters[id(parameter)]
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
    parameter: nn.Parameter = weight
    return parameter


def _step(model: Any, counter: TrafficCounter, batch: dict[str, Any]) -> None:
    plain_model(model).set_attn_implementation(PACKED_ATTENTION)
    # check_nan would read values; the mode is on for the forward line that it keeps at each node.
    with torch.autograd.set_detect_anomaly(True, check_nan=False), torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss if "labels" in batch else decoder_of(model)(**batch).last_hidden_state.sum()
    with counter.phase("backward"):
        loss.backward()


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """What code that decides by it sees on CUDA: `is_cuda` of every tensor is true, and CUDA's autocast is on."""
    autocast = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    # The getter is inherited from a class in C: this hides it, and deleting it shows it again. A mode for torch
    # functions would not do, because it is off inside a backward pass.
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.is_cuda
        torch.set_autocast_enabled("cuda", autocast)


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
