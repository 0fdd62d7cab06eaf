from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.benchmarking.fake_cuda import FakeCuda

from fastprice.benchmarking import kernel_cases as kernel_cases_module
from fastprice.benchmarking import lora_kernel_cases, norm_kernel_cases
from fastprice.benchmarking.kernel_cases import kernel_cases
from fastprice.benchmarking.kernel_comparison import (
    OURS,
    Comparison,
    KernelCase,
    KernelSettings,
    run_comparison,
)
from fastprice.benchmarking.workload import KERNEL_FAMILIES
from fastprice_kernels import reference


def test_every_case_names_all_its_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_here(name: str) -> Any:
        raise ImportError(name)

    for module in (kernel_cases_module, lora_kernel_cases):
        monkeypatch.setattr(module, "unsloth_kernel", not_here)
    for unsloth in (False, True):
        settings = KernelSettings("nano", 24, torch.device("cpu"), torch.float32, unsloth)
        cases = list(kernel_cases(KERNEL_FAMILIES, settings))
        assert len({(case.family, case.name) for case in cases}) == len(cases)
        for case in cases:
            made = case.make()
            assert {*made.functions, *made.absent} == set(case.ways), f"{case.family} {case.name}"
            assert case.ways[0] == OURS


@pytest.mark.parametrize("family", ["norm", "rotary"])
def test_peers_on_cuda_get_what_they_take(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for Liger's functions, by its signatures, and for the compiler."""

    def liger_rms_norm(x, weight, eps, offset, casting_mode, in_place):  # type: ignore[no-untyped-def]
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return reference.norm(x, weight, eps, "rms")

    def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):  # type: ignore[no-untyped-def]
        return tuple(reference.rotate(each, cos, sin, "half") for each in (q, k))

    stand_ins = {"liger_rms_norm": liger_rms_norm, "liger_rope": liger_rope}
    monkeypatch.setattr(norm_kernel_cases, "_on_cuda", lambda settings: True)
    monkeypatch.setattr(norm_kernel_cases, "liger_function", stand_ins.__getitem__)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    settings = KernelSettings("nano", 24, torch.device("cpu"), torch.float32, False)
    (case,) = kernel_cases([family], settings)
    row = run_comparison(case, "cpu", {}, 0.0, samples=True)
    assert set(row["samples"]) == {OURS, "eager", "liger", "torch.compile"}


def ones() -> KernelCase:
    right = torch.ones(8)
    functions = {OURS: lambda: right, "a": lambda: right, "b": lambda: right}
    return KernelCase("x", "y", tuple(functions), lambda: Comparison(functions, lambda: right, 0.0, 1.0, 1.0))


def test_only_what_is_wanted_is_timed_beside_ours() -> None:
    row = run_comparison(ones(), "cpu", {}, 0.0, ways=["b"], samples=True)
    assert set(row["samples"]) == {OURS, "b"}
    assert set(row["errors"]) == {OURS, "a", "b"}, "all are checked"
    assert set(row["ratios"]) == {"b"}
    assert "share_of_limit" not in row, "there is no share without limits"
    assert row["peaks"][OURS] == {"peak_allocated": None, "peak_reserved": None}


def test_peaks_on_a_device_are_those_beyond_what_was_there(cuda: FakeCuda) -> None:
    row = run_comparison(ones(), "cuda", {"copy_bytes_per_second": 1.0, "matmul_flops": 1.0}, 0.0)
    assert row["peaks"][OURS] == {"peak_allocated": 600, "peak_reserved": 4000}
    assert cuda.calls.index("empty_cache") < cuda.calls.index("reset_peak_memory_stats")
    assert row["share_of_limit"][OURS] == pytest.approx(1.0 / row["seconds"][OURS]["p50"])
