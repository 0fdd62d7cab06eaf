"""Compiles a kernel to machine code on a machine without a GPU, and reads registers, spills and instructions from it.

Each module of `fastprice_kernels.ops` lists its kernels in `compile_cases() -> list[CompileCase]`: a case is one
specialization (types, constexprs, launch options) with the requirements on its machine code. `compile_case` builds it
for one target with Triton's own ptxas and disassembles it with the cuobjdump of the Triton package;
`unmet_requirements` compares. `python -m fastprice_kernels.codegen` does both for every case.

TRITON_INTERPRET must not be set when triton is imported: the interpreter replaces the compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = [
    "SHARED_LIMIT",
    "TARGETS",
    "CompileCase",
    "MachineCode",
    "Requirements",
    "compile_case",
    "unmet_requirements",
]

# Bytes of shared memory that one block may use, by compute capability (CUDA C++ programming guide, table of compute
# capabilities): Turing, A100, Ampere consumer, Ada, Hopper, Blackwell data center, Blackwell consumer.
SHARED_LIMIT = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
TARGETS = tuple(SHARED_LIMIT)

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)([^;]*)")
_MEMORY_BITS = re.compile(r"\.(8|16|32|64|128|256)\b")
_TENSOR_CORE = re.compile(r"^(HMMA|IMMA|QMMA|OMMA|HGMMA|QGMMA|IGMMA|UT\w*MMA)$")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Requirements:
    """What the machine code of a case must satisfy. In every case: no spills, and no more shared memory than there is.

    Attributes:
        store_bits: the least width of a store to global memory.
        narrow_stores: how many stores need not be so wide, such as those of one number a row.
        shared_stores: the most instructions that store to shared memory, through which layouts are converted.
        fma: False forbids fp32 fused multiply-adds, where bit-equality needs two roundings.
        tensor_cores: True requires at least one tensor-core instruction.
        instructions_per_element: the most machine instructions for one output element, by compute capability.
        exception: why a requirement is weaker than for similar cases; the report prints it.
    """

    store_bits: int | None = None
    narrow_stores: int = 0
    shared_stores: int | None = None
    fma: bool = True
    tensor_cores: bool = False
    instructions_per_element: Mapping[int, float] = field(default_factory=dict)
    exception: str = ""


@dataclass(frozen=True)
class CompileCase:
    """One specialization of a kernel.

    Attributes:
        name: shown in the report, unique; the public function first, such as "dequantize_nf4/bf16/nested".
        fn: the `@triton.jit` function.
        signature: Triton's type of each run-time argument ("*bf16", "*u8", "i32", "i64", "fp32").
        constexprs: the value of each `tl.constexpr` argument.
        aligned: run-time arguments that are divisible by 16 (torch's allocations are; integers where they are).
        num_warps, num_stages, enable_fp_fusion, maxnreg: launch options, as the launcher passes them.
        elements: output elements that one program writes; None where a loop makes the count meaningless.
        targets: compute capabilities to build for.
        requirements: what the machine code must satisfy.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True
    maxnreg: int | None = None
    elements: int | None = None
    targets: tuple[int, ...] = TARGETS
    requirements: Requirements = field(default_factory=Requirements)


@dataclass(frozen=True)
class MachineCode:
    """Figures of the machine code of one case for one target.

    `spills` counts instructions that access thread-local memory (LDL, STL), `store_bits` is the width of the narrowest
    store to global memory apart from the case's `narrow_stores` (None where there is none), `shared_bytes` the shared
    memory of one block, `shared_stores` the instructions that write it, `layout_changes` the `convert_layout`s left in
    Triton's IR, `fma` the FFMA instructions, `tensor_cores` the matrix instructions by name, `instructions` all
    instructions except padding.
    """

    case: str
    target: int
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    shared_stores: int
    layout_changes: int
    store_bits: int | None
    fma: int
    tensor_cores: Mapping[str, int]
    instructions: int
    instructions_per_element: float | None
    opcodes: Mapping[str, int]


def compile_case(case: CompileCase, target: int) -> MachineCode:
    """Builds `case` for compute capability `target` and reads the result. Triton's own cache makes a repeat cheap.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, or the code cannot be built or disassembled.
    """
    if not isinstance(case.fn, triton.runtime.JITFunction):
        raise RuntimeError(
            f"{case.name}: {case.fn!r} is not a compiled kernel; unset TRITON_INTERPRET before the import"
        )
    names = case.fn.arg_names
    unknown = [name for name in (*case.signature, *case.constexprs, *case.aligned) if name not in names]
    missing = [name for name in names if name not in case.signature and name not in case.constexprs]
    if unknown or missing:
        raise RuntimeError(f"{case.name}: arguments unknown to the kernel {unknown}, without a type or value {missing}")
    source = ASTSource(
        fn=case.fn,
        signature={name: "constexpr" if name in case.constexprs else case.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options: dict[str, Any] = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.enable_fp_fusion,
    }
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    try:
        built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:  # Triton raises many types; the report needs the name of the case.
        raise RuntimeError(f"{case.name} does not build for sm_{target}: {error}") from error
    return _read(case, target, _disassemble(built.asm["cubin"]), built.asm["ttgir"], built.metadata.shared)


def unmet_requirements(case: CompileCase, code: MachineCode) -> list[str]:
    """The requirements of `case` that `code` does not meet, each in words with both figures."""
    limits, unmet = case.requirements, []
    if code.spills or code.stack_bytes:
        unmet.append(f"{code.spills} accesses to local memory and {code.stack_bytes} bytes of stack, 0 allowed")
    if code.shared_bytes > SHARED_LIMIT[code.target]:
        unmet.append(f"{code.shared_bytes} bytes of shared memory, at most {SHARED_LIMIT[code.target]} allowed")
    if limits.store_bits is not None and (code.store_bits is None or code.store_bits < limits.store_bits):
        unmet.append(f"narrowest global store {code.store_bits} bits, at least {limits.store_bits} required")
    if limits.shared_stores is not None and code.shared_stores > limits.shared_stores:
        unmet.append(f"{code.shared_stores} stores to shared memory, at most {limits.shared_stores} allowed")
    if not limits.fma and code.fma:
        unmet.append(f"{code.fma} fused multiply-adds, 0 allowed")
    if limits.tensor_cores and not code.tensor_cores:
        unmet.append("no tensor-core instruction")
    limit = limits.instructions_per_element.get(code.target)
    if limit is not None and (code.instructions_per_element is None or code.instructions_per_element > limit):
        unmet.append(f"{code.instructions_per_element} instructions an output element, at most {limit} allowed")
    return [f"{code.case} on sm_{code.target}: {what}" for what in unmet]


def _disassemble(cubin: bytes) -> str:
    """The resource usage and the disassembly of one binary, as cuobjdump prints them: most of a build's time."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [str(cuobjdump), "-res-usage", "-sass", str(binary)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read(case: CompileCase, target: int, printed: str, ttgir: str, dynamic_shared: int) -> MachineCode:
    registers = _USAGE.search(printed)
    if registers is None:
        raise RuntimeError(f"{case.name} on sm_{target}: cuobjdump printed no resource usage: {printed[:200]!r}")
    opcodes: Counter[str] = Counter()
    store_bits: list[int] = []
    for line in printed.splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        address, opcode, rest = found.groups()
        base = opcode.split(".")[0]
        # The code is padded with NOPs and ends in a branch to itself; neither is executed.
        if base == "NOP" or (base == "BRA" and rest.split("`")[-1].strip() == f"0x{address.lstrip('0')}"):
            continue
        opcodes[base] += 1
        if base == "STG":
            width = _MEMORY_BITS.search(opcode)
            store_bits.append(int(width[1]) if width else 8 if re.search(r"\.[US]8\b", opcode) else 32)
    if not opcodes["EXIT"]:
        raise RuntimeError(f"{case.name} on sm_{target}: no instructions found in the disassembly")
    count = opcodes.total()
    elements = case.elements
    return MachineCode(
        case=case.name,
        target=target,
        registers=int(registers[1]),
        stack_bytes=int(registers[2]),
        spills=opcodes["LDL"] + opcodes["STL"],
        shared_bytes=dynamic_shared,
        shared_stores=opcodes["STS"] + opcodes["STSM"],
        layout_changes=ttgir.count("ttg.convert_layout"),
        store_bits=next(iter(sorted(store_bits)[case.requirements.narrow_stores :]), None),
        fma=opcodes["FFMA"] + opcodes["FFMA2"],
        tensor_cores={name: n for name, n in opcodes.items() if _TENSOR_CORE.match(name)},
        instructions=count,
        instructions_per_element=None if elements is None else round(count * 32 * case.num_warps / elements, 2),
        opcodes=dict(opcodes),
    )
