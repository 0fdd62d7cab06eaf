"""What the kernels' machine code says without a GPU: figures of the compiler, not of a clock.

`fastprice bench static` compiles every kernel for every GPU generation (`fastprice_kernels.codegen`) and writes the
figures to a file that is committed; with `--check` it compares what is compiled now with that file.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastprice.errors import DataError

__all__ = ["check_static", "read_static", "regressions", "static_table", "update_static", "write_static"]

# The compiler's figures do not vary from run to run; this leaves room for changes that do not matter.
_TOLERANCE = 0.03
_ALLOWANCE = {"instructions_per_element": 0.0, "registers": 4.0, "spills": 0.0, "shared_bytes": 64.0}
_FIELDS = (
    "case", "target", "registers", "spills", "shared_bytes", "store_bits", "instructions_per_element", "tensor_cores",
)  # fmt: skip

Row = Mapping[str, Any]


def update_static(path: Path) -> int:
    """Compiles all kernels and writes their figures to `path`; the exit status, 1 for a requirement not met."""
    status, rows, compiler = _compile()
    write_static(path, rows, compiler)
    print(f"written: {path}")
    return status


def check_static(path: Path) -> int:
    """Compiles all kernels; the exit status, 1 when a requirement is not met or a figure is worse than in `path`.

    Raises DataError where `path` holds no static figures.
    """
    compiler_before, before = read_static(path)
    status, rows, compiler = _compile()
    worse = regressions(before, rows)
    if compiler_before != compiler:
        worse.append(f"{path} was made with {compiler_before}, this is {compiler}")
    for line in worse:
        print(f"worse: {line}", file=sys.stderr)
    if worse:
        print(f"if this is intended: fastprice bench static {path}, and commit the file", file=sys.stderr)
    return 1 if status or worse else 0


def write_static(path: Path, rows: Iterable[Row], compiler: str) -> None:
    """Writes the rows of `python -m fastprice_kernels.codegen --json`, one a line; `compiler` names what made them."""
    lines = [json.dumps({name: row[name] for name in _FIELDS}) for row in rows]
    path.write_text(f'{{"compiler": {json.dumps(compiler)}, "rows": [\n' + ",\n".join(lines) + "\n]}\n", "utf-8")


def read_static(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """(compiler, rows) of a file that `write_static` made; DataError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return str(content["compiler"]), list(content["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no static figures ({error}); make it with: fastprice bench static") from error


def regressions(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """What got worse, or is new, a line each: instructions an element, registers, spills, shared memory."""
    known = {(row["case"], row["target"]): row for row in before}
    found = []
    for row in after:
        old = known.get((row["case"], row["target"]))
        what = f"{row['case']} on sm_{row['target']}"
        if old is None:
            found.append(f"{what} has no figures yet")
            continue
        for name, allowance in _ALLOWANCE.items():
            was, now = old[name] or 0, row[name] or 0
            if now > was * (1 + _TOLERANCE) + allowance:
                found.append(f"{what}: {name.replace('_', ' ')} {was:g} before, {now:g} now")
    return found


def static_table(rows: Sequence[Row], target: int = 90) -> str:
    """Markdown: each kernel's figures on `target`, and its most registers and spills over all GPU generations."""
    lines = [
        f"| kernel | instructions an element (sm_{target}) | store, bits | shared, bytes | tensor cores "
        "| registers (most) | spills (most) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["target"] != target:
            continue
        builds = [each for each in rows if each["case"] == row["case"]]
        count = row["instructions_per_element"]
        lines.append(
            f"| {row['case']} | {'-' if count is None else f'{count:.2f}'} | {row['store_bits'] or '-'} | "
            f"{row['shared_bytes']:,} | {', '.join(row['tensor_cores']) or '-'} | "
            f"{max(build['registers'] for build in builds)} | {max(build['spills'] for build in builds)} |"
        )
    return "\n".join(lines)


def _compile() -> tuple[int, list[dict[str, Any]], str]:
    """(exit status of the report, its rows, the compiler) for every kernel and GPU generation."""
    from fastprice_kernels.codegen.report import main as report

    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "rows.json"
        status = report(["--check", "--json", str(found)])
        return status, json.loads(found.read_text(encoding="utf-8")), f"triton {version('triton')}"
