"""A loaded profile's evidence and report: whose they are, what they say, who may have them, and what there is not."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from server.access.keys import Access
from server.steering_options import SteeringPolicy
from steering.experts import ConstantVector
from steering.gate import AlwaysOpenGate, CosineGate
from steering.manifest import ExpertsManifest, GateManifest
from steering.profile import SteeringProfile
from tests.serving import serving

KEYS = Access.of("k", admin="root")
USER, ROOT = {"Authorization": "Bearer k"}, {"Authorization": "Bearer root"}
EVIDENCE, REPORT = "/v1/steering/profiles/safety/evidence", "/v1/steering/profiles/safety/report"
PAGE = "<!doctype html><html><style>b{color:red}</style><b>naïve</b><script>alert(1)</script></html>"
EXPERTS = [
    {"size": 7, "labels": [["harmful", 7], ["cyber", 4], ["fraud", 2], ["other", 1]], "nearest": list("abcdefg")},
    {"size": 3, "labels": [], "nearest": []},
]


def written(seed: int, low: float = 0.0) -> dict:
    """Evidence as the trainer writes it: sorted scores of six digits, some of them on the bins' edges and at the ends."""
    chance = random.Random(seed)
    ends = [low, 1.0]
    sides = {"ir": [0.075, 0.175, 0.7, 0.7, *ends], "general": [0.3, 0.6, 0.575, *ends]}
    gate = {
        side: sorted(scores + [round(chance.uniform(low, 1), 6) for _ in range(300)]) for side, scores in sides.items()
    }
    drawn = {"points": [[0, 0, 0]], "prototypes": [[0, 0]], "entropy": [0.5], "curve": [[1, 1]]}
    return {"examples": True, "gate": gate, "experts": drawn | {"experts": EXPERTS}}


def save(folder, found) -> None:
    (folder / "evidence.json").write_text(found if isinstance(found, str) else json.dumps(found), encoding="utf-8")


@pytest.fixture
def own(artifacts, tmp_path):
    """The checkpoint; `safety` with evidence and a report, `other` with other evidence and of another version, `tone` with
    neither."""
    for name in ("safety", "tone"):
        shutil.copytree(getattr(artifacts, name), tmp_path / name)
    save(tmp_path / "safety", written(1))
    (tmp_path / "safety" / "report.html").write_text(PAGE, encoding="utf-8")
    profile = SteeringProfile.load(artifacts.safety)
    replace(profile, manifest=replace(profile.manifest, strength=4.0)).save(tmp_path / "other")
    save(tmp_path / "other", written(2))
    return SimpleNamespace(model=artifacts.model, **{n: tmp_path / n for n in ("safety", "tone", "other")})


def made(own, gate, manifest) -> None:
    """Have `safety` another gate."""
    profile = SteeringProfile.load(own.safety)
    spec = replace(profile.manifest, method="cast", gate=manifest, experts=ExpertsManifest("constant"))
    replace(profile, gate=gate, experts=ConstantVector(profile.experts.prototypes[0]), manifest=spec).save(own.safety)


