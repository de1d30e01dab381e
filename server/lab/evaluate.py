"""`finesteer evaluate`: options to `steering.evaluation`, the tables to the terminal and to a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from server.lab.console import stop
from steering.errors import SteeringError

KEY_VARIABLE = "FINESTEER_JUDGE_API_KEY"


def evaluate(
    suite: Annotated[list[Path], typer.Option(help="folder of a suite, or of several; repeatable")],
    model: Annotated[str, typer.Option(help="model folder or hub id; default: the embedded demo")] = "",
    profile: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]PATH", help="profile folder or hub id; repeatable")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="a column for each profile; without: one in which all act at once")
    ] = False,
    ungated: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="a further column: this profile, its gate forced open")
    ] = None,
    strength: Annotated[
        list[str] | None, typer.Option(metavar="NAME=λ", help="instead of the profile's own; repeatable")
    ] = None,
    gate: Annotated[str, typer.Option(help="auto, or open: force all gates")] = "auto",
    limit: Annotated[int | None, typer.Option(help="so many rows of each file, drawn at random (seed 0)")] = None,
    judge_url: Annotated[
        str, typer.Option(help=f"base of an OpenAI-compatible API that judges, .../v1; its key from {KEY_VARIABLE}")
    ] = "",
    judge_model: Annotated[str, typer.Option(help="the model to ask there")] = "",
    out: Annotated[
        Path, typer.Option(help="table.md, results.json and all answers; a second run goes on there")
    ] = Path("evaluation"),
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    batch: Annotated[int, typer.Option(help="answers generated at once")] = 64,
) -> None:
    """Compare the plain model with steered ones over suites of queries.

    A suite is a folder with suite.json ({"name": ..., "kind": attack, over_refusal, benign, exact_match, truthfulqa or
    preference}) and JSONL files of rows {"query"} with, as the kind needs, "preferred", "undesired", "answer" and "pattern";
    steering/evaluation/suites.py has the whole form, `finesteer suite` makes suites of published files. Attacks are judged by
    refusal rules unless --judge-url names a judge.
    """
    from rich.console import Console

    console = Console()
    if gate not in ("auto", "open"):
        stop(console, f"--gate {gate!r} is unknown; use auto or open.")
    if bool(judge_url) != bool(judge_model):
        stop(console, "--judge-url and --judge-model go together: give both or neither.")
    if (limit is not None and limit < 1) or batch < 1:
        stop(console, "--limit and --batch must be 1 or more.")

    import json

    from rich.table import Table
    from transformers.utils.logging import disable_progress_bar

    from server.config import demo_folder
    from server.lab.answerer import NativeAnswerer
    from steering.evaluation.endpoint import EndpointJudge
    from steering.evaluation.evaluate import evaluate as run
    from steering.evaluation.suites import find_suites
    from steering.evaluation.table import lines, markdown, notes

    disable_progress_bar()  # ours tell more
    reference = model or str(demo_folder() / "demo")
    try:
        suites = find_suites(suite)
        suites = [found.limited(limit) for found in suites] if limit else suites
        profiles = _profiles(profile or [])
        columns = _columns(profiles, _strengths(strength or [], profiles), compare, ungated or [], gate)
        answerer = NativeAnswerer.load(reference, list(profiles.values()), dtype=dtype, device=device, batch=batch)

        def endpoint(rubric: str) -> EndpointJudge:
            key = os.environ.get(KEY_VARIABLE, "")
            return EndpointJudge(judge_url, judge_model, rubric, api_key=key, keep=out / "verdicts" / f"{rubric}.jsonl")

        found = run(
            answerer,
            columns,
            suites,
            endpoint=endpoint if judge_url else None,
            out=out,
            model_key=answerer.model_key,
            progress=True,
        )
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(markdown(found) + "\n", encoding="utf-8")
        (out / "results.json").write_text(
            json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    except (SteeringError, OSError) as error:
        stop(console, str(error))
    heads, rows = lines(found)
    for group in dict.fromkeys(row.group for row in rows):
        table = Table(title=group or "all suites", title_justify="left")
        for head in ("", *heads):
            table.add_column(head)
        for row in rows:
            if row.group == group:
                table.add_row(row.measure, *row.texts, style="bold" if row.main else "")
        console.print(table)
    for note in notes(found):
        console.print(note, soft_wrap=True)
    broken = [
        f"{key[0]}/{key[1]} under {key[2]}: {cell.unfired_identical.n - cell.unfired_identical.hits}"
        for key, cell in found.cells.items()
        if cell.unfired_identical.hits < cell.unfired_identical.n
    ]
    if broken:
        console.print(
            "[yellow]warning:[/yellow] with the gate shut some answers differ from the plain model's "
            f"(a near tie that another batch rounds otherwise, or a fault): {'; '.join(broken)}",
            soft_wrap=True,
        )
    console.print(f"Wrote {out}.")


def _profiles(given: list[str]) -> dict:
    """The profiles by name. Raises SteeringError."""
    from steering.errors import ProfileError
    from steering.profile import SteeringProfile

    found = {}
    for word in given:
        name, equals, path = word.partition("=")
        profile = SteeringProfile.load(path, name) if equals else SteeringProfile.load(word)
        if profile.name in found or profile.name == "plain":
            raise ProfileError(f"--profile {word}: the name {profile.name!r} is taken; give another, NAME=PATH.")
        found[profile.name] = profile
    return found


def _strengths(given: list[str], profiles: dict) -> dict[str, float]:
    """Each profile's λ: its own, or as asked. Raises ProfileError."""
    from steering.errors import ProfileError

    found = {name: profile.manifest.strength for name, profile in profiles.items()}
    for word in given:
        name, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if name not in profiles or not abs(value) < float("inf"):
            raise ProfileError(f"--strength {word}: must be NAME=NUMBER, NAME one of {', '.join(profiles) or 'none'}.")
        found[name] = value
    return found


def _columns(profiles: dict, strengths: dict[str, float], compare: bool, ungated: list[str], gate: str) -> list:
    """The steered columns. Raises ProfileError."""
    from steering.decision import ProfileActivation, SteeringOptions
    from steering.errors import ProfileError
    from steering.evaluation.evaluate import Column

    def column(label: str, names: list[str], mode: str) -> Column:
        acting = tuple(
            ProfileActivation(n, strengths[n], gate=mode, positions=profiles[n].manifest.positions) for n in names
        )
        return Column(label, SteeringOptions(acting), {n: profiles[n].version for n in names})

    found = [column(n, [n], gate) for n in profiles] if compare else []
    if profiles and not compare:
        found = [column(" + ".join(profiles), list(profiles), gate)]
    for name in ungated:
        if name not in profiles:
            raise ProfileError(f"--ungated {name}: no such profile; loaded are {', '.join(profiles) or 'none'}.")
        found.append(column(f"{name}, no gate", [name], "open"))
    return found
