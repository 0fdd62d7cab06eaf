"""TRL's `SFTTrainer` with what training on prices needs: our loss, evaluation in dollars, steps that may be redone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastprice.memory.recompute_controller import RecomputeController
from fastprice.models.engine import Engine
from fastprice.models.peft_engine import compute_dtype
from fastprice.models.saved_folder import HEAD
from fastprice.training.auxiliary_losses import TARGETS, Objective
from fastprice.training.cuda_graphs import BANDS, GraphedStep

__all__ = ["trainer_class"]


def trainer_class() -> Any:
    """SFTTrainer with an evaluation in dollars; made on demand, as importing Unsloth replaces `trl.SFTTrainer`."""
    from trl import SFTTrainer

    class PriceTrainer(SFTTrainer):  # type: ignore[misc]
        control: Any
        _total_train_tokens: int

        def __init__(
            self,
            *,
            validate: Callable[[], float] | None,
            engine: Engine,
            own_loss: bool,
            objective: Objective | None,
            **kwargs: Any,
        ) -> None:
            super().__init__(**kwargs)
            self._validate = validate
            self._engine = engine
            self._own_loss = own_loss
            self._objective = objective
            self._texts: int | None = None
            self.captures = False
            self.recompute_controller: RecomputeController | None = None
            self._graphed: GraphedStep | None = None

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            if self.recompute_controller is None:
                return self._micro_batch(model, inputs, num_items_in_batch)
            counted, told = (
                self._total_train_tokens,
                {name: list(all_) for name, all_ in self._metrics["train"].items()},
            )

            def undo() -> None:
                self._total_train_tokens = counted
                self._metrics["train"].clear()
                self._metrics["train"].update({name: list(values) for name, values in told.items()})

            return self.recompute_controller.run(
                lambda: self._micro_batch(model, dict(inputs), num_items_in_batch), undo
            )

        def _micro_batch(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
            if not self.captures:
                return super().training_step(model, inputs, num_items_in_batch)
            if not model.training:
                model.train()
            if self._graphed is None:
                self._graphed = self._graph(model)
            inputs = self._prepare_inputs(inputs)
            self._count(inputs)
            tensors = {name: each for name, each in inputs.items() if name != "pack_lengths"}
            items = torch.as_tensor(num_items_in_batch, device=self.args.device)
            return self._graphed({**tensors, "num_items_in_batch": items})

        def _graph(self, model: Any) -> GraphedStep:
            def step(batch: dict[str, Any]) -> torch.Tensor:
                with self.compute_loss_context_manager():
                    loss = model(**batch, use_cache=False).loss
                self.accelerator.backward(loss)
                return loss.detach()  # type: ignore[no-any-return]

            trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
            return GraphedStep(step, trained, band=BANDS[compute_dtype()])

        def _count(self, inputs: dict[str, Any]) -> None:
            self._total_train_tokens += sum(inputs["pack_lengths"])
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            targets, tokens = inputs.pop(TARGETS, None), inputs["input_ids"].numel()
            if self._own_loss:
                # TRL's own reads entropy and accuracy off the device at every step, which makes the host wait for it.
                self._count(inputs)
                outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
                loss = outputs.loss
            else:
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if self._objective is not None:
                # The text's loss is a sum over the labels of the whole step where their number is given; so is this.
                texts = None if num_items_in_batch is None else self._texts
                loss = loss + self._objective(self.model, targets, tokens=tokens, texts=texts)
            return (loss, outputs) if return_outputs else loss

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, items = super().get_batch_samples(*args, **kwargs)
            if self._objective is not None:
                self._texts = sum(len(batch[TARGETS]["prices"]) for batch in batches)
            return batches, items

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            if self._objective is not None and self._objective.head is not None:
                self._objective.head.save(Path(output_dir or self.args.output_dir) / HEAD)

        def _load_best_model(self) -> None:
            super()._load_best_model()
            if self._objective is not None and self._objective.head is not None:
                self._objective.head.restore(Path(self.state.best_model_checkpoint) / HEAD)

        def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
            assert self._validate is not None
            self._engine.for_prediction(self.model)
            try:
                metrics = {f"{metric_key_prefix}_mae": self._validate()}
                self.log(metrics)  # while in eval mode, or TRL would close its training averages here
            finally:
                self._engine.for_training(self.model)
            if self.recompute_controller is not None:
                self.recompute_controller.restart_measurement()
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return PriceTrainer
