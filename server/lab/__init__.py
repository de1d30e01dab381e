"""The lab's commands: one module each, options in, `steering` does the work, what it found to the terminal."""

from __future__ import annotations

import typer

from server.lab.calibrate import calibrate
from server.lab.evaluate import evaluate
from server.lab.hub import pull, push
from server.lab.inspect import inspect
from server.lab.interchange import export, import_
from server.lab.suite import suite
from server.lab.train import train


def register(app: typer.Typer) -> None:
    """Add the lab's commands."""
    for command in (train, calibrate, evaluate, suite, inspect, export, push, pull):
        app.command()(command)
    app.command("import")(import_)
