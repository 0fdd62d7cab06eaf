"""`fastprice settings`: what it prints is what the settings are, and the page of the docs is what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.paths import DOCS

from fastprice.config import list_settings

Run = Callable[..., tuple[int, str, str]]


def test_the_table_lists_every_setting(fastprice: Run) -> None:
    status, printed, _ = fastprice("settings")
    assert status == 0
    for setting in list_settings():
        assert f"{setting.key} " in printed
    assert "a number, above 0 and below 0.5" in printed


def test_the_page_of_the_docs_is_up_to_date(fastprice: Run) -> None:
    status, printed, _ = fastprice("settings", "--markdown")
    assert status == 0
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    assert printed == page, "run: fastprice settings --markdown > docs/reference/settings.md"
    for setting in list_settings():
        assert f"| `{setting.name}` | {setting.type} |" in page


def test_the_schema_is_json_with_every_section(fastprice: Run) -> None:
    status, printed, _ = fastprice("settings", "--json-schema")
    assert status == 0
    schema = json.loads(printed)
    assert set(schema["properties"]) == {"data", "clean", "split", "model", "train", "seed", "out"}
    assert schema["$defs"]["ModelConfig"]["properties"]["method"]["enum"] == ["qlora", "lora", "full"]


def test_two_formats_at_once_are_refused(fastprice: Run) -> None:
    status, _, error = fastprice("settings", "--markdown", "--json-schema")
    assert status == 2
    assert "not both" in error
