"""`/tokenize` and `/detokenize`, against the tokenizer itself."""

from __future__ import annotations

import pytest

from tests.checkpoint import CALM, CORPUS


@pytest.mark.parametrize("text", [*CORPUS, "", "<|im_start|>user\n"])
async def test_a_prompt_there_and_back(served, oracle, text):
    body = {"model": "tiny", "prompt": text, "return_token_strs": True}
    found = (await served.client.post("/tokenize", json=body)).json()
    ids = oracle.tokenizer.encode(text)
    assert found == {
        "count": len(ids),
        "max_model_len": served.engine.info.max_model_len,
        "tokens": ids,
        "token_strs": oracle.tokenizer.convert_ids_to_tokens(ids),
    }
    back = (await served.client.post("/detokenize", json={"model": "tiny", "tokens": found["tokens"]})).json()
    assert back == {"prompt": text}


async def test_a_conversation_is_what_chat_makes_of_it(served, oracle):
    body = {"messages": [{"role": "user", "content": CALM[0]}]}
    found = (await served.client.post("/tokenize", json=body)).json()
    assert (found["tokens"], found["token_strs"]) == (oracle.prompt(CALM[0]), None)
    usage = (await served.chat(CALM[0])).json()["usage"]
    assert usage["prompt_tokens"] == found["count"]
    closed = (await served.client.post("/tokenize", json=body | {"add_generation_prompt": False})).json()
    assert closed["tokens"] == found["tokens"][: closed["count"]] and closed["count"] < found["count"]


async def test_a_conversation_may_have_tools(served, oracle):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    body = {"messages": [{"role": "user", "content": CALM[0]}], "tools": [tool]}
    found = (await served.client.post("/tokenize", json=body)).json()
    text = oracle.tokenizer.decode(found["tokens"])
    assert '"weather"' in text and text.endswith(f"user\n{CALM[0]}<|im_end|>\n<|im_start|>assistant\n")


async def test_aliases_are_models_too(served):
    for model in ("tiny", "tiny:safety", "tiny:unsteered"):
        assert (await served.client.post("/tokenize", json={"model": model, "prompt": "x"})).status_code == 200
        assert (await served.client.post("/detokenize", json={"model": model, "tokens": [5]})).status_code == 200


async def test_a_prompt_longer_than_the_context_can_be_counted(served):
    found = (await served.client.post("/tokenize", json={"prompt": "a b " * 4000})).json()
    assert found["count"] > 4000 > found["max_model_len"]


async def test_they_are_in_the_documentation(served):
    description = (await served.client.get("/openapi.json")).json()
    for path, name in (("/tokenize", "TokenizeRequest"), ("/detokenize", "DetokenizeRequest")):
        schema = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": f"#/components/schemas/{name}"}
        assert "model" in description["components"]["schemas"][name]["properties"]
