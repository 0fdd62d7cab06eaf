"""A base within a limit of GPU memory: planned from its configuration, then loaded as the plan says."""

from __future__ import annotations

from dataclasses import dataclass

from fastprice.errors import ConfigError
from fastprice.memory.estimate import STREAM_SLOTS
from fastprice.memory.planner import LEAST_TOKENS, Plan, make_plan
from fastprice.models.adapters import Method
from fastprice.models.base_models import load_config
from fastprice.models.engine import Engine, LoadedModel
from fastprice.offload.layer_offload import Streaming
from fastprice.offload.nf4_loading import load_streamed

__all__ = ["Planned", "load_planned"]


@dataclass(frozen=True)
class Planned:
    """A loaded base, the plan it follows, and the streaming of its layers (None where all are resident)."""

    loaded: LoadedModel
    plan: Plan
    streaming: Streaming | None


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
) -> Planned:
    """`base` on `engine`, within `max_memory` ("24GiB" or bytes): streams layers only if recomputation is not enough.

    pack_tokens   tokens of a micro-batch to aim at, the plan's `tokens` are that or fewer
    max_tokens    tokens of the longest text with its question, which every micro-batch must hold

    Raises ConfigError when nothing fits or the engine is not "peft", BaseModelError.
    """
    if engine.name != "peft":
        raise ConfigError(f"max_memory: the {engine.name} engine places its weights itself; use engine='peft'")
    plan = make_plan(
        load_config(base),
        max_memory,
        method=method,
        rank=rank,
        tokens=pack_tokens,
        least=max(LEAST_TOKENS, max_tokens),
        engine="fastprice" if kernels else "peft",
        streaming=True,
    )
    if not plan.streamed:
        return Planned(engine.load_base(base, method=method, max_tokens=max_tokens), plan, None)
    loaded, streaming = load_streamed(base, plan.streamed, slots=STREAM_SLOTS)
    return Planned(loaded, plan, streaming)
