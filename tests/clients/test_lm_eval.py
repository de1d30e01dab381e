"""lm-eval's own clients: log-likelihoods and greedy answers are transformers', on both endpoints."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from typing import Any

import pytest

from tests.clients.asked import HARMFUL, HARMLESS
from tests.clients.servers import ROOT, SERVER_PYTHON, Server

models = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval[api] is not installed")
api_models = pytest.importorskip("lm_eval.models.api_models")
instance = pytest.importorskip("lm_eval.api.instance")

TOKENIZER = ROOT / "artifacts" / "demo"
UNSTEERED = "demo:unsteered"
MAX_TOKENS = 12
PAIRS = [
    ("The capital of France is", " Paris"),
    ("Hello", " there my friend"),
    ("How do I bake bread?", " With flour, water, salt and time; naïve bakers hurry."),
    ("日本", "語 is a word"),
    ("", "a context of nothing"),
    (f"<|begin|><|user|>{HARMFUL}<|end|><|assistant|>", "Sure"),
]
PROMPTS = [f"<|begin|><|user|>{question}<|end|><|assistant|>" for question in (HARMFUL, HARMLESS)]


def transformers(pairs: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """See `transformers_reference`; its answers are those to `PROMPTS`."""
    return _transformers(json.dumps({"pairs": pairs, "prompts": PROMPTS, "max_new_tokens": MAX_TOKENS}))


@functools.cache
def _transformers(asked: str) -> dict[str, Any]:
    done = subprocess.run(
        [SERVER_PYTHON, "-m", "tests.clients.transformers_reference"],
        input=asked,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def requests(kind: str, arguments: list[tuple]) -> list[Any]:
    return [instance.Instance(kind, {}, found, i) for i, found in enumerate(arguments)]


def completions(server: Server, model: str, **options: Any) -> Any:
    return models.LocalCompletionsAPI(
        base_url=f"{server.url}/completions", model=model, max_length=512, max_retries=1, **options
    )


@pytest.fixture(params=[1, 3], ids=["one by one", "three in a request"])
def lm(request: pytest.FixtureRequest, demo: Server) -> Any:
    options = {"tokenizer_backend": "huggingface", "tokenizer": str(TOKENIZER), "batch_size": request.param}
    return completions(demo, UNSTEERED, **options)


def test_loglikelihoods_are_transformers(lm: Any) -> None:
    greedy = (PROMPTS[1], transformers([])["answers"][1])
    texts = [*PAIRS, greedy]
    ids = [lm._encode_pair(*pair) if pair[0] else ([lm.prefix_token_id], lm.tok_encode(pair[1])) for pair in texts]
    wanted = transformers(ids)["pairs"]
    found = lm.loglikelihood(requests("loglikelihood", texts), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-3)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]
    assert wanted[-1][1] and not wanted[0][1]


def test_steering_changes_them(demo: Server) -> None:
    """The negative control: the same request for the steered model is another number."""
    options = {"tokenizer_backend": "huggingface", "tokenizer": str(TOKENIZER)}
    pair = requests("loglikelihood", [PAIRS[-1]])
    [(plain, _)] = completions(demo, UNSTEERED, **options).loglikelihood(pair, disable_tqdm=True)
    [(steered, _)] = completions(demo, "demo", **options).loglikelihood(pair, disable_tqdm=True)
    assert abs(plain - steered) > 0.1


def test_rolling_loglikelihoods_are_transformers(lm: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 3
    [found] = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    [[wanted, _]] = transformers([([lm.prefix_token_id], lm.tok_encode(text))])["pairs"]
    assert found == pytest.approx(wanted, abs=1e-3)


def test_greedy_answers_are_transformers(lm: Any) -> None:
    options = {"until": [], "max_gen_toks": MAX_TOKENS, "temperature": 0}
    found = lm.generate_until(requests("generate_until", [(prompt, options) for prompt in PROMPTS]), disable_tqdm=True)
    assert found == transformers([])["answers"]


def test_greedy_chat_answers_are_transformers(demo: Server) -> None:
    chat = models.LocalChatCompletion(base_url=f"{demo.url}/chat/completions", model=UNSTEERED, max_retries=1)
    options = {"until": ["zzz"], "max_gen_toks": MAX_TOKENS, "temperature": 0}
    turns = [
        api_models.JsonChatStr(json.dumps([{"role": "user", "content": question}])) for question in (HARMFUL, HARMLESS)
    ]
    found = chat.generate_until(requests("generate_until", [(turn, options) for turn in turns]), disable_tqdm=True)
    assert found == transformers([])["answers"]


@pytest.mark.xfail(raises=RuntimeError, reason="the server has no /tokenizer_info; nor has vLLM unless it is told to")
def test_the_tokenizer_of_the_server(demo: Server) -> None:
    """lm-eval's remote tokenizer asks `/tokenizer_info` and `/tokenize` for it, and gets the same ids."""
    own = completions(demo, UNSTEERED, tokenizer_backend="huggingface", tokenizer=str(TOKENIZER))
    remote = completions(demo, UNSTEERED, tokenizer_backend="remote")
    text = "naïve 日本語"
    assert remote.tok_encode(text) == own.tok_encode(text)
