"""Loading a base in NF4 without ever holding it in 16 bits: tensor by tensor from mapped safetensors files.

The weights are, bit for bit, those of transformers' `load_in_4bit` (NF4, double quantization; Dettmers et al., "QLoRA",
2023), computed in chunks by the quantization operator of bitsandbytes: blocks of 64 weights are independent of each
other, and the statistics are quantized when all are there. Host memory holds at most the model in NF4 and the file that
is being read. A base that is in NF4 already is read as it is.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprice.errors import BaseModelError, ConfigError
from fastprice.models.base_models import load_config, load_tokenizer, resolve_base
from fastprice.models.engine import LoadedModel
from fastprice.models.parts import decoder_layers
from fastprice.models.peft_engine import compute_dtype, settle_four_bit
from fastprice.offload.device_transfers import DeviceTransfers, transfers_for
from fastprice.offload.host_embedding import has_untied_embedding
from fastprice.offload.host_layer import HostLayer, frozen_linears
from fastprice.offload.layer_offload import LayerOffload, spread_layers
from fastprice.offload.weight_files import Checkpoint, open_safetensors

__all__ = ["copy_unmapped", "empty_model", "iterate_nf4_weights", "load_nf4", "load_with_offload"]

BLOCK = 64
_CHUNK_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 27}  # quantized at once: bitsandbytes needs 20 bytes each on a CPU


def load_with_offload(
    base: str, layers: int | Sequence[int], *, device_buffers: int = 2
) -> tuple[LoadedModel, LayerOffload]:
    """`base` in NF4 on this machine's device, with so many (or those) decoder layers offloaded to the host.

    The offloaded weights are never on the device all at once. An untied embedding stays on the host too. The caller
    closes the LayerOffload. Raises BaseModelError, ConfigError as `load_nf4`.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    tokenizer, transfers = load_tokenizer(base), transfers_for(device)
    model, host_layers = load_nf4(base, dtype=compute_dtype(), offload=layers, transfers=transfers)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    layer_offload = LayerOffload(
        model,
        host_layers,
        device_buffers=device_buffers,
        transfers=transfers,
        host_embedding=has_untied_embedding(model),
    )
    return LoadedModel(model, tokenizer, resolve_base(base)), layer_offload


def load_nf4(
    base: str, *, dtype: torch.dtype, transfers: DeviceTransfers, offload: int | Sequence[int] = ()
) -> tuple[Any, dict[int, HostLayer]]:
    """The causal model of `base` with its linear layers in NF4 and all else in `dtype`, and its offloaded layers.

    Args:
        base: a folder, a hub id, or "nano"; in 16 or 32 bits, or in bitsandbytes' NF4.
        dtype: also that in which the 4-bit layers compute.
        transfers: its device holds the model, its host memory the offloaded layers.
        offload: how many decoder layers (see `fastprice.offload.spread_layers`), or the indices of which.

    Raises BaseModelError for tensors that are missing or of the wrong shape and for damaged files, ConfigError for a
    base quantized in another format. Warns about tensors that the model does not use.
    """
    model, quantizer = empty_model(base, dtype)
    layers = decoder_layers(model)
    offloaded = spread_layers(len(layers), offload) if isinstance(offload, int) else list(offload)
    layer_of = {id(linear): index for index in offloaded for linear in frozen_linears(layers[index])}
    missing = Counter(layer_of.values())  # weights of each offloaded layer that are still to be read
    host_embedding = model.get_input_embeddings() if offloaded and has_untied_embedding(model) else None
    host_layers: dict[int, HostLayer] = {}
    for name, value in iterate_nf4_weights(model, base, dtype=dtype, device=transfers.device):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        index = layer_of.get(id(module)) if leaf == "weight" else None
        on_host = index is not None or module is host_embedding
        _assign(module, leaf, value, dtype, torch.device("cpu") if on_host else transfers.device)
        del value  # otherwise its file stays mapped while the next one is read
        if index is not None:
            missing[index] -= 1
            if not missing[index]:
                host_layers[index] = HostLayer(layers[index], transfers, f"layer {index}")
                _return_freed_memory()
    for path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                if buffer.is_meta:
                    raise BaseModelError(
                        f"base: {base!r} has no {path}.{leaf}, which cannot be computed; give a complete model"
                    )
                module._buffers[leaf] = buffer.to(transfers.device)
    model.tie_weights()
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    settle_four_bit(model, dtype)
    return model.eval().requires_grad_(False), host_layers


