"""What training adds to the cross-entropy of the text: a head's loss, and a loss that knows numbers.

Both read the hidden states that the decoder gives its language head, in the forward pass that the text's loss needs
anyway: a hook on the decoder keeps them, whoever calls it (transformers, TRL's chunked loss, fastprice_kernels). The
prompt's last token is the one whose next token is the first with a label. Its state is there also where the last layer
runs at labeled positions alone (`fastprice_kernels.install(last_layer=True)`): those are the positions *before* the
labels, M of the T in a pack, so a position is looked up among all T or among the M, whichever the decoder gave.

Where each text's states stand is worked out on the host, by the collator: no step waits for the device.

Legend: T positions of a pack, M of them predict a label, N texts, S steps and U tokens of losses.py, D width.
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

__all__ = ["TARGETS", "Objective"]

TARGETS = "price_targets"  # beside input_ids in a batch


@dataclass
class Objective:
    """The losses added to the text's, their weights, and the hidden states of the forward pass under way."""

    head: PriceHead | None = None
    price_head_weight: float = 1.0
    number: NumberLoss | None = None
    number_weight: float = 0.3

    def __post_init__(self) -> None:
        self._hidden: Tensor | None = None

    def collator(self, inner: Callable[[Sequence[Any]], dict[str, Any]]) -> Callable[[Sequence[Any]], dict[str, Any]]:
        """`inner`, a collator of packs, with `TARGETS` beside what it gives: a dict of tensors.

        prices (N,) fp32; first, predicts int64 (N,): the position of each prompt's last token among T, among M; with a
        number loss also what `NumberLoss.batch` gives.
        """

        def collate(packs: Sequence[Any]) -> dict[str, Any]:
            batch = inner(packs)
            labeled = batch["labels"][0] != IGNORE
            (first,) = torch.nonzero(labeled[1:] & ~labeled[:-1], as_tuple=True)
            prices = [price for pack in packs for price in pack["prices"]]
            targets = {
                "prices": torch.tensor(prices, dtype=torch.float32),
                "first": first,
                "predicts": (labeled[1:].cumsum(0) - 1)[first],
            }
            if self.number is not None:
                targets |= self.number.batch([int(answer_text(price)) for price in prices])
            return {**batch, TARGETS: targets}

        return collate

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Keeps the hidden states of each training pass of `model`'s decoder, for `__call__`."""
        decoder = decoder_of(model)

        def keep(module: Any, _: Any, output: Any) -> None:
            if module.training:
                self._hidden = output.last_hidden_state

        handle = decoder.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
            self._hidden = None

    def __call__(self, model: Any, targets: dict[str, Tensor], *, tokens: int, texts: int | None) -> Tensor:
        """The weighted losses of the pass just run over T `tokens`: sums over its texts, divided by `texts` (None: by
        their number)."""
        assert self._hidden is not None, "the decoder did not run"
        hidden_TD, self._hidden = self._hidden[0], None
        first = targets["first" if hidden_TD.shape[0] == tokens else "predicts"]  # M < T: no text begins with a label
        total = torch.zeros((), device=hidden_TD.device)
        if self.head is not None:
            total = (
                total + self.price_head_weight * self.head.loss(self.head(hidden_TD[first]), targets["prices"]).sum()
            )
        if self.number is not None:
            logits = self._logits(model, hidden_TD[first[:, None] + targets["steps"]])
            costs = expected_cost(self.number.kind, logits, targets["right"], targets["costs"], targets["counts"])
            total = total + self.number_weight * costs.sum()
        return total / (len(first) if texts is None else texts)

    def _logits(self, model: Any, hidden_NSD: Tensor) -> Tensor:
        """Logits (N, S, U) of the alphabet's tokens in fp32, as the model's own language head gives them."""
        from fastprice_kernels.patching.structure import logit_transform

        assert self.number is not None
        causal = plain_model(model)
        language_head = causal.get_output_embeddings()
        softcap, scale = logit_transform(causal)
        tokens = self.number.alphabet.to(hidden_NSD.device)
        with torch.autocast(hidden_NSD.device.type, enabled=False):
            logits = hidden_NSD.float() @ language_head.weight[tokens].float().T
            if language_head.bias is not None:
                logits = logits + language_head.bias[tokens].float()
            logits = logits * scale
            return logits if softcap is None else softcap * torch.tanh(logits / softcap)
