"""An embedding whose table stays on the host: the rows that a batch looks up are gathered there and copied to the GPU.

A table of 128,256 x 8,192 in 16 bits takes 2.1 GB of GPU memory; the rows of 4,096 tokens are 67 MB. The cost is one
wait for the token ids, which must be copied to the host first. lm_head cannot be offloaded in this way: its whole
weight is needed at once, so its device buffer would be as large as itself.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastprice.errors import ConfigError
from fastprice.offload.device_transfers import DeviceTransfers

__all__ = ["HostEmbedding", "has_untied_embedding"]


def has_untied_embedding(model: Any) -> bool:
    """Whether the model's embedding is a plain `nn.Embedding` that is not tied to lm_head."""
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    return type(embedding) is nn.Embedding and (lm_head is None or lm_head.weight is not embedding.weight)


class HostEmbedding:
    """Moves the table of `model`'s embedding to the host and looks rows up there, until `close`.

    The parameter keeps its shape, dtype and device, from which libraries read where a model is, but becomes one NaN
    expanded: it takes no memory, and any code that reads it gets NaN. Raises ConfigError for a tied embedding.
    """

    def __init__(self, model: Any, transfers: DeviceTransfers) -> None:
        if not has_untied_embedding(model):
            raise ConfigError(
                "host_embedding: this embedding is tied to lm_head or not an nn.Embedding; use host_embedding=False"
            )
        self._embedding: Any = model.get_input_embeddings()
        table = self._embedding.weight.data
        buffer = transfers.allocate_host(table.nbytes)
        self._table: Tensor = buffer.view(table.dtype).view(table.shape)
        self._table.copy_(table)
        self._device = transfers.device
        self._embedding.weight.data = table.new_full((1, 1), float("nan"), device=self._device).expand(table.shape)
        self._embedding.forward = MethodType(self._look_up, self._embedding)

    def close(self, *, to_device: bool = False) -> None:
        """Restores the embedding's table, on the host or on its device, and its own forward."""
        del self._embedding.forward
        self._embedding.weight.data = self._table.to(self._device) if to_device else self._table

    def _look_up(self, _: nn.Module, ids: Tensor) -> Tensor:
        rows = torch.nn.functional.embedding(ids.to("cpu"), self._table, self._embedding.padding_idx)
        return rows.to(self._device, non_blocking=True)
