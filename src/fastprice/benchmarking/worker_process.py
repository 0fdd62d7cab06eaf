"""One measurement in its own process: `python -m fastprice.benchmarking.worker_process '{"kind": "step", ...}'`.

Each row of figures is printed as one line as soon as it is known, so that a worker that is stopped or dies leaves the
rows before. All other lines are output of libraries. A failure is a row too: the exception's class and first line.

kinds:  environment   the machine and its limits
        kernels       families, model, tokens, seconds a case, unsloth: one row a comparison
        bandwidth     dequantization's share of the copy rate, a row a shape (copy_bandwidth.py)
        folder        writes `model` with random NF4 weights to `folder`; "shipped nano": the real weights
        load          one way of loading the model in `folder`, a row a round (model_loading.py)
        step          one peer's training steps (peer_training.py)
        run           one peer's whole training run, for each line on standard input (training_runs.py, turn_takers.py)
        predict       prices a second: the distribution, and generate + a regular expression, in turns
        estimate      the memory estimate for each measured step of `steps`
        offload       training through PriceEstimator, resident or under a memory cap with layers offloaded to the host
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "ROW_MARK", "failure_row", "main"]

ROW_MARK = "FASTPRICE-ROW "

Row = dict[str, Any]
Case = Mapping[str, Any]


def main(arguments: list[str]) -> int:
    """Runs the case given as JSON and prints its rows; returns 0 also when the row says that it failed."""
    case = json.loads(arguments[0])
    began = time.perf_counter()
    try:
        if case.get("cap_bytes"):
            _cap_memory(case["cap_bytes"])
        for row in KINDS[case["kind"]](case):
            _print_row({"status": "ok", **row})
    except Exception as error:  # a peer may raise anything, and that is this case's result
        _print_row({"status": "failed", **failure_row(error), "seconds_in_all": time.perf_counter() - began})
    return 0


def failure_row(error: BaseException) -> Row:
    """The exception in one line, and whether it was for want of GPU memory."""
    import torch

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    oom = isinstance(error, torch.cuda.OutOfMemoryError) or any("out of memory" in line.lower() for line in lines)
    return {"reason": f"{type(error).__name__}: {lines[0] if lines else ''}"[:400], "oom": oom}


def _print_row(row: Row) -> None:
    # A library may have left half a line on standard output.
    sys.stdout.write(f"\n{ROW_MARK}{json.dumps(row)}\n")
    sys.stdout.flush()


def _cap_memory(cap: int) -> None:
    """Lets this process allocate `cap` bytes of the GPU, as if it were a smaller card; ignored on a CPU.

    The cap is on PyTorch's allocator, so the CUDA context (some 500 MB) comes on top, as on a real card.
    """
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), 0)


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _environment(case: Case) -> Iterator[Row]:
    from fastprice.benchmarking.environment import doctor_warnings, environment, measure_limits

    yield {"environment": environment(case.get("commit")), "warnings": doctor_warnings()}
    yield {"limits": measure_limits(_device(), case["seconds"])}


def _kernels(case: Case) -> Iterator[Row]:
    import torch

    from fastprice.benchmarking.kernel_cases import kernel_cases
    from fastprice.benchmarking.kernel_comparison import KernelSettings, run_comparison
    from fastprice.models.peft_engine import compute_dtype

    if case["unsloth"]:
        import fastprice.models.unsloth_engine  # noqa: F401  (before anything that it patches)
    device = _device()
    settings = KernelSettings(case["model"], case["tokens"], device, compute_dtype(), case["unsloth"])
    for each in kernel_cases(case["families"], settings):
        if case.get("name") not in (None, each.name):
            continue
        try:
            row = run_comparison(
                each, device, case["limits"], case["seconds"], ways=case.get("ways"), samples=case.get("samples", False)
            )
            yield {**row, "unsloth": case["unsloth"]}
        except Exception as error:  # one case that fails leaves the others
            yield {"status": "failed", **failure_row(error)}
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _folder(case: Case) -> Iterator[Row]:
    from fastprice.benchmarking.random_models import model_config, random_nf4_model, save_model
    from fastprice.models.peft_engine import compute_dtype

    if case["model"] == "shipped nano":
        from fastprice.benchmarking.training_runs import save_shipped_nano

        folder = save_shipped_nano(Path(case["folder"]))
        yield {"bytes": sum(file.stat().st_size for file in folder.iterdir())}
        return
    began = time.perf_counter()
    model = random_nf4_model(model_config(case["model"]), _device(), compute_dtype())
    made = time.perf_counter()
    folder = save_model(model, Path(case["folder"]))
    size = sum(file.stat().st_size for file in folder.iterdir())
    yield {"bytes": size, "make_seconds": made - began, "save_seconds": time.perf_counter() - made}


def _step(case: Case) -> Iterator[Row]:
    from fastprice.benchmarking.peer_training import TrainingCase, train_steps

    sizes = {name: case[name] for name in ("tokens", "batch", "rank", "steps", "seconds")}
    yield train_steps(case["peer"], TrainingCase(case["folder"], **sizes))


def _bandwidth(case: Case) -> Iterator[Row]:
    import torch

    from fastprice.benchmarking.copy_bandwidth import dequantize_bandwidth

    for (n, k), name in case["shapes"]:
        yield dequantize_bandwidth((n, k), getattr(torch, name), _device(), case["copy_bytes_per_second"])


def _load(case: Case) -> Iterator[Row]:
    from fastprice.benchmarking.model_loading import load_rounds

    yield from load_rounds(case["way"], case["folder"], case["rounds"])


def _run(case: Case) -> Iterator[Row]:
    import gc

    import torch

    from fastprice.benchmarking.peers import PEERS
    from fastprice.benchmarking.training_runs import run_training

    if "unsloth" in (PEERS[case["peer"]].trainer, PEERS[case["peer"]].engine):
        import fastprice.models.unsloth_engine  # noqa: F401  (before anything that it patches)
    import trl  # noqa: F401

    sizes = {name: case[name] for name in ("folder", "items", "tokens", "rank")}
    yield {"ready": True}
    for _ in sys.stdin:
        yield run_training(case["peer"], **sizes)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _predict(case: Case) -> Iterator[Row]:
    from fastprice.benchmarking.prediction import compare_prediction

    yield compare_prediction(case["folder"], items=case["items"], batch=case["batch"], seconds=case["seconds"])


def _estimate(case: Case) -> Iterator[Row]:
    from fastprice.benchmarking.memory_estimates import compare_estimates

    yield from compare_estimates(case["steps"])


def _offload(case: Case) -> Iterator[Row]:
    from fastprice.benchmarking.offloaded_training import train_offloaded

    yield train_offloaded(case["folder"], cap_bytes=case["cap_bytes"], tokens=case["tokens"], rank=case["rank"])


KINDS: dict[str, Callable[[Case], Iterator[Row]]] = {
    "environment": _environment,
    "kernels": _kernels,
    "bandwidth": _bandwidth,
    "folder": _folder,
    "load": _load,
    "step": _step,
    "run": _run,
    "predict": _predict,
    "estimate": _estimate,
    "offload": _offload,
}

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
