"""`fastprice plan` as a person with one GPU asks it; arithmetic alone, so no model and no GPU."""

from __future__ import annotations

from collections.abc import Callable

import yaml

Run = Callable[..., tuple[int, str, str]]


def test_a_plan_says_what_fits_and_how_to_run_it(fastprice: Run) -> None:
    status, said, told = fastprice("plan", "--base", "Llama-3.1-8B", "--gpu", "24GiB")
    assert status == 0, told
    for part in ("qlora", "expected peak", "tokens/s", "next larger"):
        assert part in said
    settings = yaml.safe_load(said[said.index("model:") :])
    assert settings["model"]["base"] == "Llama-3.1-8B"
    assert settings["train"]["pack_tokens"] >= 512


def test_the_settings_of_a_plan_are_settings_of_train(fastprice: Run) -> None:
    from fastprice.config import RunConfig

    _, said, _ = fastprice("plan", "--base", "Qwen2.5-0.5B", "--gpu", "8GiB")
    settings = yaml.safe_load(said[said.index("model:") :])
    RunConfig.model_validate({**settings, "data": {"file": "x"}, "out": "y"})


def test_the_table_of_all_models_and_sizes(fastprice: Run) -> None:
    status, said, _ = fastprice("plan", "--all")
    assert status == 0
    for part in ("Llama-3.1-8B", "Qwen2.5-0.5B", "80 GiB"):
        assert part in said


def test_what_does_not_fit_or_does_not_exist_is_one_line(fastprice: Run) -> None:
    for arguments, parts in (
        (("--base", "Llama-3.1-70B", "--gpu", "8GiB"), ("does not fit", "needs")),
        (("--base", "Llama-3.1-9B"), ("did you mean",)),
        (("--gpu", "plenty"), ("not a size",)),
    ):
        status, _, said = fastprice("plan", *arguments)
        assert status == 2
        assert said.count("\n") == 1
        for part in parts:
            assert part in said
