from pathlib import Path

import pytest

from fastprice.config import RunConfig, read_config
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


def test_what_to_yaml_writes_read_config_reads(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, MINIMAL), {"train.epochs": 3, "model.base": "Qwen/Qwen2.5-0.5B"})
    assert read_config(written(tmp_path, config.to_yaml())) == config


def test_options_win_over_the_file(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, MINIMAL + "train: {epochs: 9}\n"), {"train.epochs": 2.0, "seed": 7})
    assert (config.train.epochs, config.seed) == (2.0, 7)


def test_on_and_off_need_no_quotes_in_yaml(tmp_path: Path) -> None:
    content = MINIMAL + "model: {kernels: off}\ntrain: {cuda_graphs: on}\nclean: {mask: off}\n"
    config = read_config(
        written(tmp_path, content), {"train.cuda_graphs": True}
    )  # what --set train.cuda_graphs=on gives
    assert (config.model.kernels, config.train.cuda_graphs, config.clean.mask) == ("off", "on", "off")
    assert read_config(written(tmp_path, config.to_yaml())) == config
    with pytest.raises(ConfigError, match=r"clean.mask: input should be 'own', 'prices' or 'off', not 'on'"):
        read_config(written(tmp_path, MINIMAL), {"clean.mask": True})


def test_every_error_is_told_at_once_with_the_nearest_key(tmp_path: Path) -> None:
    content = (
        "modle: {}\ntrain: {epoch: 1, pack_tokens: many}\nsplit: {test: 0.9}\n"
        "model: {max_memory: lots, recompute: some}\n"
    )
    path = written(tmp_path, MINIMAL + content)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    said = str(caught.value)
    for part in ("modle: unknown key (did you mean 'model'?)", "train.epoch: unknown key (did you mean 'epochs'?)",
                 "train.pack_tokens", "split.test", "model.max_memory: 'lots' is not a size", "model.recompute: 'some'",
                 str(path)):  # fmt: skip
        assert part in said
    assert "\n" not in said


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


def test_no_data_and_no_out_say_which_option_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data FILE"):
        read_config(None, {"out": "x"})
    with pytest.raises(ConfigError, match="--out DIR"):
        read_config(None, {"data.file": "x"})


def test_file_and_synthetic_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="either file"):
        read_config(None, {"out": "x", "data.file": "x", "data.synthetic": 100})


def test_the_estimator_takes_every_setting_of_model_and_train() -> None:
    from fastprice.estimator import PriceEstimator

    params = RunConfig.model_validate({"data": {"file": "x"}, "out": "y"}).estimator_params()
    assert params == PriceEstimator().get_params()
