"""Every kernel beside its peers, on the shapes of real models (CUDA) or of a nano (CPU), checked before it is timed."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from fastprice.benchmarking.kernel_cases import kernel_cases
from fastprice.benchmarking.kernel_comparison import OURS, KernelCase, KernelSettings, run_comparison
from fastprice.benchmarking.peers import PEERS
from fastprice.benchmarking.pytest_recording import TIME, selected_values
from fastprice.benchmarking.workload import KERNEL_FAMILIES
from fastprice.models.peft_engine import compute_dtype

pytestmark = pytest.mark.benchmark(timer=TIME)

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MODEL, TOKENS, SECONDS = ("llama-3.1-8b", 4096, 0.5) if CUDA else ("nano", 64, 0.1)
CLOCK = time.perf_counter if CUDA else time.process_time


def settings(*, unsloth: bool) -> KernelSettings:
    return KernelSettings(MODEL, TOKENS, DEVICE, compute_dtype(), unsloth)


CASES = {f"{case.family}: {case.name}": case for case in kernel_cases(KERNEL_FAMILIES, settings(unsloth=False))}
WITH_UNSLOTH = {
    f"{case.family}: {case.name}": case for case in kernel_cases(("dequantize", "lora_linear"), settings(unsloth=True))
}


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    """Rows by case: all selected ways of a case are timed in turns, by the first test that wants one."""
    return {}


@pytest.mark.parametrize(("case", "way"), [(case, way) for case in CASES for way in CASES[case].ways])
def test_kernel(case: str, way: str, rows: dict[str, Any], record: Any, request: pytest.FixtureRequest) -> None:
    if case not in rows:
        ways = selected_values(request.session.items, "test_kernel", "way", case=case)
        rows[case] = run_comparison(CASES[case], DEVICE, {}, SECONDS, ways=ways, samples=True, clock=CLOCK)
        if CUDA:
            torch.cuda.empty_cache()
    give(rows[case], CASES[case], way, record)


@pytest.mark.parametrize(
    ("case", "way"), [(case, way) for case in WITH_UNSLOTH for way in WITH_UNSLOTH[case].ways], ids=str
)
def test_kernel_beside_unsloth(
    case: str, way: str, rows: dict[str, Any], suite: Any, ran: Any, record: Any, request: pytest.FixtureRequest
) -> None:
    """In a process of its own: importing Unsloth replaces functions that the other peers call."""
    missing = PEERS["unsloth"].missing(cuda=CUDA)
    if missing is not None:
        pytest.skip(missing)
    key = f"{case}, beside unsloth"
    if key not in rows:
        one = WITH_UNSLOTH[case]
        work = {
            "kind": "kernels", "families": [one.family], "name": one.name, "model": MODEL, "tokens": TOKENS,
            "seconds": SECONDS, "limits": {}, "unsloth": True, "samples": True,
            "ways": selected_values(request.session.items, "test_kernel_beside_unsloth", "way", case=case),
        }  # fmt: skip
        (rows[key],) = suite.measure("kernels", work, timeout=120)
    give(ran(rows[key]), WITH_UNSLOTH[case], way, record, beside=", beside unsloth")


def give(row: dict[str, Any], case: KernelCase, way: str, record: Any, beside: str = "") -> None:
    assert row["status"] == "ok", row.get("reason")
    if way not in row["samples"]:
        pytest.skip(row["absent"][way])
    more = {"error": row["errors"][way], "tolerance": row["tolerance"], "bytes_moved": row["bytes_moved"]}
    ratio = None if way == OURS else row["ratios"][way]
    record(row["samples"][way], row["peaks"][way], group=f"{case.family}: {case.name}{beside}", ratio=ratio, **more)
