"""`finesteer train` and `finesteer inspect`, whole, on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from server.cli import app
from steering.gate import CosineGate
from steering.profile import SteeringProfile
from tests.lab import make_lab, train


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


def test_train_writes_a_profile_that_loads_twice_the_same_and_names_no_folder(lab, tmp_path):
    for out in ("one", "two"):
        result = train(lab, tmp_path / out)
        assert result.exit_code == 0, result.output
    first, second = (tmp_path / out / "profile.safetensors" for out in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    profile = SteeringProfile.load(tmp_path / "one")
    assert profile.manifest.model.id == "model" and profile.manifest.metrics["gate"]["general_fired"]["n"] == 60
    assert profile.manifest.gate.num_calibration == 60
    assert {p.name for p in (tmp_path / "one").glob("*.md")} == {"README.md", "report.md"}
    for path in (tmp_path / "one").glob("*.[jm]*"):
        assert str(lab) not in path.read_text(), path
    for name in [
        line.split("(")[1].rstrip(")")
        for line in (tmp_path / "one" / "report.md").read_text().splitlines()
        if line.startswith("![")
    ]:
        assert (tmp_path / "one" / name).stat().st_size > 5000


def test_baselines_are_the_means_of_their_shifts(lab, tmp_path):
    from steering.training.data import read_pairs
    from steering.training.extraction import shifts
    from tests.tiny import tiny_model, tiny_tokenizer

    pairs = read_pairs([lab / "pairs.jsonl"])
    deltas = shifts(tiny_model(), tiny_tokenizer(), pairs, 1)
    for method, chosen in (("caa", slice(None)), ("refusal_vector", [p.side == "harmful" for p in pairs])):
        assert train(lab, tmp_path / method, "--method", method).exit_code == 0
        vector = SteeringProfile.load(tmp_path / method).experts.vector
        assert (vector - deltas[chosen].mean(0)).abs().max() < 1e-3
    assert (deltas.mean(0) - deltas[[p.side == "harmful" for p in pairs]].mean(0)).abs().max() > 1e-2


def test_cast_is_a_hard_gate_and_the_mean_of_the_harmful_shifts(lab, tmp_path):
    assert train(lab, tmp_path / "c", "--method", "cast").exit_code == 0
    assert train(lab, tmp_path / "r", "--method", "refusal_vector").exit_code == 0
    profile = SteeringProfile.load(tmp_path / "c")
    assert isinstance(profile.gate, CosineGate) and profile.manifest.gate.num_calibration == 120
    assert torch.equal(profile.experts.vector, SteeringProfile.load(tmp_path / "r").experts.vector)
    assert 0 < profile.manifest.metrics["gate"]["f1"] <= 1
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "c")]).output
    assert "cosine" in shown and "best F1" in shown
    assert "CAST, cosine" in (tmp_path / "c" / "README.md").read_text()


def test_alphasteer_has_no_gate_and_steers_along_the_mean_of_the_harmful_shifts(lab, tmp_path):
    result = train(lab, tmp_path / "a", "--method", "alphasteer")
    assert result.exit_code == 0, result.output
    assert train(lab, tmp_path / "r", "--method", "refusal_vector").exit_code == 0
    profile = SteeringProfile.load(tmp_path / "a")
    assert profile.manifest.gate.kind == "always" and profile.manifest.experts.map_rank == 1
    assert torch.equal(profile.experts.left[:, 0], SteeringProfile.load(tmp_path / "r").experts.vector)
    found = profile.manifest.metrics["experts"]
    assert found["validation_error"] == pytest.approx(min(c["error"] for c in found["comparison"]), abs=1e-4)
    assert "a matrix of rank 1" in CliRunner().invoke(app, ["inspect", str(tmp_path / "a")]).output


def test_the_second_variant_says_so_and_how_it_chose_its_prototypes(lab, tmp_path):
    result = train(lab, tmp_path / "o", "--variant", "orthogonal_residual")
    assert result.exit_code == 0, result.output
    profile = SteeringProfile.load(tmp_path / "o")
    assert profile.manifest.experts.variant == "orthogonal_residual" and profile.experts.value_projection is not None
    found = profile.manifest.metrics["experts"]
    assert set(found["chosen_by"]) == {"elbow", "silhouette", "calinski_harabasz"} <= set(found)
    assert "orthogonal_residual" in CliRunner().invoke(app, ["inspect", str(tmp_path / "o")]).output


@pytest.mark.parametrize("method", ["alphasteer", "cast"])
def test_layers_are_compared_by_what_the_method_has_to_compare(lab, tmp_path, method):
    result = train(lab, tmp_path / "x", "--method", method, "--layer", "auto")
    assert result.exit_code == 0, result.output
    scores = SteeringProfile.load(tmp_path / "x").manifest.metrics["layers"]
    assert len(scores) == 4 and all((s["auc"] is None) == (method == "alphasteer") for s in scores)
    assert all((s["validation_error"] is None) == (method == "cast") for s in scores)


@pytest.mark.parametrize(
    ("without", "extra", "message"),
    [
        (("ir", "general", "calibration"), ("--method", "alphasteer"), "alphasteer needs --general"),
        (("ir", "calibration"), ("--method", "cast"), "cast needs --ir and --general"),
        (("general", "calibration"), (), "--ir needs --general"),
        (("ir", "calibration"), (), "--general needs --ir"),
        (("ir", "general"), ("--method", "caa"), "--calibration needs --ir and --general"),
        ((), ("--method", "caa", "--variant", "orthogonal_residual"), "is of --method finesteer; caa has none"),
    ],
)
def test_a_method_without_what_it_needs_is_refused_before_anything_is_read(lab, tmp_path, without, extra, message):
    result = train(lab, tmp_path / "x", *extra, **dict.fromkeys(without))
    assert result.exit_code == 2 and message in " ".join(result.output.split()) and not (tmp_path / "x").exists()


def pair_file(path, count, **fields):
    """Pairs of the lab, with other fields. A field may be a function of the row's number."""
    rows = [
        {"query": f"how do I break thing {i}", "preferred": f"no {i}", "undesired": f"yes {i}"}
        | {key: value(i) if callable(value) else value for key, value in fields.items()}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("count", "fields", "method", "message"),
    [
        (1, {}, "finesteer", "at least 20 pairs of different queries; there are 1."),
        (40, {"query": "the same"}, "finesteer", "at least 20 pairs of different queries; there are 1."),
        (40, {}, "refusal_vector", 'refusal_vector needs pairs with "side": "harmful"; the files have none.'),
        (40, {"side": "borderline"}, "refusal_vector", "their sides are borderline."),
        (40, {"side": "Harmful"}, "alphasteer", "their sides are Harmful."),
        (40, {"side": "borderline"}, "cast", "their sides are borderline."),
    ],
)
def test_pairs_that_cannot_make_a_profile_are_refused_before_the_model_reads(
    lab, tmp_path, count, fields, method, message, options, monkeypatch
):
    monkeypatch.setattr("steering.training.extraction._reading", None)
    pairs = pair_file(tmp_path / "p.jsonl", count, **fields)
    result = train(lab, tmp_path / "x", "--method", method, *options, calibration=None, pairs=pairs)
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "count", "extra", "message"),
    [
        ("ir", 9, (), "at least 10 IR and 10 general queries; there are 9 and 60"),
        ("general", 9, (), "there are 60 and 9"),
        ("general", 9, ("--method", "cast"), "cast needs at least 10"),
        ("ir", 9, ("--method", "alphasteer"), "alphasteer needs at least 10"),
        ("calibration", 18, (), "at least 19 calibration queries; there are 18"),
        ("ir", 30, ("--rank", "24"), "rank 24 needs more than 30 IR queries"),
    ],
)
def test_too_few_queries_are_refused_before_the_model_reads(lab, tmp_path, name, count, extra, message, monkeypatch):
    monkeypatch.setattr("steering.training.extraction._reading", None)
    few = tmp_path / "few.jsonl"
    few.write_text("".join((lab / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]))
    result = train(lab, tmp_path / "x", *extra, **{name: few})
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output


