"""Every counter in every path: driven through the application, held against what the answers alone say."""

from __future__ import annotations

import asyncio
import json
import re
import time

import pytest

from server.access.keys import Access, ApiKey, digest
from server.engine.base import GenerationError
from server.engine.native.core import EngineCore
from server.observability.reference import PAGE
from server.steering_options import SteeringPolicy
from tests.checkpoint import CALM, FIRING, build_profile
from tests.ledger import Ledger, exact
from tests.serving import Connection, chunks, sample, samples, serving

CHAT, COMPLETIONS, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/steering/score"
TURN = [{"role": "user", "content": FIRING[0]}]
LONG = {"model": "tiny", "temperature": 0, "ignore_eos": True, "messages": TURN, "steer_metadata": "full"}


async def text_of(served) -> str:
    """`/metrics`; the request itself is counted after its answer."""
    return (await served.client.get("/metrics")).text


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def asked(served, text, **fields):
    """A whole chat answer in full detail, twelve tokens for each completion."""
    fields = {"ignore_eos": True, "steer_metadata": "full"} | fields
    response = await served.chat(text, **fields)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture
async def checked(served):
    """A ledger that is held against the application's metrics at the end of the test."""
    ledger, before = Ledger(), await text_of(served)
    ledger.http("/metrics")
    yield ledger
    ledger.check(before, await text_of(served))


PATHS = {
    "fired": (FIRING[0], {}, {}, ()),
    "gate shut": (CALM[0], {}, {"safety": "gate_closed"}, ()),
    "strength zero": (FIRING[0], {"steer_strength": 0}, {"safety": "strength_zero"}, ("strength",)),
    "strength": (FIRING[0], {"steer_strength": -2.5}, {}, ("strength",)),
    "strength by header": (FIRING[0], {"headers": {"X-FineSteer-Strength": "3"}}, {}, ("strength",)),
    "forced open": (CALM[0], {"steer_gate": "open"}, {}, ("gate",)),
    "forced closed": (FIRING[0], {"steer_gate": "closed"}, {"safety": "forced_closed"}, ("gate",)),
    "last position": (FIRING[0], {"steer_positions": "last"}, {}, ("positions",)),
    "opted out": (FIRING[0], {"steer_profiles": []}, {}, ("opt_out",)),
    "unsteered alias": (FIRING[0], {"model": "tiny:unsteered"}, {}, ("opt_out",)),
    "alias": (FIRING[0], {"model": "tiny:safety"}, {}, ("profiles",)),
    "three completions": (FIRING[0], {"n": 3, "temperature": 1, "seed": 3}, {}, ()),
}


@pytest.mark.parametrize("case", PATHS)
async def test_whole_answers(served, checked, case):
    text, fields, skipped, overrides = PATHS[case]
    answer = await asked(served, text, **fields)
    checked.answer(answer, max_tokens=12, skipped=skipped)
    checked.http(CHAT)
    for kind in overrides:
        checked.add("steering_overrides_total", kind=kind)


async def test_no_profile(artifacts):
    async with serving(artifacts, ()) as served:
        ledger, before = Ledger(), await text_of(served)
        answer = await asked(served, FIRING[0])
        ledger.answer(answer, max_tokens=12)
        ledger.http(CHAT)
        ledger.http("/metrics")
        assert answer["steering"]["reason"] == "no_profile"
        ledger.check(before, await text_of(served))


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", COMPLETIONS])
async def test_streams(served, checked, path):
    body = {"model": "tiny", "temperature": 0, "ignore_eos": True, "steer_metadata": "full", "stream": True}
    if path == "/v1/responses":
        body |= {"input": FIRING[0], "max_output_tokens": 12}
    elif path == CHAT:
        body |= {"messages": TURN, "max_tokens": 12, "stream_options": {"include_usage": True}}
    else:
        body |= {"prompt": "abc", "max_tokens": 12, "stream_options": {"include_usage": True}}
    response = await served.client.post(path, json=body)
    if path == "/v1/responses":
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
        last = events[-1]["response"]
        steering, prompt_tokens = last["steering"], last["usage"]["input_tokens"]
    else:
        *_, last = chunks(response.text)
        steering, prompt_tokens = last["steering"], last["usage"]["prompt_tokens"]
    skipped = {} if steering["applied"] else {"safety": "gate_closed"}
    checked.decided(steering, skipped)
    checked.generated(prompt_tokens, [12], ["length"], steering, max_tokens=12, skipped=skipped)
    checked.http(path)


