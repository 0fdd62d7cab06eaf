"""The whole measurement of a machine, in stages, the most important first, ending in time.

    machine    what it is, what it reaches at most
    tests      the GPU tests and the kernel tests, where the checkout has them
    kernels    every kernel beside its peers
    unsloth    a small model through the Unsloth engine: does it load, does it train
    steps      training steps of all peers, round after round
    memory     the memory estimate beside the peaks that the steps had
    predict    prices a second
    stream     training with all weights on the device, and under a memory cap with weights from the host
    fit        the largest micro-batch and the largest model under memory caps

A stage that fails leaves rows that say so, and the next one runs. Nothing needs a network.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from fastprice.benchmarking.analysis import ok_rows
from fastprice.benchmarking.cases import MODELS, NF4_BYTES, shape_of
from fastprice.benchmarking.memory import largest, streaming_cap
from fastprice.benchmarking.runner import Runner
from fastprice.errors import ConfigError, nearest_name

__all__ = ["STAGES", "Plan", "run_suite"]

GIB = 2**30
_ORDER = ("peft", "unsloth-tuned", "trl-packed", "unsloth", "unsloth-kernels", "peft-graphs", "peft-off", "trl-padded")
_OUTCOME = re.compile(r"::.* (PASSED|FAILED|SKIPPED|ERROR|XFAIL)\b")
# Folder, what of it, seconds. Reading machine code needs no GPU and takes minutes; the interpreter needs none either.
_TEST_FOLDERS: tuple[tuple[str, list[str], float], ...] = (
    ("tests/gpu", ["-m", "not slow"], 180.0),
    ("tests/kernels", ["-m", "not interpreter and not slow", "-k", "not codegen and not machine_code"], 60.0),
)
_START = 25.0  # seconds for a worker to import its libraries on a machine that does little else


@dataclass(frozen=True)
class Plan:
    """What to measure.

    models: names of `cases.MODELS`, the most important first; tokens: of a pack; batch: rows of a padded micro-batch;
    rank: of the adapters; others: further pairs of (tokens, rank) to train with, when all rounds of the first are done;
    steps: timed steps a run, at most `step_seconds` long; rounds: of all peers over all models; kernel_seconds: timing
    of one kernel case; caps: GPU sizes to pretend (GiB); peers: of peers.PEERS, the most important first; families: of
    kernel_cases.FAMILIES; cuda: whether there is a GPU; patience: by how much longer than on a machine of its own a
    worker may take to start and to run.
    """

    models: Sequence[str]
    tokens: int = 4096
    batch: int = 4
    rank: int = 16
    others: Sequence[tuple[int, int]] = ()
    steps: int = 20
    step_seconds: float = 10.0
    rounds: int = 2
    kernel_seconds: float = 0.5
    caps: Sequence[int] = (8, 12, 16, 24, 48)
    peers: Sequence[str] = _ORDER
    families: Sequence[str] = ("dequantize", "lora_mlp", "lora_linear", "loss_head", "small_matmul")
    cuda: bool = True
    patience: float = 1.0

    @classmethod
    def quick(cls, memory_bytes: int) -> Plan:
        """What three minutes allow on a card with so much memory: one model, three peers, a few kernel cases."""
        return cls(
            models=("llama-3.2-1b" if memory_bytes >= 6 * GIB else "qwen2.5-0.5b",),
            tokens=4096 if memory_bytes >= 12 * GIB else 2048,
            steps=12,
            step_seconds=6.0,
            rounds=2,
            kernel_seconds=0.2,
            caps=(),
            peers=("peft", "unsloth-tuned", "trl-packed"),
            families=("dequantize", "loss_head"),
        )

    @classmethod
    def for_cpu(cls) -> Plan:
        """The same stages with the nano model: the code is exercised, the figures are a CPU's."""
        return cls(
            models=("nano",),
            tokens=512,
            batch=2,
            steps=3,
            step_seconds=5.0,
            rounds=1,
            kernel_seconds=0.1,
            caps=(),
            peers=("peft", "trl-packed", "unsloth", "peft-off"),
            cuda=False,
            patience=5.0,
        )


