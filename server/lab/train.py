"""`finesteer train`: options to `steering.training`, and what it found to the terminal."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from server.lab.console import DEVICE_MAP, command_line, parse_layers, show, stop
from steering.errors import SteeringError


def train(
    layer: Annotated[
        str, typer.Option(help="0-based decoder layer to read and steer at; or auto, or candidates as 8-20 or 3,5,8")
    ],
    pairs: Annotated[
        list[Path],
        typer.Option(
            help='JSONL rows {"query", "preferred", "undesired", and perhaps "side", "kind"}, or the published form '
            '{"chosen", "rejected", and perhaps "prompt"}; texts or chat messages; repeatable'
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder to write the profile to")],
    model: Annotated[str, typer.Option(help="model folder or hub id; default: the embedded demo")] = "",
    name: Annotated[str, typer.Option(help="the profile's name; default: the folder's")] = "",
    ir: Annotated[list[Path] | None, typer.Option(help='JSONL {"query"} that need steering; without: no gate')] = None,
    general: Annotated[list[Path] | None, typer.Option(help='JSONL {"query"} that need none')] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help='JSONL {"query"} like --ir, kept for the threshold')
    ] = None,
    method: Annotated[str, typer.Option(help="finesteer, caa, refusal_vector, alphasteer or cast")] = "finesteer",
    variant: Annotated[str, typer.Option(help="of finesteer's experts: standard or orthogonal_residual")] = "standard",
    description: Annotated[str, typer.Option(help="one line for people")] = "",
    strength: Annotated[
        str,
        typer.Option(help="default strength λ; auto: by answers to a tenth of the examples, which then train nothing"),
    ] = "1",
    strengths: Annotated[str, typer.Option(help="what --strength auto tries")] = "0.25,0.5,0.75,1,1.5,2,3,4",
    positions: Annotated[str, typer.Option(help="all, or last (the prompt's last token and the answer)")] = "all",
    tail: Annotated[float, typer.Option(help="ε: share of IR queries that may fall under the threshold")] = 0.05,
    decay: Annotated[float, typer.Option(help="γ: how fast the gate closes under the threshold")] = 2.0,
    floor: Annotated[float, typer.Option(help="gates below this are exactly 0")] = 1e-3,
    centre: Annotated[str, typer.Option(help="auto, none, general or ir")] = "auto",
    rank: Annotated[str, typer.Option(help="auto, or the subspace's rank")] = "auto",
    residual_rank: Annotated[int, typer.Option(min=0, help="m: residual directions")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="at most, for router and residual")] = 100,
    learning_rate: Annotated[float, typer.Option(help="AdamW's")] = 5e-4,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    device_map: Annotated[str, typer.Option(help=DEVICE_MAP)] = "",
    batch_tokens: Annotated[int, typer.Option(min=1, help="padded tokens in one batch of the extraction")] = 8192,
    cache: Annotated[
        Path | None, typer.Option(help="folder of extracted states, to go on after an interruption; default: OUT.cache")
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="keep no extracted states; those of several layers pass through TMPDIR")
    ] = False,
    no_examples: Annotated[
        bool, typer.Option("--no-examples", help="quote no training query in the report and its evidence")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check the data and estimate the cost; write nothing")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="save a gate even if it is inverted")] = False,
) -> None:
    """Make a steering profile from examples."""
    from rich.console import Console

    console = Console()
    started = time.perf_counter()
    for label, value, known in (
        ("--method", method, ("finesteer", "caa", "refusal_vector", "alphasteer", "cast")),
        ("--variant", variant, ("standard", "orthogonal_residual")),
        ("--positions", positions, ("all", "last")),
        ("--centre", centre, ("auto", "none", "general", "ir")),
    ):
        if value not in known:
            stop(console, f"{label} {value!r} is unknown; use one of {', '.join(known)}.")
    if rank != "auto" and not (rank.isdigit() and int(rank) > 0):
        stop(console, f"--rank {rank!r} must be auto or a whole number above 0.")
    if not 0 < tail < 1 or not 0 < decay < math.inf or not 0 <= floor < 1 or not 0 < learning_rate < math.inf:
        stop(console, "--tail must lie between 0 and 1, --decay and --learning-rate above 0, --floor in [0, 1).")
    if out.is_file():
        stop(console, f"--out {out} is a file; name a folder.")

    chosen = "auto" if strength == "auto" else _number(strength)
    tried = [_number(word) for word in strengths.split(",")]
    if chosen is None or None in tried or min(tried) <= 0:
        stop(console, "--strength must be a number or auto, --strengths numbers above 0 such as 0.5,1,2.")
    layers = "auto" if layer == "auto" else parse_layers(layer)
    if layers is None:
        stop(console, f"--layer {layer!r} must be a number, auto, a range as 8-20, or a list as 3,5,8.")

    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from server.config import demo_folder
    from server.engine.native.device_map import read_device_map, refuse_several_devices
    from server.engine.native.load import load_model
    from steering.report import write_report
    from steering.training.card import write_card
    from steering.training.dry_run import estimate
    from steering.training.fit_experts import ExpertOptions
    from steering.training.options import TrainingOptions
    from steering.training.trainer import train as run

    reference = model or str(demo_folder() / "demo")
    options = TrainingOptions(
        name=name or out.name,
        layer=layers,
        pairs=pairs,
        ir=ir or [],
        general=general or [],
        calibration=calibration or [],
        method=method,
        description=description,
        strength=chosen,
        positions=positions,
        tail=tail,
        decay=decay,
        floor=floor,
        centre=centre,
        rank=rank if rank == "auto" else int(rank),
        experts=ExpertOptions(variant=variant, residual_rank=residual_rank, epochs=epochs, learning_rate=learning_rate),
        seed=seed,
        batch_tokens=batch_tokens,
        force=force,
        cache=None if no_cache else cache or out.with_name(f"{out.name}.cache"),
    )
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            disable_progress_bar()  # ours tell more
            places = read_device_map(device_map, device)
            if chosen == "auto":
                refuse_several_devices(places)
            loaded = load_model(reference, dtype=dtype, device=device, device_map=places)
            if chosen == "auto":
                refuse_several_devices(loaded)
            loaded.set_attn_implementation("sdpa" if loaded._supports_sdpa else "eager")
            tokenizer = AutoTokenizer.from_pretrained(reference)
            if dry_run:
                cost = estimate(loaded, tokenizer, options, progress=True)
                console.print(
                    f"Would read {cost.layers} layers' states of {cost.queries} queries and {cost.pairs} pairs: "
                    f"{cost.tokens:,} tokens, about {cost.seconds:.0f} s before the fits, "
                    f"{cost.memory_bytes / 2**20:.1f} MiB of states in memory, {cost.disk_bytes / 2**20:.1f} MiB on disk. "
                    "Nothing was written."
                )
                return
            training = run(
                loaded,
                tokenizer,
                options,
                model_id=Path(reference).name if Path(reference).is_dir() else reference,
                command=command_line(),
                progress=True,
            )
        found = training.profile
        if training.held_out is not None:
            found = _choose_strength(found, training.held_out, loaded, tokenizer, tried, console)
        profile = found.save(out)
        training = replace(training, profile=profile)
        write_report(training, out, examples=not no_examples)
        write_card(profile, out)
    except (SteeringError, OSError) as error:
        stop(console, str(error))
    for warning in caught:
        if issubclass(warning.category, UserWarning) and (
            "gate" in str(warning.message) or "cache" in str(warning.message)
        ):
            console.print(f"[yellow]warning:[/yellow] {warning.message}")
    for score in training.layers:
        mark = "→" if score.layer == profile.manifest.layer else " "
        parts = [
            ("AUC", score.auc),
            ("fires on general", score.fire_rate),
            ("validation error", score.validation_error),
        ]
        console.print(f"{mark} layer {score.layer}: " + ", ".join(f"{k} {v:.3f}" for k, v in parts if v is not None))
    show(console, profile)
    console.print(
        f"Wrote {out} in {time.perf_counter() - started:.0f} s. Serve it: finesteer serve --profile {profile.name}={out}"
    )


def _choose_strength(profile, held_out, model, tokenizer, strengths, console):
    """The profile with the strength that answers to the held-out examples are best at; prints the sweep."""
    from rich.table import Table

    from server.lab.answerer import NativeAnswerer
    from steering.evaluation.judges import PairJudge
    from steering.evaluation.strength import sweep_strength

    manifest = profile.manifest
    answerer = NativeAnswerer(model, tokenizer, [profile])
    sweep = sweep_strength(
        answerer,
        profile.name,
        held_out.pairs,
        held_out.general,
        PairJudge(),
        strengths,
        positions=manifest.positions,
        progress=True,
    )
    table = Table(title=f"strength, judged by {sweep.judge}", title_justify="left")
    for column in ("strength", "as preferred", "general refused", "broken text", "dose"):
        table.add_column(column)
    for point in sweep.points:
        mark = " ←" if point.strength == sweep.chosen else ""
        shares = map(str, (point.success, point.over_refusal, point.degenerate))
        table.add_row(f"{point.strength:g}{mark}", *shares, f"{point.dose:.2f}")
    console.print(table)
    metrics = manifest.metrics | {"strength": asdict(sweep)}
    return replace(profile, manifest=replace(manifest, strength=sweep.chosen, metrics=metrics))


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