@pytest.mark.parametrize("name", ["ir", "general", "calibration"])
def test_queries_that_the_template_shows_alike_are_refused(lab, tmp_path, name):
    """All that tells them apart is a system message, which this template does not show."""
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(lab / "model", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}<|assistant|>"
    tokenizer.save_pretrained(model)
    alike = tmp_path / "alike.jsonl"
    chats = [[{"role": "system", "content": str(i)}, {"role": "user", "content": f"go, {name}"}] for i in range(40)]
    alike.write_text("".join(json.dumps({"query": chat}) + "\n" for chat in chats))
    result = train(lab, tmp_path / "x", "--model", str(model), **{name: alike})
    message = " ".join(result.output.split())
    shown = {"ir": "IR"}.get(name, name)
    assert result.exit_code == 2 and f"the 40 {shown} queries have one and the same state" in message, message


def test_pairs_whose_shifts_cancel_are_refused(lab, tmp_path):
    swapped = {"preferred": lambda i: "yes" if i % 2 else "no", "undesired": lambda i: "no" if i % 2 else "yes"}
    pairs = pair_file(tmp_path / "p.jsonl", 40, query=lambda i: f"how do I break thing {i // 2}", **swapped)
    result = train(lab, tmp_path / "x", "--method", "caa", pairs=pairs)
    assert result.exit_code == 2 and "caa: the pairs' mean shift is zero" in " ".join(result.output.split())
    unswapped = pair_file(tmp_path / "p.jsonl", 40, preferred="no", undesired="yes")
    assert train(lab, tmp_path / "x", "--method", "caa", pairs=unswapped).exit_code == 0


