"""`python -m benchmarks.static [--check]`: the kernels' machine code, built without a GPU, against static.json.

Without `--check` the file is written anew, to be committed when a change of it is meant. With it, the exit status is 1
when a requirement of `fastprice_kernels.codegen` is not met or a figure got worse than the file says.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT / "kernels", ROOT / "src"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

STATIC = Path(__file__).parent / "static.json"


def main(arguments: list[str] | None = None) -> int:
    """Builds, prints and compares; returns the exit status."""
    from fastprice.benchmarking.static import drift, read_static, write_static
    from fastprice_kernels.codegen.report import main as report

    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    options = parser.parse_args(arguments)
    compiler = f"triton {version('triton')}"
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "rows.json"
        status = report(["--check", "--json", str(found)])
        rows = json.loads(found.read_text(encoding="utf-8"))
    if not options.check:
        write_static(STATIC, rows, compiler)
        print(f"written: {STATIC}")
        return status
    made_with, before = read_static(STATIC)
    worse = drift(before, rows)
    if made_with != compiler:
        worse.append(f"{STATIC.name} was made with {made_with}, this is {compiler}")
    for line in worse:
        print(f"worse: {line}", file=sys.stderr)
    if worse:
        print(f"when this is meant: python -m benchmarks.static, and commit {STATIC.name}", file=sys.stderr)
    return 1 if status or worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
