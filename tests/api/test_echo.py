"""`echo`, log-probabilities of prompts, and the choice among completions, against transformers and the two-pass oracle."""

from __future__ import annotations

import pytest
import torch

from steering.decision import ProfileActivation
from tests.checkpoint import CALM, FIRING
from tests.parity.oracle import prompt_table
from tests.serving import chunks

PLAIN = "tiny:unsteered"


async def complete(served, prompt, **fields):
    body = {"model": PLAIN, "prompt": prompt, "temperature": 0, "max_tokens": 6} | fields
    return await served.client.post("/v1/completions", json=body)


def conversation(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def encoded(oracle, text: str) -> list[int]:
    return oracle.tokenizer.encode(text, add_special_tokens=False)


def transformers_logprobs(oracle, ids: list[int]) -> list[float]:
    """Of each token but the first, given those before it."""
    with torch.no_grad():
        table = torch.log_softmax(oracle.model(torch.tensor([ids])).logits[0].double(), -1)
    return table[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()


@pytest.mark.parametrize("text", ["naïve café 日本語 🙂!", "The quick brown fox", conversation(CALM[0])])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_the_echo_is_the_prompt_and_its_numbers_are_transformers(served, oracle, text, as_ids):
    ids = encoded(oracle, text)
    answer = (await complete(served, ids if as_ids else text, echo=True, logprobs=2, return_token_ids=True)).json()
    [choice] = answer["choices"]
    plain = (await complete(served, text, logprobs=2)).json()["choices"][0]
    assert choice["text"] == text + plain["text"]
    found, own = choice["logprobs"], plain["logprobs"]
    whole = ids + choice["token_ids"]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(transformers_logprobs(oracle, whole), abs=1e-4)
    assert len({len(values) for values in found.values()}) == 1 and len(found["tokens"]) == len(whole)
    for name, logprob, top in list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True))[
        1:
    ]:
        assert 2 <= len(top) <= 3 and top[name] == logprob
    assert found["tokens"][len(ids) :] == own["tokens"]
    offsets = found["text_offset"]
    assert offsets[0] == 0 and offsets[len(ids) :] == [len(text) + offset for offset in own["text_offset"]]
    for i, name in enumerate(found["tokens"][: len(ids)]):
        if not name.startswith("bytes:"):
            assert text[offsets[i] :].startswith(name)
    assert answer["usage"]["prompt_tokens"] == len(ids)


async def test_tokens_that_are_no_characters_are_written_as_bytes(served, oracle):
    """So that their dictionaries lose none to another that would read the same."""
    ids = encoded(oracle, "🙂🚀")
    [choice] = (await complete(served, ids, echo=True, logprobs=20, max_tokens=1)).json()["choices"]
    raw = b""
    for name in choice["logprobs"]["tokens"][: len(ids)]:
        raw += bytes.fromhex(name[6:].replace("\\x", "")) if name.startswith("bytes:") else name.encode()
    assert raw.decode() == "🙂🚀"
    assert all(len(top) >= 20 for top in choice["logprobs"]["top_logprobs"][1:])


async def test_max_tokens_0_is_the_prompt_alone(served, oracle):
    text = "The quick brown fox"
    response = await complete(served, text, echo=True, logprobs=0, max_tokens=0, return_token_ids=True)
    answer = response.json()
    [choice] = answer["choices"]
    ids = encoded(oracle, text)
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == (text, "length", [])
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(transformers_logprobs(oracle, ids), abs=1e-4)
    usage = answer["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (0, len(ids))
    streamed = chunks((await complete(served, text, echo=True, max_tokens=0, stream=True)).text)
    assert [chunk["choices"][0]["text"] for chunk in streamed] == [text, ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in streamed] == [None, "length"]


async def test_echo_without_logprobs_computes_none(served, oracle, monkeypatch):
    asked = []
    generate = served.engine.generate
    monkeypatch.setattr(served.engine, "generate", lambda request: asked.append(request) or generate(request))
    [choice] = (await complete(served, "a fox", echo=True)).json()["choices"]
    assert choice["text"].startswith("a fox") and choice["logprobs"] is None
    assert asked[0].sampling.prompt_logprobs is None


@pytest.mark.parametrize("n", [1, 2])
async def test_streamed_echo_is_whole(served, oracle, n):
    prompts = ["The quick brown fox", "naïve 🙂"]
    fields = {"echo": True, "logprobs": 1, "n": n, "return_token_ids": True}
    whole = (await complete(served, prompts, **fields)).json()
    events = chunks((await complete(served, prompts, stream=True, **fields)).text)
    choices = [choice for chunk in events for choice in chunk["choices"]]
    for wanted in whole["choices"]:
        mine = [choice for choice in choices if choice["index"] == wanted["index"]]
        assert mine[0]["text"] == prompts[wanted["index"] // n]
        assert "".join(choice["text"] for choice in mine) == wanted["text"]
        found = {name: [x for choice in mine for x in choice["logprobs"][name]] for name in wanted["logprobs"]}
        for name in ("tokens", "text_offset"):
            assert found[name] == wanted["logprobs"][name]
        for name in ("token_logprobs", "top_logprobs"):
            pairs = list(zip(found[name], wanted["logprobs"][name], strict=True))
            assert pairs.pop(0) == (None, None)
            assert all(one == pytest.approx(other, abs=1e-4) for one, other in pairs)
        assert [i for choice in mine for i in choice.get("token_ids", [])] == wanted["token_ids"]
        assert [choice.get("prompt_token_ids") for choice in mine if "prompt_token_ids" in choice] == [
            wanted["prompt_token_ids"]
        ]
    assert events[0]["steering"] == events[-1]["steering"] == whole["steering"]
    assert sum("steering" in chunk for chunk in events) == 2


@pytest.mark.parametrize("text", [FIRING[0], CALM[0]])
async def test_steered_prompts_have_the_steered_models_numbers(served, oracle, text):
    """Positions are `all`: the vector acts on every state of the prompt."""
    ids = oracle.prompt(text)
    profile = oracle.profiles["safety"]
    steering = [(profile, ProfileActivation("safety", profile.manifest.strength))]
    wanted = prompt_table(oracle.model, ids, steering)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    answer = (await complete(served, ids, model="tiny", echo=True, logprobs=0)).json()
    assert answer["steering"]["applied"] is (text in FIRING)
    found = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)]
    assert found == pytest.approx(wanted, abs=2e-4)
    plain = transformers_logprobs(oracle, ids)
    assert (max(abs(a - b) for a, b in zip(found, plain, strict=True)) > 0.1) is (text in FIRING)