def test_a_profile_is_not_written_over_a_file(lab, tmp_path):
    (tmp_path / "x").write_text("mine")
    result = train(lab, tmp_path / "x")
    assert result.exit_code == 2 and "is a file; name a folder" in " ".join(result.output.split())
    assert (tmp_path / "x").read_text() == "mine"


def test_inspect_prints_what_is_in_it_and_says_what_is_broken(lab, tmp_path):
    assert train(lab, tmp_path / "p").exit_code == 0
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "p")])
    version = SteeringProfile.load(tmp_path / "p").version
    assert shown.exit_code == 0 and version in shown.output and "60 calibration" in shown.output
    (tmp_path / "p" / "profile.safetensors").write_bytes(b"")
    broken = CliRunner().invoke(app, ["inspect", str(tmp_path / "p")])
    assert broken.exit_code == 2 and "sha256 differs" in broken.output and "Traceback" not in broken.output


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--layer", "9"), "layers 0 to 3"),
        (("--method", "magic"), "--method 'magic' is unknown"),
        (("--variant", "odd"), "--variant 'odd' is unknown"),
        (("--rank", "many"), "--rank 'many'"),
        (("--tail", "2"), "--tail"),
        (("--rank", "63"), "rank 63 needs"),
        (("--strength", "strong"), "--strength must be a number or auto"),
        (("--strength", "auto", "--strengths", "0,1"), "--strengths numbers above 0"),
        (("--epochs", "0"), "greater than or equal to 1"),
        (("--seed", "-1"), "greater than or equal to 0"),
        (("--batch-tokens", "0"), "greater than or equal to 1"),
        (("--learning-rate", "nan"), "--learning-rate above 0"),
    ],
)
def test_impossible_options_are_refused_in_a_sentence(lab, tmp_path, extra, message):
    result = train(lab, tmp_path / "x", *extra)
    assert result.exit_code == 2 and message in " ".join(result.output.split()) and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("group", "source"),
    [("calibration", "ir"), ("calibration", "general"), ("general", "ir"), ("calibration", "pairs")],
)
def test_a_query_in_two_groups_is_refused_by_line(lab, tmp_path, group, source):
    leak = tmp_path / "leak.jsonl"
    first = json.loads((lab / f"{source}.jsonl").read_text().splitlines()[0])
    leak.write_text(json.dumps({"query": "a new one"}) + "\n" + json.dumps({"query": first["query"]}) + "\n")
    result = train(lab, tmp_path / "x", **{group: leak})
    assert result.exit_code == 2 and not (tmp_path / "x").exists()
    assert "leak.jsonl:2" in result.output.replace("\n", "") or f"{source}.jsonl:1" in result.output.replace("\n", "")


