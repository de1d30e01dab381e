"""Clients that go, queues that fill, engines that end: what is freed, what is said, what is counted."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from safetensors.torch import load_file

from server.answers.generation import collect
from server.errors import InternalError
from server.wire.chat import ChatCompletionRequest
from server.wire.parsing import parse_body
from steering.decision import SteeringOptions
from tests.checkpoint import CALM, FIRING
from tests.serving import Connection, chunks, sample, samples, serving

LONG = {"model": "tiny", "temperature": 0, "ignore_eos": True, "messages": [{"role": "user", "content": FIRING[0]}]}


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def metrics_of(served) -> str:
    return (await served.client.get("/metrics")).text


async def test_cutting_a_stream_frees_its_row(served):
    connection = Connection(served.app, "/v1/chat/completions", LONG | {"stream": True})
    running = asyncio.create_task(connection.run())
    await connection.first_event.wait()
    assert served.engine.stats().num_running == 1
    connection.cut()
    await asyncio.wait_for(running, 5)
    await until(lambda: served.engine.stats().num_running == 0)
    text = await metrics_of(served)
    assert sample(text, "request_success_total", finished_reason="abort") == 1
    delivered = sample(text, "generation_tokens_total")
    assert 0 < delivered < 200
    assert sample(text, "steered_tokens_total", profile="safety") == delivered
    assert sample(text, "gate_evaluations_total", profile="safety") == 1
    assert sample(text, "steered_requests_total", profile="safety") == 1
    assert b"[DONE]" not in connection.received


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", LONG | {"n": 2}),
        (
            "/v1/completions",
            {"model": "tiny", "prompt": ["a", "b"], "max_tokens": None, "ignore_eos": True, "temperature": 0},
        ),
    ],
)
async def test_cutting_a_whole_answer_frees_its_rows(served, path, body):
    connection = Connection(served.app, path, body)
    running = asyncio.create_task(connection.run())
    await until(lambda: served.engine.stats().num_running == 2)
    connection.cut()
    await asyncio.wait_for(running, 5)
    await until(lambda: served.engine.stats().num_running == 0)
    assert connection.status == 499
    assert sample(await metrics_of(served), "request_success_total", finished_reason="abort") == 2


async def test_cutting_before_the_first_byte_frees_the_queue(artifacts, monkeypatch):
    async with serving(artifacts, max_num_seqs=1) as served:
        core = served.engine._core
        step = core.step

        def slow():
            time.sleep(0.01)  # on a busy machine the first answer must not end before the second request is cut
            return step()

        monkeypatch.setattr(core, "step", slow)
        first = Connection(served.app, "/v1/chat/completions", LONG | {"stream": True})
        queued = Connection(served.app, "/v1/chat/completions", LONG | {"stream": True})
        tasks = [asyncio.create_task(first.run())]
        await until(lambda: served.engine.stats().num_running == 1)  # else the two may enter in either order
        tasks.append(asyncio.create_task(queued.run()))
        await until(lambda: served.engine.stats().num_waiting == 1)
        queued.cut()
        await asyncio.wait_for(tasks[1], 5)
        await until(lambda: served.engine.stats().num_waiting == 0)
        first.cut()
        await asyncio.wait_for(tasks[0], 5)
        assert sample(await metrics_of(served), "gate_evaluations_total", profile="safety") == 1


async def test_a_stop_string_frees_the_row(served, oracle):
    """The engine knows nothing of stop strings: the run must be closed, not left to the garbage collector."""
    plain = oracle.plain(CALM[1], 20)
    service = served.app.state.service
    fields = parse_body(ChatCompletionRequest, json.dumps(LONG).encode())
    prompt = tuple(oracle.prompt(CALM[1]))
    request = service.request("held", prompt, SteeringOptions(), fields, limit=None, logprobs=None, param="messages")
    generation = service.generation(request, (plain[5:8],))
    [completion] = await collect(generation)
    assert (completion.text, completion.finish_reason) == (plain[: plain.index(plain[5:8])], "stop")
    assert generation.completion_tokens < 20
    await asyncio.sleep(0.05)
    assert served.engine.stats().num_running == 0


async def test_a_full_queue_is_told_to_try_again(artifacts):
    async with serving(artifacts, max_num_seqs=1, max_waiting=1) as served:
        responses = await asyncio.gather(*(served.chat(CALM[0], stream=i % 2 == 0, max_tokens=60) for i in range(8)))
        refused = [response for response in responses if response.status_code != 200]
        assert 0 < len(refused) < 8
        for response in refused:
            assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
            assert response.headers["retry-after"] == "1"


async def test_an_engine_that_ends_in_mid_stream_says_so(artifacts):
    async with serving(artifacts) as served:
        connection = Connection(served.app, "/v1/chat/completions", LONG | {"stream": True})
        running = asyncio.create_task(connection.run())
        await connection.first_event.wait()
        await served.engine.stop()
        await asyncio.wait_for(running, 5)
        *_, last = connection.received.decode().strip().split("\n\n")
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("shutting_down", "server_error")
        assert b"[DONE]" not in connection.received
        assert b'"finish_reason":"' not in connection.received
        after = await served.chat(CALM[0])
        assert (after.status_code, after.json()["error"]["code"]) == (503, "shutting_down")
        assert sample(await metrics_of(served), "request_success_total", finished_reason="error") == 2


async def test_a_defect_is_told_with_its_request_id(served, monkeypatch):
    async def broken(messages):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(served.prompter, "chat", broken)
    response = await served.chat(CALM[0], headers={"X-Request-Id": "abc"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (500, InternalError.code)
    assert "abc" in error["message"] and "secret" not in error["message"]
    assert response.headers["x-request-id"] == "abc"


async def test_health_ready_version(served):
    for path in ("/health", "/ready"):
        response = await served.client.get(path)
        assert (response.status_code, response.json()) == (200, {"status": "ok"})
    version = (await served.client.get("/version")).json()
    assert version["engine"] == "native"
    assert set(version) == {"version", "engine", "torch", "transformers", "system_fingerprint"}


async def test_health_turns_red_with_the_engine(served, monkeypatch):
    monkeypatch.setattr(served.engine, "_failure", "the engine failed")
    for path in ("/health", "/ready"):
        assert (await served.client.get(path)).status_code == 503


async def test_series_exist_from_start_up(artifacts):
    async with serving(artifacts, ("safety", "tone")) as served:
        text = await metrics_of(served)
        for profile in ("safety", "tone"):
            for name in (
                "gate_evaluations_total",
                "gate_fired_total",
                "steered_requests_total",
                "steered_tokens_total",
            ):
                assert sample(text, name, profile=profile) == 0
            for reason in ("gate_closed", "strength_zero", "forced_closed", "shadow", "non_finite"):
                assert sample(text, "steering_skipped_total", profile=profile, reason=reason) == 0
            for source in ("request", "header", "profile"):
                assert sample(text, "steer_strength_count", profile=profile, source=source) == 0
            assert sample(text, "gate_threshold", profile=profile) > 0
            assert [sample(text, "expert_weight_total", profile=profile, expert=str(i)) for i in range(3)] == [0, 0, 0]
        for kind in ("strength", "profiles", "opt_out", "gate", "positions"):
            assert sample(text, "steering_overrides_total", kind=kind) == 0
        for reason in ("stop", "length", "abort", "error"):
            assert sample(text, "request_success_total", finished_reason=reason) == 0
        for steered in ("true", "false"):
            assert sample(text, "time_to_first_token_seconds_count", steered=steered) == 0
        assert sample(text, "num_requests_running") == sample(text, "num_requests_waiting") == 0
        before = set(samples(text))
        await served.chat(FIRING[0], steer_strength=1)
        await served.chat(CALM[0], stream=True)
        assert set(samples(await metrics_of(served))) == before


async def test_metrics_count_what_the_responses_say(served, oracle, artifacts):
    answers = [(await served.chat(text, steer_metadata="full")).json() for text in (*FIRING, *CALM)]
    streamed = chunks((await served.chat(FIRING[0], stream=True, steer_metadata="full", steer_strength=3)).text)
    await served.chat(FIRING[0], model="tiny:unsteered")
    reports = [answer["steering"]["profiles"][0] for answer in answers] + [streamed[0]["steering"]["profiles"][0]]
    text = await metrics_of(served)

    def of(name, **labels):
        return sample(text, name, profile="safety", **labels)

    assert of("gate_evaluations_total") == len(reports) == 9
    assert of("gate_fired_total") == sum(report["fired"] for report in reports) == 5
    assert of("steered_requests_total") == 5
    assert of("steered_tokens_total") == 5 * 12
    assert of("steering_skipped_total", reason="gate_closed") == 4
    assert sample(text, "steering_skipped_total", profile="", reason="opted_out") == 1
    assert of("energy_ratio_sum") == pytest.approx(sum(report["energy_ratio"] for report in reports), rel=1e-4)
    calibration = load_file(artifacts.safety / "profile.safetensors")["gate.calibration"].tolist()
    reaching = [ratio for ratio in calibration if ratio >= reports[0]["threshold"] - 1e-6]
    open_ones = [report["energy_ratio"] for report in reports if report["energy_ratio"] >= report["threshold"]]
    assert of("calibration_rank_count") == len(open_ones) > 0
    ranks = [sum(ratio < mine - 1e-6 for ratio in reaching) / len(reaching) for mine in open_ones]
    assert of("calibration_rank_sum") == pytest.approx(sum(ranks))
    assert of("gate_value_sum") == pytest.approx(sum(report["gate"] for report in reports), rel=1e-4)
    weights = [sum(report["routing"][i] for report in reports) for i in range(3)]
    assert [of("expert_weight_total", expert=str(i)) for i in range(3)] == pytest.approx(weights, abs=1e-3)
    doses = [report["relative_norm"] for report in reports if report["fired"]]
    assert of("steering_relative_norm_sum") == pytest.approx(sum(doses), rel=1e-4)
    assert (of("steer_strength_count", source="request"), of("steer_strength_sum", source="request")) == (1, 3)
    assert of("steer_strength_count", source="profile") == 8
    assert sample(text, "steering_overrides_total", kind="strength") == 1
    assert sample(text, "steering_overrides_total", kind="opt_out") == 1
    assert sample(text, "generation_tokens_total") == 10 * 12
    assert sample(text, "prompt_tokens_total") == sum(
        len(oracle.prompt(t)) for t in (*FIRING, *CALM, FIRING[0], FIRING[0])
    )
    assert sample(text, "request_success_total", finished_reason="length") == 10
    assert sample(text, "time_to_first_token_seconds_count", steered="true") == 5
    assert sample(text, "e2e_request_latency_seconds_count", steered="false") == 5
    assert sample(text, "inter_token_latency_seconds_count", steered="true") == 5 * 11


async def test_scoring_is_not_counted_as_an_evaluation(served):
    await served.client.post("/v1/steering/score", json={"prompt": "x"})
    assert sample(await metrics_of(served), "gate_evaluations_total", profile="safety") == 0


async def test_one_log_line_a_request_without_its_text(served, caplog):
    with caplog.at_level("INFO", logger="finesteer"):
        await served.chat(FIRING[0], headers={"X-Request-Id": "r-1"})
        await served.chat(FIRING[0], stream=True)
        await served.client.get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "finesteer"]
    assert len(lines) == 2
    for part in (
        "request=r-1",
        "status=200",
        "completion_tokens=12",
        "steered=true",
        "reason=gate_open",
        "fired=safety",
    ):
        assert part in lines[0]
    assert "reason=gate_open" in lines[1]
    assert not any("house" in line for line in lines)


async def test_the_prefix_cache_is_seen_in_the_metrics(artifacts):
    async with serving(artifacts, max_batched_tokens=32) as served:
        text = "a shared beginning that is longer than a block of tokens, said twice " * 2
        first = await served.chat(text, steer_gate="closed")
        before = await metrics_of(served)
        again = await served.chat(text, steer_gate="closed")
        after = await metrics_of(served)
        steered = await served.chat(text, steer_gate="open")
        last = await metrics_of(served)
    assert first.json()["choices"] == again.json()["choices"] != steered.json()["choices"]
    for layers in ("lower", "upper"):
        assert sample(before, "prefix_cache_hits_total", layers=layers) == 0
        assert sample(after, "prefix_cache_hits_total", layers=layers) > 0
        queries = [sample(text, "prefix_cache_queries_total", layers=layers) for text in (before, after, last)]
        assert queries == [first.json()["usage"]["prompt_tokens"] * i for i in (1, 2, 3)]
    for layers, grows in (("lower", True), ("upper", False)):  # what is steered finds only what is below the site
        hits = [sample(text, "prefix_cache_hits_total", layers=layers) for text in (after, last)]
        assert (hits[1] > hits[0]) == grows
    assert 0 < sample(after, "prefix_cache_usage_perc") < sample(last, "prefix_cache_usage_perc") < 1
    assert sample(after, "kv_cache_bytes") > 0 and sample(after, "num_preemptions_total") == 0
