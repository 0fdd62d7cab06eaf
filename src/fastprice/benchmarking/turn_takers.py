"""Workers that stay alive and take turns, so that rounds interleave without starting every process anew.

Protocol: a worker prints a row `{"ready": true}` when its libraries are imported, then one row for each line that it
reads on standard input. Between its turns it waits for input, and takes no processor time.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from fastprice.benchmarking.worker_group import kill_group, start_process
from fastprice.benchmarking.worker_process import ROW_MARK

__all__ = ["TurnTakers"]

Case = Mapping[str, Any]
_LOG_LINES = 60


class TurnTakers:
    """One worker for each of `cases`, all started on entering the context and ended on leaving it.

    worker: the command that a case is added to as JSON. take: called with the case and each of its rows, failures
    among them; log: with the last lines that a worker printed beside its rows.
    """

    def __init__(
        self,
        worker: Sequence[str],
        cases: Sequence[Case],
        take: Callable[[Case, Mapping[str, Any]], None],
        log: Callable[[list[str]], None],
    ) -> None:
        self._worker = worker
        self._cases = cases
        self._take = take
        self._log = log
        self._talks: dict[int, _Talk] = {}

    def __enter__(self) -> TurnTakers:
        for case in self._cases:
            self._talks[id(case)] = _Talk(start_process([*self._worker, json.dumps(dict(case))], talks=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for talk in self._talks.values():
            talk.close()
            self._log(talk.lines)

    def running(self, case: Case) -> bool:
        """Whether the worker of this case still takes turns."""
        return id(case) in self._talks

    def stop(self, case: Case, status: str, reason: str) -> None:
        """Ends the worker of this case, with a row that says why."""
        talk = self._talks.pop(id(case))
        talk.close()
        self._log(talk.lines)
        self._take(case, {"status": status, "reason": reason})

    def turn(self, case: Case, number: int | None, seconds: float) -> None:
        """Lets the worker of this case make one row within `seconds`; number: of the round, None for its start."""
        if not self.running(case):
            return
        talk = self._talks[id(case)]
        if number is not None:
            talk.say(str(number))
        row = talk.next_row(seconds)
        if row is None:
            last = (talk.lines[-1] if talk.lines else "").strip()[:300]
            ended = f"ended with status {talk.status()}: {last}"
            self.stop(case, "failed", f"stopped after {seconds:.0f} s" if talk.status() is None else ended)
        elif row.get("status") != "ok":
            self.stop(case, str(row["status"]), str(row.get("reason")))
        elif number is not None:
            self._take(case, {**row, "round": number})


class _Talk:
    """A process that is written to and whose lines are read by a thread; `lines` are those that are no rows."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[str] = []
        self._process = process
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._queue.put(line)
        self._queue.put(None)

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # ended: the next row says so
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def next_row(self, seconds: float) -> dict[str, Any] | None:
        """The next row, or None when the process ended or the time was over."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._queue.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return None
            if line is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=10)
                return None
            if line.startswith(ROW_MARK):
                row: dict[str, Any] = json.loads(line[len(ROW_MARK) :])
                return row
            if line.strip():
                self.lines.append(line)
                del self.lines[:-_LOG_LINES]

    def status(self) -> int | None:
        return self._process.poll()

    def close(self) -> None:
        kill_group(self._process)
        self._reader.join(timeout=5)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not self._reader.is_alive():
                with contextlib.suppress(OSError):  # what was said last may not be written any more
                    pipe.close()
