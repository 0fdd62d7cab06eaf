"""The sizes of a model that its memory and arithmetic follow from, read from its configuration: no weights, no torch.

`published_shapes/*.json` holds the configurations of common models (the published values of their `config.json`, only
the keys that are read here), so that planning needs no network. A folder, a hub id or a transformers configuration
serves as well. What the configuration does not say comes from `fastprice.models.families`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastprice.errors import BaseModelError, nearest_name
from fastprice.models.families import FAMILIES, Family

__all__ = ["Linear", "ModelShape", "read_shape", "settings_of", "shipped_names"]

_PUBLISHERS = ("meta-llama", "unsloth", "qwen", "google", "mistralai", "huggingfacetb")
_SAME_SHAPE = re.compile(r"(-unsloth)?(-bnb-4bit)?$")
_TUNED = re.compile(r"-(instruct|it|base)$")


@dataclass(frozen=True)
class Linear:
    """One linear layer of a decoder layer, and how many weights it has."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only language model with gated MLPs, as numbers.

    width          hidden size                        inner         intermediate size of the MLP
    key_heads      heads of keys and values           vocabulary    rows of the embedding and of lm_head
    tied           lm_head is the embedding           family        what all models of its kind share
    softcap, logit_softcap   whether attention scores, logits are soft-capped
    """

    name: str
    family: Family
    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    softcap: bool
    logit_softcap: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The seven linear layers of a decoder layer, in the order in which they run: q, k, v, o, gate, up, down."""
        h, q, k, i = self.width, self.query_width, self.key_width, self.inner
        inputs = (h, h, h, q, h, h, i)
        outputs = (q, k, k, h, i, i, h)
        biases = (*3 * (self.attention_bias,), self.output_bias, *3 * (self.mlp_bias,))
        return tuple(map(Linear, self.family.linears, inputs, outputs, biases))

    @property
    def layer_linear_weights(self) -> int:
        return sum(linear.weights for linear in self.linears)

    @property
    def layer_other_weights(self) -> int:
        """Norms and biases of one layer."""
        biases = sum(linear.outputs for linear in self.linears if linear.bias)
        per_head = 2 * self.head_dim if self.family.query_key_norms else 0
        return self.family.layer_norms * self.width + per_head + biases

    @property
    def lm_head_weights(self) -> int:
        """Weights of lm_head, shared with the embedding when tied."""
        return self.vocabulary * self.width

    @property
    def outer_weights(self) -> int:
        """Embedding, last norm, and lm_head unless tied."""
        return self.lm_head_weights * (1 if self.tied else 2) + self.width

    @property
    def parameters(self) -> int:
        return self.outer_weights + self.layers * (self.layer_linear_weights + self.layer_other_weights)

    def adapter_weights(self, rank: int) -> int:
        """Weights of one layer's LoRA adapters of this rank on all its linear layers."""
        return sum(rank * (linear.inputs + linear.outputs) for linear in self.linears)


def shipped_names() -> list[str]:
    """Names of the shipped configurations, in alphabetical order."""
    return sorted(_shipped(), key=str.lower)


def read_shape(base: Any) -> ModelShape:
    """The shape of `base`: a shape, a shipped name, a folder, a hub id, or a transformers configuration.

    A hub id of a well-known publisher is looked up among the shipped names first, so that no network is needed; only
    a hub id that is not there imports transformers. Raises BaseModelError when nothing answers to the name, or when it
    is a kind of model that is not described here.
    """
    if isinstance(base, ModelShape):
        return base
    if isinstance(base, Mapping):
        return _from_settings(dict(base), str(base.get("_name_or_path") or base.get("model_type") or "model"))
    if not isinstance(base, str | Path):
        return _from_config(base)
    name = str(base)
    shipped = _shipped_name(name)
    if shipped is not None and not Path(name).expanduser().is_dir():
        return _from_settings(settings_of(shipped), shipped)
    return _from_name(name)


