"""`/v1/chat/completions`, through ASGI, against transformers' own answers."""

from __future__ import annotations

import json

import pytest
import torch

from tests.checkpoint import CALM, FIRING
from tests.parity.oracle import gate_and_vector
from tests.serving import chunks

SUMMARY = {
    *("name", "version", "method", "layer", "positions", "fired", "gate", "energy_ratio", "threshold"),
    *("strength", "strength_source", "relative_norm"),
}  # fmt: skip
FULL = SUMMARY | {"routing", "residual_norm", "vector_norm", "tail"}


def text_of(answer: dict, index: int = 0) -> str:
    return answer["choices"][index]["message"]["content"]


@pytest.mark.parametrize("text", [*FIRING, *CALM])
async def test_unsteered_alias_is_the_plain_model(served, oracle, text):
    answer = (await served.chat(text, model="tiny:unsteered")).json()
    assert text_of(answer) == oracle.plain(text)
    assert answer["model"] == "tiny:unsteered"
    assert answer["steering"] == {"applied": False, "reason": "opted_out", "profiles": []}
    assert answer["usage"]["prompt_tokens"] == len(oracle.prompt(text))


@pytest.mark.parametrize("text", CALM)
async def test_shut_gate_leaves_the_plain_answer(served, oracle, text):
    response = await served.chat(text)
    answer = response.json()
    assert text_of(answer) == oracle.plain(text)
    assert (answer["steering"]["applied"], answer["steering"]["reason"]) == (False, "gate_closed")
    assert response.headers["x-finesteer-applied"] == "false"
    assert response.headers["x-finesteer-profiles"] == ""


@pytest.mark.parametrize("text", FIRING)
async def test_open_gate_gives_the_two_pass_answer_and_says_so(served, oracle, artifacts, text):
    response = await served.chat(text)
    answer = response.json()
    assert text_of(answer) == oracle.steered(text) != oracle.plain(text)
    steering = answer["steering"]
    assert (steering["applied"], steering["reason"], set(steering)) == (
        True,
        "gate_open",
        {"applied", "reason", "profiles"},
    )
    [report] = steering["profiles"]
    manifest = json.loads((artifacts.safety / "profile.json").read_text())
    assert set(report) == SUMMARY
    assert (report["name"], report["layer"], report["positions"]) == ("safety", manifest["layer"], "all")
    assert (report["strength"], report["strength_source"]) == (manifest["strength"], "profile")
    assert report["threshold"] == pytest.approx(manifest["gate"]["threshold"], rel=1e-5)
    assert report["fired"] is True
    assert response.headers["x-finesteer-applied"] == "true"
    assert response.headers["x-finesteer-profiles"] == "safety"


@pytest.mark.parametrize("text", [FIRING[0], CALM[0]])
async def test_full_metadata_agrees_with_the_formulas(served, oracle, text):
    answer = (await served.chat(text, steer_metadata="full", steer_strength=2.5)).json()
    [report] = answer["steering"]["profiles"]
    assert set(report) == FULL
    assert answer["steering"]["compute_ms"] > 0
    with torch.no_grad():
        output = oracle.model(torch.tensor([oracle.prompt(text)]), output_hidden_states=True)
    profile = oracle.profiles["safety"]
    state = output.hidden_states[profile.layer + 1][0, -1]
    gate, vector = gate_and_vector(profile, state)
    norm = float((vector**2).sum() ** 0.5)
    assert report["gate"] == pytest.approx(gate, abs=1e-4)
    assert report["vector_norm"] == pytest.approx(norm, rel=1e-3)
    assert report["relative_norm"] == pytest.approx(2.5 * gate * norm / float(state.norm()), rel=1e-3)
    assert sum(report["routing"]) == pytest.approx(1, abs=1e-4)


async def test_metadata_none_says_nothing(served):
    response = await served.chat(FIRING[0], steer_metadata="none")
    assert "steering" not in response.json()
    assert not [name for name in response.headers if name.startswith("x-finesteer")]
    streamed = chunks((await served.chat(FIRING[0], steer_metadata="none", stream=True)).text)
    assert not any("steering" in chunk for chunk in streamed)


async def test_strength_zero_is_the_plain_answer_and_still_reports_the_gate(served, oracle):
    answer = (await served.chat(FIRING[0], steer_strength=0)).json()
    assert text_of(answer) == oracle.plain(FIRING[0])
    steering = answer["steering"]
    assert (steering["applied"], steering["reason"]) == (False, "strength_zero")
    assert (steering["profiles"][0]["fired"], steering["profiles"][0]["gate"]) == (True, 1.0)


