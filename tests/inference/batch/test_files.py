"""Files estimated in parts: every row in the result, constant memory, the same file however often it was stopped."""

from __future__ import annotations

import csv
import gzip
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from fastprice.errors import ConfigError, DataError
from fastprice.inference.batch import Progress, Totals, chunks, predict_file
from fastprice.inference.batch.parts import open_parts

# A free stand-in for a PriceEstimator: its price depends on the text and on the chunk that the text is in.
STUB = """
import time
from types import SimpleNamespace
import numpy as np

class Stub:
    def __init__(self, pause=0.0):
        self.pause = pause
    def prompts(self, texts):
        time.sleep(self.pause)
        return [SimpleNamespace(text=text, cut=max(0, len(text) - 5000)) for text in texts]
    def distributions(self, prompts, on_batch=None):
        if on_batch:
            on_batch(len(prompts))
        return [1.0 + len(prompt.text) + len(prompts) / 3 for prompt in prompts]
    def estimates(self, distributions, criterion):
        return np.array(distributions, dtype=np.float64)
    def intervals(self, distributions, interval):
        return np.array([(each / 2, each * 2) for each in distributions]).reshape(-1, 2)
"""
NAMES: dict[str, Any] = {}
exec(STUB, NAMES)
Stub = NAMES["Stub"]

# A process of its own: argv is source, target, pause a chunk, rows a chunk. It prints its largest resident set in KiB.
PROGRAM = (
    STUB
    + """
import re, sys
from pathlib import Path
from fastprice.inference.batch import chunks, predict_file
source, out, pause, rows = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
chunks.CHUNK_ROWS = rows
predict_file(source, out, model=Path(sys.argv[5]), load=lambda _: Stub(pause), text="name", interval=0.9)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "fastprice.json").write_text("{}")
    return folder


def make_source(path: Path, count: int, length: int = 40) -> Path:
    """`count` rows in the format of the path's ending, every seventh without a text."""
    draw = random.Random(count)
    names = ["" if n % 7 == 3 else draw.randbytes(length // 2).hex()[: draw.randint(4, length)] for n in range(count)]
    if path.suffix == ".parquet":
        pl.DataFrame({"name": names, "other": names}).write_parquet(path, row_group_size=count)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("name", "other"), *((name, "x") for name in names)])
    else:
        lines = "".join(json.dumps({"name": name}) + "\n" for name in names).encode()
        path.write_bytes(gzip.compress(lines, 1) if path.suffix == ".gz" else lines)
    return path


def read(path: Path) -> pl.DataFrame:
    readers = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".parquet": pl.read_parquet}
    return readers[path.suffix](path)


def run(source: Path, out: Path, model: Path, **options: Any) -> Totals:
    return predict_file(source, out, model=model, load=lambda _: Stub(), text="name", **options)[0]


# ---- The result ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["p.csv", "p.jsonl", "p.parquet"])
@pytest.mark.parametrize("source", ["a.jsonl.gz", "a.csv", "a.parquet"])
def test_every_row_of_the_source_is_a_row_of_the_target(
    tmp_path: Path, model: Path, source: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 30)
    path = make_source(tmp_path / source, 100)
    totals = run(path, tmp_path / target, model, interval=0.9)
    frame = read(tmp_path / target)
    assert frame.columns == ["row", "estimate", "low", "high", "reason", "text"]
    assert frame["row"].to_list() == list(range(1, 101))
    without = frame.filter(pl.col("estimate").is_null())
    assert set(without["reason"]) == {"no text"}
    assert without["row"].to_list() == [n + 1 for n in range(100) if n % 7 == 3]
    assert (totals.rows, totals.priced, totals.last_row) == (100, 100 - without.height, 100)
    assert totals.examples == [(row, "no text") for row in without["row"][:5]]
    priced = frame.filter(pl.col("estimate").is_not_null())
    assert not any(priced["reason"])
    assert (priced["low"] < priced["estimate"]).all()
    assert (priced["estimate"].floor() >= 1 + priced["text"].str.len_chars()).all()
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([source, "model", target])


def test_unusable_rows_stay_in_their_place_with_a_reason(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"name": "a lamp"}', "", "not json", "[1]", '{"name": "\\ud800 lamp\\u0000"}', '{"name": null}']
    path.write_text("\n".join(lines))
    run(path, tmp_path / "p.parquet", model)
    frame = read(tmp_path / "p.parquet")
    assert frame["row"].to_list() == [1, 3, 4, 5, 6]
    assert [bool(reason) for reason in frame["reason"]] == [False, True, True, False, True]
    assert frame["text"][3] == "? lamp\0"


