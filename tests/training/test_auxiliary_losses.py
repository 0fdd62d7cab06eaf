"""What is added to the text's loss: on packs what it is on texts alone, with the kernels what it is without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastprice.data.synthetic import make_synthetic_items
from fastprice.inference.price_heads import head_distributions, make_head
from fastprice.inference.price_trie import PriceTrie
from fastprice.models.base_models import load_tokenizer
from fastprice.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from fastprice.prompts.packing import PackCollator, pack_rows
from fastprice.prompts.template import IGNORE, encode_rows
from fastprice.training.auxiliary_losses import PRICE_LABELS, AuxiliaryLosses
from fastprice.training.number_losses import NumberLoss, expected_cost
from fastprice_kernels import installed

TOKENIZER = load_tokenizer("nano")
ITEMS = make_synthetic_items(9, seed=4)
ROWS = encode_rows(TOKENIZER, ITEMS, 40)


@pytest.fixture
def model() -> Any:
    from peft import get_peft_model

    from fastprice.models.adapters import lora_config

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), lora_config(rank=2, alpha=4, dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def make_auxiliary(kind: str = "wasserstein") -> AuxiliaryLosses:
    prices = [item.price for item in ITEMS]
    head = make_head("histogram", 32, 1.0, 999.0)
    head.start_from(prices)
    torch.manual_seed(1)
    torch.nn.init.normal_(head.linear.weight, std=0.2)
    return AuxiliaryLosses(head, 0.7, NumberLoss(kind, PriceTrie.of(TOKENIZER, 999), TOKENIZER), 0.4)


def by_texts(model: Any, auxiliary: AuxiliaryLosses) -> Tensor:
    """The same losses, each text computed alone, whole, by the stock model: the plain truth."""
    model.get_base_model().set_attn_implementation("sdpa")
    head, number = auxiliary.price_head, auxiliary.number_loss
    assert head is not None
    assert number is not None
    total = torch.zeros(())
    for row, item in zip(ROWS, ITEMS, strict=True):
        begin = sum(label == IGNORE for label in row.labels)
        output = model(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
        last = output.hidden_states[-1][:, begin - 1]
        total = total + auxiliary.price_head_weight * head.loss(head(last), torch.tensor([item.price])).sum()
        table = number.batch([max(1, round(item.price))])
        logits = output.logits[:, begin - 1 : -1][:, table["steps"][0]][..., number.alphabet]
        cost = expected_cost(number.kind, logits, table["right"], table["costs"], table["counts"])
        total = total + auxiliary.number_loss_weight * cost.sum()
    return total / len(ROWS)


def by_packs(model: Any, auxiliary: AuxiliaryLosses, *, collator: PackCollator, **kernels: bool) -> Tensor:
    register_packed_attention()
    model.get_base_model().set_attn_implementation(PACKED_ATTENTION)
    collate = auxiliary.collator(collator)
    total = torch.zeros(())
    packs = pack_rows(ROWS, 300, seed=3)
    assert 1 < len(packs) < len(ROWS)
    with auxiliary.recording(model), installed(model, **kernels) if kernels else torch.enable_grad():
        for pack in packs:
            batch = collate([pack])
            price_labels = batch.pop(PRICE_LABELS)
            model(**batch, use_cache=False)
            total = total + auxiliary(model, price_labels, tokens=batch["input_ids"].numel(), texts=len(ROWS))
    return total


def gradients(model: Any, auxiliary: AuxiliaryLosses, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    assert auxiliary.price_head is not None
    auxiliary.price_head.zero_grad()
    loss.backward()
    named = [*model.named_parameters(), *auxiliary.price_head.named_parameters()]
    return {name: each.grad.clone() for name, each in named if each.grad is not None}


@pytest.mark.parametrize("kind", ["wasserstein", "number"])
@pytest.mark.parametrize(
    ("collator", "kernels"),
    [
        (PackCollator(), {}),
        (PackCollator(), {"loss_head": True}),
        (PackCollator(), {"loss_head": True, "last_layer": True}),
        (PackCollator(positions=True), {"loss_head": True, "last_layer": True}),
    ],
    ids=["stock", "loss head", "last layer", "positions"],
)
def test_packs_equal_texts_alone(model: Any, kind: str, collator: PackCollator, kernels: dict[str, bool]) -> None:
    auxiliary = make_auxiliary(kind)
    loss = by_packs(model, auxiliary, collator=collator, **kernels)
    got = gradients(model, auxiliary, loss)
    truth = by_texts(model, auxiliary)
    want = gradients(model, auxiliary, truth)
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-5)
    assert got.keys() == want.keys()
    assert len(got) > 20  # adapters of both layers, and the head
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_without_a_number_of_texts_it_is_the_mean_of_the_pack(model: Any) -> None:
    auxiliary = make_auxiliary()
    register_packed_attention()
    model.get_base_model().set_attn_implementation(PACKED_ATTENTION)
    batch = auxiliary.collator(PackCollator())(pack_rows(ROWS, 2000))
    price_labels, tokens = batch.pop(PRICE_LABELS), batch["input_ids"].numel()
    losses = []
    with auxiliary.recording(model):
        for texts in (None, len(ROWS)):
            model(**batch, use_cache=False)
            losses.append(auxiliary(model, price_labels, tokens=tokens, texts=texts))
    assert losses[0].item() == losses[1].item()


def test_prediction_reads_the_state_that_training_read(model: Any) -> None:
    """Prompts of uneven lengths, batched and padded: the distribution is that of each prompt alone."""
    auxiliary = make_auxiliary()
    head = auxiliary.price_head
    assert head is not None
    model.get_base_model().set_attn_implementation("sdpa")
    model.eval()
    prompts = [row.ids[: sum(label == IGNORE for label in row.labels)] for row in ROWS]
    done: list[int] = []
    together = head_distributions(model, head, prompts, batch_size=4, on_batch=done.append)
    assert done == [4, 8, 9]
    for prompt, found in zip(prompts, together, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1]
            (alone,) = head.distributions(head(states[:, -1]))
        torch.testing.assert_close(
            torch.from_numpy(found.probabilities.copy()), torch.from_numpy(alone.probabilities.copy()), rtol=1e-4,
            atol=1e-8,
        )  # fmt: skip
    assert head_distributions(model, head, []) == []
