"""A stand-in for `torch.cuda.CUDAGraph` on a CPU: a fixed list of operations on fixed memory.

Recording keeps every operation below autograd with the very tensors it read and wrote; a replay runs the same list
again, writing into the same memory. As in a CUDA graph, nothing that Python decided is decided again, no new tensor is
seen, and whatever the host would have to wait for is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.nonzero_numpy, aten.masked_select, aten.unique_consecutive,
    aten._unique2, aten.is_nonzero, aten.equal, aten.repeat_interleave,
}  # fmt: skip


class NoWaits(TorchDispatchMode):
    """Refuses operations whose result's shape depends on data, or whose value the host reads."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refuse_waits(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def refuse_waits(func: Any, args: Any, kwargs: Any) -> None:
    indices = args[1] if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
    masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
    searches = func.name() == "fastprice::completion_cross_entropy" and args[4] is None  # for the labels
    if func.overloadpacket in WAITS or masked or searches:
        raise RuntimeError(f"operation not permitted when stream is capturing: {func}")


class TapeCapture(NoWaits):
    """See `fastprice.training.cuda_graphs.Capture`."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.tape.append((func, args, kwargs or {}, out))
        return out

    def record(self, work: Any) -> Tensor:
        work()
        with self:
            return work()

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.tape:
                given = {
                    each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)
                }
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    # Views and results of in-place operations lie where they lay.
                    if isinstance(old, Tensor) and old.untyped_storage()._cdata not in given:
                        old.detach().copy_(new)
