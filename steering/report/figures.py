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

from steering.manifest import GateManifest, ProfileManifest

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
    gate, experts, spec = evidence.get("gate"), evidence.get("experts"), manifest.gate
    if gate and spec.kind == "cosine":
        found["similarity"] = lambda ax: _similarities(ax, gate, spec)
    elif gate:
        found["energy_ratio"] = lambda ax: _ratios(ax, gate, spec.threshold)
    if gate and metrics.get("gate"):
        found["roc"] = lambda ax: _roc(ax, gate, spec, metrics["gate"]["auc"])
    if gate and metrics.get("gate") and spec.kind == "cosine":
        found["threshold"] = lambda ax: _thresholds(ax, gate, spec, metrics["gate"])
    if comparison := metrics.get("gate", {}).get("comparison"):
        found["rank_and_centre"] = lambda ax: _comparison(ax, comparison, spec.centre, spec.rank)
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
    _histograms(ax, gate, min(*gate["ir"], *gate["general"]), 1)
    ax.axvline(threshold, color=DARK, linestyle="--", label=f"threshold {threshold:.3f}")
    ax.set(title="Energy ratio, out of sample", xlabel="energy ratio", ylabel="share of queries")
    _legend(ax)


def _similarities(ax: Axes, gate: dict, spec: GateManifest) -> None:
    """As the energy ratios, and on which side of the threshold the gate is open."""
    low, high = (pick(*gate["ir"], *gate["general"], spec.threshold) for pick in (min, max))
    margin = (high - low) / 50 or 0.01
    low, high = low - margin, high + margin
    _histograms(ax, gate, low, high)
    ax.axvline(spec.threshold, color=DARK, linestyle="--", label=f"threshold {spec.threshold:.3f}")
    opened = (spec.threshold, high) if spec.direction == "above" else (low, spec.threshold)
    ax.axvspan(*opened, color=GREY, alpha=0.15, linewidth=0, label=f"gate open ({spec.direction})")
    ax.set(title="Similarity to the condition, out of sample", xlabel="similarity", ylabel="share of queries")
    ax.set_xlim(low, high)
    _legend(ax)


def _histograms(ax: Axes, gate: dict, low: float, high: float) -> None:
    bins = np.linspace(low, high, 61)
    for label, scores, colour in (("need steering", gate["ir"], IR), ("general", gate["general"], GENERAL)):
        ax.hist(scores, bins, weights=np.full(len(scores), 1 / len(scores)), alpha=0.6, color=colour, label=label)


def missed_and_fired(gate: dict, cuts: np.ndarray, direction: str) -> tuple[np.ndarray, np.ndarray]:
    """The share of IR queries that a gate opening at each of (C,) cuts misses, and that of general ones it fires on: (C,), (C,)."""
    sign = -1 if direction == "below" else 1
    ir, general = np.sort(sign * np.array(gate["ir"])), np.sort(sign * np.array(gate["general"]))
    missed = np.searchsorted(ir, sign * cuts) / len(ir)
    return missed, 1 - np.searchsorted(general, sign * cuts) / len(general)


def _roc(ax: Axes, gate: dict, spec: GateManifest, auc: float) -> None:
    cuts = np.sort(np.concatenate([gate["ir"], gate["general"], [-np.inf, np.inf]]))
    ax.plot(*missed_and_fired(gate, cuts, spec.direction), color=IR, linewidth=2)
    if spec.kind == "cosine":
        limit = 1.01
        point = missed_and_fired(gate, np.array([spec.threshold]), spec.direction)
        ax.scatter(*point, s=70, color=DARK, zorder=3, label=f"chosen threshold {spec.threshold:.3f}")
    else:
        limit = 0.5
        ax.axvline(spec.tail, color=DARK, linestyle="--", label=f"wanted miss rate {spec.tail:g}")
    ax.set(title=f"What a lower miss rate costs (AUC {auc:.3f})", xlim=(-0.01, limit), ylim=(-0.01, limit))
    ax.set(xlabel="queries that need steering, missed", ylabel="general queries fired on")
    _legend(ax)


def _thresholds(ax: Axes, gate: dict, spec: GateManifest, metrics: dict) -> None:
    """F1 by the queries' own numbers: of many the evidence holds some."""
    cuts = np.unique([*gate["ir"], *gate["general"], spec.threshold])
    missed, fired = missed_and_fired(gate, cuts, spec.direction)
    num_ir, num_general = sum(m["n"] for m in metrics["missed_by_source"].values()), metrics["general_fired"]["n"]
    hits = (1 - missed) * num_ir
    f1 = 2 * hits / (hits + fired * num_general + num_ir)
    ax.plot(cuts, missed, color=IR, label="missed")
    ax.plot(cuts, fired, color=GENERAL, label="fired on general")
    ax.plot(cuts, f1, color="#228833", linewidth=2, label="F1")
    ax.axvline(spec.threshold, color=DARK, linestyle="--", label=f"chosen: {spec.threshold:.3f}")
    ax.set(title="What each threshold would do", xlabel="threshold", ylabel="share", ylim=(-0.02, 1.02))
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
