"""`python -m benchmarks.gpu --minutes 9 --out DIR`: everything worth measuring on a rented GPU, in one command.

Needs no network and no installed fastprice: run it in the checkout's root with Python packages as listed in
docs/benchmarks.md. On a machine without a GPU it runs the nano model through the same code and says CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT / "kernels", ROOT / "src"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite; returns 0 when it came to its end, whatever single rows say."""
    from fastprice.benchmarking.report import short_table
    from fastprice.benchmarking.suite import STAGES, Plan, run_suite

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=9.0, help="everything ends within so many (default 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--stages", default=None, metavar="A,B", help=f"some of {','.join(STAGES)}")
    parser.add_argument("--models", default="llama-3.2-1b,llama-3.1-8b", metavar="A,B", help="the most important first")
    parser.add_argument("--tokens", default="4096,2048,8192", metavar="A,B", help="of a pack, the first most important")
    parser.add_argument("--batch", type=int, default=4, help="rows of a padded micro-batch (default 4)")
    parser.add_argument("--rank", default="16,32", metavar="A,B", help="of the adapters; the others for A tokens")
    parser.add_argument("--peers", default=None, metavar="A,B", help="of the training steps; all by default")
    parser.add_argument("--rounds", type=int, default=2, help="of all peers (default 2)")
    parser.add_argument("--commit", default=None, help="for the record, where the checkout has no .git")
    parser.add_argument("--cpu", action="store_true", help="the nano model, even where there is a GPU")
    options = parser.parse_args(arguments)

    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the workers too

    import torch

    if options.cpu or not torch.cuda.is_available():
        plan = Plan.for_cpu()
    else:
        chosen = {"peers": options.peers.split(",")} if options.peers else {}
        tokens, ranks = ([int(each) for each in text.split(",")] for text in (options.tokens, options.rank))
        plan = Plan(
            models=options.models.split(","),
            tokens=tokens[0],
            batch=options.batch,
            rank=ranks[0],
            others=[(each, ranks[0]) for each in tokens[1:]] + [(tokens[0], each) for each in ranks[1:]],
            rounds=options.rounds,
            **chosen,
        )
    path = run_suite(
        options.out,
        minutes=options.minutes,
        plan=plan,
        stages=options.stages.split(",") if options.stages else None,
        commit=options.commit,
        root=ROOT,
    )
    print(f"\n{short_table(path)}\n{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
