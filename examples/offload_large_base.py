"""A base under a memory limit: frozen layers on the host, each prefetched when it is needed.

    python examples/offload_large_base.py
    python examples/offload_large_base.py --base unsloth/Meta-Llama-3.1-70B --max-memory 24GiB   # on a CUDA machine

On a CUDA device the layers are copied from page-locked memory on a stream of their own. **Without one, the device is
simulated**, and that is what this script shows by default: the nano model under a limit so small that by the planner's
arithmetic all of its layers must be offloaded. The plan, the visits of the layers and the device buffers are those of
a GPU, and a buffer holds bytes that decode to NaN while a copy into it is under way, so wrong timing would show. But
host and device are the same memory here, so no memory is saved, and nothing enforces the limit. No step with offloaded
layers has run on a GPU yet.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

import fastprice
from fastprice.data.synthetic import make_synthetic_items
from fastprice.memory import find_plan
from fastprice.models.base_models import load_config

SETTINGS = {"rank": 4, "max_tokens": 64, "pack_tokens": 400, "epochs": 1.0, "evaluations": 1, "kernels": "off"}


def smallest_limit(base: str) -> int:
    """The least bytes (to 64 KiB) in which the planner finds a way to train `base`, by offloading all that it may."""
    config = load_config(base)
    low, high = 1 << 28, 1 << 36
    while high - low > 1 << 16:
        middle = (low + high) // 2
        fits = find_plan(config, middle, tokens=400, rank=4, engine="peft", layer_offload=True)
        low, high = (low, middle) if fits else (middle, high)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="nano", help="nano, a folder or a hub id")
    parser.add_argument("--max-memory", help="such as 24GiB; default: the least that the planner accepts")
    options = parser.parse_args()

    simulated = not torch.cuda.is_available()
    print("no CUDA device: transfers are simulated, memory is not limited" if simulated else "on the CUDA device")
    split = fastprice.split_items(make_synthetic_items(80, seed=3))
    limit = options.max_memory or smallest_limit(options.base)

    offloaded = fastprice.PriceEstimator(base=options.base, max_memory=limit, **SETTINGS)
    offloaded.fit(split.train, split.validation)
    print(offloaded.plan_.summary())
    prices = offloaded.predict(split.test)
    print("estimates in dollars:", prices.round())

    if simulated:
        assert offloaded.plan_.offloaded_layers > 0
        resident = fastprice.PriceEstimator(base=options.base, **SETTINGS).fit(split.train, split.validation)
        assert np.array_equal(resident.predict(split.test), prices)
        print("equal, bit for bit, to the estimates of a model that was trained without a limit")


if __name__ == "__main__":
    main()