def _from_name(name: str) -> ModelShape:
    from fastprice.models.base_models import load_config, resolve_base

    try:
        folder = Path(resolve_base(name))
        if not folder.is_dir():
            if "/" not in name:
                raise BaseModelError(
                    f"base: {name!r} is neither a folder nor one of the models whose shape is shipped"
                    f"{nearest_name(name.lower(), [known.lower() for known in shipped_names()])}; known: "
                    f"{', '.join(shipped_names())}"
                )
            return _from_config(load_config(name))
    except BaseModelError as error:
        near = nearest_name(name.rpartition("/")[2].lower(), [known.lower() for known in shipped_names()])
        raise BaseModelError(str(error) + ("" if "did you mean" in str(error) else near)) from error
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base: {folder / 'config.json'} cannot be read as JSON: {error}") from error
    return _from_settings(settings, name)


def settings_of(name: str) -> dict[str, Any]:
    """The shipped configuration of that name, as the keys of its `config.json`."""
    shipped = _shipped_name(name)
    if shipped is None:
        raise BaseModelError(f"base: no shape named {name!r} is shipped{nearest_name(name, shipped_names())}")
    settings: dict[str, Any] = json.loads(_shipped()[shipped])
    return settings


@cache
def _shipped() -> dict[str, str]:
    """Name -> JSON text of each shipped configuration."""
    return {
        entry.name.removesuffix(".json"): entry.read_text(encoding="utf-8")
        for entry in (files("fastprice.models") / "published_shapes").iterdir()
        if entry.name.endswith(".json")
    }


def _shipped_name(name: str) -> str | None:
    """The shipped name that `name` stands for: alone or with its publisher, any case, tuned or pre-quantized."""
    publisher, _, rest = name.lower().rpartition("/")
    if publisher and publisher not in _PUBLISHERS:
        return None
    rest = _TUNED.sub("", _SAME_SHAPE.sub("", rest)).removeprefix("meta-")
    return next((known for known in _shipped() if known.lower() == rest), None)


def _from_config(config: Any) -> ModelShape:
    settings = config.to_dict() if hasattr(config, "to_dict") else None
    if not isinstance(settings, dict):
        raise BaseModelError(
            f"base: {type(config).__name__} is no model; give a folder, a hub id, a shipped name such as "
            "'Llama-3.1-8B', or a transformers configuration"
        )
    return _from_settings(settings, str(settings.get("_name_or_path") or settings["model_type"]))


def _from_settings(settings: dict[str, Any], name: str) -> ModelShape:
    family = FAMILIES.get(settings.get("model_type") or "")
    if family is None:
        raise BaseModelError(
            f"base: the memory of {name} cannot be estimated: its model_type is {settings.get('model_type')!r}, not "
            f"one of {', '.join(FAMILIES)}"
        )

    def number(key: str, default: int | None = None) -> int:
        value = settings.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BaseModelError(f"base: the configuration of {name} has {key}={value!r}, not a whole number above 0")
        return value

    width, heads = number("hidden_size"), number("num_attention_heads")
    configured_bias = bool(settings.get("attention_bias", False))
    # A config.json may leave keys out: the defaults are those of the transformers configuration classes. A softcap of
    # null turns it off.
    return ModelShape(
        name=name,
        family=family,
        width=width,
        inner=number("intermediate_size"),
        layers=number("num_hidden_layers"),
        heads=heads,
        key_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", family.head_dim or width // heads),
        vocabulary=number("vocab_size"),
        tied=bool(settings.get("tie_word_embeddings", family.tied)),
        softcap=family.softcaps and settings.get("attn_logit_softcapping", True) is not None,
        logit_softcap=family.softcaps and settings.get("final_logit_softcapping", True) is not None,
        attention_bias=configured_bias if family.attention_bias == "config" else family.attention_bias,
        output_bias=configured_bias if family.output_bias == "config" else family.output_bias,
        mlp_bias=bool(settings.get("mlp_bias", False)),
    )
