"""Losses added to the cross-entropy of the text: that of a price head, and a number loss (number_losses.py).

Both read the hidden states that the decoder passes to lm_head, in the forward pass of the text's loss: a hook on the
decoder records them, whoever calls it (transformers, TRL's chunked loss, fastprice_kernels). A price head reads the
prompt's last token, whose next token is the first labeled one. If the last layer runs at labeled positions alone
(`fastprice_kernels.install(last_layer=True)`), the decoder returns M of the T positions of a pack, so each position is
known both among all T and among the M. The collator computes them on the host: no step waits for the device.

Legend: T positions of a pack, M of them predict a label, N texts, S steps and U tokens of number_losses.py, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastprice.inference.price_heads import PriceHead
from fastprice.models.parts import decoder_of, plain_model
from fastprice.prompts.template import IGNORE, answer_text
from fastprice.training.number_losses import NumberLoss, expected_cost

__all__ = ["PRICE_LABELS", "AuxiliaryLosses"]

PRICE_LABELS = "price_labels"  # key of a batch, beside input_ids
_MODULE_NAME = "price_head"  # of the price head in a model that trains


@dataclass
class AuxiliaryLosses:
    """A price head and a number loss with their weights, and the hidden states of the current forward pass."""

    price_head: PriceHead | None = None
    price_head_weight: float = 1.0
    number_loss: NumberLoss | None = None
    number_loss_weight: float = 0.3

    def __post_init__(self) -> None:
        self._hidden: Tensor | None = None

    def collator(self, inner: Callable[[Sequence[Any]], dict[str, Any]]) -> Callable[[Sequence[Any]], dict[str, Any]]:
        """`inner`, a collator of packs, that adds `PRICE_LABELS` to its batches: a dict of tensors.

        prices (N,) fp32; position, labeled_position int64 (N,): of each prompt's last token among the T, among the M;
        with a number loss also what `NumberLoss.batch` returns.
        """

        def collate(packs: Sequence[Any]) -> dict[str, Any]:
            batch = inner(packs)
            labeled = batch["labels"][0] != IGNORE
            (first,) = torch.nonzero(labeled[1:] & ~labeled[:-1], as_tuple=True)
            prices = [price for pack in packs for price in pack["prices"]]
            price_labels = {
                "prices": torch.tensor(prices, dtype=torch.float32),
                "position": first,
                "labeled_position": (labeled[1:].cumsum(0) - 1)[first],
            }
            if self.number_loss is not None:
                price_labels |= self.number_loss.batch([int(answer_text(price)) for price in prices])
            return {**batch, PRICE_LABELS: price_labels}

        return collate

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Makes the price head a module of `model`, so that a trainer finds its parameters, and records the hidden
        states of each training pass for `__call__`."""
        if self.price_head is not None:
            model.add_module(_MODULE_NAME, self.price_head)
        try:
            with self.recording(model):
                yield
        finally:
            if self.price_head is not None:
                delattr(model, _MODULE_NAME)

    @contextmanager
    def recording(self, model: Any) -> Iterator[None]:
        """Records the hidden states of each training pass of `model`'s decoder, for `__call__`."""

        def record(module: Any, _: Any, output: Any) -> None:
            if module.training:
                self._hidden = output.last_hidden_state

        handle = decoder_of(model).register_forward_hook(record)
        try:
            yield
        finally:
            handle.remove()
            self._hidden = None

    def __call__(self, model: Any, price_labels: dict[str, Tensor], *, tokens: int, texts: int | None) -> Tensor:
        """The weighted losses of the last forward pass, over T `tokens`: sums over its texts, divided by `texts` (None:
        by their number)."""
        assert self._hidden is not None, "the decoder did not run"
        hidden_TD, self._hidden = self._hidden[0], None
        # M < T, because no text begins with a label.
        positions = price_labels["position" if hidden_TD.shape[0] == tokens else "labeled_position"]
        total = torch.zeros((), device=hidden_TD.device)
        if self.price_head is not None:
            losses = self.price_head.loss(self.price_head(hidden_TD[positions]), price_labels["prices"])
            total = total + self.price_head_weight * losses.sum()
        if self.number_loss is not None:
            logits = self._logits(model, hidden_TD[positions[:, None] + price_labels["steps"]])
            tables = (price_labels[name] for name in ("right", "costs", "counts"))
            total = total + self.number_loss_weight * expected_cost(self.number_loss.kind, logits, *tables).sum()
        return total / (len(positions) if texts is None else texts)

    def _logits(self, model: Any, hidden_NSD: Tensor) -> Tensor:
        """Logits (N, S, U) of the alphabet's tokens in fp32, as the model's lm_head computes them."""
        from fastprice_kernels.patching.structure import logit_transform

        assert self.number_loss is not None
        causal = plain_model(model)
        lm_head = causal.get_output_embeddings()
        softcap, scale = logit_transform(causal)
        tokens = self.number_loss.alphabet.to(hidden_NSD.device)
        with torch.autocast(hidden_NSD.device.type, enabled=False):
            logits = hidden_NSD.float() @ lm_head.weight[tokens].float().T
            if lm_head.bias is not None:
                logits = logits + lm_head.bias[tokens].float()
            logits = logits * scale
            return logits if softcap is None else softcap * torch.tanh(logits / softcap)
