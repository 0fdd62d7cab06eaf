"""The Unsloth engine: its models and fused functions, under fastprice's steps. The only module that imports unsloth.

Unsloth patches trl, transformers and peft when it is imported, and must be imported before them. `fastprice` imports
those lazily, after `choose_engine`, so it is. `REQUIRED` lists every Unsloth name used here with the parameters passed:
a contract test checks them on machines without a GPU, where no model can be loaded.

Models are loaded with Unsloth's checkpointing off: its decoder layers are transformers' own classes with another
forward, so recompute levels hold on them as on any others (fastprice.memory.activation_checkpointing). Unsloth sets
the flags of checkpointing anew whenever it switches between training and inference, which its trainer does by itself;
the levels in force are put back each time. Its attention reads a pack's texts through two functions, found by name in
its modules: for batches of `PackCollator` they run `packed_attention`, and anything else as before.
"""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

# By default Unsloth writes its compile cache into the current folder.
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", os.path.join(tempfile.gettempdir(), "fastprice-unsloth-cache"))

import unsloth  # noqa: F401  (first, before anything that it patches)
from torch import Tensor, nn
from unsloth import FastLanguageModel
from unsloth.utils import attention_dispatch, packing

from fastprice.errors import ConfigError
from fastprice.models.adapters import Method
from fastprice.models.attention_backends import choose_attention
from fastprice.models.base_models import base_error, load_tokenizer, resolve_base
from fastprice.models.engine import LoadedModel
from fastprice.models.engine_features import UNSLOTH_LACKS, Feature, unsloth_lacks_model
from fastprice.models.families import lora_targets
from fastprice.models.packed_attention import packed_attention
from fastprice.models.parts import decoder_layers, plain_model
from fastprice.models.peft_engine import compute_dtype
from fastprice.prompts.packing import PackCollator

__all__ = ["PACKED_FUNCTIONS", "REQUIRED", "UnslothEngine", "read_packs"]

REQUIRED: dict[str, tuple[str, ...]] = {
    "from_pretrained": ("model_name", "max_seq_length", "dtype", "load_in_4bit", "use_gradient_checkpointing"),
    "get_peft_model": (
        "model", "r", "target_modules", "lora_alpha", "lora_dropout", "bias", "use_gradient_checkpointing",
        "random_state", "max_seq_length",
    ),
    "for_inference": ("model",),
    "for_training": ("model", "use_gradient_checkpointing"),
}  # fmt: skip
# The functions of Unsloth's attention that `read_packs` replaces, and their parameters.
PACKED_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "get_packed_info_from_kwargs": ("kwargs", "device"),
    "run_attention": ("config", "context", "Q", "K", "V"),
}
_PACK_ARGUMENTS = ("pack_lengths", "cu_seqlens", "max_seqlen")  # of `packed_attention`, in a batch
_FLAG = "gradient_checkpointing"
_MISSING = object()


class UnslothEngine:
    """See `fastprice.models.engine.Engine`."""

    name = "unsloth"
    # Its inference path builds its own masks and was never seen to take a mask for each token. The merged decoder does.
    takes_masks = False

    def __init__(self) -> None:
        self._training_flags: dict[Any, Any] | None = None  # of the model that is now in prediction

    def unsupported(self, feature: Feature) -> str | None:
        return UNSLOTH_LACKS.get(feature)

    def load_base(self, base: str, *, method: Method, max_tokens: int) -> LoadedModel:
        """The base in NF4 for "qlora", else in 16 bits; ConfigError if its attention does not read packs."""
        folder = resolve_base(base)
        try:
            model, _ = FastLanguageModel.from_pretrained(
                model_name=folder,
                max_seq_length=max_tokens,
                dtype=None,
                load_in_4bit=method == "qlora",
                use_gradient_checkpointing=False,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise base_error(base, "weights", error) from error
        read_packs(model)
        self._max_tokens = max_tokens
        # Unsloth may swap the tokenizer's special tokens; prompts must be tokenized alike on every engine.
        return LoadedModel(model, load_tokenizer(base), folder)

    def attach(self, model: Any, *, method: Method, rank: int, alpha: float, dropout: float, seed: int) -> Any:
        adapted = FastLanguageModel.get_peft_model(
            model,
            r=rank,
            target_modules=lora_targets(model),
            lora_alpha=alpha,
            lora_dropout=dropout,
            bias="none",
            use_gradient_checkpointing=False,
            random_state=seed,
            max_seq_length=self._max_tokens,
        )
        # Unsloth's trainer calls these before its first step and after its last one.
        adapted.for_training = partial(self.for_training, adapted)
        adapted.for_inference = partial(self.for_prediction, adapted)
        return adapted

    def attach_saved(self, model: Any, folder: str) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, folder)

    def for_training(self, model: Any, use_gradient_checkpointing: Any = False) -> None:
        """`use_gradient_checkpointing` is what Unsloth's trainer passes; the flags stay as they were."""
        # Unsloth's generation clears the flags too, so those of before the evaluation count.
        flags = _flags(model) if self._training_flags is None else self._training_flags
        self._training_flags = None
        FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
        _restore(flags)
        choose_attention(next(model.parameters()).device.type, compute_dtype())
        packing.mark_allow_overlength(model)  # a pack is longer than any of its texts

    def for_prediction(self, model: Any) -> None:
        if model.training:
            self._training_flags = _flags(model)
        FastLanguageModel.for_inference(model)

    def collator(self) -> PackCollator:
        return PackCollator()


