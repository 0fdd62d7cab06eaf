"""Memory: the estimate beside what was measured, training under a cap, and the largest that fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["estimated", "largest", "streamed", "streaming_cap"]

# How `estimate_memory` describes what each measured peer does; what fastprice's layers kept is told by its rows.
# Unsloth without recomputation is not among its cases, and padding is no part of the tokens of a row.
_DESCRIBED: dict[str, dict[str, Any]] = {
    "trl-packed": {"engine": "peft", "recompute": "full", "loss_head": "completion"},
    "peft-off": {"engine": "peft", "recompute": "full", "loss_head": "completion"},
    "peft": {"engine": "fastprice", "recompute": "full", "loss_head": "completion"},
    "unsloth": {"engine": "unsloth", "recompute": "full", "loss_head": "full"},
}


def estimated(steps: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each measured step: estimated bytes without the CUDA context, beside peak reserved and allocated.

    steps: `{"model", "peer", "tokens", "texts", "rank", "labeled", "keep", "peak_reserved", "peak_allocated"}`; peaks
    are None on a CPU, where the rows hold the estimate alone.
    """
    from fastprice.benchmarking.models import model_config
    from fastprice.memory import estimate_memory
    from fastprice.memory.recompute_levels import parse_recompute_levels

    for step in steps:
        if step["peer"] not in _DESCRIBED:
            continue
        config = model_config(step["model"])
        described = dict(_DESCRIBED[step["peer"]])
        if step["keep"] is not None:
            described["recompute"] = parse_recompute_levels(step["keep"], config.num_hidden_layers)
        estimate = estimate_memory(
            config,
            method="qlora",
            rank=step["rank"],
            tokens=round(step["tokens"]),
            sequences=max(1, round(step["texts"])),
            labeled=step["labeled"],
            **described,
        )
        without_context = estimate.peak_bytes - estimate.breakdown["CUDA context"]
        row: dict[str, Any] = {
            "model": step["model"],
            "peer": step["peer"],
            "tokens": round(step["tokens"]),
            "estimated_reserved": without_context,
            "estimated_allocated": estimate.tensor_bytes,
            "moment": estimate.moment,
            "measured_reserved": step["peak_reserved"],
            "measured_allocated": step["peak_allocated"],
        }
        if step["peak_reserved"]:
            row["error"] = without_context / step["peak_reserved"] - 1
        yield row


def streaming_cap(model: str, *, tokens: int, rank: int, kernels: bool) -> int:
    """Bytes of GPU memory in which `model` trains on so many tokens with at least 60 % less of its layers' weights on
    the device, the two slots counted; by the estimate, every layer's input on the host: less than which only streaming
    can do."""
    from fastprice.benchmarking.models import model_config
    from fastprice.memory import estimate_memory
    from fastprice.memory.estimate import DEVICE_BUFFERS
    from fastprice.memory.planner import HEADROOM, LABELED

    config = model_config(model)
    layers = config.num_hidden_layers
    estimate = estimate_memory(
        config,
        rank=rank,
        tokens=tokens,
        sequences=max(1, tokens // 180),
        recompute=("offload",) * layers,
        loss_head="completion",
        labeled=LABELED,
        engine="fastprice" if kernels else "peft",
        offloaded_layers=min(layers, math.ceil(0.6 * layers) + DEVICE_BUFFERS),
    )
    return round(estimate.peak_bytes / (1 - HEADROOM)) + 1


def streamed(folder: str, *, cap_bytes: int, tokens: int, steps: int = 6, **options: Any) -> dict[str, Any]:
    """Training through `PriceEstimator` on synthetic items, as a user would: a row of figures.

    cap_bytes: its `max_memory`, for which the process must have been capped before; 0: every layer resident.
    options: more of PriceEstimator's arguments. On a CPU the device is the pretend one, and nothing is bounded.
    """
    import torch
    from trl import SFTTrainer

    from fastprice.benchmarking.probe import WARMUP, Enough, Probe, summarize_probe
    from fastprice.data.synthetic import make_catalogue
    from fastprice.estimator import PriceEstimator

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probe = Probe(None, steps, 60.0, device)
    items = make_catalogue((WARMUP + steps + 5) * -(-tokens // 60))
    estimator = PriceEstimator(folder, engine="peft", pack_tokens=tokens, max_memory=cap_bytes or None, **options)
    with probe.loading():
        estimator.prepare()
    plan, offload = estimator.plan_, estimator._layer_offload
    row: dict[str, Any] = {"cap_bytes": cap_bytes, "micro_batch": tokens, "streamed_layers": 0}
    if plan is not None:
        row |= {"micro_batch": plan.tokens, "accumulation": plan.gradient_accumulation, "layers": plan.layers}
        row |= {"ceiling_tokens_per_second": plan.tokens_per_second, "ceiling_of": plan.gpu}
    if offload is not None:
        row |= {"streamed_layers": len(offload.layers), "boundary": type(offload.transfers).__name__}
        row |= {"slot_bytes": offload.device_bytes, "host_bytes": offload.host_bytes}
    try:
        with probe.watching(SFTTrainer):
            estimator.fit(items)
    except Enough:
        pass
    else:
        raise RuntimeError("the run ended before it was measured")
    return {**row, **summarize_probe(probe)}


def largest(fits: Callable[[int], bool], first: int, most: int) -> int:
    """The largest multiple of `first`, up to `most`, for which `fits` holds, if it holds up to some size; 0 for none.

    Doubles, then halves the gap: 2 log2(most / first) probes at most.
    """
    good, bad = 0, most // first + 1
    size = 1
    while size < bad and fits(size * first):
        good, size = size, size * 2
    bad = min(bad, size)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle * first):
            good = middle
        else:
            bad = middle
    return good * first
