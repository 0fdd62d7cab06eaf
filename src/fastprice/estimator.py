"""`PriceEstimator`: a language model as a scikit-learn regressor from text to dollars."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, RegressorMixin

from fastprice.config import PROMPT_TOKENS, EstimatorConfig, TrainConfig, check_params, describe_parameters
from fastprice.data.estimator_inputs import as_training_items, draw_items, price_of
from fastprice.data.items import Item
from fastprice.errors import BaseModelError, ConfigError, DataError, NotFittedError, nearest_name
from fastprice.inference.conformal import Calibration, calibrate
from fastprice.inference.predictor import PricePredictor
from fastprice.memory import parse_bytes
from fastprice.models.adapters import suggested_learning_rate
from fastprice.models.engine_choice import choose_engine
from fastprice.models.engine_features import Feature
from fastprice.models.saved_folder import ADAPTER, MANIFEST, MODEL, PRICE_HEAD, read_manifest, write_folder
from fastprice.prompts.template import encode_rows

if TYPE_CHECKING:
    from fastprice.inference.price_heads import PriceHead
    from fastprice.memory import MemoryPlan
    from fastprice.models.engine import Engine, LoadedModel
    from fastprice.offload import LayerOffload
    from fastprice.training.auxiliary_losses import AuxiliaryLosses
    from fastprice.training.callbacks import TrainingEvent
    from fastprice.training.train import TrainingResult

__all__ = ["PriceEstimator"]

CALIBRATION_ITEMS = 1000  # validation items; their sampling noise in a coverage of 90 % is below 1 % (one sigma)
SCALING_ITEMS = 512  # training items by whose hidden states a price head's are scaled; 3 % noise in a deviation
UNTRAINED_CEILING = 999.0  # dollars: the largest price of a base model that has not been trained on any


def _suggest_parameters(cls: type) -> type:
    """The class with a constructor whose TypeError for an unknown keyword names the nearest one (Python 3.13 does)."""
    construct = cls.__init__  # type: ignore[misc]
    known = list(signature(construct).parameters)

    @wraps(construct)
    def construct_checked(self: Any, *args: Any, **params: Any) -> None:
        unknown = [f"{name!r}{nearest_name(name, known)}" for name in params if name not in known]
        if unknown:
            raise TypeError(f"{cls.__name__} got an unexpected keyword argument: {', '.join(unknown)}")
        construct(self, *args, **params)

    cls.__init__ = construct_checked  # type: ignore[misc]
    return cls


@_suggest_parameters
@dataclass(eq=False, repr=False)
class PriceEstimator(EstimatorConfig, PricePredictor, RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Fine-tunes a language model to estimate a product's price in dollars from its text.

    The parameters are the settings of the sections `model` and `train` and the seed (fastprice.config,
    docs/reference/settings.md); `fit` checks them. It follows scikit-learn: `get_params`, `set_params`, `clone`,
    `cross_val_score(estimator, items)`.

    Attributes:
        fallback_price_: after `fit`, the median training price in dollars, for a text without an estimate.
        ceiling_price_: the largest training price, and the largest that is estimated.
        training_: the fastprice.TrainingResult.
        cut_: number of training texts that were truncated to `max_tokens`.
        calibration_: the fastprice.Calibration of the intervals; None without validation items.
        plan_: the fastprice.MemoryPlan; None without `max_memory`.
    """

    # scikit-learn's, not the dataclass's: estimators are compared and hashed by identity.
    __repr__ = BaseEstimator.__repr__
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def prepare(self) -> PriceEstimator:
        """Loads the base model and puts untrained adapters on it, so that `predict` gives the base's estimates.

        `fit` calls it; call it yourself only to measure the base. Raises ConfigError, BaseModelError.
        """
        self._check_params()
        self._engine = self._choose_engine()
        loaded = self._load_base(self._engine)
        self._tokenizer = loaded.tokenizer
        self._model = self._engine.attach(
            loaded.model,
            method=self.method,
            rank=self.rank,
            alpha=2.0 * self.rank if self.alpha is None else self.alpha,
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
        on_trainer: Callable[[Any], None] | None = None,
    ) -> PriceEstimator:
        """Fine-tunes on `train`; keeps the weights with the smallest error in dollars on `validation`.

        Args:
            train: Items with prices; or texts, with their prices as second argument (scikit-learn's `fit(X, y)`).
            validation: Items with prices; None: the last weights are kept.
            on_event: called with every logged fastprice.TrainingEvent.
            on_trainer: called with TRL's trainer before its first step, to add callbacks to it, say.

        Raises:
            DataError: an item without a price.
            ConfigError: impossible settings.
            BaseModelError: a base that cannot be loaded.
            TrainingError: training that cannot continue.
        """
        from fastprice.training.step_options import StepOptions
        from fastprice.training.train import train as run_training

        items, validation_items = as_training_items(train, validation)
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
                    dense_layers=self.dense_layers,
                    mlp_tile=self.mlp_tile,
                    memory_budget=None if self.max_memory is None else parse_bytes(self.max_memory),
                    offloaded_layers=0 if self.plan_ is None else self.plan_.offloaded_layers,
                ),
                auxiliary=auxiliary,
                on_event=on_event,
                on_trainer=on_trainer,
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
            raise _damaged(source, error) from error
        estimator.set_params(engine=engine, **({} if base is None else {"base": base}))
        estimator._check_params()
        estimator._load_weights(source)
        if head is not None:
            estimator._load_head(source, head)
        estimator.fallback_price_, estimator.ceiling_price_ = fallback_price, ceiling_price
        estimator._decide_distributions()
        return estimator

    def _load_weights(self, source: Path) -> None:
        """Sets engine, tokenizer and model from the saved estimator in `source`."""
        self._engine = self._choose_engine()
        if self.method == "full":
            loaded = self._engine.load_base(str(source / MODEL), method=self.method, max_tokens=self._sequence_tokens)
            self._model = loaded.model
        else:
            loaded = self._load_base(self._engine)
            try:
                self._model = self._engine.attach_saved(loaded.model, str(source / ADAPTER))
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise BaseModelError(f"the adapter in {source} cannot be put on {self.base!r}: {reason}") from error
        self._tokenizer = loaded.tokenizer
        self._engine.for_prediction(self._model)

    def _load_head(self, source: Path, settings: dict[str, Any]) -> None:
        from fastprice.inference.price_heads import make_head

        try:
            self._head = make_head(width=self._width, **settings)
        except (TypeError, ConfigError) as error:
            raise _damaged(source, error) from error
        self._head.restore(source / PRICE_HEAD)
        self._head.to(self._model.device)

    def _choose_engine(self) -> Engine:
        """The engine that has what the settings need; ConfigError for engine="unsloth" if that lacks it."""
        from fastprice.training.step_options import uses_kernels

        needs: dict[Feature, str] = {}
        if self.method == "full":
            needs["full fine-tuning"] = "method='full'"
        if self.output == "head" or self.text_loss != "ce":
            needs["hidden states"] = "output='head'" if self.output == "head" else f"text_loss={self.text_loss!r}"
        # Whether layers must be offloaded is known once the configuration is read, which imports transformers.
        if self.max_memory is not None and self.engine == "auto":
            needs["layers on the host"] = f"max_memory={self.max_memory!r}"
        return choose_engine(self.engine, needs=needs, base=self.base, kernels=uses_kernels(self.kernels))

    def _drop_model(self) -> None:
        """Releases the model and the device buffers of its offloaded layers."""
        layer_offload = getattr(self, "_layer_offload", None)
        if layer_offload is not None:
            layer_offload.close()
        self.plan_: MemoryPlan | None = None
        self._layer_offload: LayerOffload | None = None
        if hasattr(self, "_model"):
            del self._model

    def _load_base(self, engine: Engine) -> LoadedModel:
        """The base model, within `max_memory` if that is given; sets `plan_` and `_layer_offload`."""
        self._drop_model()
        if self.max_memory is None:
            return engine.load_base(self.base, method=self.method, max_tokens=self._sequence_tokens)
        from fastprice.offload.planned_loading import load_planned
        from fastprice.training.step_options import uses_kernels

        planned = load_planned(
            self.base,
            self.max_memory,
            engine,
            method=self.method,
            rank=self.rank,
            pack_tokens=self.pack_tokens,
            max_tokens=self._sequence_tokens,
            kernels=uses_kernels(self.kernels),
        )
        self.plan_, self._layer_offload = planned.plan, planned.layer_offload
        return planned.loaded

    def _write_weights(self, folder: Path) -> None:
        if self._head is not None:
            self._head.save(folder / PRICE_HEAD)
        if self.method == "full":
            self._model.save_pretrained(folder / MODEL)
            self._tokenizer.save_pretrained(folder / MODEL)
        else:
            self._model.save_pretrained(folder / ADAPTER)

    def _training_settings(self) -> TrainConfig:
        """The settings of training, with the learning rate and the sizes of the memory plan filled in."""
        settings = TrainConfig(**{each.name: getattr(self, each.name) for each in fields(TrainConfig)})
        changes: dict[str, Any] = {}
        if settings.learning_rate is None:
            changes["learning_rate"] = suggested_learning_rate(self._model.config.hidden_size, self.method)
        if self.plan_ is not None:
            changes["pack_tokens"] = self.plan_.tokens
            changes["gradient_accumulation"] = self.gradient_accumulation * self.plan_.gradient_accumulation
        return replace(settings, **changes)

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
        """A price head initialized with the training prices and scaled by hidden states of the untrained model."""
        import torch

        from fastprice.inference.price_heads import make_head, prompt_hidden_states

        prices = [price_of(item) for item in items]
        low, high = min(prices), max(prices)
        if low == high:
            low, high = low / 2, high * 2
        head = make_head(self.price_head, self._width, low, high).to(self._model.device)
        head.start_from(prices)
        self._engine.for_prediction(self._model)
        prompts = [prompt.ids for prompt in self.prompts(draw_items(items, SCALING_ITEMS, self.seed))]
        batches = prompt_hidden_states(self._model, prompts, batch_size=self.batch_size)
        head.standardize(torch.cat([hidden for _, hidden in batches]))
        return head

    def _calibrated(self, items: list[Item]) -> Calibration | None:
        """Split-conformal calibration of the intervals on at most `CALIBRATION_ITEMS` of `items`; None without any."""
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

    @property
    def _sequence_tokens(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return self.max_tokens + PROMPT_TOKENS

    def _check_params(self) -> EstimatorConfig:
        """ConfigError naming every impossible parameter; NumPy's numbers count as Python's."""
        return check_params(
            {
                name: value.item() if isinstance(value, np.generic) else value
                for name, value in self.get_params().items()
            }
        )


PriceEstimator.__doc__ = f"{PriceEstimator.__doc__}\n    Parameters:\n\n{describe_parameters()}\n"


def _damaged(source: Path, error: Exception) -> BaseModelError:
    return BaseModelError(f"{source / MANIFEST} is damaged ({error}); train again or restore it")
