"""How a prompt with examples or facts is laid out, what of it fits, and what may not be said in it.

    How much does this cost to the nearest dollar?
    ⏎
    {text of an example}          ┐
    ⏎                             │ any number of times, the least similar first
    Price is ${its price}         │
    ⏎                             ┘
    {text of the item}
    {facts, a line each}
    ⏎
    Price is $

Without examples and facts this is the prompt of `fastprice.prompts.template`, on which models are tuned; with output="json" the
price stands in an object here as well.

Blank lines and the phrases of the wrapper are the structure, so no text may hold them (`plain`): an item that says
"Price is $1" after an empty line would otherwise be one more example. Each part is tokenized alone, special tokens
written in a text are characters, and so what a text says stays inside its place. That a model may still be swayed by
what it reads there, no layout prevents.

The item itself is never cut for the sake of its examples: only beyond `max_tokens`, as without them. Where the window
is too small, the examples give way, the least similar first: shortened to no less than `LEAST` tokens, else dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastprice.data.cleaning import repair_text
from fastprice.data.items import Item
from fastprice.errors import ConfigError
from fastprice.prompts.template import HEAD, TEXT, Form, Prompt, answer_text, encode_text, token_ids

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator

__all__ = ["ANSWER", "LEAST", "REMOVED", "LaidOut", "Layout", "context_window", "layout_of", "plain"]

ANSWER = 8  # tokens of the window that are kept for the price
LEAST = 16  # tokens of an example's text; less of it says nothing
REMOVED = "[removed]"
_GAP = "\n\n"
# The wrapper's phrases, and how lines of fastprice.prompting.tools begin: "CALL calc(", "= ".
_RESERVED = re.compile(
    r"price\s+is\s*\$|\{\s*\"price\"\s*:|how\s+much\s+does\s+this\s+cost|^\s*(?:call\s+\w+\s*\(|=)", re.I | re.M
)
_CHARACTERS = 40  # of a text for each of its allowed tokens, at most: as in fastprice.prompts.template


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A prompt, and how many of its examples were shortened or dropped to fit."""

    prompt: Prompt
    shortened: int = 0
    dropped: int = 0


class Layout:
    """Lays out prompts for one tokenizer.

    max_tokens  of one text, the item's or an example's; window: tokens of a prompt and its price, None for no limit
    form        in which prices are asked for and told
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int, window: int | None, form: Form = TEXT) -> None:
        self.tokenizer, self.max_tokens, self.window, self.form = tokenizer, max_tokens, window, form
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.head, self.tail, self.gap = (token_ids(tokenizer, part) for part in (HEAD, form.tail, _GAP))

    def price_prompt(self, text: str, *, examples: Sequence[Item] = (), facts: Sequence[str] = ()) -> LaidOut:
        """The prompt that asks for the price of `text`, after priced `examples` from the least similar to the most.

        `facts` are lines about the item, told after its text. Raises ConfigError when item and facts alone do not fit.
        """
        ids, cut = self.text_ids(text)
        ids += token_ids(self.tokenizer, "".join(f"\n{_one_line(fact)}" for fact in facts)) if facts else []
        wrapped = len(self.start) + len(self.head) + len(ids) + len(self.tail)
        room = self.room(wrapped + ANSWER, "the item")
        shown = [self._example(example) for example in examples]
        fixed = [len(self.tail) + len(answer) + len(self.gap) for _, answer in shown]
        excess = 0 if room is None else sum(fixed) + sum(len(words) for words, _ in shown) - room
        dropped = shortened = 0
        while excess > 0:
            words, _ = shown[dropped]
            if len(words) - excess >= LEAST:
                del words[len(words) - excess :]
                shortened, excess = 1, 0
            else:
                excess -= len(words) + fixed[dropped]
                dropped += 1
        told = [token for words, answer in shown[dropped:] for token in (*words, *self.tail, *answer, *self.gap)]
        return LaidOut(Prompt([*self.start, *self.head, *told, *ids, *self.tail], cut), shortened, dropped)

    def instruction_prompt(self, instruction: str, text: str, transcript: str) -> Prompt:
        """`instruction`, a blank line, the item's text, a blank line, `transcript`: for the model to go on writing."""
        ids, cut = self.text_ids(text)
        told = token_ids(self.tokenizer, instruction + _GAP)
        return Prompt([*self.start, *told, *ids, *self.gap, *token_ids(self.tokenizer, transcript)], cut)

    def text_ids(self, text: str) -> tuple[list[int], int]:
        """(Token ids of the plain text, at most `max_tokens`; how many were cut)."""
        allowed = text[: self.max_tokens * _CHARACTERS]
        ids, cut = encode_text(self.tokenizer, plain(allowed), self.max_tokens)
        return ids, cut or int(len(allowed) < len(text))

    def room(self, taken: int, by: str) -> int | None:
        """Tokens that `taken` leave in the window, None for no limit; ConfigError where it is overdrawn."""
        if self.window is None:
            return None
        if taken > self.window:
            raise ConfigError(
                f"{by} may take {taken:,} tokens with its question and answer, more than the {self.window:,} of the "
                f"model's context window: lower max_tokens ({self.max_tokens}) by {taken - self.window:,}"
            )
        return self.window - taken

    def _example(self, example: Item) -> tuple[list[int], list[int]]:
        assert example.price is not None
        return self.text_ids(example.text)[0], token_ids(self.tokenizer, answer_text(example.price) + self.form.close)


def plain(text: str) -> str:
    """The text without blank lines, control and invisible characters, or phrases of the wrapper.

    A phrase, whatever its case and spacing, becomes "[removed]".
    """
    return _RESERVED.sub(REMOVED, repair_text(text))


def layout_of(estimator: PriceEstimator) -> Layout:
    """The layout for this estimator's tokenizer, `max_tokens` and context window."""
    window = context_window(estimator.model.config)
    return Layout(estimator.tokenizer, max_tokens=estimator.max_tokens, window=window, form=estimator.form)


def context_window(config: Any) -> int | None:
    """Tokens that the model of this configuration can read and decode a price after; None where it names no limit."""
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        limits.append(getattr(text, "sliding_window", None))
    known = [limit for limit in limits if limit]
    return min(known) if known else None


def _one_line(text: str) -> str:
    return " ".join(plain(text).split())
