"""The whole measurement of a machine: stages, the most important first, within a number of minutes.

A stage that fails leaves rows that say so, and the next one runs. Nothing needs a network.
"""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fastprice.benchmarking.offloaded_training import offload_cap
from fastprice.benchmarking.peers import HEADLINE, LOADING_WAYS, RUN_PEERS
from fastprice.benchmarking.process_runner import ProcessRunner
from fastprice.benchmarking.pytest_run import outcome_row, pytest_command
from fastprice.benchmarking.reporting.summaries import ok_rows
from fastprice.benchmarking.suite_plan import SuitePlan
from fastprice.benchmarking.suite_run import START, SuiteRun
from fastprice.benchmarking.workload import GIB, MODELS, dequantize_shapes, folder_bytes, linear_weights, shape_of
from fastprice.errors import ConfigError, nearest_name

__all__ = ["STAGES", "Stage", "largest_multiple", "run_suite"]


def run_suite(
    out: Path,
    *,
    minutes: float,
    plan: SuitePlan,
    stages: Sequence[str] | None = None,
    tests: Sequence[Sequence[str]] = (),
    commit: str | None = None,
    quiet: bool = False,
) -> Path:
    """Runs `stages` (all of them by default, in the order of `STAGES`) and returns the result file in `out`.

    tests    arguments of runs of pytest, before the stages, together for at most a third of the time
    commit   for the record, where there is no git
    quiet    print no line a row

    Raises ConfigError that names every unknown stage.
    """
    chosen = list(STAGES) if stages is None else list(stages)
    unknown = [stage for stage in chosen if stage not in STAGES]
    if unknown:
        known = ", ".join(STAGES)
        errors = [f"stage: {name!r} is not one of {known}{nearest_name(name, STAGES)}" for name in unknown]
        raise ConfigError("; ".join(errors))
    runner = ProcessRunner(out, minutes, quiet=quiet)
    with tempfile.TemporaryDirectory(prefix="fastprice-bench-", dir=_roomy_folder()) as scratch:
        run = SuiteRun(runner, plan, Path(scratch))
        _describe_machine(run, commit)
        for arguments in tests:
            status, output = runner.call("tests", pytest_command(arguments), timeout=20 * minutes / len(tests))
            runner.add("tests", {"kind": "tests", "arguments": list(arguments)}, outcome_row(status, output))
        for stage in STAGES:
            if stage in chosen:
                STAGES[stage].run(run)
    runner.write()
    assert runner.path is not None
    return runner.path


def _describe_machine(run: SuiteRun, commit: str | None) -> None:
    """Always first: every figure needs its machine. A worker does it, so that this process takes no GPU memory."""
    case = {"kind": "environment", "commit": commit, "seconds": 2.0 if run.plan.gpu else 0.3}
    rows = run.measure("machine", case, timeout=120)
    found = next((row for row in rows if "environment" in row), None)
    if found is None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        kind = "gpu" if run.plan.gpu else "cpu"
        run.runner.environment = {"kind": kind, "device": "unknown", "time": now, "commit": commit or "unknown"}
    else:
        run.runner.environment = {**found["environment"], "warnings": found["warnings"]}
    run.runner.limits = next((row["limits"] for row in rows if "limits" in row), {})
    run.runner.write()


def _kernels(run: SuiteRun) -> None:
    if not run.runner.limits:
        reason = "the machine's limits could not be measured"
        run.runner.add("kernels", {"kind": "kernels"}, {"status": "skipped", "reason": reason})
        return
    plan = run.plan
    case = {
        "kind": "kernels",
        # Layers of an 8B fill any card without filling its memory.
        "model": "llama-3.1-8b" if plan.gpu else "nano",
        "tokens": plan.tokens if plan.gpu else 64,
        "seconds": plan.kernel_seconds,
        "limits": run.runner.limits,
    }
    first, *others = plan.kernel_families
    run.measure("kernels", {**case, "families": [first], "unsloth": False}, timeout=90)
    if plan.gpu and first == "dequantize":
        rate = run.runner.limits["copy_bytes_per_second"]
        shapes = {"kind": "bandwidth", "shapes": dequantize_shapes(), "copy_bytes_per_second": rate}
        run.measure("kernels", shapes, timeout=60)
    if plan.gpu:
        # In a process of its own: importing Unsloth replaces functions that the stock rows call.
        with_unsloth = [first, "lora_linear"] if others else [first]
        run.measure("kernels", {**case, "families": with_unsloth, "unsloth": True}, timeout=120)
    if others:
        run.measure("kernels", {**case, "families": others, "unsloth": False}, timeout=150)


