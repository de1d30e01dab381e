"""`/v1/models`, `/v1/steering`, and the operator's rules."""

from __future__ import annotations

import json

import pytest

from server.access.keys import Access
from server.steering_options import SteeringPolicy
from tests.checkpoint import CALM, FIRING
from tests.serving import chunks, serving


async def test_models_and_their_aliases(served):
    cards = (await served.client.get("/v1/models")).json()["data"]
    assert {card["id"]: card["steer_profiles"] for card in cards} == {
        "tiny": ["safety"],
        "tiny:unsteered": [],
        "tiny:safety": ["safety"],
    }
    for card in cards:
        assert (await served.client.get(f"/v1/models/{card['id']}")).json() == card
        assert (card["object"], card["root"], card["max_model_len"]) == ("model", "tiny", 256)


async def test_model_names_may_hold_slashes(artifacts):
    async with serving(artifacts, served_model_name="org/tiny") as served:
        assert (await served.client.get("/v1/models/org/tiny")).json()["id"] == "org/tiny"
        assert (await served.client.get("/v1/models/org%2Ftiny:unsteered")).json()["parent"] == "org/tiny"


async def test_profiles_are_listed(served, artifacts):
    manifest = json.loads((artifacts.safety / "profile.json").read_text())
    [card] = (await served.client.get("/v1/steering/profiles")).json()["data"]
    assert card == (await served.client.get("/v1/steering/profiles/safety")).json()
    assert (card["id"], card["layer"], card["strength"]) == ("safety", manifest["layer"], manifest["strength"])
    assert card["gate"]["threshold"] == manifest["gate"]["threshold"]
    assert (card["override"], card["mode"], card["max_strength"]) == ("any", "enforce", 20)


@pytest.mark.parametrize("text", [FIRING[0], CALM[0]])
async def test_score_is_the_decision_of_an_answer(served, oracle, text):
    answered = (await served.chat(text, steer_metadata="full")).json()["steering"]
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    for body in ({"messages": [{"role": "user", "content": text}]}, {"prompt": prompt}):
        score = (await served.client.post("/v1/steering/score", json=body)).json()
        assert (score["object"], score["model"]) == ("steering.score", "tiny")
        assert score["prompt_tokens"] == len(oracle.prompt(text))
        for name in ("fired", "gate", "energy_ratio", "relative_norm", "routing"):
            assert score["steering"]["profiles"][0][name] == pytest.approx(answered["profiles"][0][name], abs=1e-4)
        assert score["steering"]["applied"] == answered["applied"]


async def test_several_profiles(artifacts, oracle):
    async with serving(artifacts, ("safety", "tone")) as served:
        both = (await served.chat(FIRING[0])).json()["steering"]
        assert [report["name"] for report in both["profiles"]] == ["safety", "tone"]
        one = await served.chat(FIRING[0], model="tiny:tone")
        assert one.json()["choices"][0]["message"]["content"] == oracle.steered(FIRING[0], name="tone")
        assert one.headers["x-finesteer-profiles"] == "tone"
        mixed = (await served.chat(FIRING[0], steer_strength={"tone": 0})).json()
        assert mixed["choices"][0]["message"]["content"] == oracle.steered(FIRING[0])
        assert [r["strength_source"] for r in mixed["steering"]["profiles"]] == ["profile", "request"]


async def test_no_profiles_at_all(artifacts, oracle):
    async with serving(artifacts, ()) as served:
        answer = (await served.chat(FIRING[0])).json()
        assert answer["steering"] == {"applied": False, "reason": "no_profile", "profiles": []}
        assert answer["choices"][0]["message"]["content"] == oracle.plain(FIRING[0])
        refused = await served.chat(FIRING[0], steer_strength=4)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "steer_strength")
        assert (await served.client.get("/v1/steering/profiles")).json()["data"] == []


LOCKED = (
    {"steer_profiles": []},
    {"steer_profiles": ["tone"]},
    {"model": "tiny:unsteered"},
    {"model": "tiny:tone"},
    {"headers": {"X-FineSteer-Profiles": ""}},
    {"steer_strength": 0},
    {"steer_strength": 5.9},
    {"steer_strength": -7},
    {"steer_strength": {"safety": 1}},
    {"headers": {"X-FineSteer-Strength": "1"}},
    {"steer_gate": "closed"},
    {"steer_positions": "last"},
)
RAISED = ({"steer_strength": 7}, {"steer_gate": "open"}, {"headers": {"X-FineSteer-Strength": "safety=7"}})
HARMLESS = ({}, {"steer_strength": {"tone": 1}}, {"steer_strength": {"safety": 6}}, {"steer_positions": "all"})


