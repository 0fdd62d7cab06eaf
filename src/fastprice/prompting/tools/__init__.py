"""The tools strategy: the model may call a calculator and a unit converter before the price."""

from __future__ import annotations

from fastprice.prompting.tools.tool_use import ToolUse

__all__ = ["ToolUse"]
