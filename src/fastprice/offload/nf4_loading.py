"""Loading a base in NF4 without ever holding it in 16 bits: tensor by tensor from mapped safetensors files.

The weights are, bit for bit, those of transformers' `load_in_4bit` (NF4, double quantization; Dettmers et al., "QLoRA",
2023), which is what the quantizing operator of bitsandbytes makes of them piece by piece: blocks of 64 weights know
nothing of each other, and the statistics are quantized once all are there. The host holds at most the model in NF4 and
the file that is being read. A base that is in NF4 already is read as it is.
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
from fastprice.models.peft_engine import compute_dtype, settle_four_bit
from fastprice.offload.host_embedding import has_own_table
from fastprice.offload.host_layer import HostLayer, decoder_layers, frozen_linears
from fastprice.offload.layer_offload import Streaming, spread
from fastprice.offload.transfers import Boundary, boundary_for
from fastprice.offload.weight_files import Checkpoint, opened

__all__ = ["load_nf4", "load_streamed", "nf4_weights", "own_copy", "skeleton"]

BLOCK = 64
_PIECE = {"cpu": 1 << 18, "cuda": 1 << 27}  # weights quantized at once: bitsandbytes' CPU form takes 20 bytes for each


def load_streamed(base: str, streamed_layers: int | Sequence[int], *, slots: int = 2) -> tuple[LoadedModel, Streaming]:
    """`base` in NF4 on this machine's device, with so many (or those) decoder layers streamed from the host.

    The streamed layers' weights never lie on the device as a whole. An embedding with a table of its own stays on the
    host too. The caller closes the Streaming. Raises BaseModelError, ConfigError.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    tokenizer, boundary = load_tokenizer(base), boundary_for(device)
    model, hosts = load_nf4(base, dtype=compute_dtype(), streamed=streamed_layers, boundary=boundary)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    streaming = Streaming(model, hosts, slots=slots, boundary=boundary, host_embedding=has_own_table(model))
    return LoadedModel(model, tokenizer, resolve_base(base)), streaming


def load_nf4(
    base: str, *, dtype: torch.dtype, boundary: Boundary, streamed: int | Sequence[int] = ()
) -> tuple[Any, dict[int, HostLayer]]:
    """The causal model of `base`, its linear layers in NF4, all else in `dtype`; and its layers to be streamed.

    Args:
        base: a folder, a hub id, or "nano"; in 16 or 32 bits, or in bitsandbytes' NF4.
        dtype: in which the 4-bit layers compute, too.
        boundary: its device holds the model, its host memory the streamed layers.
        streamed: how many decoder layers (see `fastprice.offload.spread`), or which.

    Raises BaseModelError for tensors that are missing or of the wrong shape and for damaged files, ConfigError for a
    base quantized in another way. Warns of tensors that the model has no use for.
    """
    model, quantizer = skeleton(base, dtype)
    layers = decoder_layers(model)
    chosen = spread(len(layers), streamed) if isinstance(streamed, int) else list(streamed)
    owner = {id(linear): index for index in chosen for linear in frozen_linears(layers[index])}
    left = Counter(owner.values())
    on_host = model.get_input_embeddings() if chosen and has_own_table(model) else None
    hosts: dict[int, HostLayer] = {}
    for name, value in nf4_weights(model, base, dtype=dtype, device=boundary.device):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        index = owner.get(id(module)) if leaf == "weight" else None
        stays = index is not None or module is on_host
        _place(module, leaf, value, dtype, torch.device("cpu") if stays else boundary.device)
        del value  # else its file stays mapped while the next one is read
        if index is not None:
            left[index] -= 1
            if not left[index]:
                hosts[index] = HostLayer(layers[index], boundary, f"layer {index}")
                _return_freed()
    for path, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                if buffer.is_meta:
                    raise BaseModelError(f"base: {base!r} has no {path}.{leaf}, and nothing says how to make one")
                module._buffers[leaf] = buffer.to(boundary.device)
    model.tie_weights()
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    settle_four_bit(model, dtype)
    return model.eval().requires_grad_(False), hosts


def skeleton(base: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model of `base` without memory for its weights, 4-bit layers in place, and transformers' quantizer for it."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
    from transformers.quantizers import AutoHfQuantizer

    config = load_config(base)
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        kind = settings.get("quant_method"), settings.get("load_in_4bit"), settings.get("bnb_4bit_quant_type")
        if kind != ("bitsandbytes", True, "nf4"):
            raise ConfigError(
                f"base: {base!r} is quantized by {kind[0]} in another way than 4-bit NF4; give the base in 16 bits"
            )
    asked = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except (ValueError, KeyError) as error:
        raise BaseModelError(f"base: {base!r} is no causal language model that transformers knows ({error})") from error
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        raise ConfigError(f"base: a {type(model).__name__} keeps parts in fp32, which this way of loading does not")
    quantizer = AutoHfQuantizer.from_config(settings or asked, pre_quantized=settings is not None)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map=None)
    folder = resolve_base(base)
    model.config.name_or_path = model.name_or_path = folder
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:  # most models that were never chat models have none
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return model, quantizer


