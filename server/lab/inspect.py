"""`finesteer inspect`: check a profile and print what is in it."""

from __future__ import annotations

from typing import Annotated

import typer

from server.lab.console import show, stop
from steering.errors import SteeringError


def inspect(profile: Annotated[str, typer.Argument(help="profile folder or hub id")]) -> None:
    """Check a profile and print what is in it."""
    from rich.console import Console

    from steering.profile import SteeringProfile

    console = Console()
    try:
        show(console, SteeringProfile.load(profile))
    except SteeringError as error:
        stop(console, str(error))
