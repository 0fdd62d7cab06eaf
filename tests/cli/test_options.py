"""Every setting is an option of `train`, with its type and default in the help, and reaches the run as it was given."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from fastprice.config import RunConfig, list_settings

Run = Callable[..., tuple[int, str, str]]

COMMANDS = ("demo", "train", "inspect", "predict", "evaluate", "explain", "compare", "plan", "bench", "doctor",
            "quantize", "settings")  # fmt: skip


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The settings with which `fastprice train` would start a run."""
    runs: list[RunConfig] = []
    monkeypatch.setattr("fastprice.run.train_and_evaluate", lambda config, console: runs.append(config))
    return runs


def test_every_setting_is_an_option_of_train_with_its_help(fastprice: Run) -> None:
    status, printed, _ = fastprice("train", "--help")
    assert status == 0
    words = " ".join(printed.replace("│", " ").split())
    for setting in list_settings():
        assert f" {setting.option} " in words
        assert setting.help in words
    assert "Passes over the training items. Above 0. [default: 1.0]" in words
    for panel in ("data: where the items come from", "train: how long, how fast", " run ", " model: the base model"):
        assert panel in words
    assert "auto|peft|unsloth" in words


def test_options_reach_the_run_and_override_the_file(fastprice: Run, received: list[RunConfig], tmp_path: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {file: a.csv}\nout: x\ntrain: {epochs: 9, batch_size: 7}\nsplit: {near_duplicates: false}\n")
    status, _, error = fastprice(
        "train", path, "--text", "title", "details", "--epochs", 2, "--rank", 4, "--max-memory", "24GiB", "--kernels",
        "off", "--set", "train.warmup_ratio=0.5", "--seed", 3,
    )  # fmt: skip
    assert status == 0, error
    (config,) = received
    assert config.data.text == ["title", "details"]
    assert (config.train.epochs, config.train.batch_size, config.train.warmup_ratio) == (2.0, 7, 0.5)
    assert (config.model.rank, config.model.max_memory, config.model.kernels, config.seed) == (4, "24GiB", "off", 3)
    assert config.split.near_duplicates is False, "an option that was not given must not override the file"
    fastprice("train", path, "--near-duplicates", "--epochs", "1.0", "--limit", 50)
    assert received[1].split.near_duplicates is True
    assert received[1].train.epochs == 1.0, "an option that repeats the default overrides the file"
    assert received[1].data.limit == 50


def test_every_wrong_option_is_reported_at_once(fastprice: Run, received: list[RunConfig]) -> None:
    status, _, error = fastprice("train", "--data", "a.csv", "--rank", 0, "--epochs", "many", "--set", "modle.rank=3")
    assert status == 2
    for part in ("model.rank: must be an integer, above 0, not '0'", "train.epochs: must be a number", "--out DIR",
                 "modle: unknown key (did you mean 'model'?)"):  # fmt: skip
        assert part in error
    assert error.count("\n") == 1
    assert not received


def test_inspect_and_compare_offer_what_they_use(fastprice: Run) -> None:
    for command, wants in (("inspect", ("--mask", "--max-tokens", "--seed")), ("compare", ("--base", "--limit"))):
        _, printed, _ = fastprice(command, "-h")
        for option in wants:
            assert f" {option} " in printed
        assert "--epochs" not in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(fastprice: Run, command: str) -> None:
    status, printed, _ = fastprice(command, "-h")
    assert status == 0
    assert f"usage: fastprice {command}" in printed.lower()


def test_no_arguments_list_the_commands(fastprice: Run) -> None:
    status, printed, _ = fastprice()
    assert status == 0
    for command in COMMANDS:
        assert f" {command} " in printed


def test_usage_errors_are_one_line(fastprice: Run) -> None:
    for arguments, part in (
        (("trian",), "Did you mean 'train'?"),
        (("train", "--ranks", "3"), "--rank"),
        (("explain",), "Missing option '--model'"),
        (("inspect", "--examples", "none"), "--examples"),
    ):
        status, _, error = fastprice(*arguments)
        assert status == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert part in error


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'polars', 'sklearn', 'pandas', 'matplotlib', 'datasets'}"
    program = (
        "import sys; sys.argv = ['fastprice', '--help']\n"
        "from fastprice.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        f"print('heavy:', sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout
    assert "demo" in done.stdout