def test_cut_texts_are_counted_over_all_parts(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 10_000)
    path = tmp_path / "a.csv"
    path.write_text("name\n" + "".join(f"{'x' * (6000 if n % 3 else 10)}\n" for n in range(30)))
    seen: list[Progress] = []
    assert run(path, tmp_path / "p.csv", model, on_progress=seen.append).cut == 20
    rows = [each.rows for each in seen]
    assert rows == sorted(rows)
    assert rows[-1] == 30
    assert len(set(rows)) > 10, "chunks end by their characters too"
    assert [each.share for each in seen] == sorted(each.share for each in seen)
    assert seen[-1].share == 1


def test_the_model_sees_prices_masked_as_in_training(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("name\nlamp $80 obo\n")
    for mask, text in (("own", "lamp $80 obo"), ("off", "lamp $80 obo"), ("prices", "lamp [price] obo")):
        run(path, tmp_path / "p.csv", model, mask=mask)
        assert int(read(tmp_path / "p.csv")["estimate"][0]) == 1 + len(text)
        assert read(tmp_path / "p.csv")["text"][0] == "lamp $80 obo"


# ---- Stopping and resuming -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["p.csv", "p.parquet"])
def test_after_a_kill_at_any_moment_the_same_command_resumes(tmp_path: Path, model: Path, target: str) -> None:
    """SIGKILL at random moments of a run of about a second; then one run to the end."""
    source = make_source(tmp_path / "a.csv", 600)
    whole, out = tmp_path / f"whole-{target}", tmp_path / target
    folder = tmp_path / f"{target}.partial"

    def start(out: Path, pause: float) -> subprocess.Popen[bytes]:
        arguments = [str(source), str(out), str(pause), "10", str(model)]
        return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.DEVNULL)

    assert start(whole, 0).wait(60) == 0
    draw = random.Random(target)
    counts = []
    for _ in range(3):
        process = start(out, 0.02)
        before = len(list(folder.glob("0*")))
        deadline = time.monotonic() + 60
        while process.poll() is None and len(list(folder.glob("0*"))) <= before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        assert process.poll() is None, "it was finished before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists(), "the target appeared before it was complete"
        counts.append(json.loads((folder / "ledger.json").read_text())["parts"])
    assert 0 < counts[0] < counts[-1] < 60
    assert counts == sorted(counts)
    assert start(out, 0).wait(60) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not folder.exists()


class StoppedError(Exception):
    pass


def stop_after(parts: int) -> Any:
    seen: set[int] = set()

    def on_progress(progress: Progress) -> None:
        seen.add(progress.rows)
        if len(seen) > parts:
            raise StoppedError

    return on_progress


