"""`report.html`: one self-contained page for someone who never saw the paper. No script, no request to anywhere."""

from __future__ import annotations

from html import escape
from typing import Any

from steering.manifest import ProfileManifest

CSS = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:52rem;margin:2rem auto;padding:0 1rem}
h1,h2{line-height:1.2}h2{margin-top:2.5rem;border-bottom:1px solid #ddd}table{border-collapse:collapse}
td,th{padding:.25rem .8rem .25rem 0;text-align:left;border-bottom:1px solid #eee}svg{max-width:100%;height:auto}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem}.tile{border:1px solid #ccc;border-radius:6px;padding:.6rem .9rem;min-width:9rem}
.tile b{display:block;font-size:1.4rem}.warning{background:#fdf0e0;border-left:4px solid #b3361e;padding:.5rem .8rem}
.expert{border-left:4px solid #ccc;padding-left:.8rem;margin:1rem 0}code,pre{font-size:.9em;white-space:pre-wrap;word-break:break-word}
figure{margin:1rem 0}figcaption{color:#555}
"""
CAPTIONS = {
    "energy_ratio": "Each query's energy ratio, read by a subspace that it did not shape. The two humps should lie apart, with the "
    "threshold between them: what lies right of it is steered in full, what lies just left of it partly.",
    "similarity": "How nearly each query's state lies along the condition vector, read by a vector that the query did not shape. The two "
    "humps should lie apart, with the threshold between them. All of the shaded side is steered in full, nothing of the other.",
    "roc": "Left along the curve fewer queries that need steering are missed, and more general ones are steered for nothing.",
    "threshold": "The threshold with the highest F1, a balance of few misses and little needless steering, was taken. It was found on these "
    "same queries, so what they show at the dashed line is a little flattering; the shares given above are not.",
    "rank_and_centre": "The subspace's rank and the point it is measured from are a choice. Of those that fire least on general "
    "queries the smallest rank was taken. A curve under 0.5 is a gate that works backwards.",
    "clusters": "How well separated the groups of shifts are, for each number of groups. A criterion chooses where it is highest; of "
    "several criteria the median choice is taken.",
    "experts": "Each point is a training pair's shift, brought to length 1; stars are the experts. Points of one colour that lie "
    "together mean that an expert stands for something.",
    "entropy": "Whether the router mixes experts or picks one: over all pairs' queries, most of which trained it. On queries that did not "
    "it may be less sure.",
    "validation": "How far the synthesized vector is from a pair's own shift, on pairs that trained nothing. It should end under the "
    "dashed line: else one vector for all would do as well.",
    "strength": "Answers to held-out queries at each strength, read by the judge. Where broken text rises, the model's text collapses; "
    "the strength in the middle of the plateau was taken. The dose is the vector's length over the state's.",
    "layers": "All candidates, from one extraction: the gate's separation should be near 1, the experts' error low. The chosen layer's "
    "figures are the best of several, so a little flattering.",
}
SECTIONS = (
    ("When it steers: the gate", ("energy_ratio", "similarity", "roc", "threshold", "rank_and_centre")),
    ("How it steers: the experts", ("experts", "clusters", "entropy", "validation")),
    ("How strongly, and where", ("strength", "layers")),
)
GLOSSARY = (
    ("Query that needs steering (IR)", "one of the queries given as such to the trainer"),
    ("State", "the model's residual stream at the chosen layer, at the prompt's last token"),
    ("Shift", "the mean state of a preferred answer minus that of an undesired one"),
    ("Strength", "what the vector is multiplied by; 0 changes nothing"),
)
GATE_GLOSSARY = {
    "quantile": (
        (
            "Energy ratio",
            "the share of a state's squared length that lies in the subspace of the IR queries' states, 0 to 1",
        ),
        ("Gate", "1 from the threshold on, falling softly to exactly 0 below it; at 0 the answer is the plain model's"),
        ("AUC", "the chance that an IR query scores higher than a general one; 0.5 is a coin"),
    ),
    "cosine": (
        (
            "Condition vector",
            "the one direction in which the states of IR and of general queries vary most, taken together",
        ),
        (
            "Similarity",
            "the cosine between a state and its part along the condition vector (each entry of which goes through tanh): 0 where it "
            "has none, larger the more of it lies there, whichever way it points",
        ),
        ("Gate", "1 on the threshold's open side, exactly 0 on the other; at 0 the answer is the plain model's"),
        (
            "F1",
            "2 · hits / (2 · hits + misses + general queries fired on): 1 where there are neither misses nor false alarms",
        ),
        ("AUC", "the chance that an IR query lies further to the gate's open side than a general one; 0.5 is a coin"),
    ),
    "always": (),
}


def page(manifest: ProfileManifest, version: str, evidence: dict[str, Any], svgs: dict[str, str]) -> str:
    """The page's HTML. `svgs`: the figures by name, as `figures.render` gives them; a missing one's place is left out."""
    parts = [
        f"<h1>Steering profile {escape(manifest.name)}</h1>",
        f"<p>{escape(manifest.description)}</p>",
        _tiles(manifest),
    ]
    parts += [f'<p class="warning">{escape(text)}</p>' for text in warnings(manifest, evidence)]
    for title, names in SECTIONS:
        body = [_figure(svgs[name], CAPTIONS[name]) for name in names if name in svgs]
        if title.startswith("When"):
            body.insert(0, _gate(manifest))
        if title.startswith("How it steers"):
            body.append(_experts(evidence))
        if any(body):
            parts += [f"<h2>{title}</h2>", *body]
    rows = "".join(
        f"<tr><th>{escape(term)}</th><td>{escape(text)}</td></tr>"
        for term, text in (*GLOSSARY, *GATE_GLOSSARY[manifest.gate.kind])
    )
    parts += ["<h2>Words</h2>", f"<table>{rows}</table>", "<h2>How it was made</h2>"]
    parts += [
        f"<pre>{escape(manifest.training.get('command', 'not recorded'))}</pre>",
        f"<p>Version <code>{version}</code>.</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(manifest.name)}: steering profile</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def warnings(manifest: ProfileManifest, evidence: dict[str, Any]) -> list[str]:
    """What a reader should know before trusting the profile, in sentences."""
    found, gate, experts = [], manifest.metrics.get("gate", {}), manifest.metrics.get("experts", {})
    if not evidence:
        found.append("This folder has no evidence.json, so figures that need the training's data are left out.")
    if manifest.gate.kind == "always":
        found.append("This profile has no gate: every query is steered.")
    if gate.get("auc", 1) < 0.8:
        found.append(f"The gate separates poorly: AUC {gate['auc']:.2f}. Expect misses and needless steering.")
    for source, missed in gate.get("missed_by_source", {}).items():
        if missed["n"] < 50:
            found.append(
                f"Source {source} has {missed['n']} rows only: its miss rate may be as high as {missed['high']:.0%}."
            )
    if experts and experts["validation_error"] >= experts["validation_error_mean_vector"]:
        found.append(
            "What it makes for each query is no better, held out, than one vector for all: caa would do as well."
        )
    return found


def _tiles(manifest: ProfileManifest) -> str:
    gate, experts = manifest.metrics.get("gate", {}), manifest.metrics.get("experts", {})
    tiles = [("method", manifest.method), ("layer", str(manifest.layer)), ("strength", f"{manifest.strength:g}")]
    if gate:
        missed = gate["missed_by_source"].values()
        share = sum(m["share"] * m["n"] for m in missed) / sum(m["n"] for m in missed)
        tiles += [
            ("missed of what needs it", f"{share:.1%}"),
            ("fires on general", f"{gate['general_fired']['share']:.1%}"),
        ]
    if experts:
        better = experts["validation_error"] / experts["validation_error_mean_vector"]
        tiles.append(("error, of the mean vector's", f"{better:.0%}"))
    inner = "".join(f'<div class="tile"><b>{escape(value)}</b>{escape(label)}</div>' for label, value in tiles)
    return f'<div class="tiles">{inner}</div>'


def _gate(manifest: ProfileManifest) -> str:
    gate, spec = manifest.metrics.get("gate"), manifest.gate
    if not gate:
        return ""
    rows = "".join(
        f"<tr><td>{escape(source)}</td><td>{m['n']}</td><td>{m['share']:.1%}</td><td>{m['low']:.1%} to {m['high']:.1%}</td></tr>"
        for source, m in gate["missed_by_source"].items()
    )
    fired = gate["general_fired"]
    asks = (
        f"how much of the query's state lies in the {spec.rank} directions along which queries that need steering lie"
    )
    if spec.kind == "cosine":
        asks = (
            "how much of the query's state lies along one direction, the condition vector (CAST), and steers in full where that is "
            f"at the threshold or {spec.direction} it, else not at all"
        )
    return (
        f"<p>Before it answers, the server asks {asks}. The threshold is {spec.threshold:.3f}. On general queries it fires in {fired['share']:.1%} "
        f"({fired['low']:.1%} to {fired['high']:.1%}, n = {fired['n']}). Missed, out of sample, 95 % intervals:</p>"
        f"<table><tr><th>source</th><th>n</th><th>missed</th><th>interval</th></tr>{rows}</table>"
    )


def _experts(evidence: dict[str, Any]) -> str:
    found = evidence.get("experts")
    if not found:
        return ""
    parts = ["<h3>What each expert stands for</h3>"]
    if not evidence["examples"]:
        parts.append("<p>Training texts are left out of this report, by choice.</p>")
    for k, expert in enumerate(found["experts"]):
        labels = ", ".join(f"{escape(label)} {count}" for label, count in expert["labels"])
        quoted = "".join(f"<li>{escape(text)}</li>" for text in expert["nearest"])
        parts.append(
            f'<div class="expert"><b>Expert {k}</b>, {expert["size"]} queries{": " + labels if labels else ""}'
            + (f"<br>Nearest:<ul>{quoted}</ul>" if quoted else "")
            + "</div>"
        )
    return "\n".join(parts)


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{escape(caption)}</figcaption></figure>"
