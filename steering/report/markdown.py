"""`report.md`: the short report, for where HTML is not shown."""

from __future__ import annotations

from collections.abc import Sequence

from steering.manifest import ProfileManifest


def markdown(manifest: ProfileManifest, version: str, names: Sequence[str]) -> str:
    """The text; `names`: the figures that there are, whose PNGs lie beside it."""
    lines = [f"# Report: profile `{manifest.name}`", "", manifest.description, ""]
    lines += [
        f"Method `{manifest.method}`, model `{manifest.model.id}`, layer {manifest.layer}, strength {manifest.strength:g}, "
        f"positions `{manifest.positions}`, version `{version}`. The whole report is `report.html`.",
        "",
    ]
    if gate := manifest.metrics.get("gate"):
        fired = gate["general_fired"]
        lines += [
            f"- AUC of IR against general queries: **{gate['auc']:.3f}**, out of sample ({gate['held_out']})",
            f"- general queries on which it fires: **{fired['share']:.1%}** (95 %: {fired['low']:.1%} – {fired['high']:.1%}, "
            f"n = {fired['n']})",
            "",
            "| IR source | n | missed | 95 % interval |",
            "|---|---|---|---|",
            *(
                f"| {source} | {m['n']} | {m['share']:.1%} | {m['low']:.1%} – {m['high']:.1%} |"
                for source, m in gate["missed_by_source"].items()
            ),
            "",
        ]
    if experts := manifest.metrics.get("experts"):
        lines += [
            f"| held out | {experts.get('unit', 'error')} |",
            "|---|---|",
            f"| `{manifest.method}` | **{experts['validation_error']:.3f}** |",
            f"| mean vector for every query | {experts['validation_error_mean_vector']:.3f} |",
            f"| no vector | {experts['validation_error_zero']:.3f} |",
            "",
        ]
    return "\n".join([*lines, *(f"![{name.replace('_', ' ')}](report_{name}.png)" for name in names)]) + "\n"
