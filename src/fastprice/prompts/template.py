"""The one place where a prompt is written: training, prediction, inspection and serving share it.

An item becomes

    How much does this cost to the nearest dollar?
    ⏎
    {text}
    ⏎
    Price is $

and the completion is the price in whole dollars, as digits, followed by the end-of-sequence token. The dollar sign ends
the prompt, so that the completion starts with a digit in every tokenizer: no tokenizer merges "$" with a digit across
that border because the two sides are tokenized apart. The wording is that of the course from which the problem is known
(E. Donner, "LLM Engineering", 2024), less its cents.

Where JSON is asked for (`JSON`), the prompt ends with `{"price": ` in place of "Price is $", and the completion is
`129}`: what is decoded after the prompt can only complete an object that holds to the schema.

Only the text is ever cut: the question and "Price is $" always survive, so that a long text costs its own tail and
never the place where the answer goes.

A text is data and nothing else. What cannot be printed is taken out of it (`cleaning.repair_text`, which training items
have gone through already), and a special token that it spells ("<|eos|>") is tokenized as the characters it consists
of: it can neither end the prompt nor begin another. Its newlines come one at a time, so that the empty lines around it
are the prompt's alone.
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
    "HEAD",
    "IGNORE",
    "JSON",
    "TAIL",
    "TEXT",
    "Form",
    "Prompt",
    "TrainingRow",
    "answer_text",
    "encode_prompt",
    "encode_row",
    "encode_rows",
    "encode_text",
    "token_ids",
]

HEAD = "How much does this cost to the nearest dollar?\n\n"
TAIL = "\n\nPrice is $"
IGNORE = -100
# A text longer than this many characters per allowed token is cut before it is tokenized: tokenizing 100,000
# characters to keep 200 tokens is waste. Real texts hold 2 to 6 characters a token.
_CHARACTERS_PER_TOKEN = 40


@dataclass(frozen=True, slots=True)
class Form:
    """How an answer is written: what stands before the number (`tail`, the end of the prompt), and after it."""

    name: str
    tail: str
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
        """The price in dollars that a model wrote after the prompt; None where it wrote none."""
        if not self.close:
            # The prompt ended with "Price is $": only what follows without a gap is its number.
            return parse_price(answer.split("\n")[0]) if answer[:1].isdigit() else None
        try:
            return float(_schema().model_validate_json(self.tail.strip() + answer).price)
        except ValueError:  # pydantic's ValidationError: not JSON, or not to the schema
            return None


TEXT = Form("text", TAIL)
JSON = Form("json", '\n\n{"price": ', "}")
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
    """Token ids of one prompt, and how many tokens of its text were cut (0: none; at least 1 when characters were)."""

    ids: list[int]
    cut: int


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """Token ids and labels (both length T) of a prompt and its answer; labels are `IGNORE` where no loss is taken.

    `price` is the true one in dollars, NaN where it is not known.
    """

    ids: list[int]
    labels: list[int]
    cut: int
    price: float = math.nan


def answer_text(price: float) -> str:
    """The completion for `price` dollars: whole dollars, never below one (the answer to "to the nearest dollar")."""
    return str(max(1, round(price)))


def encode_prompt(tokenizer: Any, text: str, max_tokens: int, form: Form = TEXT) -> Prompt:
    """The prompt for `text`, with the text cut so that it takes at most `max_tokens` tokens."""
    ids, cut = encode_text(tokenizer, text, max_tokens)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Prompt([*start, *token_ids(tokenizer, HEAD), *ids, *token_ids(tokenizer, form.tail)], cut)


def encode_text(tokenizer: Any, text: str, max_tokens: int) -> tuple[list[int], int]:
    """(At most `max_tokens` token ids of the repaired `text`, how many were cut as `Prompt` counts them)."""
    text = repair_text(text)
    allowed = text[: max_tokens * _CHARACTERS_PER_TOKEN]
    ids = token_ids(tokenizer, allowed.strip())
    return ids[:max_tokens], max(len(ids) - max_tokens, 0) or int(len(allowed) < len(text))


def encode_row(tokenizer: Any, item: Item, max_tokens: int, form: Form = TEXT) -> TrainingRow:
    """The training row of a priced item; raises DataError for an item without a price or a tokenizer without an end.

    Number and closing token are tokenized apart, so that a price ends with the same token whatever it is.
    """
    if item.price is None:
        raise DataError(f"row {item.row}: an item without a price cannot be trained on; drop it or give it a price")
    end = form.end_id(tokenizer)
    prompt = encode_prompt(tokenizer, item.text, max_tokens, form)
    answer = [*token_ids(tokenizer, answer_text(item.price)), end, *([tokenizer.eos_token_id] if form.close else [])]
    return TrainingRow([*prompt.ids, *answer], [IGNORE] * len(prompt.ids) + answer, prompt.cut, item.price)


def encode_rows(tokenizer: Any, items: Sequence[Item], max_tokens: int, form: Form = TEXT) -> list[TrainingRow]:
    """`encode_row` for each item, in order."""
    return [encode_row(tokenizer, item, max_tokens, form) for item in items]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of `text` and nothing else: "</s>" in a product's text is four characters, never the end token."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
