"""One piece of work, done by fastprice and by its peers: checked first, timed side by side, compared with the limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastprice.benchmarking.timing import NOISY, interleave, ratios, spread_of, synchronize

__all__ = ["OURS", "ROUNDING", "Comparison", "KernelSettings", "dtype_name", "run_comparison", "seeded_generator"]

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

    family, case         its name, such as "dequantize" and "4096x14336 bfloat16"
    functions            by name, `OURS` among them; each returns its result, a tensor or a tuple of tensors
    reference            computes the result to compare them with
    tolerance            largest ||out - reference|| / ||reference|| over the tensors of a result; 0: bit for bit
    bytes_moved, flops   the least that the work needs, for its floor
    absent               names that cannot take part, with the reason
    """

    family: str
    case: str
    functions: dict[str, Callable[[], Any]]
    reference: Callable[[], Any]
    tolerance: float
    bytes_moved: float
    flops: float
    absent: dict[str, str] = field(default_factory=dict)


def run_comparison(
    comparison: Comparison, device: torch.device | str, limits: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """A row of figures. A wrong function is not timed, and where `OURS` is wrong or absent there is no ratio at all.

    limits: as `environment.measure_limits` returns them; seconds: of timing, over all functions together.
    """
    row: dict[str, Any] = {
        "family": comparison.family,
        "name": comparison.case,
        "tolerance": comparison.tolerance,
        "absent": dict(comparison.absent),
        "errors": {},
        "status": "ok",
    }
    truth = _tensors(comparison.reference())
    right: dict[str, Callable[[], Any]] = {}
    for name, function in comparison.functions.items():
        try:
            error = _error(_tensors(function()), truth)
        except Exception as problem:  # a peer may raise anything; that it cannot run here is a finding
            row["absent"][name] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[:1]}"[:300]
            continue
        row["errors"][name] = error
        if error <= comparison.tolerance:
            right[name] = function
        else:
            row["absent"][name] = f"wrong: error {error:.2e}, {comparison.tolerance:.2e} allowed"
    del truth
    if OURS not in right:
        wrong = OURS in row["errors"]
        row["status"], row["reason"] = ("wrong" if wrong else "absent"), row["absent"].get(OURS, "missing")
        return row
    row["extra_bytes"] = {name: _extra_bytes(function, device) for name, function in right.items()}
    samples = interleave(right, device, seconds=seconds)
    row["seconds"] = {name: spread_of(values).as_dict() for name, values in samples.items()}
    row["ratios"] = {name: ratios(values, samples[OURS]).as_dict() for name, values in samples.items() if name != OURS}
    floor = max(comparison.bytes_moved / limits["copy_bytes_per_second"], comparison.flops / limits["matmul_flops"])
    row |= {"floor_seconds": floor, "bytes_moved": comparison.bytes_moved, "flops": comparison.flops}
    row["share_of_limit"] = {name: floor / spread["p50"] for name, spread in row["seconds"].items()}
    row["noisy"] = [name for name, spread in row["seconds"].items() if spread["noise"] > NOISY]
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


def _extra_bytes(function: Callable[[], Any], device: torch.device | str) -> int | None:
    """Peak bytes allocated while the function runs, its result included; None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    synchronize(device)
    extra = int(torch.cuda.max_memory_allocated(device)) - before
    del result
    return extra
