"""`python -m fastprice.benchmarking`: see command_line.py."""

from __future__ import annotations

import sys

from fastprice.benchmarking.command_line import main
from fastprice.errors import FastpriceError

if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:], prog="python -m fastprice.benchmarking"))
    except FastpriceError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
