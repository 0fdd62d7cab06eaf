"""The cases of the suite, each defined once: what `fastprice bench` runs within its time, `pytest benchmarks` runs too.

A case is a dict that one worker process takes (worker_process.py). `SuiteRun` makes it from the plan, makes the model's
folder when it is first needed, and has a `ProcessRunner` measure it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastprice.benchmarking.peers import PEERS
from fastprice.benchmarking.process_runner import ProcessRunner
from fastprice.benchmarking.suite_plan import SuitePlan
from fastprice.benchmarking.workload import GIB, folder_bytes

__all__ = ["START", "SuiteRun"]

START = 25.0  # seconds for a worker to import its libraries on a machine that does little else


@dataclass
class SuiteRun:
    """A run under way: its plan, its runner, and the folders of models made so far (None where that failed)."""

    runner: ProcessRunner
    plan: SuitePlan
    scratch: Path
    folders: dict[str, str | None] = field(default_factory=dict)

    def measure(self, stage: str, case: Mapping[str, Any], *, timeout: float) -> list[dict[str, Any]]:
        """The rows of one worker; `timeout` in seconds on an otherwise idle GPU machine."""
        return self.runner.measure(stage, case, timeout=self.plan.time_factor * timeout)

    def folder(self, model: str) -> str | None:
        """The folder of `model`, made by a worker when it is first needed; None where that failed."""
        if model not in self.folders:
            self.folders[model] = self._make_folder(model)
        return self.folders[model]

    def _make_folder(self, model: str) -> str | None:
        folder = self.scratch / model.replace(" ", "-")
        needed = _bytes_of(model)
        free = shutil.disk_usage(self.scratch).free
        case = {"kind": "folder", "model": model, "folder": str(folder)}
        if free < 1.1 * needed:
            reason = f"{needed / GIB:.1f} GiB are needed for its weights, {free / GIB:.1f} GiB are free"
            self.runner.add("folder", case, {"status": "skipped", "reason": reason})
            return None
        rows = self.measure("folder", case, timeout=60 + 4 * needed / GIB)
        return str(folder) if rows[-1]["status"] == "ok" else None

    def step(self, stage: str, peer: str, model: str, **changes: Any) -> dict[str, Any] | None:
        """The row of one peer's training steps, as planned except for `changes`; None without a folder."""
        plan = self.plan
        case: dict[str, Any] = {
            "kind": "step",
            "peer": peer,
            "model": model,
            "tokens": plan.tokens,
            "batch": plan.batch,
            "rank": plan.rank,
            "steps": plan.steps,
            "seconds": plan.step_seconds,
            **changes,
        }
        missing = PEERS[peer].missing(cuda=plan.gpu)
        if missing is not None:
            return self.runner.add(stage, case, {"status": "skipped", "reason": missing})
        folder = self.folder(model)
        if folder is None:
            return None
        # Unsloth compiles on its first steps; loading takes a second for a few GB.
        allowed = 2 * START + 4 * plan.step_seconds + 4 * folder_bytes(model) / GIB + 30 * ("unsloth" in peer)
        return self.measure(stage, {**case, "folder": folder}, timeout=allowed)[-1]

    def training_runs(self, peers: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of whole training runs of `peers`, in turns; a row that says why for each that cannot run here."""
        plan = self.plan
        sizes = {"model": plan.run_model, "items": plan.run_items, "tokens": plan.run_tokens, "rank": plan.rank}
        rows, cases = [], []
        for peer in peers:
            case = {"kind": "run", "peer": peer, **sizes}
            missing = PEERS[peer].missing(cuda=plan.gpu)
            if missing is not None:
                rows.append(self.runner.add("runs", case, {"status": "skipped", "reason": missing}))
            else:
                cases.append(case)
        folder = self.folder(plan.run_model) if cases else None
        if folder is None:
            return rows
        turns = [{**case, "folder": folder} for case in cases]
        allowed = plan.time_factor * (2 * START + plan.run_seconds)
        return rows + self.runner.measure_in_turns("runs", turns, plan.run_rounds, timeout=allowed)

    def loading(self, way: str) -> list[dict[str, Any]]:
        """The rows of loading the first model in one of `peers.LOADING_WAYS`."""
        model = self.plan.models[0]
        case = {"kind": "load", "way": way, "model": model, "rounds": self.plan.load_rounds}
        missing = PEERS["unsloth"].missing(cuda=self.plan.gpu) if way == "unsloth" else None
        if missing is not None:
            return [self.runner.add("load", case, {"status": "skipped", "reason": missing})]
        folder = self.folder(model)
        if folder is None:
            return []
        allowed = 2 * START + self.plan.load_rounds * 4 * _bytes_of(model) / GIB
        return self.measure("load", {**case, "folder": folder}, timeout=allowed)


def _bytes_of(model: str) -> float:
    return folder_bytes("nano" if model == "shipped nano" else model)
