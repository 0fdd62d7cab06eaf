"""What the ratio benchmarks share: a small model, one thread, and the rule by which a drop fails.

Machines that run CI are slow, shared and different, so no time is compared with another machine's: each benchmark takes
the ratio of two ways to do one thing, which take turns in this process, by processor time. It fails below a bound that
holds on any machine, and on a drop from the committed baseline (baseline.json) that noise does not explain.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprice.benchmarking.timing import interleave, ratios

BASELINE = Path(__file__).parent / "baseline.json"
# Ratios of unlike work differ between processors by this much (caches, vector units) without any change of code.
MACHINES = 0.35

Ratio = Callable[..., float]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-baseline", action="store_true", help="write the ratios measured now to baseline.json")


@pytest.fixture(scope="session")
def model() -> Any:
    """A small model with random NF4 weights, in fp32 on the CPU."""
    from fastprice.benchmarking.random_models import model_config, random_nf4_model

    return random_nf4_model(model_config("nano"), "cpu", torch.float32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ratio(benchmark: Any, request: pytest.FixtureRequest) -> Ratio:
    """`ratio(ours, theirs, at_least=...)`: the processor time of `theirs` over that of `ours`; fails on a drop."""

    def measure(ours: Callable[[], object], theirs: Callable[[], object], *, at_least: float) -> float:
        name = request.node.name
        samples = interleave(
            {"ours": ours, "theirs": theirs}, "cpu", seconds=3.0, warmup=1, min_rounds=5, clock=time.process_time
        )
        found = ratios(samples["theirs"], samples["ours"])
        benchmark.extra_info.update(ratio=found.as_dict(), at_least=at_least)
        benchmark.pedantic(ours, rounds=1)
        known = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
        if request.config.getoption("--write-baseline"):
            known[name] = {"p50": round(found.p50, 3), "noise": round(found.noise, 3)}
            BASELINE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        assert found.p50 >= at_least, f"{name}: {found.p50:.2f}x, at least {at_least}x holds on any machine"
        assert name in known, (
            f"{name} has no baseline: run pytest benchmarks --write-baseline and commit {BASELINE.name}"
        )
        allowed = MACHINES + known[name]["noise"] / 2 + found.noise / 2
        floor = known[name]["p50"] / (1 + allowed)
        assert found.p50 >= floor, (
            f"{name}: {found.p50:.2f}x, the baseline is {known[name]['p50']}x, noise {allowed:.0%}"
        )
        return found.p50

    return measure
