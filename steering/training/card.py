"""The card beside a profile: what it is, in a page, with the metadata that hubs read."""

from __future__ import annotations

from pathlib import Path

from steering.profile import SteeringProfile


def write_card(profile: SteeringProfile, folder: Path) -> Path:
    """Write `README.md` into the profile's folder; returns its path."""
    manifest = profile.manifest
    gate = "none: every query is steered"
    if manifest.gate.kind == "quantile":
        gate = f"SCS, quantile, centre `{manifest.gate.centre}`, rank {manifest.gate.rank}, threshold {manifest.gate.threshold:.3f}"
    elif manifest.gate.kind == "cosine":
        gate = f"CAST, cosine with a condition vector, open {manifest.gate.direction} {manifest.gate.threshold:.3f}"
    hub_id = "/" in manifest.model.id
    sites = manifest.layers
    where = f"output of layer {sites[0]}" if len(sites) == 1 else f"outputs of layers {', '.join(map(str, sites))}"
    lines = [
        "---",
        "library_name: finesteer",
        *([f"base_model: {manifest.model.id}"] if hub_id else ()),
        "tags: [steering-vector, activation-steering]",
        "---",
        "",
        f"# Steering profile `{manifest.name}`",
        "",
        manifest.description,
        "",
        f"- model: `{manifest.model.id}`; only this checkpoint is accepted",
        f"- method: `{manifest.method}`, at the {where}, strength {manifest.strength:g}",
        f"- gate: {gate}",
        f"- version: `{profile.version}`",
        "",
        "Figures and how they were measured: [report.md](report.md). Made by:",
        "",
        "```",
        manifest.training.get("command", ""),
        "```",
        "",
        f"Serve it: `finesteer serve --model {manifest.model.id if hub_id else 'MODEL'} --profile {manifest.name}=FOLDER`. "
        f"Look inside: `finesteer inspect FOLDER`.",
    ]
    path = folder / "README.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