def empty_model(base: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model of `base` on the meta device with 4-bit layers in place, and transformers' quantizer for it.

    Raises BaseModelError for a base that is no causal language model, ConfigError for one quantized in another format
    or with parts that must stay in fp32.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
    from transformers.quantizers import AutoHfQuantizer

    config = load_config(base)
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        kind = settings.get("quant_method"), settings.get("load_in_4bit"), settings.get("bnb_4bit_quant_type")
        if kind != ("bitsandbytes", True, "nf4"):
            raise ConfigError(f"base: {base!r} is quantized by {kind[0]}, not in 4-bit NF4; give the base in 16 bits")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except (ValueError, KeyError) as error:
        raise BaseModelError(
            f"base: {base!r} is not a causal language model known to transformers ({error})"
        ) from error
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        raise ConfigError(
            f"base: a {type(model).__name__} has parts that must stay in fp32, which max_memory does not support"
        )
    quantizer = AutoHfQuantizer.from_config(settings or nf4, pre_quantized=settings is not None)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
    folder = resolve_base(base)
    model.config.name_or_path = model.name_or_path = folder
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:  # most base models have none
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return model, quantizer


def iterate_nf4_weights(
    model: Any, base: str, *, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Any]]:
    """(name, value) of every weight of an `empty_model`, in the order of the files.

    The value is a Params4bit on `device` for a 4-bit layer, otherwise a tensor in the file's dtype, which may be a view
    of the file: copy what is needed longer, or the file stays mapped. Raises BaseModelError for missing tensors, wrong
    shapes and damaged files.
    """
    from bitsandbytes.nn import Linear4bit

    checkpoint = Checkpoint(base)
    linears = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    expected = {name: tensor.shape for name, tensor in model.named_parameters(remove_duplicate=False)}
    expected |= {name: tensor.shape for name, tensor in model.named_buffers() if _is_saved(model, name)}
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    missing, unused = expected.keys() - checkpoint.file_of.keys() - tied, []
    if missing:
        raise BaseModelError(f"base: {base!r} lacks {_name_some(missing)}; give a complete {type(model).__name__}")
    with _progress(checkpoint.size, f"reading {base}") as advance:
        for path in checkpoint.files:
            with open_safetensors(path) as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dictionary)
                    linear = linears.get(name)
                    if name not in expected or name in tied:
                        if not _is_known(name, linears, tied):
                            unused.append(name)
                        continue
                    tensor = shard.get_tensor(name)
                    advance(tensor.nbytes)
                    if linear is None:
                        _check_shape(name, tensor, expected[name])
                        yield name, tensor
                    elif tensor.dtype == torch.uint8:
                        yield name, _read_nf4(linear, name, tensor, checkpoint, device)
                    else:
                        _check_shape(name, tensor, torch.Size([linear.out_features, linear.in_features]))
                        yield name, _quantize(linear, tensor, dtype, device)
                    del tensor
    if unused:
        warnings.warn(f"{base} holds {_name_some(unused)}, which a {type(model).__name__} does not use", stacklevel=2)


