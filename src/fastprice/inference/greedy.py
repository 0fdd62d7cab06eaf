"""What a model writes after a prompt, each next token the likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["write_greedily"]


@torch.inference_mode()
def write_greedily(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, most: int, stopping: Any = None
) -> Tensor:
    """The token ids that follow each of B prompts (token ids), int64 (B, at most `most`); padded on the left.

    stopping: transformers' StoppingCriteriaList, or None: a row ends with its end token or after `most` tokens.
    """
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    written: Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=most,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
        stopping_criteria=stopping,
    )
    return written[:, width:]
