"""Price heads: a price distribution from the hidden state of a prompt's last token, without generating any digit.

The cross-entropy of digits takes a price of $199 read as $201 to be as wrong as one read as $901. A head knows that
prices lie on a line, costs one small product, and needs no walk over digits for a prediction. `HistogramHead` (the
default) has the probabilities of B bins of equal width in log price, trained with the histogram loss HL-Gauss: the
target is the normal distribution around the true log price, so that near bins are nearly right (Imani and White,
"Improving Regression Performance with Distributional Losses", 2018; Farebrother et al., "Stop Regressing", 2024, from
which the standard deviation of 0.75 bins is taken). `QuantileHead` has B quantiles of the log price, ascending by
construction, trained with the pinball loss (Koenker and Bassett, "Regression Quantiles", 1978), which is about twenty
times smaller; `price_head_weight` can make up for that.

Both begin as the distribution of the training prices, whatever the text: weights 0, biases from the prices. Both read
hidden states that are centered and scaled (`PriceHead.standardize`), in fp32. Both give `PriceDistribution`s, so that
estimates, intervals and calibration are the same code as for digits.

Legend: N texts, B bins or quantiles, D width of the model. Prices are dollars.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from fastprice.common.arrays import FloatArray
from fastprice.errors import BaseModelError, ConfigError, nearest_name
from fastprice.inference.price_distribution import PriceDistribution
from fastprice.models.parts import decoder_of

__all__ = [
    "HEADS",
    "HistogramHead",
    "PriceHead",
    "QuantileHead",
    "head_distributions",
    "make_head",
    "prompt_hidden_states",
]


BINS = 128
QUANTILES = 64
_SIGMA = 0.75  # standard deviation of the target, in bins
_POINTS = 8  # prices that the mass of a bin is spread over: half of a bin's width would be an error of 1 to 3 %
# A quantile head's quantiles, and where its mass is, in shares of it: between the outermost quantiles in cells, 16 to a
# step; what is beyond them is on them.
_SHARES = (np.arange(QUANTILES) + 0.5) / QUANTILES
_CELLS = np.linspace(_SHARES[0], _SHARES[-1], (QUANTILES - 1) * 16 + 1)
_LEVELS = np.concatenate([_SHARES[:1], (_CELLS[1:] + _CELLS[:-1]) / 2, _SHARES[-1:]])
_MASSES = np.diff(np.concatenate([[0.0], _CELLS, [1.0]]))
_MIN_DEVIATION = 1e-2  # of the hidden states' root mean square: the smallest standard deviation that is scaled to 1


class PriceHead(nn.Module):
    """A linear layer from standardized hidden states (N, D) to B outputs, which mean prices from `low` to `high`.

    Raises ConfigError for prices that do not rise from above $0.
    """

    kind: str

    def __init__(self, width: int, outputs: int, low: float, high: float) -> None:
        super().__init__()
        if not 0 < low < high < math.inf:
            raise ConfigError(f"a head's prices must rise from above $0, not from ${low} to ${high}")
        self.low, self.high = low, high
        self.linear = nn.Linear(width, outputs, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Outputs (N, B) in fp32, whatever the dtype of the hidden states; autocast is off."""
        with torch.autocast(hidden_ND.device.type, enabled=False):
            standardized = (hidden_ND.to(self.linear.weight.dtype) - self.mean) / self.deviation
            outputs: Tensor = self.linear(standardized)
        return outputs

    def standardize(self, hidden_ND: Tensor) -> None:
        """Hidden state scaling: each of the D features less its mean here, over its standard deviation here.

        Hidden states of prompts that all end alike have much in common: unscaled, the weights that distinguish them are
        hundreds of steps away (docs/LOG.md). A feature with a standard deviation below `_MIN_DEVIATION` times the root
        mean square of all hidden states is divided by that instead: in 16 bits it is rounding, which must not be scaled
        up to the size of the other features.
        """
        hidden = hidden_ND.double()
        least = _MIN_DEVIATION * hidden.square().mean().sqrt()
        self.mean.copy_(hidden.mean(0))
        self.deviation.copy_(hidden.std(0, correction=0).clamp(min=least))

    @abstractmethod
    def start_from(self, prices: ArrayLike) -> None:
        """Sets the biases so that every text has the distribution of `prices` (dollars)."""

    @abstractmethod
    def loss(self, outputs_NB: Tensor, prices_N: Tensor) -> Tensor:
        """The training loss of each text (N,), for true prices in dollars; those beyond the range count as its end."""

    @abstractmethod
    def distributions(self, outputs_NB: Tensor) -> list[PriceDistribution]:
        """The distributions that the outputs mean; an empty one where they are NaN."""

    def settings(self) -> dict[str, Any]:
        """The arguments of `make_head` but the width, for JSON."""
        return {"kind": self.kind, "low": self.low, "high": self.high}

    def save(self, file: Path) -> None:
        """Writes weights, biases and scaling to `file` (safetensors)."""
        from safetensors.torch import save_file

        save_file({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, file)

    def restore(self, file: Path) -> None:
        """Reads what `save` wrote; BaseModelError when the file is missing, damaged, or another head's."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            self.load_state_dict(load_file(file))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise BaseModelError(f"{file}: no weights for this head ({reason}); restore it or train again") from error


class HistogramHead(PriceHead):
    """Logits of `BINS` bins of equal width in log price between `low` and `high`, see the module."""

    kind = "histogram"

    def __init__(self, width: int, low: float, high: float) -> None:
        super().__init__(width, BINS, low, high)
        edges = np.linspace(math.log(low), math.log(high), BINS + 1)
        self.register_buffer("edges", torch.from_numpy(edges).float(), persistent=False)
        points = np.linspace(edges[0], edges[-1], BINS * _POINTS + 1)
        self._prices: FloatArray = np.exp((points[1:] + points[:-1]) / 2)

    def start_from(self, prices: ArrayLike) -> None:
        targets = self.targets(torch.tensor(np.asarray(prices, dtype=np.float32), device=self.linear.bias.device))
        # As if a thousandth of the items were spread evenly over all bins: no bin starts as impossible.
        shares = targets.mean(0) + 1e-3 / BINS
        with torch.no_grad():
            self.linear.bias.copy_((shares / shares.sum()).log())

    def targets(self, prices_N: Tensor) -> Tensor:
        """The share (N, B) of each bin under the normal distribution around each log price, cut to the range."""
        assert isinstance(self.edges, Tensor)
        edges = self.edges.to(prices_N.dtype)
        logs = prices_N.log().clamp(edges[0], edges[-1])
        sigma = _SIGMA * (edges[1] - edges[0])
        below = torch.special.ndtr((edges - logs[:, None]) / sigma)
        shares: Tensor = below.diff(dim=1) / (below[:, -1:] - below[:, :1])
        return shares

    def loss(self, outputs_NB: Tensor, prices_N: Tensor) -> Tensor:
        return -(self.targets(prices_N) * F.log_softmax(outputs_NB, dim=-1)).sum(-1)

    def distributions(self, outputs_NB: Tensor) -> list[PriceDistribution]:
        shares = outputs_NB.detach().double().softmax(-1).nan_to_num(nan=0.0).cpu().numpy() / _POINTS
        return [PriceDistribution(self._prices, np.repeat(share, _POINTS)) for share in shares]


class QuantileHead(PriceHead):
    """`QUANTILES` quantiles of the log price: the lowest, then upward steps (softplus), see the module."""

    kind = "quantile"

    def __init__(self, width: int, low: float, high: float) -> None:
        super().__init__(width, QUANTILES, low, high)
        self.register_buffer("shares", torch.from_numpy(_SHARES).float(), persistent=False)

    def start_from(self, prices: ArrayLike) -> None:
        assert isinstance(self.shares, Tensor)
        logs = np.quantile(np.log(np.asarray(prices, dtype=np.float64)), _SHARES)
        steps = np.maximum(np.diff(logs), 1e-3)
        bias = np.concatenate([logs[:1], np.log(np.expm1(steps))])  # softplus of it is the step
        with torch.no_grad():
            self.linear.bias.copy_(torch.from_numpy(bias))

    def quantiles(self, outputs_NB: Tensor) -> Tensor:
        """Log prices (N, B), ascending."""
        return torch.cat([outputs_NB[:, :1], F.softplus(outputs_NB[:, 1:])], dim=1).cumsum(1)

    def loss(self, outputs_NB: Tensor, prices_N: Tensor) -> Tensor:
        assert isinstance(self.shares, Tensor)
        shares = self.shares.to(outputs_NB.dtype)
        error = prices_N.log().clamp(math.log(self.low), math.log(self.high))[:, None] - self.quantiles(outputs_NB)
        return torch.maximum(shares * error, (shares - 1) * error).mean(-1)

    def distributions(self, outputs_NB: Tensor) -> list[PriceDistribution]:
        """Between two quantiles the mass is spread evenly over 16 log prices, or a calibration could only choose among
        32 coverages. The 1 in 64 beyond the outermost quantiles is on them: the loss does not train how far it reaches,
        and conformal calibration measures it.
        """
        logs = self.quantiles(outputs_NB.detach().double()).cpu().numpy()
        found = []
        for row in logs:
            if not np.isfinite(row).all():
                found.append(PriceDistribution(np.empty(0), np.empty(0)))
                continue
            spread = np.interp(_LEVELS, _SHARES, row)
            within = np.exp(spread.clip(math.log(self.low), math.log(self.high))).clip(self.low, self.high)
            prices, first = np.unique(within, return_index=True)  # ascending already; equal where they were clipped
            found.append(PriceDistribution(prices, np.add.reduceat(_MASSES, first)))
        return found


HEADS: dict[str, type[HistogramHead] | type[QuantileHead]] = {"histogram": HistogramHead, "quantile": QuantileHead}


def make_head(kind: str, width: int, low: float, high: float) -> PriceHead:
    """A head of that kind (a key of `HEADS`) for a model of `width`; ConfigError for an unknown kind."""
    if kind not in HEADS:
        raise ConfigError(f"head: {kind!r} is not one of {', '.join(HEADS)}{nearest_name(kind, HEADS)}")
    return HEADS[kind](width, low, high)


@torch.inference_mode()
def prompt_hidden_states(
    model: Any, prompts: Sequence[Sequence[int]], *, batch_size: int = 64
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields, batch by batch, indices of prompts (token ids, at least one) and their hidden states (N, D).

    Those are the decoder's last hidden states at the last token of a prompt. Prompts are sorted by length and padded on
    the right, where nothing attends to the padding.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    decoder = decoder_of(model)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(prompts[index]) for index in batch], batch_first=True)
        last = torch.tensor([len(prompts[index]) - 1 for index in batch])
        hidden = decoder(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
        yield batch, hidden[torch.arange(len(batch)), last]


@torch.inference_mode()
def head_distributions(
    model: Any,
    head: PriceHead,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> list[PriceDistribution]:
    """p(price | prompt) by `head`, for each prompt (token ids, at least one): one forward pass of the decoder.

    `on_batch` is called with the number of finished prompts.
    """
    found: dict[int, PriceDistribution] = {}
    for batch, hidden in prompt_hidden_states(model, prompts, batch_size=batch_size):
        found |= zip(batch, head.distributions(head(hidden)), strict=True)
        if on_batch:
            on_batch(len(found))
    return [found[index] for index in range(len(prompts))]
