"""The kernels' work beside that of their peers, on the shapes of real models.

Every kernel is fetched when its case is made: one that is not there is a row that says so. Peers that patch others when
imported (Unsloth) come in a process of their own: `cases(..., unsloth=True)` compares with Unsloth alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprice.bench.cases import DEQUANTIZE_SHAPES, NF4_BYTES, shape_of
from fastprice.bench.comparison import OURS, Comparison
from fastprice.bench.models import random_nf4_weight
from fastprice.prompts import IGNORE

__all__ = ["FAMILIES", "cases"]

FAMILIES = ("dequantize", "lora_linear", "lora_mlp", "loss_head", "small_matmul")
_BANDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}
_ROWS = (1, 4, 16)  # of nf4_matmul_small


def cases(
    families: Sequence[str], model: str, tokens: int, device: torch.device, dtype: torch.dtype, *, unsloth: bool
) -> Iterator[Callable[[], Comparison]]:
    """Makers of the comparisons, in order of importance; each allocates only when it is called.

    model: whose layers the LoRA, head and small products are taken from; "nano" takes small dequantisations too.
    tokens: rows of x in the LoRA and head cases.
    """
    makers = {
        "dequantize": _dequantize_cases,
        "lora_linear": _lora_cases,
        "lora_mlp": _mlp_cases,
        "loss_head": _head_cases,
        "small_matmul": _small_cases,
    }
    for family in families:
        yield from makers[family](model, tokens, device, dtype, unsloth)


def _ours(module: str, name: str) -> Callable[..., Any]:
    """A function of fastprice_kernels, or one that raises what importing it raised."""
    try:
        found: Callable[..., Any] = getattr(import_module(f"fastprice_kernels.{module}"), name)
    except (ImportError, AttributeError) as error:
        reason = str(error)

        def missing(*_: Any, **__: Any) -> Any:
            raise ImportError(reason)

        return missing
    return found


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(0)


def _dequantize_cases(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, unsloth: bool
) -> Iterator[Callable[[], Comparison]]:
    if device.type == "cpu":
        shapes = [((256, 512), "float32"), ((384, 128), "float32")]
    elif model == "nano":
        shapes = DEQUANTIZE_SHAPES[:3]
    else:
        shapes = DEQUANTIZE_SHAPES
    for shape, name in shapes:
        kind = getattr(torch, name)
        if kind == torch.bfloat16 and dtype != torch.bfloat16 and device.type == "cuda":
            kind = torch.float16  # a card that does not compute in bf16
        yield lambda shape=shape, kind=kind: _dequantize(shape, kind, device, unsloth)  # type: ignore[misc]


def _dequantize(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, unsloth: bool) -> Comparison:
    import bitsandbytes.functional as functional

    packed, state = random_nf4_weight(shape, dtype, device, _generator(device))
    kernel = _ours("nf4", "dequantize_nf4")
    functions: dict[str, Callable[[], Any]] = {OURS: lambda: kernel(packed, state)}
    absent: dict[str, str] = {}
    if unsloth:
        _with_unsloth(functions, absent, "fast_dequantize", lambda fast: lambda: fast(packed, state))
    else:
        functions["bitsandbytes"] = lambda: functional.dequantize_4bit(packed, state)
    elements = shape[0] * shape[1]
    return Comparison(
        family="dequantize",
        case=f"{shape[0]}x{shape[1]} {_name(dtype)}",
        functions=functions,
        reference=lambda: functional.dequantize_4bit(packed, state),
        tolerance=0.0,
        bytes_moved=elements * (NF4_BYTES + dtype.itemsize),
        flops=0.0,
        absent=absent,
    )


def _with_unsloth(
    functions: dict[str, Callable[[], Any]],
    absent: dict[str, str],
    name: str,
    make: Callable[[Callable[..., Any]], Callable[[], Any]],
) -> None:
    try:
        # Through the engine, which alone imports unsloth and keeps its compile cache out of the current folder.
        import_module("fastprice.engines.unsloth")
        functions["unsloth"] = make(getattr(import_module("unsloth.kernels.utils"), name))
    except Exception as error:  # whatever it raises on this machine, the row says so
        absent["unsloth"] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:300]


def _lora_cases(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, unsloth: bool
) -> Iterator[Callable[[], Comparison]]:
    layers = shape_of(model).linear_layers()
    for layer in ("down_proj", "q_proj"):
        for backward in (False, True):
            if unsloth and backward:
                continue  # its backward lives in whole layers; the training steps compare those
            yield lambda layer=layer, backward=backward: _lora_linear(  # type: ignore[misc]
                f"{model} {layer}", layers[layer], tokens, device, dtype, backward, unsloth
            )


def _lora_linear(
    name: str,
    shape: tuple[int, int],
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    backward: bool,
    unsloth: bool,
    rank: int = 16,
) -> Comparison:
    part = _lora_layer(shape, rank, dtype, device)
    x, dy = _inputs(tokens, shape[1], shape[0], dtype, device)
    linear = _ours("lora", "lora_linear")

    def ours(augmented: bool) -> Callable[[Tensor], Tensor]:
        return lambda x: linear(x, part.packed, part.a, part.b, 2.0, quant_state=part.state, augmented=augmented)

    def truth(x: Tensor) -> Tensor:
        reference = _ours("reference_lora", "lora_linear")
        return reference(x.float(), part.dense.float(), part.a, part.b, 2.0)  # type: ignore[no-any-return]

    functions: dict[str, Callable[[], Any]] = {
        OURS: _run(ours(False), x, [part.a, part.b], dy, backward),
        "fastprice augmented": _run(ours(True), x, [part.a, part.b], dy, backward),
    }
    absent: dict[str, str] = {}
    if unsloth:
        a, b = part.a.detach().to(dtype), part.b.detach().to(dtype)
        flat = x.detach()
        _with_unsloth(
            functions,
            absent,
            "matmul_lora",
            lambda product: lambda: product(flat, part.packed.t(), part.state, a, b, 2.0),
        )
    else:
        stock, adapter = _peft_linear(part, shape, rank, dtype)
        functions["peft"] = _run(stock, x, adapter, dy, backward)
    n, k = shape
    products = 2.0 * tokens * n * k + 2.0 * tokens * rank * (n + k)
    flops = products + (2.0 * tokens * n * k + 4.0 * tokens * rank * (n + k) if backward else 0.0)
    passes = 3 if backward else 1
    return Comparison(
        family="lora_linear",
        case=f"{name} {n}x{k}, {tokens} tokens, r={rank}, {'forward and backward' if backward else 'forward'}",
        functions=functions,
        reference=_run(truth, x, [part.a, part.b], dy, backward),
        tolerance=2 * _BANDS[dtype],
        bytes_moved=passes * (n * k * NF4_BYTES + tokens * (n + k) * dtype.itemsize),
        flops=flops,
        absent=absent,
    )


def _mlp_cases(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, unsloth: bool
) -> Iterator[Callable[[], Comparison]]:
    if not unsloth:
        for backward in (True, False):
            yield lambda backward=backward: _lora_mlp(model, tokens, device, dtype, backward)  # type: ignore[misc]


def _lora_mlp(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, backward: bool, rank: int = 16
) -> Comparison:
    shapes = shape_of(model).linear_layers()
    names = ("gate_proj", "up_proj", "down_proj")
    parts = [_lora_layer(shapes[name], rank, dtype, device) for name in names]
    width = shape_of(model).hidden
    x, dy = _inputs(tokens, width, width, dtype, device)
    trained = [each for part in parts for each in (part.a, part.b)]
    mlp, projection = _ours("lora", "lora_mlp"), _ours("lora", "Projection")

    def ours(x: Tensor) -> Tensor:
        three = [projection(part.packed, part.a, part.b, 2.0, None, part.state) for part in parts]
        return mlp(x, *three)  # type: ignore[no-any-return]

    def truth(x: Tensor) -> Tensor:
        reference = _ours("reference_lora", "lora_mlp")
        return reference(x.float(), *[(p.dense.float(), p.a, p.b, 2.0) for p in parts], "silu")  # type: ignore[no-any-return]

    stock = [_peft_linear(part, shapes[name], rank, dtype) for part, name in zip(parts, names, strict=True)]

    def peft(x: Tensor) -> Tensor:
        gate, up, down = (layer for layer, _ in stock)
        return down(F.silu(gate(x)) * up(x))

    adapter = [parameter for _, pair in stock for parameter in pair]
    weights = sum(n * k for n, k in (shapes[name] for name in names))
    around = sum(n + k for n, k in (shapes[name] for name in names))
    flops = 2.0 * tokens * weights + 2.0 * tokens * rank * around
    return Comparison(
        family="lora_mlp",
        case=f"{model}, {tokens} tokens, r={rank}, {'forward and backward' if backward else 'forward'}",
        functions={
            OURS: _run(ours, x, trained, dy, backward),
            "peft": _run(peft, x, adapter, dy, backward),
        },
        reference=_run(truth, x, trained, dy, backward),
        tolerance=3 * _BANDS[dtype],
        bytes_moved=(3 if backward else 1) * (weights * NF4_BYTES + tokens * around * dtype.itemsize),
        flops=flops + (2.0 * tokens * weights + 4.0 * tokens * rank * around if backward else 0.0),
    )


def _head_cases(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, unsloth: bool
) -> Iterator[Callable[[], Comparison]]:
    if not unsloth:
        for share in (0.02, 1.0):
            yield lambda share=share: _loss_head(model, tokens, share, device, dtype)  # type: ignore[misc]


def _loss_head(model: str, tokens: int, share: float, device: torch.device, dtype: torch.dtype) -> Comparison:
    """Loss and the gradient of the hidden states, from `share` of the positions labelled."""
    shape = shape_of(model)
    generator = _generator(device)
    hidden = torch.randn(1, tokens, shape.hidden, device=device, dtype=dtype, generator=generator, requires_grad=True)
    weight = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype, generator=generator) * 0.02
    labels = torch.randint(0, shape.vocabulary, (1, tokens), device=device, generator=generator)
    # Position 0 is never predicted; at least one other carries a label.
    kept = torch.randperm(tokens - 1, device=device, generator=generator)[: max(1, round(share * tokens))] + 1
    labels = torch.full_like(labels, IGNORE).index_copy_(1, kept, labels[:, kept])
    kernel = _ours("loss_head", "completion_cross_entropy")
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)[0]

    def run(loss: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def both() -> tuple[Tensor, Tensor]:
            value = loss(hidden)
            return value.reshape(1), torch.autograd.grad(value, hidden)[0]

        return both

    def full(hidden: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden[0], weight).float(), shifted, ignore_index=IGNORE)

    functions: dict[str, Callable[[], Any]] = {
        OURS: run(lambda hidden: kernel(hidden, weight, labels)),
        "full logits": run(full),
    }
    absent: dict[str, str] = {}
    try:
        from trl.trainer.sft_trainer import _chunked_cross_entropy_loss

        functions["trl chunked"] = run(
            lambda hidden: _chunked_cross_entropy_loss(hidden, weight, 256, labels=labels)[0]
        )
    except ImportError as error:
        absent["trl chunked"] = str(error)
    if device.type == "cuda":
        try:
            liger_module = import_module("liger_kernel.transformers.fused_linear_cross_entropy")
            liger = liger_module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)
            functions["liger"] = run(lambda hidden: liger(weight, hidden[0], shifted))
        except ImportError as error:
            absent["liger"] = str(error)
        compiled = torch.compile(full)
        functions["torch.compile, full logits"] = run(compiled)
    else:
        absent["liger"] = "needs a CUDA device"
        absent["torch.compile, full logits"] = "left out on a CPU: compiling takes longer than all the rest"
    labelled = int((shifted != IGNORE).sum())
    return Comparison(
        family="loss_head",
        case=f"{model}, {tokens} tokens, {share:.0%} labelled",
        functions=functions,
        reference=run(full) if dtype == torch.float32 else _head_truth(hidden, weight, shifted),
        tolerance=2 * _BANDS[dtype],
        bytes_moved=2.0 * (weight.numel() + labelled * shape.hidden) * dtype.itemsize,
        flops=4.0 * labelled * weight.numel(),
        absent=absent,
    )


def _head_truth(hidden: Tensor, weight: Tensor, shifted: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same in fp32, a few hundred positions at a time: full logits in fp32 may not fit."""

    def both() -> tuple[Tensor, Tensor]:
        rows = (shifted != IGNORE).nonzero()[:, 0]
        wide = weight.float()
        total = torch.zeros((), device=weight.device)
        gradient = torch.zeros_like(hidden)
        for chunk in rows.split(256):
            leaf = hidden.detach()[0, chunk].float().requires_grad_()
            loss = F.cross_entropy(F.linear(leaf, wide), shifted[chunk], reduction="sum") / len(rows)
            gradient[0, chunk] = torch.autograd.grad(loss, leaf)[0].to(hidden.dtype)
            total += loss.detach()
        return total.reshape(1), gradient

    return both


