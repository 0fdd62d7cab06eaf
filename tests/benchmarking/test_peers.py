from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from fastprice.benchmarking import peers
from fastprice.benchmarking.peer_training import TrainingCase
from fastprice.benchmarking.peers import FASTPRICE, HEADLINE, PEERS, RUN_PEERS, STOCK


def test_the_lists_name_peers() -> None:
    assert {*HEADLINE, *RUN_PEERS, *STOCK, *FASTPRICE} <= set(PEERS)
    assert tuple(PEERS)[:3] == HEADLINE, "the headline comes first in a round"


def test_a_peer_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    assert all(peer.missing(cuda=True) is None for peer in PEERS.values())
    without = {name: peer.missing(cuda=False) for name, peer in PEERS.items()}
    assert {name for name, reason in without.items() if reason} == {
        "unsloth", "unsloth-equal", "unsloth-tuned", "unsloth-kernels", "peft-graphs",
    }  # fmt: skip
    assert without["peft-graphs"] == "CUDA graphs need a CUDA device"

    def no_unsloth(name: str) -> Any:
        return None if name == "unsloth" else importlib.util.find_spec("json")

    monkeypatch.setattr(peers, "find_spec", no_unsloth)
    assert PEERS["unsloth-tuned"].missing(cuda=True) == "unsloth not installed"
    assert PEERS["unsloth-kernels"].missing(cuda=True) == "unsloth not installed"
    assert PEERS["trl-packed"].missing(cuda=True) is None


def test_equal_tokens_are_as_many_rows_as_hold_a_pack() -> None:
    case = TrainingCase("", tokens=4096, batch=4, rank=16, steps=1, seconds=1.0)
    assert case.rows_of(PEERS["unsloth"]) == 4
    assert case.rows_of(PEERS["unsloth-equal"]) == 29
