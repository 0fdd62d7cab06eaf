"""Prompting strategies by name."""

from __future__ import annotations

from fastprice.errors import ConfigError, nearest_name
from fastprice.prompting.chaining import Chaining
from fastprice.prompting.few_shot import FewShot
from fastprice.prompting.retrieval import EmbeddingIndex, Retrieval, load_sentence_encoder
from fastprice.prompting.strategy import Strategy
from fastprice.prompting.tools import ToolUse
from fastprice.prompting.zero_shot import ZeroShot

__all__ = ["DEFAULT_EXAMPLES", "STRATEGIES", "make_strategy"]

DEFAULT_EXAMPLES = 4
# Name to the full form of a specification.
STRATEGIES = {
    "zero-shot": "zero-shot",
    "few-shot": "few-shot:K",
    "retrieval": "retrieval:K or retrieval:K:embeddings",
    "chaining": "chaining",
    "tools": "tools",
}


def make_strategy(spec: str, *, seed: int = 0) -> Strategy:
    """The strategy that `spec` names: "zero-shot", "few-shot:4", "retrieval:4", "retrieval:4:embeddings", ...

    `seed` draws the examples of few-shot. Raises ConfigError for an unknown name, number or index,
    MissingDependencyError for embeddings without sentence-transformers.
    """
    name, *rest = spec.split(":")
    match name, rest:
        case "zero-shot", []:
            return ZeroShot()
        case "few-shot", [] | [_]:
            return FewShot(_number_of_examples(spec, rest), seed=seed)
        case "retrieval", [] | [_] | [_, "bm25"]:
            return Retrieval(_number_of_examples(spec, rest))
        case "retrieval", [_, "embeddings"]:
            k = _number_of_examples(spec, rest)
            return Retrieval(k, index=EmbeddingIndex(load_sentence_encoder()), label=":embeddings")
        case "chaining", []:
            return Chaining()
        case "tools", []:
            return ToolUse()
    if name in STRATEGIES:
        raise ConfigError(f"strategy {spec!r}: write {STRATEGIES[name]}")
    known = ", ".join(STRATEGIES.values())
    raise ConfigError(f"strategy {spec!r}: unknown name{nearest_name(name, STRATEGIES)}; write one of {known}")


def _number_of_examples(spec: str, rest: list[str]) -> int:
    if not rest:
        return DEFAULT_EXAMPLES
    if not (rest[0].isascii() and rest[0].isdigit() and len(rest[0]) <= 4 and int(rest[0]) >= 1):
        raise ConfigError(f"strategy {spec!r}: the number of examples must be a whole number from 1, not {rest[0]!r}")
    return int(rest[0])