@pytest.fixture
def stopped(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(source, target) of a job that was stopped in the middle."""
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 20)
    source, out = make_source(tmp_path / "a.csv", 100), tmp_path / "p.csv"
    with pytest.raises(StoppedError):
        run(source, out, model, on_progress=stop_after(4))
    return source, out


def test_finished_rows_are_not_estimated_again(stopped: tuple[Path, Path], model: Path) -> None:
    source, out = stopped
    seen: list[Progress] = []
    totals = run(source, out, model, on_progress=seen.append)
    assert seen[0].resumed == seen[0].rows > 0
    assert totals.rows == seen[-1].rows == 100
    assert [row for row, _ in totals.examples] == [4, 11, 18, 25, 32]


@pytest.mark.parametrize("change", ["input", "model", "--criterion", "--interval", "--text", "mask"])
def test_parts_of_another_call_are_refused_and_left_as_they_are(
    stopped: tuple[Path, Path], model: Path, change: str
) -> None:
    source, out = stopped
    options: dict[str, Any] = {"text": "name"}
    if change == "input":
        source.write_bytes(source.read_bytes() + b"one more,x\n")
    elif change == "model":
        (model / "fastprice.json").write_text("{ }")
    else:
        options[change.strip("-")] = {"--criterion": "mse", "--interval": 0.8, "--text": "other", "mask": "prices"}[
            change
        ]
    folder = out.with_name("p.csv.partial")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=rf"since then changed: {change};.*delete the folder") as caught:
        predict_file(source, out, model=model, load=lambda _: Stub(), **options)
    assert "\n" not in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_damaged_ledger_and_a_foreign_folder_are_refused(stopped: tuple[Path, Path], model: Path) -> None:
    source, out = stopped
    folder = out.with_name("p.csv.partial")
    (folder / "ledger.json").write_text('{"parts": 2')
    with pytest.raises(ConfigError, match=r"ledger\.json: is damaged"):
        run(source, out, model)
    other = out.with_name("q.csv")
    other.with_name("q.csv.partial").mkdir()
    (other.with_name("q.csv.partial") / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and was not made by predict"):
        run(source, other, model)


def test_two_writers_cannot_write_the_same_parts(tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    with open_parts(out, {}), pytest.raises(ConfigError, match="another process"), open_parts(out, {}):
        pass
    with open_parts(out, {}):
        pass
    program = (
        "import sys; from pathlib import Path; from fastprice.inference.batch.parts import open_parts\n"
        "with open_parts(Path(sys.argv[1]), {}): print('locked', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", program, str(out)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ConfigError, match="another process"), open_parts(out, {}):
            pass
        other.kill()
    with open_parts(out, {}) as parts:
        assert parts.count == 0


def test_errors_before_the_first_estimate_leave_no_file(tmp_path: Path, model: Path) -> None:
    source = make_source(tmp_path / "a.jsonl", 5)
    for options, error, said in (
        ({"text": "nmae"}, DataError, "did you mean 'name'"),
        ({"criterion": "mea"}, ConfigError, "mae"),
        ({"interval": 90}, ConfigError, "0.9"),
    ):
        with pytest.raises(error, match=said):
            predict_file(source, tmp_path / "p.csv", model=model, load=lambda _: Stub(), **{"text": "name", **options})
    source.write_text('{"name": ""}\n' * 3)
    with pytest.raises(DataError, match="none of its 3 rows has an estimate; row 1: no text"):
        run(source, tmp_path / "p.csv", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "model"]


# ---- Memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest resident set of a process for 2,000 and for 20,000 rows, with 54 MB more text."""
    peaks = []
    monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", "system")  # other pools keep 10 to 20 MB for later
    for count in (2_000, 20_000):
        source = make_source(tmp_path / name, count, length=6_000)
        arguments = [str(source), str(tmp_path / "p.jsonl"), "0", "256", str(model)]
        done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 27, f"MiB: {peaks}"


def test_the_stub_has_the_methods_of_the_estimator() -> None:
    from fastprice.estimator import PriceEstimator

    for name in ("prompts", "distributions", "estimates", "intervals"):
        assert callable(getattr(PriceEstimator, name))
    assert isinstance(Stub().estimates([1], "mae"), np.ndarray)
    assert isinstance(Stub().prompts(["x"])[0], SimpleNamespace)


# ---- The command line ----------------------------------------------------------------------------------------------


def test_the_bar_shows_rows_a_second_and_the_time_left() -> None:
    import io

    from rich.console import Console

    from fastprice.cli.predict import FileProgress

    shown = {}
    for terminal in (True, False):
        file = io.StringIO()
        with FileProgress(Console(file=file, force_terminal=terminal, width=120, color_system=None)) as bar:
            bar(Progress(rows=4_000, resumed=4_000, share=0.0))
            time.sleep(0.1)
            bar(Progress(rows=5_000, resumed=4_000, share=0.5))
            time.sleep(0.2)  # it is drawn ten times a second
        shown[terminal] = file.getvalue()
    assert "5,000 rows" in shown[True]
    assert "50%" in shown[True]
    assert "rows/s" in shown[True]
    assert "0:00:00 left" in shown[True] or "0:00:01 left" in shown[True]
    assert shown[False].strip() == ""


def test_a_model_is_used_with_the_cleaning_of_its_run(tmp_path: Path) -> None:
    from fastprice.cli.saved_runs import trained_cleaning
    from fastprice.config import CleanConfig, read_config

    assert trained_cleaning(tmp_path) == CleanConfig(min_price=0.5, max_price=999.49, mask="own")
    overrides = {"data.file": "a.csv", "out": "x", "clean.mask": "prices", "clean.max_price": 5000}
    (tmp_path / "config.yaml").write_text(read_config(None, overrides).to_yaml())
    for folder in (tmp_path, tmp_path / "model"):
        assert trained_cleaning(folder) == CleanConfig(min_price=0.5, max_price=5000, mask="prices")


def test_estimates_of_texts_are_printed_and_not_written(fastprice: Any, model: Path, tmp_path: Path) -> None:
    status, _, errors = fastprice("predict", "--model", model, "--item", "a lamp", "--out", tmp_path / "p.csv")
    assert status == 2
    assert "--out is for the rows of a FILE" in errors