def test_the_layer_is_chosen_among_the_candidates_and_the_cache_changes_nothing(lab, tmp_path):
    first = train(lab, tmp_path / "p", "--layer", "1-3")
    again = train(lab, tmp_path / "q", "--layer", "1-3", "--cache", str(tmp_path / "p.cache"))
    assert first.exit_code == again.exit_code == 0, first.output + again.output
    files = [(tmp_path / out / "profile.safetensors").read_bytes() for out in "pq"]
    assert files[0] == files[1] and not (tmp_path / "q.cache").exists()
    manifest = SteeringProfile.load(tmp_path / "p").manifest
    assert [score["layer"] for score in manifest.metrics["layers"]] == [1, 2, 3] and manifest.layer in (1, 2, 3)
    alone = train(lab, tmp_path / "r", "--layer", str(manifest.layer), "--no-cache")
    assert alone.exit_code == 0 and not (tmp_path / "r.cache").exists()
    assert SteeringProfile.load(tmp_path / "r").manifest.metrics["gate"] == manifest.metrics["gate"]


def test_a_leak_is_found_whatever_its_case_and_spaces(lab, tmp_path):
    leak = tmp_path / "leak.jsonl"
    leak.write_text(json.dumps({"query": "  How do I   BREAK thing 0 "}) + "\n")
    result = train(lab, tmp_path / "x", calibration=leak)
    assert result.exit_code == 2 and "worthless" in " ".join(result.output.split())


def test_among_layers_that_separate_alike_the_validation_error_decides():
    from steering.training.layers import LayerScore, choose_layer

    alike = [LayerScore(3, 0.95, 0.1, 0.9), LayerScore(5, 0.935, 0.1, 0.5), LayerScore(7, 0.6, 0.5, 0.1)]
    assert choose_layer(alike, 100, 100).layer == 5
    assert choose_layer(alike, 100_000, 100_000).layer == 3  # with so many rows 0.015 is a difference
    perfect = [LayerScore(1, 0.996, 0.0, 0.05), LayerScore(4, 1.0, 0.0, 0.09)]
    assert (
        choose_layer(perfect, 400, 400).layer == 1
    )  # a perfect gate has no standard error, and is not worth that much


def test_strength_auto_is_judged_on_a_tenth_that_trained_nothing(lab, tmp_path):
    arguments = ("--strength", "auto", "--strengths", "0.5,2")
    for out in ("one", "two"):
        result = train(lab, tmp_path / out, *arguments)
        assert result.exit_code == 0, result.output
    one, two = (SteeringProfile.load(tmp_path / out).manifest for out in ("one", "two"))
    assert one.metrics == two.metrics and one.tensors_sha256 == two.tensors_sha256
    sweep = one.metrics["strength"]
    assert [p["strength"] for p in sweep["points"]] == [0, 0.5, 2] and one.strength == sweep["chosen"] in (0.5, 2)
    assert all(p["success"]["n"] == 6 and p["over_refusal"]["n"] == 6 for p in sweep["points"])  # of 60 and 60
    rows = {name: found["rows"] for name, found in one.training["data"].items()}
    assert rows == {"pairs": 108, "IR": 54, "general": 54, "calibration": 60}
    assert sweep["points"][0]["dose"] == 0 < sweep["points"][2]["dose"]


def test_what_is_held_out_is_in_no_other_group_with_all_its_pairs(lab):
    from steering.training.data import read_pairs, read_queries
    from steering.training.held_out import hold_out

    pairs = read_pairs([lab / "pairs.jsonl"])
    rows = {name: read_queries([lab / f"{file}.jsonl"]) for name, file in (("IR", "ir"), ("general", "general"))}
    left, kept, held = hold_out(pairs, rows | {"calibration": read_queries([])}, 0)
    aside = {p.query for p in held.pairs} | set(held.general)
    assert len(held.pairs) == 12 and len({p.query for p in held.pairs}) == 6 and len(held.general) == 6
    assert not aside & {p.query for p in left} and not aside & {r.query for found in kept.values() for r in found}
    assert len(left) + len(held.pairs) == len(pairs)


def test_a_dry_run_counts_checks_and_writes_nothing(lab, tmp_path):
    result = train(lab, tmp_path / "p", "--layer", "auto", "--dry-run")
    said = " ".join(result.output.split())
    assert result.exit_code == 0 and "4 layers' states of 180 queries and 120 pairs" in said, said
    assert list(tmp_path.iterdir()) == []
    leak = tmp_path / "leak.jsonl"
    leak.write_text(json.dumps({"query": "how do I break thing 0"}) + "\n")
    assert train(lab, tmp_path / "p", "--dry-run", calibration=leak).exit_code == 2
