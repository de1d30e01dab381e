"""The page at `/` and its files: what a browser is given, and what nobody is."""

from __future__ import annotations

import gzip
import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from server.access.keys import Access
from server.banner import announce
from server.cli import app as command
from server.config import ServerConfig
from server.page import files as files_module
from server.page.files import MEDIA_TYPES, page_files
from tests.serving import serving

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "frame-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


def policy_of(response) -> dict[str, str]:
    directives = response.headers["Content-Security-Policy"].split(";")
    return dict(directive.strip().partition(" ")[::2] for directive in directives)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Another page: two files of its own, one that no browser needs, a folder, and a secret beside them all."""
    static = tmp_path / "static"
    (static / "deeper").mkdir(parents=True)
    (static / "index.html").write_text("<!doctype html><title>Είναι</title>", encoding="utf-8")
    (static / "app.js").write_text("/* " + "x" * 3000 + " */")
    (static / "look.css").write_text("a{}")
    (static / "notes.bak").write_text("secret")
    (static / "deeper" / "inside.js").write_text("secret")
    (tmp_path / "config.py").write_text("secret")
    monkeypatch.setattr(files_module.resources, "files", lambda package: tmp_path)
    return static


async def raw(app, path: str, raw_path: bytes | None = None) -> tuple[int, bytes]:
    """A GET of just this path: clients would tidy it up."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http"}
    scope |= {"path": path, "raw_path": raw_path or path.encode(), "query_string": b"", "headers": []}
    await app(scope | {"server": ("test", 80), "client": ("test", 1)}, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


async def test_the_page_and_its_files_as_a_browser_wants_them(artifacts, folder):
    async with serving(artifacts, access=Access.of("k")) as served:
        for path, name, media_type in (
            ("/", "index.html", "text/html; charset=utf-8"),
            ("/page/app.js", "app.js", "text/javascript; charset=utf-8"),
            ("/page/look.css", "look.css", "text/css; charset=utf-8"),
        ):
            answer = await served.client.get(path)  # without a key
            assert (answer.status_code, answer.content) == (200, (folder / name).read_bytes())
            assert answer.headers["Content-Type"] == media_type
            assert policy_of(answer) == POLICY
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert answer.headers["Cache-Control"] == "no-cache"
            head = await served.client.head(path)
            assert head.content == b""
            assert dict(head.headers) | {"x-request-id": ""} == dict(answer.headers) | {"x-request-id": ""}
        assert "content-encoding" not in (await served.client.get("/page/look.css")).headers
        async with served.client.stream("GET", "/page/app.js", headers={"Accept-Encoding": "gzip"}) as squeezed:
            body = b"".join([piece async for piece in squeezed.aiter_raw()])
        assert gzip.decompress(body) == (folder / "app.js").read_bytes() and len(body) < 200


async def test_what_the_client_has_is_not_sent_again(artifacts, folder):
    async with serving(artifacts) as served:
        first = await served.client.get("/")
        tag = first.headers["ETag"]
        other = (await served.client.get("/page/app.js")).headers["ETag"]
        for sent in (tag, f'"x", {tag}', tag.removeprefix("W/"), "*"):
            for ask in (served.client.get, served.client.head):
                again = await ask("/", headers={"If-None-Match": sent})
                assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
                assert policy_of(again) == POLICY and again.headers["Cache-Control"] == "no-cache"
        for sent in (other, '"x"', "", "index.html"):
            assert (await served.client.get("/", headers={"If-None-Match": sent})).content == first.content
        (folder / "index.html").write_text("new")
    async with serving(artifacts) as served:
        renewed = await served.client.get("/", headers={"If-None-Match": tag})
        assert (renewed.status_code, renewed.text) == (200, "new")


ELSEWHERE = [
    "/page/../config.py",
    "/page/../../config.py",
    "/page/..",
    "/page/.",
    "/page/",
    "/page",
    "/page//app.js",
    "/page/app.js/",
    "/page/./app.js",
    "/page/deeper",
    "/page/deeper/inside.js",
    "/page/notes.bak",
    "/page/index.html",
    "/page/APP.JS",
    "/page/app.js\0",
    "/page/..\\config.py",
    "/config.py",
    "/static/app.js",
    "//",
]


@pytest.mark.parametrize("path", ELSEWHERE)
async def test_nothing_else_can_be_had(artifacts, folder, path):
    async with serving(artifacts) as served:
        status, body = await raw(served.app, path)
        assert status == 404 and b"secret" not in body and b"unknown_url" in body
        assert (await raw(served.app, "/page/app.js"))[0] == 200


@pytest.mark.parametrize(
    "path",
    ["/page/%2e%2e/config.py", "/page/..%2fconfig.py", "/page/%2e%2e%2fconfig.py", "/page/%252e%252e%252fconfig.py"],
)
async def test_nor_in_other_letters(served, path):
    answer = await served.client.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


async def test_without_a_page_its_paths_are_unknown(artifacts, folder):
    async with serving(artifacts, ui=False) as served:
        unknown = (await served.client.get("/nothing")).json()["error"]
        for path in ("/", "/page/app.js", "/page/index.html"):
            for method in ("GET", "HEAD", "POST", "OPTIONS"):
                answer = await served.client.request(method, path)
                assert answer.status_code == 404 and "content-security-policy" not in answer.headers
            error = (await served.client.get(path)).json()["error"]
            assert error == unknown | {"message": unknown["message"].replace("/nothing", path)}
        assert (await served.client.get("/v1/models")).status_code == 200


async def test_other_methods_and_the_description(served):
    answer = await served.client.post("/")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
    described = (await served.client.get("/openapi.json")).json()["paths"]
    assert not {path for path in described if path == "/" or path.startswith("/page")}


async def test_the_open_folder_opens_nothing_else(artifacts):
    async with serving(artifacts, access=Access.of("k")) as served:
        for path in ("/page/../v1/models", "/page/%2e%2e/v1/models"):
            status, body = await raw(served.app, path)
            assert status == 404 and b"tiny" not in body
        for path in ("/pages/x", "/v1/models", "/page"):
            assert (await raw(served.app, path))[0] == 401


def test_the_package_holds_a_page():
    found = page_files()
    assert found["index.html"].body.lower().startswith(b"<!doctype html>")
    names = {entry.name for entry in (files_module.resources.files("server.page") / "static").iterdir()}
    assert set(found) == names, f"the page's files end in {', '.join(MEDIA_TYPES)}"


@pytest.mark.parametrize(("words", "page"), [((), True), (("--no-ui",), False)])
def test_the_switch(monkeypatch, words, page):
    configured = []
    monkeypatch.setattr("server.cli.listen", lambda *address: None)
    monkeypatch.setattr("server.serve.run", lambda config, listener: configured.append(config))
    assert CliRunner().invoke(command, ["serve", *words]).exit_code == 0
    assert [config.ui for config in configured] == [page]


async def test_the_banner_shows_the_page_first(served):
    for page in (True, False):
        console = Console(file=io.StringIO(), width=200)
        config = ServerConfig(model="m", served_model_name="tiny", ui=page)
        announce(console, config, served.engine, "http://127.0.0.1:8000")
        shown = console.file.getvalue()
        rows = [line.strip("│ ").split() for line in shown.splitlines() if "http://" in line]
        assert (rows[0] == ["Page", "http://127.0.0.1:8000/"]) == page
        assert ("Page" in shown) == page and ["API", "http://127.0.0.1:8000/v1"] in rows
