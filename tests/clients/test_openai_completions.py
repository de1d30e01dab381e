"""openai for Python: text completions."""

from __future__ import annotations

import openai
import pytest

GREEDY = {"model": "demo:unsteered", "temperature": 0, "max_tokens": 6}


def test_lists_and_n(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        prompt=["The cat", "A dog"], n=2, logprobs=1, extra_body={"ignore_eos": True}, **GREEDY
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text
    assert all(len(choice.logprobs.tokens) == 6 for choice in answer.choices)
    assert answer.usage.completion_tokens == 24


def test_the_stream_joins_to_the_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="The cat", **GREEDY)
    chunks = client.completions.create(prompt="The cat", stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_a_list_has_a_decision_each(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt=["The cat", "A dog"], **(GREEDY | {"model": "demo"}))
    assert len(answer.steering) == 2


def test_echo_gives_the_prompts_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="The cat sat", echo=True, logprobs=1, **(GREEDY | {"max_tokens": 0}))
    [choice] = answer.choices
    assert choice.text == "The cat sat" == "".join(choice.logprobs.tokens)
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset[0] == 0


def test_best_of_gives_the_likeliest(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        prompt="The cat", best_of=3, n=1, seed=1, **(GREEDY | {"temperature": 1, "max_tokens": 4})
    )
    assert len(answer.choices) == 1
    assert answer.usage.completion_tokens >= 3


def test_suffix_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt="The cat", suffix="x", **GREEDY)
    assert caught.value.param == "suffix"
