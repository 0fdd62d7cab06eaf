"""Rows and result files as the suite writes them, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

LIMITS = {"copy_bytes_per_second": 1e12, "matmul_flops": 1e14, "matmul": "8192^3 bfloat16"}


def step_row(peer: str, rate: float, *, loss: float = 11.0, norm: float = 2.0, noise: float = 0.01) -> dict[str, Any]:
    return {
        "stage": "steps",
        "case": {"kind": "step", "peer": peer, "model": "llama-3.2-1b", "tokens": 4096, "rank": 16},
        "status": "ok",
        "peer": peer,
        "settings": {"attention": "sdpa"},
        "dtype": "bfloat16",
        "check_loss": loss,
        "check_gradient_norm": norm,
        "tokens_per_second": {"p50": rate},
        "items_per_second": {"p50": rate / 140},
        "step_seconds": {"p20": 1.0, "p50": 1.0, "p80": 1.0, "count": 9, "noise": noise, "noisy": noise > 0.05},
        "phase_seconds": {"forward": {"p50": 0.3}, "backward": {"p50": 0.6}, "between": {"p50": 0.1}},
        "load_seconds": 12.0,
        "load_host_bytes": 5 * 2**30,
        "flops_per_token": 4e9,
        "peak_allocated": 2 * 2**30,
        "peak_reserved": 3 * 2**30,
        "memory_curve": [[0.0, 2**30], [0.5, 2 * 2**30], [1.0, 2**30]],
        "steps": 9,
    }


def kernel_row(ours: float, peer: float) -> dict[str, Any]:
    times = {"fastprice": {"p50": ours, "noise": 0.01}, "bitsandbytes": {"p50": peer, "noise": 0.01}}
    return {
        "stage": "kernels",
        "case": {"kind": "kernels"},
        "status": "ok",
        "family": "dequantize",
        "name": "4096x4096 bfloat16",
        "unsloth": False,
        "seconds": times,
        "ratios": {"bitsandbytes": {"p50": peer / ours}},
        "share_of_limit": {"fastprice": 0.8, "bitsandbytes": 0.5},
        "floor_seconds": 8e-5,
        "flops": 1e9,
        "bytes_moved": 1e7,
        "noisy": [],
    }


def run_row(peer: str, rate: float, *, loss: float = 3.0, number: int = 0) -> dict[str, Any]:
    return {
        "stage": "runs",
        "case": {"kind": "run", "peer": peer, "model": "shipped nano", "items": 600, "tokens": 512},
        "status": "ok",
        "peer": peer,
        "round": number,
        "settings": {"attention": "sdpa"},
        "items": 600,
        "tokens": 40_000,
        "steps": 80,
        "items_per_second": rate,
        "tokens_per_second": 66 * rate,
        "loss_before": 6.0,
        "loss_after": loss,
        "host_peak": 2**30,
        "peak_reserved": None,
    }


def result(*rows: dict[str, Any], kind: str = "gpu", device: str = "Some GPU", time: str = "2026-11-21") -> Any:
    about = {
        "kind": kind,
        "device": device,
        "time": f"{time}T00:00:00",
        "commit": "abc",
        "versions": {"torch": "2.11.0"},
    }
    return {"format": 1, "environment": about, "limits": LIMITS, "rows": list(rows)}


def static_row(case: str = "nf4", target: int = 90, **changes: Any) -> dict[str, Any]:
    return {
        "case": case, "target": target, "registers": 40, "spills": 0, "shared_bytes": 1024, "store_bits": 128,
        "instructions_per_element": 6.4, "tensor_cores": {"HGMMA": 2}, **changes,
    }  # fmt: skip
