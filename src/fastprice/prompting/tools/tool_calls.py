"""Tool calls in lines that a model generates: "CALL calc(2 * 9.50)", "CALL convert(12 oz to kg)".

A tool gets nothing but its argument, and reads and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from fastprice.prompting.tools.calculator import MAX_CHARACTERS, ToolError, calculate
from fastprice.prompting.tools.unit_conversion import convert

__all__ = ["TOOLS", "ToolCall", "format_number", "run_call"]

TOOLS: dict[str, Callable[[str], float]] = {"calc": calculate, "convert": convert}
_CALL = re.compile(r"\s*CALL\s+([A-Za-z]\w{0,19})\s*\((.*)\)\s*")
_ANY_CALL = re.compile(r"\s*CALL\b")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in a generated line: the tool's name ("" if unknown), its argument, and the answer or error message."""

    tool: str
    argument: str
    answer: str
    failed: bool

    def transcript(self) -> str:
        """The call and its answer, as the lines that follow it in the prompt."""
        call = f"CALL {self.tool}({self.argument})" if self.tool else self.argument
        return f"{call}\n= {self.answer}\n"


def run_call(line: str) -> ToolCall | None:
    """The call in a line, with its answer; None for a line without one. Raises nothing, for any line."""
    if not _ANY_CALL.match(line):
        return None
    parsed = _CALL.fullmatch(line)
    if parsed is None or parsed[1] not in TOOLS:
        known = " or ".join(f"CALL {name}(...)" for name in TOOLS)
        return ToolCall("", " ".join(line.split())[:MAX_CHARACTERS], f"wrong: write {known}", failed=True)
    tool, argument = parsed[1], " ".join(parsed[2].split())[:MAX_CHARACTERS]
    try:
        return ToolCall(tool, argument, format_number(TOOLS[tool](argument)), failed=False)
    except ToolError as error:
        return ToolCall(tool, argument, f"wrong: {error}", failed=True)


def format_number(number: float) -> str:
    """At most six significant digits, without an exponent from a ten-thousandth to a million."""
    return f"{number:.6g}" if abs(number) < 1e6 else f"{number:.0f}"
