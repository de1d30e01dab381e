"""Calibration: what it promises, by simulation and by its definition, and `finesteer calibrate` on a tiny checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from server.cli import app
from steering.errors import TrainingDataError
from steering.gate import AlwaysOpenGate, QuantileGate
from steering.profile import SteeringProfile
from steering.training.calibrate import calibrate_fire_rate, calibrate_miss_rate, fired_out_of_sample
from steering.training.data import file_record
from tests.tiny import constant_profile, save_tiny_checkpoint, tiny_model, tiny_profile

RATE = 0.1
EXPERT_METRICS = {
    "cluster_sizes": [1, 2, 3],
    "validation_error": 0.1,
    "validation_error_mean_vector": 0.2,
    "validation_error_zero": 1.0,
}


def gate_with(decay=2.0, floor=1e-3):
    return QuantileGate(torch.zeros(4), torch.eye(4)[:, :2], torch.tensor([0.5]), 0.5, decay, floor)


def drawn(rng, a, b, count):
    return torch.from_numpy(rng.beta(a, b, count)).float()


@pytest.mark.parametrize(("decay", "floor"), [(2.0, 1e-3), (30.0, 1e-3), (0.5, 0.0)])
def test_of_exchangeable_general_queries_at_most_the_wanted_share_fires_and_of_shifted_ones_more(decay, floor):
    """A second control: with the floor as it was, the soft tail, which fires too, breaks the promise."""
    rng, fired, shifted, soft = np.random.default_rng(0), [], [], []
    for _ in range(300):
        gate, _ = calibrate_fire_rate(gate_with(decay, floor), drawn(rng, 4, 2, 400), drawn(rng, 2, 4, 60), RATE)
        new = drawn(rng, 2, 4, 400)
        fired.append(float((gate.soft_gate(new) > 0).float().mean()))
        soft.append(float((replace(gate, floor=floor).soft_gate(new) > 0).float().mean()))
        shifted.append(float((gate.soft_gate(drawn(rng, 3, 3, 400)) > 0).float().mean()))
    error = np.std(fired) / np.sqrt(len(fired))
    assert np.mean(fired) <= RATE + 2 * error
    assert np.mean(shifted) > 2 * RATE
    assert np.mean(soft) > RATE + 2 * error


def test_the_fire_threshold_is_the_lowest_that_keeps_the_promise_and_the_tails_quantile():
    rng = np.random.default_rng(1)
    ir, general = drawn(rng, 6, 2, 200), drawn(rng, 2, 4, 99)
    gate, guarantee = calibrate_fire_rate(gate_with(), ir, general, RATE)
    upper = sorted(general.tolist())[89]  # the 90th of 99: ten of a hundred places lie above it
    ordered = sorted(ir.tolist())

    k = next(k for k in range(1, 201) if ordered[k - 1] > upper)
    assert float(gate.threshold) == pytest.approx(ordered[k - 1]) and int(gate.tail * 201) == k
    assert sum(gate.soft_gate(general) > 0) <= 10 and (guarantee.rank, guarantee.count) == (10, 99)
    for s in (*ordered, *general.tolist()):  # all or nothing, on the sides of u
        assert gate.soft_gate(torch.tensor([s])) == float(s > upper) or upper < s < ordered[k - 1]
    assert gate.floor < 1


def test_the_realised_miss_rate_follows_its_beta_distribution():
    """Of 1,000 calibrations about 95 % lie below the promised point; the point is no trivial bound."""
    rng, promised, realised = np.random.default_rng(2), 0.0, []
    for _ in range(1000):
        gate, guarantee = calibrate_miss_rate(gate_with(), torch.from_numpy(rng.random(99)).float(), RATE)
        promised = guarantee.realised
        realised.append(float(gate.threshold))  # of uniform ratios this share falls under it
    assert guarantee.expected == 0.1 and np.mean(realised) == pytest.approx(0.1, abs=0.005)
    assert np.mean(np.array(realised) <= promised) == pytest.approx(0.95, abs=0.025)
    assert np.mean(np.array(realised) <= guarantee.expected) < 0.65


def test_fires_are_counted_against_a_gate_set_without_them():
    rng = np.random.default_rng(3)
    ir, general = drawn(rng, 8, 2, 400), drawn(rng, 2, 4, 2000)
    fired = fired_out_of_sample(gate_with(), ir, general, RATE)
    assert float(fired.float().mean()) == pytest.approx(RATE, abs=0.03)
    few = general[:20]
    own, _ = calibrate_fire_rate(gate_with(), ir, few, 0.1)
    assert own.soft_gate(few).count_nonzero() <= 2  # by its own gate, no more can ever fire


def test_too_few_rows_are_refused_with_the_number_needed_and_an_impossible_wish_too():
    some = torch.linspace(0, 1, 50)
    with pytest.raises(TrainingDataError, match="at least 99 IR queries; there are 50"):
        calibrate_miss_rate(gate_with(), some, 0.01)
    assert calibrate_miss_rate(gate_with(), torch.linspace(0, 1, 99), 0.01)[1].rank == 1
    with pytest.raises(TrainingDataError, match="at least 99 general queries; there are 50"):
        calibrate_fire_rate(gate_with(), some, some, 0.01)
    with pytest.raises(TrainingDataError, match="no threshold is left"):
        calibrate_fire_rate(gate_with(), some / 2, some, 0.1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A checkpoint, a profile for it, one without a gate, and new traffic."""
    folder = tmp_path_factory.mktemp("calibrate")
    save_tiny_checkpoint(folder / "model")
    traffic = {
        "queries": [{"query": f"{i} foxes and a cake, please", "source": "ab"[i % 2]} for i in range(60)],
        "general": [{"query": f"how do I break thing {i}"} for i in range(60)],
    }
    for name, rows in traffic.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    profile = tiny_profile(tiny_model())
    metrics = {"gate": {"auc": 0.9}, "experts": EXPERT_METRICS, "answers": {"old gate": 1}}
    trained = {
        "IR": {"sha256": ["0"], "rows": 1, "files": ["x"]},
        "calibration": file_record([folder / "queries.jsonl"], 60),
    }
    manifest = replace(profile.manifest, metrics=metrics, training={"data": trained})
    replace(profile, manifest=manifest).save(folder / "profile")
    spec = replace(profile.manifest.gate, kind="always")
    open_profile = constant_profile(tiny_model())
    open_profile = replace(
        open_profile, gate=AlwaysOpenGate(), manifest=replace(open_profile.manifest, gate=type(spec)("always"))
    )
    open_profile.save(folder / "ungated")
    return folder


