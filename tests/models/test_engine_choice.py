"""Which engine runs: by name, by what the settings need, and by the machine; Unsloth itself is never imported here."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprice import PriceEstimator
from fastprice.errors import ConfigError, MissingDependencyError
from fastprice.models import engine_choice
from fastprice.models.base_models import model_type_of
from fastprice.models.engine_choice import auto_engine, choose_engine
from fastprice.models.engine_features import UNSLOTH_FAMILIES, UNSLOTH_LACKS
from fastprice.models.families import FAMILIES
from fastprice.models.peft_engine import PeftEngine


class Unsloth:
    name = "unsloth"


@pytest.fixture
def with_unsloth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which Unsloth runs."""
    module: Any = types.ModuleType("fastprice.models.unsloth_engine")
    module.UnslothEngine = Unsloth
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(engine_choice, "unsloth_missing", lambda: "")


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    def make(model_type: str) -> str:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        return str(tmp_path)

    return make


@pytest.mark.usefixtures("with_unsloth")
def test_auto_is_peft_on_the_kernels_and_unsloth_without() -> None:
    assert choose_engine().name == "peft"
    assert choose_engine(kernels=False).name == "unsloth"
    assert choose_engine("unsloth").name == "unsloth"
    assert choose_engine("peft", kernels=False).name == "peft"
    assert "fewer bytes" in auto_engine(kernels=True)[1]
    assert "fused layers" in auto_engine(kernels=False)[1]


@pytest.mark.usefixtures("with_unsloth")
@pytest.mark.parametrize("feature", UNSLOTH_LACKS)
def test_what_unsloth_lacks_is_said_in_one_line(feature: Any) -> None:
    needs = {feature: "setting='value'"}
    line = rf"no {feature}, which setting='value' needs: [^\n]+$"
    with pytest.warns(UserWarning, match=f"engine: peft runs, and not unsloth, which has {line}"):
        assert choose_engine(kernels=False, needs=needs).name == "peft"
    with pytest.raises(ConfigError, match=f"engine: 'unsloth' has {line.removesuffix('$')}; use engine='peft'$"):
        choose_engine("unsloth", needs=needs)
    assert choose_engine("peft", needs=needs).name == "peft"
    assert PeftEngine().unsupported(feature) is None


@pytest.mark.usefixtures("with_unsloth")
def test_the_family_of_the_base_decides_before_anything_is_loaded(folder: Any) -> None:
    for model_type in UNSLOTH_FAMILIES:
        assert choose_engine("unsloth", base=folder(model_type)).name == "unsloth"
    for model_type in ("gemma2", "phi3"):
        with pytest.raises(ConfigError, match=f"no packs for base=.*{model_type} models; use engine='peft'"):
            choose_engine("unsloth", base=folder(model_type))
        with pytest.warns(UserWarning, match=f"not unsloth, which has no packs .*{model_type}"):
            assert choose_engine(base=folder(model_type), kernels=False).name == "peft"
    assert choose_engine("unsloth", base="no/such-model").name == "unsloth"  # loading says what is wrong with it
    assert set(UNSLOTH_FAMILIES) <= set(FAMILIES)


def test_the_model_type_is_read_without_transformers(folder: Any, tmp_path: Path) -> None:
    assert model_type_of("nano") == "llama"
    assert model_type_of(folder("qwen3")) == "qwen3"
    (tmp_path / "config.json").write_text("[]")
    assert model_type_of(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{")
    assert model_type_of(str(tmp_path)) is None
    assert model_type_of("./nowhere") is None


@pytest.mark.usefixtures("with_unsloth")
def test_an_estimator_asks_for_what_its_settings_need() -> None:
    for settings, setting in (
        ({"method": "full"}, "method='full'"),
        ({"output": "head"}, "output='head'"),
        ({"text_loss": "wasserstein"}, "text_loss='wasserstein'"),
        ({"max_memory": "24GiB"}, "max_memory='24GiB'"),
    ):
        with pytest.warns(UserWarning, match=f"not unsloth, which has no .*, which {setting} needs"):
            assert PriceEstimator(kernels="off", **settings)._choose_engine().name == "peft"
        if "max_memory" not in settings:  # which layers must be offloaded is known only with a plan
            with pytest.raises(ConfigError, match=f"which {setting} needs: .*; use engine='peft'"):
                PriceEstimator(engine="unsloth", **settings)._choose_engine()
    assert PriceEstimator(engine="unsloth", max_memory="24GiB")._choose_engine().name == "unsloth"
    assert PriceEstimator(kernels="off")._choose_engine().name == "unsloth"
    assert PriceEstimator(kernels="on")._choose_engine().name == "peft"


def test_a_machine_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert auto_engine(kernels=False)[0] == auto_engine(kernels=True)[0] == "peft"
    assert choose_engine(kernels=False, needs={"hidden states": "output='head'"}).name == "peft"
    with pytest.raises(MissingDependencyError, match=r"needs a CUDA device .*engine='peft'"):
        choose_engine("unsloth")
    with pytest.raises(ConfigError, match="did you mean 'unsloth'"):
        choose_engine("unslot")
