"""What doctor says about the attention of packs; the rest of its report needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.fused_attention import fused_attention

from fastprice.doctor import attention_finding, examine
from fastprice.models import attention_backends


def test_the_chosen_attention_and_what_is_not_installed() -> None:
    with fused_attention():
        finding = attention_finding("cpu", torch.float32)
    assert (finding.level, finding.what) == ("ok", "attention of packs: varlen; xformers: it is not installed")


def test_a_slow_attention_is_a_warning_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")

    with fused_attention():
        monkeypatch.setattr(attention_backends, "varlen_attention", fails)
        finding = attention_finding("cpu", torch.float32)
    assert finding.level == "warning"
    assert "one call a text" in finding.what
    assert "only supports Ampere" in finding.what


def test_without_a_gpu_nothing_is_said_about_attention() -> None:
    assert not any("attention" in finding.what for finding in examine() if not torch.cuda.is_available())
