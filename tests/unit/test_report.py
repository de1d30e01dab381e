"""The report: whole, safe, the same each time, and true to the manifest."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from server.cli import app
from steering.evidence import load_evidence
from steering.gate import CosineGate
from steering.profile import SteeringProfile
from steering.report.evidence import MAX_SCORES, _some
from steering.report.figures import figures, missed_and_fired
from tests.lab import make_lab, train

VOID = {"meta", "br", "path", "use", "image", "stop"}


class Page(HTMLParser):
    """Collects text and links, and raises on a tag that is closed out of order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.links, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href") and not v.startswith(("#", "data:"))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = make_lab(tmp_path_factory.mktemp("lab"))
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        row["query"] = row["query"].replace("thing", "<script>alert(1)</script> thing")
        row["kind"] = "a & b"
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folder(lab, tmp_path_factory):
    out = tmp_path_factory.mktemp("profiles") / "p"
    result = train(lab, out, "--layer", "auto", "--strength", "auto", "--strengths", "1,2")
    assert result.exit_code == 0, result.output
    return out


def test_the_page_stands_alone_and_quotes_safely(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.links == [] and "script" not in page.tags and not re.search(r"url\((?!#)|@import", text)
    assert "<script>alert(1)</script>" in "".join(page.text)  # as text
    assert page.tags.count("svg") == 9 and len(list(folder.glob("report_*.svg"))) == 9


def test_its_numbers_are_the_manifests(folder):
    manifest = SteeringProfile.load(folder).manifest
    text = "".join(Page((folder / "report.html").read_text()).text)
    gate = manifest.metrics["gate"]
    assert f"fires in {gate['general_fired']['share']:.1%}" in text and f"n = {gate['general_fired']['n']}" in text
    assert f"The threshold is {manifest.gate.threshold:.3f}." in text
    assert all(f"Expert {k}, {n} queries" in text for k, n in enumerate(manifest.metrics["experts"]["cluster_sizes"]))


def test_an_experts_labels_count_sides_and_kinds(folder):
    experts = json.loads((folder / "evidence.json").read_text())["experts"]["experts"]
    for expert in experts:
        labels = dict(expert["labels"])
        assert labels.pop("a & b") == expert["size"] == sum(labels.values()) and set(labels) <= {
            "harmful",
            "borderline",
        }
    text = (folder / "report.html").read_text()
    assert all(
        f"{label} {count}" in text for expert in experts for label, count in expert["labels"] if "&" not in label
    )


def test_figures_of_an_earlier_training_do_not_stay(folder, lab, tmp_path):
    shutil.copytree(folder, tmp_path / "p")
    assert train(lab, tmp_path / "p", "--method", "caa").exit_code == 0
    assert {p.name for p in (tmp_path / "p").glob("report_*.png")} == {
        f"report_{name}.png" for name in ("energy_ratio", "roc", "rank_and_centre")
    }


def test_inspect_makes_the_same_report_again_from_the_folder_alone(folder, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(folder, again, ignore=shutil.ignore_patterns("report*"))
    result = CliRunner().invoke(app, ["inspect", str(again), "--html"])
    assert result.exit_code == 0, result.output
    assert {p.name for p in again.iterdir()} == {p.name for p in folder.iterdir()}
    for path in folder.glob("report*"):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_without_evidence_the_page_says_what_is_left_out_and_damaged_evidence_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "p", ignore=shutil.ignore_patterns("report*"))
    for damaged, message in (
        ("{", "not valid JSON"),
        ("[]", "not what the trainer writes"),
        ('{"examples": true, "gate": 1}', "not what the trainer writes"),
        ('{"examples": true, "gate": {"ir": [], "general": [0.1]}}', "not what the trainer writes"),
    ):
        (tmp_path / "p" / "evidence.json").write_text(damaged)
        result = CliRunner().invoke(app, ["inspect", str(tmp_path / "p"), "--html"])
        assert result.exit_code == 2 and f"evidence.json: {message}" in " ".join(result.output.split())
    (tmp_path / "p" / "evidence.json").unlink()
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "p"), "--html"]).exit_code == 0
    text = (tmp_path / "p" / "report.html").read_text()
    assert "no evidence.json" in text and text.count("<svg") == 4 and "What each expert" not in text


def test_no_examples_leaves_no_training_text_in_the_folder(lab, tmp_path):
    assert train(lab, tmp_path / "p", "--no-examples").exit_code == 0
    for path in (tmp_path / "p").glob("*.[hjm]*"):
        assert "alert(1)" not in path.read_text() and "thing 1" not in path.read_text(), path.name
    text = (tmp_path / "p" / "report.html").read_text()
    assert "left out of this report, by choice" in text and "a &amp; b" in text


@pytest.mark.parametrize(("method", "num_figures"), [("caa", 3), ("refusal_vector", 3), ("cast", 3), ("alphasteer", 0)])
def test_a_baseline_has_its_own_sections_only(lab, tmp_path, method, num_figures):
    assert train(lab, tmp_path / "p", "--method", method).exit_code == 0
    text = (tmp_path / "p" / "report.html").read_text()
    Page(text)
    assert text.count("<svg") == num_figures and "What each expert" not in text and "None" not in text
    assert ("condition vector" in text) == (method == "cast") and ("has no gate" in text) == (method == "alphasteer")
    assert ("Energy ratio" in text and "falling softly" in text) == (method not in ("cast", "alphasteer"))
    assert ("<th>F1</th>" in text) == (method == "cast") and ("<th>AUC</th>" in text) == (method != "alphasteer")


