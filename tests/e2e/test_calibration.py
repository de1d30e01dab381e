"""Conformal calibration on real queries' states: over random splits, the unseen part misses what was promised."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from artifacts.recipe.suites import suites
from server.engine.native.load import load_model
from steering.gate import energy_ratio
from steering.profile import SteeringProfile
from steering.training.calibrate import calibrate_fire_rate, calibrate_miss_rate
from steering.training.data import Query, read_queries
from steering.training.extraction import encode_query, query_states
from steering.training.fit_gate import fit_gate

ROOT = Path(__file__).parents[2]
DEMO, PROFILE = ROOT / "artifacts" / "demo", ROOT / "artifacts" / "profiles" / "safety"
DATA = Path(os.environ.get("FINESTEER_DATA", ROOT.parent / "shared" / "data" / "safety"))
SPLITS, SHAPING, CALIBRATING = 200, 400, 500
MOST_TOKENS = 160

pytestmark = [
    pytest.mark.data,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DATA / "harmful_val.jsonl").is_file(),
        reason="the public prompt sets are not here; set FINESTEER_DATA to their folder",
    ),
]


@pytest.fixture(scope="module")
def profile():
    return SteeringProfile.load(PROFILE)


@pytest.fixture(scope="module")
def states(profile):
    """Set → states at the profile's site: the first thousand short queries of public files, and the demo's held-out sets."""
    model, tokenizer = load_model(str(DEMO), dtype="float32", device="cpu"), AutoTokenizer.from_pretrained(DEMO)
    sets = {
        name: [row.query for row in read_queries([DATA / f"{name}.jsonl"])]
        for name in ("harmful_train", "harmful_val", "benign_train", "benign_val")
    }
    for name, (_, rows) in suites(DATA).items():
        sets[name] = [Query((("user", row["query"]),)) for row in rows]
    found = {}
    for name, queries in sets.items():
        short = [q for q in queries if len(encode_query(tokenizer, q)) <= MOST_TOKENS][:1000]
        found[name] = query_states(model, tokenizer, short, profile.layer)
    return found


@pytest.fixture(scope="module", params=["a subspace made here", "the demo profile's subspace"])
def ratios(request, profile, states):
    """A gate, and the energy ratios under it of queries that did not shape it, by set.

    Made here: 400 of harmful_train shape, the others are IR, harmful_val is another source. The profile's: its held-out
    harmful and borderline queries are IR.
    """
    if request.param == "a subspace made here":
        order = torch.randperm(len(states["harmful_train"]), generator=torch.Generator().manual_seed(0))
        shaping, rest = states["harmful_train"][order[:SHAPING]], states["harmful_train"][order[SHAPING:]]
        gate = fit_gate(shaping, states["benign_train"][:SHAPING], decay=profile.gate.decay).gate
        sets = {"IR": rest, "another source": states["harmful_val"], "general": states["benign_val"]}
    else:
        gate = profile.gate
        sets = {"IR": torch.cat([states["harmful"], states["borderline"]]), "general": states["benign"]}
    return request.param, gate, {name: energy_ratio(some, gate.mean, gate.basis) for name, some in sets.items()}


def over_splits(ratios, count, calibrate, bad):
    """Mean over the splits of the share of unseen `ratios` that is `bad` under a gate calibrated on `count`, and its error."""
    shares = []
    for seed in range(SPLITS):
        order = torch.randperm(len(ratios), generator=torch.Generator().manual_seed(seed))
        gate = calibrate(ratios[order[:count]])
        shares.append(float(bad(gate, ratios[order[count:]]).float().mean()))
    shares = torch.tensor(shares)
    return float(shares.mean()), float(shares.std() / math.sqrt(SPLITS))


def missed(gate, ratios):
    return ratios < gate.threshold


def fired(gate, ratios):
    return gate.soft_gate(ratios) > 0


@pytest.mark.parametrize("tail", [0.01, 0.05, 0.1])
def test_unseen_queries_are_missed_no_more_often_than_wanted(ratios, tail):
    label, gate, found = ratios
    count = min(CALIBRATING, len(found["IR"]) * 2 // 3)
    beside = {name: [] for name in ("general fired", "general fully open", "another source missed")}

    def calibrate(some):
        made = calibrate_miss_rate(gate, some, tail)[0]
        beside["general fired"].append(float(fired(made, found["general"]).float().mean()))
        beside["general fully open"].append(1 - float(missed(made, found["general"]).float().mean()))
        if "another source" in found:
            beside["another source missed"].append(float(missed(made, found["another source"]).float().mean()))
        return made

    mean, error = over_splits(found["IR"], count, calibrate, missed)
    others = ", ".join(f"{name} {sum(some) / SPLITS:.2%}" for name, some in beside.items() if some)
    print(
        f"\n{label}, wanted miss rate {tail:.0%}: missed {mean:.2%} ± {error:.2%} (standard error) of unseen; {others} "
        f"({count} calibrate, {len(found['IR']) - count} unseen, {len(found['general'])} general)"
    )
    assert tail / 3 < mean <= tail + 2 * error  # and it is no threshold that lets everything through


def test_a_threshold_from_states_that_shaped_the_subspace_misses_more(states):
    """The control: what the guarantee needs is that the calibration's queries are like the unseen ones."""
    own, unseen = states["harmful_train"][:150], states["harmful_train"][150:]
    gate = fit_gate(own, states["benign_train"][:SHAPING], rank=64, centre="general", force=True).gate
    leaky = calibrate_miss_rate(gate, energy_ratio(own, gate.mean, gate.basis), 0.05)[0]
    share = float(missed(leaky, energy_ratio(unseen, gate.mean, gate.basis)).float().mean())
    print(f"\ncalibrated on the subspace's own queries for 5 %: misses {share:.1%} of unseen")
    assert share > 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(unseen))


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1])
def test_unseen_general_queries_fire_the_gate_no_more_often_than_wanted(ratios, rate):
    """No lower bound: the threshold is an IR ratio, which may lie well above the general ones."""
    label, gate, found = ratios
    missing = []

    def calibrate(some):
        made = calibrate_fire_rate(gate, found["IR"], some, rate)[0]
        missing.append(float(missed(made, found["IR"]).float().mean()))
        return made

    count = min(CALIBRATING, len(found["general"]) * 2 // 3)
    mean, error = over_splits(found["general"], count, calibrate, fired)
    print(
        f"\n{label}, wanted fire rate {rate:.0%}: fires on {mean:.2%} ± {error:.2%} (standard error) of unseen general; misses "
        f"{sum(missing) / SPLITS:.2%} of IR"
    )
    assert 0 < mean <= rate + 2 * error
