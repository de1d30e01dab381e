"""What no request can do: have a file or an address opened, run code by a template, or read what it should not."""

from __future__ import annotations

import logging
import sys

import pytest

from server.access.keys import Access
from server.prompting.prompter import load_prompter
from steering.errors import ModelError
from tests.checkpoint import CALM
from tests.serving import serving

MARK = "zz-opened-by-a-request"
PLACES = (f"/tmp/{MARK}", f"../../{MARK}", f"file:///tmp/{MARK}", f"http://{MARK}.example/x", f"{MARK}/repository")
_watched: list[str] | None = None


def _hook(event, arguments):
    if _watched is not None and event in ("open", "os.listdir", "os.scandir", "socket.getaddrinfo", "socket.connect"):
        _watched.append(f"{event} {arguments!r}")


@pytest.fixture
def opened():
    """Every file and address that Python opens meanwhile. An audit hook stays for good, so it looks at a switch."""
    global _watched
    if not getattr(sys, "finesteer_hook", False):
        sys.addaudithook(_hook)
        sys.finesteer_hook = True
    _watched = []
    yield _watched
    _watched = None


def test_the_watch_sees(opened, tmp_path):
    (tmp_path / MARK).write_text("")
    assert any(MARK in line for line in opened)


@pytest.mark.parametrize("place", PLACES)
async def test_nothing_that_a_request_names_is_opened(artifacts, opened, place):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": CALM[0]}], "max_tokens": 1}
    image = {"type": "image_url", "image_url": {"url": place}}
    schema = {"name": "x", "schema": {"$ref": place}, "strict": True}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"$ref": place}, "strict": True}}
    bodies = [
        ("/v1/chat/completions", chat | {"model": place}),
        ("/v1/chat/completions", chat | {"messages": [{"role": "user", "content": [image]}]}),
        ("/v1/chat/completions", chat | {"messages": [{"role": "user", "content": place, "name": place}]}),
        ("/v1/chat/completions", chat | {"steer_profiles": [place]}),
        ("/v1/chat/completions", chat | {"response_format": {"type": "json_schema", "json_schema": schema}}),
        ("/v1/chat/completions", chat | {"tools": [tool], "tool_choice": "required"}),
        ("/v1/chat/completions", chat | {"chat_template": place}),
        ("/v1/chat/completions", chat | {"chat_template_kwargs": {"include": place}}),
        ("/v1/completions", {"model": "tiny", "prompt": place, "suffix": place, "max_tokens": 1}),
        ("/v1/responses", {"model": "tiny", "input": place, "prompt": {"id": place}}),
        ("/v1/steering/profiles/load", {"name": "x", "source": place}),  # no admin key
        ("/tokenize", {"model": place, "prompt": place}),
    ]
    async with serving(artifacts) as served:
        opened.clear()
        for path, body in bodies:
            response = await served.client.post(path, json=body, headers={"X-FineSteer-Profiles": place})
            assert response.status_code < 500, response.text
        for path in (f"/v1/steering/profiles/{place}", f"/v1/models/{place}", f"/v1/responses/{place}"):
            assert (await served.client.get(path)).status_code in (400, 404)
    assert [line for line in opened if MARK in line] == []


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{% set x = cycler.__init__.__globals__.os.popen('id').read() %}{{ x }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
    ],
)
async def test_a_models_template_cannot_reach_out(artifacts, tmp_path, template):
    """A checkpoint from somewhere brings its template: it runs in jinja's immutable sandbox."""
    path = tmp_path / "evil.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}" + template)
    try:
        load_prompter(str(artifacts.model), path, None)
    except ModelError:
        return  # refused at the start
    async with serving(artifacts, chat_template=path) as served:
        response = await served.chat(CALM[0])
        assert response.status_code == 400 and response.json()["error"]["code"] == "chat_template_refused", (
            response.text
        )
        assert "root" not in response.text and "subclass" not in response.text.lower().replace("__subclasses__", "")


async def test_keys_and_prompts_are_never_logged(artifacts, caplog):
    caplog.set_level(logging.DEBUG)
    secret, text = "s3cret-key-of-a-client", "a prompt that is nobody's business"
    async with serving(artifacts, access=Access.of(secret, admin="s3cret-of-the-admin")) as served:
        for key in (secret, "s3cret-but-wrong", "s3cret-of-the-admin"):
            await served.chat(text, headers={"Authorization": f"Bearer {key}"}, max_tokens=2)
            await served.client.post(
                "/v1/steering/profiles/unload", json={"name": text}, headers={"Authorization": key}
            )
    assert "request" in caplog.text and "s3cret" not in caplog.text and text not in caplog.text
