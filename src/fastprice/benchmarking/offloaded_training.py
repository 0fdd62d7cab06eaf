"""Training through `PriceEstimator`, as a user runs it: all weights on the device, or most of them offloaded."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["offload_cap", "train_offloaded"]

_OFFLOADED_SHARE = 0.6  # of the layers, at least


def offload_cap(model: str, *, tokens: int, rank: int, kernels: bool) -> int:
    """Bytes of GPU memory in which `model` trains on packs of so many tokens only with at least 60 % of its layers
    offloaded to the host (beside the two that are being prefetched), by the estimate.

    kernels: whether fastprice's kernels run.
    """
    from fastprice.benchmarking.random_models import model_config
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
        offloaded_layers=min(layers, math.ceil(_OFFLOADED_SHARE * layers) + DEVICE_BUFFERS),
    )
    return round(estimate.peak_bytes / (1 - HEADROOM)) + 1


def train_offloaded(folder: str, *, cap_bytes: int, tokens: int, steps: int = 6, **options: Any) -> dict[str, Any]:
    """Trains the model in `folder` on synthetic items: a row of figures.

    cap_bytes: its `max_memory`, to which the process must have been limited before; 0: every layer on the device.
    options: more of PriceEstimator's arguments. On a CPU the device is simulated and its memory is not bounded.
    """
    import torch

    from fastprice.benchmarking.step_probe import WARMUP, MeasurementDone, StepProbe
    from fastprice.data.synthetic import make_synthetic_items
    from fastprice.estimator import PriceEstimator

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probe = StepProbe(device, steps, 60.0)
    items = make_synthetic_items((WARMUP + steps + 5) * -(-tokens // 60))
    estimator = PriceEstimator(folder, engine="peft", pack_tokens=tokens, max_memory=cap_bytes or None, **options)
    with probe.loading():
        estimator.prepare()
    plan, offload = estimator.plan_, estimator._layer_offload
    row: dict[str, Any] = {"cap_bytes": cap_bytes, "micro_batch": tokens, "offloaded_layers": 0}
    if plan is not None:
        row |= {"micro_batch": plan.tokens, "gradient_accumulation": plan.gradient_accumulation, "layers": plan.layers}
        row |= {"ceiling_tokens_per_second": plan.tokens_per_second, "ceiling_of": plan.gpu}
    if offload is not None:
        row |= {"offloaded_layers": len(offload.layers), "transfers": type(offload.transfers).__name__}
        row |= {"buffer_bytes": offload.device_bytes, "host_bytes": offload.host_bytes}
    try:
        estimator.fit(items, on_trainer=probe.attach)
    except MeasurementDone:
        pass
    else:
        raise RuntimeError("the run ended before it was measured")
    return {**row, **probe.figures()}
