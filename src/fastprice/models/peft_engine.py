"""The stock engine: transformers, bitsandbytes and PEFT. Runs on CUDA and on a CPU."""

from __future__ import annotations

import sys
from typing import Any

import torch

from fastprice.errors import ConfigError
from fastprice.models.adapters import Method, lora_config
from fastprice.models.attention_backends import choose_attention
from fastprice.models.base_models import base_error, load_config, load_tokenizer, resolve_base
from fastprice.models.engine import LoadedModel
from fastprice.models.engine_features import Feature
from fastprice.models.families import lora_targets
from fastprice.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from fastprice.models.parts import plain_model
from fastprice.prompts.packing import PackCollator

__all__ = ["PeftEngine", "compute_dtype", "settle_four_bit"]


class PeftEngine:
    """See `fastprice.models.engine.Engine`."""

    name = "peft"
    takes_masks = True

    def unsupported(self, feature: Feature) -> str | None:
        return None

    def load_base(self, base: str, *, method: Method, max_tokens: int) -> LoadedModel:
        """The base in NF4 with double quantization for "qlora" (Dettmers et al., 2023), else in its compute dtype.

        Compute dtype: bf16 on CUDA cards that have it, fp16 on those that do not, fp32 on a CPU. A base that is in
        4 bits already stays so, for "lora" too; its weights cannot train, so "full" raises ConfigError. So do widths
        that bitsandbytes computes wrongly on this CPU.
        """
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        from transformers.utils import logging

        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        tokenizer = load_tokenizer(base)
        folder = resolve_base(base)
        dtype = compute_dtype()
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
        if torch.cuda.is_available():
            options["device_map"] = {"": torch.cuda.current_device()}
        if method == "qlora" and getattr(load_config(base), "quantization_config", None) is None:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
        except (OSError, ValueError, KeyError) as error:
            raise base_error(base, "weights", error) from error
        if getattr(model, "is_loaded_in_4bit", False):
            if method == "full":
                raise ConfigError(f"method: 'full' trains all weights, those of {base!r} are in 4 bits; use 'qlora'")
            settle_four_bit(model, dtype)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        return LoadedModel(model, tokenizer, folder)

    def attach(self, model: Any, *, method: Method, rank: int, alpha: float, dropout: float, seed: int) -> Any:
        """Fresh adapters in fp32 on every linear layer of the decoder, or every weight trainable for "full"."""
        from transformers import set_seed

        if method == "full":
            return model.requires_grad_(True)
        from peft import get_peft_model

        set_seed(seed)  # adapter weights are drawn here, before the trainer seeds anything
        model.requires_grad_(False)
        return get_peft_model(model, lora_config(rank=rank, alpha=alpha, dropout=dropout, targets=lora_targets(model)))

    def attach_saved(self, model: Any, folder: str) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder)

    def for_training(self, model: Any) -> None:
        choose_attention(next(model.parameters()).device.type, compute_dtype())
        register_packed_attention()
        plain_model(model).set_attn_implementation(PACKED_ATTENTION)
        model.train()

    def for_prediction(self, model: Any) -> None:
        plain_model(model).set_attn_implementation("sdpa")
        model.eval()

    def collator(self) -> PackCollator:
        return PackCollator()


def compute_dtype() -> torch.dtype:
    """bf16 where the CUDA card computes in it, fp16 on older cards, fp32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def settle_four_bit(model: Any, dtype: torch.dtype) -> None:
    """Makes the 4-bit layers of `model` compute in `dtype`, also those of a base that was quantized elsewhere for
    another one, and keeps bitsandbytes from repacking them in place on CPUs with AVX512-BF16.

    It does so at the first forward in eval mode without gradients, and backward then reads the new layout as the old:
    after the first evaluation, training would go on with wrong gradients (bitsandbytes 0.50.2).

    Raises ConfigError where bitsandbytes would compute with wrong weights: on a CPU with AVX-512, layers whose rows are
    a multiple of 16 but not of the quantization block (0.50.2).
    """
    import bitsandbytes

    from fastprice_kernels.patching.cpu_faults import stock_is_exact

    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            columns, blocksize = module.in_features, module.weight.quant_state.blocksize
            if not torch.cuda.is_available() and not stock_is_exact(columns, blocksize):
                raise ConfigError(
                    f"method: on this CPU bitsandbytes computes with wrong weights where rows of 4-bit layers are no "
                    f"multiple of the block of {blocksize}: {name} has rows of {columns}; use method='lora' with a "
                    "base that is not in 4 bits, or a CUDA device"
                )
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = module.weight.quant_state.dtype = dtype
            module.compute_type_is_set = True
