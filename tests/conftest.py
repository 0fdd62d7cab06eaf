"""Fixtures that several kinds of tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest
from tests.paths import SHARED

# Before any Hugging Face import: look-ups on the hub then fail at once instead of after a minute of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A first example may import a library, and processes share the cores: the time of one example says nothing here.
hypothesis.settings.register_profile("fastprice", deadline=None)
hypothesis.settings.load_profile("fastprice")

_CPU = pytest.StashKey[ExitStack]()


def pytest_configure(config: pytest.Config) -> None:
    """`FASTPRICE_TEST_CPU=avx512_bf16` (or avx2): the session as on a CPU of that kind, see tests/cpu_kinds.py."""
    kind = os.environ.get("FASTPRICE_TEST_CPU")
    if kind:
        from tests.cpu_kinds import emulate

        config.stash[_CPU] = ExitStack()
        config.stash[_CPU].enter_context(emulate(kind))


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CPU in config.stash:
        config.stash[_CPU].close()


@pytest.fixture(params=["avx2", "avx512_bf16"])
def cpu_kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both kinds of CPU that bitsandbytes tells apart, one after the other, whatever the CPU at hand."""
    from tests.cpu_kinds import emulate

    with emulate(request.param):
        yield request.param


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the checkout; tests that want it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("there is no ../shared with real data beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a base model that trains in a second; see tests/tiny_base.py."""
    from tests.tiny_base import save_tiny_base

    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def fastprice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: arguments in, (exit status, standard output, standard error) out."""

    def run(*arguments: object) -> tuple[int, str, str]:
        from fastprice.cli import main

        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("sys.argv", ["fastprice", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
