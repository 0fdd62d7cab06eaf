"""What the kernels' machine code says without a GPU: figures of the compiler, never of a clock.

`python -m benchmarks.static` builds every kernel for every GPU generation (`fastprice_kernels.codegen`) and keeps the
figures in benchmarks/static.json; with `--check` it compares the present build with that file and the requirements.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprice.errors import DataError

__all__ = ["drift", "read_static", "static_table", "write_static"]

# A figure that the compiler counts does not vary by itself; this leaves room for changes that do not matter.
_TOLERANCE = 0.03
_SLACK = {"instructions_per_element": 0.0, "registers": 4.0, "spills": 0.0, "shared_bytes": 64.0}
_KEPT = ("case", "target", "registers", "spills", "shared_bytes", "store_bits", "instructions_per_element")

Row = Mapping[str, Any]


def write_static(path: Path, rows: Iterable[Row], compiler: str) -> None:
    """Keeps the rows of `python -m fastprice_kernels.codegen --json`, one a line; `compiler` names what made them."""
    lines = [json.dumps({name: row[name] for name in _KEPT} | {"tensor_cores": row["tensor_cores"]}) for row in rows]
    path.write_text(f'{{"compiler": {json.dumps(compiler)}, "rows": [\n' + ",\n".join(lines) + "\n]}\n", "utf-8")


def read_static(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """(compiler, rows) of a file that `write_static` made; DataError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return str(content["compiler"]), list(content["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no static figures ({error}): python -m benchmarks.static") from error


def drift(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """What got worse, or is not known yet, a line each: instructions an element, registers, spills, shared memory."""
    known = {(row["case"], row["target"]): row for row in before}
    told = []
    for row in after:
        old = known.get((row["case"], row["target"]))
        what = f"{row['case']} on sm_{row['target']}"
        if old is None:
            told.append(f"{what} has no figures yet")
            continue
        for name, slack in _SLACK.items():
            was, now = old[name] or 0, row[name] or 0
            if now > was * (1 + _TOLERANCE) + slack:
                told.append(f"{what}: {name.replace('_', ' ')} {was:g} before, {now:g} now")
    return told


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
        alike = [each for each in rows if each["case"] == row["case"]]
        each = row["instructions_per_element"]
        lines.append(
            f"| {row['case']} | {'-' if each is None else f'{each:.2f}'} | {row['store_bits'] or '-'} | "
            f"{row['shared_bytes']:,} | {', '.join(row['tensor_cores']) or '-'} | "
            f"{max(other['registers'] for other in alike)} | {max(other['spills'] for other in alike)} |"
        )
    return "\n".join(lines)
