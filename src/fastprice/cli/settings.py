"""`settings`: every setting, for people, editors and the docs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastprice.cli.options import make_console
from fastprice.config import Setting, json_schema, list_settings, section_titles
from fastprice.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

PAGE = """\
# Settings

Written by `fastprice settings --markdown`; each setting is declared in `src/fastprice/config/sections.py`.

The same name serves everywhere:

```
fastprice train --data products.csv --out runs/first --rank 32 --epochs 2
fastprice train --data products.csv --out runs/first --set model.rank=32 train.epochs=2
fastprice train run.yaml --epochs 2
```

In Python, the sections `model` and `train` and the seed are the parameters of the estimator:
`PriceEstimator(rank=32, epochs=2)`. In a YAML file each section is a mapping:

```yaml
# yaml-language-server: $schema=fastprice.schema.json
data: {file: products.csv, text: [title, description]}
model: {rank: 32}
train: {epochs: 2}
out: runs/first
```

`fastprice settings --json-schema > fastprice.schema.json` writes the schema with which editors complete and check such
a file. Options override the file. An unknown key or an impossible value stops a run before anything is read or written;
all of them are listed at once.
"""


def settings(
    schema: Annotated[bool, typer.Option("--json-schema", help="Print the JSON schema of a settings file.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of the docs.")] = False,
) -> None:
    """List every setting with its type, default and meaning."""
    if schema and markdown:
        raise ConfigError("settings: give --json-schema or --markdown, not both")
    if schema:
        print(json.dumps(json_schema(), indent=2))
    elif markdown:
        print(markdown_page(), end="")
    else:
        console = make_console()
        for section, title in [*section_titles().items(), ("", "Of the whole run.")]:
            console.print(_table(section, title), "")


def markdown_page() -> str:
    """docs/reference/settings.md."""
    parts = [PAGE]
    for section, title in [*section_titles().items(), ("", "Of the whole run.")]:
        rows = [
            f"| `{each.name}` | {each.type} | {_default(each)} | {each.help} |"
            for each in list_settings()
            if each.section == section
        ]
        heading = f"## {section or 'seed, out'}\n\n{title}\n\n"
        parts.append(heading + "| setting | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _table(section: str, title: str) -> Table:
    from rich.table import Table

    table = Table(title=f"{section}  {title}".strip(), title_justify="left", box=None, pad_edge=False, expand=True)
    table.add_column("setting", no_wrap=True)
    table.add_column("type", ratio=2)
    table.add_column("default", no_wrap=True)
    table.add_column("meaning", ratio=5)
    for each in list_settings():
        if each.section == section:
            table.add_row(each.key, each.type, _shown(each), each.help)
    return table


def _shown(setting: Setting) -> str:
    value: Any = setting.default
    if setting.required:
        return "required"
    return json.dumps(value) if value is None or isinstance(value, bool | list) else str(value)


def _default(setting: Setting) -> str:
    return "required" if setting.required else f"`{_shown(setting)}`"
