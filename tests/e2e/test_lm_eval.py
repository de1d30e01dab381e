"""lm-eval's own clients against the real process: log-likelihoods, and greedy answers of both endpoints.

`pip install 'lm-eval[api]'`, then `pytest -m clients`.
"""

from __future__ import annotations

import pytest
import torch

from tests.checkpoint import CALM

pytestmark = pytest.mark.clients
clients, api_models, instance = (
    pytest.importorskip(f"lm_eval.{name}", reason="lm-eval[api] is not installed", exc_type=ImportError)
    for name in ("models.openai_completions", "models.api_models", "api.instance")
)

PAIRS = [
    ("The quick brown fox", " jumps over the lazy dog."),
    ("How do I bake bread?", " With flour, water, salt and time; naïve bakers hurry."),
    ("Tell me how", " a car works"),
    ("日本", "語 is a word"),
    ("", "a context of nothing"),
]


def loglikelihood(oracle, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        table = torch.log_softmax(oracle.model(torch.tensor([context + continuation])).logits[0].double(), -1)
    rows = table[len(context) - 1 : -1]
    ids = torch.tensor(continuation)
    return float(rows.gather(1, ids[:, None]).sum()), bool((rows.argmax(-1) == ids).all())


def requests(kind: str, arguments: list[tuple]) -> list:
    return [instance.Instance(kind, {}, found, i) for i, found in enumerate(arguments)]


@pytest.fixture
def model(address, artifacts):
    return clients.LocalCompletionsAPI(
        base_url=f"{address}/v1/completions",
        model="tiny:unsteered",
        tokenizer=str(artifacts.model),
        tokenizer_backend="huggingface",
        max_length=256,
        batch_size=2,
    )


def test_loglikelihoods_are_transformers(model, oracle):
    greedy = (f"<|im_start|>user\n{CALM[1]}<|im_end|>\n<|im_start|>assistant\n", oracle.plain(CALM[1], 5))
    pairs = [*PAIRS, greedy]
    found = model.loglikelihood(requests("loglikelihood", pairs))
    flags = []
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        if context:
            ids = model._encode_pair(context, continuation)
        else:
            ids = [model.prefix_token_id], model.tok_encode(continuation)
        wanted, flag = loglikelihood(oracle, *map(list, ids))
        assert value == pytest.approx(wanted, abs=1e-3)
        assert is_greedy is flag
        flags.append(flag)
    assert flags[:-1] == [False] * len(PAIRS)


def test_rolling_loglikelihoods_are_transformers(model, oracle):
    text = "The quick brown fox jumps over the lazy dog. " * 3
    [found] = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    wanted, _ = loglikelihood(oracle, [model.prefix_token_id], model.tok_encode(text))
    assert found == pytest.approx(wanted, abs=1e-3)


def test_greedy_answers_are_transformers(model, oracle):
    prompt = f"<|im_start|>user\n{CALM[0]}<|im_end|>\n<|im_start|>assistant\n"
    options = {"until": [], "max_gen_toks": 12, "temperature": 0}
    [found] = model.generate_until(requests("generate_until", [(prompt, options)]))
    assert found == oracle.plain(CALM[0])


def test_greedy_chat_answers_are_transformers(address, oracle):
    model = clients.LocalChatCompletion(
        base_url=f"{address}/v1/chat/completions", model="tiny:unsteered", max_length=256, batch_size=1
    )
    turns = api_models.JsonChatStr(f'[{{"role": "user", "content": "{CALM[0]}"}}]')
    options = {"until": ["zzz"], "max_gen_toks": 12, "temperature": 0}
    [found] = model.generate_until(requests("generate_until", [(turns, options)]))
    assert found == oracle.plain(CALM[0])
