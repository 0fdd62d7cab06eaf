"""`fastprice plan` for one GPU; arithmetic alone, so no model and no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml
from tests.paths import DOCS

from fastprice.config import read_config
from fastprice.memory import estimate_memory, parse_bytes

Run = Callable[..., tuple[int, str, str]]


def test_a_plan_shows_what_fits_and_how_to_run_it(fastprice: Run) -> None:
    status, output, error = fastprice("plan", "--base", "Llama-3.1-8B", "--gpu", "24GiB")
    assert status == 0, error
    for part in ("qlora", "expected peak", "tokens/s", "next larger"):
        assert part in output
    settings = yaml.safe_load(output[output.index("model:") :].partition("base: the shape")[0])
    assert settings["model"]["base"] == "Llama-3.1-8B"
    assert settings["train"]["pack_tokens"] >= 512


def test_the_settings_of_a_plan_are_settings_of_train(fastprice: Run) -> None:
    _, output, _ = fastprice("plan", "--base", "Qwen2.5-0.5B", "--gpu", "8GiB")
    assert "name its hub id or folder" in output
    settings = yaml.safe_load(output[output.index("model:") :].partition("base: the shape")[0])
    read_config(None, {**settings, "data.file": "x", "out": "y"})


def test_a_model_too_large_for_the_gpu_is_offloaded_within_the_limit_that_its_run_needs(fastprice: Run) -> None:
    status, output, error = fastprice("plan", "--base", "unsloth/Llama-3.1-70B", "--gpu", "24GiB")
    assert status == 0, error
    assert "of 80 layers offloaded to the host" in output
    settings = yaml.safe_load(output[output.index("model:") :])
    assert parse_bytes(settings["model"]["max_memory"]) == 24 * 2**30
    read_config(None, {**settings, "data.file": "x", "out": "y"})
    status, _, error = fastprice("plan", "--base", "unsloth/Llama-3.1-70B", "--gpu", "24GiB", "--resident")
    assert status == 2
    assert "does not fit" in error
    status, _, error = fastprice("plan", "--base", "unsloth/Llama-3.1-70B", "--gpu", "24GiB", "--engine", "unsloth")
    assert status == 2


def test_the_plot_shows_the_step_and_its_file_is_checked(fastprice: Run, tmp_path: Path) -> None:
    status, output, error = fastprice("plan", "--gpu", "24GiB", "--plot", tmp_path / "memory.svg")
    assert status == 0, error
    drawn = (tmp_path / "memory.svg").read_text()
    assert drawn.startswith("<?xml")
    assert str(tmp_path / "memory.svg") in output
    for wrong, part in ((tmp_path / "memory.txt", ".png, .svg, .pdf"), (tmp_path / "no" / "m.png", "not exist")):
        status, _, error = fastprice("plan", "--plot", wrong)
        assert status == 2
        assert part in error


def test_the_moments_of_a_step_hold_its_peak() -> None:
    estimate = estimate_memory("Llama-3.2-1B", tokens=2048, recompute=4)
    assert [name for name, _ in estimate.step] == ["forward", "loss head", "backward", "optimizer"]
    assert max(sum(parts.values()) for _, parts in estimate.step) == estimate.peak_bytes
    assert dict(estimate.step)[estimate.moment] == estimate.breakdown


def test_the_table_of_all_models_and_sizes_is_the_one_in_the_guide(fastprice: Run) -> None:
    status, output, _ = fastprice("plan", "--all")
    assert status == 0
    for part in ("Llama-3.1-8B", "Qwen2.5-0.5B", "80 GiB"):
        assert part in output
    guide = DOCS / "fit.md"
    assert output.strip() in guide.read_text(encoding="utf-8"), "paste what `fastprice plan --all` prints"


def test_what_does_not_fit_or_does_not_exist_is_one_line(fastprice: Run) -> None:
    for arguments, parts in (
        (("--base", "Llama-3.1-70B", "--gpu", "4GiB"), ("does not fit", "needs")),
        (("--base", "Llama-3.1-9B"), ("did you mean",)),
        (("--gpu", "plenty"), ("not a size",)),
    ):
        status, _, output = fastprice("plan", *arguments)
        assert status == 2
        assert output.count("\n") == 1
        for part in parts:
            assert part in output
