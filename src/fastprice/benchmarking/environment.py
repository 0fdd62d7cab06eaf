"""Where a figure was measured: the machine, its versions, and the highest rates it reached in the same run."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastprice
from fastprice.benchmarking.timing import interleave, spread_of

__all__ = ["doctor_warnings", "environment", "gpu_memory_bytes", "gpu_state", "measure_limits"]

_PACKAGES = (
    "torch", "triton", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "unsloth",
    "unsloth_zoo", "liger-kernel", "cut-cross-entropy", "xformers", "flash-attn", "numpy",
)  # fmt: skip
_QUERY = (
    "name", "driver_version", "power.limit", "power.default_limit", "clocks.sm", "clocks.max.sm", "clocks.mem",
    "temperature.gpu", "memory.total", "memory.used",
)  # fmt: skip


def environment(commit: str | None = None) -> dict[str, Any]:
    """The record that goes with every result: hardware, versions, commit, time (UTC)."""
    record: dict[str, Any] = {
        "kind": "gpu" if torch.cuda.is_available() else "cpu",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": {
            "fastprice": fastprice.__version__,
            **{name: found for name in _PACKAGES if (found := _version(name))},
        },
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "gpu": gpu_state(),
        }
    else:
        record["device"] = f"CPU, {_processor()}, {torch.get_num_threads()} threads"
    return record


def gpu_state() -> dict[str, str]:
    """Driver, power limit, clocks, temperature of the first GPU now, by nvidia-smi; empty where that is missing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": f"nvidia-smi does not answer: {error}"}
    return dict(zip(_QUERY, (field.strip() for field in answer.stdout.strip().split(",")), strict=False))


def gpu_memory_bytes() -> int:
    """Bytes of the first GPU, by nvidia-smi, so that this process takes no part of it; 0 where that does not say."""
    size = gpu_state().get("memory.total", "0 MiB").split()[0]
    return int(size) * 2**20 if size.isdigit() else 0


def doctor_warnings() -> list[str]:
    """What `fastprice doctor` warns of, a line each: a lowered power limit, memory in use, missing packages."""
    from fastprice.doctor import examine

    return [f"{finding.what} ({finding.remedy})" for finding in examine() if finding.level != "ok"]


def measure_limits(device: torch.device | str, seconds: float = 2.0) -> dict[str, Any]:
    """The rates that bound every figure: bytes/s of a copy (read + written), FLOP/s of a matrix product.

    On CUDA a copy of 1 GiB and products of 8,192 cubed in bf16 on random data (zeros run faster than data does); on a
    CPU 64 MiB and 768 cubed in fp32.
    """
    cuda = torch.device(device).type == "cuda"
    size = 2**30 if cuda else 2**26
    free = torch.cuda.mem_get_info(device)[0] if cuda else 0
    if cuda and free < 4 * size:
        size = free // 8
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    width, dtype = (8192, torch.bfloat16) if cuda else (768, torch.float32)
    left = torch.randn(width, width, device=device, dtype=dtype)
    right = torch.randn(width, width, device=device, dtype=dtype)
    product = torch.empty_like(left)
    samples = interleave(
        {"copy": lambda: target.copy_(source), "matmul": lambda: torch.matmul(left, right, out=product)},
        device,
        seconds=seconds,
        max_rounds=100,
    )
    copy, matmul = spread_of(samples["copy"]), spread_of(samples["matmul"])
    return {
        "copy_bytes": size,
        "copy_bytes_per_second": 2 * size / copy.p50,
        "copy_noise": copy.noise,
        "matmul": f"{width}^3 {dtype}".replace("torch.", ""),
        "matmul_flops": 2 * width**3 / matmul.p50,
        "matmul_noise": matmul.noise,
    }


def _commit() -> str:
    """The commit of the checkout that this package is part of, with "+changes" where source files differ from it.

    "unknown" for an installed package, also where it lies inside the checkout of another project: only a folder whose
    files git tracks counts.
    """
    package = Path(fastprice.__file__).parent
    if shutil.which("git") is None:
        return "unknown"
    try:
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        head = _git(package, "rev-parse", "--short=10", "HEAD")
        changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/kernels")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
