"""GPU memory: how much a run will need (`estimate_memory`), and what to choose so that it fits (`make_plan`).

Importing this imports no torch. `python -m fastprice.memory.simulate` checks the estimate against the real code.
"""

from __future__ import annotations

from fastprice.memory.estimate import MemoryEstimate, estimate_memory
from fastprice.memory.planner import Plan, find_plan, make_plan, next_larger, parse_bytes, plan_table

__all__ = [
    "MemoryEstimate",
    "Plan",
    "estimate_memory",
    "find_plan",
    "make_plan",
    "next_larger",
    "parse_bytes",
    "plan_table",
]
