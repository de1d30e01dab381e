"""`finesteer suite`: published data sets, already on this disk, to suites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.lab.console import stop
from steering.errors import SteeringError


def suite(
    layout: Annotated[
        str,
        typer.Argument(help="alphasteer, xstest, advbench, harmbench, truthfulqa, alpacaeval, gsm8k or math"),
    ],
    source: Annotated[Path, typer.Argument(help="the published file; nothing is downloaded")],
    out: Annotated[Path, typer.Argument(help="folder under which the suites are written, a folder each")],
) -> None:
    """Make suites for `finesteer evaluate` of a published data set."""
    from rich.console import Console

    from steering.evaluation.convert import convert
    from steering.evaluation.suites import load_suite

    console = Console()
    try:
        for folder in convert(layout, source, out):
            made = load_suite(folder)
            rows = ", ".join(f"{file.name} {len(file.items)}" for file in made.files)
            console.print(f"Wrote {folder}: {made.kind}, rows: {rows}.", soft_wrap=True)
    except (SteeringError, OSError) as error:
        stop(console, str(error))
