"""`PriceEstimator`: a language model as a scikit-learn regressor from text to dollars."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin

from fastprice.config import TrainConfig
from fastprice.data.inputs import draw_items, price_of, training_items
from fastprice.data.items import Item
from fastprice.errors import BaseModelError, ConfigError, DataError, NotFittedError
from fastprice.inference.conformal import Calibration, calibrate
from fastprice.inference.predictor import PricePredictor
from fastprice.memory import parse_bytes
from fastprice.memory.recompute_levels import check_recompute
from fastprice.models.adapters import TEXT_LOSSES, check_method, suggested_learning_rate
from fastprice.models.engine_choice import choose_engine
from fastprice.models.saved_folder import ADAPTER, HEAD, MANIFEST, MODEL, read_manifest, write_folder
from fastprice.prompts.template import encode_rows

if TYPE_CHECKING:
    from fastprice.inference.price_heads import PriceHead
    from fastprice.memory import MemoryPlan
    from fastprice.models.adapters import Method
    from fastprice.models.engine import Engine, LoadedModel
    from fastprice.offload import LayerOffload
    from fastprice.training.auxiliary_losses import AuxiliaryLosses
    from fastprice.training.callbacks import TrainingEvent
    from fastprice.training.train import TrainingResult

__all__ = ["PriceEstimator"]

CALIBRATION_ITEMS = 1000  # validation items; their own luck moves a coverage of 90 % by less than 1 % (one sigma)
STANDARD_ITEMS = 512  # training items by whose hidden states a head's are scaled; a deviation is known to 3 % from them
UNTRAINED_CEILING = 999.0  # dollars: the largest price that a base model is asked about before it has seen any
# Room for the question, "Price is $" and the answer beside a text of max_tokens.
_WRAPPER_TOKENS = 64


class PriceEstimator(PricePredictor, RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Fine-tunes a language model to read a product's text and say its price in dollars.

    base           "nano" (shipped: shows the pipeline), a folder, or a hub id such as "Qwen/Qwen2.5-0.5B"
    method         "qlora": NF4 base, LoRA adapters; "lora": 16-bit base (fp32 on a CPU); "full": every weight trains
    engine         "auto", "peft" or "unsloth" (CUDA)
    output         "text": the price as digits; "json": as an object held to {"price": number}; "head": digits too, and
                   beside them a head that gives the distribution in one pass (fastprice.inference.price_heads), which `predict` reads
    price_head     "histogram" (bins of log price) or "quantile"; price_head_weight: of its loss beside the text's
    text_loss      "ce": cross-entropy alone; "number", "number_mse", "wasserstein": and with it, times
                   text_loss_weight, a loss that knows which numbers are near each other (fastprice.training.number_losses)
    kernels        "auto": fastprice_kernels under the model while it trains on CUDA; "on" or "off" anywhere
    cuda_graphs    "on": steps replayed as CUDA graphs once a replay agreed with the eager step (fastprice.training.cuda_graphs);
                   "auto": where that is possible and pays; "off"
    recompute      what the backward pass computes again of each layer: "none", "selective" (norms and the product in
                   the MLP), "full" (the forward pass), "offload" (so too, from its input in host memory); counts from
                   the first layer on ("12 full, 20 selective"); or "auto": as little as fits the GPU, on a CPU none
    rank, alpha    of the adapters; alpha None is 2 x rank; dropout on their input
    learning_rate  peak; None is a width-dependent default (`fastprice.models.adapters.suggested_learning_rate`)
    epochs         passes over the training items
    max_tokens     longest text in tokens; longer ones lose their end
    pack_tokens    tokens of a micro-batch; gradient_accumulation: micro-batches an optimizer step
    evaluations    how often the validation error in dollars is taken; the best of them is kept
    validation_items  at most this many validation items are used for it (drawn from `seed`)
    batch_size     prompts predicted at once
    max_memory     of the GPU, such as "24GiB": the micro-batch may get smaller than `pack_tokens`
                   (`gradient_accumulation` makes up for it), and layers of a "qlora" base that do not fit are
                   streamed from the host (docs/fit.md)
    seed           of adapter weights, order of rows, and the draw of validation items

    After `fit`: `fallback_price_` (median training price, for a text that gives no price any probability),
    `ceiling_price_` (largest training price, and the largest that is estimated), `training_`
    (fastprice.training.train.TrainingResult), `cut_` (training texts that were shortened), `calibration_` (of intervals),
    `plan_` (fastprice.memory.MemoryPlan, with `max_memory`).
    Follows scikit-learn: `get_params`, `set_params`, `clone`, `cross_val_score(estimator, items)`.
    """

    def __init__(
        self,
        base: str = "nano",
        *,
        method: str = "qlora",
        engine: str = "auto",
        kernels: str = "auto",
        cuda_graphs: str = "off",
        recompute: str = "auto",
        output: str = "text",
        price_head: str = "histogram",
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        learning_rate: float | None = None,
        epochs: float = 1.0,
        price_head_weight: float = 1.0,
        text_loss: str = "ce",
        text_loss_weight: float = 0.3,
        max_tokens: int = 256,
        pack_tokens: int = 2048,
        gradient_accumulation: int = 1,
        warmup_ratio: float = 0.03,
        evaluations: int = 5,
        validation_items: int = 200,
        batch_size: int = 64,
        max_memory: str | int | None = None,
        seed: int = 0,
    ) -> None:
        self.base = base
        self.method = method
        self.engine = engine
        self.kernels = kernels
        self.cuda_graphs = cuda_graphs
        self.recompute = recompute
        self.output = output
        self.price_head = price_head
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.price_head_weight = price_head_weight
        self.text_loss = text_loss
        self.text_loss_weight = text_loss_weight
        self.max_tokens = max_tokens
        self.pack_tokens = pack_tokens
        self.gradient_accumulation = gradient_accumulation
        self.warmup_ratio = warmup_ratio
        self.evaluations = evaluations
        self.validation_items = validation_items
        self.batch_size = batch_size
        self.max_memory = max_memory
        self.seed = seed

    def prepare(self) -> PriceEstimator:
        """Loads the base and puts untrained adapters on it, so that `predict` answers as the base does.

        `fit` calls it; call it yourself only to measure the base. Raises ConfigError, BaseModelError.
        """
        self._check_params()
        method = check_method(self.method)
        self._engine = self._choose_engine()
        loaded = self._load_base(self._engine, method)
        self._tokenizer = loaded.tokenizer
        self._model = self._engine.attach(
            loaded.model,
            method=method,
            rank=self.rank,
            alpha=self._alpha(),
            dropout=self.dropout,
            seed=self.seed,
        )
        self.fallback_price_, self.ceiling_price_ = float("nan"), UNTRAINED_CEILING
        self._head = None
        self.calibration_: Calibration | None = None
        self._decide_distributions()
        return self

    def fit(
        self,
        train: Sequence[Item] | Sequence[str],
        validation: Sequence[Item] | ArrayLike | None = None,
        *,
        on_event: Callable[[TrainingEvent], None] | None = None,
    ) -> PriceEstimator:
        """Fine-tunes on `train`; keeps the weights with the smallest error in dollars on `validation`.

        train       Items with prices; or texts, with their prices as second argument (scikit-learn's `fit(X, y)`)
        validation  Items with prices, or None: the last weights are kept
        on_event    called with every logged fastprice.training.callbacks.TrainingEvent

        Raises DataError for items without a price, ConfigError, BaseModelError, TrainingError.
        """
        from fastprice.training.step_options import StepOptions
        from fastprice.training.train import train as run_training

        items, validation_items = training_items(train, validation)
        prices = [price_of(item) for item in items]
        if not hasattr(self, "_model") or hasattr(self, "training_"):
            self.prepare()
        # Set first: validation during training predicts too.
        self.fallback_price_, self.ceiling_price_ = float(np.median(prices)), max(prices)
        self._decoder = None
        rows = encode_rows(self._tokenizer, items, self.max_tokens, self.form)
        auxiliary = self._auxiliary_losses(items)
        self.cut_ = sum(row.cut > 0 for row in rows)
        watched = draw_items(validation_items, self.validation_items, self.seed)
        truths = np.array([price_of(item) for item in watched])

        def validation_error() -> float:
            self._decoder = None  # of the weights before
            try:
                return float(np.abs(self.predict(watched) - truths).mean())
            finally:
                self._decoder = None  # room for training

        try:
            self.training_: TrainingResult = run_training(
                self._engine,
                self._model,
                self._tokenizer,
                rows,
                validation_error if watched else None,
                self._training_settings(),
                seed=self.seed,
                options=StepOptions(
                    kernels=self.kernels,
                    recompute=self.recompute,
                    memory_budget=None if self.max_memory is None else parse_bytes(self.max_memory),
                    offloaded_layers=0 if self.plan_ is None else self.plan_.offloaded_layers,
                ),
                auxiliary=auxiliary,
                on_event=on_event,
            )
        except BaseException:
            self._drop_model()  # half-trained: never to be predicted with or saved by mistake
            raise
        self._engine.for_prediction(self._model)
        self.calibration_ = self._calibrated(validation_items)
        return self

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the adapter (or, for "full", the model and its tokenizer) and the settings to `folder`.

        The folder appears whole or not at all; an older save in it is replaced, any other non-empty folder is refused
        with ConfigError.
        """
        if not hasattr(self, "training_") or not hasattr(self, "_model"):
            raise NotFittedError("nothing to save: this PriceEstimator was not fitted")
        manifest = {
            "settings": self.get_params(),
            "fallback_price": self.fallback_price_,
            "ceiling_price": self.ceiling_price_,
            "head": None if self._head is None else self._head.settings(),
            "calibration": None if self.calibration_ is None else self.calibration_.as_dict(),
            "best_step": self.training_.best_step,
            "validation_mae": self.training_.best_mae,
        }
        return write_folder(folder, manifest, self._write_weights)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, base: str | None = None, engine: str = "peft") -> PriceEstimator:
        """The estimator saved in `folder`, ready to predict: by stock transformers, which gives distributions.

        `base` says where the base model is now, when it is no longer where it was at training. Raises BaseModelError
        when the folder or its base cannot be read.
        """
        source = Path(folder)
        manifest = read_manifest(source)
        try:
            estimator = cls(**manifest["settings"])
            fallback_price, ceiling_price = float(manifest["fallback_price"]), float(manifest["ceiling_price"])
            saved, head = manifest["calibration"], manifest.get("head")
            estimator.calibration_ = None if saved is None else Calibration.from_dict(saved)
        except (KeyError, TypeError, ValueError, DataError) as error:
            raise BaseModelError(f"{source / MANIFEST} is damaged ({error}); train again or restore it") from error
        estimator.set_params(engine=engine, **({} if base is None else {"base": base}))
        estimator._check_params()
        chosen = estimator._choose_engine()
        method = check_method(estimator.method)
        if method == "full":
            max_tokens = estimator.max_tokens + _WRAPPER_TOKENS
            loaded = chosen.load_base(str(source / MODEL), method=method, max_tokens=max_tokens)
            estimator._model = loaded.model
        else:
            loaded = estimator._load_base(chosen, method)
            try:
                estimator._model = chosen.attach_saved(loaded.model, str(source / ADAPTER))
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                said = str(error).strip().splitlines()[0]
                raise BaseModelError(f"the adapter in {source} cannot be put on {estimator.base!r}: {said}") from error
        if head is not None:
            from fastprice.inference.price_heads import make_head

            try:
                estimator._head = make_head(width=estimator._width, **head)
            except (TypeError, ConfigError) as error:
                raise BaseModelError(f"{source / MANIFEST} is damaged ({error}); train again or restore it") from error
            estimator._head.restore(source / HEAD)
            estimator._head.to(estimator._model.device)
        estimator._engine = chosen
        estimator._tokenizer = loaded.tokenizer
        estimator.fallback_price_, estimator.ceiling_price_ = fallback_price, ceiling_price
        chosen.for_prediction(estimator._model)
        estimator._decide_distributions()
        return estimator

    def _choose_engine(self) -> Engine:
        """The engine; "auto" is peft where Unsloth cannot do what is asked.

        Unsloth places weights by itself, so it keeps no limit of memory, and it is not known to give the hidden states
        that heads and number losses train on: ConfigError where it is asked for them all the same.
        """
        reads_states = self.output == "head" or self.text_loss != "ce"
        if reads_states and self.engine == "unsloth":
            wants = "output='head'" if self.output == "head" else f"text_loss={self.text_loss!r}"
            raise ConfigError(f"engine: 'unsloth' gives no hidden states to train {wants} on; use engine='peft'")
        needs_peft = reads_states or self.max_memory is not None
        return choose_engine("peft" if self.engine == "auto" and needs_peft else self.engine)

    def _drop_model(self) -> None:
        """Releases the model and the device buffers of its offloaded layers."""
        layer_offload = getattr(self, "_layer_offload", None)
        if layer_offload is not None:
            layer_offload.close()
        self.plan_: MemoryPlan | None = None
        self._layer_offload: LayerOffload | None = None
        if hasattr(self, "_model"):
            del self._model

    def _load_base(self, engine: Engine, method: Method) -> LoadedModel:
        """The base, as a plan for `max_memory` says where that is given; sets `plan_` and `_layer_offload`."""
        self._drop_model()
        max_tokens = self.max_tokens + _WRAPPER_TOKENS
        if self.max_memory is None:
            return engine.load_base(self.base, method=method, max_tokens=max_tokens)
        from fastprice.offload.planned_loading import load_planned
        from fastprice.training.step_options import uses_kernels

        planned = load_planned(
            self.base,
            self.max_memory,
            engine,
            method=method,
            rank=self.rank,
            pack_tokens=self.pack_tokens,
            max_tokens=max_tokens,
            kernels=uses_kernels(self.kernels),
        )
        self.plan_, self._layer_offload = planned.plan, planned.layer_offload
        return planned.loaded

    def _write_weights(self, folder: Path) -> None:
        if self._head is not None:
            self._head.save(folder / HEAD)
        if self.method == "full":
            self._model.save_pretrained(folder / MODEL)
            self._tokenizer.save_pretrained(folder / MODEL)
        else:
            self._model.save_pretrained(folder / ADAPTER)

    def _training_settings(self) -> TrainConfig:
        """The settings of training, with the learning rate and the sizes of the memory plan filled in."""
        settings = TrainConfig(**{name: getattr(self, name) for name in TrainConfig.model_fields})
        changes: dict[str, float] = {}
        if settings.learning_rate is None:
            hidden_size = self._model.config.hidden_size
            changes["learning_rate"] = suggested_learning_rate(hidden_size, check_method(self.method))
        if self.plan_ is not None:
            changes["pack_tokens"] = self.plan_.tokens
            changes["gradient_accumulation"] = self.gradient_accumulation * self.plan_.gradient_accumulation
        return settings.model_copy(update=changes)

    def _auxiliary_losses(self, items: list[Item]) -> AuxiliaryLosses | None:
        """The losses added to that of the text, if any; makes the price head."""
        from fastprice.training.auxiliary_losses import AuxiliaryLosses

        self._head = self._new_head(items) if self.output == "head" else None
        number = None
        if self.text_loss != "ce":
            from fastprice.inference.price_trie import PriceTrie
            from fastprice.training.number_losses import NumberLoss

            trie = PriceTrie.of(self._tokenizer, max(1, round(self.ceiling_price_)), self.form)
            number = NumberLoss(self.text_loss, trie, self._tokenizer)
        if self._head is None and number is None:
            return None
        return AuxiliaryLosses(self._head, self.price_head_weight, number, self.text_loss_weight)

    def _new_head(self, items: list[Item]) -> PriceHead:
        """A head started from the prices of the training items, and from what the untrained model makes of some."""
        import torch

        from fastprice.inference.price_heads import make_head, prompt_hidden_states

        prices = [price_of(item) for item in items]
        low, high = min(prices), max(prices)
        if low == high:
            low, high = low / 2, high * 2
        head = make_head(self.price_head, self._width, low, high).to(self._model.device)
        head.start_from(prices)
        self._engine.for_prediction(self._model)
        prompts = [prompt.ids for prompt in self.prompts(draw_items(items, STANDARD_ITEMS, self.seed))]
        batches = prompt_hidden_states(self._model, prompts, batch_size=self.batch_size)
        head.standardize(torch.cat([hidden for _, hidden in batches]))
        return head

    def _calibrated(self, items: list[Item]) -> Calibration | None:
        """How far the intervals of the trained model must be widened, from at most `CALIBRATION_ITEMS` of `items`."""
        if not items or self._usable_decoder() is None:
            return None
        drawn = draw_items(items, CALIBRATION_ITEMS, self.seed)
        scored = [
            (distribution, price_of(item))
            for item, distribution in zip(drawn, self.distributions(self.prompts(drawn)), strict=True)
            if not distribution.is_empty
        ]
        return calibrate(*zip(*scored, strict=True), ceiling=self.ceiling_price_) if scored else None

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_model") and not np.isnan(self.fallback_price_)

    @property
    def _width(self) -> int:
        return int(self._model.config.get_text_config().hidden_size)

    def _alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def _check_params(self) -> None:
        """ConfigError naming every impossible setting at once."""
        wrong = [
            f"{name} must be {what}, not {getattr(self, name)!r}"
            for name, what, holds in (
                ("kernels", "auto, on or off", self.kernels in ("auto", "on", "off")),
                ("cuda_graphs", "auto, on or off", self.cuda_graphs in ("auto", "on", "off")),
                ("output", "text, json or head", self.output in ("text", "json", "head")),
                ("price_head", "histogram or quantile", self.price_head in ("histogram", "quantile")),
                ("price_head_weight", "above 0", self.price_head_weight > 0),
                ("text_loss", "one of " + ", ".join(TEXT_LOSSES), self.text_loss in TEXT_LOSSES),
                ("text_loss_weight", "above 0", self.text_loss_weight > 0),
                ("rank", "at least 1", self.rank >= 1),
                ("dropout", "from 0 to below 1", 0 <= self.dropout < 1),
                ("learning_rate", "above 0", self.learning_rate is None or self.learning_rate > 0),
                ("epochs", "above 0", self.epochs > 0),
                ("max_tokens", "at least 8", self.max_tokens >= 8),
                ("gradient_accumulation", "at least 1", self.gradient_accumulation >= 1),
                ("warmup_ratio", "from 0 to 1", 0 <= self.warmup_ratio <= 1),
                ("evaluations", "at least 0", self.evaluations >= 0),
                ("validation_items", "at least 1", self.validation_items >= 1),
                ("batch_size", "at least 1", self.batch_size >= 1),
            )
            if not holds
        ]
        try:
            check_recompute(self.recompute)
        except ConfigError as error:
            wrong.append(str(error))
        if self.pack_tokens < self.max_tokens + _WRAPPER_TOKENS:
            wrong.append(
                f"pack_tokens ({self.pack_tokens}) must hold one text with its question: "
                f"at least max_tokens + {_WRAPPER_TOKENS} = {self.max_tokens + _WRAPPER_TOKENS}"
            )
        if self.max_memory is not None:
            try:
                parse_bytes(self.max_memory)
            except ConfigError as error:
                wrong.append(f"max_{error}")
        if wrong:
            raise ConfigError("; ".join(wrong))