@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"steer_strength": 2.5}, {}),
        ({"steer_strength": {"safety": 2.5}}, {}),
        ({"extra_body": {"steer_strength": 2.5}}, {}),
        ({}, {"X-FineSteer-Strength": "2.5"}),
        ({}, {"X-FineSteer-Strength": "safety=2.5"}),
        ({"steer_strength": 2.5}, {"X-FineSteer-Strength": "9"}),
    ],
)
async def test_ways_to_set_the_strength(served, oracle, fields, headers):
    answer = (await served.chat(FIRING[0], headers=headers, **fields)).json()
    assert text_of(answer) == oracle.steered(FIRING[0], strength=2.5) != oracle.steered(FIRING[0])
    [report] = answer["steering"]["profiles"]
    assert (report["strength"], report["strength_source"]) == (2.5, "request" if fields else "header")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"steer_profiles": []}, "opted_out"),
        ({"headers": {"X-FineSteer-Profiles": ""}}, "opted_out"),
        ({"steer_gate": "closed"}, "forced_closed"),
    ],
)
async def test_ways_to_switch_off(served, oracle, fields, reason):
    answer = (await served.chat(FIRING[0], **fields)).json()
    assert text_of(answer) == oracle.plain(FIRING[0])
    assert (answer["steering"]["applied"], answer["steering"]["reason"]) == (False, reason)


async def test_forced_open_gate_steers_a_calm_prompt(served, oracle):
    answer = (await served.chat(CALM[0], steer_gate="open")).json()
    assert (answer["steering"]["applied"], answer["steering"]["reason"]) == (True, "forced_open")
    assert text_of(answer) != oracle.plain(CALM[0])


async def test_body_beats_header_beats_alias(served):
    async def reason(**fields):
        return (await served.chat(FIRING[0], **fields)).json()["steering"]["reason"]

    on, off = {"X-FineSteer-Profiles": "safety"}, {"X-FineSteer-Profiles": ""}
    assert await reason(model="tiny:unsteered") == "opted_out"
    assert await reason(model="tiny:unsteered", headers=on) == "gate_open"
    assert await reason(model="tiny:safety", headers=off) == "opted_out"
    assert await reason(model="tiny:unsteered", headers=off, steer_profiles=["safety"]) == "gate_open"
    assert await reason(model="tiny:safety", steer_profiles=None) == "gate_open"


