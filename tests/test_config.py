from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastprice.config import (
    EstimatorConfig,
    RunConfig,
    TrainConfig,
    check_params,
    json_schema,
    list_settings,
    read_config,
    section_titles,
)
from fastprice.errors import ConfigError

MINIMAL = "data:\n  file: items.csv\nout: runs/a\n"


def written(folder: Path, content: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(content, encoding="utf-8")
    return path


def test_a_minimal_file_takes_the_defaults_and_one_name_makes_a_list(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, "data: {file: items.csv, text: title}\nout: runs/a\n"))
    assert config.data.text == ["title"]
    assert (config.clean.min_price, config.clean.max_price) == (0.50, 999.49)
    assert config.model.method == "qlora"


def test_read_config_reads_what_to_yaml_writes(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, MINIMAL), {"train.epochs": 3, "model.base": "Qwen/Qwen2.5-0.5B"})
    assert read_config(written(tmp_path, config.to_yaml())) == config


def test_options_override_the_file(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, MINIMAL + "train: {epochs: 9}\n"), {"train.epochs": "2", "seed": "7"})
    assert (config.train.epochs, config.seed) == (2.0, 7), "options are text until they are checked"


def test_on_and_off_need_no_quotes_in_yaml(tmp_path: Path) -> None:
    content = MINIMAL + "model: {kernels: off}\ntrain: {cuda_graphs: on}\nclean: {mask: off}\n"
    config = read_config(written(tmp_path, content), {"train.cuda_graphs": True})  # as --set train.cuda_graphs=on
    assert (config.model.kernels, config.train.cuda_graphs, config.clean.mask) == ("off", "on", "off")
    assert read_config(written(tmp_path, config.to_yaml())) == config
    with pytest.raises(ConfigError, match=r"clean.mask: must be own, prices or off, not 'on'"):
        read_config(written(tmp_path, MINIMAL), {"clean.mask": "on"})


def test_every_error_is_reported_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    content = (
        "modle: {}\ntrain: {epoch: 1, pack_tokens: many, rank: 8}\nsplit: {test: 0.9}\nclean: 5\n"
        "model: {max_memory: lots, recompute: some, engine: unslot}\n"
    )
    path = written(tmp_path, MINIMAL.replace("out: runs/a\n", content))
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    message = str(caught.value)
    for part in (
        "modle: unknown key (did you mean 'model'?)",
        "train.epoch: unknown key (did you mean 'epochs'?)",
        "train.rank: unknown key (did you mean 'model.rank'?)",
        "train.pack_tokens: must be an integer, at least 72, not 'many'",
        "split.test: must be a number, above 0 and below 0.5, not 0.9",
        "model.max_memory: 'lots' is not a size",
        "model.recompute: 'some'",
        "model.engine: must be auto, peft or unsloth, not 'unslot' (did you mean 'unsloth'?)",
        "clean: must hold keys, not 5",
        "name one with --out DIR",
        str(path),
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"data.text": [3]}, "data.text: must be text or a list of texts, not 3"),
        ({"model.max_memory": [1]}, "model.max_memory: must be"),
        ({"train.learning_rate": "inf"}, "train.learning_rate: must be a number, above 0, or null, not 'inf'"),
        ({"clean.min_price": 1000}, "clean.max_price: must be above min_price"),
        ({"model.max_tokens": 2000}, "train: pack_tokens must hold one text with its question: at least"),
        ({"data.limit": 3}, "data.limit: must be an integer, at least 20, or null, not 3"),
        ({"data.synthetic": 100}, "data: give either file"),
        ({"seed": -1}, "seed: must be an integer, at least 0, not -1"),
        ({"out.x": 1}, "out must hold keys, not 'runs/a'"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_reported(tmp_path: Path, overrides: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(written(tmp_path, MINIMAL), overrides)
    assert part in str(caught.value)
    assert "; " not in str(caught.value), "one message a key"


def test_invalid_yaml_names_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"invalid YAML at line 3, column \d+"):
        read_config(written(tmp_path, "data:\n  file: [a, b\nout: x\n"))


@pytest.mark.parametrize("content", ["", "just words", "- a\n- b\n"])
def test_yaml_that_holds_no_keys_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match="not keys"):
        read_config(written(tmp_path, content))


