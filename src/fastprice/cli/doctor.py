"""`doctor`: what is installed and what is missing."""

from __future__ import annotations

import typer

from fastprice.cli.options import make_console


def doctor() -> None:
    """Print versions and hardware, what is missing, and how to get it."""
    from rich.text import Text as RichText

    from fastprice.doctor import examine

    styles = {"ok": "green", "warning": "yellow", "error": "red"}
    console = make_console()
    findings = examine()
    for finding in findings:
        remedy = f" ({finding.remedy})" if finding.remedy else ""
        console.print(RichText.assemble((f"{finding.level:8}", styles[finding.level]), f"{finding.what}{remedy}"))
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)
