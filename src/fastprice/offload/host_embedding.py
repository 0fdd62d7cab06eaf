"""An embedding whose table stays on the host: the rows that a batch looks up are gathered there and sent.

A table of 128,256 x 8,192 in 16 bits takes 2.1 GB of the device; the rows of 4,096 tokens are 67 MB. The price is one
wait for the token ids, which must come to the host first. The head is no candidate: its whole weight is needed at once,
so streaming it would take a slot of its own size.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastprice.errors import ConfigError
from fastprice.offload.transfers import Boundary

__all__ = ["HostEmbedding", "has_own_table"]


def has_own_table(model: Any) -> bool:
    """Whether the model's embedding is a plain frozen table that is not the head's weight as well."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return type(embedding) is nn.Embedding and (head is None or head.weight is not embedding.weight)


class HostEmbedding:
    """Moves the table of `model`'s embedding to the host and looks rows up there, until `close`.

    The parameter keeps its shape, dtype and device, by which libraries tell where a model is, but is one NaN expanded:
    it takes no memory, and whoever reads it sees NaN.
    """

    def __init__(self, model: Any, boundary: Boundary) -> None:
        if not has_own_table(model):
            raise ConfigError(
                "streaming: the embedding's table is the head's too or not a plain one: it stays resident"
            )
        self._embedding: Any = model.get_input_embeddings()
        table = self._embedding.weight.data
        flat = boundary.host(table.nbytes)
        self._table: Tensor = flat.view(table.dtype).view(table.shape)
        self._table.copy_(table)
        self._device = boundary.device
        self._embedding.weight.data = table.new_full((1, 1), float("nan"), device=self._device).expand(table.shape)
        self._embedding.forward = MethodType(self._look_up, self._embedding)

    def close(self, *, resident: bool = False) -> None:
        """Gives the embedding its table and its own forward back."""
        del self._embedding.forward
        self._embedding.weight.data = self._table.to(self._device) if resident else self._table

    def _look_up(self, _: nn.Module, ids: Tensor) -> Tensor:
        rows = torch.nn.functional.embedding(ids.to("cpu"), self._table, self._embedding.padding_idx)
        return rows.to(self._device, non_blocking=True)
