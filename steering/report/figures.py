"""The report's figures, each from the manifest and the evidence; PNG for Markdown, SVG for everything else."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from steering.manifest import ProfileManifest

IR, GENERAL, GREY, DARK = "#b3361e", "#2b6a99", "#8a8a8a", "#333333"
PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000", "#ee8866", "#44bb99")
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
CRITERIA = {"elbow": "elbow", "silhouette": "silhouette", "calinski_harabasz": "Calinski–Harabasz"}
Draw = Callable[[Axes], None]


def figures(manifest: ProfileManifest, evidence: dict[str, Any]) -> dict[str, Draw]:
    """The figures that this profile has something for, by name, in the report's order."""
    metrics, found = manifest.metrics, {}
    gate, experts = evidence.get("gate"), evidence.get("experts")
    threshold, tail = manifest.gate.threshold, manifest.gate.tail
    if gate:
        found["energy_ratio"] = lambda ax: _ratios(ax, gate, threshold)
    if gate and metrics.get("gate"):
        found["roc"] = lambda ax: _roc(ax, gate, tail, metrics["gate"]["auc"])
    if comparison := metrics.get("gate", {}).get("comparison"):
        found["rank_and_centre"] = lambda ax: _comparison(ax, comparison, manifest.gate.centre, manifest.gate.rank)
    if criteria := {k: v for k, v in metrics.get("experts", {}).items() if k in CRITERIA and v}:
        found["clusters"] = lambda ax: _clusters(ax, criteria, manifest.experts.num_prototypes)
    if experts:
        found["experts"] = lambda ax: _map(ax, experts)
        found["entropy"] = lambda ax: _entropy(ax, experts["entropy"])
        found["validation"] = lambda ax: _curve(ax, experts["curve"], metrics["experts"])
    if sweep := metrics.get("strength"):
        found["strength"] = lambda ax: _strength(ax, sweep)
    if layers := metrics.get("layers"):
        found["layers"] = lambda ax: _layers(ax, layers, manifest.layer)
    return found


