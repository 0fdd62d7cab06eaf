"""Models of a real shape with random NF4 weights, made on the device that runs them: no download, no 16-bit copy.

A weight is drawn directly in bitsandbytes' packed form (random bytes, random 8-bit scales), so that Llama-3.1-70B takes
35 GB and seconds instead of 141 GB and a quantization. `save_model` writes such a model as a folder that transformers
and Unsloth load as they load any pre-quantized one: every peer then trains the same weights.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprice.benchmarking.workload import model_settings

__all__ = ["model_config", "random_nf4_model", "random_nf4_weight", "save_model", "seed_adapters"]

_BLOCK, _NESTED_BLOCK = 64, 256  # bitsandbytes' defaults, as transformers and Unsloth use them
_NF4_RMS = 0.57  # root mean square of the sixteen NF4 values, all equally likely


def model_config(model: str, layers: int | None = None) -> Any:
    """The transformers configuration of a name of `workload.MODELS`, with the nano tokenizer's special tokens.

    layers: in place of the model's own number. Raises ConfigError for an unknown name.
    """
    from transformers import AutoConfig

    from fastprice.models.base_models import load_tokenizer

    settings = model_settings(model)
    tokenizer = load_tokenizer("nano")
    if layers is not None:
        settings["num_hidden_layers"] = layers
    return AutoConfig.for_model(
        settings.pop("model_type"),
        **settings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def random_nf4_weight(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> tuple[Tensor, Any]:
    """A random weight (N, K) as bitsandbytes holds it: packed bytes (N * K / 2, 1), its nested quant state.

    Its values have mean about 0 and a standard deviation near 0.6 / sqrt(K), so that activations keep their size
    through any number of layers.
    """
    from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type

    n, k = shape
    blocks = n * k // _BLOCK
    nested_blocks = -(-blocks // _NESTED_BLOCK)
    scale = 0.6 / (_NF4_RMS * math.sqrt(k))

    def draw_bytes(count: int) -> Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, device=device, generator=generator)

    inner = QuantState(
        absmax=torch.full((nested_blocks,), 0.2 * scale, device=device),
        code=create_dynamic_map().to(device),
        blocksize=_NESTED_BLOCK,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=draw_bytes(blocks),
        shape=torch.Size(shape),
        code=get_4bit_type("nf4", device=device),
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.tensor(scale, device=device),
        state2=inner,
    )
    return draw_bytes(n * k // 2)[:, None], state


def random_nf4_model(config: Any, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Any:
    """The transformers model of `config` on `device`: linear layers of its blocks in NF4, all else in `dtype`.

    No tensor larger than one weight exists beside the model itself. It has the marks of a pre-quantized one
    (`is_loaded_in_4bit`, `config.quantization_config`), so PEFT and TRL treat it as one. RuntimeError for a kind of
    model that has other tensors than weights and rotary frequencies.
    """
    import bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _nf4_linear(bitsandbytes, module, dtype, device, generator))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            fill = torch.empty(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim == 1 and name.endswith("weight"):
                fill.fill_(1.0)  # norms
            elif parameter.ndim == 1:
                fill.zero_()  # biases
            else:
                fill.normal_(0.0, 0.02, generator=generator)  # transformers' initializer_range
            _set_parameter(model, name, fill)
    model.tie_weights()
    # Rotary frequencies are computed, not drawn: computed again off the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model.is_loaded_in_4bit = model.is_quantized = True
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise RuntimeError(f"{type(model).__name__} has tensors that were not drawn: {', '.join(left[:5])}")
    return model.eval().requires_grad_(False)


def save_model(model: Any, folder: Path) -> Path:
    """Writes `model` with the nano tokenizer as a pre-quantized transformers folder; returns the folder."""
    from safetensors.torch import save_file

    from fastprice.models.base_models import load_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = model.config.quantization_config.to_dict()
    (folder / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
    model.generation_config.save_pretrained(folder)
    load_tokenizer("nano").save_pretrained(folder)
    return folder


def seed_adapters(model: Any, seed: int = 0, *, zero_b: bool = False) -> int:
    """Fills every LoRA A and B of `model` from `seed` and the parameter's name; returns how many were filled.

    Engines draw A differently and leave B at zero, where A's gradient is zero too. With the same small values
    everywhere, losses and gradient norms of two engines can be compared. zero_b: B stays zero, as a training begins.
    """
    filled = 0
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            # Wrappers add prefixes; the layer's own path starts at "layers.".
            own = name[name.index("layers.") :]
            generator = torch.Generator().manual_seed(_seed_of(own, seed))
            values = torch.randn(parameter.shape, generator=generator) * (0.3 / math.sqrt(parameter.shape[1]))
            with torch.no_grad():
                parameter.copy_(values)
                if zero_b and "lora_B" in name:
                    parameter.zero_()
            filled += 1
    return filled


def _seed_of(name: str, seed: int) -> int:
    """A number of 32 bits from a name and a seed, the same in every process."""
    return zlib.crc32(f"{seed}:{name}".encode())


def _nf4_linear(
    bitsandbytes: Any,
    linear: torch.nn.Linear,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
) -> Any:
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    packed, state = random_nf4_weight((linear.out_features, linear.in_features), dtype, device, generator)
    layer.weight = bitsandbytes.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=_BLOCK,
        compress_statistics=True,
        quant_type="nf4",
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    # bitsandbytes would repack the weights in place on some CPUs; see fastprice.models.peft_engine.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _set_parameter(model: torch.nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False))
