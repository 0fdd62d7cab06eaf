"""GPU memory: how much a run will need (`estimate_memory`), and what to choose so that it fits (`make_plan`)."""

from __future__ import annotations

from fastprice.memory.estimate import MemoryEstimate, estimate_memory

__all__ = ["MemoryEstimate", "estimate_memory"]
