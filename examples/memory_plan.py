"""How much GPU memory a fine-tuning needs, and how to make it fit: arithmetic on a model's published sizes.

No weights are loaded and no GPU is needed; no GPU has confirmed the figures yet (docs/memory-errors.md says how far
they are from a simulation).

    python examples/memory_plan.py
    python examples/memory_plan.py --base Qwen2.5-14B --gpu 16GiB --plot memory.svg
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import fastprice
from fastprice.memory import find_plan, plan_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="Llama-3.1-8B", help="shipped name, folder or hub id")
    parser.add_argument("--gpu", default="24GiB", help="memory of the GPU")
    parser.add_argument("--plot", type=Path, help="PNG, SVG or PDF to draw the memory over a step into")
    options = parser.parse_args()

    usual = fastprice.estimate_memory(options.base, method="qlora", tokens=4096, sequences=20, recompute="full")
    print(f"QLoRA of {options.base}, 4,096 tokens, every layer recomputed, logits of all positions:")
    print(usual.table())

    plan = plan_memory(options.base, options.gpu, engine="fastprice", layer_offload=True)
    print(f"\nThe fastest plan that fits in {options.gpu}:")
    print(plan.summary())
    print(f"\nAs settings of fastprice train:\n{plan.yaml()}")

    for size in ("8GiB", "12GiB", "16GiB", "24GiB", "48GiB"):
        found = find_plan(options.base, size, engine="fastprice", layer_offload=True)
        says = "does not fit" if found is None else (
            f"micro-batch of {found.tokens:,} tokens, {found.recomputed_layers} layers recomputed, "
            f"{found.offloaded_layers} offloaded to the host"
        )  # fmt: skip
        print(f"{size:>6}: {says}")

    if options.plot is not None:
        if find_spec("matplotlib") is None:
            raise SystemExit("--plot needs matplotlib: pip install matplotlib")
        from fastprice.memory.plot import plot_memory

        print(f"plot: {plot_memory(plan.estimate, options.plot, options.base, plan.gpu_bytes)}")


if __name__ == "__main__":
    main()
