"""The report beside a profile: `report.md` and its figures, for someone who was not there."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from steering.training.fit_experts import ExpertFit
from steering.training.fit_gate import GateFit
from steering.training.trainer import Training

IR, GENERAL, ACCENT = "#b3361e", "#2b6a99", "#444444"


def write_report(training: Training, folder: Path) -> Path:
    """Write `report.md` and `report_*.png` into the profile's folder; returns the report's path."""
    profile = training.profile
    manifest, lines = profile.manifest, []
    lines += [f"# Report: profile `{manifest.name}`", "", manifest.description or "", ""]
    lines += [
        f"Method `{manifest.method}`, model `{manifest.model.id}`, layer {manifest.layer}, strength {manifest.strength:g}, "
        f"positions `{manifest.positions}`, version `{profile.version}`.",
        "",
    ]
    if training.gate is not None:
        lines += _gate_section(training.gate, manifest.metrics["gate"], folder)
    if training.experts is not None:
        lines += _experts_section(training, training.experts, folder)
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _gate_section(fit: GateFit, metrics: dict, folder: Path) -> list[str]:
    gate, chosen = fit.gate, fit.chosen
    threshold = float(gate.threshold)
    _figure(folder / "report_energy_ratio.png", lambda ax: _ratios(ax, fit, threshold))
    _figure(folder / "report_roc.png", lambda ax: _roc(ax, fit))
    _figure(folder / "report_rank_and_centre.png", lambda ax: _comparison(ax, fit))
    fired, missed = metrics["general_fired"], metrics["missed_by_source"]
    rows = [
        f"| {source} | {m['n']} | {m['share']:.1%} | {m['low']:.1%} – {m['high']:.1%} |" for source, m in missed.items()
    ]
    return [
        "## When it steers: the gate",
        "",
        f"A query's *energy ratio* says how much of its hidden state (measured from the `{fit.centre}` centre) lies in the "
        f"{fit.rank} directions along which the intervention-required (IR) queries lie. From {threshold:.3f} on the gate is fully "
        f"open; below, it closes softly and is exactly 0 under {gate.floor:g}. All figures here are out of sample "
        f"({fit.held_out}).",
        "",
        f"- AUC of IR against general queries: **{chosen.auc:.3f}**",
        f"- general queries on which it fires: **{fired['share']:.1%}** (95 %: {fired['low']:.1%} – {fired['high']:.1%}, "
        f"n = {fired['n']})",
        "",
        "| IR source | n | under the threshold | 95 % interval |",
        "|---|---|---|---|",
        *rows,
        "",
        "![energy ratios](report_energy_ratio.png)",
        "![ROC](report_roc.png)",
        "![ranks and centres](report_rank_and_centre.png)",
        "",
    ]


def _experts_section(training: Training, fit: ExpertFit, folder: Path) -> list[str]:
    _figure(folder / "report_experts.png", lambda ax: _map(ax, training, fit))
    _figure(folder / "report_clusters.png", lambda ax: _clusters(ax, fit))
    _figure(folder / "report_validation.png", lambda ax: _curve(ax, fit))
    sizes = [int((fit.clusters == k).sum()) for k in range(fit.experts.prototypes.shape[0])]
    return [
        "## How it steers: the experts",
        "",
        f"{len(sizes)} prototype shifts (pairs in each: {', '.join(map(str, sizes))}), mixed per query, and a residual in "
        f"{fit.experts.residual_basis.shape[1]} directions. How far the synthesized vector is from the pair's own shift, on "
        "pairs that trained nothing, as a share of the mean squared shift:",
        "",
        "| predictor | error |",
        "|---|---|",
        f"| mixture of experts | **{fit.validation_error:.3f}** |",
        f"| mean vector for every query | {fit.mean_vector_error:.3f} |",
        f"| no vector | {fit.zero_error:.3f} |",
        "",
        "![experts](report_experts.png)",
        "![number of experts](report_clusters.png)",
        "![validation](report_validation.png)",
        "",
    ]


def _figure(path: Path, draw) -> None:
    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    draw(ax)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _ratios(ax: Axes, fit: GateFit, threshold: float) -> None:
    bins = np.linspace(float(min(fit.ir_ratios.min(), fit.general_ratios.min())), 1, 61)
    for label, ratios, colour in (("IR", fit.ir_ratios, IR), ("general", fit.general_ratios, GENERAL)):
        weights = np.full(len(ratios), 1 / len(ratios))
        ax.hist(
            ratios.numpy(), bins, weights=weights, alpha=0.6, color=colour, label=f"{label} queries (n = {len(ratios)})"
        )
    ax.axvline(threshold, color=ACCENT, linestyle="--", label=f"threshold {threshold:.3f}")
    ax.set(title="Energy ratio, out of sample", xlabel="energy ratio s", ylabel="share of queries")
    ax.legend(frameon=False)


def _roc(ax: Axes, fit: GateFit) -> None:
    cuts = np.sort(np.concatenate([fit.ir_ratios.numpy(), fit.general_ratios.numpy(), [-1.0, 2.0]]))
    missed = [(fit.ir_ratios.numpy() < c).mean() for c in cuts]
    fired = [(fit.general_ratios.numpy() >= c).mean() for c in cuts]
    ax.plot(missed, fired, color=IR)
    ax.axvline(fit.gate.tail, color=ACCENT, linestyle="--", label=f"wanted miss rate {fit.gate.tail:g}")
    ax.set(
        title=f"Fire rate against miss rate (AUC {fit.chosen.auc:.3f})",
        xlabel="IR queries missed",
        ylabel="general queries fired on",
    )
    ax.set(xlim=(-0.01, 0.5), ylim=(-0.01, 0.5))
    ax.legend(frameon=False)


def _comparison(ax: Axes, fit: GateFit) -> None:
    for centre, colour in (("none", "#8a8a8a"), ("general", GENERAL), ("ir", IR)):
        points = [(c.rank, c.auc) for c in fit.candidates if c.centre == centre]
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", color=colour, label=f"centre: {centre}")
    ax.scatter([fit.rank], [fit.chosen.auc], s=160, facecolors="none", edgecolors="black", zorder=3, label="chosen")
    ax.set(title="Rank and centre", xlabel="rank r of the subspace", ylabel="AUC, out of sample", xscale="log")
    ticks = sorted({c.rank for c in fit.candidates})
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.legend(frameon=False)


def _map(ax: Axes, training: Training, fit: ExpertFit) -> None:
    deltas = training.pair_shifts
    unit = deltas / deltas.norm(dim=-1, keepdim=True)
    centre = unit.mean(0)
    directions = np.linalg.svd((unit - centre).numpy(), full_matrices=False)[2][:2]
    points, prototypes = (
        (unit - centre).numpy() @ directions.T,
        (fit.experts.prototypes - centre).numpy() @ directions.T,
    )
    palette = plt.get_cmap("tab10")
    for k in range(len(prototypes)):
        mine = fit.clusters == k
        ax.scatter(*points[mine].T, s=6, alpha=0.4, color=palette(k % 10))
        ax.scatter(
            *prototypes[k],
            s=140,
            marker="*",
            color=palette(k % 10),
            edgecolors="black",
            label=f"expert {k} ({mine.sum()})",
        )
    ax.set(
        title="Shifts (length 1) in two dimensions, and the experts",
        xlabel="first direction",
        ylabel="second direction",
    )
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _clusters(ax: Axes, fit: ExpertFit) -> None:
    counts, scores = zip(*sorted(fit.cluster_scores.items()), strict=True)
    ax.plot(counts, scores, marker="o", color=GENERAL)
    best = fit.experts.prototypes.shape[0]
    ax.scatter(
        [best], [fit.cluster_scores[best]], s=160, facecolors="none", edgecolors="black", label=f"chosen: K = {best}"
    )
    ax.set(title="Number of experts", xlabel="K", ylabel="Calinski–Harabasz index", xticks=counts)
    ax.legend(frameon=False)


def _curve(ax: Axes, fit: ExpertFit) -> None:
    epochs = range(1, len(fit.curve) + 1)
    training, validation = zip(*fit.curve, strict=True)
    ax.plot(epochs, training, color="#8a8a8a", label="training pairs")
    ax.plot(epochs, validation, color=IR, label="validation pairs")
    ax.axhline(fit.mean_vector_error, color=GENERAL, linestyle="--", label="mean vector")
    ax.axhline(fit.zero_error, color=ACCENT, linestyle=":", label="no vector")
    ax.set(
        title="Distance to the true shift",
        xlabel="epoch",
        ylabel="mean squared error / mean squared shift",
        ylim=(0, None),
    )
    ax.legend(frameon=False)