def test_casts_figures_show_what_its_gate_does(lab, tmp_path):
    """The similarities, the threshold with its open side, and F1, whose highest point is the one in the manifest."""
    few = tmp_path / "general.jsonl"
    few.write_text("".join((lab / "general.jsonl").read_text().splitlines(keepends=True)[:40]))
    assert train(lab, tmp_path / "p", "--method", "cast", general=few).exit_code == 0
    manifest, evidence = SteeringProfile.load(tmp_path / "p").manifest, load_evidence(tmp_path / "p")
    spec, metrics = manifest.gate, manifest.metrics["gate"]
    assert (
        len(evidence["gate"]["ir"]) == metrics["missed_by_source"]["calibration"]["n"] == 60
    )  # kept apart by --calibration
    assert len(evidence["gate"]["general"]) == metrics["general_fired"]["n"] == 40
    drawn = figures(manifest, evidence)
    assert list(drawn) == ["similarity", "roc", "threshold"]
    axes = {name: plt.figure().add_subplot() for name in drawn}
    for name, draw in drawn.items():
        draw(axes[name])
    labels = [text.get_text() for text in axes["similarity"].get_legend().get_texts()]
    assert f"gate open ({spec.direction})" in labels and f"threshold {spec.threshold:.3f}" in labels
    lines = {line.get_label(): line.get_data() for line in axes["threshold"].get_lines()}
    cuts, f1 = lines["F1"]
    assert f1.max() == pytest.approx(metrics["f1"], abs=1e-3)
    assert f1[np.abs(cuts - spec.threshold).argmin()] == f1.max() > f1.min() + 0.05
    [point] = axes["roc"].collections[0].get_offsets()
    chosen = np.abs(cuts - spec.threshold).argmin()
    assert tuple(point) == (lines["missed"][1][chosen], lines["fired on general"][1][chosen])
    plt.close("all")


@pytest.mark.parametrize("direction", ["above", "below"])
def test_missed_and_fired_are_the_gates_own_counts(direction):
    generator = np.random.default_rng(0)
    gate = {"ir": (generator.integers(0, 9, 30) / 8).tolist(), "general": (generator.integers(0, 7, 50) / 8).tolist()}
    cuts = np.array([-np.inf, *(np.arange(-3, 36) / 32), np.inf])  # ties, and what lies between
    missed, fired = missed_and_fired(gate, cuts, direction)
    for cut, m, f in zip(cuts, missed, fired, strict=True):
        opens = CosineGate(torch.ones(1), float(cut), direction).hard_gate
        assert m == pytest.approx(1 - float(opens(torch.tensor(gate["ir"])).mean()), abs=1e-6)
        assert f == pytest.approx(float(opens(torch.tensor(gate["general"])).mean()), abs=1e-6)
    other = missed_and_fired(gate, cuts, "below" if direction == "above" else "above")
    assert np.abs(other[0] - missed).max() > 0.5


def test_the_entropys_caption_says_that_training_queries_are_in_it(folder):
    text = "".join(Page((folder / "report.html").read_text()).text)
    evidence = json.loads((folder / "evidence.json").read_text())["experts"]
    assert len(evidence["entropy"]) == sum(SteeringProfile.load(folder).manifest.metrics["experts"]["cluster_sizes"])
    assert "all pairs' queries, most of which trained it" in text


@pytest.mark.parametrize("count", [9_000, 30_000])
def test_of_many_scores_the_evidence_keeps_evenly_spaced_ones_with_both_ends(count):
    kept = _some(torch.arange(count), MAX_SCORES)
    assert len(kept) == min(count, MAX_SCORES) and kept[0] == 0 and kept[-1] == count - 1
    assert kept.diff().max() - kept.diff().min() <= 1


def test_the_second_variants_report_is_as_whole_as_the_firsts(lab, tmp_path):
    assert train(lab, tmp_path / "p", "--variant", "orthogonal_residual").exit_code == 0
    assert (tmp_path / "p" / "report.html").read_text().count("<svg") == 7


def test_warnings_name_what_is_weak():
    from dataclasses import replace

    from steering.report.page import warnings
    from tests.tiny import tiny_model, tiny_profile

    manifest = tiny_profile(tiny_model()).manifest
    weak = {
        "gate": {"auc": 0.7, "missed_by_source": {"few": {"share": 0, "n": 5, "low": 0, "high": 0.52}}},
        "experts": {"validation_error": 0.9, "validation_error_mean_vector": 0.8},
    }
    found = " ".join(warnings(replace(manifest, metrics=weak), {"examples": True}))
    assert "AUC 0.70" in found and "few has 5 rows" in found and "no better, held out, than one vector" in found
    sound = {
        "gate": {"auc": 0.9, "missed_by_source": {"many": {"share": 0, "n": 500, "low": 0, "high": 0.01}}},
        "experts": {"validation_error": 0.1, "validation_error_mean_vector": 0.8},
    }
    assert warnings(replace(manifest, metrics=sound), {"examples": True}) == []