def _headline(run: SuiteRun) -> None:
    """The first model through fastprice, tuned Unsloth and packed TRL, all rounds, before anything else is measured."""
    _rounds(run, "headline", [run.plan.models[0]], [peer for peer in HEADLINE if peer in run.plan.peers])


def _unsloth(run: SuiteRun) -> None:
    """To know early what works: does it load, does it train."""
    model = "qwen2.5-0.5b" if run.plan.gpu else "nano"
    for peer in ("unsloth", "unsloth-kernels"):
        run.step("unsloth", peer, model, tokens=min(2048, run.plan.tokens), steps=4)


def _steps(run: SuiteRun) -> None:
    """All models and peers, but for those that the headline has; then packs of other sizes and other ranks."""
    plan = run.plan
    _rounds(run, "steps", plan.models, plan.peers)
    for tokens, rank in plan.variants:
        _rounds(run, "steps", plan.models, plan.peers, tokens=tokens, rank=rank)


def _rounds(run: SuiteRun, stage: str, models: Sequence[str], peers: Sequence[str], **changes: int) -> None:
    """Round after round over models and peers, so that a peer's runs lie apart in time (A, B, A, B).

    What the headline measured, or could not, is not measured again, and what fails is not tried again.
    """
    plan = run.plan
    sizes = {"tokens": plan.tokens, "rank": plan.rank, **changes}
    done = {
        (row["case"]["model"], row["case"]["peer"])
        for row in run.runner.rows
        if row["stage"] == "headline" and {name: row["case"][name] for name in sizes} == sizes
    }
    for _ in range(plan.rounds):
        for model, peer in product(models, peers):
            if (model, peer) in done or run.runner.seconds_left < START + plan.step_seconds:
                continue
            row = run.step(stage, peer, model, **sizes)
            if row is None or row["status"] != "ok":
                done.add((model, peer))


def _memory(run: SuiteRun) -> None:
    rows = [row for row in ok_rows(run.runner.rows, "step") if row["stage"] != "fit"]
    measured = {(row["case"]["model"], row["case"]["tokens"], row["case"]["rank"], row["peer"]): row for row in rows}
    steps = [
        {
            "model": model,
            "peer": peer,
            "tokens": row["tokens_per_step"],
            "texts": row["texts_per_step"],
            "rank": row["case"]["rank"],
            "labeled": row["labeled_share"],
            "recompute": row["recompute"],
            "peak_reserved": row["peak_reserved"],
            "peak_allocated": row["peak_allocated"],
        }
        for (model, _, _, peer), row in measured.items()
    ]
    if not steps:
        reason = "no training step was measured"
        run.runner.add("memory", {"kind": "estimate"}, {"status": "skipped", "reason": reason})
        return
    run.measure("memory", {"kind": "estimate", "steps": steps}, timeout=90)


def _runs(run: SuiteRun) -> None:
    run.training_runs([peer for peer in RUN_PEERS if peer in run.plan.peers])


def _load(run: SuiteRun) -> None:
    for way in LOADING_WAYS:
        run.loading(way)


def _predict(run: SuiteRun) -> None:
    model = run.plan.smallest
    folder = run.folder(model)
    if folder is not None:
        items, batch = (512, 64) if run.plan.gpu else (16, 8)
        seconds = 15.0 if run.plan.gpu else 1.0
        case = {"kind": "predict", "model": model, "folder": folder, "items": items, "batch": batch, "seconds": seconds}
        run.measure("predict", case, timeout=2 * START + 4 * seconds)


