"""Training steps replayed as real CUDA graphs: results against eager steps, a planted error, memory that is given back.

Never run yet where this was written: there was no GPU.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprice.models.attention_backends import varlen_works
from fastprice.models.packed_attention import PACKED_ATTENTION, register_packed_attention
from fastprice.prompts.packing import PackCollator, StaticShape, pack_rows
from fastprice.prompts.template import IGNORE, TrainingRow
from fastprice.training.cuda_graphs import TOLERANCES, CudaCapture, GraphedStep, unsupported_reason
from fastprice_kernels import install

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BAND = TOLERANCES[torch.bfloat16]


def batches(count: int = 6) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in torch.randint(20, 120, (count * 7,), generator=generator).tolist():
        ids = torch.randint(3, 997, (length,), generator=generator).tolist()
        rows.append(TrainingRow(ids, [IGNORE] * (length - 3) + ids[-3:], 0))
    packs = pack_rows(rows, 512)
    collate = PackCollator(static=StaticShape.of(packs))
    made = []
    for pack in packs:
        batch = collate([pack])
        del batch["pack_lengths"]
        made.append({name: each.cuda() if isinstance(each, Tensor) else each for name, each in batch.items()})
        made[-1]["num_items_in_batch"] = torch.tensor(21, device="cuda")
    return made


def model_and_step(*, nf4: bool, checkpointing: bool) -> tuple[Any, Any]:
    bnb, peft, transformers = (pytest.importorskip(name) for name in ("bitsandbytes", "peft", "transformers"))
    if not varlen_works("cuda", torch.bfloat16):
        pytest.skip("varlen_attn does not run on this card")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=997, hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16).requires_grad_(False)
    if nf4:
        for module in list(model.model.layers.modules()):
            for name, child in list(module.named_children()):
                if type(child) is torch.nn.Linear:
                    four = bnb.nn.Linear4bit(
                        child.in_features, child.out_features, False, torch.bfloat16, quant_type="nf4"
                    )
                    four.load_state_dict({"weight": child.weight.cpu()})
                    setattr(module, name, four.to("cuda"))
    register_packed_attention()
    model.set_attn_implementation(PACKED_ATTENTION)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM")).train()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    assert not install(adapted, loss_head=True, last_layer=True).skipped

    def step(batch: dict[str, Any]) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = adapted(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return adapted, step


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("nf4", [False, True])
def test_replays_train_as_eager_steps_do(nf4: bool, checkpointing: bool) -> None:
    (eager, eager_step), (model, step) = (model_and_step(nf4=nf4, checkpointing=checkpointing) for _ in range(2))
    assert unsupported_reason(model, kernels=True, dtype=torch.bfloat16, processes=1) is None
    graphed = GraphedStep(step, trained(model), tolerance=BAND)
    optimizers = [torch.optim.AdamW(trained(each).values(), lr=1e-3) for each in (eager, model)]
    losses = []
    for _ in range(4):
        for batch in batches():
            losses.append((graphed(batch), eager_step(batch)))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert graphed.state == "trusted", graphed.failure
    for got, want in losses:
        torch.testing.assert_close(got, want, rtol=BAND, atol=BAND)


def test_nothing_waits_for_the_device_in_a_replayed_step() -> None:
    model, step = model_and_step(nf4=True, checkpointing=False)
    graphed = GraphedStep(step, trained(model), tolerance=BAND)
    made = batches()
    for batch in made[:3]:
        graphed(batch)
    assert graphed.state == "trusted", graphed.failure
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in made:
            graphed(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_replay_of_stale_weights_is_noticed() -> None:
    model, step = model_and_step(nf4=False, checkpointing=False)
    weight = next(iter(trained(model).values()))
    copy = weight.detach().clone()

    def with_a_stale_copy(batch: dict[str, Any]) -> Tensor:
        held = copy if torch.cuda.is_current_stream_capturing() else weight.detach()
        return step(batch) + 100 * held.square().sum()

    graphed = GraphedStep(with_a_stale_copy, trained(model), tolerance=1e-3)
    first, second, third, *_ = batches()
    graphed(first)
    with pytest.warns(UserWarning, match="CUDA graphs stay off: a replayed step computes another"):
        graphed(second)
    assert graphed.state == "eager"
    graphed(third)


def test_a_step_that_reads_on_the_host_stays_eager_with_one_warning() -> None:
    model, step = model_and_step(nf4=False, checkpointing=False)

    def reads(batch: dict[str, Any]) -> Tensor:
        loss = step(batch)
        float(loss)
        return loss

    graphed = GraphedStep(reads, trained(model), tolerance=BAND)
    first, *others = batches()
    with pytest.warns(UserWarning, match="cannot be captured"):
        graphed(first)
    for batch in others:  # a warning more would be an error
        graphed(batch)
    assert all(each.grad is not None and each.grad.isfinite().all() for each in trained(model).values())


def test_the_memory_of_a_graph_is_given_back() -> None:
    weight = torch.randn(1024, 1024, device="cuda", requires_grad=True)

    def step(batch: dict[str, Any]) -> Tensor:
        loss = (batch["x"] @ weight).square().mean()
        loss.backward()
        return loss.detach()

    x = torch.randn(4096, 1024, device="cuda")
    before = torch.cuda.memory_allocated()
    graphed = GraphedStep(step, {"weight": weight}, tolerance=1e-3, capture=CudaCapture)
    for _ in range(3):
        graphed({"x": x})
    assert graphed.state == "trusted", graphed.failure
    assert torch.cuda.memory_allocated() > before
    del graphed
    weight.grad = None
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**21