async def test_several_prompts_and_the_best_of_several(served, checked):
    fields = {"model": "tiny", "ignore_eos": True, "steer_metadata": "full", "seed": 1}
    answer = await served.client.post(
        COMPLETIONS, json={"prompt": ["abc", "defg"], "n": 1, "best_of": 3, "max_tokens": 5} | fields
    )
    shown = answer.json()
    assert [choice["finish_reason"] for choice in shown["choices"]] == ["length"] * 2
    assert shown["usage"]["completion_tokens"] == 30, "all that ran is billed"
    lengths = [await tokenized(served, prompt) for prompt in ("abc", "defg")]
    for steering, length in zip(shown["steering"], lengths, strict=True):
        skipped = {} if steering["applied"] else {"safety": "gate_closed"}
        checked.decided(steering, skipped)
        checked.generated(length, [5] * 3, ["length"] * 3, steering, max_tokens=5, skipped=skipped)
    checked.http(COMPLETIONS)
    for _ in lengths:
        checked.http("/tokenize")


async def tokenized(served, prompt: str) -> int:
    return (await served.client.post("/tokenize", json={"prompt": prompt})).json()["count"]


async def test_an_echo_without_an_answer(served, checked):
    answer = await served.client.post(
        COMPLETIONS,
        json={"model": "tiny", "prompt": "abc", "max_tokens": 0, "echo": True, "steer_metadata": "full"},
    )
    shown = answer.json()
    skipped = {} if shown["steering"]["applied"] else {"safety": "gate_closed"}
    checked.decided(shown["steering"], skipped)
    prompt_tokens = shown["usage"]["prompt_tokens"]
    checked.generated(prompt_tokens, [0], ["length"], shown["steering"], max_tokens=1, skipped=skipped)
    checked.http(COMPLETIONS)


async def test_a_stop_string_ends_what_is_counted(served, checked, oracle):
    plain = oracle.steered(FIRING[0])
    answer = await asked(served, FIRING[0], stop=plain[3:6])
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] < 12
    checked.answer(answer, max_tokens=12)
    checked.http(CHAT)


async def test_what_the_engine_makes_after_a_stop_string_is_not_counted(served):
    fields = {
        "n": 2,
        "temperature": 1,
        "seed": 3,
        "ignore_eos": True,
        "steer_metadata": "full",
        "return_token_ids": True,
    }
    one, other = [c["message"]["content"] for c in (await asked(served, FIRING[0], **fields))["choices"]]
    stop = next(one[i : i + 3] for i in range(2, len(one)) if one[i : i + 3] not in other)
    ledger, before = Ledger(), await text_of(served)
    answer = await asked(served, FIRING[0], stop=stop, **fields)
    lengths = [len(choice["token_ids"]) for choice in answer["choices"]]
    assert lengths[0] < lengths[1] == 12
    ledger.decided(answer["steering"], {})
    prompt_tokens = answer["usage"]["prompt_tokens"]
    finish = ["stop", "length"]
    ledger.generated(prompt_tokens, lengths, finish, answer["steering"], max_tokens=12, skipped={})
    ledger.http(CHAT)
    ledger.http("/metrics")
    ledger.check(before, await text_of(served))


async def test_several_profiles(artifacts):
    policy = SteeringPolicy(modes={"tone": "shadow"})
    async with serving(artifacts, ("safety", "tone"), policy=policy) as served:
        ledger, before = Ledger(), await text_of(served)
        ledger.answer(await asked(served, FIRING[0]), max_tokens=12, skipped={"tone": "shadow"})
        ledger.answer(
            await asked(served, CALM[0]), max_tokens=12, skipped=dict.fromkeys(("safety", "tone"), "gate_closed")
        )
        ledger.answer(
            await asked(served, FIRING[0], steer_profiles=["tone"], n=2), max_tokens=12, skipped={"tone": "shadow"}
        )
        ledger.add("steering_overrides_total", kind="profiles")
        for _ in range(3):
            ledger.http(CHAT)
        ledger.http("/metrics")
        ledger.check(before, await text_of(served))


