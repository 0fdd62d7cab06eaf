"""`doctor` says which engine "auto" takes, and why."""

from __future__ import annotations

import pytest

from fastprice import doctor
from fastprice.models import engine_choice


def lines() -> list[str]:
    return [finding.what for finding in doctor.examine() if "engine=" in finding.what]


def test_it_says_which_engine_auto_takes_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "unsloth_missing", lambda: "it is not installed")
    assert lines() == ["engine='auto' is peft: unsloth cannot run here: it is not installed"]
    monkeypatch.setattr(engine_choice, "unsloth_missing", lambda: "")
    monkeypatch.setattr("fastprice.training.step_options.uses_kernels", lambda kernels: True)
    with_kernels, without = lines()
    assert with_kernels.startswith("engine='auto' is peft: on fastprice's kernels it moves fewer bytes")
    assert without.startswith("engine='auto' with kernels='off' is unsloth: ")
