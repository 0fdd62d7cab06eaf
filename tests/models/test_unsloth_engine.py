"""Unsloth's own code under fastprice's steps, and every Unsloth name that fastprice calls, with its parameters.

Unsloth loads no model without a GPU, but it can be imported, and its forwards run on a CPU with stand-ins for its norm
and rotary embedding (`unsloth_program`), in a process of its own since it patches what it finds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires
from importlib.util import find_spec
from typing import Any

import pytest
from tests.paths import ROOT

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "mistral-window", "gemma"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    folder = tmp_path_factory.mktemp("unsloth")
    environment = {
        **os.environ,
        "UNSLOTH_ALLOW_CPU": "1",
        "UNSLOTH_COMPILE_LOCATION": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.models.unsloth_program"],
        capture_output=True, text=True, env=environment, cwd=folder, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found:"))[6:])


def test_unsloth_has_every_name_and_parameter_that_is_used(found: Any) -> None:
    contract = found["contract"]
    for name, parameters in contract["required"].items():
        missing = set(parameters) - set(contract["signatures"][name])
        assert not missing, f"{name} has no {missing}"
    assert contract["packed"] == contract["packed required"]
    assert {"seq_info", "sliding_window"} <= set(contract["context"])
    assert "flash_varlen_kwargs" in contract["config"]
    assert contract["norm"][:2] == ["layernorm", "X"]
    assert contract["transforms"] == [30.0, 0, 0]
    assert contract["overlength"]


def test_unsloth_leaves_checkpointing_to_pytorch_and_transformers(found: Any) -> None:
    assert found["contract"]["checkpoint"] == "torch.utils.checkpoint"
    assert found["contract"]["layer"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_trains_as_its_texts_one_by_one_at_every_level(found: Any, family: str) -> None:
    apart = found["families"][family]["apart"]
    assert set(apart) == {"none", "selective", "mlp", "full", "offload", "mixed", "static"}
    assert max(apart.values()) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_change_what_a_step_saves(found: Any, family: str) -> None:
    saved = found["families"][family]["saved"]
    assert saved["full"] < saved["mixed"] < saved["none"]
    assert saved["full"] < saved["none"] / 2.5
    assert saved["mlp"] < 0.9 * saved["none"]
    # Unsloth's norms are functions of its own, of which nothing can be recomputed alone, and the MLP is one kernel.
    assert saved["selective"] == saved["none"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_computes_labeled_rows_alone(found: Any, family: str) -> None:
    family_found = found["families"][family]
    assert family_found["rows"] == [family_found["labels"]]
    assert family_found["skipped"] == {}
    kernels = {"completion_cross_entropy", "last layer at labeled positions", "lora_linear", "lora_mlp"}
    assert kernels | ({"lora_qkv"} if family != "qwen2" else set()) <= set(family_found["replaced"])


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_a_pack_do_not_see_each_other(found: Any, family: str) -> None:
    same_without_it, same_with_its_labels = found["families"][family]["other text"]
    assert same_without_it
    assert not same_with_its_labels


def test_levels_outlive_what_unsloths_trainer_and_generation_switch(found: Any) -> None:
    levels = [True, False, True, False]
    assert found["switches"] == {
        "trainer": levels,
        "in prediction": [False] * 4,
        "after evaluation": levels,
        "after removal": [False] * 4,
        "own": [False] * 4,
        "overlength": True,
    }


def test_training_on_unsloths_layers_takes_the_steps_of_training_on_peft(found: Any) -> None:
    """With TRL's own trainer: Unsloth's exists only with a GPU."""
    theirs, stock = found["training"], found["peft training"]
    assert theirs["losses"] == pytest.approx(stock["losses"], rel=1e-4)
    assert len(stock["losses"]) > 4
    assert stock["losses"][-1] < stock["losses"][0]
    assert (theirs["tokens"], theirs["evaluations"]) == (stock["tokens"], 2)
    assert theirs["levels"] == ["[True, False, True, True]"]
    assert stock["levels"] == ["[False, False, False, False]"]


def test_uninstall_restores_unsloths_step_bit_for_bit(found: Any) -> None:
    restored = found["restored"]
    assert restored["attributes"]
    assert restored["bits"]
    assert restored["apart"] < 1e-5


def test_gemma_2_is_refused(found: Any) -> None:
    assert "texts of a pack would attend to each other in Unsloth's gemma2" in found["gemma2"]


def test_the_gpu_extra_asks_for_this_years_unsloth() -> None:
    (floor,) = [line for line in requires("fastprice") or [] if line.startswith("unsloth>")]
    assert re.search(r"unsloth>=2026\.10", floor)
