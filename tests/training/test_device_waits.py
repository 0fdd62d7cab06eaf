"""No step of a training makes the host wait for the device, outside of logging and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.memory.small_models import FAMILIES, LAYERS, make_model
from tests.models.fused_attention import fused_attention
from tests.training.device_waits import DeviceWaits
from torch import Tensor
from transformers import TrainerCallback

from fastprice import Item, PriceEstimator
from fastprice.config import TrainConfig
from fastprice.memory.activation_checkpointing import ActivationCheckpointing
from fastprice.models import packed_attention
from fastprice.models.attention_backends import choose_attention
from fastprice.models.peft_engine import PeftEngine
from fastprice.offload import offload_layers
from fastprice.prompts.packing import PackCollator, pack_rows
from fastprice.prompts.template import IGNORE, TrainingRow, encode_rows
from fastprice.training.sft_config import sft_config
from fastprice.training.step_options import StepOptions
from fastprice.training.train import train
from fastprice_kernels import installed

ITEMS = [Item("word " * 40 + str(n), 10.0 + n) for n in range(24)]
STEPS = 12
# accelerate copies each batch from pinned memory without waiting (see the test of the configuration below).
BATCH_COPY = "to a device in utils/operations.py:send_to_device"
# transformers reads loss and gradient norm where it logs, and the loss once more at the end.
LOGGED = "aten._local_scalar_dense.default in transformers/trainer.py:_maybe_log_save_evaluate"
END = "aten._local_scalar_dense.default in transformers/trainer.py:_finalize_training"


class Watch(TrainerCallback):
    """Watches from the first batch to the end of training, with the optimizer of CUDA, and logs every fifth step."""

    def __init__(self) -> None:
        self.waits = DeviceWaits()
        self.logged = 0

    def on_trainer(self, trainer: Any) -> None:
        trainer.args.logging_steps, trainer.args.optim = 5, "adamw_torch_fused"
        trainer.add_callback(self)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.waits.__enter__()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.waits.__exit__()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logged += "grad_norm" in logs


def run(
    base: str, *, method: str = "lora", offload: bool = False, kernels: str = "on", recompute: str = "auto"
) -> Watch:
    """Trains `base` for STEPS steps of one pack each; returns what was watched."""
    watch = Watch()
    estimator = PriceEstimator(base, method=method, rank=4, max_tokens=64).prepare()
    rows = encode_rows(estimator.tokenizer, ITEMS, 64)
    settings = TrainConfig(learning_rate=1e-3, pack_tokens=160, evaluations=0)
    options = StepOptions(kernels=kernels, recompute=recompute)

    def start() -> None:
        train(
            PeftEngine(), estimator.model, estimator.tokenizer, rows, None, settings, options=options,
            on_trainer=watch.on_trainer,
        )  # fmt: skip

    if offload:
        with offload_layers(estimator.model, 2, host_embedding=True):
            start()
    else:
        start()
    return watch


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recompute": "full"},
        {"recompute": "1 offload, 1 selective"},
        {"method": "qlora", "offload": True, "recompute": "full"},
    ],
    ids=["resident", "full", "inputs offloaded", "layers offloaded"],
)
def test_a_step_waits_for_nothing(tiny_base: str, options: dict[str, Any]) -> None:
    watch = run(tiny_base, **options)
    found = watch.waits.found
    assert watch.logged == STEPS // 5
    assert found.count(LOGGED) == 2 * watch.logged
    # input_ids, labels, position_ids, label_positions, cu_seqlens
    assert found.count(BATCH_COPY) == 5 * STEPS
    others = [wait for wait in found if wait not in (BATCH_COPY, LOGGED, END)]
    if options.get("offload"):  # the rows that were looked up, from pinned memory
        assert others == ["to a device in offload/host_embedding.py:_look_up"] * STEPS
    else:
        assert others == []


def test_a_step_with_a_price_head_and_a_number_loss_waits_for_nothing(
    tiny_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    monkeypatch.setattr(
        "fastprice.training.train.train", lambda *a, **k: train(*a, **k | {"on_trainer": watch.on_trainer})
    )
    PriceEstimator(
        tiny_base, method="lora", rank=4, max_tokens=64, pack_tokens=160, learning_rate=1e-3, kernels="on",
        evaluations=0, output="head", text_loss="wasserstein", gradient_accumulation=2,
    ).fit(ITEMS)  # fmt: skip
    assert watch.logged > 0
    assert [wait for wait in watch.waits.found if wait not in (BATCH_COPY, LOGGED, END)] == []


def test_without_kernels_the_waits_are_those_of_trl(tiny_base: str) -> None:
    """TRL counts tokens and reads entropy and accuracy in every step; its loss reads which labels there are."""
    found = [wait for wait in run(tiny_base, kernels="off").waits.found if wait not in (BATCH_COPY, LOGGED, END)]
    assert len(found) >= STEPS  # else the loss of the kernels would be no gain here
    assert {wait.partition(" in ")[2].partition(":")[0] for wait in found} == {"trainer/sft_trainer.py"}


@pytest.mark.parametrize("level", ["none", "selective", "offload"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_of_a_family_copies_borders_or_waits(family: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the fused backend of CUDA (its stand-in), except for Gemma 2, whose capped scores have none."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (9, 15)]
    rows = [TrainingRow(each, [IGNORE] * (len(each) - 2) + each[-2:], 0) for each in ids]
    batch = PackCollator(positions=True)(pack_rows(rows, 24)) | {"num_items_in_batch": torch.tensor(4)}
    model = make_model(family)
    last_layer = family != "gemma2"
    with (
        fused_attention(),
        installed(model, loss_head=True, last_layer=last_layer),
        ActivationCheckpointing(model, (level,) * LAYERS),
    ):
        choose_attention("cpu", torch.float32)
        monkeypatch.setattr(packed_attention, "borders_of", _refuse)
        with DeviceWaits() as waits:
            model(**batch, use_cache=False).loss.backward()
    assert waits.found == []


def _refuse(*_: Any) -> Tensor:
    raise AssertionError("borders were copied to the device in a layer")


def test_batches_are_copied_from_pinned_memory_without_waiting_on_cuda(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr("trl.SFTConfig", lambda **options: made.append(options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    sft_config(
        str(tmp_path), TrainConfig(learning_rate=1e-3), steps=10, evaluate_every=None, seed=0, own_loss=True,
        cuda_graphs=False, checkpoint_all_layers=False,
    )  # fmt: skip
    (options,) = made
    assert options["dataloader_pin_memory"] is True
    assert options["accelerator_config"] == {"non_blocking": True}
    assert options["logging_nan_inf_filter"] is False  # it reads the loss of every micro-batch
    assert options["optim"] == "adamw_torch_fused"


@pytest.mark.parametrize(
    ("operation", "waits"),
    [
        (lambda x: x.sum().item(), True),
        (lambda x: bool(x.any()), True),
        (lambda x: x.tolist(), True),
        (lambda x: x.to("cpu"), True),
        (lambda x: x.nonzero(), True),
        (lambda x: x[x > 0], True),
        (lambda x: x + torch.tensor([1.0], device=x.device), True),
        (lambda x: x + torch.tensor([1.0]).to(x.device), True),
        (lambda x: x.to(torch.float64), False),
        (lambda x: x + torch.arange(3, device=x.device), False),
        (lambda x: torch.arange(3).tolist(), False),
        (lambda x: x.sum() / x.norm().clamp(min=1.0), False),
    ],
)
def test_the_watch_sees_each_kind_of_wait(operation: Callable[[Tensor], Any], waits: bool) -> None:
    x = torch.randn(3)
    with DeviceWaits() as watch:
        operation(x)
    assert bool(watch.found) == waits
