"""Launches of Triton kernels at little host time: `launch(kernel, grid, *arguments, **constants)`.

`kernel[grid](...)` inspects every argument, parses the launch options and prints them into a string, reads settings
from the environment and makes a record for hooks, at each call. `launch` lets Triton do so once for each kind of call
and later hands the arguments to the compiled kernel. A kind is finer than what Triton (3.6, CUDA) compiles for: kernel,
device, constants, dtype of each tensor and whether its address is divisible by 16, type and value of everything else.
So a call reaches a compiled kernel only where Triton's own path would. Numbers that change from call to call give many
kinds, each of which takes Triton's path once, and of which only so many are kept.

Triton's own path runs in the interpreter, for hooks (profilers) and on other devices than CUDA's. Settings of the
environment (TRITON_DEBUG and the like) are those of the first launch of a kind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["launch"]

_MOST_KINDS = 4096
# From a kind to the compiled kernel and what it takes before and after the arguments of a call.
_kinds: dict[Any, tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)`, on the current device.

    Args:
        kernel: a `triton.jit` function.
        grid: one to three numbers of programs.
        arguments: its first parameters: plain tensors on the current device, numbers, None.
        constants: its other parameters, each of them a `tl.constexpr`, and launch options.

    Raises:
        TypeError: a parameter that is no constant is given by name.
    """
    if type(kernel) is not JITFunction or torch.version.hip is not None or _has_hooks(kernel):
        kernel[grid](*arguments, **constants)
        return
    active = driver.active
    device = active.get_current_device()
    kind: list[Any] = [kernel, device]
    for x in arguments:
        if isinstance(x, Tensor):
            kind += (x.dtype, x.data_ptr() & 15 == 0)
        else:
            kind += (type(x), x)
    key = (*kind, *constants.items())
    found = _kinds.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants)
        if compiled is None:  # a hook of Triton's own kept it from running
            return
        if len(_kinds) >= _MOST_KINDS:
            _kinds.clear()
        _kinds[key] = _bind(kernel, compiled, len(arguments), constants)
        return
    run, before, after = found
    run(*grid, *_ONES[len(grid)], active.get_current_stream(device), *before, *arguments, *after)


_ONES: tuple[tuple[int, ...], ...] = ((), (1, 1), (1,), ())  # that a grid lacks, by its length


def _bind(kernel: Any, compiled: Any, count: int, constants: dict[str, Any]) -> tuple[Any, Any, Any]:
    rest = kernel.params[count:]
    if not all(each.is_constexpr for each in rest):
        raise TypeError(f"launch() takes the arguments of {kernel.__name__} by position and its constants by name")
    after = tuple(constants.get(each.name, each.default) for each in rest)
    # The function, its metadata, and no launch metadata, enter hook and exit hook.
    return compiled.run, (compiled.function, compiled.packed_metadata, None, None, None), after


def _has_hooks(kernel: Any) -> bool:
    runtime = knobs.runtime
    return bool(kernel.pre_run_hooks or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
