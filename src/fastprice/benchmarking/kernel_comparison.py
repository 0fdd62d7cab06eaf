"""One piece of work, done by fastprice and by its peers: checked first, timed side by side, compared with the limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastprice.benchmarking.timing import NOISY, interleave, ratios, spread_of, synchronize

__all__ = [
    "OURS",
    "ROUNDING",
    "Comparison",
    "KernelCase",
    "KernelSettings",
    "check_functions",
    "dtype_name",
    "run_comparison",
    "seeded_generator",
]

OURS = "fastprice"
# Relative error of one product or sum in each dtype; the tolerance of a case with several is as many times that.
ROUNDING = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-5}


@dataclass(frozen=True)
class KernelSettings:
    """What the cases of a run share.

    model     name of `workload.MODELS` whose layers give the shapes
    tokens    rows of x
    dtype     of activations; adapters are fp32
    unsloth   compare with Unsloth alone, which patches the other peers when it is imported
    """

    model: str
    tokens: int
    device: torch.device
    dtype: torch.dtype
    unsloth: bool


@dataclass
class Comparison:
    """Functions that do the same work.

    functions            by name, `OURS` among them; each returns its result, a tensor or a tuple of tensors
    reference            computes the result to compare them with
    tolerance            largest ||out - reference|| / ||reference|| over the tensors of a result; 0: bit for bit
    bytes_moved, flops   the least that the work needs, for its floor
    absent               names that cannot take part, with the reason
    """

    functions: dict[str, Callable[[], Any]]
    reference: Callable[[], Any]
    tolerance: float
    bytes_moved: float
    flops: float
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelCase:
    """One comparison before its tensors exist.

    family, name   such as "dequantize" and "4096x14336 bfloat16"
    ways           names of the functions that are compared, `OURS` first; those that cannot run here among them
    make           allocates the tensors
    """

    family: str
    name: str
    ways: tuple[str, ...]
    make: Callable[[], Comparison]


def check_functions(comparison: Comparison) -> tuple[dict[str, Callable[[], Any]], dict[str, float], dict[str, str]]:
    """(the functions whose results are right, errors by name, why the others are absent)."""
    absent, errors = dict(comparison.absent), {}
    truth = _tensors(comparison.reference())
    right: dict[str, Callable[[], Any]] = {}
    for name, function in comparison.functions.items():
        try:
            error = _error(_tensors(function()), truth)
        except Exception as problem:  # a peer may raise anything; that it cannot run here is a finding
            absent[name] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[:1]}"[:300]
            continue
        errors[name] = error
        if error <= comparison.tolerance:
            right[name] = function
        else:
            absent[name] = f"wrong: error {error:.2e}, {comparison.tolerance:.2e} allowed"
    return right, errors, absent


def run_comparison(
    case: KernelCase,
    device: torch.device | str,
    limits: Mapping[str, Any],
    seconds: float,
    *,
    ways: Collection[str] | None = None,
    samples: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """A row of figures. A wrong function is not timed, and where `OURS` is wrong or absent there is no ratio at all.

    limits: as `environment.measure_limits` returns them; {}: no floors. seconds: of timing, over all functions
    together. ways: those to time beside `OURS`, all by default. samples: every sample goes into the row. clock: as
    `interleave` takes it.
    """
    comparison = case.make()
    right, errors, absent = check_functions(comparison)
    row: dict[str, Any] = {
        "family": case.family,
        "name": case.name,
        "tolerance": comparison.tolerance,
        "absent": absent,
        "errors": errors,
        "status": "ok",
    }
    if OURS not in right:
        row["status"], row["reason"] = ("wrong" if OURS in errors else "absent"), absent.get(OURS, "missing")
        return row
    timed = {name: function for name, function in right.items() if name == OURS or ways is None or name in ways}
    row["peaks"] = {name: _peaks(function, device) for name, function in timed.items()}
    found = interleave(timed, device, seconds=seconds, clock=clock)
    if samples:
        row["samples"] = found
    row["seconds"] = {name: spread_of(values).as_dict() for name, values in found.items()}
    row["ratios"] = {name: ratios(values, found[OURS]).as_dict() for name, values in found.items() if name != OURS}
    row["noisy"] = [name for name, spread in row["seconds"].items() if spread["noise"] > NOISY]
    row |= {"bytes_moved": comparison.bytes_moved, "flops": comparison.flops}
    if not limits:
        return row
    floor = max(comparison.bytes_moved / limits["copy_bytes_per_second"], comparison.flops / limits["matmul_flops"])
    row["floor_seconds"] = floor
    row["share_of_limit"] = {name: floor / spread["p50"] for name, spread in row["seconds"].items()}
    return row


def seeded_generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(0)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensors(result: Any) -> list[torch.Tensor]:
    found = [result] if isinstance(result, torch.Tensor) else [each for each in result if each is not None]
    return [tensor.detach() for tensor in found]


def _error(results: list[torch.Tensor], truths: list[torch.Tensor]) -> float:
    """The largest relative error over the tensors; infinite for other shapes or NaN."""
    worst = 0.0
    for result, truth in zip(results, truths, strict=True):
        if result.shape != truth.shape:
            return float("inf")
        wide = torch.float64 if truth.dtype == torch.float64 else torch.float32
        distance = float(torch.linalg.vector_norm(result.to(wide) - truth.to(wide)))
        size = float(torch.linalg.vector_norm(truth.to(wide)))
        error = distance / size if size else distance
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _peaks(function: Callable[[], Any], device: torch.device | str) -> dict[str, int | None]:
    """Peak bytes allocated and reserved beyond what was there while the function runs, its result included; None on a
    CPU."""
    if torch.device(device).type != "cuda":
        return {"peak_allocated": None, "peak_reserved": None}
    synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    result = function()
    synchronize(device)
    del result
    return {
        "peak_allocated": int(torch.cuda.max_memory_allocated(device)) - before[0],
        "peak_reserved": int(torch.cuda.max_memory_reserved(device)) - before[1],
    }