def _small_cases(
    model: str, tokens: int, device: torch.device, dtype: torch.dtype, unsloth: bool
) -> Iterator[Callable[[], Comparison]]:
    if not unsloth:
        shape = shape_of(model).linear_layers()["down_proj"]
        for rows in _ROWS:
            yield lambda rows=rows: _small_matmul(rows, shape, device, dtype)  # type: ignore[misc]


def _small_matmul(rows: int, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Comparison:
    import bitsandbytes

    packed, state = random_nf4_weight(shape, dtype, device, _generator(device))
    x = torch.randn(rows, shape[1], device=device, dtype=dtype, generator=_generator(device))
    dense = bitsandbytes.functional.dequantize_4bit(packed, state)
    kernel = _ours("decode", "nf4_matmul_small")
    # "auto" would hand the work to bitsandbytes where this kernel has not been shown to be faster.
    backend = "triton" if device.type == "cuda" else "auto"
    return Comparison(
        family="small_matmul",
        case=f"{rows} rows, {shape[0]}x{shape[1]} {_name(dtype)}",
        functions={
            OURS: lambda: kernel(x, packed, state, backend=backend),
            "bitsandbytes": lambda: bitsandbytes.matmul_4bit(x, packed, state),
        },
        reference=lambda: F.linear(x.float(), dense.float()),
        tolerance=2 * _BANDS[dtype],
        bytes_moved=shape[0] * shape[1] * NF4_BYTES + rows * sum(shape) * dtype.itemsize,
        flops=2.0 * rows * shape[0] * shape[1],
    )


def _lora_layer(shape: tuple[int, int], rank: int, dtype: torch.dtype, device: torch.device) -> SimpleNamespace:
    """A frozen weight, packed and dense, with an adapter in fp32, as training keeps it."""
    import bitsandbytes.functional as functional

    generator = _generator(device)
    packed, state = random_nf4_weight(shape, dtype, device, generator)
    n, k = shape
    a = torch.randn(rank, k, device=device, generator=generator) / math.sqrt(k)
    b = torch.randn(n, rank, device=device, generator=generator) / math.sqrt(rank)
    return SimpleNamespace(
        packed=packed,
        state=state,
        dense=functional.dequantize_4bit(packed, state),
        a=a.requires_grad_(),
        b=b.requires_grad_(),
    )


def _inputs(tokens: int, width: int, out: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = _generator(device)
    x = torch.randn(tokens, width, device=device, dtype=dtype, generator=generator, requires_grad=True)
    return x, torch.randn(tokens, out, device=device, dtype=dtype, generator=generator)


def _run(
    layer: Callable[[Tensor], Tensor], x: Tensor, trained: Sequence[Tensor], dy: Tensor, backward: bool
) -> Callable[[], Any]:
    """The forward pass alone, without a graph; or forward and backward: output and all gradients."""
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return forward

    def both() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *trained], dy.to(y.dtype))]

    return both


def _peft_linear(
    part: SimpleNamespace, shape: tuple[int, int], rank: int, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """PEFT's own LoRA layer over bitsandbytes' own linear layer, under autocast, and its A and B."""
    import bitsandbytes
    from peft import LoraConfig, inject_adapter_in_model

    n, k = shape
    linear = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    linear.weight = bitsandbytes.nn.Params4bit(
        part.packed, requires_grad=False, quant_state=part.state, quant_type="nf4", module=linear, bnb_quantized=True
    )
    linear.quant_state = part.state
    linear.support_avx512bf16_for_cpu = False
    holder: Any = torch.nn.ModuleDict({"proj": linear})
    holder.is_loaded_in_4bit = True  # what PEFT goes by
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["proj"]), holder)
    layer = holder["proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(part.a)
        b.copy_(part.b)
    device = part.packed.device.type

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            return layer(x)  # type: ignore[no-any-return]

    return forward, [a, b]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
