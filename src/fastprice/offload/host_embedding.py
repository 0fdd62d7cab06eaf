"""An embedding whose table stays on the host: the rows that a batch looks up are gathered there and copied to the GPU.

A table of 128,256 x 8,192 in 16 bits takes 2.1 GB of GPU memory; the rows of 4,096 tokens are 67 MB. They are gathered
into pinned memory, from which they are copied while the device works. The collator has the token ids on the host and
gives them (`PackCollator(host_ids=True)`); without them, as in prediction, the host waits for the device, from which
they must be copied first. lm_head cannot be offloaded in this way: its whole weight is needed at once, so its device
buffer would be as large as itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastprice.errors import ConfigError
from fastprice.models.parts import decoder_of
from fastprice.offload.device_transfers import DeviceTransfers
from fastprice.prompts.packing import HOST_IDS

__all__ = ["HostEmbedding", "has_host_embedding", "has_untied_embedding"]


def has_untied_embedding(model: Any) -> bool:
    """Whether the model's embedding is a plain `nn.Embedding` that is not tied to lm_head."""
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    return type(embedding) is nn.Embedding and (lm_head is None or lm_head.weight is not embedding.weight)


def has_host_embedding(model: Any) -> bool:
    """Whether a `HostEmbedding` looks rows up for the model."""
    return isinstance(getattr(model.get_input_embeddings().forward, "__self__", None), HostEmbedding)


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
        self._host_ids: Tensor | None = None  # of the current forward pass
        self._embedding.weight.data = table.new_full((1, 1), float("nan"), device=self._device).expand(table.shape)
        self._embedding.forward = self._look_up
        self._hook = decoder_of(model).register_forward_pre_hook(self._take_host_ids, with_kwargs=True)

    def close(self, *, to_device: bool = False) -> None:
        """Restores the embedding's table, on the host or on its device, and its own forward."""
        self._hook.remove()
        del self._embedding.forward
        self._embedding.weight.data = self._table.to(self._device) if to_device else self._table

    def _take_host_ids(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs.pop(HOST_IDS, None)
        self._host_ids = None if ids is None else torch.from_numpy(ids)
        return args, kwargs

    def _look_up(self, ids: Tensor) -> Tensor:
        host_ids, self._host_ids = self._host_ids, None
        if host_ids is None:
            host_ids = ids.to("cpu")
        elif host_ids.shape != ids.shape:
            raise ValueError(f"{HOST_IDS} are {tuple(host_ids.shape)}, input_ids {tuple(ids.shape)}")
        width = self._table.shape[1]
        rows = torch.empty((host_ids.numel(), width), dtype=self._table.dtype, pin_memory=self._device.type == "cuda")
        torch.index_select(self._table, 0, host_ids.reshape(-1), out=rows)
        return rows.view(*ids.shape, width).to(self._device, non_blocking=True)