def _quantize(linear: nn.Module, weight: Tensor, dtype: torch.dtype, device: torch.device) -> Any:
    """`weight` (out, in) cast to `dtype` and quantized as bitsandbytes does, in chunks."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    flat = weight.reshape(-1)
    count = flat.numel()
    packed = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-count // BLOCK), dtype=torch.float32, device=device)
    size = _CHUNK_WEIGHTS[device.type]
    for start in range(0, count, size):
        chunk = flat[start : start + size].to(device, dtype)
        codes, largest = torch.ops.bitsandbytes.quantize_4bit.default(chunk, BLOCK, "nf4", torch.uint8)
        packed[start // 2 : start // 2 + codes.shape[0]] = codes
        absmax[start // BLOCK : start // BLOCK + largest.shape[0]] = largest
    offset = absmax.mean()
    statistics, nested = quantize_blockwise(absmax - offset, blocksize=256)
    state = QuantState(
        absmax=statistics,
        shape=weight.shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=get_4bit_type("nf4", device=device),
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )
    return _parameter(linear, packed, state)


def _read_nf4(linear: Any, name: str, packed: Tensor, checkpoint: Checkpoint, device: torch.device) -> Any:
    """A weight that is in NF4 already; its statistics may lie in another file."""
    from bitsandbytes.functional import QuantState

    count = linear.out_features * linear.in_features
    _check_shape(name, packed, torch.Size([-(-count // 2), 1]))
    parts: dict[str, Tensor] = {}
    for part in sorted(each for each in checkpoint.file_of if each.startswith(f"{name}.")):
        with open_safetensors(checkpoint.file_of[part]) as shard:
            parts[part.removeprefix(f"{name}.")] = copy_unmapped(shard.get_tensor(part), None, device)
    try:
        state = QuantState.from_dict(parts, device=device)
    except (KeyError, ValueError, AssertionError) as error:
        raise BaseModelError(f"base: the statistics of {name} are damaged or incomplete ({error})") from error
    blocks = -(-count // state.blocksize)
    shapes = [(state.absmax.numel(), state.absmax.dtype == torch.uint8)]
    if state.nested:
        shapes.append((state.state2.absmax.numel(), state.nested))
    if shapes != [(blocks, state.nested), (-(-blocks // 256), True)][: len(shapes)] or state.quant_type != "nf4":
        raise BaseModelError(f"base: the statistics of {name} are damaged or incomplete: they do not fit its shape")
    return _parameter(linear, copy_unmapped(packed, None, device), state)


def _parameter(linear: nn.Module, packed: Tensor, state: Any) -> Any:
    from bitsandbytes.nn import Params4bit

    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        module=linear,
        bnb_quantized=True,
    )


def _assign(module: Any, leaf: str, value: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Assigns a weight on `device`: a Params4bit as it is, other floating-point numbers in `dtype`."""
    if getattr(value, "quant_state", None) is not None:
        if value.device != device:
            value.data = value.data.to(device)
            value.quant_state.to(device)
        module.weight, module.quant_state = value, value.quant_state
        return
    copy = copy_unmapped(value, dtype if value.is_floating_point() else None, device)
    setattr(module, leaf, nn.Parameter(copy, requires_grad=False) if leaf in module._parameters else copy)


def _return_freed_memory() -> None:
    """Makes the C library return freed memory to the system: it would hold some 50 MB of a model's small tensors."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if trim is not None:
        trim(0)


def copy_unmapped(tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """A copy in `dtype` (None: its own) and on `device` that does not hold the file mapped."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device).copy_(tensor)


def _check_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise BaseModelError(
            f"base: {name} is {tuple(tensor.shape)} in the file, the configuration says {tuple(shape)}"
        )


def _is_saved(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf not in model.get_submodule(path)._non_persistent_buffers_set


def _is_known(name: str, linears: dict[str, Any], tied: set[str]) -> bool:
    """Whether a tensor without a parameter is expected: statistics of a 4-bit weight, the second name of a tied one, or
    rotary frequencies, which old checkpoints hold and new models compute."""
    weight, dot, _ = name.partition(".weight.")
    return name in tied or name.endswith("rotary_emb.inv_freq") or (bool(dot) and f"{weight}.weight" in linears)


def _name_some(names: Any) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 2} more tensors" if len(listed) > 2 else ""
    return ", ".join(listed[:2]) + more


@contextmanager
def _progress(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """A progress bar if standard error is a terminal; yields the function that adds bytes to it."""
    if not sys.stderr.isatty():  # rich is not imported either: `python -m fastprice.benchmarking` runs without it
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda size: bar.advance(task, size)
