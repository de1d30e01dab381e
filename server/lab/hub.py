"""`finesteer push` and `finesteer pull`: profiles to and from a hub repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.lab.console import show, stop
from steering.errors import SteeringError


def push(
    profile: Annotated[Path, typer.Argument(help="profile folder")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME; made if there is none")],
    public: Annotated[bool, typer.Option("--public", help="make a new repository public; default: private")] = False,
    report: Annotated[
        bool,
        typer.Option("--report", help="also the report's page and evidence, which may quote your examples"),
    ] = False,
) -> None:
    """Upload a profile with its card. The token is HF_TOKEN's, or what `hf auth login` left."""
    from rich.console import Console

    from steering.interchange.hub import push as run

    console = Console()
    try:
        url = run(profile, repository, private=not public, report=report)
    except (SteeringError, OSError) as error:
        stop(console, str(error))
    console.print(f"Pushed: {url}\nServe it anywhere: finesteer serve --profile NAME={repository}", soft_wrap=True)


def pull(
    repository: Annotated[str, typer.Argument(help="OWNER/NAME")],
    out: Annotated[Path, typer.Option(help="new folder to write it to")],
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit; default: the newest")] = None,
) -> None:
    """Download a profile with its card, check it, and print what is in it."""
    from rich.console import Console

    from steering.interchange.hub import pull as run

    console = Console()
    try:
        found = run(repository, out, revision=revision)
    except (SteeringError, OSError) as error:
        stop(console, str(error))
    show(console, found)
    console.print(f"Wrote {out}.", soft_wrap=True)
