"""Training steps on a CUDA device at every recompute level, resident and streamed, on packs in bf16: what a first run
needs, so `make gpu` runs it first.

Not run yet: there was no GPU where this was written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprice import PriceEstimator
from fastprice.benchmarking.random_models import random_nf4_model, seed_adapters
from fastprice.data.synthetic import make_synthetic_items
from fastprice.memory.activation_checkpointing import ActivationCheckpointing
from fastprice.memory.recompute_levels import RECOMPUTE_LEVELS
from fastprice.models import attention_backends
from fastprice.models.attention_backends import attention_choice
from fastprice.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from fastprice.models.peft_engine import PeftEngine
from fastprice.offload import offload_layers
from fastprice.prompts.packing import PackCollator, pack_rows
from fastprice.prompts.template import IGNORE, TrainingRow
from fastprice_kernels import installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
LAYERS = 4
BAND = 2e-2  # of a gradient's norm: bf16, atomic additions in another order


def make_model() -> Any:
    """A Llama of four layers on an NF4 base, in training mode, equal at every call."""
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=997, hidden_size=256, intermediate_size=704, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = random_nf4_model(config, DEVICE, torch.bfloat16)
    model = PeftEngine().attach(model, method="qlora", rank=8, alpha=16, dropout=0.0, seed=0)
    seed_adapters(model)
    register_packed_attention()
    model.get_base_model().set_attn_implementation(PACKED_ATTENTION)
    return model.train()


def batches(count: int) -> list[dict[str, Any]]:
    """Packs of about 500 tokens on the device, as the trainer hands them to a model whose embedding is on the host."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in torch.randint(20, 120, (count * 8,), generator=generator).tolist():
        ids = torch.randint(3, 997, (length,), generator=generator).tolist()
        rows.append(TrainingRow(ids, [IGNORE] * (length - 3) + ids[-3:], 0))
    collate = PackCollator(positions=True, host_ids=True)
    made = []
    for pack in pack_rows(rows, 512)[:count]:
        batch = collate([pack])
        made.append({name: each.to(DEVICE) if isinstance(each, Tensor) else each for name, each in batch.items()})
        made[-1]["num_items_in_batch"] = torch.tensor(21, device=DEVICE)
    return made


def step(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """The loss of a micro-batch, then its gradients."""
    model.zero_grad()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(each.grad for each in model.parameters() if each.requires_grad)]


@contextmanager
def prepared(model: Any, level: str, *, kernels: bool, streamed: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if streamed:
            stack.enter_context(offload_layers(model, LAYERS, host_embedding=True))
        if kernels:
            stack.enter_context(installed(model, loss_head=True, last_layer=True, free_loss_bytes=2**24))
        stack.enter_context(ActivationCheckpointing(model, (level,) * LAYERS))
        yield


def without_ids_on_host(batch: dict[str, Any], kernels: bool) -> dict[str, Any]:
    """What the stock model takes, whose embedding and loss have no use for the rest."""
    unread = {"host_input_ids"} if kernels else {"host_input_ids", "label_positions"}
    return {name: each for name, each in batch.items() if name not in unread}


def forget_choices() -> None:
    attention_choice.cache_clear()
    attention_backends._failure.cache_clear()


WAYS = list(itertools.product(RECOMPUTE_LEVELS, (False, True), (False, True)))


@pytest.mark.parametrize(("level", "streamed", "kernels"), WAYS, ids=lambda value: str(value))
def test_a_first_step_is_that_of_a_model_that_recomputes_nothing(level: str, streamed: bool, kernels: bool) -> None:
    """The attention is chosen inside the first layer, which once broke every layer that recomputes."""
    (batch,) = batches(1)
    plain = without_ids_on_host(batch, kernels)
    model = make_model()
    with prepared(model, "none", kernels=kernels, streamed=False):
        expected = [each.clone() for each in step(model, plain)]
    forget_choices()
    model = make_model()
    with prepared(model, level, kernels=kernels, streamed=streamed):
        found = step(model, batch if streamed and kernels else plain)
        assert all(each.isfinite().all() for each in found)
        for one, other in zip(found, expected, strict=True):
            assert (one.float() - other.float()).norm() <= BAND * other.float().norm() + 1e-6


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("level", RECOMPUTE_LEVELS)
def test_a_step_with_optimizer_and_clipping_waits_for_nothing(level: str, streamed: bool) -> None:
    model = make_model()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    made = batches(4)
    if not streamed:
        made = [without_ids_on_host(batch, kernels=True) for batch in made]

    def whole_step(batch: dict[str, Any]) -> None:
        step(model, batch)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    with prepared(model, level, kernels=True, streamed=streamed):
        for batch in made[:2]:  # allocations, autotuning, the states of the optimizer
            whole_step(batch)
        watched(lambda: [whole_step(batch) for batch in made])


def watched(work: Callable[[], Any]) -> None:
    """Runs `work`, in which an operation that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [{"recompute": level} for level in RECOMPUTE_LEVELS] + [{"cuda_graphs": "on"}, {"max_memory": "12GiB"}],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_a_whole_training_learns(options: dict[str, Any]) -> None:
    estimator = PriceEstimator(
        "nano", engine="peft", kernels="on", epochs=1.0, max_tokens=96, pack_tokens=1024, evaluations=1,
        gradient_accumulation=2, **options,
    )  # fmt: skip
    forget_choices()
    estimator.fit(make_synthetic_items(300, seed=1), make_synthetic_items(20, seed=2))
    losses = [event.loss for event in estimator.training_.events if event.loss is not None]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(0 < price < 1000 for price in estimator.predict(["A used bicycle"]))