def run(lab, out, *options, profile="profile", general=True):
    words = ["calibrate", str(lab / profile), "--model", str(lab / "model"), "--out", str(out)]
    words += ["--queries", str(lab / "queries.jsonl"), *(["--general", str(lab / "general.jsonl")] if general else [])]
    return CliRunner().invoke(app, [*words, *options])


@pytest.mark.parametrize(("option", "rate"), [("--miss-rate", 0.1), ("--fire-rate", 0.3)])
def test_a_calibrated_profile_loads_and_remembers_and_only_its_threshold_is_new(lab, tmp_path, option, rate):
    result = run(lab, tmp_path / "new", option, str(rate))
    assert result.exit_code == 0, result.output
    old, new = SteeringProfile.load(lab / "profile"), SteeringProfile.load(tmp_path / "new")
    assert new.version != old.version and torch.equal(new.gate.basis, old.gate.basis)
    assert torch.equal(new.experts.prototypes, old.experts.prototypes)
    record = new.manifest.training["calibration"]
    assert record["from_version"] == old.version and record["queries"]["rows"] == 60
    assert record["guarantee"]["expected"] <= rate and record["guarantee"]["in_words"][:40] in result.output
    assert set(new.manifest.metrics) == {"experts", "gate"} and new.manifest.metrics["gate"]["general_fired"]["n"] == 60
    assert {"misses of a", "misses of b", "fires on general"} == set(record["rates"])
    assert str(lab) not in (tmp_path / "new" / "profile.json").read_text()
    page = (tmp_path / "new" / "report.html").read_text()
    assert f"The threshold is {new.manifest.gate.threshold:.3f}." in page and new.version in page
    assert new.version in (tmp_path / "new" / "README.md").read_text()
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "new")])
    assert shown.exit_code == 0 and "60 calibration" in shown.output


def test_without_general_traffic_the_old_gates_figures_are_dropped(lab, tmp_path):
    assert run(lab, tmp_path / "new", "--miss-rate", "0.1", general=False).exit_code == 0
    assert SteeringProfile.load(tmp_path / "new").manifest.metrics == {"experts": EXPERT_METRICS}


def test_what_cannot_be_calibrated_is_refused_in_a_sentence_and_nothing_written(lab, tmp_path):
    leaky = SteeringProfile.load(lab / "profile")
    data = {"IR": file_record([lab / "queries.jsonl"], 60)}
    replace(leaky, manifest=replace(leaky.manifest, training={"data": data})).save(tmp_path / "leaky")
    for options, message in (
        ({"profile": tmp_path / "leaky"}, "this file trained profile"),
        ({"profile": "ungated"}, "has no quantile gate"),
    ):
        result = run(lab, tmp_path / "new", "--miss-rate", "0.1", **options)
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    for words, general, message in (
        (("--miss-rate", "0.001"), True, "at least 999 IR queries"),
        (("--fire-rate", "0.1"), False, "--fire-rate needs --general"),
        ((), True, "just one of"),
        (("--miss-rate", "0.1", "--fire-rate", "0.1"), True, "just one of"),
        (("--miss-rate", "2"), True, "between 0 and 1"),
    ):
        result = run(lab, tmp_path / "new", *words, general=general)
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "new").exists()
