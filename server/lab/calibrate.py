"""`finesteer calibrate`: a new threshold for a trained profile, from new traffic."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from server.lab.console import DEVICE_MAP, command_line, interval, stop
from steering.errors import SteeringError


def calibrate(
    profile: Annotated[str, typer.Argument(help="profile folder or hub id; it is not changed")],
    queries: Annotated[list[Path], typer.Option(help='JSONL {"query"} of new traffic that needs steering; repeatable')],
    out: Annotated[Path, typer.Option(help="folder to write the calibrated profile to")],
    model: Annotated[str, typer.Option(help="model folder or hub id; default: the embedded demo")] = "",
    general: Annotated[list[Path] | None, typer.Option(help='JSONL {"query"} of traffic that needs none')] = None,
    miss_rate: Annotated[float | None, typer.Option(help="ε: share of --queries that may fall under it")] = None,
    fire_rate: Annotated[float | None, typer.Option(help="share of --general on which the gate may fire")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    device_map: Annotated[str, typer.Option(help=DEVICE_MAP)] = "",
    batch_tokens: Annotated[int, typer.Option(min=1, help="padded tokens in one batch of the extraction")] = 8192,
) -> None:
    """Set a profile's threshold anew, for a wanted miss rate or fire rate on new traffic."""
    from rich.console import Console

    console = Console()
    for label, rate in (("--miss-rate", miss_rate), ("--fire-rate", fire_rate)):
        if rate is not None and not 0 < rate < 1:
            stop(console, f"{label} must lie between 0 and 1.")
    if (miss_rate is None) == (fire_rate is None):
        stop(console, "give just one of --miss-rate and --fire-rate: each sets the threshold by itself.")

    from rich.table import Table
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from server.config import demo_folder
    from server.engine.native.device_map import read_device_map
    from server.engine.native.load import load_model
    from steering.profile import EVIDENCE_FILE, SteeringProfile, profile_folder
    from steering.report import rebuild_report
    from steering.training.calibrate import calibrate as run
    from steering.training.card import write_card

    reference = model or str(demo_folder() / "demo")
    try:
        disable_progress_bar()  # ours tell more
        before = SteeringProfile.load(profile)
        places = read_device_map(device_map, device)
        loaded = load_model(reference, dtype=dtype, device=device, device_map=places)
        loaded.set_attn_implementation("sdpa" if loaded._supports_sdpa else "eager")
        found = run(
            loaded,
            AutoTokenizer.from_pretrained(reference),
            before,
            queries,
            general or [],
            miss_rate=miss_rate,
            fire_rate=fire_rate,
            batch_tokens=batch_tokens,
            command=command_line(),
            progress=True,
        )
        after = found.profile.save(out)
        evidence = profile_folder(profile) / EVIDENCE_FILE
        if evidence.is_file() and evidence.parent.resolve() != out.resolve():
            shutil.copy(evidence, out)  # the subspace's ratios stay what they were
        rebuild_report(after, out)
        write_card(after, out)
    except (SteeringError, OSError) as error:
        stop(console, str(error))
    table = Table(title=f"profile {after.name}", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, no_wrap=not column)
    table.add_row("version", before.version, after.version)
    old, new = before.manifest.gate, after.manifest.gate
    table.add_row("threshold", f"{old.threshold:.4f}", f"{new.threshold:.4f}")
    table.add_row("tail", f"{old.tail:.4g}", f"{new.tail:.4g}")
    table.add_row("calibration queries", str(old.num_calibration), str(new.num_calibration))
    for name, shares in found.rates.items():
        table.add_row(name, *map(interval, shares))
    console.print(table)
    console.print(found.sentence)
    console.print(f"Wrote {out}. Serve it: finesteer serve --profile {after.name}={out}")
