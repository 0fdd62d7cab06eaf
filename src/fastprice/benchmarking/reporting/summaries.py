"""Summaries of a run's rows: which peers agree with the stock path, and how many times as fast fastprice is.

No ratio is made from a run whose loss or gradient norm is off, nor from one that is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import geometric_mean, median
from typing import Any

from fastprice.benchmarking.peers import FASTPRICE, STOCK

__all__ = [
    "PHASES",
    "WORTH_TIMING",
    "agreement",
    "ok_rows",
    "run_agreement",
    "step_groups",
    "summarize_kernels",
    "summarize_runs",
    "summarize_steps",
]

Row = Mapping[str, Any]

# Seconds at the copy rate from which a kernel's share of the limit means something: below, the launch is what costs.
WORTH_TIMING = 40e-6
# Relative difference of the loss after two runs that the order of their texts explains, beside that of packing itself.
_RUN_BAND = 0.02

# Of a step; "between" is optimizer, loading of data, all else that a trainer does.
PHASES = ("forward", "backward", "between")
# Largest relative difference of loss and of gradient norm between two right engines in one dtype. TRL keeps adapters in
# bf16 and fastprice in fp32, so even fp32 runs differ by the rounding of A and B.
_BANDS = {"float32": (1e-3, 5e-3), "bfloat16": (1e-2, 6e-2), "float16": (5e-3, 3e-2)}


def ok_rows(rows: Iterable[Row], kind: str) -> list[Row]:
    """The rows of workers of `kind` that hold figures."""
    return [row for row in rows if row["case"].get("kind") == kind and row.get("status") == "ok"]


def agreement(row: Row, reference: Row) -> dict[str, Any]:
    """The relative differences of two checks, and whether the dtype's band allows them."""
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
    for group, peers in step_groups(rows).items():
        reference = next((peers[name][0] for name in STOCK if name in peers), None)
        entries = [_summarize_peer(group, rounds, reference, limits) for rounds in peers.values()]
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


def _summarize_peer(
    group: tuple[str, int, int, int], rounds: Sequence[Row], reference: Row | None, limits: Mapping[str, Any]
) -> dict[str, Any]:
    """The entry of one peer of a group, without its ratio; `reference` is the stock row that it is checked against."""
    model, tokens, rank, cap = group
    first = rounds[0]
    rates = sorted(row["tokens_per_second"]["p50"] for row in rounds)
    middle = median(rates)
    checks = [agreement(row, reference) for row in rounds] if reference else []
    return {
        "model": model,
        "tokens": tokens,
        "rank": rank,
        "cap_bytes": cap,
        "peer": first["peer"],
        "dtype": first["dtype"],
        "attention": first["settings"].get("attention", "-"),
        "best_attention": first["settings"].get("best_attention", True),
        "trajectory_error": None if reference is None else _trajectory_error(first, reference),
        "rounds": len(rounds),
        "rates": rates,
        "tokens_per_second": middle,
        "items_per_second": median(row["items_per_second"]["p50"] for row in rounds),
        "step_seconds": first["step_seconds"],
        "phase_seconds": first["phase_seconds"],
        "load_seconds": first["load_seconds"],
        "load_host_bytes": first["load_host_bytes"],
        "noisy": any(row["step_seconds"]["noisy"] for row in rounds) or (rates[-1] - rates[0]) / middle > 0.05,
        "peak_allocated": _largest(rounds, "peak_allocated"),
        "peak_reserved": _largest(rounds, "peak_reserved"),
        "flop_utilization": middle * first["flops_per_token"] / limits["matmul_flops"] if limits else None,
        "check": checks[0] if checks else None,
        "ok": bool(checks) and all(check["ok"] for check in checks),
        "ratio": None,
    }


def _trajectory_error(row: Row, reference: Row) -> float | None:
    """The largest relative difference of the losses over the same few updates; None where one was not taken."""
    pairs = list(zip(row.get("trajectory") or (), reference.get("trajectory") or (), strict=False))
    return max((abs(ours - theirs) / abs(theirs) for ours, theirs in pairs), default=None)


