"""What the rows of a run say together: who agrees with the stock path, and who is how much faster. Pure arithmetic.

No ratio is made from a run whose loss or gradient norm is off, nor from one that is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "FASTPRICE",
    "PHASES",
    "STOCK",
    "agreement",
    "geometric_mean",
    "line_of",
    "ok_rows",
    "step_groups",
    "summarize_kernels",
    "summarize_steps",
]

Row = Mapping[str, Any]

# In this order of preference, as the reference of the loss and as the stock path of ratios.
STOCK = ("trl-packed", "trl-padded", "peft-off")
FASTPRICE = ("peft", "peft-graphs", "unsloth-kernels")
PHASES = ("forward", "backward", "between")  # of a step; the last: optimizer, loading of data, what else a trainer does
# Largest relative difference of loss and of gradient norm between two right engines in one dtype. TRL keeps adapters in
# bf16 and fastprice in fp32, so even fp32 runs differ by the rounding of A and B.
_BANDS = {"float32": (1e-3, 5e-3), "bfloat16": (1e-2, 6e-2), "float16": (5e-3, 3e-2)}


def ok_rows(rows: Iterable[Row], kind: str) -> list[Row]:
    """The rows of workers of `kind` that hold figures."""
    return [row for row in rows if row["case"].get("kind") == kind and row.get("status") == "ok"]


def agreement(row: Row, reference: Row) -> dict[str, Any]:
    """How far, relatively, the check of `row` lies from that of `reference`, and whether the dtype's band allows it."""
    loss_band, norm_band = _BANDS[row["dtype"]]
    loss = abs(row["check_loss"] - reference["check_loss"]) / abs(reference["check_loss"])
    norm = abs(row["check_gradient_norm"] - reference["check_gradient_norm"]) / reference["check_gradient_norm"]
    return {
        "against": reference["peer"],
        "loss_error": loss,
        "gradient_norm_error": norm,
        "ok": bool(loss <= loss_band and norm <= norm_band),  # False for NaN
    }


def step_groups(rows: Iterable[Row]) -> dict[tuple[str, int, int, int], dict[str, list[Row]]]:
    """(model, tokens, rank, cap in bytes or 0) -> peer -> its good rows, one a round."""
    groups: dict[tuple[str, int, int, int], dict[str, list[Row]]] = {}
    for row in ok_rows(rows, "step"):
        case = row["case"]
        if row["stage"] == "fit":
            continue  # two steps, to see whether they fit at all
        key = (case["model"], case["tokens"], case["rank"], case.get("cap_bytes") or 0)
        groups.setdefault(key, {}).setdefault(row["peer"], []).append(row)
    return groups


