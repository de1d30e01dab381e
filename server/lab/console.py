"""What the lab's commands share: how a profile is shown, how a command line is remembered, how one stops with a sentence."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import typer

DEVICE_MAP = "a model larger than one card: auto, balanced, balanced_low_0, sequential, or a JSON file {module: device}"


def show(console, profile) -> None:
    from rich.table import Table

    manifest = profile.manifest
    gate, experts, metrics = manifest.gate, manifest.experts, manifest.metrics
    table = Table(title=f"profile {manifest.name}", show_header=False, title_justify="left", min_width=60)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("version", profile.version)
    if manifest.description:
        table.add_row("description", manifest.description)
    table.add_row("method", manifest.method)
    table.add_row(
        "model", f"{manifest.model.id} ({manifest.model.num_layers} layers, {manifest.model.hidden_size} wide)"
    )
    where = f"output of layer {manifest.layer}"
    if len(manifest.layers) > 1:
        where = f"outputs of layers {', '.join(map(str, manifest.layers))}"
    table.add_row("site", f"{where}, positions {manifest.positions}")
    table.add_row("strength", f"{manifest.strength:g}")
    if gate.kind == "always":
        table.add_row("gate", "none: every query is steered")
    elif gate.kind == "cosine":
        table.add_row("gate", f"cosine with a condition vector, open {gate.direction} its threshold")
        table.add_row("threshold", f"{gate.threshold:.4f}, the best F1 on {gate.num_calibration} queries")
    else:
        table.add_row(
            "gate", f"quantile, centre {gate.centre}, rank {gate.rank}, tail {gate.tail:g}, decay {gate.decay:g}"
        )
        table.add_row("threshold", f"{gate.threshold:.4f}, from {gate.num_calibration} calibration queries")
    if found := metrics.get("gate"):
        table.add_row("AUC", f"{found['auc']:.3f} ({found['held_out']})")
        table.add_row("fires on general", interval(found["general_fired"]))
        table.add_row("fully open on general", interval(found["general_fully_open"]))
        for source, missed in found["missed_by_source"].items():
            table.add_row(f"misses of {source}", interval(missed))
    if experts.kind == "constant":
        table.add_row(
            "experts", "one vector for every query" + ("" if experts.layers is None else ", another at each layer")
        )
    elif experts.kind == "linear":
        table.add_row("experts", f"a matrix of rank {experts.map_rank} times the query's state")
    else:
        variant = experts.variant or "standard"
        shape = f"{experts.num_prototypes} prototypes, residual rank {experts.residual_rank}"
        table.add_row("experts", f"{variant}, {shape}")
    if found := metrics.get("experts"):
        if "cluster_sizes" in found:
            table.add_row("pairs per prototype", ", ".join(map(str, found["cluster_sizes"])))
        if "validation_error" in found:
            others = (("mean vector", "validation_error_mean_vector"), ("none", "validation_error_zero"))
            beside = ", ".join(f"{label} {found[key]:.3f}" for label, key in others if key in found)
            table.add_row("validation error", f"{found['validation_error']:.3f} ({beside})")
    for name, data in manifest.training.get("data", {}).items():
        table.add_row(f"{name} data", f"{data['rows']} rows: {', '.join(data['files'])}")
    table.add_row("command", manifest.training.get("command", ""))
    console.print(table)


def interval(found: dict) -> str:
    return f"{found['share']:.1%} (95 %: {found['low']:.1%} – {found['high']:.1%}, n = {found['n']})"


def command_line() -> str:
    """The command line as given, with every absolute path cut to its last part."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["finesteer", *words])


def stop(console, message: str) -> None:
    from rich.markup import escape

    console.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    raise typer.Exit(2)


def parse_layers(text: str) -> int | tuple[int, ...] | None:
    """A layer as 5, several as 8-20 or 3,5,8; None if it is none of the forms."""
    if text.isdecimal():
        return int(text)
    first, dash, last = text.partition("-")
    if dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last):
        return tuple(range(int(first), int(last) + 1))
    parts = text.split(",")
    return tuple(map(int, parts)) if all(part.strip().isdecimal() for part in parts) else None
