"""What is installed, what hardware there is, what is missing and how to get it."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

from fastprice import __version__

if TYPE_CHECKING:
    import torch

__all__ = ["Finding", "attention_finding", "examine"]

REQUIRED = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")
OPTIONAL = {"unsloth": "pip install 'fastprice[gpu]'", "xformers": "pip install 'fastprice[gpu]'"}
_LEAST_FREE = 0.9  # share of GPU memory that should be free before a run or a benchmark


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what to do about a warning or an error."""

    level: Literal["ok", "warning", "error"]
    what: str
    remedy: str = ""


def examine() -> list[Finding]:
    """What is installed and what the GPUs are, in reading order."""
    findings = [Finding("ok", f"fastprice {__version__}, Python {platform.python_version()}, {platform.platform()}")]
    for name in REQUIRED:
        found = _version(name)
        findings.append(
            Finding("ok", f"{name} {found}")
            if found
            else Finding("error", f"{name} is missing", f"pip install {name}, or reinstall fastprice")
        )
    if _version("torch"):
        findings += _gpu_findings()
        findings += _engine_findings()
    return findings


def _engine_findings() -> list[Finding]:
    """Which engine "auto" takes, with the kernels (the default on CUDA) and without, and why."""
    from fastprice.models.engine_choice import auto_engine
    from fastprice.training.step_options import uses_kernels

    name, reason = auto_engine(kernels=uses_kernels("auto"))
    findings = [Finding("ok", f"engine='auto' is {name}: {reason}")]
    without, reason = auto_engine(kernels=False)
    if without != name:
        findings.append(Finding("ok", f"engine='auto' with kernels='off' is {without}: {reason}"))
    return findings


def _gpu_findings() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            remedy = "fine for the nano model; for a GPU install a CUDA build of PyTorch"
            return [Finding("warning", "no GPU: this PyTorch is a CPU build", remedy)]
        remedy = "check the driver with nvidia-smi"
        return [Finding("warning", f"no GPU is visible to PyTorch (built for CUDA {torch.version.cuda})", remedy)]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        name = f"GPU {index}: {properties.name}, {total / 2**30:.1f} GiB, {capability}"
        if free < _LEAST_FREE * total:
            used = (total - free) / 2**30
            findings.append(
                Finding("warning", f"{name}, of which {used:.1f} GiB is in use", "close other GPU programs")
            )
        else:
            findings.append(Finding("ok", name))
    for name, remedy in OPTIONAL.items():
        found = _version(name)
        findings.append(Finding("ok", f"{name} {found}") if found else Finding("warning", f"{name} is missing", remedy))
    if _version("transformers"):
        from fastprice.models.peft_engine import compute_dtype

        findings.append(attention_finding("cuda", compute_dtype()))
    if shutil.which("nvidia-smi"):
        findings += _power_findings()
    return findings


def attention_finding(device: str, dtype: torch.dtype) -> Finding:
    """Which attention of packs runs on this kind of device in this dtype, and why none that is better."""
    from fastprice.models.attention_backends import attention_choice

    choice = attention_choice(device, dtype)
    if choice.shortfall:
        return Finding("warning", choice.shortfall)
    others = "".join(f"; {name}: {why}" for name, why in choice.failures.items())
    return Finding("ok", f"attention of packs: {choice.backend}{others}")


def _power_findings() -> list[Finding]:
    """A warning for each GPU whose power limit was lowered: its speed is not that of its model."""
    import subprocess

    query = "--query-gpu=index,power.limit,power.default_limit"
    try:
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return [Finding("warning", f"nvidia-smi does not answer ({error})", "check the driver")]
    findings = []
    for line in answer.stdout.splitlines():
        index, *watts = (field.strip() for field in line.split(","))
        try:
            limit, default = (float(field) for field in watts)
        except ValueError:
            continue  # "[N/A]": not reported on laptops and some servers
        if limit < 0.98 * default:
            what = f"GPU {index} is limited to {limit:.0f} W of {default:.0f} W"
            findings.append(Finding("warning", what, f"nvidia-smi -i {index} -pl {default:.0f} (as root)"))
    return findings


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
