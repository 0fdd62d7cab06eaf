"""Priced training items as examples in a prompt: which are allowed beside an item, and the prompts with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fastprice.data.estimator_inputs import price_of
from fastprice.data.items import Item
from fastprice.data.splitting import near_duplicate_mask
from fastprice.errors import DataError
from fastprice.prompting.prompt_builder import PromptBuilder
from fastprice.prompting.strategy import PromptBatch

__all__ = ["allowed_examples", "check_priced", "prompts_with_examples"]


def check_priced(train: Sequence[Item], min_items: int, strategy: str) -> list[Item]:
    """`train` as a list; DataError for fewer than `min_items` or an item without a price."""
    if len(train) < min_items:
        raise DataError(
            f"{strategy} needs {min_items} or more priced items as examples, and was given {len(train)}: "
            "pass it training items"
        )
    for item in train:
        price_of(item)
    return list(train)


def allowed_examples(item: Item, candidates: Sequence[Item]) -> list[bool]:
    """For each candidate, whether it may be an example beside `item`.

    The item itself, its near-duplicates and the items of its group are not allowed: their prices would be the answer.
    """
    duplicates = near_duplicate_mask(item.text, [candidate.text for candidate in candidates])
    return [
        not duplicate and (item.group is None or candidate.group != item.group)
        for candidate, duplicate in zip(candidates, duplicates.tolist(), strict=True)
    ]


def prompts_with_examples(
    builder: PromptBuilder, items: Sequence[Item], examples: Sequence[Sequence[Item]]
) -> PromptBatch:
    """A prompt for each item after its `examples`, from the least similar to the most."""
    built = [builder.price_prompt(item.text, examples=each) for item, each in zip(items, examples, strict=True)]
    lengths = np.array([len(each.prompt.ids) for each in built], dtype=np.int64)
    dropped, shortened = sum(each.dropped for each in built), sum(each.shortened for each in built)
    tally = Counter(
        {
            "examples shown": sum(map(len, examples)) - dropped,
            "examples dropped": dropped,
            "examples shortened": shortened,
        }
    )
    return PromptBatch([each.prompt for each in built], lengths, np.zeros_like(lengths), tally)