PAIRS = [
    ("The quick brown fox", " jumps over the lazy dog."),
    ("How do I bake bread?", " With flour, water, salt and time; naïve 🙂 bakers hurry."),
    ("Tell me how", " a"),
    ("日本", "語"),
]


async def test_loglikelihoods_as_harnesses_ask_for_them(served, oracle):
    """Contexts and continuations in one request, scored by one token more than they have, as lm-eval reads it."""
    pairs = [(encoded(oracle, context), encoded(oracle, continuation)) for context, continuation in PAIRS]
    # A continuation that is what the model would say, for the greedy flag.
    greedy = oracle.plain_ids(CALM[1], 5)
    pairs.append((oracle.prompt(CALM[1]), greedy))
    body = {"max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    answer = (await complete(served, [context + rest for context, rest in pairs], **body)).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(pairs)))
    flags = []
    for choice, (context, rest) in zip(answer["choices"], pairs, strict=True):
        logprobs = choice["logprobs"]
        scored = slice(len(context), -1)
        assert len(logprobs["token_logprobs"][scored]) == len(rest)
        wanted = sum(transformers_logprobs(oracle, context + rest)[len(context) - 1 :])
        assert sum(logprobs["token_logprobs"][scored]) == pytest.approx(wanted, abs=1e-3)
        top = zip(logprobs["token_logprobs"][scored], logprobs["top_logprobs"][scored], strict=True)
        flags.append(all(own == max(likely.values()) for own, likely in top))
    assert flags == [False] * len(PAIRS) + [True]


async def test_a_continuation_that_the_model_would_end_loses_no_token(served, oracle):
    """The one generated token may be an end-of-sequence token: it has no text, but its place in the lists."""
    ids = encoded(oracle, "Tell me how")
    eos = oracle.tokenizer.eos_token_id
    body = {"max_tokens": 1, "logprobs": 1, "echo": True, "logit_bias": {str(eos): 100}}
    [choice] = (await complete(served, ids, **body)).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == "Tell me how"
    assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1
    assert choice["logprobs"]["tokens"][-1] == "<|im_end|>"


async def test_the_best_are_those_whose_tokens_are_likeliest_on_average(served):
    options = {
        "temperature": 1.5,
        "seed": 5,
        "max_tokens": 10,
        "return_token_ids": True,
        "stop_token_ids": [*range(60, 90)],
    }
    everyone = (await complete(served, "The quick", n=6, logprobs=0, **options)).json()["choices"]

    def mean(choice):
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    ids = [choice["token_ids"] for choice in sorted(everyone, key=mean, reverse=True)]
    assert len({len(own) for own in ids}) > 1, "their lengths differ, so a mean is no sum"
    answer = (await complete(served, "The quick", n=5, best_of=6, **options)).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(5))
    assert [choice["token_ids"] for choice in answer["choices"]] == ids[:5]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == sum(map(len, ids)), "all that were made"
    [best] = (await complete(served, "The quick", best_of=6, logprobs=1, **options)).json()["choices"]
    assert best["token_ids"] == ids[0] and len(best["logprobs"]["tokens"]) == len(ids[0])
    answer = (await complete(served, "The quick", n=6, best_of=6, **options)).json()
    made = [choice["token_ids"] for choice in everyone]
    assert [choice["token_ids"] for choice in answer["choices"]] == made != ids, "nothing to choose: as they were made"


async def test_special_tokens_are_added_unless_they_are_declined(served, oracle, monkeypatch):
    encode, asked = served.prompter._tokenizer.encode, []

    def noted(text, add_special_tokens):
        asked.append(add_special_tokens)
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(served.prompter._tokenizer, "encode", noted)
    for fields in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
        assert (await complete(served, "x", max_tokens=1, **fields)).status_code == 200
    assert asked == [True, False, True]
