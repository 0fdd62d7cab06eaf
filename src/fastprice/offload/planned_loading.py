"""Loads a base within a limit of GPU memory: planned from its configuration, then loaded as the plan says."""

from __future__ import annotations

from dataclasses import dataclass

from fastprice.errors import ConfigError
from fastprice.memory.estimate import DEVICE_BUFFERS
from fastprice.memory.planner import MIN_TOKENS, MemoryPlan, plan_memory
from fastprice.models.adapters import Method
from fastprice.models.base_models import load_config
from fastprice.models.engine import Engine, LoadedModel
from fastprice.offload.layer_offload import LayerOffload
from fastprice.offload.nf4_loading import load_with_offload

__all__ = ["PlannedModel", "load_planned"]


@dataclass(frozen=True)
class PlannedModel:
    """A loaded base, the plan it follows, and the offload of its layers (None if all are resident)."""

    loaded: LoadedModel
    plan: MemoryPlan
    layer_offload: LayerOffload | None


def load_planned(
    base: str,
    max_memory: str | int,
    engine: Engine,
    *,
    method: Method,
    rank: int,
    pack_tokens: int,
    max_tokens: int,
    kernels: bool,
) -> PlannedModel:
    """Loads `base` within `max_memory` ("24GiB" or bytes); offloads layers only if recomputation is not enough.

    pack_tokens   tokens of a micro-batch to aim at; the plan's `tokens` are that or fewer
    max_tokens    tokens of the longest text with its prompt, which every micro-batch must hold
    kernels       whether training runs on fastprice_kernels

    Raises ConfigError if nothing fits, or only with layers on the host, which the engine does not have;
    BaseModelError for a base that cannot be read.
    """
    plan = plan_memory(
        load_config(base),
        max_memory,
        method=method,
        rank=rank,
        tokens=pack_tokens,
        min_tokens=max(MIN_TOKENS, max_tokens),
        engine="fastprice" if kernels else "peft",
        layer_offload=True,
    )
    if not plan.offloaded_layers:
        return PlannedModel(engine.load_base(base, method=method, max_tokens=max_tokens), plan, None)
    reason = engine.unsupported("layers on the host")
    if reason is not None:
        raise ConfigError(
            f"max_memory: {plan.offloaded_layers} layers of {base!r} must be on the host, and the {engine.name} "
            f"engine has no layers on the host: {reason}; use engine='peft'"
        )
    loaded, layer_offload = load_with_offload(base, plan.offloaded_layers, device_buffers=DEVICE_BUFFERS)
    return PlannedModel(loaded, plan, layer_offload)
