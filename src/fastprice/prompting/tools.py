"""Tools: before it is asked for the price, the model may calculate and convert.

It is told how, with one example, and goes on writing after the item's text. A line "CALL calc(2 * 9.50)" or
"CALL convert(12 oz to kg)" is answered by a line "= 19", and it may go on, for at most `calls` calls; any other line
means that it needs no more. Of calls that cannot be answered, the first is answered by what is wrong with it, and the
next one ends the matter. (Schick et al., "Toolformer", 2023; Parisi et al., "TALM", 2022.)

What was answered is told after the item's text ("2 * 9.50 = 19"), and the price is asked as always: a model that calls
nothing is asked as zero-shot. No tool sees anything but its argument, and none reads or writes anything.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

from fastprice.data.items import Item
from fastprice.prompting.calculator import LONGEST, CallError, calculate
from fastprice.prompting.generation import write
from fastprice.prompting.layout import Layout, layout_of
from fastprice.prompting.strategy import Asked
from fastprice.prompting.unit_conversion import convert

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator
    from fastprice.prompts.template import Prompt

__all__ = ["TOOLS", "Call", "Tools", "read_call", "shown_number"]

TOOLS: dict[str, Callable[[str], float]] = {"calc": calculate, "convert": convert}
INSTRUCTION = """Before the price, count. Write
CALL calc(3 * 4.50)
CALL convert(12 oz to kg)
or DONE.

Two lamps at 20 EUR each

CALL convert(40 EUR to USD)
= 41.644
DONE

Before the price, count."""
_MOST = 28  # tokens of one line
_CALL = re.compile(r"\s*CALL\s+([A-Za-z]\w{0,19})\s*\((.*)\)\s*")
_ANY_CALL = re.compile(r"\s*CALL\b")


@dataclass(frozen=True, slots=True)
class Call:
    """A call in a line that the model wrote: the tool's name and argument, and the answer or what is wrong with it."""

    tool: str
    argument: str
    answer: str
    failed: bool


@dataclass
class _Talk:
    """What was said about one item."""

    facts: list[str] = field(default_factory=list)
    transcript: str = ""
    read: int = 0
    written: int = 0
    failures: int = 0
    over: bool = False


class Tools:
    """`calls`: how many of one item's are answered, at most."""

    name = "tools"

    def __init__(self, calls: int = 3) -> None:
        self.calls = calls

    def fit(self, train: Sequence[Item]) -> Self:
        return self

    def ask(self, estimator: PriceEstimator, items: Sequence[Item]) -> Asked:
        layout = layout_of(estimator)
        talks = [_Talk() for _ in items]
        tally = Counter({"calls answered": 0, "calls refused": 0, "talks out of room": 0})
        for _ in range(self.calls):
            self._round(estimator, layout, items, talks, tally)
        laid_out = [layout.price_prompt(item.text, facts=talk.facts) for item, talk in zip(items, talks, strict=True)]
        read = [talk.read + len(each.prompt.ids) for talk, each in zip(talks, laid_out, strict=True)]
        return Asked(
            [each.prompt for each in laid_out],
            np.array(read, dtype=np.int64),
            np.array([talk.written for talk in talks], dtype=np.int64),
            tally,
        )

    def _round(
        self,
        estimator: PriceEstimator,
        layout: Layout,
        items: Sequence[Item],
        talks: list[_Talk],
        tally: Counter[str],
    ) -> None:
        """One line more from the model for every item whose talk is not over."""
        going: list[tuple[_Talk, Prompt]] = []
        for item, talk in zip(items, talks, strict=True):
            if talk.over:
                continue
            prompt = layout.instruction_prompt(INSTRUCTION, item.text, talk.transcript)
            taken = len(prompt.ids) + _MOST
            if not talk.transcript:
                layout.room(taken, "tools: an item")
            if layout.window is not None and taken > layout.window:
                talk.over = True
                tally["talks out of room"] += 1
                continue
            going.append((talk, prompt))
        lines = write(estimator, [prompt for _, prompt in going], most=_MOST, stop="\n")
        for (talk, prompt), line in zip(going, lines, strict=True):
            talk.read += len(prompt.ids)
            talk.written += line.tokens
            call = read_call(line.text)
            if call is None:
                talk.over = True
            elif call.failed:
                tally["calls refused"] += 1
                talk.failures += 1
                talk.over = talk.failures > 1
                talk.transcript += _exchange(call)
            else:
                tally["calls answered"] += 1
                talk.transcript += _exchange(call)
                talk.facts.append(f"{call.argument} = {call.answer}")


def read_call(line: str) -> Call | None:
    """The call that a line makes, answered; None for a line that makes none. Never raises, whatever the line."""
    if not _ANY_CALL.match(line):
        return None
    parsed = _CALL.fullmatch(line)
    if parsed is None or parsed[1] not in TOOLS:
        known = " or ".join(f"CALL {name}(...)" for name in TOOLS)
        return Call("", " ".join(line.split())[:LONGEST], f"wrong: write {known}", failed=True)
    tool, argument = parsed[1], " ".join(parsed[2].split())[:LONGEST]
    try:
        return Call(tool, argument, shown_number(TOOLS[tool](argument)), failed=False)
    except CallError as error:
        return Call(tool, argument, f"wrong: {error}", failed=True)


def shown_number(number: float) -> str:
    """At most six significant digits, no exponent between a ten-thousandth and a million."""
    return f"{number:.6g}" if abs(number) < 1e6 else f"{number:.0f}"


def _exchange(call: Call) -> str:
    said = f"CALL {call.tool}({call.argument})" if call.tool else call.argument
    return f"{said}\n= {call.answer}\n"