def nf4_weights(model: Any, base: str, *, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Any]]:
    """(name, value) of every weight of a `skeleton`, in the order of the files: a Params4bit for a 4-bit layer, made or
    read on `device`; else a tensor that may be a view of the file, in the file's dtype. A value is gone, or its file
    stays mapped, when the next one is asked for: copy what is to stay."""
    from bitsandbytes.nn import Linear4bit

    checkpoint = Checkpoint(base)
    linears = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    expected = {name: tensor.shape for name, tensor in model.named_parameters(remove_duplicate=False)}
    expected |= {name: tensor.shape for name, tensor in model.named_buffers() if _is_saved(model, name)}
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    missing, unused = expected.keys() - checkpoint.where.keys() - tied, []
    if missing:
        raise BaseModelError(f"base: {base!r} lacks {_some(missing)}, so it is no whole {type(model).__name__}")
    with _progress(checkpoint.size, f"reading {base}") as advance:
        for path in checkpoint.files:
            with opened(path) as shard:
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
                        yield name, _read(linear, name, tensor, checkpoint, device)
                    else:
                        _check_shape(name, tensor, torch.Size([linear.out_features, linear.in_features]))
                        yield name, _quantized(linear, tensor, dtype, device)
                    del tensor
    if unused:
        warnings.warn(f"{base} holds {_some(unused)}, which a {type(model).__name__} has no use for", stacklevel=2)


def _quantized(linear: nn.Module, weight: Tensor, dtype: torch.dtype, device: torch.device) -> Any:
    """`weight` (out, in) as it would be cast to `dtype` and then quantized by bitsandbytes, piece by piece."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    flat = weight.reshape(-1)
    count = flat.numel()
    packed = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-count // BLOCK), dtype=torch.float32, device=device)
    size = _PIECE[device.type]
    for start in range(0, count, size):
        piece = flat[start : start + size].to(device, dtype)
        codes, largest = torch.ops.bitsandbytes.quantize_4bit.default(piece, BLOCK, "nf4", torch.uint8)
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


def _read(linear: Any, name: str, packed: Tensor, checkpoint: Checkpoint, device: torch.device) -> Any:
    """A weight that is in NF4 already; its statistics may lie in another file."""
    from bitsandbytes.functional import QuantState

    count = linear.out_features * linear.in_features
    _check_shape(name, packed, torch.Size([-(-count // 2), 1]))
    parts: dict[str, Tensor] = {}
    for part in sorted(each for each in checkpoint.where if each.startswith(f"{name}.")):
        with opened(checkpoint.where[part]) as shard:
            parts[part.removeprefix(f"{name}.")] = own_copy(shard.get_tensor(part), None, device)
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
    return _parameter(linear, own_copy(packed, None, device), state)


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


def _place(module: Any, leaf: str, value: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Gives `module` its weight on `device`: a Params4bit as it is, other numbers in `dtype`."""
    if getattr(value, "quant_state", None) is not None:
        if value.device != device:
            value.data = value.data.to(device)
            value.quant_state.to(device)
        module.weight, module.quant_state = value, value.quant_state
        return
    own = own_copy(value, dtype if value.is_floating_point() else None, device)
    setattr(module, leaf, nn.Parameter(own, requires_grad=False) if leaf in module._parameters else own)


def _return_freed() -> None:
    """Has the C library return what was freed to the system: it would keep some 50 MB of a model's small tensors."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if trim is not None:
        trim(0)


def own_copy(tensor: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """A copy in `dtype` (None: its own) that does not keep the file mapped."""
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
    """Whether a tensor that no parameter asks for belongs there: statistics of a 4-bit weight, the second name of a
    tied one, or rotary frequencies, which old checkpoints hold and new models compute."""
    weight, dot, _ = name.partition(".weight.")
    return name in tied or name.endswith("rotary_emb.inv_freq") or (bool(dot) and f"{weight}.weight" in linears)


def _some(names: Any) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 2} more tensors" if len(listed) > 2 else ""
    return ", ".join(listed[:2]) + more


@contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal's standard error, nothing elsewhere; gives the function that adds bytes to it."""
    if not sys.stderr.isatty():  # nor is rich asked for: `python -m benchmarks.gpu` runs without it
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)
