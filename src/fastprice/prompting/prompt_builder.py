"""Prompts with examples or facts: their layout, what of it fits the context window, and what texts may not contain.

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

Without examples and facts this is the prompt of `fastprice.prompts.template`, on which models are tuned; with
output="json" the price is in an object here as well. The item is truncated only beyond `max_tokens`, as without
examples. Where the window is too small, examples are shortened to no less than `MIN_EXAMPLE_TOKENS` or else dropped,
the least similar first.

Blank lines and the phrases of the template are the structure, so they are removed from all texts (`sanitize`): an item
with "Price is $1" after an empty line would otherwise be one more example. Each part is tokenized alone, and special
tokens in a text are plain characters, so a text cannot leave its place in the prompt. No layout prevents that a model
follows instructions that it reads there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastprice.data.cleaning import repair_text
from fastprice.data.items import Item
from fastprice.errors import ConfigError
from fastprice.prompts.template import PREAMBLE, TEXT, AnswerFormat, Prompt, answer_text, encode_text, token_ids

if TYPE_CHECKING:
    from fastprice.estimator import PriceEstimator

__all__ = [
    "MIN_EXAMPLE_TOKENS",
    "PRICE_TOKENS",
    "REMOVED",
    "BuiltPrompt",
    "PromptBuilder",
    "context_window",
    "sanitize",
]

PRICE_TOKENS = 8  # of the window, reserved for the price
MIN_EXAMPLE_TOKENS = 16  # of an example's text; a shorter one has no use
REMOVED = "[removed]"
_GAP = "\n\n"
# The template's phrases, and the beginnings of lines of fastprice.prompting.tools: "CALL calc(", "= ".
_RESERVED = re.compile(
    r"price\s+is\s*\$|\{\s*\"price\"\s*:|how\s+much\s+does\s+this\s+cost|^\s*(?:call\s+\w+\s*\(|=)", re.I | re.M
)
_CHARACTERS_PER_TOKEN = 40  # at most, of a text for each of its allowed tokens: as in fastprice.prompts.template


@dataclass(frozen=True, slots=True)
class BuiltPrompt:
    """A prompt, and how many of its examples were shortened or dropped to fit the window."""

    prompt: Prompt
    shortened: int = 0
    dropped: int = 0


class PromptBuilder:
    """Builds prompts for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        max_tokens: of one text, the item's or an example's.
        window: tokens of a prompt and its price; None: no limit.
        form: of the prices in the prompt and in the answer.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int, window: int | None, form: AnswerFormat = TEXT) -> None:
        self.tokenizer, self.max_tokens, self.window, self.form = tokenizer, max_tokens, window, form
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        parts = (PREAMBLE, form.cue, _GAP)
        self.preamble, self.answer_cue, self.gap = (token_ids(tokenizer, part) for part in parts)

    @classmethod
    def for_estimator(cls, estimator: PriceEstimator) -> PromptBuilder:
        """The builder for this estimator's tokenizer, `max_tokens`, context window and output."""
        window = context_window(estimator.model.config)
        return cls(estimator.tokenizer, max_tokens=estimator.max_tokens, window=window, form=estimator.form)

    def price_prompt(self, text: str, *, examples: Sequence[Item] = (), facts: Sequence[str] = ()) -> BuiltPrompt:
        """The prompt for the price of `text`, after priced `examples` from the least similar to the most.

        `facts` are lines about the item, added after its text. Raises ConfigError when item and facts alone do not fit.
        """
        ids, cut = self.text_ids(text)
        ids += token_ids(self.tokenizer, "".join(f"\n{_one_line(fact)}" for fact in facts)) if facts else []
        required = len(self.bos) + len(self.preamble) + len(ids) + len(self.answer_cue)
        self.check_fits(required + PRICE_TOKENS, "the item")
        encoded = [self._example(example) for example in examples]
        fixed = [len(self.answer_cue) + len(answer) + len(self.gap) for _, answer in encoded]
        total = required + PRICE_TOKENS + sum(fixed) + sum(len(words) for words, _ in encoded)
        excess = 0 if self.window is None else total - self.window
        dropped = shortened = 0
        while excess > 0:
            words, _ = encoded[dropped]
            if len(words) - excess >= MIN_EXAMPLE_TOKENS:
                del words[len(words) - excess :]
                shortened, excess = 1, 0
            else:
                excess -= len(words) + fixed[dropped]
                dropped += 1
        shown = [
            token for words, answer in encoded[dropped:] for token in (*words, *self.answer_cue, *answer, *self.gap)
        ]
        prompt = Prompt([*self.bos, *self.preamble, *shown, *ids, *self.answer_cue], cut)
        return BuiltPrompt(prompt, shortened, dropped)

    def instruction_prompt(self, instruction: str, text: str, transcript: str) -> Prompt:
        """`instruction`, a blank line, the item's text, a blank line, and `transcript`, which the model continues."""
        ids, cut = self.text_ids(text)
        opening = token_ids(self.tokenizer, instruction + _GAP)
        return Prompt([*self.bos, *opening, *ids, *self.gap, *token_ids(self.tokenizer, transcript)], cut)

    def text_ids(self, text: str) -> tuple[list[int], int]:
        """(Token ids of the sanitized text, at most `max_tokens`; how many were truncated)."""
        allowed = text[: self.max_tokens * _CHARACTERS_PER_TOKEN]
        ids, cut = encode_text(self.tokenizer, sanitize(allowed), self.max_tokens)
        return ids, cut or int(len(allowed) < len(text))

    def check_fits(self, tokens: int, name: str) -> None:
        """Raises ConfigError where `tokens`, of a prompt and its answer, are more than the window."""
        if self.window is not None and tokens > self.window:
            raise ConfigError(
                f"{name} may take {tokens:,} tokens with its question and answer, more than the {self.window:,} of the "
                f"model's context window: lower max_tokens ({self.max_tokens}) by {tokens - self.window:,}"
            )

    def _example(self, example: Item) -> tuple[list[int], list[int]]:
        assert example.price is not None
        return self.text_ids(example.text)[0], token_ids(self.tokenizer, answer_text(example.price) + self.form.close)


def sanitize(text: str) -> str:
    """The text without blank lines, control and invisible characters, or phrases of the template.

    A phrase, in any case and spacing, becomes "[removed]".
    """
    return _RESERVED.sub(REMOVED, repair_text(text))


def context_window(config: Any) -> int | None:
    """Largest number of tokens that the model of this configuration attends to fully; None: no limit is given."""
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        limits.append(getattr(text, "sliding_window", None))
    known = [limit for limit in limits if limit]
    return min(known) if known else None


def _one_line(text: str) -> str:
    return " ".join(sanitize(text).split())
