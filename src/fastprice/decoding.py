"""From a language model to a price: greedy decoding of the digits after the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprice.money import parse_price

__all__ = ["greedy_prices"]

_ANSWER_TOKENS = 8  # "$" is in the prompt; seven digits and an end


def greedy_prices(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """The price a model writes after each prompt (token ids), in dollars; NaN where it writes none.

    Prompts are sorted by length, so that batches hold little padding; `on_batch` is told how many are done.
    """
    guesses = np.full(len(prompts), np.nan)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for index, answer in zip(batch, _continue(model, tokenizer, [prompts[index] for index in batch]), strict=True):
            # The prompt ended with "Price is $": only what follows without a gap is its number.
            if answer[:1].isdigit() and (price := parse_price(answer.split("\n")[0])) is not None:
                guesses[index] = price
        if on_batch:
            on_batch(start + len(batch))
    return guesses


@torch.inference_mode()
def _continue(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """What the model writes after each prompt, greedily, as text; prompts are padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=_ANSWER_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    answers: list[str] = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
    return answers
