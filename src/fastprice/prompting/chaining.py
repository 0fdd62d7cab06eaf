"""Chaining: the model first generates facts about the item (brand, type, condition, quantity), and then its price.

The prompt for the facts has one worked example, an invented kettle without a price, and the model generates at most
`_MAX_TOKENS` tokens. The facts that follow the format are added after the item's text, one a line, in the usual price
prompt. Unknown or missing facts are left out, so a model that cannot follow the format gets the zero-shot prompt. (Wu
et al., "AI Chains", 2022.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from fastprice.data.items import Item
from fastprice.prompting.generation import generate_text
from fastprice.prompting.prompt_builder import PRICE_TOKENS, PromptBuilder
from fastprice.prompting.strategy import PromptBatch

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator

__all__ = ["FIELDS", "Chaining", "parse_facts"]

FIELDS = ("Brand", "Type", "Condition", "Quantity")
INSTRUCTION = """Say what is sold.

Harlow kettle 1.7 l, used twice, box of 2

Brand: Harlow
Type: kettle
Condition: used
Quantity: 2

Say what is sold."""
_MAX_TOKENS = 40  # of all facts
_MAX_FACT_CHARACTERS = 40
_UNKNOWN = re.compile(r"[\W_]*(?:unknown|none|n/?a|not (?:given|stated|specified))?[\W_]*", re.I)


class Chaining:
    """Two calls of the model for each item: its facts, then its price."""

    name = "chaining"

    def fit(self, train: Sequence[Item]) -> Self:
        return self

    def build_prompts(self, estimator: PriceEstimator, items: Sequence[Item]) -> PromptBatch:
        builder = PromptBuilder.for_estimator(estimator)
        cue = f"{FIELDS[0]}:"
        fact_prompts = [builder.instruction_prompt(INSTRUCTION, item.text, cue) for item in items]
        longest = max((len(prompt.ids) for prompt in fact_prompts), default=0)
        builder.check_fits(longest + max(_MAX_TOKENS, PRICE_TOKENS), "chaining: an item")
        completions = generate_text(estimator, fact_prompts, max_tokens=_MAX_TOKENS, stop="\n\n")
        facts = [parse_facts(f"{cue}{each.text}") for each in completions]
        built = [
            builder.price_prompt(item.text, facts=[f"{name}: {value}" for name, value in found.items()])
            for item, found in zip(items, facts, strict=True)
        ]
        read = [len(one.ids) + len(two.prompt.ids) for one, two in zip(fact_prompts, built, strict=True)]
        return PromptBatch(
            [each.prompt for each in built],
            np.array(read, dtype=np.int64),
            np.array([each.tokens for each in completions], dtype=np.int64),
            Counter({"facts added": sum(map(len, facts))}),
        )


def parse_facts(completion: str) -> dict[str, str]:
    """The facts in what a model generated, by field: the first of each, none unknown, each cut to 40 characters."""
    facts: dict[str, str] = {}
    for line in completion.splitlines():
        name, colon, value = line.partition(":")
        field = name.strip().capitalize()
        if colon and field in FIELDS and field not in facts and not _UNKNOWN.fullmatch(value):
            facts[field] = " ".join(value.split())[:_MAX_FACT_CHARACTERS].strip()
    return facts
