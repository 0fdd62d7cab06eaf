"""The adapters of projections that share an input, in the dtype of the products: cast once a step, not at each use.

A forward, its recomputation and the backward of every micro-batch of a step read the same weights. So a group of
projections has one set of buffers (2 bytes for each adapter weight in 16 bits) with A stacked and each B, refreshed by
one `torch._foreach_copy_`. Adapters that are in the dtype already are used as they are, where nothing has to be
stacked.

Stale casts would train silently on old weights, so a forward refreshes unless nothing can have changed: the parameters
have the storages and version counters of before, no optimizer took a step since (a hook on all of PyTorch's optimizers:
some, such as bitsandbytes', write past the version counters), the parameters have gradients (so this is a later
micro-batch of a step, even for code that assigns to `.data`), gradients are recorded, and no dispatch mode or stream
capture is active, which would record the host's decision for good. Inside a backward, which includes recomputation,
the casts of the forward are right: PyTorch raises an error if a saved parameter changed in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["AdapterCasts", "cast_adapters"]

_steps = 0  # optimizer steps of this process


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def cast_adapters(
    a: Sequence[Tensor | None], b: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor | None, list[Tensor | None]]:
    """A stacked, (R, K), and each B, (N, r), in `dtype`, without buffers."""
    parts = [each.to(dtype) for each in a if each is not None]
    stacked = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None
    return stacked, [None if each is None else each.to(dtype) for each in b]


class AdapterCasts:
    """The casts of one group of adapters to one dtype.

    Attributes:
        a: all A, stacked: (R, K).
        b: each B, (N, r), or None where a projection has no adapter.
    """

    def __init__(self, a: Sequence[Tensor | None], b: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._a = [each for each in a if each is not None]
        self._b = list(b)
        self._parameters = [*self._a, *(each for each in b if each is not None)]
        self._seen: list[tuple[int, int]] = []  # address and version of each parameter
        self._step = -1
        self._bind()

    def refresh(self) -> None:
        """Makes the casts those of the parameters as they are now."""
        current = [(each.data_ptr(), each._version) for each in self._parameters]
        if current != self._seen:
            if [address for address, _ in current] != [address for address, _ in self._seen]:
                self._bind()
        elif self._is_same_step():
            return
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)
        self._seen, self._step = current, _steps

    def _is_same_step(self) -> bool:
        return (
            self._step == _steps
            and torch.is_grad_enabled()
            and self._parameters[-1].grad is not None
            and not torch._C._len_torch_dispatch_stack()
            and not (self._parameters[0].is_cuda and torch.cuda.is_current_stream_capturing())
        )

    def _bind(self) -> None:
        """Buffers and sources for the storages that the parameters have now.

        The sources keep these storages alive, so that no other tensor can get the address of one.
        """
        self._seen = [(each.data_ptr(), -1) for each in self._parameters]
        detached = [each.detach() for each in self._parameters]
        in_dtype = [each.dtype == self._dtype for each in detached]
        self._sources: list[Tensor] = []
        self._targets: list[Tensor] = []
        count = len(self._a)
        if count == 1 and in_dtype[0]:
            self.a = detached[0]
        else:
            first = detached[0]
            rows = [each.shape[0] for each in detached[:count]]
            self.a = torch.empty(sum(rows), first.shape[1], dtype=self._dtype, device=first.device)
            self._sources += detached[:count]
            self._targets += self.a.split(rows)
        self.b: list[Tensor | None] = []
        rest = iter(zip(detached[count:], in_dtype[count:], strict=True))
        for each in self._b:
            if each is None:
                self.b.append(None)
                continue
            source, fits = next(rest)
            self.b.append(source if fits else torch.empty_like(source, dtype=self._dtype))
            if not fits:
                self._sources.append(source)
                self._targets.append(self.b[-1])  # type: ignore[arg-type]
