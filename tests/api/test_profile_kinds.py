"""The baselines' gates and vectors behind the API: what they decide, what responses, cards and metrics say of them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from steering.experts import ConstantVector, LinearMap
from steering.gate import AlwaysOpenGate, CosineGate
from steering.manifest import ExpertsManifest, GateManifest
from steering.profile import SteeringProfile
from tests.checkpoint import CALM, FIRING
from tests.serving import serving


@pytest.fixture(scope="module")
def kinds(artifacts, tmp_path_factory):
    """The checkpoint, and its safety profile with CAST's gate and vector, and with AlphaSteer's matrix, in their place."""
    folder = tmp_path_factory.mktemp("kinds")
    profile = SteeringProfile.load(artifacts.safety)
    gate, experts = profile.gate, profile.experts
    vector = experts.shift_scale * experts.prototypes[0]
    condition = gate.basis[:, 0].contiguous()
    cast = replace(
        profile,
        gate=CosineGate(condition, 0.0, "above"),
        experts=ConstantVector(vector),
        manifest=replace(
            profile.manifest,
            name="cast",
            method="cast",
            gate=GateManifest("cosine", threshold=0.0, num_calibration=8, direction="above"),
            experts=ExpertsManifest("constant"),
        ),
    )
    closed = replace(
        cast,
        gate=replace(cast.gate, threshold=1.5),
        manifest=replace(cast.manifest, gate=replace(cast.manifest.gate, threshold=1.5)),
    )
    alphasteer = replace(
        profile,
        gate=AlwaysOpenGate(),
        experts=LinearMap(vector[:, None].contiguous(), condition[None]),
        manifest=replace(
            profile.manifest,
            name="alphasteer",
            method="alphasteer",
            gate=GateManifest("always"),
            experts=ExpertsManifest("linear", map_rank=1),
        ),
    )
    found = {"cast": cast, "closed": closed, "alphasteer": alphasteer}
    for name, made in found.items():
        made.save(folder / name)
    return SimpleNamespace(model=artifacts.model, **{name: folder / name for name in found})


async def test_a_cosine_gate_opens_or_stays_shut_and_reports_its_threshold_and_no_energy_ratio(kinds):
    async with serving(kinds, ("cast", "closed")) as served:
        plain = (await served.chat(FIRING[0], model="tiny:unsteered")).json()
        for name, gate, threshold in (("cast", 1, 0.0), ("closed", 0, 1.5)):
            body = (await served.chat(FIRING[0], steer_profiles=[name], steer_metadata="full")).json()
            [report] = body["steering"]["profiles"]
            assert (report["method"], report["gate"], report["fired"]) == ("cast", gate, bool(gate))
            assert (report["energy_ratio"], report["threshold"], report["tail"]) == (None, threshold, None)
            same = body["choices"][0]["message"]["content"] == plain["choices"][0]["message"]["content"]
            assert same == (not gate)
        metrics = (await served.client.get("/metrics")).text
        card = (await served.client.get("/v1/steering/profiles/cast")).json()
    assert card["gate"] == {"kind": "cosine", "threshold": 0.0, "num_calibration": 8, "direction": "above"}
    assert card["experts"] == {"kind": "constant"}
    assert 'finesteer:gate_threshold{profile="closed"} 1.5' in metrics
    assert 'finesteer:gate_fired_total{profile="cast"} 1.0' in metrics
    assert 'finesteer:gate_fired_total{profile="closed"} 0.0' in metrics
    assert 'finesteer:energy_ratio_count{profile="cast"} 0.0' in metrics
    assert 'gate_kind="cosine"' in metrics


async def test_a_linear_map_gives_each_query_its_own_dose_and_has_no_gate(kinds):
    async with serving(kinds, ("alphasteer",)) as served:
        doses = []
        for text in (FIRING[0], CALM[0]):
            body = (await served.chat(text, steer_metadata="full")).json()
            [report] = body["steering"]["profiles"]
            assert (report["gate"], report["energy_ratio"], report["threshold"]) == (1, None, None)
            assert (report["routing"], report["residual_norm"]) == (None, None)
            doses.append(report["vector_norm"])
        card = (await served.client.get("/v1/steering/profiles/alphasteer")).json()
        metrics = (await served.client.get("/metrics")).text
    assert doses[0] > 0 and doses[0] != pytest.approx(doses[1], rel=0.05)
    assert (card["method"], card["gate"], card["experts"]) == (
        "alphasteer", {"kind": "always"}, {"kind": "linear", "map_rank": 1},
    )  # fmt: skip
    assert 'finesteer:steered_requests_total{profile="alphasteer"} 2.0' in metrics


async def test_score_says_what_a_cosine_gate_would_do(kinds):
    async with serving(kinds, ("cast",)) as served:
        body = {"messages": [{"role": "user", "content": CALM[0]}]}
        [report] = (await served.client.post("/v1/steering/score", json=body)).json()["steering"]["profiles"]
    assert (report["gate"], report["energy_ratio"], report["threshold"]) == (1, None, 0.0)
