"""The one place where a prompt and its loss mask are written: training, prediction, preview and serving share it.

An item becomes "How much does this cost to the nearest dollar?", its text, and "Price is $", each after an empty line.
The completion is the price in whole dollars as digits, then the end-of-sequence token; with `JSON` the prompt ends in
`{"price": ` and the completion is `129}`, which can only complete an object of the schema. Prompt and completion are
tokenized apart, so that the completion begins with a digit in every tokenizer. The wording is that of E. Donner's
course "LLM Engineering" (2024), less the cents.

The loss is completion-only: labels are `IGNORE` on the prompt. Only the item's text is ever truncated; the question and
"Price is $" always survive, so a long text loses its end and never the place of the answer.

An item's text is data and nothing else. Unprintable characters are removed (`data.cleaning.repair_text`), empty lines
are collapsed, and a special token that it spells out ("<|eos|>") is tokenized as characters: it can neither end the
prompt nor begin another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fastprice.data.cleaning import repair_text
from fastprice.data.money import parse_price
from fastprice.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fastprice.data.items import Item

__all__ = [
    "FORMS",
    "IGNORE",
    "JSON",
    "PREAMBLE",
    "PRICE_CUE",
    "TEXT",
    "AnswerFormat",
    "Prompt",
    "TrainingRow",
    "answer_text",
    "encode_prompt",
    "encode_row",
    "encode_rows",
    "encode_text",
    "token_ids",
]

PREAMBLE = "How much does this cost to the nearest dollar?\n\n"
PRICE_CUE = "\n\nPrice is $"
IGNORE = -100
# Longer texts are truncated to this many characters per allowed token before tokenization: tokenizing 100,000
# characters to use 200 tokens is waste. Real texts have 2 to 6 characters a token.
_CHARACTERS_PER_TOKEN = 40


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How an answer is written: `cue` ends the prompt, just before the number; `close` follows the number."""

    name: str
    cue: str
    close: str = ""

    def end_id(self, tokenizer: Any) -> int:
        """The token that ends a price: the end of the sequence, or the one that closes the JSON object.

        Raises DataError for a tokenizer without an end token, ConfigError for one that cannot close in one token.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the base model's tokenizer has no end-of-sequence token; set tokenizer.eos_token first")
        closing = token_ids(tokenizer, self.close) if self.close else [tokenizer.eos_token_id]
        if len(closing) != 1:
            raise ConfigError(
                f"output: {self.name!r} needs a tokenizer with {self.close!r} as one token, and this base model's "
                f"writes {len(closing)}; use output='text'"
            )
        return int(closing[0])

    def read(self, answer: str) -> float | None:
        """The price in dollars that a model generated after the prompt; None if there is none."""
        if not self.close:
            # The prompt ended with "Price is $": only what follows without a gap is its number.
            return parse_price(answer.split("\n")[0]) if answer[:1].isdigit() else None
        try:
            return float(_schema().model_validate_json(self.cue.strip() + answer).price)
        except ValueError:  # pydantic's ValidationError: not JSON, or not to the schema
            return None


TEXT = AnswerFormat("text", PRICE_CUE)
JSON = AnswerFormat("json", '\n\n{"price": ', "}")
FORMS = {form.name: form for form in (TEXT, JSON)}


@cache
def _schema() -> Any:
    from pydantic import BaseModel, ConfigDict, Field

    class PriceAnswer(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)

        price: float = Field(gt=0, allow_inf_nan=False)

    return PriceAnswer


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of one prompt, and how many tokens of its text were truncated (at least 1 if characters were)."""

    ids: list[int]
    cut: int


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """Token ids and labels (both length T) of a prompt and its completion; labels are `IGNORE` on the prompt.

    `cut` is that of the `Prompt`; `price` is the true one in dollars, NaN if unknown.
    """

    ids: list[int]
    labels: list[int]
    cut: int
    price: float = math.nan


def answer_text(price: float) -> str:
    """The completion for `price` dollars: whole dollars, never below one (the answer to "to the nearest dollar")."""
    return str(max(1, round(price)))


def encode_prompt(tokenizer: Any, text: str, max_tokens: int, form: AnswerFormat = TEXT) -> Prompt:
    """The prompt for `text`, its text truncated to at most `max_tokens` tokens."""
    ids, cut = encode_text(tokenizer, text, max_tokens)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Prompt([*start, *token_ids(tokenizer, PREAMBLE), *ids, *token_ids(tokenizer, form.cue)], cut)


def encode_text(tokenizer: Any, text: str, max_tokens: int) -> tuple[list[int], int]:
    """(At most `max_tokens` token ids of the repaired `text`, how many were truncated, as in `Prompt.cut`)."""
    text = repair_text(text)
    allowed = text[: max_tokens * _CHARACTERS_PER_TOKEN]
    ids = token_ids(tokenizer, allowed.strip())
    return ids[:max_tokens], max(len(ids) - max_tokens, 0) or int(len(allowed) < len(text))


def encode_row(tokenizer: Any, item: Item, max_tokens: int, form: AnswerFormat = TEXT) -> TrainingRow:
    """The training row of a priced item; raises DataError for an item without a price or a tokenizer without an end.

    Number and closing token are tokenized apart, so that a price ends with the same token whatever it is.
    """
    if item.price is None:
        raise DataError(f"row {item.row}: has no price, so it cannot be trained on; drop it or give it a price")
    end = form.end_id(tokenizer)
    prompt = encode_prompt(tokenizer, item.text, max_tokens, form)
    answer = [*token_ids(tokenizer, answer_text(item.price)), end, *([tokenizer.eos_token_id] if form.close else [])]
    return TrainingRow([*prompt.ids, *answer], [IGNORE] * len(prompt.ids) + answer, prompt.cut, item.price)


def encode_rows(tokenizer: Any, items: Sequence[Item], max_tokens: int, form: AnswerFormat = TEXT) -> list[TrainingRow]:
    """`encode_row` for each item, in order."""
    return [encode_row(tokenizer, item, max_tokens, form) for item in items]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of `text` and nothing else: "</s>" in a product's text is four characters, never the end token."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
