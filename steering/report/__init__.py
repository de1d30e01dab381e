"""The report beside a profile: `report.html`, `report.md` and figures, from the manifest and `evidence.json` alone."""

from __future__ import annotations

from pathlib import Path

from steering.evidence import load_evidence
from steering.profile import REPORT_FILE, SteeringProfile
from steering.report import evidence as evidence_file
from steering.report.figures import figures, render
from steering.report.markdown import markdown
from steering.report.page import page
from steering.training.trainer import Training


def write_report(training: Training, folder: Path, *, examples: bool = True) -> Path:
    """Write evidence and report into a saved profile's folder; returns the page's path.

    `examples`: whether training queries may be quoted.
    """
    evidence_file.save(evidence_file.collect(training, examples), folder)
    return rebuild_report(training.profile, folder)


def rebuild_report(profile: SteeringProfile, folder: Path, out: Path | None = None) -> Path:
    """Write the report again from what `folder` holds, into `out` (default: the folder itself); returns the page's path.

    Raises ProfileError for damaged evidence.
    """
    out = folder if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("report_*.png"), *out.glob("report_*.svg")):  # another method may have drawn more
        stale.unlink()
    manifest, evidence, svgs = profile.manifest, load_evidence(folder), {}
    for name, draw in figures(manifest, evidence).items():
        png, svgs[name] = render(draw, name)
        (out / f"report_{name}.png").write_bytes(png)
        (out / f"report_{name}.svg").write_text(svgs[name], encoding="utf-8")
    (out / "report.md").write_text(markdown(manifest, profile.version, tuple(svgs)), encoding="utf-8")
    path = out / REPORT_FILE
    path.write_text(page(manifest, profile.version, evidence, svgs), encoding="utf-8")
    return path
