"""A worker's process: started with the packages of this one, ended together with its own children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

__all__ = ["kill_group", "start_process"]


def start_process(command: Sequence[str], *, talks: bool = False) -> subprocess.Popen[str]:
    """Starts a command with this process's packages, offline; `talks`: its standard input is a pipe."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE if talks else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_worker_environment(),
        start_new_session=True,  # so that a worker's own children end with it
    )


def kill_group(process: subprocess.Popen[str]) -> None:
    """Ends a worker and its children; GPU memory is free again only when the process is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _worker_environment() -> dict[str, str]:
    """This process's environment variables, with the packages that it runs first, offline and without statistics."""
    specs = [find_spec(name) for name in ("fastprice", "fastprice_kernels")]
    roots = [
        str(Path(spec.origin).resolve().parents[1]) for spec in specs if spec is not None and spec.origin is not None
    ]
    before = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*dict.fromkeys(roots), *([before] if before else [])]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": os.path.join(tempfile.gettempdir(), "fastprice-unsloth-cache"),
    }
