"""Tool use: before the price the model may call a calculator and a unit converter.

The prompt explains the calls with one example, and the model continues after the item's text. A line "CALL calc(2 *
9.50)" or "CALL convert(12 oz to kg)" is answered by a line "= 19", and the model may continue, for at most `max_calls`
lines; any other line ends the dialog. The first call that fails is answered by an error message, the second one ends
the dialog. (Schick et al., "Toolformer", 2023; Parisi et al., "TALM", 2022.)

Answered calls are added after the item's text ("2 * 9.50 = 19") in the usual price prompt, so a model that calls
nothing gets the zero-shot prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

from fastprice.data.items import Item
from fastprice.prompting.generation import Completion, generate_text
from fastprice.prompting.prompt_builder import PromptBuilder
from fastprice.prompting.strategy import PromptBatch
from fastprice.prompting.tools.tool_calls import run_call

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator
    from fastprice.prompts.template import Prompt

__all__ = ["ToolUse"]

INSTRUCTION = """Before the price, count. Write
CALL calc(3 * 4.50)
CALL convert(12 oz to kg)
or DONE.

Two lamps at 20 EUR each

CALL convert(40 EUR to USD)
= 41.644
DONE

Before the price, count."""
_MAX_TOKENS = 28  # of one line
_MAX_FAILURES = 1  # more of them end the dialog


@dataclass
class _Dialog:
    """The model's calls for one item, and the tokens that it read and generated for them."""

    facts: list[str] = field(default_factory=list)
    transcript: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    failures: int = 0
    finished: bool = False


class ToolUse:
    """At most `max_calls` tool calls for an item, then its price."""

    name = "tools"

    def __init__(self, max_calls: int = 3) -> None:
        self.max_calls = max_calls

    def fit(self, train: Sequence[Item]) -> Self:
        return self

    def build_prompts(self, estimator: PriceEstimator, items: Sequence[Item]) -> PromptBatch:
        builder = PromptBuilder.for_estimator(estimator)
        dialogs = [_Dialog() for _ in items]
        tally = Counter({"calls answered": 0, "calls failed": 0, "dialogs out of window": 0})
        for _ in range(self.max_calls):
            pending = self._pending(builder, items, dialogs, tally)
            prompts = [prompt for _, prompt in pending]
            lines = generate_text(estimator, prompts, max_tokens=_MAX_TOKENS, stop="\n")
            for (dialog, prompt), line in zip(pending, lines, strict=True):
                self._continue(dialog, prompt, line, tally)
        built = [
            builder.price_prompt(item.text, facts=dialog.facts) for item, dialog in zip(items, dialogs, strict=True)
        ]
        read = [dialog.prompt_tokens + len(each.prompt.ids) for dialog, each in zip(dialogs, built, strict=True)]
        return PromptBatch(
            [each.prompt for each in built],
            np.array(read, dtype=np.int64),
            np.array([dialog.generated_tokens for dialog in dialogs], dtype=np.int64),
            tally,
        )

    @staticmethod
    def _pending(
        builder: PromptBuilder, items: Sequence[Item], dialogs: list[_Dialog], tally: Counter[str]
    ) -> list[tuple[_Dialog, Prompt]]:
        """The dialogs that are not finished, with their next prompts; those that fill the window are finished."""
        pending: list[tuple[_Dialog, Prompt]] = []
        for item, dialog in zip(items, dialogs, strict=True):
            if dialog.finished:
                continue
            prompt = builder.instruction_prompt(INSTRUCTION, item.text, dialog.transcript)
            tokens = len(prompt.ids) + _MAX_TOKENS
            if not dialog.transcript:
                builder.check_fits(tokens, "tools: an item")
            if builder.window is not None and tokens > builder.window:
                dialog.finished = True
                tally["dialogs out of window"] += 1
                continue
            pending.append((dialog, prompt))
        return pending

    @staticmethod
    def _continue(dialog: _Dialog, prompt: Prompt, line: Completion, tally: Counter[str]) -> None:
        """Adds a generated line, and the answer to its call, to the dialog."""
        dialog.prompt_tokens += len(prompt.ids)
        dialog.generated_tokens += line.tokens
        call = run_call(line.text)
        if call is None:
            dialog.finished = True
            return
        dialog.transcript += call.transcript()
        if call.failed:
            tally["calls failed"] += 1
            dialog.failures += 1
            dialog.finished = dialog.failures > _MAX_FAILURES
        else:
            tally["calls answered"] += 1
            dialog.facts.append(f"{call.argument} = {call.answer}")
