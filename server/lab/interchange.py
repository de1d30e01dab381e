"""`finesteer import` and `finesteer export`: control vectors of other tools to profiles and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.lab.console import command_line, parse_layers, show, stop
from steering.errors import SteeringError


def import_(
    source: Annotated[
        Path, typer.Argument(help="GGUF control vector, safetensors with a tensor a layer, or torch.save'd dictionary")
    ],
    out: Annotated[Path, typer.Option(help="folder to write the profile to")],
    model: Annotated[str, typer.Option(help="model folder or hub id that the vectors are for; default: the demo")] = "",
    name: Annotated[str, typer.Option(help="the profile's name; default: the folder's")] = "",
    layers: Annotated[str, typer.Option(help="all of the file's, or some, as 8-20 or 3,5,8")] = "all",
    strength: Annotated[float, typer.Option(help="default strength λ; negative turns the vectors round")] = 1.0,
    positions: Annotated[str, typer.Option(help="all, or last (the prompt's last token and the answer)")] = "all",
    description: Annotated[str, typer.Option(help="one line for people")] = "",
) -> None:
    """Make a profile of another tool's control vectors: repeng, llama.cpp, steering-vectors."""
    from rich.console import Console

    console = Console()
    if positions not in ("all", "last"):
        stop(console, f"--positions {positions!r} is unknown; use all or last.")
    chosen = None if layers == "all" else parse_layers(layers)
    if isinstance(chosen, int):
        chosen = (chosen,)
    if layers != "all" and chosen is None:
        stop(console, f"--layers {layers!r} must be all, a number, a range as 8-20, or a list as 3,5,8.")

    from server.config import demo_folder
    from server.engine.native.load import load_model
    from steering.interchange.convert import to_profile
    from steering.interchange.vectors import read_vectors
    from steering.report import rebuild_report
    from steering.training.card import write_card
    from steering.training.data import file_record

    reference = model or str(demo_folder() / "demo")
    try:
        vectors = read_vectors(source)
        loaded = load_model(reference, device="cpu")
        profile = to_profile(
            vectors,
            loaded,
            name=name or out.name,
            model_id=Path(reference).name if Path(reference).is_dir() else reference,
            layers=chosen,
            strength=strength,
            positions=positions,
            description=description,
            training={"command": command_line(), "data": {"vectors": file_record([source], len(vectors.by_layer))}},
        ).save(out)
        rebuild_report(profile, out)
        write_card(profile, out)
    except (SteeringError, OSError) as error:
        stop(console, str(error))
    family = loaded.config.model_type
    if vectors.model_hint not in ("", family):
        console.print(
            f"[yellow]warning:[/yellow] the file says it was made for {vectors.model_hint}; this model is {family}."
        )
    show(console, profile)
    console.print(f"Wrote {out}. Serve it: finesteer serve --profile {profile.name}={out}", soft_wrap=True)


def export(
    profile: Annotated[str, typer.Argument(help="profile folder or hub id")],
    out: Annotated[Path, typer.Argument(help="the GGUF file to write")],
    expert: Annotated[
        int | None, typer.Option(help="of a mixture: this expert alone; default: its vector for the mean query")
    ] = None,
    model_hint: Annotated[str, typer.Option(help="the model's family, as llama, for tools that compare it")] = "",
) -> None:
    """Write a profile's vector, times its default strength, as a GGUF control vector for llama.cpp or repeng."""
    from rich.console import Console

    from steering.interchange.convert import from_profile
    from steering.interchange.vectors import write_gguf
    from steering.profile import SteeringProfile

    console = Console()
    try:
        loaded = SteeringProfile.load(profile)
        vectors = from_profile(loaded, expert, model_hint)
        write_gguf(vectors, out)
    except (SteeringError, OSError) as error:
        stop(console, str(error))
    layers = ", ".join(map(str, vectors.by_layer))
    console.print(f"Wrote {out}: layers {layers}, scale 1 is this profile's strength {loaded.manifest.strength:g}.")
    if loaded.manifest.gate.kind != "always":
        console.print(
            "[yellow]The gate is not in it:[/yellow] the format knows none, so other tools add this to every query."
        )
    if loaded.manifest.positions == "last":
        console.print("[yellow]The profile acts from the prompt's last token on;[/yellow] other tools at every one.")
