"""The Unsloth engine: its patched models, its checkpointing, its fused LoRA. The only module that imports unsloth.

Unsloth patches trl, transformers and peft when it is imported, and must be imported before them. `fastprice` imports
those lazily, after `choose_engine`, so it is. `REQUIRED` lists every Unsloth name used here with the parameters passed:
a contract test checks them on machines without a GPU, where no model can be loaded.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

# By default Unsloth writes its compile cache into the current folder.
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", os.path.join(tempfile.gettempdir(), "fastprice-unsloth-cache"))

import unsloth  # noqa: F401  (first, before anything that it patches)
from unsloth import FastLanguageModel

from fastprice.errors import ConfigError
from fastprice.models.adapters import Method
from fastprice.models.base_models import base_error, load_tokenizer, resolve_base
from fastprice.models.engine import LoadedModel
from fastprice.models.families import lora_targets
from fastprice.prompts.packing import PackCollator

__all__ = ["REQUIRED", "UnslothEngine"]

REQUIRED: dict[str, tuple[str, ...]] = {
    "from_pretrained": ("model_name", "max_seq_length", "dtype", "load_in_4bit", "use_gradient_checkpointing"),
    "get_peft_model": (
        "model", "r", "target_modules", "lora_alpha", "lora_dropout", "bias", "use_gradient_checkpointing",
        "random_state", "max_seq_length",
    ),
    "for_inference": ("model",),
    "for_training": ("model",),
}  # fmt: skip


class UnslothEngine:
    """See `fastprice.models.engine.Engine`."""

    name = "unsloth"
    # Its inference path builds its own masks and was never seen to take a mask for each token. The merged decoder does.
    takes_masks = False

    def load_base(self, base: str, *, method: Method, max_tokens: int) -> LoadedModel:
        if method == "full":
            raise ConfigError("method: 'full' trains every weight, which the unsloth engine here does not; use 'peft'")
        folder = resolve_base(base)
        try:
            model, _ = FastLanguageModel.from_pretrained(
                model_name=folder,
                max_seq_length=max_tokens,
                dtype=None,
                load_in_4bit=method == "qlora",
                use_gradient_checkpointing="unsloth",
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise base_error(base, "weights", error) from error
        self._max_tokens = max_tokens
        # Unsloth may swap the tokenizer's special tokens; prompts must be tokenized alike on every engine.
        return LoadedModel(model, load_tokenizer(base), folder)

    def attach(self, model: Any, *, method: Method, rank: int, alpha: float, dropout: float, seed: int) -> Any:
        return FastLanguageModel.get_peft_model(
            model,
            r=rank,
            target_modules=lora_targets(model),
            lora_alpha=alpha,
            lora_dropout=dropout,
            bias="none",
            use_gradient_checkpointing="unsloth",
            random_state=seed,
            max_seq_length=self._max_tokens,
        )

    def attach_saved(self, model: Any, folder: str) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder)

    def for_training(self, model: Any) -> None:
        FastLanguageModel.for_training(model)

    def for_prediction(self, model: Any) -> None:
        FastLanguageModel.for_inference(model)

    def collator(self) -> PackCollator:
        return PackCollator(lengths_key="packed_seq_lengths", as_tensor=True)
