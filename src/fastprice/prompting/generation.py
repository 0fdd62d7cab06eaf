"""Greedy generation of text before the price: in batches, of limited length, with tokens counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastprice.prompts.template import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from fastprice.estimator import PriceEstimator

__all__ = ["Completion", "generate_text"]


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model generated after a prompt, up to the stop string and without it; `tokens` counts that as well."""

    text: str
    tokens: int


def generate_text(
    estimator: PriceEstimator, prompts: Sequence[Prompt], *, max_tokens: int, stop: str
) -> list[Completion]:
    """The greedy completion of each prompt, until the end token, the string `stop`, or `max_tokens` tokens.

    Prompts of similar lengths share a batch of `estimator.batch_size`, padded on the left. A row that has stopped stays
    in its batch, and only its own tokens are counted.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    completions: dict[int, Completion] = {}
    for start in range(0, len(order), estimator.batch_size):
        batch = order[start : start + estimator.batch_size]
        found = _generate_batch(estimator, [prompts[index].ids for index in batch], max_tokens, stop)
        completions.update(zip(batch, found, strict=True))
    return [completions[index] for index in range(len(prompts))]


def _generate_batch(
    estimator: PriceEstimator, prompts: Sequence[Sequence[int]], max_tokens: int, stop: str
) -> list[Completion]:
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    from fastprice.inference.greedy import generate_greedily

    tokenizer = estimator.tokenizer
    width = max(len(prompt) for prompt in prompts)

    class StopAt(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
        def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
            texts = tokenizer.batch_decode(input_ids[:, width:])
            return torch.tensor([stop in text for text in texts], device=input_ids.device)

    stopping = StoppingCriteriaList([StopAt()])
    rows = generate_greedily(estimator.model, tokenizer, prompts, max_new_tokens=max_tokens, stopping_criteria=stopping)
    return [_truncated(tokenizer, row, stop) for row in rows.cpu().numpy()]


def _truncated(tokenizer: Any, row: np.ndarray[Any, np.dtype[np.int64]], stop: str) -> Completion:
    """The row up to its end token or `stop`; both count as generated, padding after them does not."""
    ends = np.flatnonzero(row == tokenizer.eos_token_id)
    own = row[: ends[0]] if len(ends) else row
    text: str = tokenizer.decode(own, skip_special_tokens=True)
    if stop not in text:
        return Completion(text, len(own) + bool(len(ends)))
    tokens = next(count for count in range(1, len(own) + 1) if stop in tokenizer.decode(own[:count]))
    return Completion(text.partition(stop)[0], tokens)
