"""`fastprice bench traffic`: the file, what counts as worse, the bars, and the figures that are committed."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.paths import ROOT

from fastprice.benchmarking import main, traffic
from fastprice.benchmarking.traffic import (
    BARRED,
    MODELS,
    LayerTraffic,
    above_bars,
    count_layer,
    read_traffic,
    regressions,
    settings_for,
    traffic_table,
    where_table,
)
from fastprice.errors import DataError
from fastprice.models.families import FAMILIES
from fastprice.models.shapes import read_shape


def layer(
    model: str = "Llama-3.1-8B", peer: str = "fastprice", *, norms: float = 100_000.0, launches: int = 20
) -> LayerTraffic:
    """A layer with `norms` bytes and `launches` launches of fused norms forward, and a product each way."""
    forward = {"fused norm": (launches, norms), "frozen product": (7, 300_000.0)}
    backward = {"cast": (10, 2_000.0), "frozen product": (7, 300_000.0)}
    return LayerTraffic(model, peer, {"forward": forward, "backward": backward}, {"loss": (1, 1_000.0)})


def all_rows(**changed: float) -> list[LayerTraffic]:
    return [layer(model, peer, **(changed if peer == "fastprice" else {})) for model in BARRED  # type: ignore[arg-type]
            for peer in ("fastprice", "unsloth")]  # fmt: skip


def test_more_launches_or_bytes_are_reported_and_fewer_are_not() -> None:
    before = [layer(), layer(peer="peft")]
    assert regressions(before, before) == []
    assert regressions(before, [layer(norms=50_000.0, launches=5)]) == []
    assert regressions(before, [layer(norms=100_010.0)]) == [], "rounding"
    assert regressions(before, [layer(norms=101_000.0)]) == [
        "Llama-3.1-8B forward, eager, norms and RoPE: 100.0 kB before, 101.0 now",
        "Llama-3.1-8B forward, total: 400.0 kB before, 401.0 now",
    ]
    assert regressions(before, [layer(launches=21)]) == [
        "Llama-3.1-8B forward, eager, norms and RoPE: 20 launches before, 21 now",
        "Llama-3.1-8B forward, total: 27 launches before, 28 now",
    ]
    assert regressions(before, [layer("new")]) == ["new has no figures yet"]
    assert regressions(before, [layer(peer="peft", launches=99)]) == [], "a peer may grow"


def test_the_bars_count_fused_norms_too_and_forward_and_backward_together() -> None:
    assert above_bars(all_rows(norms=100_000.0, launches=50)) == []
    assert above_bars(all_rows(launches=51)) == [
        f"{model}: 61 eager, norm and RoPE launches, at most 60" for model in BARRED
    ]
    found = above_bars(all_rows(norms=249_000.0))
    assert "Llama-3.1-8B: 251.0 kB of eager, norm and RoPE launches, at most 250" in found
    assert "Llama-3.1-8B: 851.0 kB in total, Unsloth's form 702.0" in found
    assert len(found) == 3, "the 250 kB are for the widths of the 8B model alone"


def test_figures_are_written_and_read_again(tmp_path: Path) -> None:
    rows = [layer(), LayerTraffic("a", "unsloth", layer().kinds)]
    traffic._write(tmp_path / "traffic.json", rows)
    libraries, read = read_traffic(tmp_path / "traffic.json")
    assert read == rows
    assert libraries.startswith("torch ")
    table = traffic_table(read)
    assert "| fused norm | 20, 100.0 | 0, 0.0 |" in table
    assert "| **eager, norms and RoPE** | 20, 100.0 | 10, 2.0 |" in table
    assert "| **total** | 27, 400.0 | 17, 302.0 |" in table
    (tmp_path / "traffic.json").write_text("{}")
    with pytest.raises(DataError, match="no traffic figures"):
        read_traffic(tmp_path / "traffic.json")


@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [({}, 0, ""), ({"launches": 21}, 1, "worse: "), ({"launches": 51}, 1, "above a bar: ")],
)
def test_the_check_compares_what_is_counted_now_with_the_file_and_the_bars(
    changed: dict[str, int], status: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = all_rows()
    monkeypatch.setattr(traffic, "_count_all", lambda: rows)
    file = tmp_path / "traffic.json"
    assert main(["traffic", str(file)]) == 0
    assert f"written: {file}" in capsys.readouterr().out
    rows[:] = all_rows(**changed)
    assert main(["traffic", str(file), "--check"]) == status
    assert message in capsys.readouterr().err


def test_every_family_is_counted() -> None:
    assert {read_shape(settings_for(model)).family.model_type for model in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("peer", ["fastprice", "peft"])
def test_the_committed_figures_are_those_of_the_code(peer: str) -> None:
    (committed,) = [
        row
        for row in read_traffic(ROOT / "benchmarks/traffic.json")[1]
        if (row.model, row.peer) == ("Llama-3.2-1B", peer)
    ]
    now, _ = count_layer("Llama-3.2-1B", peer)
    for phase in ("forward", "backward"):
        assert {kind: launches for kind, (launches, _) in now.kinds[phase].items()} == {
            kind: launches for kind, (launches, _) in committed.kinds[phase].items()
        }
        for kind, (_, size) in now.kinds[phase].items():
            assert size == pytest.approx(committed.kinds[phase][kind][1], abs=0.1)


def test_where_lists_what_the_bars_count() -> None:
    lines = where_table("Qwen2.5-0.5B").splitlines()
    launches, size = count_layer("Qwen2.5-0.5B", "fastprice")[0].sum(traffic.STRICT_KINDS)
    assert lines[0] == f"Qwen2.5-0.5B: {launches} launches, {size:,.1f} kB a token and layer"
    assert sum(int(line.split()[0]) for line in lines[1:]) == launches
    assert all(any(f"  {kind}  " in line for kind in traffic.STRICT_KINDS) for line in lines[1:])
