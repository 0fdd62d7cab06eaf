"""Strategies by name."""

from __future__ import annotations

from fastprice.errors import ConfigError, nearest_name
from fastprice.prompting.chaining import Chaining
from fastprice.prompting.few_shot import FewShot
from fastprice.prompting.retrieval import EmbeddingIndex, Retrieval, sentence_encoder
from fastprice.prompting.strategy import Strategy
from fastprice.prompting.tools import Tools
from fastprice.prompting.zero_shot import ZeroShot

__all__ = ["EXAMPLES", "STRATEGIES", "choose_strategy"]

EXAMPLES = 4  # where a strategy takes a number and none is given
# How each is written, in full.
STRATEGIES = {
    "zero-shot": "zero-shot",
    "few-shot": "few-shot:K",
    "retrieval": "retrieval:K or retrieval:K:embeddings",
    "chaining": "chaining",
    "tools": "tools",
}


def choose_strategy(spec: str, *, seed: int = 0) -> Strategy:
    """The strategy that `spec` names: "zero-shot", "few-shot:4", "retrieval:4", "retrieval:4:embeddings", ...

    `seed` draws the examples of few-shot. Raises ConfigError for a name, number or index that there is not,
    MissingDependencyError where embeddings are asked for and sentence-transformers is missing.
    """
    name, *rest = spec.split(":")
    match name, rest:
        case "zero-shot", []:
            return ZeroShot()
        case "few-shot", [] | [_]:
            return FewShot(_examples(spec, rest), seed=seed)
        case "retrieval", [] | [_] | [_, "bm25"]:
            return Retrieval(_examples(spec, rest))
        case "retrieval", [_, "embeddings"]:
            k = _examples(spec, rest)
            return Retrieval(k, index=EmbeddingIndex(sentence_encoder()), label=":embeddings")
        case "chaining", []:
            return Chaining()
        case "tools", []:
            return Tools()
    if name in STRATEGIES:
        raise ConfigError(f"strategy {spec!r}: write {STRATEGIES[name]}")
    known = ", ".join(STRATEGIES.values())
    raise ConfigError(f"strategy {spec!r}: unknown name{nearest_name(name, STRATEGIES)}; there are {known}")


def _examples(spec: str, rest: list[str]) -> int:
    if not rest:
        return EXAMPLES
    if not (rest[0].isascii() and rest[0].isdigit() and len(rest[0]) <= 4 and int(rest[0]) >= 1):
        raise ConfigError(f"strategy {spec!r}: the number of examples is a whole number from 1, not {rest[0]!r}")
    return int(rest[0])
