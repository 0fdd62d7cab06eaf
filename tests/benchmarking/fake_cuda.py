"""A CUDA device that is not there: tensors stay on the CPU, time is a counter, every call is noted.

It exercises the control flow of code that only CUDA takes; no figure of it means anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

LAUNCH = 0.001  # seconds that everything between two events takes here


class FakeCuda:
    """Installed by `install`; `calls` are the names of the torch.cuda functions called, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.now = 0.0
        self.capture_fails = False
        self.replayed = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = 0.0

            def record(self) -> None:
                fake.now += LAUNCH
                self.at = fake.now

            def elapsed_time(self, other: Event) -> float:
                assert fake.calls[-1] == "synchronize", "events are read when the device has reached them"
                return 1e3 * (other.at - self.at)

        class Graph:
            def replay(self) -> None:
                fake.replayed += 1

        @contextmanager
        def graph(made: Graph) -> Iterator[None]:
            fake.calls.append("graph")
            if fake.capture_fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            yield

        def note(name: str, value: Any = None) -> None:
            def call(*arguments: Any, **named: Any) -> Any:
                fake.calls.append(name)
                return value

            monkeypatch.setattr(torch.cuda, name, call)

        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
            note(name)
        note("is_available", True)
        note("is_bf16_supported", True)
        note("memory_allocated", 100)
        note("memory_reserved", 1000)
        note("max_memory_allocated", 700)
        note("max_memory_reserved", 5000)
        note("get_device_capability", (9, 0))
        note("get_device_properties", SimpleNamespace(L2_cache_size=1024, total_memory=2**34))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        for name in ("empty", "randint", "full", "tensor"):
            monkeypatch.setattr(torch, name, _on_cpu(getattr(torch, name)))
        return self


def _on_cpu(make: Any) -> Any:
    def made(*arguments: Any, **named: Any) -> Any:
        if "device" in named:
            named["device"] = "cpu"
        return make(*arguments, **named)

    return made
