"""`finesteer inspect`: check a profile and print what is in it, or make its report again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.lab.console import show, stop
from steering.errors import SteeringError


def inspect(
    profile: Annotated[str, typer.Argument(help="profile folder or hub id")],
    html: Annotated[
        bool, typer.Option("--html", help="make report.html and the figures again from the profile's folder")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="folder for the report; default: the profile's")] = None,
) -> None:
    """Check a profile and print what is in it."""
    from rich.console import Console

    from steering.profile import SteeringProfile, profile_folder

    console = Console()
    try:
        loaded = SteeringProfile.load(profile)
        show(console, loaded)
        if html:
            from steering.report import rebuild_report

            console.print(f"Wrote {rebuild_report(loaded, profile_folder(profile), out)}", soft_wrap=True)
    except (SteeringError, OSError) as error:
        stop(console, str(error))
