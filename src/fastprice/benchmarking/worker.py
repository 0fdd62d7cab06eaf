"""One measurement in a process of its own: `python -m fastprice.benchmarking.worker '{"kind": "step", ...}'`.

Each row of figures is printed as one line as soon as it is known, so that a worker that is stopped or dies leaves what
it had. Everything else a library prints is noise around those lines. A failure is a row too: its class and first line.

kinds:  environment   what the machine is and reaches at most
        kernels       families, model, tokens, seconds a case, unsloth: one row a comparison
        folder        writes `model` with random NF4 weights to `folder`
        step          one peer's training steps (peers.py)
        predict       prices a second: the distribution, and generate + a regular expression, in turns
        estimate      the memory estimate for each measured step of `steps`
        stream        training through PriceEstimator, resident or under a memory cap with weights from the host
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["MARK", "main", "reason_of"]

MARK = "FASTPRICE-ROW "

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
            _print({"status": "ok", **row})
    except Exception as error:  # whatever a peer raises is this case's result
        _print({"status": "failed", **reason_of(error), "seconds_in_all": time.perf_counter() - began})
    return 0


def reason_of(error: BaseException) -> Row:
    """What happened, in one line, and whether it was a lack of GPU memory."""
    import torch

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    oom = isinstance(error, torch.cuda.OutOfMemoryError) or any("out of memory" in line.lower() for line in lines)
    return {"reason": f"{type(error).__name__}: {lines[0] if lines else ''}"[:400], "oom": oom}


def _print(row: Row) -> None:
    # A library may have left half a line on standard output.
    sys.stdout.write(f"\n{MARK}{json.dumps(row)}\n")
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
    from fastprice.benchmarking.environment import environment, measure_limits, settings_that_spoil

    yield {"environment": environment(case.get("commit")), "spoilers": settings_that_spoil()}
    yield {"limits": measure_limits(_device(), case["seconds"])}


def _kernels(case: Case) -> Iterator[Row]:
    import torch

    from fastprice.benchmarking.comparison import run_comparison
    from fastprice.benchmarking.kernel_cases import cases
    from fastprice.models.peft_engine import compute_dtype

    if case["unsloth"]:
        import fastprice.models.unsloth_engine  # noqa: F401  (before anything that it patches)
    device = _device()
    makers = cases(case["families"], case["model"], case["tokens"], device, compute_dtype(), unsloth=case["unsloth"])
    for make in makers:
        try:
            comparison = make()
            yield {**run_comparison(comparison, device, case["limits"], case["seconds"]), "unsloth": case["unsloth"]}
            del comparison
        except Exception as error:  # one case that fails leaves the others
            yield {"status": "failed", **reason_of(error)}
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _folder(case: Case) -> Iterator[Row]:
    from fastprice.benchmarking.models import model_config, random_nf4_model, save_model
    from fastprice.models.peft_engine import compute_dtype

    began = time.perf_counter()
    model = random_nf4_model(model_config(case["model"]), _device(), compute_dtype())
    made = time.perf_counter()
    folder = save_model(model, Path(case["folder"]))
    size = sum(file.stat().st_size for file in folder.iterdir())
    yield {"bytes": size, "make_seconds": made - began, "save_seconds": time.perf_counter() - made}


def _step(case: Case) -> Iterator[Row]:
    from transformers import AutoConfig

    from fastprice.benchmarking.peers import train_steps

    config = AutoConfig.from_pretrained(case["folder"])
    yield train_steps(
        case["peer"],
        case["folder"],
        tokens=case["tokens"],
        batch=case["batch"],
        rank=case["rank"],
        steps=case["steps"],
        seconds=case["seconds"],
        config=config,
    )


def _predict(case: Case) -> Iterator[Row]:
    from fastprice.benchmarking.prediction import compare_prediction

    yield compare_prediction(case["folder"], items=case["items"], batch=case["batch"], seconds=case["seconds"])


def _estimate(case: Case) -> Iterator[Row]:
    from fastprice.benchmarking.memory import estimated

    yield from estimated(case["steps"])


def _stream(case: Case) -> Iterator[Row]:
    from fastprice.benchmarking.memory import streamed

    yield streamed(case["folder"], cap_bytes=case["cap_bytes"], tokens=case["tokens"], rank=case["rank"])


KINDS: dict[str, Callable[[Case], Iterator[Row]]] = {
    "environment": _environment,
    "kernels": _kernels,
    "folder": _folder,
    "step": _step,
    "predict": _predict,
    "estimate": _estimate,
    "stream": _stream,
}

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
