"""What the benchmarks share: the suite's own cases on this machine, and the rule by which a ratio that drops fails.

On CUDA the cases have the shapes of real models, on a CPU those of a nano, on one thread. Times are measured by the
suite (`fastprice.benchmarking`) and handed to pytest-benchmark; no test compares a time with another machine's. Ratios
of two ways that took turns in one run fail below a bound that holds on any machine, and on a drop from the committed
baseline (baseline.json) that noise does not explain.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprice.benchmarking.process_runner import ProcessRunner
from fastprice.benchmarking.pytest_recording import TIME, extra_info
from fastprice.benchmarking.suite_plan import SuitePlan
from fastprice.benchmarking.suite_run import SuiteRun
from fastprice.benchmarking.timing import Spread, interleave, ratios
from fastprice.benchmarking.worker_process import KINDS

BASELINE = Path(__file__).parent / "baseline.json"
# Ratios of unlike work differ between processors by this much (caches, vector units) without any change of code.
MACHINES = 0.35
CUDA = torch.cuda.is_available()

Record = Callable[..., None]
Hold = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-baseline", action="store_true", help="write the ratios measured now to baseline.json")


class InThisProcess(ProcessRunner):
    """Measures single cases here, which on a CPU saves the import of the libraries by each; runs in turns do not."""

    def measure(self, stage: str, case: Mapping[str, Any], *, timeout: float) -> list[dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the peers' libraries, as in a worker
            return [self.add(stage, case, {"status": "ok", **row}) for row in KINDS[case["kind"]](case)]


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> SuiteRun:
    """The suite's cases on this machine; each may take as long as it needs."""
    from fastprice.benchmarking.environment import gpu_memory_bytes

    plan = SuitePlan.full(gpu_memory_bytes()) if CUDA else SuitePlan.for_pytest_cpu()
    folder = tmp_path_factory.mktemp("benchmarks")
    runner = ProcessRunner if CUDA else InThisProcess
    return SuiteRun(runner(folder / "out", math.inf, quiet=True), plan, folder)


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
def record(benchmark: Any) -> Record:
    """`record(samples, row, group=...)`: seconds as rounds of pytest-benchmark, the row's figures as `extra_info`.

    Needs pytest.mark.benchmark(timer=TIME). More named values go into `extra_info`.
    """

    def give(samples: Sequence[float], row: Mapping[str, Any], *, group: str, **more: Any) -> None:
        benchmark.group = group
        benchmark.extra_info.update(extra_info(row, cuda=CUDA, **more))
        TIME.record(benchmark, samples)

    return give


@pytest.fixture
def hold(benchmark: Any, request: pytest.FixtureRequest) -> Hold:
    """`hold(found, at_least=...)`: fails when a ratio (peer over fastprice) dropped. On a CPU alone."""

    def check(found: Spread, *, at_least: float, name: str | None = None) -> None:
        name = name or request.node.name
        benchmark.extra_info[f"ratio {name}"] = {**found.as_dict(), "at_least": at_least}
        if CUDA:
            return
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

    return check


@pytest.fixture
def compare(record: Record, hold: Hold) -> Callable[..., None]:
    """`compare(ours, theirs, at_least=..., group=...)`: two functions in turns by processor time, and their ratio."""

    def measure(ours: Callable[[], object], theirs: Callable[[], object], *, at_least: float, group: str) -> None:
        ways = {"ours": ours, "theirs": theirs}
        samples = interleave(ways, "cpu", seconds=2.0, warmup=1, min_rounds=5, clock=time.process_time)
        record(samples["ours"], {}, group=group, clock="processor time")
        hold(ratios(samples["theirs"], samples["ours"]), at_least=at_least)

    return measure


@pytest.fixture
def ran() -> Callable[[Mapping[str, Any] | None], Mapping[str, Any]]:
    """`ran(row)`: the row of a case that ran; skips with the reason of one that cannot run here, fails for others."""

    def check(row: Mapping[str, Any] | None) -> Mapping[str, Any]:
        assert row is not None, "the model's folder could not be made"
        if row["status"] == "skipped":
            pytest.skip(str(row["reason"]))
        assert row["status"] == "ok", row.get("reason")
        return row

    return check
