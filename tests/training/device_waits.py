"""Finds on a CPU what would make the host wait for a CUDA device: values that the host reads, shapes that depend on
values, and copies between device and pageable host memory.

On a CPU every tensor is on the host, so a copy to the device is recognized by its source: data of Python or NumPy, or a
tensor that was made in the watched code without a device, which on CUDA would have been made on the host.
"""

from __future__ import annotations

import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tests.training import tape_capture
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

_READS = {Tensor.cpu, Tensor.tolist, Tensor.numpy}
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}
_TORCH = Path(torch.__file__).parent
_WATCHERS = {__file__, tape_capture.__file__}


class DeviceWaits:
    """A context manager: `found` lists what would wait, as "operation in folder/file.py:function"."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._stack = ExitStack()
        self._on_host: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __enter__(self) -> DeviceWaits:
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def report(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if _TORCH not in Path(f.filename).parents]
        where = next(frame for frame in reversed(frames) if frame.filename not in _WATCHERS)
        self.found.append(f"{what} in {'/'.join(Path(where.filename).parts[-2:])}:{where.name}")

    def on_host(self, arguments: Any) -> bool:
        """Whether the arguments hold tensors, all of them known to be on the host."""
        tensors = [each for each in tree_leaves(arguments) if isinstance(each, Tensor)]
        return bool(tensors) and all(each in self._on_host for each in tensors)

    def see_function(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        has_tensors = any(isinstance(each, Tensor) for each in tree_leaves((args, kwargs)))
        if func in (Tensor.to, Tensor.cuda):
            self._see_copy(args, kwargs)
        elif func in _READS and not self.on_host(args):
            self.report(func.__name__)
        elif func in _FROM_DATA and kwargs.get("device") is not None and not has_tensors:
            self.report(f"{func.__name__} onto a device")
        elif isinstance(result, Tensor) and self._made_on_host(args, kwargs, has_tensors):
            self._on_host[result] = True

    def _made_on_host(self, args: Any, kwargs: dict[str, Any], has_tensors: bool) -> bool:
        return kwargs.get("device") is None and (not has_tensors or self.on_host((args, kwargs)))

    def _see_copy(self, args: Any, kwargs: dict[str, Any]) -> None:
        device = kwargs.get("device", args[1] if len(args) > 1 else None)
        if device == "cpu" and not self.on_host(args[:1]):
            self.report("to the host")
        elif isinstance(device, str | int | torch.device) and self._on_host.pop(args[0], False):
            self.report("to a device")


class _Operations(TorchDispatchMode):
    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            tape_capture.refuse_waits(func, args, kwargs or {})
        except RuntimeError:
            if not self._waits.on_host(args):
                self._waits.report(str(func))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._waits.see_function(func, args, kwargs or {}, result)
        return result