def read_packs(model: Any) -> None:
    """Makes Unsloth's attention take the texts of a pack as `PackCollator` gives them, for the whole process.

    Raises ConfigError if the attention of `model` does not call `PACKED_FUNCTIONS` for every pack.
    """
    ours = _replace_packed_functions()
    reason = unsloth_lacks_model(plain_model(model).config.model_type)
    for layer in decoder_layers(model) if reason is None else ():
        attention: Any = getattr(layer, "self_attn", None)
        code = getattr(inspect.unwrap(type(attention).forward), "__globals__", {})
        if any(code.get(name) is not function for name, function in ours.items()):
            reason = f"the attention of Unsloth's {type(layer).__name__} does not call {' and '.join(ours)}"
    if reason is not None:
        raise ConfigError(f"engine: 'unsloth' has no packs for this base: {reason}; use engine='peft'")


@dataclass(frozen=True)
class _Pack:
    """Stands for Unsloth's description of a pack: the arguments of `packed_attention` that describe it."""

    arguments: dict[str, Any]


@cache
def _replace_packed_functions() -> dict[str, Callable[..., Any]]:
    """Replaces `PACKED_FUNCTIONS` in every module of Unsloth's, and returns ours by name."""
    stock = {
        "get_packed_info_from_kwargs": packing.get_packed_info_from_kwargs,
        "run_attention": attention_dispatch.run_attention,
    }
    ours: dict[str, Callable[..., Any]] = {
        "get_packed_info_from_kwargs": partial(_packed_info, stock["get_packed_info_from_kwargs"]),
        "run_attention": partial(_run_attention, stock["run_attention"]),
    }
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("unsloth"):
            for name, function in stock.items():
                if vars(module).get(name) is function:
                    setattr(module, name, ours[name])
    return ours


def _packed_info(stock: Callable[..., Any], kwargs: dict[str, Any], device: Any) -> Any:
    arguments = {name: kwargs[name] for name in _PACK_ARGUMENTS if kwargs.get(name) is not None}
    return _Pack(arguments) if arguments else stock(kwargs, device)


def _run_attention(stock: Callable[..., Any], *, config: Any, context: Any, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """(1, T, H, D) from Q (1, H, T, D) and K, V (1, G, T, D), as Unsloth's own."""
    pack = context.seq_info
    if not isinstance(pack, _Pack):
        result: Tensor = stock(config=config, context=context, Q=Q, K=K, V=V)
        return result
    scaling = (config.flash_varlen_kwargs or {}).get("softmax_scale")
    window = context.sliding_window
    module = nn.Module()  # whose attention it is does not matter
    output, _ = packed_attention(module, Q, K, V, None, scaling=scaling, sliding_window=window, **pack.arguments)
    return output


def _flags(model: Any) -> dict[Any, Any]:
    """The flag of each module that can be checkpointed, as it is set on the module itself."""
    return {module: module.__dict__.get(_FLAG, _MISSING) for module in model.modules() if hasattr(module, _FLAG)}


def _restore(flags: dict[Any, Any]) -> None:
    for module, flag in flags.items():
        module.__dict__.pop(_FLAG, None)
        if flag is not _MISSING:
            module.__dict__[_FLAG] = flag
