"""Every setting, declared once: its name, type, range, default and, in the docstring below it, its help.

The constructor of `PriceEstimator`, the options of the command line, YAML files, the checks of values, `fastprice
settings`, the JSON schema and docs/reference/settings.md all come from these dataclasses: a new setting is one field.

The sections are dataclasses that pydantic validates, not pydantic models. `PriceEstimator` inherits the fields of
`EstimatorConfig`, so type checkers and editors know its keyword arguments; and its parameters are checked in `fit`, as
scikit-learn wants, not in the constructor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fastprice.errors import ConfigError
from fastprice.models.adapters import Method

__all__ = [
    "PROMPT_TOKENS",
    "CleanConfig",
    "DataConfig",
    "EstimatorConfig",
    "ModelConfig",
    "RunConfig",
    "SplitConfig",
    "TrainConfig",
]

PROMPT_TOKENS = 64  # room for the preamble, the question and the answer beside a text of max_tokens

_SECTION = ConfigDict(
    extra="forbid",
    allow_inf_nan=False,
    revalidate_instances="always",
    use_attribute_docstrings=True,
    validate_default=True,
)


def _on_or_off(value: Any) -> Any:
    """YAML reads a bare on or off as a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _without_key(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    """`check`, which raises ConfigError("key: what is wrong"), as a validator; the key is added to all errors later."""

    def validate(value: Any) -> Any:
        try:
            if value is not None:
                check(value)
        except ConfigError as error:
            raise ValueError(str(error).partition(": ")[2]) from error
        return value

    return validate


def _check_size(size: str | int) -> None:
    from fastprice.memory import parse_bytes

    parse_bytes(size)


def _check_recompute(levels: str) -> None:
    from fastprice.memory.recompute_levels import check_recompute

    check_recompute(levels)


def _metavar(name: str) -> Any:
    """What the help of the command line prints for the value, in place of its type."""
    return Field(json_schema_extra={"format": name})


Column = Annotated[str, _metavar("COL")]
Columns = Annotated[
    list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str]), _metavar("COL...")
]  # fmt: skip
Size = Annotated[str | int | None, AfterValidator(_without_key(_check_size)), _metavar("SIZE")]
RecomputeLevels = Annotated[str, AfterValidator(_without_key(_check_recompute)), _metavar("LEVELS")]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_on_or_off)]
Share = Annotated[float, Field(gt=0, lt=0.5)]
Seed = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the items come from: a file, or synthetic products."""

    __pydantic_config__ = _SECTION

    file: Annotated[str | None, _metavar("FILE")] = None
    """JSONL(.gz), CSV or Parquet file."""
    synthetic: Annotated[int | None, Field(ge=20)] = None
    """In place of a file: so many synthetic products with prices."""
    text: Columns = field(default_factory=lambda: ["text"])
    """Text columns, or '*' for all."""
    price: Column = "price"
    """Price column."""
    group: Columns = field(default_factory=list)
    """Columns whose equal rows stay in one split."""
    drop: Columns = field(default_factory=list)
    """Columns that '*' leaves out."""
    limit: Annotated[int | None, Field(ge=20)] = None
    """Use only so many usable items, drawn with the seed."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if (self.file is None) == (self.synthetic is None):
            raise ValueError("give either file (a JSONL, CSV or Parquet file) or synthetic (a number of products)")
        return self


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Which items are used, and what is masked in their texts."""

    __pydantic_config__ = _SECTION

    min_price: PositiveFloat = 0.50
    """Items below this price, in dollars, are rejected."""
    max_price: PositiveFloat = 999.49
    """Items above this price, in dollars, are rejected."""
    mask: Annotated[Literal["own", "prices", "off"], BeforeValidator(_on_or_off)] = "own"
    """Prices that are masked in a text: the item's own, every price, or none."""

    @field_validator("max_price")
    @classmethod
    def _ordered(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("min_price", 0):
            raise ValueError(f"must be above min_price, not {value!r}")
        return value


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which items are held out for validation and test."""

    __pydantic_config__ = _SECTION

    validation: Share = 0.1
    """Share of the items for validation."""
    test: Share = 0.1
    """Share of the items for the test."""
    near_duplicates: bool = True
    """Keep items with near-duplicate texts in one split."""


@dataclass
class ModelConfig:
    """The base model, what is tuned in it, and what it outputs."""

    __pydantic_config__ = _SECTION

    base: str = "nano"
    """Base model: nano (shipped; it shows the pipeline), a folder or a hub id."""
    _: KW_ONLY
    method: Method = "qlora"
    """LoRA adapters on an NF4 base, LoRA adapters on a 16-bit base (fp32 on a CPU), or all weights."""
    engine: Literal["auto", "peft", "unsloth"] = "auto"
    """What loads and tunes the model; auto: the faster one by counting bytes, which is peft on fastprice's kernels and
    without them unsloth, where that runs and has what the settings need."""
    kernels: Switch = "auto"
    """Train with fastprice's Triton kernels; auto: on a CUDA device."""
    output: Literal["text", "json", "head"] = "text"
    """The price as digits, as {"price": number}, or as digits beside a price head, which gives the distribution in one
    pass and which predict then uses."""
    price_head: Literal["histogram", "quantile"] = "histogram"
    """Kind of the price head of output head: bins of the log price, or quantiles."""
    rank: PositiveInt = 16
    """Rank of the LoRA adapters."""
    alpha: PositiveFloat | None = None
    """Alpha of the LoRA adapters; null: 2 x rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the LoRA adapters."""
    max_tokens: Annotated[int, Field(ge=8)] = 256
    """Longest text in tokens; longer ones lose their end."""
    max_memory: Size = None
    """GPU memory to stay within, such as 24GiB: packs may get smaller than pack_tokens (more gradient accumulation
    makes up for it), and layers of a frozen qlora base that do not fit are offloaded to the host."""
    recompute: RecomputeLevels = "auto"
    """Activation checkpointing: none, selective, mlp, full or offload (full, with the inputs on the host) for every
    layer, or counts from the first layer on, such as '12 full, 20 selective'; auto: what fits the GPU, none on a
    CPU."""
    dense_layers: Annotated[Literal["auto"] | Annotated[int, Field(ge=0)], _metavar("N")] = "auto"
    """Layers of a qlora base whose frozen weights stay dequantized while it trains on the kernels, which saves time and
    takes 2 bytes a weight; auto: as many as fit where nothing is recomputed, none on a CPU."""
    mlp_tile: Annotated[int | None, Field(ge=1), _metavar("N")] = None
    """Tokens that an MLP on the kernels computes at a time, in both directions, for packs of many thousand tokens: it
    saves memory and computes gate and up again in the backward pass; null: all."""


@dataclass(kw_only=True)
class TrainConfig:
    """How long, how fast and on which losses training runs."""

    __pydantic_config__ = _SECTION

    learning_rate: PositiveFloat | None = None
    """Peak learning rate; null: a default that depends on the model's width."""
    epochs: PositiveFloat = 1.0
    """Passes over the training items."""
    price_head_weight: PositiveFloat = 1.0
    """Weight of the price head's loss beside the text's."""
    text_loss: Literal["ce", "number", "number_mse", "wasserstein"] = "ce"
    """Cross-entropy alone, or with a second loss that knows which numbers are near each other."""
    text_loss_weight: PositiveFloat = 0.3
    """Weight of that second loss."""
    pack_tokens: Annotated[int, Field(ge=72)] = 2048
    """Tokens of a pack, which is a micro-batch."""
    gradient_accumulation: PositiveInt = 1
    """Micro-batches of an optimizer step."""
    cuda_graphs: Switch = "auto"
    """Replay training steps as CUDA graphs; auto: adapters of models up to 2.5 billion parameters, where a check of the
    replay against a plain step passes."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of the steps over which the learning rate rises; it then falls along a cosine."""
    evaluations: Annotated[int, Field(ge=0)] = 5
    """How often the validation error in dollars is computed; the weights of the best step are kept."""
    validation_items: PositiveInt = 200
    """How many validation items are used for it at most, drawn with the seed."""
    batch_size: PositiveInt = 64
    """Prompts that are predicted at once."""


def _check_pack(pack_tokens: int, max_tokens: int) -> None:
    least = max_tokens + PROMPT_TOKENS
    if pack_tokens < least:
        raise ValueError(
            f"must hold one text with its question: at least max_tokens + {PROMPT_TOKENS} = {least}, not {pack_tokens}"
        )


@dataclass(kw_only=True)
class EstimatorConfig(TrainConfig, ModelConfig):
    """The parameters of a `PriceEstimator`: those of the sections model and train, and the seed."""

    __pydantic_config__ = _SECTION

    seed: Seed = 0
    """Seed of adapter weights and of every random draw."""

    @field_validator("pack_tokens")
    @classmethod
    def _one_text_fits(cls, value: int, info: ValidationInfo) -> int:
        _check_pack(value, info.data.get("max_tokens", 0))
        return value


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of `fastprice train`; `to_yaml` writes what `read_config` reads."""

    __pydantic_config__ = _SECTION

    data: DataConfig
    clean: CleanConfig = field(default_factory=CleanConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: Seed = EstimatorConfig.seed
    """Seed of the split, of adapter weights and of every random draw."""
    out: Annotated[str, _metavar("DIR")]
    """Folder for the report and the model."""

    @field_validator("train")
    @classmethod
    def _one_text_fits(cls, value: TrainConfig, info: ValidationInfo) -> TrainConfig:
        if "model" in info.data:
            try:
                _check_pack(value.pack_tokens, info.data["model"].max_tokens)
            except ValueError as error:
                raise ValueError(f"pack_tokens {error}") from error
        return value

    def estimator_params(self) -> dict[str, Any]:
        """The constructor's arguments of a PriceEstimator."""
        return {**asdict(self.model), **asdict(self.train), "seed": self.seed}

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