def run_suite(
    out: Path,
    *,
    minutes: float,
    plan: Plan,
    stages: Sequence[str] | None = None,
    commit: str | None = None,
    root: Path | None = None,
    quiet: bool = False,
) -> Path:
    """Runs `stages` (all of them by default, in the order of `STAGES`) and returns the result file in `out`.

    root: the checkout with the tests, None to leave them out; commit: for the record, where there is no git. Raises
    ConfigError for an unknown stage.
    """
    chosen = list(STAGES) if stages is None else list(stages)
    for stage in chosen:
        if stage not in STAGES:
            raise ConfigError(f"stage: {stage!r} is not one of {', '.join(STAGES)}{nearest_name(stage, STAGES)}")
    runner = Runner(out, minutes, quiet=quiet)
    with tempfile.TemporaryDirectory(prefix="fastprice-bench-", dir=_roomy_folder()) as scratch:
        run = _Run(runner, plan, Path(scratch), root)
        _machine(run, commit)
        for stage in STAGES:
            if stage in chosen:
                STAGES[stage](run)
    runner.write()
    assert runner.path is not None
    return runner.path


@dataclass
class _Run:
    runner: Runner
    plan: Plan
    scratch: Path
    root: Path | None
    folders: dict[str, str | None] = field(default_factory=dict)

    def measure(self, stage: str, case: Mapping[str, Any], *, timeout: float) -> list[dict[str, Any]]:
        return self.runner.measure(stage, case, timeout=self.plan.patience * timeout)

    def folder(self, model: str) -> str | None:
        """The folder of `model`, made by a worker when it is first asked for; None where that failed."""
        if model not in self.folders:
            self.folders[model] = self._make(model)
        return self.folders[model]

    def _make(self, model: str) -> str | None:
        folder = self.scratch / model
        needed = _folder_bytes(model)
        free = shutil.disk_usage(self.scratch).free
        case = {"kind": "folder", "model": model, "folder": str(folder)}
        if free < 1.1 * needed:
            reason = f"{needed / GIB:.1f} GiB are needed for its weights, {free / GIB:.1f} GiB are free"
            self.runner.add("folder", case, {"status": "skipped", "reason": reason})
            return None
        rows = self.measure("folder", case, timeout=60 + 4 * needed / GIB)
        return str(folder) if rows[-1]["status"] == "ok" else None

    def step(self, stage: str, peer: str, model: str, **changed: Any) -> dict[str, Any] | None:
        """One run of training steps; its row, or None without a folder."""
        folder = self.folder(model)
        if folder is None:
            return None
        plan = self.plan
        case: dict[str, Any] = {
            "kind": "step",
            "peer": peer,
            "model": model,
            "folder": folder,
            "tokens": plan.tokens,
            "batch": plan.batch,
            "rank": plan.rank,
            "steps": plan.steps,
            "seconds": plan.step_seconds,
            **changed,
        }
        # Unsloth compiles on its first steps; loading takes a second a few GB.
        allowed = 2 * _START + 4 * plan.step_seconds + 4 * _folder_bytes(model) / GIB + 30 * ("unsloth" in peer)
        return self.measure(stage, case, timeout=allowed)[-1]


def _machine(run: _Run, commit: str | None) -> None:
    """Always first: no figure is kept without knowing where it was taken. A worker looks, so that this process never
    holds a piece of the GPU."""
    case = {"kind": "environment", "commit": commit, "seconds": 2.0 if run.plan.cuda else 0.3}
    rows = run.measure("machine", case, timeout=120)
    found = next((row for row in rows if "environment" in row), None)
    if found is None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        kind = "gpu" if run.plan.cuda else "cpu"
        run.runner.environment = {"kind": kind, "device": "unknown", "time": now, "commit": commit or "unknown"}
    else:
        run.runner.environment = {**found["environment"], "spoilers": found["spoilers"]}
    run.runner.limits = next((row["limits"] for row in rows if "limits" in row), {})
    run.runner.write()


