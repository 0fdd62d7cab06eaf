"""Greedy generation: the tokens, and so the price, that a model writes when each next token is the likeliest one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastprice.prompts.template import TEXT, AnswerFormat

__all__ = ["generate_greedily", "greedy_prices"]

_ANSWER_TOKENS = 8  # "$" is in the prompt; seven digits and an end


@torch.inference_mode()
def generate_greedily(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stopping_criteria: Any = None,
) -> Tensor:
    """The token ids generated after each of B prompts (token ids, padded on the left): int64 (B, <= max_new_tokens).

    stopping_criteria  transformers' StoppingCriteriaList; None: a row ends with its end token or after max_new_tokens
    """
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    generated: Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
        stopping_criteria=stopping_criteria,
    )
    return generated[:, width:]


def greedy_prices(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    form: AnswerFormat = TEXT,
    on_batch: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """The price that a model writes after each of N prompts (token ids) in its `form`: dollars, float64 (N,).

    NaN where it writes no price. Prompts are sorted by length, so that batches have little padding; `on_batch` is
    called with the number of finished prompts.
    """
    prices = np.full(len(prompts), np.nan)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = generate_greedily(model, tokenizer, [prompts[index] for index in batch], max_new_tokens=_ANSWER_TOKENS)
        for index, answer in zip(batch, tokenizer.batch_decode(rows, skip_special_tokens=True), strict=True):
            price = form.read(answer)
            prices[index] = np.nan if price is None else price
        if on_batch:
            on_batch(start + len(batch))
    return prices