async def test_a_locked_profile_cannot_be_changed(artifacts):
    policy = SteeringPolicy(overrides={"safety": "none"})
    async with serving(artifacts, ("safety", "tone"), policy=policy) as served:
        for fields in (*LOCKED, *RAISED):
            response = await served.chat(FIRING[0], **dict(fields))
            assert (response.status_code, response.json()["error"]["code"]) == (403, "steering_locked"), fields
            assert "'safety'" in response.json()["error"]["message"]
        for fields in HARMLESS:
            assert (await served.chat(FIRING[0], **dict(fields))).status_code == 200, fields
        names = [card["id"] for card in (await served.client.get("/v1/models")).json()["data"]]
        assert names == ["tiny", "tiny:safety"]


async def test_a_raise_only_profile_can_be_raised(artifacts):
    policy = SteeringPolicy(overrides={"safety": "raise_only"})
    async with serving(artifacts, ("safety", "tone"), policy=policy) as served:
        for fields in LOCKED:
            response = await served.chat(FIRING[0], **dict(fields))
            assert (response.status_code, response.json()["error"]["code"]) == (403, "steering_locked"), fields
        for fields in (*HARMLESS, *RAISED):
            assert (await served.chat(FIRING[0], **dict(fields))).status_code == 200, fields


async def test_shadow_decides_and_changes_nothing(artifacts, oracle):
    async with serving(artifacts, policy=SteeringPolicy(modes={"safety": "shadow"})) as served:
        answer = (await served.chat(FIRING[0])).json()
        assert answer["choices"][0]["message"]["content"] == oracle.plain(FIRING[0])
        assert (answer["steering"]["applied"], answer["steering"]["reason"]) == (False, "shadow")
        assert answer["steering"]["profiles"][0]["fired"] is True


@pytest.mark.parametrize("cap", ["none", "summary"])
async def test_metadata_is_capped(artifacts, cap):
    async with serving(artifacts, policy=SteeringPolicy(metadata_cap=cap)) as served:
        plain = await served.chat(FIRING[0])
        assert ("steering" in plain.json()) is (cap != "none")
        assert ("x-finesteer-applied" in plain.headers) is (cap != "none")
        asked = await served.chat(FIRING[0], steer_metadata="full")
        assert (asked.status_code, asked.json()["error"]["code"]) == (403, "steering_metadata_capped")
        score = await served.client.post("/v1/steering/score", json={"prompt": "x"})
        assert score.status_code == 403
        [card] = (await served.client.get("/v1/steering/profiles")).json()["data"]
        assert "threshold" not in card["gate"]


async def test_strength_limit_is_the_operators(artifacts):
    async with serving(artifacts, policy=SteeringPolicy(max_strength=6.5)) as served:
        assert (await served.chat(FIRING[0], steer_strength=6.5)).status_code == 200
        assert (await served.chat(FIRING[0], steer_strength=6.6)).json()["error"]["code"] == "strength_over_limit"


async def test_api_key(artifacts):
    async with serving(artifacts, access=Access.of("s3cret")) as served:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            response = await served.client.get("/v1/models", headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        right = {"Authorization": "Bearer s3cret"}
        assert (await served.client.get("/v1/models", headers=right)).status_code == 200
        assert (await served.client.get("/health")).status_code == 200


async def test_chat_without_a_template(artifacts, tmp_path):
    model = tmp_path / "bare"
    model.mkdir()
    for file in artifacts.model.iterdir():
        if file.name not in ("chat_template.jinja",):
            (model / file.name).write_bytes(file.read_bytes())
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    async with serving(artifacts, model=str(model)) as served:
        refused = (await served.chat(CALM[0])).json()["error"]
        assert (refused["code"], refused["param"]) == ("no_chat_template", "messages")
        assert "--chat-template" in refused["message"]
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
        assert (await served.client.post("/v1/completions", json=body)).status_code == 200
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    async with serving(artifacts, model=str(model), chat_template=template) as served:
        assert (await served.chat(CALM[0])).status_code == 200


async def test_locked_streams_are_refused_before_they_begin(artifacts):
    async with serving(artifacts, policy=SteeringPolicy(overrides={"safety": "none"})) as served:
        assert (await served.chat(FIRING[0], stream=True, steer_strength=0)).status_code == 403
        assert chunks((await served.chat(FIRING[0], stream=True)).text)[0]["steering"]["applied"] is True
