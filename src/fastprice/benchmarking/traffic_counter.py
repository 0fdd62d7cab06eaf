"""Counts the kernels that PyTorch code would launch on a GPU and the bytes that they move, and computes nothing.

Each operator that reaches the dispatcher is one launch. It moves each tensor argument that it reads once and each
tensor that it writes once; views and allocations are free. An expanded dimension counts once, a lookup (`embedding`,
`index`) reads as many elements as it returns, and of `out=` and of what `copy_` and `fill_` overwrite nothing is read.
Caches are not modeled: what a launch reads comes from memory, even if the launch before it wrote it.

An operator of `torch.ops.fastprice` is one launch as well: its schema says what it reads and writes, `_WRITE_ONLY`
which of the written arguments it does not read, `_PARTLY` what touches only a part of an argument. bitsandbytes'
`gemm_4bit` dequantizes and then multiplies, as it does on CUDA for more than some 256 rows.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["EAGER_KINDS", "KINDS", "Launch", "TrafficCounter"]

FUSED_KINDS = (
    "frozen product",
    "LoRA product",
    "attention",
    "dequantization",
    "activation",
    "fused norm",
    "fused RoPE",
)
EAGER_KINDS = ("eager norm", "eager RoPE", "cast", "other eager")
KINDS = (*FUSED_KINDS, *EAGER_KINDS, "loss")

_FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "detach",
    "set_", "resize_",
}  # fmt: skip
_PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "dot", "mv", "gemm_4bit"}
_OVERWRITES = {"copy_", "_foreach_copy_", "fill_", "zero_", "normal_", "uniform_"}
_CASTS = {"_to_copy", "_foreach_copy_"}
_WRITE_ONLY = {
    "dequantize_nf4": ("out",),
    "glu_forward": ("out",),
    "norm_forward": ("y", "total", "statistics"),
    "norm_backward": ("dx", "dparameters"),
}
_CREATES = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "rand_like", "randn_like"}
_LOOKUPS = {"embedding", "index", "index_select", "gather"}
# What an operator of ours is, by a part of its name.
_OURS = (
    ("dequantize", "dequantization"), ("glu", "activation"), ("norm", "fused norm"), ("rope", "fused RoPE"),
    ("rotat", "fused RoPE"), ("cross_entropy", "loss"), ("matmul", "frozen product"),
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
    """Records every launch while it is on, and returns results that are allocated but never written.

    Shapes and dtypes come from the operators' meta implementations. The tensors are plain ones on the CPU, so the code
    takes its usual branches; memory that nothing writes costs address space alone. What reads a value (`item`) raises.

    rank: of the adapters. A product with a side of at most three adapters' ranks (q, k, v stacked) is a LoRA product.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._narrow = 3 * rank
        self._phase = "forward"
        self._functions: dict[tuple[str, int], str] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names the phase of the launches inside. Of a "backward" phase the lines that it is the gradient of are known
        if the forward ran under `torch.autograd.set_detect_anomaly`."""
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
        place, function = self._source()  # of free operators too: it learns the functions that lines belong to
        if name in _FREE or func.is_view or func.namespace == "prim":
            return func(*args, **kwargs)
        if not any(str(each.type).startswith(("Tensor", "List[Tensor")) for each in _signature(func)):
            return func(*args, **kwargs)  # arithmetic on dtypes and sizes
        result = _unwritten(func, args, kwargs)
        self._record(func, name, args, kwargs, result, place, function)
        return result

    def _record(
        self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], result: Any, place: str, function: str
    ) -> None:
        given = _arguments(func, args, kwargs)
        if name == "gemm_4bit":
            self._gemm_4bit(given, result, place)
            return
        read, written = _moved(func, name, given, result)
        kind = self._kind(func, name, args, function)
        self.launches.append(Launch(self._phase, kind, func._schema.name, read, written, place))

    def _gemm_4bit(self, given: dict[str, Any], result: Tensor, place: str) -> None:
        """Scales to fp32 and an offset added to them, where they are nested; the weight dequantized; the product."""
        packed, scales, nested = given["B"], _bytes(given["absmax"]), given.get("absmax_8bit")
        dense = 2 * packed.numel() * given["A"].itemsize
        found = []
        if nested is not None:
            wide = 4 * nested.numel()
            found.append(("dequantization", "bitsandbytes::dequantize_blockwise", _bytes(nested) + scales, wide))
            found.append(("dequantization", "aten::add_", wide, wide))
            scales = wide
        found.append(("dequantization", "bitsandbytes::dequantize_4bit", _bytes(packed) + scales, dense))
        found.append(("frozen product", "aten::mm", _bytes(given["A"]) + dense, _bytes(result)))
        self.launches += [Launch(self._phase, *one, place) for one in found]

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
        return "cast" if name in _CASTS else "other eager"

    def _source(self) -> tuple[str, str]:
        """("file:line function", function with its class) of the innermost line of a library that is running, or whose
        gradient is computed."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            path, line = frame.f_code.co_filename, frame.f_lineno
            if path.endswith("benchmarking/dry_run.py") and self._phase == "backward":
                break
            if _short(path):
                function = frame.f_code.co_qualname
                self._functions[path, line] = function
                return f"{_short(path)}:{line} {function}", function
            frame = frame.f_back
        node = torch._C._current_autograd_node()
        name = "sum of gradients" if node is None else node.name()
        metadata: dict[str, Any] = {} if node is None else node.metadata  # type: ignore[assignment]
        lines = metadata.get("traceback_", [])
        for text in reversed(lines):
            match = _FRAME.search(text)
            if match and _short(match[1]):
                function = self._functions.get((match[1], int(match[2])), "")
                return f"{_short(match[1])}:{match[2]} {function} ({name})", function
        return name, ""


