"""The memory estimate beside the peaks that training steps had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["compare_estimates"]

# The arguments of `estimate_memory` for each measured peer; the recompute levels of fastprice's layers are in its rows.
# Unsloth without recomputation is not among its cases, and a row's tokens leave out padding.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "trl-packed": {"engine": "peft", "recompute": "full", "loss_head": "completion"},
    "peft-off": {"engine": "peft", "recompute": "full", "loss_head": "completion"},
    "peft": {"engine": "fastprice", "recompute": "full", "loss_head": "completion"},
    "unsloth": {"engine": "unsloth", "recompute": "full", "loss_head": "full"},
}


def compare_estimates(steps: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each measured step: estimated bytes without the CUDA context, beside peak reserved and allocated.

    steps: `{"model", "peer", "tokens", "texts", "rank", "labeled", "recompute", "peak_reserved", "peak_allocated"}`;
    both peaks are None on a CPU, where the rows hold the estimate alone.
    """
    from fastprice.benchmarking.random_models import model_config
    from fastprice.memory import estimate_memory
    from fastprice.memory.recompute_levels import parse_recompute_levels

    for step in steps:
        if step["peer"] not in _ARGUMENTS:
            continue
        config = model_config(step["model"])
        arguments = dict(_ARGUMENTS[step["peer"]])
        if step["recompute"] is not None:
            arguments["recompute"] = parse_recompute_levels(step["recompute"], config.num_hidden_layers)
        estimate = estimate_memory(
            config,
            method="qlora",
            rank=step["rank"],
            tokens=round(step["tokens"]),
            sequences=max(1, round(step["texts"])),
            labeled=step["labeled"],
            **arguments,
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
