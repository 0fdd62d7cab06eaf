"""Text that the model writes before it is asked for a price: greedy, in batches, of bounded length, tokens counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastprice.prompts.template import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from fastprice.estimator import PriceEstimator

__all__ = ["Written", "write"]


@dataclass(frozen=True, slots=True)
class Written:
    """What the model wrote after a prompt, up to `stop` and without it, and the tokens that took."""

    text: str
    tokens: int


def write(estimator: PriceEstimator, prompts: Sequence[Prompt], *, most: int, stop: str) -> list[Written]:
    """The model's greedy continuation of each prompt, until its end token, `stop`, or `most` tokens.

    Prompts of like lengths share a batch of `estimator.batch_size`, padded on the left. A row that has stopped waits
    for its batch, and only its own tokens are counted.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    written: dict[int, Written] = {}
    for start in range(0, len(order), estimator.batch_size):
        batch = order[start : start + estimator.batch_size]
        found = _write_batch(estimator, [prompts[index].ids for index in batch], most, stop)
        written.update(zip(batch, found, strict=True))
    return [written[index] for index in range(len(prompts))]


def _write_batch(estimator: PriceEstimator, prompts: Sequence[Sequence[int]], most: int, stop: str) -> list[Written]:
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
    rows = generate_greedily(estimator.model, tokenizer, prompts, max_new_tokens=most, stopping_criteria=stopping)
    return [_cut_at(tokenizer, row, stop) for row in rows.cpu().numpy()]


def _cut_at(tokenizer: Any, row: np.ndarray[Any, np.dtype[np.int64]], stop: str) -> Written:
    """The row up to its end token or `stop`; both count as written, padding after them does not."""
    ends = np.flatnonzero(row == tokenizer.eos_token_id)
    own = row[: ends[0]] if len(ends) else row
    text: str = tokenizer.decode(own, skip_special_tokens=True)
    if stop not in text:
        return Written(text, len(own) + bool(len(ends)))
    tokens = next(count for count in range(1, len(own) + 1) if stop in tokenizer.decode(own[:count]))
    return Written(text.partition(stop)[0], tokens)
