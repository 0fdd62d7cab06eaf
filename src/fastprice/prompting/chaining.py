"""Chaining: the model first says what the item is (brand, type, condition, quantity), and then what it costs.

The question for the facts shows one worked example, an invented kettle without a price, and the model writes at most
`_MOST` tokens. What it writes in the asked form is told after the item's text, a line a fact, and the price is asked as
always. Facts that it does not give, or calls unknown, are left out, so a model too weak for the form is asked as in
zero-shot. (Wu et al., "AI Chains", 2022.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from fastprice.data.items import Item
from fastprice.prompting.generation import write
from fastprice.prompting.layout import ANSWER, layout_of
from fastprice.prompting.strategy import Asked

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator

__all__ = ["FIELDS", "Chaining", "read_facts"]

FIELDS = ("Brand", "Type", "Condition", "Quantity")
INSTRUCTION = """Say what is sold.

Harlow kettle 1.7 l, used twice, box of 2

Brand: Harlow
Type: kettle
Condition: used
Quantity: 2

Say what is sold."""
_MOST = 40  # tokens
_LONGEST = 40  # characters of one fact
_UNKNOWN = re.compile(r"[\W_]*(?:unknown|none|n/?a|not (?:given|stated|specified))?[\W_]*", re.I)


class Chaining:
    """Two calls an item: its facts, then its price."""

    name = "chaining"

    def fit(self, train: Sequence[Item]) -> Self:
        return self

    def ask(self, estimator: PriceEstimator, items: Sequence[Item]) -> Asked:
        layout = layout_of(estimator)
        first = [layout.instruction_prompt(INSTRUCTION, item.text, f"{FIELDS[0]}:") for item in items]
        longest = max((len(prompt.ids) for prompt in first), default=0)
        layout.room(longest + max(_MOST, ANSWER), "chaining: an item")
        written = write(estimator, first, most=_MOST, stop="\n\n")
        facts = [read_facts(f"{FIELDS[0]}:{each.text}") for each in written]
        laid_out = [
            layout.price_prompt(item.text, facts=[f"{name}: {value}" for name, value in told.items()])
            for item, told in zip(items, facts, strict=True)
        ]
        read = [len(one.ids) + len(two.prompt.ids) for one, two in zip(first, laid_out, strict=True)]
        return Asked(
            [each.prompt for each in laid_out],
            np.array(read, dtype=np.int64),
            np.array([each.tokens for each in written], dtype=np.int64),
            Counter({"facts told": sum(map(len, facts))}),
        )


def read_facts(answer: str) -> dict[str, str]:
    """The facts in what a model wrote, by field: the first of each name, no unknown one, none over 40 characters."""
    facts: dict[str, str] = {}
    for line in answer.splitlines():
        name, colon, value = line.partition(":")
        field = name.strip().capitalize()
        if colon and field in FIELDS and field not in facts and not _UNKNOWN.fullmatch(value):
            facts[field] = " ".join(value.split())[:_LONGEST].strip()
    return facts
