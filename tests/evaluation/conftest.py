"""An evaluation of three models, and the page of its report."""

from __future__ import annotations

import pytest
from tests.evaluation.pages import evaluation, written

from fastprice.evaluation.evaluate import Evaluation


@pytest.fixture(scope="package")
def measured() -> Evaluation:
    return evaluation()


@pytest.fixture(scope="package")
def html(measured: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("report") / "report.html", measured)