async def test_a_score_is_no_traffic(served, checked):
    response = await served.client.post(SCORE, json={"prompt": "abc", "steer_strength": 2, "steer_gate": "open"})
    assert response.json()["steering"]["applied"]
    checked.http(SCORE)


REFUSED = {
    "no JSON": ({"content": b"{"}, CHAT, "4xx", 400),
    "unknown model": ({"json": LONG | {"model": "x"}}, CHAT, "4xx", 404),
    "too long": ({"json": LONG | {"messages": [{"role": "user", "content": "x " * 400}]}}, CHAT, "4xx", 400),
    "not this way": ({"json": LONG}, "/v1/steering/profiles", "4xx", 405),
    "no such path": ({"json": {}}, "/v1/nothing/\x80", "4xx", 404),
    "an unknown profile": ({"json": {}}, "/v1/models/tiny", "4xx", 405),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_refused_before_the_engine(served, checked, case):
    request, path, group, status = REFUSED[case]
    response = await served.client.post(path, **request)
    assert response.status_code == status
    checked.http({"/v1/nothing/\x80": "other", "/v1/models/tiny": "/v1/models/{model}"}.get(path, path), group)


async def test_keys_and_limits(artifacts):
    key = ApiKey("slow", digest("k"), requests_per_minute=1)
    async with serving(artifacts, access=Access((key,))) as served:
        ledger, before = Ledger(), await text_of(served)
        ledger.http("/metrics")
        for authorization, status in (("Bearer k", 200), ("Bearer k", 429), ("Bearer other", 401)):
            response = await served.chat(
                FIRING[0], headers={"Authorization": authorization}, steer_metadata="full", ignore_eos=True
            )
            assert response.status_code == status
            ledger.http(CHAT, f"{status // 100}xx")
            if status == 200:
                ledger.answer(response.json(), max_tokens=12)
        ledger.check(before, await text_of(served))


async def test_a_full_queue(artifacts, monkeypatch):
    async with serving(artifacts, max_num_seqs=1, max_waiting=1) as served:
        slowed(monkeypatch, served)
        ledger, before = Ledger(), await text_of(served)
        responses = await asyncio.gather(
            *(served.chat(FIRING[0], n=1, ignore_eos=True, steer_metadata="full") for _ in range(6))
        )
        codes = [response.status_code for response in responses]
        assert {200, 503} == set(codes)
        for response in responses:
            ledger.http(CHAT, f"{response.status_code // 100}xx")
            if response.status_code == 200:
                ledger.answer(response.json(), max_tokens=12)
            else:
                ledger.add("request_success_total", finished_reason="error")
        ledger.http("/metrics")
        ledger.check(before, await text_of(served))


def slowed(monkeypatch, served) -> None:
    """Each step takes 10 ms more, so that on a busy machine, too, nothing ends before a test has looked at it."""
    step = served.engine._core.step

    def slow():
        time.sleep(0.01)
        return step()

    monkeypatch.setattr(served.engine._core, "step", slow)


@pytest.mark.parametrize("n", [1, 2])
async def test_a_client_that_leaves_in_mid_stream(served, monkeypatch, n):
    slowed(monkeypatch, served)
    ledger, before = Ledger(), await text_of(served)
    connection = Connection(served.app, CHAT, LONG | {"stream": True, "n": n, "return_token_ids": True})
    running = asyncio.create_task(connection.run())
    await until(lambda: len(connection.sent) > 8)
    connection.cut()
    await asyncio.wait_for(running, 5)
    await until(lambda: served.engine.stats().num_running == 0)
    events = [json.loads(part[6:]) for part in connection.received.decode().split("\n\n") if part.startswith("data: {")]
    lengths = [0] * n
    for event in events:
        for choice in event["choices"]:
            lengths[choice["index"]] += len(choice.get("token_ids") or ())
    after = await text_of(served)
    counted = int(sample(after, "generation_tokens_total"))
    assert sum(lengths) <= counted <= sum(lengths) + 1, "the last token may have been read and not sent"
    lengths[0] += counted - sum(lengths)
    steering, prompt_tokens = events[0]["steering"], sample(after, "prompt_tokens_total")
    assert prompt_tokens == len((await served.client.post("/tokenize", json={"messages": TURN})).json()["tokens"])
    ledger.decided(steering, {})
    ledger.generated(
        int(prompt_tokens), lengths, ["abort"] * n, steering, max_tokens=256 - int(prompt_tokens), skipped={}
    )
    if n == 2:  # which completion the odd token was of is not known
        longest = "request_max_num_generation_tokens_sum"
        odd = sample(after, longest) - max(lengths)
        assert abs(odd) <= 1
        ledger.add(longest, odd)
    ledger.http("/metrics")
    ledger.http(CHAT)
    ledger.check(before, after)


async def test_a_client_that_leaves_before_its_first_token(artifacts, monkeypatch):
    """In the queue: no decision was made, and none is counted. The status is 499."""
    async with serving(artifacts, max_num_seqs=1) as served:
        slowed(monkeypatch, served)
        first = Connection(served.app, CHAT, LONG | {"stream": True})
        tasks = [asyncio.create_task(first.run())]
        await until(lambda: first.sent)
        ledger, before = Ledger(), await text_of(served)
        queued = Connection(served.app, CHAT, LONG | {"n": 1})
        tasks.append(asyncio.create_task(queued.run()))
        await until(lambda: served.engine.stats().num_waiting == 1)
        queued.cut()
        await asyncio.wait_for(tasks[1], 5)
        await until(lambda: served.engine.stats().num_waiting == 0)
        ledger.add("request_success_total", finished_reason="abort")
        ledger.http(CHAT, "4xx")
        ledger.http("/metrics")
        after = await text_of(served)
        growing = {"generation_tokens_total", "steered_tokens_total", "inter_token_latency_seconds_count"}
        old, new = exact(before), exact(after)
        for (name, labels), value in new.items():
            if name in growing:  # the first goes on
                ledger.add(name, value - old[name, labels], **dict(labels))
        ledger.check(before, after)
        first.cut()
        await asyncio.wait_for(tasks[0], 5)


async def test_an_engine_that_fails_in_mid_answer(served, checked, monkeypatch):
    append, seen = EngineCore._append, []

    def failing(core, tokens):
        seen.extend(tokens)
        if len(seen) == 4:
            for sequence, _ in tokens:
                core._fail(sequence.group, GenerationError("it broke", "non_finite_logits"))
            return
        append(core, tokens)

    monkeypatch.setattr(EngineCore, "_append", failing)
    response = await served.chat(FIRING[0], stream=True, ignore_eos=True, steer_metadata="full")
    events = [json.loads(part[6:]) for part in response.text.strip().split("\n\n")]
    assert events[-1]["error"]["code"] == "non_finite_logits"
    steering = events[0]["steering"]
    prompt_tokens = len((await served.client.post("/tokenize", json={"messages": TURN})).json()["tokens"])
    checked.decided(steering, {})
    checked.generated(prompt_tokens, [3], ["error"], steering, max_tokens=12, skipped={})
    checked.http(CHAT)
    checked.http("/tokenize")


async def test_a_vector_that_is_not_finite(artifacts):
    async with serving(artifacts, ("safety", "tone")) as served:
        [tone] = [p for site in served.engine._core.runner.sites for p in site.profiles if p.name == "tone"]
        tone.experts.output_bias.fill_(3e38)  # after the start-up proof, which would refuse it
        ledger, before = Ledger(), await text_of(served)
        ledger.http("/metrics")
        watched = await asked(served, FIRING[0], steer_strength={"tone": 0})
        assert watched["steering"]["reason"] == "non_finite"
        ledger.answer(watched, max_tokens=12, skipped={"tone": "non_finite"})
        failed = await served.chat(FIRING[0], n=2)
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "steering_non_finite")
        shown = watched["steering"]["profiles"]
        own = [shown[0], shown[1] | {"strength": 2.0, "strength_source": "profile"}]
        ledger.decided({"profiles": own}, {"tone": "non_finite"})
        ledger.add("request_success_total", 2, finished_reason="error")
        ledger.add("steering_overrides_total", kind="strength")
        ledger.http(CHAT)
        ledger.http(CHAT, "5xx")
        ledger.check(before, await text_of(served))