def summarize_steps(rows: Iterable[Row], limits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry a group and peer: tokens/s (median of its rounds), memory, agreement, the best fastprice's ratio to it.

    `ratio` holds low, mid and high: fastprice's slowest round over the peer's fastest, medians, fastest over slowest.
    It is None for fastprice itself and wherever a check failed on either side.
    """
    summary = []
    for (model, tokens, rank, cap), peers in step_groups(rows).items():
        reference = next((peers[name][0] for name in STOCK if name in peers), None)
        entries = []
        for peer, rounds in peers.items():
            rates = sorted(row["mean_tokens_per_second"] for row in rounds)
            checks = [agreement(row, reference) for row in rounds] if reference else []
            middle = _median(rates)
            flops = middle * rounds[0]["flops_per_token"]
            entries.append(
                {
                    "model": model,
                    "tokens": tokens,
                    "rank": rank,
                    "cap_bytes": cap,
                    "peer": peer,
                    "dtype": rounds[0]["dtype"],
                    "rounds": len(rounds),
                    "rates": rates,
                    "tokens_per_second": middle,
                    "items_per_second": _median(sorted(row["items_per_second"] for row in rounds)),
                    "step_seconds": rounds[0]["step_seconds"],
                    "phase_seconds": rounds[0]["phase_seconds"],
                    "load_seconds": rounds[0]["load_seconds"],
                    "load_host_bytes": rounds[0]["load_host_bytes"],
                    "noisy": any(row["step_seconds"]["noisy"] for row in rounds) or _spread(rates) > 0.05,
                    "peak_allocated": _most(rounds, "peak_allocated"),
                    "peak_reserved": _most(rounds, "peak_reserved"),
                    "flop_utilization": flops / limits["matmul_flops"] if limits else None,
                    "check": checks[0] if checks else None,
                    "ok": bool(checks) and all(check["ok"] for check in checks),
                    "ratio": None,
                }
            )
        ours = [entry for entry in entries if entry["peer"] in FASTPRICE and entry["ok"]]
        best = max(ours, key=lambda entry: entry["tokens_per_second"], default=None)
        for entry in entries:
            if best is not None and entry["ok"] and entry["peer"] not in FASTPRICE:
                entry["ratio"] = {
                    "of": best["peer"],
                    "low": best["rates"][0] / entry["rates"][-1],
                    "mid": best["tokens_per_second"] / entry["tokens_per_second"],
                    "high": best["rates"][-1] / entry["rates"][0],
                }
        summary += sorted(entries, key=lambda entry: entry["tokens_per_second"])
    return summary


def summarize_kernels(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each family and peer: over how many cases, geometric mean, smallest and largest of the median ratios (peer
    over fastprice: above 1 is faster), and the share of the limit that fastprice reaches (geometric mean)."""
    found: dict[tuple[str, str], list[float]] = {}
    shares: dict[str, list[float]] = {}
    for row in ok_rows(rows, "kernels"):
        shares.setdefault(row["family"], []).append(row["share_of_limit"]["fastprice"])
        for peer, ratio in row["ratios"].items():
            found.setdefault((row["family"], peer), []).append(ratio["p50"])
    return [
        {
            "family": family,
            "peer": peer,
            "cases": len(values),
            "mean": geometric_mean(values),
            "smallest": min(values),
            "largest": max(values),
            "share_of_limit": geometric_mean(shares[family]),
        }
        for (family, peer), values in found.items()
    ]


def line_of(row: Row) -> str:
    """One row as a line of text for the screen."""
    kind, status = row["case"].get("kind", ""), row.get("status", "ok")
    what = " ".join(str(row["case"][name]) for name in ("peer", "model", "tokens") if name in row["case"])
    if status != "ok":
        where = " ".join(str(row[name]) for name in ("family", "name") if name in row)
        return f"{where or what or kind}: {status}: {row.get('reason', '')}"
    if kind == "kernels":
        ratios = ", ".join(f"{name} {ratio['p50']:.2f}x" for name, ratio in row["ratios"].items())
        noisy = f" (noisy: {', '.join(row['noisy'])})" if row["noisy"] else ""
        return f"{row['family']} {row['name']}: {row['share_of_limit']['fastprice']:.0%} of the limit; {ratios}{noisy}"
    if kind == "step":
        memory = row["peak_reserved"]
        reserved = f", {memory / 2**30:.2f} GiB reserved" if memory else ""
        return f"{what}: {row['mean_tokens_per_second']:,.0f} tokens/s, {row['steps']} steps{reserved}"
    if kind == "predict":
        rates = ", ".join(f"{name} {each['p50']:,.0f} items/s" for name, each in row["items_per_second"].items())
        return f"{what}: {rates}"
    if kind == "estimate":
        error = f", off by {row['error']:+.1%}" if "error" in row else ", nothing measured to compare with"
        return f"{row['model']} {row['peer']}: {row['estimated_reserved'] / 2**30:.2f} GiB estimated{error}"
    if "limits" in row:
        copied, multiplied = row["limits"]["copy_bytes_per_second"] / 1e9, row["limits"]["matmul_flops"] / 1e12
        return f"copy {copied:,.0f} GB/s, matmul {multiplied:,.2f} TFLOP/s"
    if "environment" in row:
        return f"{row['environment']['device']}, commit {row['environment']['commit']}"
    return what or kind


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers; NaN for none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def _median(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _spread(ordered: Sequence[float]) -> float:
    return (ordered[-1] - ordered[0]) / _median(ordered)


def _most(rows: Sequence[Row], name: str) -> int | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return max(values) if values else None
