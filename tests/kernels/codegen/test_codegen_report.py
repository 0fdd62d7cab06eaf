"""What the machine code says of the kernels, for every GPU generation, on a machine that has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl

from fastprice_kernels.codegen import report
from fastprice_kernels.codegen.machine_code import TARGETS, CompileCase, Requirements, compile_case, unmet_requirements
from fastprice_kernels.ops import nf4_dequantize, nf4_matmul_small

# Another test run of this process's parent may have set it; Triton's compiler is what is tested here.
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces compiling")

CASES = {case.name: case for case in (*nf4_dequantize.compile_cases(), *nf4_matmul_small.compile_cases())}


@triton.jit
def _scaled_sum(x, y, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, tl.load(x + index) * 3.0 + tl.load(y + index))


@triton.jit
def _transposed(x, out, SIZE: tl.constexpr):
    """Rows are read and columns written by the same threads: through shared memory."""
    index = tl.arange(0, SIZE)
    tile = index[:, None] * SIZE + index[None, :]
    tl.store(out + tile, tl.trans(tl.load(x + tile)))


@triton.jit
def _hungry(x, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    value = tl.load(x + index[:, None] * SIZE + index[None, :])
    total = value
    for _ in range(3):
        total = total * value + tl.sum(total, axis=0)[None, :]
    tl.store(out + index[:, None] * SIZE + index[None, :], total + value)


def simple(fn: Any = _scaled_sum, size: int = 1024, **changes: Any) -> CompileCase:
    signature = {name: "*fp32" for name in fn.arg_names if name != "SIZE"}
    case = CompileCase("simple", fn, signature, {"SIZE": size}, aligned=tuple(signature), elements=size)
    return replace(case, **changes)


def test_figures_of_a_known_kernel() -> None:
    code = compile_case(simple(), 90)
    assert code.store_bits == 128
    assert code.fma == 8
    assert (code.spills, code.shared_bytes, code.shared_stores, dict(code.tensor_cores)) == (0, 0, 0, {})
    assert 0 < code.registers < 64
    assert code.instructions_per_element == pytest.approx(code.instructions / 8, abs=0.005)
    assert code.instructions == sum(code.opcodes.values())
    assert "NOP" not in code.opcodes
    assert code.opcodes["EXIT"] == 1
    assert "BRA" not in code.opcodes, "the branch to itself behind the end"


def test_every_requirement_can_fail() -> None:
    def fails(what: str, limits: Requirements, fn: Any = _scaled_sum, size: int = 1024, **changes: Any) -> bool:
        case = simple(fn, size, requirements=limits, **changes)
        messages = unmet_requirements(case, compile_case(case, 90))
        return any(what in message and "simple on sm_90" in message for message in messages)

    assert unmet_requirements(simple(), compile_case(simple(), 90)) == []
    assert fails("8 fused multiply-adds", Requirements(fma=False))
    assert not fails("fused", Requirements(fma=False), enable_fp_fusion=False)
    assert fails("no tensor-core instruction", Requirements(tensor_cores=True))
    assert fails("instructions an output element, at most 1.0", Requirements(instructions_per_element={90: 1.0}))
    assert fails("narrowest global store 32 bits, at least 128", Requirements(store_bits=128), aligned=())
    assert fails("stores to shared memory, at most 0", Requirements(shared_stores=0), _transposed, 32)
    assert fails("accesses to local memory", Requirements(), _hungry, 32, num_warps=1, maxnreg=24)


def test_cases_that_do_not_fit_their_kernel_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"unknown to the kernel \['z'\], without a type or value \['y'\]"):
        compile_case(simple(signature={"x": "*fp32", "out": "*fp32", "z": "*fp32"}, aligned=()), 90)
    with pytest.raises(RuntimeError, match="simple does not build for sm_90"):
        compile_case(simple(signature={"x": "i32", "y": "*fp32", "out": "*fp32"}, aligned=()), 90)


@pytest.mark.parametrize("target", TARGETS)
def test_dequantization_meets_its_requirements(target: int) -> None:
    """The forms that layers take; `python -m fastprice_kernels.codegen --check` does the others."""
    for name in ("dequantize_nf4/bf16/nested/even", "dequantize_nf4/fp16/nested/rows apart"):
        code = compile_case(CASES[name], target)
        assert unmet_requirements(CASES[name], code) == []
        assert (code.store_bits, code.fma, code.spills) == (128, 0, 0)
        assert code.shared_bytes == 16 * 4, "only the table"


def test_the_requirements_on_dequantization() -> None:
    limited = [name for name, case in CASES.items() if case.requirements.instructions_per_element == {90: 8.0}]
    assert {name for name in limited if "fp32" not in name} == {
        name for name in CASES if name.startswith(("dequantize_nf4/bf16", "dequantize_nf4/fp16")) and "odd" not in name
    }
    assert "dequantize_nf4/fp32/nested/even" in limited
    wider = {name for name, case in CASES.items() if case.requirements.exception}
    assert wider == {f"dequantize_nf4/fp32/{form}" for form in ("nested/tail", "nested/rows apart", "plain/rows apart")}
    assert all(CASES[name].requirements.instructions_per_element == {90: 12.0} for name in wider)
    for name in limited:
        assert CASES[name].requirements.store_bits == 128
        assert CASES[name].requirements.shared_stores == 1
        assert CASES[name].requirements.fma is False
        assert CASES[name].targets == TARGETS


def test_the_report_from_the_command_line(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    wanted = ["--only", "dequantize_nf4/bf16/nested/even", "--targets", "90", "--json", str(tmp_path / "report.json")]
    command = [sys.executable, "-m", "fastprice_kernels.codegen", "--check", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "dequantize_nf4/bf16/nested/even" in done.stdout
    assert "1 kernels, 1 builds, 0 requirements not met" in done.stdout
    [row] = json.loads((tmp_path / "report.json").read_text())
    assert (row["target"], row["store_bits"], row["unmet"]) == (90, 128, [])
    assert row["instructions_per_element"] <= 8


def test_check_fails_when_a_requirement_is_not_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = replace(
        CASES["dequantize_nf4/bf16/nested/even"], requirements=Requirements(instructions_per_element={90: 5.0})
    )

    def one_build(cases: Any, targets: Any) -> Any:
        code = compile_case(strict, 90)
        yield code, unmet_requirements(strict, code)

    monkeypatch.setattr(report, "build_all", one_build)
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert "at most 5.0 allowed" in capsys.readouterr().err


def test_a_kernel_that_does_not_build_fails_the_report_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "build_all", lambda cases, targets: [("broken", ["broken"])])
    assert report.main([]) == 1


def test_arguments_of_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--targets", "91"], "choose from 75, 80"),
        (["--only", "none such"], "no kernel name contains"),
    ):
        with pytest.raises(SystemExit):
            report.main(arguments)
        assert message in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        report.main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_an_exception_is_printed_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "build_all", lambda cases, targets: [])
    assert report.main(["--only", "fp32/nested/tail"]) == 0
    assert "exception: at most 12 instructions an element in place of 8: fp32 moves" in capsys.readouterr().out
    assert report.main(["--only", "bf16/nested/tail"]) == 0
    assert "exception" not in capsys.readouterr().out


def test_no_kernel_is_autotuned() -> None:
    """Each has one configuration, so there is nothing to search, to prune or to keep on disk."""
    cases = report.find_cases()
    assert {module for module, _ in cases} == {
        "gated_activations",
        "nf4_dequantize",
        "nf4_matmul_small",
        "norms",
        "rotary",
        "softmax_rows",
    }
    assert all(type(case.fn) is triton.runtime.JITFunction for case in cases.values())


def test_every_case_is_found_once() -> None:
    found = report.find_cases("nf4")
    assert {name for _, name in found} == set(CASES)
