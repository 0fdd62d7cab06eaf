"""The host's time for one decoder layer, forward and backward: what a GPU waits for where a model is launch-bound.

The layer is a real one (NF4 base, LoRA on all linear layers) of a tiny size on the CPU, with two tokens and with
dequantization and activation replaced by functions that do nothing, so that what is left is Python, PyTorch's
dispatcher, autograd and products too small to matter. fastprice's layer and stock PEFT's run in turns, and the result
is the ratio of their fastest times: an absolute time says more about the machine. Triton's launches are not part of it.

Products run in fp32 and adapters are fp64: the same casts as bf16 with fp32 adapters on a GPU, whose products on a CPU
are slower than the host work. Each backward adds to the gradients, as a micro-batch of an accumulated step does.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["HostTime", "fastest_times", "layer_step", "measure_host_time", "without_work"]

_TOKENS, _WIDTH = 2, 64
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class HostTime:
    """Microseconds of the host for a layer's forward and backward, the fastest of all rounds."""

    fastprice: float
    peft: float

    @property
    def ratio(self) -> float:
        """fastprice's time as a share of stock PEFT's."""
        return self.fastprice / self.peft

    def __str__(self) -> str:
        return (
            f"host time of a Llama layer, forward and backward, kernels stubbed: fastprice {self.fastprice:.0f} us, "
            f"stock PEFT {self.peft:.0f} us, ratio {self.ratio:.2f}"
        )


def layer_step(*, kernels: bool) -> Callable[[], None]:
    """A function that runs forward and backward of a decoder layer of a fresh Llama with LoRA, kernels under it or not.

    The model is as in training, and the layer the first one of two.
    """
    import peft
    from transformers import LlamaConfig

    from fastprice.benchmarking.random_models import random_nf4_model

    config = LlamaConfig(
        vocab_size=64, hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa",
    )  # fmt: skip
    model = peft.get_peft_model(
        random_nf4_model(config, "cpu", torch.float32), peft.LoraConfig(r=8, target_modules=_TARGETS)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.double()
    model.train()
    if kernels:
        from fastprice_kernels import install

        install(model)
    decoder = model.get_base_model().model
    positions = torch.arange(_TOKENS)[None]
    x = torch.randn(1, _TOKENS, _WIDTH, requires_grad=True)
    rotation = decoder.rotary_emb(x, positions)
    gradient = torch.ones(1, _TOKENS, _WIDTH)

    def step() -> None:
        y = decoder.layers[0](x, attention_mask=None, position_ids=positions, position_embeddings=rotation)
        (y if isinstance(y, Tensor) else y[0]).backward(gradient)

    return step


@contextmanager
def without_work() -> Iterator[None]:
    """While it is open, our kernels beside the products, and bitsandbytes' dequantization, compute nothing."""
    from fastprice_kernels.ops import gated_activations, nf4_dequantize, norms, rotary

    ours = (
        nf4_dequantize._dequantize_op, gated_activations._forward_op, gated_activations._backward_op,
        norms._forward_op, norms._backward_op, rotary._rotate_op,
    )  # fmt: skip
    directs = [operator.direct[False] for operator in ours]  # type: ignore[attr-defined]
    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about an implementation that is replaced, which is the intention
        library.impl("dequantize_4bit", _zeros, "CPU", allow_override=True)
    try:
        for operator in ours:
            operator.direct[False] = _nothing  # type: ignore[attr-defined]
        yield
    finally:
        for operator, direct in zip(ours, directs, strict=True):
            operator.direct[False] = direct  # type: ignore[attr-defined]
        library._destroy()


def _nothing(*arguments: Any) -> None:
    """In place of an operator that writes into an argument."""


def _zeros(packed: Tensor, absmax: Tensor, blocksize: int, kind: str, shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def measure_host_time(*, rounds: int = 40, steps: int = 25) -> HostTime:
    """The host time of a layer with fastprice's kernels and of stock PEFT's, in turns of `steps` steps."""
    # Made before: what a norm computes is told by its values.
    runs = [layer_step(kernels=True), layer_step(kernels=False)]
    with without_work():
        fastest = fastest_times(runs, rounds, steps)
    return HostTime(*(1e6 * seconds for seconds in fastest))


def fastest_times(runs: list[Callable[[], None]], rounds: int, steps: int) -> list[float]:
    """For each function the fewest seconds of one call, over `rounds` turns of `steps` calls, after a warm-up."""
    for run in runs:
        for _ in range(steps):
            run()
    fastest = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            began = time.perf_counter()
            for _ in range(steps):
                run()
            fastest[i] = min(fastest[i], (time.perf_counter() - began) / steps)
    return fastest
