"""Counts the kernels that PyTorch code would launch on a GPU and the bytes that they move, on tensors without values.

Each operator that reaches the dispatcher is one launch. It moves each tensor argument that it reads once and each
tensor that it writes once; views and allocations are free. An expanded dimension counts once, a lookup (`embedding`,
`index`) reads as many elements as it returns, and of `out=` and of what `copy_` and `fill_` overwrite nothing is read.
Caches are not modeled: what a launch reads comes from memory, even if the launch before it wrote it.

An operator of `torch.ops.fastprice` is one launch as well: its schema says what it reads and writes, a written argument
named `out` is not read, and `_PARTLY` has those that touch only a part of an argument. bitsandbytes' `gemm_4bit`
dequantizes and then multiplies, as it does on CUDA for more than some 256 rows.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["EAGER_KINDS", "KINDS", "Launch", "TrafficCounter"]

FUSED_KINDS = ("frozen product", "LoRA product", "attention", "dequantization", "activation", "fused norm", "fused RoPE")
EAGER_KINDS = ("eager norm", "eager RoPE", "cast", "other eager")
KINDS = (*FUSED_KINDS, *EAGER_KINDS, "loss")

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "detach"}
_PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "dot", "mv", "gemm_4bit"}
_OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
_CREATES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "rand_like", "randn_like"}
_LOOKUPS = {"embedding", "index", "index_select", "gather"}
# What an operator of ours is, by a part of its name.
_OURS = (
    ("dequantize", "dequantization"), ("glu", "activation"), ("norm", "fused norm"), ("rope", "fused RoPE"),
    ("rotary", "fused RoPE"), ("cross_entropy", "loss"), ("matmul", "frozen product"),
)  # fmt: skip
_PACKAGES = ("fastprice_kernels", "fastprice", "transformers", "peft", "bitsandbytes", "trl")
_FRAME = re.compile(r'File "(.*)", line (\d+), in ')


@dataclass(frozen=True)
class Launch:
    """One launch: the phase in which it ran ("forward", "backward"), the operator, bytes read and written, and the
    line of a library that issued it, in a backward pass the line whose gradient it computes."""

    phase: str
    kind: str
    operator: str
    read: int
    written: int
    where: str

    @property
    def bytes(self) -> int:
        return self.read + self.written


class TrafficCounter(TorchDispatchMode):
    """Records every launch while it is on, above a `FakeTensorMode`, so that an operator is seen before it decomposes.

    rank: of the adapters. A product with a side of at most three adapters' ranks (q, k, v stacked) is a LoRA product.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._narrow = 3 * rank
        self._phase = "forward"
        self._inside: str | None = None
        self._functions: dict[tuple[str, int], str] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names the phase of the launches inside; "backward" needs `torch.autograd.set_detect_anomaly` in forward."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def kernel(self, kind: str, operator: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> None:
        """Records a launch that a stand-in computes on nothing."""
        place, _ = self._source()
        read, written = sum(map(_bytes, reads)), sum(map(_bytes, writes))
        self.launches.append(Launch(self._phase, kind, operator, read, written, place))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        result = func(*args, **kwargs)
        place, function = self._source()  # of free operators too: it learns the functions that lines belong to
        if not _is_free(func, name):
            self._record(func, name, args, kwargs, result, place, function)
        return result

    def _record(
        self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any, place: str, function: str
    ) -> None:
        if name == "gemm_4bit":
            self._gemm_4bit(args, kwargs, result, place)
            return
        read, written = _moved(func, name, args, kwargs, result)
        kind = self._kind(func, name, args, function)
        self.launches.append(Launch(self._phase, kind, func._schema.name, read, written, place))

    def _gemm_4bit(self, args: Sequence[Any], kwargs: dict[str, Any], result: Tensor, place: str) -> None:
        x, packed, shape, absmax, *_ = args
        nested = kwargs.get("absmax_8bit")
        scales, blocks = _bytes(absmax), x.new_empty(0)
        dense = shape[0] * shape[1] * x.itemsize
        launches = []
        if nested is not None:
            launches.append(("bitsandbytes::dequantize_blockwise", _bytes(nested) + scales, 4 * nested.numel()))
            launches.append(("aten::add_", 4 * nested.numel(), 4 * nested.numel()))
            scales = 4 * nested.numel()
        del blocks
        launches.append(("bitsandbytes::dequantize_4bit", _bytes(packed) + scales, dense))
        for operator, read, written in launches:
            self.launches.append(Launch(self._phase, "dequantization", operator, read, written, place))
        read = _bytes(x) + dense
        self.launches.append(Launch(self._phase, "frozen product", "aten::mm", read, _bytes(result), place))

    def _kind(self, func: Any, name: str, args: Sequence[Any], function: str) -> str:
        if func.namespace == "fastprice":
            return next((kind for part, kind in _OURS if part in name), "other eager")
        if func.namespace == "bitsandbytes":
            return "dequantization"
        if name in _PRODUCTS:
            sizes = [size for arg in args if isinstance(arg, Tensor) and arg.dim() > 1 for size in arg.shape[-2:]]
            if "RotaryEmbedding" in function:
                return "eager RoPE"
            return "LoRA product" if min(sizes, default=0) <= self._narrow else "frozen product"
        if "dequantize" in function:
            return "dequantization"  # the offset that bitsandbytes adds to nested scales
        if "Norm" in function:
            return "eager norm"
        if "rotary" in function.lower() or "rotate" in function:
            return "eager RoPE"
        return "cast" if name == "_to_copy" else "other eager"

    def _source(self) -> tuple[str, str]:
        """("file:line function", function with its class) of the innermost line of a library that is running, or whose
        gradient is computed."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            path, line = frame.f_code.co_filename, frame.f_lineno
            if path.endswith("benchmarking/fake_training.py") and self._phase == "backward":
                break
            if _short(path):
                function = frame.f_code.co_qualname
                self._functions[path, line] = function
                return f"{_short(path)}:{line} {function}", function
            frame = frame.f_back
        node = torch._C._current_autograd_node()
        name = "sum of gradients" if node is None else node.name()
        lines = [] if node is None else node.metadata.get("traceback_", [])
        for text in reversed(lines):
            match = _FRAME.search(text)
            if match and _short(match[1]):
                function = self._functions.get((match[1], int(match[2])), "")
                return f"{_short(match[1])}:{match[2]} {function} ({name})", function
        return name, ""


def _short(path: str) -> str:
    """The path from its package on, for a file of `_PACKAGES` other than the benchmarks; "" for any other."""
    parts = Path(path).parts
    for i in range(len(parts) - 1, -1, -1):
        if parts[i] in _PACKAGES:
            return "" if "benchmarking" in parts[i:] else "/".join(parts[i:])
    return ""


def _is_free(func: Any, name: str) -> bool:
    return name in _FREE or func.is_view or func.namespace == "prim"


def _bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor, expanded dimensions counted once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.itemsize


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _moved(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> tuple[int, int]:
    """(bytes read, bytes written)."""
    if name in _PARTLY:
        return _PARTLY[name](args, result)
    arguments = [*zip(func._schema.arguments, args, strict=False)]
    arguments += [(each, kwargs[each.name]) for each in func._schema.arguments if each.name in kwargs]
    read = written = 0
    mutates = False
    for argument, value in arguments:
        size = sum(map(_bytes, _tensors(value)))
        if argument.alias_info is not None and argument.alias_info.is_write:
            mutates = True
            written += size
            if argument.name == "out" or name in _OVERWRITES:
                continue
        elif name in _CREATES:
            continue
        read += size
    results = _tensors(result)
    if not mutates:
        written = sum(map(_bytes, results))
    if name in _LOOKUPS:
        read = written + sum(map(_bytes, _tensors(args[1:])))
    return read, written


def _index_copy(args: Sequence[Any], result: Any) -> tuple[int, int]:
    """`index_copy_(self, dim, index, source)` writes as many elements as it reads from the source."""
    return _bytes(args[2]) + _bytes(args[3]), _bytes(args[3])


def _completion_cross_entropy(args: Sequence[Any], result: Any) -> tuple[int, int]:
    """Gathered rows of the hidden states, and for each chunk of rows the head twice and the logits; dH is written in
    whole."""
    hidden, weight, _, labels, positions, *_, chunk, wants_hidden, _, _ = args
    rows = labels.numel() if positions is None else positions.numel()
    chunks = -(-rows // (chunk or rows or 1))
    logits, gathered = rows * weight.shape[0] * weight.itemsize, rows * weight.shape[1] * weight.itemsize
    read = (1 + wants_hidden) * chunks * _bytes(weight) + 2 * gathered + (3 if wants_hidden else 2) * logits
    return read, gathered + 2 * logits + sum(map(_bytes, _tensors(result))) + wants_hidden * 2 * gathered


def _slice_backward(args: Sequence[Any], result: Any) -> tuple[int, int]:
    """Zeros of the whole, and a copy of the gradient into its part: two launches, counted as one record."""
    return _bytes(args[0]), _bytes(result) + _bytes(args[0])


_PARTLY: dict[str, Callable[[Sequence[Any], Any], tuple[int, int]]] = {
    "index_copy_": _index_copy,
    "slice_backward": _slice_backward,
    "completion_cross_entropy": _completion_cross_entropy,
}
