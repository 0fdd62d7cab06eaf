"""Runs measurements in fresh processes, in order, within a number of minutes, and keeps every row as it comes.

A worker that fails, dies or takes too long costs its own rows and no others. The result file is rewritten whole after
every row, by a rename, so that whatever stops the run leaves a readable result.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprice.benchmarking.analysis import line_of
from fastprice.benchmarking.worker import MARK
from fastprice.common.files import write_text_atomically

__all__ = ["Runner", "result_path"]

FORMAT = 1


def result_path(folder: Path, environment: Mapping[str, Any]) -> Path:
    """`<device>-<date>-<commit>.json` in `folder`, with -2, -3... where that exists: results are never overwritten."""
    device = environment["device"] if environment["kind"] == "gpu" else "cpu"
    name = "".join(letter if letter.isalnum() else "-" for letter in device.lower()).strip("-")
    while "--" in name:
        name = name.replace("--", "-")
    commit = environment["commit"].replace("+changes", "-changes")
    stem = f"{name}-{environment['time'][:10]}-{commit}"
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


class Runner:
    """A run of `minutes` that writes to `folder`.

    Attributes:
        rows: every row so far, each with its `stage` and `case`.
        left: seconds until the run must end.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float,
        *,
        quiet: bool = False,
        worker: Sequence[str] = (sys.executable, "-m", "fastprice.benchmarking.worker"),
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
        self._log = folder / "log.txt"

    @property
    def left(self) -> float:
        return self._began + 60 * self._minutes - time.monotonic()

    def measure(self, stage: str, case: Mapping[str, Any], *, timeout: float) -> list[dict[str, Any]]:
        """The rows of one worker, at most `timeout` seconds and the time left. None is lost; failures are rows."""
        allowed = min(timeout, self.left)
        if allowed < 5:
            return [self.add(stage, case, {"status": "skipped", "reason": "no time was left"})]
        command = [*self._worker, json.dumps(dict(case))]
        rows, ended = self._run(stage, case, command, allowed)
        if ended:
            rows.append(self.add(stage, case, {"status": "failed", "reason": ended}))
        return rows

    def call(self, stage: str, command: Sequence[str], *, timeout: float) -> tuple[int, str]:
        """Any other command: its status (124 when it was stopped) and what it printed."""
        allowed = min(timeout, self.left)
        if allowed < 5:
            return 124, "no time was left"
        lines: list[str] = []
        process = self._start(command)
        status = self._listen(process, allowed, lines.append)
        self._note(stage, "".join(lines[-60:]))
        return (124 if status is None else status), "".join(lines)

    def add(self, stage: str, case: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps a row, writes the result file, and shows one line."""
        whole = {"stage": stage, "case": dict(case), **row}
        self.rows.append(whole)
        self.write()
        if not self._quiet:
            print(f"[{60 * self._minutes - self.left:4.0f} s] {stage:12} {line_of(whole)}", flush=True)
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
            "seconds": round(60 * self._minutes - self.left, 1),
            "rows": self.rows,
        }
        write_text_atomically(self.path, json.dumps(whole, indent=1) + "\n")

    def _run(
        self, stage: str, case: Mapping[str, Any], command: Sequence[str], allowed: float
    ) -> tuple[list[dict[str, Any]], str]:
        rows: list[dict[str, Any]] = []
        noise: list[str] = []

        def take(line: str) -> None:
            if line.startswith(MARK):
                rows.append(self.add(stage, case, json.loads(line[len(MARK) :])))
            elif line.strip():
                noise.append(line)
                del noise[:-60]

        process = self._start(command)
        status = self._listen(process, allowed, take)
        if status is None:
            ended = f"stopped after {allowed:.0f} s"
        elif status != 0:
            ended = f"died with status {status}: {(noise[-1] if noise else '').strip()[:300]}"
        else:
            return rows, "" if rows else "said nothing"
        self._note(stage, "".join(noise))
        return rows, ended

    def _start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment_of_workers(),
            start_new_session=True,  # so that a worker's own children end with it
        )

    def _listen(self, process: subprocess.Popen[str], allowed: float, take: Any) -> int | None:
        """Feeds lines to `take` until the process ends (its status) or its time is over (None, and it is gone)."""
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
            _end(process)
            reader.join(timeout=5)
            if not reader.is_alive() and process.stdout is not None:  # else an escaped grandchild still holds the pipe
                process.stdout.close()

    def _note(self, stage: str, text: str) -> None:
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"--- {stage} ---\n{text}\n")


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a worker and its children; GPU memory is free again only when the process is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment_of_workers() -> dict[str, str]:
    """This process's environment, with the packages of this checkout first and everything offline and quiet."""
    import fastprice

    roots = [str(Path(fastprice.__file__).resolve().parents[1])]
    kernels = Path(fastprice.__file__).resolve().parents[2] / "kernels"
    if (kernels / "fastprice_kernels").is_dir():
        roots.append(str(kernels))
    before = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*roots, *([before] if before else [])]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": os.path.join(tempfile.gettempdir(), "fastprice-unsloth-cache"),
    }