def _tests(run: _Run) -> None:
    """The GPU's tests and the kernels' (without those that only run in Triton's interpreter, which need no GPU)."""
    if not run.plan.cuda:
        reason = "without a GPU these are part of the ordinary test suite"
        run.runner.add("tests", {"kind": "tests"}, {"status": "skipped", "reason": reason})
        return
    for folder, chosen, seconds in _TEST_FOLDERS:
        case = {"kind": "tests", "folder": folder}
        if run.root is None or not (run.root / folder).is_dir():
            run.runner.add("tests", case, {"status": "skipped", "reason": "no checkout with these tests here"})
            continue
        command = [
            sys.executable, "-m", "pytest", str(run.root / folder), "--rootdir", str(run.root), "-v", "--tb=line",
            "-p", "no:cacheprovider", "-o", "filterwarnings=default", *chosen,
        ]  # fmt: skip
        status, told = run.runner.call("tests", command, timeout=seconds)
        run.runner.add("tests", case, _count_tests(status, told))


def _count_tests(status: int, told: str) -> dict[str, Any]:
    """A row from what `pytest -v` printed, be it to its end or not."""
    outcomes = _OUTCOME.findall(told)
    counts = {name.lower(): outcomes.count(name) for name in dict.fromkeys(outcomes)}
    row: dict[str, Any] = {"counts": counts, "status": "ok"}
    red = [line.strip()[:160] for line in told.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if status == 124:
        row |= {"status": "failed", "reason": f"stopped: out of time after {counts}"}
    elif status not in (0, 5):
        last = [line.strip() for line in told.splitlines() if line.strip()][-1:]
        row |= {"status": "failed", "reason": f"{counts}: {'; '.join(red or last)}"[:800]}
    elif not counts.get("passed"):
        row |= {"status": "skipped", "reason": f"no test ran here: {counts}"}
    return row


def _kernels(run: _Run) -> None:
    if not run.runner.limits:
        reason = "the machine's limits could not be measured"
        run.runner.add("kernels", {"kind": "kernels"}, {"status": "skipped", "reason": reason})
        return
    plan = run.plan
    # Layers of an 8B fill any card without filling its memory.
    model = "llama-3.1-8b" if plan.cuda else "nano"
    common = {
        "kind": "kernels",
        "model": model,
        "tokens": plan.tokens if plan.cuda else 64,
        "seconds": plan.kernel_seconds,
        "limits": run.runner.limits,
    }
    first, *others = plan.families
    run.measure("kernels", {**common, "families": [first], "unsloth": False}, timeout=90)
    if plan.cuda:
        # In a process of its own: importing Unsloth replaces functions that the stock rows call.
        run.measure(
            "kernels",
            {**common, "families": [first, "lora_linear"] if others else [first], "unsloth": True},
            timeout=120,
        )
    if others:
        run.measure("kernels", {**common, "families": others, "unsloth": False}, timeout=150)


def _unsloth(run: _Run) -> None:
    """The smallest model through Unsloth and through fastprice on it: a few steps, to know early what works."""
    model = "qwen2.5-0.5b" if run.plan.cuda else "nano"
    for peer in ("unsloth", "unsloth-kernels"):
        run.step("unsloth", peer, model, tokens=min(2048, run.plan.tokens), steps=4)


def _steps(run: _Run) -> None:
    """Round after round over all models and peers, so that a peer's runs lie apart in time (A, B, A, B)."""
    plan = run.plan
    given_up: set[tuple[int, int, str, str]] = set()
    for (tokens, rank), _ in product([(plan.tokens, plan.rank), *plan.others], range(plan.rounds)):
        for model, peer in product(plan.models, plan.peers):
            this = (tokens, rank, model, peer)
            if this in given_up or run.runner.left < _START + plan.step_seconds:
                continue
            row = run.step("steps", peer, model, tokens=tokens, rank=rank)
            if row is None or row["status"] != "ok":
                given_up.add(this)


def _memory(run: _Run) -> None:
    rows = [row for row in ok_rows(run.runner.rows, "step") if row["stage"] != "fit"]
    measured = {(row["case"]["model"], row["case"]["tokens"], row["case"]["rank"], row["peer"]): row for row in rows}
    steps = [
        {
            "model": model,
            "peer": peer,
            "tokens": row["tokens_per_step"],
            "texts": row["items_per_second"] / row["mean_tokens_per_second"] * row["tokens_per_step"],
            "rank": row["case"]["rank"],
            "labeled": row["labeled_share"],
            "keep": row["keep"],
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


def _predict(run: _Run) -> None:
    model = run.plan.models[0]
    folder = run.folder(model)
    if folder is not None:
        items, batch = (512, 64) if run.plan.cuda else (16, 8)
        seconds = 15.0 if run.plan.cuda else 1.0
        case = {"kind": "predict", "model": model, "folder": folder, "items": items, "batch": batch, "seconds": seconds}
        run.measure("predict", case, timeout=2 * _START + 4 * seconds)


def _stream(run: _Run) -> None:
    """The largest model, resident and then with most of its layers' weights on the host, on the same work."""
    plan, model = run.plan, run.plan.models[-1]
    folder = run.folder(model)
    if folder is None:
        return
    cap = streaming_cap(model, tokens=plan.tokens, rank=plan.rank, kernels=plan.cuda)
    for cap_bytes in (0, cap):
        case = {"kind": "stream", "model": model, "folder": folder, "cap_bytes": cap_bytes, "tokens": plan.tokens}
        run.measure("stream", {**case, "rank": plan.rank}, timeout=3 * _START + 60)


def _fit(run: _Run) -> None:
    """Under each cap: the largest micro-batch of the first model, then the largest model; a fresh process a probe."""
    plan, runner = run.plan, run.runner
    for cap in plan.caps:
        for peer in ("peft", "unsloth", "trl-packed"):

            def fits(tokens: int, peer: str = peer, cap: int = cap, model: str = plan.models[0]) -> bool:
                batch = max(1, tokens // 140)
                row = run.step("fit", peer, model, tokens=tokens, batch=batch, steps=2, cap_bytes=cap * GIB)
                return row is not None and row["status"] == "ok"

            case = {"kind": "fit", "peer": peer, "model": plan.models[0], "cap_bytes": cap * GIB}
            if runner.left < 3 * _START:
                runner.add("fit", case, {"status": "skipped", "reason": "no time was left"})
                return
            tokens = largest(fits, 1024, 65536)
            finished = runner.left > 0
            note = {} if finished else {"status": "failed", "reason": "time ran out while searching"}
            runner.add("fit", case, {"status": "ok", "largest_tokens": tokens, **note})
        by_size = sorted(MODELS, key=lambda name: shape_of(name).linear_weights)
        fitting = [model for model in by_size if _folder_bytes(model) < cap * GIB]
        for model in reversed(fitting):
            row = run.step("fit", "peft", model, tokens=2048, steps=2, cap_bytes=cap * GIB)
            if row is not None and row["status"] == "ok":
                case = {"kind": "fit", "peer": "peft", "cap_bytes": cap * GIB}
                runner.add("fit", case, {"status": "ok", "largest_model": model})
                break


def _folder_bytes(model: str) -> float:
    """Bytes of a model's folder: NF4 layers, embedding and head in 16 bits."""
    shape = shape_of(model)
    tables = 1 if MODELS[model]["tie_word_embeddings"] else 2
    return shape.linear_weights * NF4_BYTES + 2.0 * tables * shape.vocabulary * shape.hidden


def _roomy_folder() -> str | None:
    """Memory-backed storage where there is plenty: models are written and read as fast as memory allows."""
    shared = "/dev/shm"
    if os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 16 * GIB:
        return shared
    return None


STAGES: Mapping[str, Callable[[_Run], None]] = {
    "tests": _tests,
    "kernels": _kernels,
    "unsloth": _unsloth,
    "steps": _steps,
    "memory": _memory,
    "predict": _predict,
    "stream": _stream,
    "fit": _fit,
}
