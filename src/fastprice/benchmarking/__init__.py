"""Benchmarks of kernels, training steps, memory and prediction beside their peers; behind `fastprice bench`.

    main(arguments)          the one front end: `fastprice bench`, and `python -m fastprice.benchmarking` where only the
                             packages that training needs are installed
    suite.run_suite(...)     all stages within a number of minutes, from a program

A result is one JSON file, `<device>-<date>-<commit>.json`, that is never overwritten. Without a GPU the same code runs
a small model, and everything it writes says CPU. docs/benchmarks.md explains what is measured and how.
"""

from __future__ import annotations

from fastprice.benchmarking.command_line import main

__all__ = ["main"]