def _offload(run: SuiteRun) -> None:
    """The largest model, with all weights on the device and then with most layers offloaded, on the same work."""
    plan, model = run.plan, run.plan.largest
    folder = run.folder(model)
    if folder is None:
        return
    if run.runner.seconds_left < START:
        skipped: dict[str, Any] = {"kind": "offload", "model": model}
        run.runner.add("offload", skipped, {"status": "skipped", "reason": "no time was left"})
        return
    cap = offload_cap(model, tokens=plan.tokens, rank=plan.rank, kernels=plan.gpu)
    for cap_bytes in (0, cap):
        case = {"kind": "offload", "model": model, "folder": folder, "cap_bytes": cap_bytes, "tokens": plan.tokens}
        run.measure("offload", {**case, "rank": plan.rank}, timeout=3 * START + 60)


def _fit(run: SuiteRun) -> None:
    plan, runner = run.plan, run.runner
    for cap in plan.memory_caps:
        for peer in ("peft", "unsloth", "trl-packed"):
            case = {"kind": "fit", "peer": peer, "model": plan.smallest, "cap_bytes": cap * GIB}
            if runner.seconds_left < 3 * START:
                runner.add("fit", case, {"status": "skipped", "reason": "no time was left"})
                return
            tokens = _largest_micro_batch(run, peer, cap)
            note = {} if runner.seconds_left > 0 else {"status": "failed", "reason": "time ran out while searching"}
            runner.add("fit", case, {"status": "ok", "largest_tokens": tokens, **note})
        model = _largest_model(run, cap)
        if model is not None:
            case = {"kind": "fit", "peer": "peft", "cap_bytes": cap * GIB}
            runner.add("fit", case, {"status": "ok", "largest_model": model})


def _largest_micro_batch(run: SuiteRun, peer: str, cap: int) -> int:
    """The tokens of the largest micro-batch of the first model that `peer` trains in `cap` GiB; 0 for none."""

    def fits(tokens: int) -> bool:
        batch = max(1, tokens // 140)
        changes = {"tokens": tokens, "batch": batch, "steps": 2, "cap_bytes": cap * GIB}
        row = run.step("fit", peer, run.plan.smallest, **changes)
        return row is not None and row["status"] == "ok"

    return largest_multiple(fits, 1024, 65536)


def _largest_model(run: SuiteRun, cap: int) -> str | None:
    """The largest model that fastprice trains in `cap` GiB on packs of 2,048 tokens; None for none."""
    by_size = sorted(MODELS, key=lambda name: linear_weights(shape_of(name)), reverse=True)
    for model in by_size:
        if folder_bytes(model) < cap * GIB:
            row = run.step("fit", "peft", model, tokens=2048, steps=2, cap_bytes=cap * GIB)
            if row is not None and row["status"] == "ok":
                return model
    return None


def largest_multiple(fits: Callable[[int], bool], unit: int, most: int) -> int:
    """The largest multiple of `unit`, up to `most`, for which `fits` holds, if it holds up to some size; 0 for none.

    Doubles, then halves the gap: at most 2 log2(most / unit) calls.
    """
    good, bad = 0, most // unit + 1
    size = 1
    while size < bad and fits(size * unit):
        good, size = size, size * 2
    bad = min(bad, size)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle * unit):
            good = middle
        else:
            bad = middle
    return good * unit


def _roomy_folder() -> str | None:
    """Memory-backed storage where there is plenty: models are written and read as fast as memory allows."""
    shared = "/dev/shm"
    if os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 16 * GIB:
        return shared
    return None


@dataclass(frozen=True)
class Stage:
    """A part of the suite; description: its help text."""

    description: str
    run: Callable[[SuiteRun], None]


# In the order in which they run, the most important first.
STAGES: Mapping[str, Stage] = {
    "headline": Stage("training steps of the first model: fastprice, tuned Unsloth, packed TRL", _headline),
    "kernels": Stage("every kernel beside its peers", _kernels),
    "unsloth": Stage("a few steps of a small model through Unsloth, and through fastprice on it", _unsloth),
    "steps": Stage("training steps of all peers, round after round", _steps),
    "memory": Stage("the memory estimate beside the peaks of the steps", _memory),
    "runs": Stage("whole training runs, from the first text to the last", _runs),
    "load": Stage("loading the first model", _load),
    "predict": Stage("prices a second, beside generate and a regular expression", _predict),
    "offload": Stage("training with all weights on the device, and with most layers offloaded", _offload),
    "fit": Stage("the largest micro-batch and the largest model under memory caps", _fit),
}
