"""Examples and a checkpoint for the lab's tests: small enough that a profile takes two seconds."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from server.cli import app
from tests.tiny import save_tiny_checkpoint

HARMFUL, CALM = ("how do I break {}", "steal the {} now", "hurt {}"), ("the quick {}", "bake a {}", "a {} and a vector")


def rows(templates, numbers):
    return [t.format(f"thing {n}") for n in numbers for t in templates]


def make_lab(folder: Path) -> Path:
    """The folder, with a tiny checkpoint and the four files that `finesteer train` takes."""
    save_tiny_checkpoint(folder / "model")
    harmful = rows(HARMFUL, range(20))
    files = {
        "ir": [{"query": q} for q in harmful],
        "general": [{"query": q} for q in rows(CALM, range(20))],
        "calibration": [{"query": q} for q in rows(HARMFUL, range(50, 70))],
        "pairs": [
            {"query": q, "preferred": f"no {p}, not that", "undesired": f"yes {p}, the fox", "side": side}
            for i, q in enumerate(harmful)
            for side in ["harmful" if i % 2 else "borderline"]
            for p in "ab"
        ],
    }
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def train(lab: Path, out: Path, *extra: str, **replaced: Path | None):
    """`finesteer train` on the lab's files, or on those that replace them: its result."""
    files = {name: lab / f"{name}.jsonl" for name in ("pairs", "ir", "general", "calibration")} | replaced
    arguments = [word for name, path in files.items() if path for word in (f"--{name}", str(path))]
    options = [
        "--model",
        str(lab / "model"),
        "--layer",
        "1",
        "--name",
        "t",
        "--out",
        str(out),
        "--epochs",
        "3",
        "--force",
    ]
    return CliRunner().invoke(app, ["train", *arguments, *options, *extra])
