from __future__ import annotations

import pytest
from tests.benchmarking.fake_cuda import FakeCuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A CUDA device that is not there."""
    return FakeCuda().install(monkeypatch)