def code_of(answer) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_the_evidence_is_the_folders_own(own):
    threshold = SteeringProfile.load(own.safety).manifest.gate.threshold
    scores = json.loads((own.safety / "evidence.json").read_text())["gate"]
    async with serving(own) as served:
        answer = await served.client.get(EVIDENCE)
    found = answer.json()
    assert answer.headers["Content-Type"] == "application/json"
    assert (found["object"], found["id"], set(found)) == (
        "steering.evidence",
        "safety",
        {"object", "id", "gate", "experts"},
    )
    gate = found["gate"]
    assert (gate["kind"], gate["threshold"], gate["direction"]) == ("quantile", threshold, None)
    assert gate["edges"] == pytest.approx(np.linspace(0, 1, 41), abs=1e-15) and len(gate["edges"]) == 41
    for side in ("ir", "general"):  # in whole millionths, where an edge is a whole number
        bins = Counter(min(round(score * 1_000_000) // 25_000, 39) for score in scores[side])
        assert gate[side] == [bins[i] for i in range(40)]
    assert found["experts"] == [
        {"index": 0, "size": 7, "label": "harmful, cyber, fraud", "examples": ["a", "b", "c", "d", "e"]},
        {"index": 1, "size": 3, "label": None, "examples": []},
    ]


@pytest.mark.parametrize(("threshold", "direction"), [(0.25, "above"), (-0.9, "below")])
async def test_similarities_are_drawn_as_far_as_they_and_the_threshold_go(own, threshold, direction):
    basis = SteeringProfile.load(own.safety).gate.basis
    gate = CosineGate(basis[:, 0].contiguous(), threshold, direction)
    made(own, gate, GateManifest("cosine", threshold=threshold, num_calibration=8, direction=direction))
    save(own.safety, {"examples": True, "gate": (scores := written(3, low=-0.5)["gate"])})
    async with serving(own) as served:
        found = (await served.client.get(EVIDENCE)).json()
    assert found["experts"] is None
    gate = found["gate"]
    assert (gate["kind"], gate["threshold"], gate["direction"]) == ("cosine", threshold, direction)
    edges = gate["edges"]
    assert edges == pytest.approx(np.linspace(min(-0.5, threshold), 1, 41))
    for side in ("ir", "general"):
        inner = [sum(low <= x < high for x in scores[side]) for low, high in pairwise(edges)]
        inner[-1] += scores[side].count(edges[-1])
        assert gate[side] == inner and sum(inner) == len(scores[side])


async def test_similarities_that_are_all_alike_have_bins_too(own):
    basis = SteeringProfile.load(own.safety).gate.basis
    gate = GateManifest("cosine", threshold=0.5, num_calibration=8, direction="above")
    made(own, CosineGate(basis[:, 0].contiguous(), 0.5, "above"), gate)
    save(own.safety, {"examples": True, "gate": {"ir": [0.5, 0.5], "general": [0.5]}})
    async with serving(own) as served:
        gate = (await served.client.get(EVIDENCE)).json()["gate"]
    assert (sum(gate["ir"]), sum(gate["general"])) == (2, 1) and (np.diff(gate["edges"]) > 0).all()


async def test_a_profile_without_a_gate_has_none_to_show(own):
    made(own, AlwaysOpenGate(), GateManifest("always"))
    async with serving(own) as served:
        found = (await served.client.get(EVIDENCE)).json()
    assert found["gate"] is None and len(found["experts"]) == 2


async def test_the_report_is_the_file_and_may_run_nothing(own):
    async with serving(own) as served:
        answer = await served.client.get(REPORT)
        head = await served.client.head(REPORT)
    assert answer.content == (own.safety / "report.html").read_bytes() and head.content == b""
    for headers in (answer.headers, head.headers):
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert headers["X-Content-Type-Options"] == "nosniff"
        policy = {part.strip() for part in headers["Content-Security-Policy"].split(";")}
        assert policy == {
            "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", "frame-ancestors 'self'", "sandbox",
        }  # fmt: skip


async def test_they_want_a_key(own):
    async with serving(own, access=KEYS) as served:
        for path in (EVIDENCE, REPORT):
            assert code_of(await served.client.get(path)) == (401, "invalid_api_key")
            for key in (USER, ROOT):
                assert (await served.client.get(path, headers=key)).status_code == 200


@pytest.mark.parametrize("cap", ["summary", "none"])
async def test_they_keep_what_answers_keep(own, cap):
    async with serving(own, ("safety", "tone"), policy=SteeringPolicy(metadata_cap=cap)) as served:
        for name in ("safety", "tone"):
            for kind in ("evidence", "report"):
                answer = await served.client.get(f"/v1/steering/profiles/{name}/{kind}")
                assert code_of(answer) == (403, "steering_metadata_capped")


async def test_what_there_is_not(own):
    async with serving(own, ("safety", "tone")) as served:
        for kind in ("evidence", "report"):
            answer = await served.client.get(f"/v1/steering/profiles/tone/{kind}")
            assert code_of(answer) == (404, f"no_{kind}") and "'tone'" in answer.json()["error"]["message"]
            for name in ("nobody", "load", "..", "%2e%2e", "tone%00"):
                answer = await served.client.get(f"/v1/steering/profiles/{name}/{kind}")
                assert answer.status_code == 404
            unknown = await served.client.get(f"/v1/steering/profiles/nobody/{kind}")
            assert code_of(unknown) == (404, "unknown_profile")
            assert unknown.json() == (await served.client.get("/v1/steering/profiles/nobody")).json()


@pytest.mark.parametrize(
    "damaged",
    [
        "{",
        "[]",
        '{"examples": true, "gate": {"ir": [], "general": [0.5]}}',
        '{"examples": true, "gate": {"ir": ["x"], "general": [0.5]}}',
        '{"examples": true, "gate": {"ir": [NaN], "general": [0.5]}}',
        {**written(1), "experts": written(1)["experts"] | {"experts": [{"size": 1}]}},
        {**written(1), "experts": written(1)["experts"] | {"experts": [{"size": "many", "labels": [], "nearest": []}]}},
        {**written(1), "experts": written(1)["experts"] | {"experts": [{"size": 1, "labels": [], "nearest": [5]}]}},
    ],
)
async def test_a_damaged_file_is_told_without_the_servers_paths(own, damaged, caplog):
    async with serving(own) as served:
        save(own.safety, damaged)
        answer = await served.client.get(EVIDENCE)
        assert code_of(answer) == (404, "no_evidence")
        assert "log" in answer.json()["error"]["message"] and str(own.safety.parent) not in answer.text
        assert "evidence.json" in caplog.text
        save(own.safety, written(1))  # restored: a failure is not kept
        assert (await served.client.get(EVIDENCE)).status_code == 200


async def test_it_is_read_once_a_version(own):
    async with serving(own) as served:
        first = (await served.client.get(EVIDENCE)).json()
        save(own.safety, written(2))
        assert (await served.client.get(EVIDENCE)).json() == first


async def test_a_folder_that_has_moved_on_tells_nothing_of_the_loaded_version(own):
    async with serving(own) as served:
        for file in ("profile.json", "profile.safetensors"):
            shutil.copy(own.other / file, own.safety / file)
        for path in (EVIDENCE, REPORT):
            answer = await served.client.get(path)
            assert answer.status_code == 404 and "another version" in answer.json()["error"]["message"]
        shutil.rmtree(own.safety)
        for path in (EVIDENCE, REPORT):
            answer = await served.client.get(path)
            assert answer.status_code == 404 and str(own.safety.parent) not in answer.text


async def test_profiles_that_come_and_go_bring_and_take_theirs(own):
    async with serving(own, ("tone",), access=KEYS) as served:

        async def admin(action, **body):
            answer = await served.client.post(f"/v1/steering/profiles/{action}", json=body, headers=ROOT)
            assert answer.status_code == 200, answer.text

        async def general():
            answer = await served.client.get(EVIDENCE, headers=USER)
            return answer.json()["gate"]["general"] if answer.status_code == 200 else code_of(answer)

        assert await general() == (404, "unknown_profile")
        await admin("load", name="safety", source=str(own.safety))
        before = await general()
        assert (await served.client.get(REPORT, headers=USER)).text == PAGE
        await admin("load", name="safety", source=str(own.other))
        after = await general()
        assert sum(before) == sum(after) == 305 and before != after
        assert code_of(await served.client.get(REPORT, headers=USER)) == (404, "no_report")
        twin = own.safety.parent / "twin"  # the same version in another folder, with evidence of its own
        shutil.copytree(own.other, twin)
        save(twin, written(1))
        await admin("load", name="safety", source=str(twin))
        assert await general() == before
        bad = {"name": "safety", "source": str(own.safety.parent / "nowhere")}
        refused = await served.client.post("/v1/steering/profiles/load", json=bad, headers=ROOT)
        assert refused.status_code == 400 and await general() == before
        await admin("unload", name="safety")
        assert await general() == (404, "unknown_profile")


async def test_a_profile_of_the_hubs_is_not_fetched_again(own, monkeypatch):
    asked = []

    def snapshot_download(name, *, allow_patterns, local_files_only):
        asked.append((name, local_files_only))
        return str(own.safety)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    async with serving(own, (), access=KEYS) as served:
        body = {"name": "safety", "source": "me/p"}
        assert (await served.client.post("/v1/steering/profiles/load", json=body, headers=ROOT)).status_code == 200
        assert set(asked) == {("me/p", False)}
        asked.clear()
        assert (await served.client.get(EVIDENCE, headers=USER)).status_code == 200
        assert (await served.client.get(REPORT, headers=USER)).text == PAGE
        assert asked == [("me/p", True)] * 2
