"""TRL's `SFTTrainer` for prices: completion-only loss, evaluation in dollars, micro-batches that can run again.

The one place that knows private names of TRL's trainer (`_metrics`, `_total_train_tokens`). The class is built on
demand, because importing Unsloth replaces `trl.SFTTrainer`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastprice.memory.recompute_controller import RecomputeController
from fastprice.models.engine import Engine
from fastprice.models.peft_engine import compute_dtype
from fastprice.models.saved_folder import PRICE_HEAD
from fastprice.training.auxiliary_losses import PRICE_LABELS, AuxiliaryLosses
from fastprice.training.cuda_graphs import TOLERANCES, GraphedStep

if TYPE_CHECKING:
    from fastprice_kernels import InstallReport

__all__ = ["price_trainer_class"]


def price_trainer_class() -> Any:
    """`PriceTrainer` over the `SFTTrainer` that TRL, or Unsloth in its place, has now."""
    from trl import SFTTrainer

    return type("PriceTrainer", (_PriceTraining, SFTTrainer), {})


class _PriceTraining:
    """What `PriceTrainer` changes in `SFTTrainer`, which follows it in the order of base classes.

    captures               whether micro-batches run as a CUDA graph
    recompute_controller   runs micro-batches again that ran out of memory; None: they fail
    installed              what fastprice_kernels replaced
    """

    args: Any
    accelerator: Any
    callback_handler: Any
    control: Any
    model: Any
    state: Any
    _metrics: Any
    _total_train_tokens: int

    def __init__(
        self,
        *,
        validate: Callable[[], float] | None,
        engine: Engine,
        own_loss: bool,
        auxiliary: AuxiliaryLosses | None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._validate = validate
        self._engine = engine
        self._own_loss = own_loss
        self._auxiliary = auxiliary
        self._texts_in_step: int | None = None
        self.captures = False
        self.recompute_controller: RecomputeController | None = None
        self.installed: InstallReport | None = None
        self._graphed: GraphedStep | None = None

    @property
    def trained_tokens(self) -> int:
        return int(self._total_train_tokens)

    @property
    def graph_state(self) -> str | None:
        """State of the CUDA graph, or why there is none; None if there was to be none."""
        return None if self._graphed is None else self._graphed.failure or self._graphed.state

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        if self.recompute_controller is None:
            return self._micro_batch(model, inputs, num_items_in_batch)
        tokens = self._total_train_tokens
        metrics = {name: list(values) for name, values in self._metrics["train"].items()}

        def undo() -> None:
            self._total_train_tokens = tokens
            self._metrics["train"].clear()
            self._metrics["train"].update({name: list(values) for name, values in metrics.items()})

        return self.recompute_controller.run(lambda: self._micro_batch(model, dict(inputs), num_items_in_batch), undo)

    def _micro_batch(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        stock: Any = super()
        if not self.captures:
            return stock.training_step(model, inputs, num_items_in_batch)
        if not model.training:
            model.train()
        if self._graphed is None:
            self._graphed = self._graph(model)
        inputs = stock._prepare_inputs(inputs)
        self._count_tokens(inputs)
        tensors = {name: value for name, value in inputs.items() if name != "pack_lengths"}
        items = torch.as_tensor(num_items_in_batch, device=self.args.device)
        return self._graphed({**tensors, "num_items_in_batch": items})

    def _graph(self, model: Any) -> GraphedStep:
        stock: Any = super()

        def step(batch: dict[str, Any]) -> torch.Tensor:
            with stock.compute_loss_context_manager():
                loss = model(**batch, use_cache=False).loss
            self.accelerator.backward(loss)
            return loss.detach()  # type: ignore[no-any-return]

        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return GraphedStep(step, trainable, tolerance=TOLERANCES[compute_dtype()])

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        self._total_train_tokens += sum(inputs["pack_lengths"])
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels, tokens = inputs.pop(PRICE_LABELS, None), inputs["input_ids"].numel()
        if self._own_loss:
            # TRL's own reads entropy and accuracy off the device in every step, which makes the host wait.
            self._count_tokens(inputs)
            outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
            loss = outputs.loss
        else:
            stock: Any = super()
            loss, outputs = stock.compute_loss(model, inputs, True, num_items_in_batch)
        if self._auxiliary is not None:
            # If num_items_in_batch is given, the text's loss is a sum over the labels of all micro-batches of the step,
            # divided by their number; the auxiliary losses are divided by the texts of all micro-batches likewise.
            texts = None if num_items_in_batch is None else self._texts_in_step
            loss = loss + self._auxiliary(self.model, labels, tokens=tokens, texts=texts)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        stock: Any = super()
        batches, items = stock.get_batch_samples(*arguments, **options)
        if self._auxiliary is not None:
            self._texts_in_step = sum(len(batch[PRICE_LABELS]["prices"]) for batch in batches)
        return batches, items

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        stock: Any = super()
        stock._save(output_dir, state_dict)
        if self._auxiliary is not None and self._auxiliary.price_head is not None:
            self._auxiliary.price_head.save(Path(output_dir or self.args.output_dir) / PRICE_HEAD)

    def _load_best_model(self) -> None:
        stock: Any = super()
        stock._load_best_model()
        if self._auxiliary is not None and self._auxiliary.price_head is not None:
            self._auxiliary.price_head.restore(Path(self.state.best_model_checkpoint) / PRICE_HEAD)

    def _validation_error(self) -> float:
        assert self._validate is not None
        try:
            return self._validate()
        except torch.OutOfMemoryError:
            if self._graphed is None or self._graphed.state == "eager":
                raise
        # A graph keeps the activations of a step. Outside of the handler, whose traceback holds tensors.
        self._graphed.stop("an evaluation ran out of memory beside the graph; lower batch_size to keep both")
        torch.cuda.empty_cache()
        return self._validate()

    def evaluate(self, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> dict[str, float]:
        stock: Any = super()
        self._engine.for_prediction(self.model)
        try:
            metrics = {f"{metric_key_prefix}_mae": self._validation_error()}
            stock.log(metrics)  # in eval mode, or TRL would close its training averages here
        finally:
            self._engine.for_training(self.model)
        if self.recompute_controller is not None:
            self.recompute_controller.restart_measurement()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