async def test_preempted_requests_are_decided_once(artifacts):
    async with serving(artifacts, max_model_len=128, kv_cache_memory=200_000, prefix_cache_memory=0) as served:
        ledger, before = Ledger(), await text_of(served)
        answers = await asyncio.gather(*(asked(served, FIRING[0], max_tokens=60) for _ in range(4)))
        after = await text_of(served)
        assert sample(after, "num_preemptions_total") > 0, "the test does not test what it should"
        for answer in answers:
            ledger.answer(answer, max_tokens=60)
            ledger.http(CHAT)
        ledger.http("/metrics")
        ledger.check(before, after)


async def test_profiles_that_come_and_go(artifacts, tmp_path):
    other = build_profile(artifacts.model, tmp_path / "other", "tone", strength=3.0, seed=4)
    access = Access.of("k", admin="root")
    root, user = {"Authorization": "Bearer root"}, {"Authorization": "Bearer k"}
    async with serving(artifacts, access=access) as served:

        async def change(action, **body):
            response = await served.client.post(f"/v1/steering/profiles/{action}", json=body, headers=root)
            assert response.status_code == 200, response.text
            return response.json()["version"]

        def infos(text):
            shown = [dict(labels) for (name, labels) in samples(text) if name == "profile_info"]
            thresholds = {dict(labels)["profile"] for (name, labels) in samples(text) if name == "gate_threshold"}
            assert thresholds == {info["profile"] for info in shown}
            return {info["profile"]: info["version"] for info in shown}

        first = await change("load", name="tone", source=str(artifacts.tone))
        before = await text_of(served)
        assert infos(before)["tone"] == first
        assert sample(before, "gate_evaluations_total", profile="tone") == 0
        ledger = Ledger()
        for strength in (2.0, 3.0):
            answer = await asked(served, FIRING[0], headers=user)
            assert [p["strength"] for p in answer["steering"]["profiles"]] == [6.0, strength]
            ledger.answer(answer, max_tokens=12)
            ledger.http(CHAT)
            ledger.http("/v1/steering/profiles/load")
            second = await change("load", name="tone", source=str(other))
        ledger.add("profile_info", 1, **_info("tone", second))
        ledger.http("/metrics")
        text = await text_of(served)
        assert infos(text) == {"safety": infos(before)["safety"], "tone": second}
        ledger.check(before, text)
        await change("unload", name="tone")
        text = await text_of(served)
        assert set(infos(text)) == {"safety"}
        assert sample(text, "gate_evaluations_total", profile="tone") == 2, "counts do not go back"


def _info(name, version):
    return {
        "profile": name,
        "version": version,
        "method": "finesteer",
        "layer": "1",
        "positions": "all",
        "gate_kind": "quantile",
    }


async def test_every_family_is_on_the_page(served):
    families = re.findall(r"^# TYPE (\S+) ", await text_of(served), re.M)
    page = PAGE.read_text(encoding="utf-8")
    assert {name for name in families if not name.endswith("_created") and f"| `{name}`" not in page} == set()


async def test_a_ledger_that_is_wrong_is_noticed(served):
    before = await text_of(served)
    answer = await asked(served, FIRING[0])
    after = await text_of(served)
    for spoil in (
        lambda ledger: ledger.add("gate_fired_total", profile="safety"),
        lambda ledger: ledger.add("generation_tokens_total", -1),
        lambda ledger: ledger.add("no_such_total"),
    ):
        ledger = Ledger()
        ledger.answer(answer, max_tokens=12)
        ledger.http(CHAT)
        ledger.http("/metrics")
        ledger.check(before, after)
        spoil(ledger)
        with pytest.raises(AssertionError):
            ledger.check(before, after)