@pytest.mark.parametrize("text", [FIRING[1], CALM[1]])
async def test_streamed_is_whole(served, text):
    whole = (await served.chat(text, max_tokens=20)).json()
    response = await served.chat(text, max_tokens=20, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = chunks(response.text)
    first, *middle, end, last = events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == text_of(whole)
    assert end["choices"][0]["delta"] == {}
    assert end["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert first["steering"] == last["steering"] == whole["steering"]
    assert not any("steering" in chunk for chunk in [*middle, end])
    assert all(chunk["usage"] is None for chunk in events[:-1])
    for name in ("id", "created", "model", "system_fingerprint", "object"):
        assert len({chunk[name] for chunk in events}) == 1
    assert first["object"] == "chat.completion.chunk"
    assert first["system_fingerprint"] == whole["system_fingerprint"]


async def test_without_usage_the_last_choice_chunk_holds_the_steering(served):
    events = chunks((await served.chat(FIRING[0], stream=True)).text)
    assert ["steering" in chunk for chunk in events] == [True, *[False] * (len(events) - 2), True]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert not any("usage" in chunk for chunk in events)


async def test_n_completions_share_the_decision(served, oracle):
    fields = {"n": 3, "temperature": 1.0, "seed": 5}
    whole = (await served.chat(FIRING[0], **fields)).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len({text_of(whole, i) for i in range(3)}) == 3
    greedy = (await served.chat(FIRING[0], n=2)).json()
    assert [text_of(greedy, i) for i in range(2)] == [oracle.steered(FIRING[0])] * 2
    assert greedy["usage"]["completion_tokens"] == 24
    events = chunks((await served.chat(FIRING[0], stream=True, **fields)).text)
    texts = ["", "", ""]
    for chunk in events:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [text_of(whole, i) for i in range(3)]
    assert ["steering" in chunk for chunk in events] == [True, *[False] * (len(events) - 2), True]


async def test_seed_makes_sampling_repeatable(served):
    answers = [text_of((await served.chat(CALM[0], temperature=1.5, seed=seed)).json()) for seed in (3, 3, 4)]
    assert answers[0] == answers[1] != answers[2]


async def test_logprobs_are_the_models(served, oracle):
    answer = (await served.chat(CALM[0], logprobs=True, top_logprobs=3)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    ids = oracle.plain_ids(CALM[0], 12)
    with torch.no_grad():
        logits = oracle.model(torch.tensor([oracle.prompt(CALM[0]) + ids])).logits[0]
    table = torch.log_softmax(logits[len(oracle.prompt(CALM[0])) - 1 : -1], -1)
    assert len(content) == len(ids)
    for row, token_id, entry in zip(table, ids, content, strict=True):
        assert entry["logprob"] == pytest.approx(float(row[token_id]), abs=1e-4)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert bytes(b for entry in content for b in entry["bytes"]).decode("utf-8", "replace") == text_of(answer)
    streamed = chunks((await served.chat(CALM[0], logprobs=True, top_logprobs=3, stream=True)).text)
    assert [e for c in streamed if (p := c["choices"][0]["logprobs"]) for e in p["content"]] == content


async def test_stop_strings_cut_the_text(served, oracle):
    plain = oracle.plain(CALM[1], 20)
    stop = plain[5:8]
    expected = plain[: plain.index(stop)]
    answer = (await served.chat(CALM[1], max_tokens=20, stop=[stop, "never"])).json()
    assert (text_of(answer), answer["choices"][0]["finish_reason"]) == (expected, "stop")
    assert answer["usage"]["completion_tokens"] < 20
    events = chunks((await served.chat(CALM[1], max_tokens=20, stop=stop, stream=True)).text)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in events) == expected
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_stop_token_ends_without_text_and_ignore_eos_does_not(served, oracle):
    ids = oracle.plain_ids(CALM[0], 12)
    end = next(i for i in range(3, 12) if ids[i] not in ids[:i])
    answer = (await served.chat(CALM[0], stop_token_ids=[ids[end]])).json()
    assert (text_of(answer), answer["choices"][0]["finish_reason"]) == (oracle.decode(ids[:end]), "stop")
    assert answer["usage"]["completion_tokens"] == end + 1
    eos = oracle.tokenizer.eos_token_id
    forced = {"logit_bias": {str(eos): 100}, "max_tokens": 4}
    ended = (await served.chat(CALM[0], **forced)).json()
    assert (text_of(ended), ended["choices"][0]["finish_reason"]) == ("", "stop")
    ignored = (await served.chat(CALM[0], ignore_eos=True, **forced)).json()
    assert (ignored["choices"][0]["finish_reason"], ignored["usage"]["completion_tokens"]) == ("length", 4)


async def test_limits(served, oracle):
    answer = (await served.chat(CALM[0], max_tokens=None, max_completion_tokens=3)).json()
    assert answer["usage"]["completion_tokens"] == 3
    free = (await served.chat(CALM[0], max_tokens=None, ignore_eos=True)).json()
    assert free["usage"]["total_tokens"] == 256
    capped = (await served.chat(CALM[0], max_tokens=10_000, ignore_eos=True)).json()
    assert (capped["usage"]["total_tokens"], capped["choices"][0]["finish_reason"]) == (256, "length")


async def test_messages_of_all_shapes_reach_the_template(served, oracle):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}],
            "name": "ann",
        },
        {
            "role": "assistant",
            "content": "Three.",
            "refusal": None,
            "tool_calls": None,
            "audio": None,
            "annotations": [],
        },
        {"role": "user", "content": "naïve 日本語 🙂"},
    ]
    response = await served.client.post(
        "/v1/chat/completions",
        json={"model": "tiny", "messages": messages, "max_tokens": 1, "metadata": {"a": "b"}, "user": "u"},
    )
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne.\nTwo.<|im_end|>\n"
        "<|im_start|>assistant\nThree.<|im_end|>\n<|im_start|>user\nnaïve 日本語 🙂<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = oracle.tokenizer.encode(expected, add_special_tokens=False)
    assert response.json()["usage"]["prompt_tokens"] == len(ids)


async def test_neutral_values_of_unbuilt_fields_pass(served):
    neutral = {"tools": [], "response_format": {"type": "text"}, "store": False, "service_tier": "auto", "audio": None}
    assert (await served.chat(CALM[0], **neutral)).status_code == 200


async def test_request_ids(served):
    echoed = await served.chat(CALM[0], headers={"X-Request-Id": "trace-42"})
    assert echoed.headers["x-request-id"] == "trace-42"
    for unwise in ("two words", "x" * 200, "ü"):
        digest = (await served.chat(CALM[0], headers={"X-Request-Id": unwise.encode()})).headers["x-request-id"]
        assert digest.startswith("req-") and unwise not in digest
    assert (await served.client.get("/nowhere")).headers["x-request-id"].startswith("req-")


async def test_fingerprint_is_stable(served):
    prints = {(await served.chat(text)).json()["system_fingerprint"] for text in (FIRING[0], CALM[0])}
    assert len(prints) == 1 and prints.pop().startswith("fs_")


async def test_a_refusal_comes_back_as_text(served, oracle):
    """As OpenAI's answers hold it: a part of an assistant's message, or a field of its own."""

    def turns(said):
        return [{"role": "user", "content": "x"}, {"role": "assistant", **said}, {"role": "user", "content": "y"}]

    asked = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    answers = [
        (await served.client.post("/v1/chat/completions", json=asked | {"messages": turns(said)})).json()
        for said in (
            {"content": "No."},
            {"content": [{"type": "refusal", "refusal": "No."}]},
            {"content": None, "refusal": "No."},
        )
    ]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert len({answer["usage"]["prompt_tokens"] for answer in answers}) == 1
