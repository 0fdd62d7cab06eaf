"""Builds every kernel for every GPU generation, on any machine, and prints figures of its machine code.

    python -m fastprice_kernels.codegen [--check] [--json FILE] [--only TEXT] [--targets 80,90]

One row for each kernel and target: registers of a thread, spills (instructions that access thread-local memory), bytes
of shared memory of a block, width in bits of the narrowest store to global memory, tensor-core instructions,
instructions for one output element; then the exceptions from the requirements, with their reasons. With `--check` the
exit status is 1 when a requirement is not met; it is always 1 when a kernel does not build.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from pkgutil import iter_modules

from fastprice_kernels.codegen.machine_code import TARGETS, CompileCase, MachineCode, compile_case, unmet_requirements

__all__ = ["main"]

_PROCESSES = 2
_ROW = "{:<44} {:>4} {:>5} {:>6} {:>7} {:>6} {:>12} {:>7}"


def find_cases(only: str = "") -> dict[tuple[str, str], CompileCase]:
    """The cases whose name contains `only`, from every module of `ops` with `compile_cases`, by module and name.

    Raises:
        RuntimeError: two cases of a module share a name.
    """
    cases: dict[tuple[str, str], CompileCase] = {}
    for found in iter_modules([str(Path(__file__).parents[1] / "ops")]):
        module = import_module(f"fastprice_kernels.ops.{found.name}")
        for case in module.compile_cases() if hasattr(module, "compile_cases") else ():
            key = (found.name, case.name)
            if key in cases:
                raise RuntimeError(f"{found.name}.compile_cases() gives two cases named {case.name!r}")
            if only in case.name:
                cases[key] = case
    return cases


def build(module: str, name: str, target: int) -> tuple[MachineCode | str, list[str]]:
    """The machine code of one case and its unmet requirements; the error in place of both where it does not build.

    Runs in a worker process, and imports the kernel there: kernels cannot be pickled.
    """
    cases = {case.name: case for case in import_module(f"fastprice_kernels.ops.{module}").compile_cases()}
    try:
        code = compile_case(cases[name], target)
    except RuntimeError as error:
        return str(error), [str(error)]
    return code, unmet_requirements(cases[name], code)


def build_all(
    cases: dict[tuple[str, str], CompileCase], targets: Sequence[int]
) -> Iterator[tuple[MachineCode | str, list[str]]]:
    """`build` for every case and every one of `targets` that the case has, in order, two at a time."""
    work = [(module, name, target) for (module, name), case in cases.items() for target in targets]
    work = [(module, name, target) for module, name, target in work if target in cases[module, name].targets]
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        yield from pool.map(build, *zip(*work, strict=True), chunksize=4) if work else ()


def format_row(code: MachineCode) -> str:
    """One line of the table."""
    tensor = "+".join(f"{count} {name}" for name, count in code.tensor_cores.items()) or "-"
    each = "-" if code.instructions_per_element is None else f"{code.instructions_per_element:.2f}"
    return _ROW.format(
        code.case, code.target, code.registers, code.spills, code.shared_bytes, code.store_bits or "-", tensor, each
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastprice_kernels.codegen", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="exit with 1 when a requirement is not met")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to a JSON file as well")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name contains TEXT")
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="compute capabilities, comma-separated")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, which replaces the compiler by an interpreter; unset it")
    targets = [int(text) for text in options.targets.split(",") if text.isdecimal()]
    if not targets or not set(targets) <= set(TARGETS):
        parser.error(f"--targets {options.targets}: choose from {', '.join(map(str, TARGETS))}")
    cases = find_cases(options.only)
    if not cases:
        parser.error(f"--only {options.only}: no kernel name contains it")

    print(_ROW.format("kernel", "sm", "regs", "spills", "shared", "store", "tensor cores", "instr"))
    rows, unmet, broken = [], [], False
    for code, messages in build_all(cases, targets):
        unmet += messages
        if isinstance(code, str):
            broken = True
            print(code, flush=True)
        else:
            print(format_row(code), flush=True)
            rows.append({**asdict(code), "unmet": messages})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for reason in dict.fromkeys(case.requirements.exception for case in cases.values() if case.requirements.exception):
        names = [case.name for case in cases.values() if case.requirements.exception == reason]
        print(f"exception: {reason} ({', '.join(names)})")
    for message in unmet:
        print(f"not met: {message}", file=sys.stderr)
    print(f"{len(cases)} kernels, {len(rows)} builds, {len(unmet)} requirements not met")
    return 1 if broken or (options.check and unmet) else 0