def render(draw: Draw, name: str) -> tuple[bytes, str]:
    """A figure as PNG and as SVG; the same bytes each time. `name` salts the SVG's ids, so that several fit one page."""
    with plt.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
        draw(ax)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
        figure.savefig(svg, format="svg", dpi=110, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return png.getvalue(), svg.getvalue()


def _legend(ax: Axes) -> None:
    """Beside the axes, where it covers nothing."""
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _ratios(ax: Axes, gate: dict, threshold: float) -> None:
    low = min(*gate["ir"], *gate["general"])
    bins = np.linspace(low, 1, 61)
    for label, ratios, colour in (("need steering", gate["ir"], IR), ("general", gate["general"], GENERAL)):
        ax.hist(ratios, bins, weights=np.full(len(ratios), 1 / len(ratios)), alpha=0.6, color=colour, label=label)
    ax.axvline(threshold, color=DARK, linestyle="--", label=f"threshold {threshold:.3f}")
    ax.set(title="Energy ratio, out of sample", xlabel="energy ratio", ylabel="share of queries")
    _legend(ax)


def _roc(ax: Axes, gate: dict, tail: float, auc: float) -> None:
    ir, general = np.sort(gate["ir"]), np.sort(gate["general"])
    cuts = np.sort(np.concatenate([ir, general, [-1.0, 2.0]]))
    missed = np.searchsorted(ir, cuts) / len(ir)
    fired = 1 - np.searchsorted(general, cuts) / len(general)
    ax.plot(missed, fired, color=IR, linewidth=2)
    ax.axvline(tail, color=DARK, linestyle="--", label=f"wanted miss rate {tail:g}")
    ax.set(title=f"What a lower miss rate costs (AUC {auc:.3f})", xlim=(-0.01, 0.5), ylim=(-0.01, 0.5))
    ax.set(xlabel="queries that need steering, missed", ylabel="general queries fired on")
    _legend(ax)


def _comparison(ax: Axes, comparison: list[dict], centre: str, rank: int) -> None:
    for name, colour in (("none", GREY), ("general", GENERAL), ("ir", IR)):
        points = [(c["rank"], c["auc"]) for c in comparison if c["centre"] == name]
        if points:
            ax.plot(*zip(*points, strict=True), marker="o", color=colour, label=f"centre: {name}")
    [chosen] = [c["auc"] for c in comparison if (c["centre"], c["rank"]) == (centre, rank)]
    ax.scatter([rank], [chosen], s=160, facecolors="none", edgecolors="black", zorder=3, label="chosen")
    ax.set(title="Rank and centre", xlabel="rank of the subspace", ylabel="AUC, out of sample", xscale="log")
    ticks = sorted({c["rank"] for c in comparison})
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    _legend(ax)


def _clusters(ax: Axes, criteria: dict[str, dict[str, float]], chosen: int) -> None:
    """Each criterion over K, from 0 at its lowest to 1 at its highest."""
    for (name, scores), colour in zip(criteria.items(), (GENERAL, IR, GREY), strict=False):
        counts, values = zip(*sorted((int(k), v) for k, v in scores.items()), strict=True)
        span = (max(values) - min(values)) or 1.0
        ax.plot(counts, [(v - min(values)) / span for v in values], marker="o", color=colour, label=CRITERIA[name])
    ax.axvline(chosen, color=DARK, linestyle="--", label=f"chosen: {chosen}")
    ax.set(title="Number of experts", xlabel="experts", ylabel="criterion, lowest 0, highest 1", xticks=counts)
    _legend(ax)


def _map(ax: Axes, experts: dict) -> None:
    points = np.array(experts["points"])
    for k, prototype in enumerate(experts["prototypes"]):
        mine, colour = points[points[:, 2] == k], PALETTE[k % len(PALETTE)]
        ax.scatter(mine[:, 0], mine[:, 1], s=9, alpha=0.4, color=colour, rasterized=True, linewidths=0)
        label = f"expert {k} ({experts['experts'][k]['size']})"
        ax.scatter(*prototype, s=170, marker="*", color=colour, edgecolors="black", label=label, zorder=3)
    ax.set(title="Shifts in two dimensions, and the experts", xlabel="first direction", ylabel="second direction")
    _legend(ax)


def _entropy(ax: Axes, entropy: list[float]) -> None:
    ax.hist(entropy, np.linspace(0, 1, 41), weights=np.full(len(entropy), 1 / len(entropy)), color=GENERAL)
    ax.set(title="How many experts a query draws on", xlim=(0, 1), ylabel="share of queries")
    ax.set(xlabel="routing entropy (0: one expert, 1: all alike)")


def _curve(ax: Axes, curve: list[list[float]], metrics: dict) -> None:
    epochs = range(1, len(curve) + 1)
    training, validation = zip(*curve, strict=True)
    ax.plot(epochs, training, color=GREY, label="training pairs")
    ax.plot(epochs, validation, color=IR, linewidth=2, label="validation pairs")
    ax.axhline(metrics["validation_error_mean_vector"], color=GENERAL, linestyle="--", label="mean vector for all")
    ax.axhline(metrics["validation_error_zero"], color=DARK, linestyle=":", label="no vector")
    ax.set(title="Distance to the true shift", xlabel="epoch", ylabel="error / mean squared shift", ylim=(0, None))
    _legend(ax)


def _strength(ax: Axes, sweep: dict) -> None:
    points = sweep["points"]
    x = np.arange(len(points))
    for key, label, colour, marker in (
        ("success", "as preferred", "#228833", "o"),
        ("over_refusal", "general refused", GENERAL, "s"),
        ("degenerate", "broken text", IR, "^"),
    ):
        shares = [(i, p[key]["hits"] / p[key]["n"]) for i, p in zip(x, points, strict=True) if p[key]["n"]]
        if shares:
            ax.plot(*zip(*shares, strict=True), marker=marker, color=colour, label=label)
    [chosen] = [i for i, p in zip(x, points, strict=True) if p["strength"] == sweep["chosen"]]
    ax.axvline(chosen, color=DARK, linestyle="--", label="chosen")
    ax.set_xticks(x, [f"{p['strength']:g}\n{p['dose']:.2f}" for p in points])
    ax.set(
        title="Answers at each strength", xlabel="strength, and below it the dose", ylabel="share", ylim=(-0.03, 1.03)
    )
    _legend(ax)


def _layers(ax: Axes, layers: list[dict], chosen: int) -> None:
    for key, label, colour, marker in (
        ("auc", "gate's AUC", GENERAL, "o"),
        ("validation_error", "experts' validation error", IR, "s"),
    ):
        points = [(row["layer"], row[key]) for row in layers if row[key] is not None]
        if points:
            ax.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label)
    ax.axvline(chosen, color=DARK, linestyle="--", label=f"chosen: {chosen}")
    ax.set(
        title="Layers",
        xlabel="layer",
        ylim=(0, 1.05),
        xticks=[row["layer"] for row in layers][:: 1 + len(layers) // 20],
    )
    _legend(ax)
