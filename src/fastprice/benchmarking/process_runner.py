"""Runs measurements in fresh processes, in order, within a number of minutes, and writes every row as it comes.

A worker that fails, dies or takes too long costs its own rows and no others. The result file is rewritten whole after
every row, by a rename, so that whatever stops the run leaves a readable result.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprice.benchmarking.reporting.results import FORMAT, result_path
from fastprice.benchmarking.reporting.tables import row_line
from fastprice.benchmarking.turn_takers import TurnTakers
from fastprice.benchmarking.worker_group import kill_group, start_process
from fastprice.benchmarking.worker_process import ROW_MARK
from fastprice.common.files import write_text_atomically

__all__ = ["ProcessRunner"]

_LEAST_SECONDS = 5.0  # below which no process is started
_LOG_LINES = 60  # of a process's output, the last ones


class ProcessRunner:
    """A run of `minutes` that writes its result file and a log.txt to `folder`.

    rows          every row so far, each with its `stage` and `case`
    environment, limits   of the result file, to be set before it is written
    path          the result file, None as long as `environment` is empty
    seconds_left  until the run must end

    quiet: print no line a row; worker: the command that measures one case, which is added to it as JSON.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float,
        *,
        quiet: bool = False,
        worker: Sequence[str] = (sys.executable, "-m", "fastprice.benchmarking.worker_process"),
    ) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.environment: dict[str, Any] = {}
        self.limits: dict[str, Any] = {}
        self.path: Path | None = None
        self._minutes = minutes
        self._began = time.monotonic()
        self._quiet = quiet
        self._worker = worker
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds_left(self) -> float:
        return self._began + 60 * self._minutes - time.monotonic()

    def measure(self, stage: str, case: Mapping[str, Any], *, timeout: float) -> list[dict[str, Any]]:
        """The rows of one worker, which gets `timeout` seconds or what is left of the run; a failure is a row too."""
        allowed = min(timeout, self.seconds_left)
        if allowed < _LEAST_SECONDS:
            return [self.add(stage, case, {"status": "skipped", "reason": "no time was left"})]
        rows, failure = self._run(stage, case, [*self._worker, json.dumps(dict(case))], allowed)
        if failure:
            rows.append(self.add(stage, case, {"status": "failed", "reason": failure}))
        return rows

    def measure_in_turns(
        self, stage: str, cases: Sequence[Mapping[str, Any]], rounds: int, *, timeout: float
    ) -> list[dict[str, Any]]:
        """The rows of `rounds` rounds over workers that all stay alive and of which one runs at a time (A, B, A, B).

        timeout: seconds of a turn, a worker's start among them. A worker that fails leaves a row and takes no more
        turns.
        """
        rows: list[dict[str, Any]] = []

        def take(case: Mapping[str, Any], row: Mapping[str, Any]) -> None:
            rows.append(self.add(stage, case, row))

        with TurnTakers(self._worker, cases, take, lambda lines: self._log(stage, lines)) as takers:
            for number in range(-1, rounds):  # -1: their start
                for case in cases:
                    allowed = min(timeout, self.seconds_left)
                    if allowed >= _LEAST_SECONDS:
                        takers.turn(case, None if number < 0 else number, allowed)
                    elif takers.running(case):
                        takers.stop(case, "skipped", "no time was left")
        return rows

    def call(self, stage: str, command: Sequence[str], *, timeout: float) -> tuple[int, str]:
        """Runs any other command: its status (124 when it was stopped) and what it printed."""
        allowed = min(timeout, self.seconds_left)
        if allowed < _LEAST_SECONDS:
            return 124, "no time was left"
        lines: list[str] = []
        process = start_process(command)
        status = self._listen(process, allowed, lines.append)
        self._log(stage, lines)
        return (124 if status is None else status), "".join(lines)

    def add(self, stage: str, case: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """Adds a row, writes the result file, and prints one line."""
        whole = {"stage": stage, "case": dict(case), **row}
        self.rows.append(whole)
        self.write()
        if not self._quiet:
            print(f"[{60 * self._minutes - self.seconds_left:4.0f} s] {stage:12} {row_line(whole)}", flush=True)
        return whole

    def write(self) -> None:
        """Writes everything so far, as soon as the environment is known."""
        if not self.environment:
            return
        if self.path is None:
            self.path = result_path(self.folder, self.environment)
        whole = {
            "format": FORMAT,
            "environment": self.environment,
            "limits": self.limits,
            "seconds": round(60 * self._minutes - self.seconds_left, 1),
            "rows": self.rows,
        }
        write_text_atomically(self.path, json.dumps(whole, indent=1) + "\n")

    def _run(
        self, stage: str, case: Mapping[str, Any], command: Sequence[str], allowed: float
    ) -> tuple[list[dict[str, Any]], str]:
        rows: list[dict[str, Any]] = []
        other: list[str] = []  # lines that are no rows

        def take(line: str) -> None:
            if line.startswith(ROW_MARK):
                rows.append(self.add(stage, case, json.loads(line[len(ROW_MARK) :])))
            elif line.strip():
                other.append(line)
                del other[:-_LOG_LINES]

        process = start_process(command)
        status = self._listen(process, allowed, take)
        if status is None:
            failure = f"stopped after {allowed:.0f} s"
        elif status != 0:
            failure = f"died with status {status}: {(other[-1] if other else '').strip()[:300]}"
        else:
            return rows, "" if rows else "printed no row"
        self._log(stage, other)
        return rows, failure

    def _listen(self, process: subprocess.Popen[str], allowed: float, take: Callable[[str], None]) -> int | None:
        """Feeds lines to `take` until the process ends (its status) or its time is over (None, and it is killed)."""
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        end = time.monotonic() + allowed
        try:
            while True:
                try:
                    line = lines.get(timeout=max(0.0, end - time.monotonic()))
                except queue.Empty:
                    return None
                if line is None:
                    return process.wait(timeout=30)
                take(line)
        finally:
            kill_group(process)
            reader.join(timeout=5)
            if not reader.is_alive() and process.stdout is not None:  # else an escaped grandchild still holds the pipe
                process.stdout.close()

    def _log(self, stage: str, lines: Sequence[str]) -> None:
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"--- {stage} ---\n{''.join(lines[-_LOG_LINES:])}\n")
