"""Fine-tuning methods: which weights train, and in what precision the frozen ones are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from fastprice.errors import ConfigError, nearest_name
from fastprice.models.families import LLAMA_LINEARS

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["METHODS", "Method", "check_method", "lora_config", "suggested_learning_rate"]

Method = Literal["qlora", "lora", "full"]
METHODS: tuple[Method, ...] = get_args(Method)

HIGHEST_RATE = 1.5e-3


def check_method(method: str) -> Method:
    """`method` itself when it is known; else ConfigError with the nearest name."""
    for known in METHODS:
        if method == known:
            return known
    raise ConfigError(f"method: {method!r} is not one of {', '.join(METHODS)}{nearest_name(method, METHODS)}")


def lora_config(*, rank: int, alpha: float, dropout: float, targets: Sequence[str] = LLAMA_LINEARS) -> LoraConfig:
    """The PEFT configuration of LoRA adapters (Hu et al., 2021) on the linear layers named `targets`.

    `fastprice.models.families.lora_targets` names those of a model.
    """
    from peft import LoraConfig

    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": list(targets),
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**settings)


def suggested_learning_rate(hidden_size: int, method: Method) -> float:
    """Peak learning rate for a model of this width.

    For adapters, the fit over 14 Llama and Qwen models of Thinking Machines, "LoRA Without Regret" (2025), Llama's
    exponent: 5e-4 x (2000 / hidden_size) ** 0.775; a tenth of it when every weight trains, as they found. Held at
    `HIGHEST_RATE` for models narrower than any of theirs, where the fit asks too much (docs/LOG.md).
    """
    adapter_rate: float = min(5e-4 * (2000 / hidden_size) ** 0.775, HIGHEST_RATE)
    return adapter_rate if method != "full" else adapter_rate / 10