@cache
def _short(path: str) -> str:
    """The path from its package on, for a file of `_PACKAGES` other than the benchmarks; "" for any other."""
    for root in _roots():
        if path.startswith(root + os.sep):
            short = os.path.relpath(path, os.path.dirname(root))
            return "" if short.startswith(os.path.join("fastprice", "benchmarking")) else short
    return ""


@cache
def _roots() -> tuple[str, ...]:
    """The folders of `_PACKAGES`, those that are installed."""
    specs = [find_spec(name) for name in _PACKAGES]
    return tuple(
        os.fspath(folder) for spec in specs if spec is not None for folder in spec.submodule_search_locations or ()
    )


def _signature(func: Any) -> list[Any]:
    """Arguments and results, as the schema has them."""
    return [*func._schema.arguments, *func._schema.returns]


def _unwritten(func: Any, args: Any, kwargs: Any) -> Any:
    """What `func` returns: its shapes, strides and dtypes alone. What works in place returns `self` in any case."""

    def to_meta(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")

    def to_cpu(meta: Tensor) -> Tensor:
        return torch.empty_strided(meta.size(), meta.stride(), dtype=meta.dtype)

    if func is torch.ops.aten.mm.dtype:  # a result in another dtype: CUDA only
        a, b, dtype = args
        return torch.empty(a.shape[0], b.shape[1], dtype=dtype)
    meta_args, meta_kwargs = tree_map_only(Tensor, to_meta, (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):
        meta_kwargs = {**meta_kwargs, "device": "meta"}
    return tree_map_only(Tensor, to_cpu, func(*meta_args, **meta_kwargs))


def _bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor, expanded dimensions counted once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.itemsize


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by their names in the operator's schema; those that were left out are missing."""
    return dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs


def _moved(func: Any, name: str, given: dict[str, Any], result: Any) -> tuple[int, int]:
    """(bytes read, bytes written)."""
    if name in _PARTLY:
        return _PARTLY[name](given, result)
    read = written = 0
    mutated = {each.name for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write}
    for argument, value in given.items():
        size = sum(map(_bytes, _tensors(value)))
        if argument in mutated:
            written += size
        if _reads(name, argument, argument in mutated, given):
            read += size
    if not mutated:
        written = sum(map(_bytes, _tensors(result)))
    if name in _LOOKUPS:
        _, *indices = given.values()
        read = written + sum(map(_bytes, _tensors(indices)))
    return read, written


def _reads(name: str, argument: str, mutated: bool, given: dict[str, Any]) -> bool:
    """Whether an operator reads the elements of this argument."""
    if name in _CREATES or (argument == "self" and given.get("beta") == 0):  # of addmm
        return False
    return not (mutated and (argument == "out" or name in _OVERWRITES or argument in _WRITE_ONLY.get(name, ())))


def _index_copy(given: dict[str, Any], result: Any) -> tuple[int, int]:
    """`index_copy_(self, dim, index, source)` writes as many elements as it reads from the source."""
    return _bytes(given["index"]) + _bytes(given["source"]), _bytes(given["source"])


def _slice_backward(given: dict[str, Any], result: Any) -> tuple[int, int]:
    """Zeros of the whole, then a copy of the gradient into its part: two launches in one operator."""
    gradient = _bytes(given["grad_output"])
    return gradient, _bytes(result) + gradient


def _completion_cross_entropy(given: dict[str, Any], result: Any) -> tuple[int, int]:
    """The rows of the hidden states gathered; then, chunk by chunk, the head read for the logits, these written and
    read, and with gradients read and overwritten, and read with the head again for dH, which is copied to its rows of
    the zeroed result."""
    weight, positions = given["weight"], given["positions"]
    rows = (given["labels"] if positions is None else positions).numel()
    chunks = -(-rows // (given["chunk"] or rows or 1))
    logits, hidden = rows * weight.shape[0] * weight.itemsize, rows * weight.shape[1] * weight.itemsize
    read = chunks * _bytes(weight) + 2 * hidden + logits
    written = hidden + logits + sum(map(_bytes, _tensors(result)))
    if given["wants_hidden"]:
        read += chunks * _bytes(weight) + 2 * logits + hidden
        written += logits + 2 * hidden
    return read, written


_PARTLY: dict[str, Callable[[dict[str, Any], Any], tuple[int, int]]] = {
    "index_copy_": _index_copy,
    "slice_backward": _slice_backward,
    "completion_cross_entropy": _completion_cross_entropy,
}
