"""64 streams at once, half of them cut: the others are right, the rows are freed, the metrics add up."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from tests.checkpoint import CALM, FIRING
from tests.serving import sample

NUM_STREAMS = 64
SHORT, LONG = 24, 220
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"steer_strength": 0},
    {"steer_strength": {"tone": 0}},
    {"steer_profiles": []},
)


@dataclass
class Outcome:
    """What one client saw."""

    text: str = ""
    num_texts: int = 0
    steering: list[dict] = field(default_factory=list)
    finish_reason: str | None = None


def expected(oracle, text: str, options: dict[str, Any]) -> str:
    if text in CALM or options in (OPTIONS[1], OPTIONS[3]):
        return oracle.plain(text, SHORT)
    return oracle.steered(text, SHORT) if options == OPTIONS[2] else oracle.steered_by_all(text, SHORT)


async def stream(client: openai.AsyncOpenAI, text: str, options: dict[str, Any], cut_after: int | None) -> Outcome:
    outcome = Outcome()
    events = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": text}],
        temperature=0,
        max_tokens=SHORT if cut_after is None else LONG,
        stream=True,
        extra_body=options | {"ignore_eos": cut_after is not None},
    )
    async for chunk in events:
        if steering := getattr(chunk, "steering", None):
            outcome.steering.append(steering)
        [choice] = chunk.choices
        outcome.text += choice.delta.content or ""
        outcome.num_texts += bool(choice.delta.content)
        outcome.finish_reason = choice.finish_reason
        if cut_after is not None and outcome.num_texts >= cut_after:
            await events.close()
            break
    return outcome


async def test_half_of_64_streams_are_cut(address, oracle):
    texts = FIRING + CALM
    asked = [(texts[i % 8], OPTIONS[i // 8 % 4], None if i // 4 % 2 else 1 + i % 5) for i in range(NUM_STREAMS)]
    assert sum(cut is not None for _, _, cut in asked) == NUM_STREAMS // 2
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        outcomes = await asyncio.gather(*(stream(client, *item) for item in asked))

    for (text, options, cut), outcome in zip(asked, outcomes, strict=True):
        if cut is None:
            assert outcome.text == expected(oracle, text, options)
            assert outcome.finish_reason in ("stop", "length")
            assert len(outcome.steering) == 2
            assert outcome.steering[0] == outcome.steering[1]
        else:
            assert outcome.finish_reason is None
            assert len(outcome.steering) == 1

    async with httpx.AsyncClient(base_url=address) as http:
        metrics = await settled(http)
        again = await http.post(
            "/v1/chat/completions",
            json={
                "model": "tiny",
                "messages": [{"role": "user", "content": CALM[0]}],
                "temperature": 0,
                "max_tokens": SHORT,
            },
        )
    assert again.json()["choices"][0]["message"]["content"] == oracle.plain(CALM[0], SHORT)

    prompts = sum(options.get("steer_profiles") != [] for _, options, _ in asked)
    assert prompts == 48
    reports = [report for outcome in outcomes for report in outcome.steering[0]["profiles"]]
    for name in ("safety", "tone"):
        mine = [report for report in reports if report["name"] == name]
        assert sample(metrics, "gate_evaluations_total", profile=name) == len(mine) == prompts
        assert sample(metrics, "gate_fired_total", profile=name) == sum(report["fired"] for report in mine)
        acted = sum(report["fired"] and report["strength"] != 0 for report in mine)
        assert 0 < acted < prompts
        assert sample(metrics, "steered_requests_total", profile=name) == acted
    assert sample(metrics, "steering_skipped_total", profile="", reason="opted_out") == NUM_STREAMS - prompts
    assert sample(metrics, "request_success_total", finished_reason="abort") == NUM_STREAMS // 2
    ended = sum(sample(metrics, "request_success_total", finished_reason=reason) for reason in ("stop", "length"))
    assert ended == NUM_STREAMS // 2
    assert sample(metrics, "request_success_total", finished_reason="error") == 0
    assert sample(metrics, "prompt_tokens_total") == sum(len(oracle.prompt(text)) for text, _, _ in asked)
    assert sample(metrics, "generation_tokens_total") < NUM_STREAMS // 2 * (SHORT + LONG // 2)


async def settled(http: httpx.AsyncClient) -> str:
    """`/metrics`, once nothing runs and nothing waits."""
    async with asyncio.timeout(10):
        while True:
            metrics = (await http.get("/metrics")).text
            if sample(metrics, "num_requests_running") == sample(metrics, "num_requests_waiting") == 0:
                return metrics
            await asyncio.sleep(0.05)