def summarize_runs(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry a peer of the whole training runs: medians of its rounds, the losses, fastprice's ratio to it.

    `ratio` is the median of the rounds' own ratios of items a second, None for fastprice itself and where the loss of
    either side is off (`run_agreement`).
    """
    groups: dict[tuple[str, int, int], dict[str, list[Row]]] = {}
    for row in ok_rows(rows, "run"):
        key = (row["case"]["model"], row["items"], row["case"]["tokens"])
        groups.setdefault(key, {}).setdefault(row["peer"], []).append(row)
    summary: list[dict[str, Any]] = []
    for (model, items, tokens), peers in groups.items():
        losses = {peer: median(row["loss_after"] for row in rounds) for peer, rounds in peers.items()}
        agreed = run_agreement(losses, before=next(iter(peers.values()))[0]["loss_before"])
        ours = next((name for name in FASTPRICE if name in peers and agreed[name]), None)
        for peer, rounds in peers.items():
            rates = [row["items_per_second"] for row in rounds]
            ratio = None
            if ours is not None and peer not in FASTPRICE and agreed[peer]:
                theirs = {row["round"]: row["items_per_second"] for row in rounds}
                both = [row for row in peers[ours] if row["round"] in theirs]
                ratio = median(row["items_per_second"] / theirs[row["round"]] for row in both) if both else None
            summary.append(
                {
                    "model": model,
                    "items": items,
                    "tokens": tokens,
                    "peer": peer,
                    "rounds": len(rounds),
                    "steps": rounds[0]["steps"],
                    "items_per_second": median(rates),
                    "noise": (max(rates) - min(rates)) / median(rates),
                    "tokens_per_second": median(row["tokens_per_second"] for row in rounds),
                    "attention": rounds[0]["settings"].get("attention", "-"),
                    "best_attention": rounds[0]["settings"].get("best_attention", True),
                    "peak_reserved": _largest(rounds, "peak_reserved"),
                    "host_peak": _largest(rounds, "host_peak"),
                    "loss_before": rounds[0]["loss_before"],
                    "loss_after": losses[peer],
                    "ok": agreed[peer],
                    "ratio": ratio,
                }
            )
    return sorted(summary, key=lambda entry: entry["items_per_second"])


def run_agreement(losses: Mapping[str, float], *, before: float) -> dict[str, bool]:
    """Which runs learned as much as the stock ones, by the loss on unseen texts.

    Packing puts other texts together in a step, so losses differ: stock TRL's own packed and padded runs show by how
    much. A loss may differ from the nearest stock one by that and 2 %, and must be below the one `before` training.
    """
    stock = [loss for peer, loss in losses.items() if peer in STOCK]
    if not stock:
        return dict.fromkeys(losses, False)
    band = max(stock) - min(stock)
    return {
        peer: bool(loss < before and min(abs(loss - each) for each in stock) <= band + _RUN_BAND * min(stock))
        for peer, loss in losses.items()
    }


def summarize_kernels(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For each family and peer: over how many cases, geometric mean, smallest and largest of the median ratios (peer
    over fastprice: above 1 is faster), and the share of the limit that fastprice reaches (geometric mean over the cases
    of at least `WORTH_TIMING` at the limit; None without one)."""
    found: dict[tuple[str, str], list[float]] = {}
    shares: dict[str, list[float]] = {}
    for row in ok_rows(rows, "kernels"):
        of_limit = shares.setdefault(row["family"], [])
        if row["floor_seconds"] >= WORTH_TIMING:
            of_limit.append(row["share_of_limit"]["fastprice"])
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
            "share_of_limit": geometric_mean(shares[family]) if shares[family] else None,
        }
        for (family, peer), values in found.items()
    ]


def _largest(rows: Sequence[Row], name: str) -> int | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return max(values) if values else None
