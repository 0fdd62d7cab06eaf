"""One piece of work, done by fastprice and by its peers: checked first, timed side by side, held against the limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastprice.benchmarking.timing import NOISY, interleave, ratios, spread_of, synchronize

__all__ = ["OURS", "Comparison", "run_comparison"]

OURS = "fastprice"


@dataclass
class Comparison:
    """Functions that do the same work.

    family, case: what it is, such as "dequantize" and "4096x14336 bfloat16".
    functions: by name, `OURS` among them; each returns its result, a tensor or a tuple of tensors.
    reference: the result to hold them against.
    tolerance: largest ||out - reference|| / ||reference|| over the tensors of a result; 0 asks for equal bits.
    bytes_moved, flops: the least the work needs, for its floor.
    absent: names that could not take part, with the reason.
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
    """A row of figures. Who is wrong is not timed, and when `OURS` is wrong or absent there is no ratio at all.

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
    able: dict[str, Callable[[], Any]] = {}
    for name, function in comparison.functions.items():
        try:
            error = _error(_tensors(function()), truth)
        except Exception as problem:  # a peer that cannot run here is a finding, whatever it raises
            row["absent"][name] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[:1]}"[:300]
            continue
        row["errors"][name] = error
        if error <= comparison.tolerance:
            able[name] = function
        else:
            row["absent"][name] = f"wrong: error {error:.2e}, {comparison.tolerance:.2e} allowed"
    del truth
    if OURS not in able:
        wrong = OURS in row["errors"]
        row["status"], row["reason"] = ("wrong" if wrong else "absent"), row["absent"].get(OURS, "not there")
        return row
    row["extra_bytes"] = {name: _extra_bytes(function, device) for name, function in able.items()}
    samples = interleave(able, device, seconds=seconds)
    row["seconds"] = {name: spread_of(values).as_dict() for name, values in samples.items()}
    row["ratios"] = {name: ratios(values, samples[OURS]).as_dict() for name, values in samples.items() if name != OURS}
    floor = max(comparison.bytes_moved / limits["copy_bytes_per_second"], comparison.flops / limits["matmul_flops"])
    row |= {"floor_seconds": floor, "bytes_moved": comparison.bytes_moved, "flops": comparison.flops}
    row["share_of_limit"] = {name: floor / spread["p50"] for name, spread in row["seconds"].items()}
    row["noisy"] = [name for name, spread in row["seconds"].items() if spread["noise"] > NOISY]
    return row


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