def test_a_missing_file_names_its_neighbor(tmp_path: Path) -> None:
    written(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match=r"no such config file \(did you mean 'run.yaml'\?\)"):
        read_config(tmp_path / "rnu.yaml")


def test_no_data_and_no_out_name_the_option_to_give() -> None:
    with pytest.raises(ConfigError, match="--data FILE"):
        read_config(None, {"out": "x"})
    with pytest.raises(ConfigError, match="--out DIR"):
        read_config(None, {"data.file": "x"})


def test_every_setting_is_described_and_each_name_is_one_setting() -> None:
    settings = list_settings()
    assert len({each.name for each in settings}) == len(settings) == len({each.option for each in settings})
    for each in settings:
        assert each.help.endswith("."), each.key
        assert each.type
        assert each.metavar
    by_key = {each.key: each for each in settings}
    epochs = by_key["train.epochs"]
    assert (epochs.type, epochs.range, epochs.default, epochs.metavar) == (
        "a number, above 0",
        "above 0",
        1.0,
        "NUMBER",
    )
    assert by_key["data.text"].default == ["text"]
    assert by_key["data.file"].option == "--data"
    assert [each.key for each in settings if each.required] == ["out"]
    assert set(section_titles()) == {each.section for each in settings} - {""}


def test_the_schema_holds_types_ranges_and_help() -> None:
    schema = json_schema()
    train = schema["$defs"]["TrainConfig"]["properties"]
    assert train["epochs"] == {
        "default": 1.0, "description": "Passes over the training items.", "exclusiveMinimum": 0, "title": "Epochs",
        "type": "number",
    }  # fmt: skip
    assert schema["required"] == ["data", "out"]
    assert not schema["additionalProperties"]


def test_the_estimator_takes_every_setting_of_model_and_train() -> None:
    from fastprice.estimator import PriceEstimator

    params = read_config(None, {"data.file": "x", "out": "y"}).estimator_params()
    assert params == PriceEstimator().get_params() == asdict(EstimatorConfig())


def test_price_heads_text_losses_and_engines_are_those_that_exist() -> None:
    from fastprice.inference.price_heads import HEADS
    from fastprice.models.engine_choice import ENGINES

    choices = {each.name: each.choices for each in list_settings()}
    assert set(choices["price_head"]) == set(HEADS)
    assert set(choices["engine"]) == set(ENGINES)


def test_parameters_are_checked_all_at_once_and_never_converted() -> None:
    with pytest.raises(ConfigError) as caught:
        check_params({"rank": "8", "epochs": float("nan"), "dropout": True, "pack_tokens": 100, "kernels": "of"})
    message = str(caught.value)
    for part in ("rank: must be an integer, above 0, not '8'", "epochs", "dropout", "pack_tokens: must hold",
                 "kernels: must be auto, on or off, not 'of' (did you mean 'off'?)"):  # fmt: skip
        assert part in message
    assert check_params({"rank": 8, "epochs": 2}) == EstimatorConfig(rank=8, epochs=2.0)


def test_the_estimator_names_the_parameter_that_was_meant_and_takes_numpy_numbers() -> None:
    from fastprice import PriceEstimator

    with pytest.raises(TypeError, match=r"'epoch' \(did you mean 'epochs'\?\), 'rnak' \(did you mean 'rank'\?\)"):
        PriceEstimator(epoch=1, rnak=3)  # type: ignore[call-arg]
    found = PriceEstimator("nano", rank=np.int64(3), epochs=np.float32(0.5))._check_params()
    assert found == EstimatorConfig(rank=3, epochs=0.5)
    assert hash(PriceEstimator()) != hash(PriceEstimator()), "by identity, as scikit-learn's"
    assert repr(PriceEstimator(rank=3)) == "PriceEstimator(rank=3)"
    assert "warmup_ratio (a number, at least 0 and at most 1; default 0.03): Share" in (PriceEstimator.__doc__ or "")


def test_sections_are_plain_values() -> None:
    assert TrainConfig(epochs=2) == TrainConfig(epochs=2.0)
    assert asdict(RunConfig(data=None, out="x"))["train"] == asdict(TrainConfig())  # type: ignore[arg-type]


def test_configs_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    heavy = "{'torch', 'transformers', 'numpy', 'polars', 'sklearn', 'pandas', 'datasets'}"
    program = f"import sys, fastprice.config as c; c.list_settings(); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
