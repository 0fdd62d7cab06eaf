"""Result files: their names, reading them, and one result compared with another of the same device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastprice.benchmarking.reporting.summaries import ok_rows, summarize_runs, summarize_steps
from fastprice.benchmarking.workload import GIB
from fastprice.errors import DataError

__all__ = ["FORMAT", "Result", "compare", "find_results", "load_result", "result_path"]

FORMAT = 1
Result = Mapping[str, Any]
_NOISE_FLOOR = 0.03  # two runs of one commit on one machine differ by this much without a reason


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


def load_result(path: Path) -> dict[str, Any]:
    """A result file; DataError for anything else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        result["environment"]["kind"], result["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a benchmark result ({error}); make one with: fastprice bench") from error
    return dict(result)


def find_results(folder: Path) -> list[Path]:
    """The result files in `folder`, the oldest first; DataError where there is none."""
    found = sorted(folder.glob("*.json"), key=lambda path: load_result(path)["environment"]["time"])
    if not found:
        raise DataError(f"{folder} holds no benchmark results (*.json); make one with: fastprice bench --out {folder}")
    return found


def compare(before: Result, after: Result) -> list[dict[str, Any]]:
    """What changed from one result to another of the same device, with a verdict that respects noise.

    One entry for everything that both measured: `change` is the ratio of speeds (above 1: `after` is faster), `noise`
    the share by which it may differ without meaning, the verdict "faster", "slower" or "same". DataError for results of
    two devices.
    """
    devices = [result["environment"]["device"] for result in (before, after)]
    if devices[0] != devices[1]:
        raise DataError(f"the results are of two devices, {devices[0]} and {devices[1]}; compare results of one")
    entries = []
    old_speeds, new_speeds = _speeds(before), _speeds(after)
    for name, (speed, noise) in new_speeds.items():
        if name not in old_speeds:
            continue
        old_speed, old_noise = old_speeds[name]
        change, allowed = speed / old_speed, _NOISE_FLOOR + noise + old_noise
        verdict = "same" if 1 / (1 + allowed) <= change <= 1 + allowed else "faster" if change > 1 else "slower"
        entries.append({"what": name, "change": change, "noise": allowed, "verdict": verdict})
    return entries


def _speeds(result: Result) -> dict[str, tuple[float, float]]:
    """Name of a measurement -> (speed, relative noise)."""
    speeds: dict[str, tuple[float, float]] = {}
    for entry in summarize_steps(result["rows"], result["limits"]):
        rates = entry["rates"]
        within = entry["step_seconds"]["noise"] / 2
        between = (rates[-1] - rates[0]) / entry["tokens_per_second"] if len(rates) > 1 else within
        cap = f", cap {entry['cap_bytes'] / GIB:.0f} GiB" if entry["cap_bytes"] else ""
        name = f"{entry['model']}, {entry['tokens']} tokens, rank {entry['rank']}, {entry['peer']}{cap}"
        speeds[name] = (entry["tokens_per_second"], between)
    for row in ok_rows(result["rows"], "kernels"):
        beside = " beside unsloth" if row["unsloth"] else ""
        took = row["seconds"]["fastprice"]
        speeds[f"{row['family']} {row['name']}{beside}"] = (1 / took["p50"], took["noise"] / 2)
    for entry in summarize_runs(result["rows"]):
        name = f"whole run, {entry['model']}, {entry['items']} texts, {entry['peer']}"
        speeds[name] = (entry["items_per_second"], entry["noise"])
    for row in ok_rows(result["rows"], "predict"):
        rate = row["items_per_second"]["fastprice"]
        speeds[f"prediction, {row['case']['model']}"] = (rate["p50"], rate["noise"] / 2)
    return speeds
