"""GPU memory: how much a training needs (`estimate_memory`), and how to make it fit (`plan_memory`).

Importing this imports no torch.
"""

from __future__ import annotations

from fastprice.memory.byte_sizes import parse_bytes
from fastprice.memory.estimate import MemoryEstimate, estimate_memory
from fastprice.memory.planner import (
    LargerModel,
    MemoryPlan,
    PlanOptions,
    find_plan,
    format_plan_table,
    next_larger_model,
    plan_memory,
    plan_table,
)

__all__ = [
    "LargerModel",
    "MemoryEstimate",
    "MemoryPlan",
    "PlanOptions",
    "estimate_memory",
    "find_plan",
    "format_plan_table",
    "next_larger_model",
    "parse_bytes",
    "plan_memory",
    "plan_table",
]
