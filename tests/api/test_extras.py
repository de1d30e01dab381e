"""The fields that open servers share: prompts' log-probabilities, token ids, priorities, templates; and usage in detail."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from steering.decision import ProfileActivation
from tests.checkpoint import CALM, FIRING
from tests.parity.oracle import prompt_table
from tests.serving import chunks, serving


def conversation(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


async def complete(served, prompt, **fields):
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 6} | fields
    return await served.client.post("/v1/completions", json=body)


def check(found, ids, table, oracle, num_top):
    assert len(found) == len(ids) and found[0] is None
    for position, place in enumerate(found[1:], 1):
        row = table[position - 1]
        own = place[str(ids[position])]
        assert own["logprob"] == pytest.approx(float(row[ids[position]]), abs=2e-4)
        assert own["rank"] == 1 + int((row > row[ids[position]] + 1e-6).sum())
        assert own["decoded_token"] == oracle.tokenizer.decode([ids[position]])
        ranked = sorted(place.values(), key=lambda entry: entry["rank"])
        assert [entry["rank"] for entry in ranked[:num_top]] == list(range(1, num_top + 1))
        assert num_top <= len(place) <= num_top + 1
        likeliest = row.topk(num_top)
        assert [entry["logprob"] for entry in ranked[:num_top]] == pytest.approx(likeliest.values.tolist(), abs=2e-4)
        assert {str(i) for i in likeliest.indices.tolist()} <= set(place)


@pytest.mark.parametrize("text", [FIRING[0], CALM[0]])
async def test_prompt_logprobs_of_both_endpoints(served, oracle, text):
    ids = oracle.prompt(text)
    profile = oracle.profiles["safety"]
    table = prompt_table(oracle.model, ids, [(profile, ProfileActivation("safety", profile.manifest.strength))])
    chat = (await served.chat(text, prompt_logprobs=2)).json()
    check(chat["prompt_logprobs"], ids, table, oracle, 2)
    assert "prompt_logprobs" not in chat["choices"][0]
    plain = (await complete(served, conversation(text), prompt_logprobs=2, n=2)).json()
    assert "prompt_logprobs" not in plain
    for choice in plain["choices"]:
        check(choice["prompt_logprobs"], ids, table, oracle, 2)


async def test_an_echo_and_prompt_logprobs_each_show_as_many_as_they_were_asked_for(served, oracle):
    for logprobs, prompt_logprobs in ((1, 3), (3, 1), (2, 0)):
        fields = {"echo": True, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        [choice] = (await complete(served, conversation(CALM[0]), **fields)).json()["choices"]
        tops = choice["logprobs"]["top_logprobs"][1:]
        assert all(logprobs <= len(top) <= logprobs + 1 for top in tops)
        places = choice["prompt_logprobs"][1:]
        assert all(max(1, prompt_logprobs) <= len(place) <= prompt_logprobs + 1 for place in places)


async def test_without_being_asked_nothing_is_said(served):
    chat = (await served.chat(CALM[0])).json()
    [plain] = (await complete(served, conversation(CALM[0]))).json()["choices"]
    streamed = chunks((await served.chat(CALM[0], stream=True)).text)
    for answer in (chat, chat["choices"][0], plain, streamed[0], streamed[1]["choices"][0]):
        assert not {"prompt_logprobs", "prompt_token_ids", "token_ids"} & set(answer)


async def test_token_ids_of_both_endpoints(served, oracle):
    ids, made = oracle.prompt(CALM[0]), oracle.plain_ids(CALM[0], 12)
    chat = (await served.chat(CALM[0], return_token_ids=True, n=2)).json()
    assert chat["prompt_token_ids"] == ids
    assert [choice["token_ids"] for choice in chat["choices"]] == [made, made]
    [plain] = (await complete(served, conversation(CALM[0]), return_token_ids=True)).json()["choices"]
    assert (plain["prompt_token_ids"], plain["token_ids"]) == (ids, made[:6])


@pytest.mark.parametrize("endpoint", ["chat", "text"])
async def test_streamed_token_ids_are_the_whole_ones(served, oracle, endpoint):
    """Also of tokens whose text is held back, or is part of a character, or is none."""
    ids, made = oracle.prompt(CALM[0]), oracle.plain_ids(CALM[0], 12)
    fields = {"return_token_ids": True, "n": 2, "stream": True, "stop": ["zzz"], "stop_token_ids": [made[7]]}
    wanted = made[: made.index(made[7]) + 1]
    if endpoint == "chat":
        events = chunks((await served.chat(CALM[0], **fields)).text)
        assert [event.get("prompt_token_ids") for event in events] == [ids] + [None] * (len(events) - 1)
    else:
        events = chunks((await complete(served, conversation(CALM[0]), **fields | {"max_tokens": 12})).text)
    found, prompts = {0: [], 1: []}, {0: [], 1: []}
    for event in events:
        for choice in event["choices"]:
            found[choice["index"]] += choice.get("token_ids", [])
            prompts[choice["index"]] += choice.get("prompt_token_ids", [])
    assert found == {0: wanted, 1: wanted}
    if endpoint == "text":
        assert prompts == {0: ids, 1: ids}


async def test_usage_tells_of_cached_tokens(served, oracle):
    text = "How do I bake bread? " * 5
    size = len(oracle.prompt(text))
    assert size > 64
    first = (await served.chat(text)).json()["usage"]
    again = (await served.chat(text)).json()["usage"]
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    cached = again["prompt_tokens_details"]["cached_tokens"]
    assert cached % 32 == 0 and size - 33 < cached < size
    assert again["completion_tokens_details"] == {"reasoning_tokens": 0}
    streamed = chunks((await served.chat(text, stream=True, stream_options={"include_usage": True})).text)
    assert streamed[-1]["usage"] == again
    twice = (await complete(served, [conversation(text)] * 2)).json()["usage"]
    assert twice["prompt_tokens_details"]["cached_tokens"] == 2 * cached
    scored = (await served.chat(text, prompt_logprobs=0)).json()["usage"]
    assert scored["prompt_tokens_details"]["cached_tokens"] == 0, "each row was needed"


@pytest.mark.parametrize("endpoint", ["chat", "text"])
async def test_a_lower_priority_number_runs_earlier(artifacts, endpoint):
    async with serving(artifacts, max_num_seqs=1) as served:
        ended = []
        step = served.engine._core.step
        holding = asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow():
            loop.call_soon_threadsafe(holding.set)
            time.sleep(0.01)
            return step()

        served.engine._core.step = slow

        async def ask(name, **fields):
            body = {"max_tokens": 3, "ignore_eos": True} | fields
            answer = await (served.chat(name, **body) if endpoint == "chat" else complete(served, name, **body))
            assert answer.status_code == 200
            ended.append(name)

        tasks = [asyncio.create_task(ask("running", max_tokens=60))]
        await holding.wait()
        tasks += [
            asyncio.create_task(ask(name, **fields))
            for name, fields in (
                ("late", {"priority": 1}),
                ("usual", {}),
                ("urgent", {"priority": -5}),
            )
        ]
        async with asyncio.timeout(10):
            while served.engine.stats().num_waiting < 3:
                await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)
        assert ended == ["running", "urgent", "usual", "late"]


TURNS = [{"role": "user", "content": CALM[0]}, {"role": "assistant", "content": "With fl"}]


async def chat(served, **fields):
    body = {"model": "tiny:unsteered", "messages": TURNS, "temperature": 0, "max_tokens": 6, "return_token_ids": True}
    return (await served.client.post("/v1/chat/completions", json=body | fields)).json()


async def test_a_final_message_is_continued(served, oracle):
    written = f"<|im_start|>user\n{CALM[0]}<|im_end|>\n<|im_start|>assistant\nWith fl"
    answer = await chat(served, continue_final_message=True)
    ids = oracle.tokenizer.encode(written, add_special_tokens=False)
    assert answer["prompt_token_ids"] == ids
    assert (await chat(served, continue_final_message=True, add_generation_prompt=False))["prompt_token_ids"] == ids
    with torch.no_grad():
        output = oracle.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
    assert answer["choices"][0]["token_ids"] == output[0, len(ids) :].tolist()


async def test_no_turn_is_opened_where_none_is_wanted(served, oracle):
    closed = f"<|im_start|>user\n{CALM[0]}<|im_end|>\n<|im_start|>assistant\nWith fl<|im_end|>\n"
    opened = closed + "<|im_start|>assistant\n"
    for fields, written in (
        ({}, opened),
        ({"add_generation_prompt": True}, opened),
        ({"add_generation_prompt": False}, closed),
    ):
        wanted = oracle.tokenizer.encode(written, add_special_tokens=False)
        assert (await chat(served, **fields))["prompt_token_ids"] == wanted


TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if mood is defined %}<{{ mood }}>{{ 3 + number }}{{ mood.upper() }}{% endif %}"
)


async def test_template_options_reach_the_template_and_its_failures_are_the_clients(artifacts, tmp_path):
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    async with serving(artifacts, chat_template=tmp_path / "t.jinja") as served:

        async def written(**options):
            body = {"model": "tiny", "messages": TURNS[:1], "chat_template_kwargs": options}
            response = await served.client.post("/tokenize", json=body)
            if response.status_code != 200:
                return response.status_code, response.json()["error"]
            return served.prompter._tokenizer.decode(response.json()["tokens"])

        assert await written() == CALM[0]
        assert await written(mood="calm", number=4) == CALM[0] + "<calm>7CALM"
        for options in ({"mood": "calm"}, {"mood": "calm", "number": "4"}, {"mood": 3, "number": 4}):
            status, error = await written(**options)
            assert (status, error["code"], error["param"]) == (400, "chat_template_refused", "messages")
            assert error["message"].startswith("messages: the model's chat template refuses them: ")
