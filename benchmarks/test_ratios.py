"""Training on packs, and the loss at labeled positions alone, against what everyone does: ratios on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastprice.benchmarking.pytest_recording import TIME
from fastprice.benchmarking.workload import draw_rows
from fastprice.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from fastprice.prompts.packing import PackCollator
from fastprice.prompts.template import IGNORE, TrainingRow

pytestmark = pytest.mark.benchmark(timer=TIME)


def _padded(rows: list[TrainingRow]) -> dict[str, torch.Tensor]:
    width = max(len(row.ids) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (width - len(values))

    return {
        "input_ids": torch.tensor([pad(row.ids, 0) for row in rows]),
        "labels": torch.tensor([pad(row.labels, IGNORE) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row.ids), 0) for row in rows]),
    }


def _step(model: Any, attention: str, batch: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """Loss and the gradient of the embedded tokens: forward and backward through every frozen layer."""
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    inputs = {name: value for name, value in batch.items() if name != "input_ids"}

    def run() -> torch.Tensor:
        model.set_attn_implementation(attention)
        loss = model(inputs_embeds=embedded, use_cache=False, **inputs).loss
        torch.autograd.grad(loss, embedded)
        return loss.detach()  # type: ignore[no-any-return]

    return run


def test_packed_against_padded(model: Any, compare: Any) -> None:
    register_packed_attention()
    rows = draw_rows(12, model.config.vocab_size, model.config.eos_token_id)
    packs = [{"input_ids": row.ids, "labels": row.labels, "lengths": [len(row.ids)]} for row in rows]
    packed = _step(model, PACKED_ATTENTION, PackCollator()(packs))
    padded = _step(model, "sdpa", _padded(rows))
    torch.testing.assert_close(packed(), padded(), rtol=1e-4, atol=1e-4)
    # The padding alone is a quarter of the work.
    compare(packed, padded, at_least=1.05, group="packs")


def test_completion_loss_against_full_logits(compare: Any) -> None:
    from fastprice_kernels.ops.completion_cross_entropy import completion_cross_entropy

    generator = torch.Generator().manual_seed(0)
    tokens, width, vocabulary = 768, 128, 4096
    hidden = torch.randn(1, tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator) * 0.02
    labels = torch.full((1, tokens), IGNORE)
    labels[0, 48::48] = torch.randint(0, vocabulary, (tokens // 48 - 1,), generator=generator)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        loss = completion_cross_entropy(hidden, weight, labels)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    def full() -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden[0, :-1], weight)
        loss = F.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    torch.testing.assert_close(ours(), full(), rtol=1e-4, atol=1e-6)
    # 2 % of the rows: what is left is finding them.
    compare(ours, full, at_least=3.0, group="loss")
