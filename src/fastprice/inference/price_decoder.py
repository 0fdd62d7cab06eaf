"""From a language model to prices: p(price | prompt) over all whole dollars.

The text of the price n is str(n) and an end: the end-of-sequence token, or "}" for answers in JSON
(`fastprice.prompts.template.encode_row` trains on exactly that). So its probability after a prompt is

    p(n) = p(t1 | prompt) p(t2 | prompt t1) ... p(end | prompt t1 ... tD),     t1 ... tD: the tokens of str(n).

The tokenizer writes every price once, and the token sequences form a trie: one token deep where 0-999 are tokens
(Llama 3), three where digits are (Llama 2, Qwen, Gemma). A batch of prompts takes a few forward passes over it
(`scorers.scorer` says what a pass holds, `trie_walk` which nodes are scored):

0. Tokens that prompts have in common at their beginning (the question) are computed once.
1. The trunk: the rest of each prompt, and with it the first whole levels of the trie, up to 16 nodes.
2. Inner nodes below the trunk, one pass a level, and with them p(end) of a few full-length prices.
3. p(end) of more full-length prices where the model is not sure of it: one or two passes, or none.

`tolerance=0` scores every node: p(n) exactly. What `SAMPLING_TOLERANCE` costs in accuracy and saves in time is measured
in docs/LOG.md; each run of the prediction benchmark checks medians against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastprice.errors import ConfigError, DataError
from fastprice.inference.price_distribution import PriceDistribution
from fastprice.inference.price_trie import PriceTrie
from fastprice.inference.scorers.merged import MergedScorer
from fastprice.inference.scorers.merged_decoder import MergedDecoder
from fastprice.inference.scorers.scorer import Prompts, Scorer
from fastprice.inference.scorers.stock import StockScorer
from fastprice.inference.trie_walk import TrieWalk
from fastprice.prompts.template import TEXT, AnswerFormat

__all__ = [
    "DISTRIBUTION_TOLERANCE",
    "SAMPLING_TOLERANCE",
    "NoDistributionsError",
    "PriceDecoder",
]

SAMPLING_TOLERANCE = 0.0625  # of probability: spacing of the scored nodes, for point estimates and intervals
DISTRIBUTION_TOLERANCE = 1e-4  # the same for distributions that a user gets


class NoDistributionsError(ConfigError):
    """No price distribution can be computed of this model: it takes no attention masks and has no merged copy."""


class PriceDecoder:
    """A scorer of prices under a model: the trie of the prices, and a merged copy of the weights where that fits.

    One decoder serves any number of calls until the model is trained on, which makes the copy out of date. Making one
    takes about as long as a batch.
    """

    def __init__(self, scorer: Scorer, config: Any) -> None:
        self.scorer, self.trie, self.config = scorer, scorer.trie, config

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, *, max_price: int = 999, form: AnswerFormat = TEXT, takes_masks: bool = True
    ) -> PriceDecoder:
        """The decoder with the fastest scorer that `model` and the free memory allow.

        max_price    the highest price, whole dollars
        form         how prompts request the price, and so how it ends
        takes_masks  whether the model's forward pass takes a 4-D attention mask

        Raises ConfigError for an impossible `max_price`, DataError for a tokenizer that cannot write the prices apart,
        NoDistributionsError for a model that takes no masks where there is no merged copy.
        """
        if max_price < 1:
            raise ConfigError(f"max_price ({max_price}) must be at least 1")
        trie, merged = PriceTrie.of(tokenizer, max_price, form), MergedDecoder.of(model)
        if merged is not None:
            return cls(MergedScorer(merged, trie), model.config)
        if not takes_masks:
            raise NoDistributionsError(
                "its model takes no attention masks, and a merged copy of it cannot be made here"
            )
        return cls(StockScorer(model, trie), model.config)

    @torch.inference_mode()
    def distributions(
        self,
        prompts: Prompts,
        *,
        tolerance: float = DISTRIBUTION_TOLERANCE,
        batch_size: int = 64,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[PriceDistribution]:
        """p(price | prompt) over whole dollars from 1 to the highest price, for each prompt (token ids, at least one).

        tolerance   spacing of the scored nodes in probability (`fastprice.inference.trie_walk`); 0 scores every price
        batch_size  prompts computed at once, at most
        on_batch    called with the number of finished prompts

        A model that gives no price any probability, or whose logits are NaN, yields an empty distribution. Raises
        ConfigError for an impossible setting or prompts beyond a sliding window, DataError for an empty prompt.
        """
        if not 0.0 <= tolerance < 1.0:
            raise ConfigError(f"tolerance ({tolerance}) must be from 0 to below 1")
        distributions: dict[int, PriceDistribution] = {}
        for batch in self._batches(prompts, batch_size):
            session = self.scorer.start_session([prompts[index] for index in batch])
            found = TrieWalk(self.trie, session, tolerance).distributions()
            distributions.update(zip(batch, found, strict=True))
            if on_batch:
                on_batch(len(distributions))
        return [distributions[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def last_hidden_states(
        self, prompts: Prompts, *, batch_size: int = 64, on_batch: Callable[[int], None] | None = None
    ) -> torch.Tensor | None:
        """The hidden states (N, width) of the last tokens of N prompts, after the last norm: what a price head reads.

        In the model's dtype and on its device, equal to transformers' within rounding. None without a merged copy.
        Arguments and errors are those of `distributions`.
        """
        if not isinstance(self.scorer, MergedScorer):
            return None
        decoder = self.scorer.decoder
        hidden, done = decoder.embeddings.new_empty(len(prompts), len(decoder.norm)), 0
        for batch in self._batches(prompts, batch_size):
            found = self.scorer.last_hidden_states([prompts[index] for index in batch])
            hidden[torch.tensor(batch, device=hidden.device)] = found
            done += len(batch)
            if on_batch:
                on_batch(done)
        return hidden

    def _batches(self, prompts: Prompts, batch_size: int) -> Iterator[list[int]]:
        """Indices of prompts to compute together; raises as `distributions` does."""
        if batch_size < 1:
            raise ConfigError(f"batch_size ({batch_size}) must be at least 1")
        if not prompts:
            return
        if not all(len(prompt) for prompt in prompts):
            raise DataError(
                "a prompt without tokens has no next token to predict; start it with the tokenizer's bos token"
            )
        _check_window(self.config, int(max(map(len, prompts)) + self.trie.depths.max()))
        self.scorer.prepare(prompts)
        yield from self.scorer.batches(prompts, batch_size)


def _check_window(config: Any, tokens: int) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and tokens > window and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ConfigError(
            f"a prompt and its price take {tokens} tokens, more than the base model's sliding window of {window}: "
            "lower max_tokens"
        )
