"""The page in a real browser against a real server: the story that it is there to tell, and what goes wrong, in words."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.serving import launched, process, sample

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (browser extra)")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
OPTIONS = ("--num-threads", "1", "--max-num-seqs", "8")
HARMFUL, HARMLESS = "Write a phishing email", "Describe the water cycle"
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with process(*OPTIONS, log=tmp_path_factory.mktemp("page") / "log") as url:
        yield url


class Opened:
    """A tab with the page, and what its console and its requests were."""

    def __init__(self, browser, address, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.errors, self.hosts = [], set()
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(httpx.URL(request.url).netloc.decode()))
        self.address = address
        self.page.goto(f"{address}/")

    def ask(self, name: str) -> tuple[str, str]:
        """Click an example; both answers, once they are there."""
        self.page.locator("#examples button", has_text=name).click()
        return self.answers()

    def answers(self) -> tuple[str, str]:
        self.settle()
        last = self.page.locator(".turn").last
        plain, steered = (last.locator(".answer").nth(i).locator(".text").inner_text() for i in (0, 1))
        return plain, steered

    def settle(self) -> None:
        self.until("document.getElementById('cancel').disabled")

    def until(self, expression: str) -> None:
        """Asked from outside: the page's policy lets nothing be evaluated inside it, and so waiting there, too."""
        deadline = time.monotonic() + WAIT_MS / 1000
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"never came: {expression}"
            self.page.wait_for_timeout(20)

    def why(self) -> str:
        return self.page.locator("#why").inner_text()


@pytest.fixture
def opened(browser, address):
    made = []

    def open_(**options) -> Opened:
        made.append(Opened(browser, options.pop("address", address), **options))
        return made[-1]

    yield open_
    for one in made:
        one.context.close()


def asked(address, prompt, **fields) -> str:
    """The same answer, straight from the API."""
    body = {"model": "demo", "temperature": 0, "max_tokens": 120, "messages": [{"role": "user", "content": prompt}]}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body | fields, timeout=60).json()
    return answer["choices"][0]["message"]["content"]


def test_the_first_thirty_seconds(opened, address):
    tab = opened()
    plain, steered = tab.ask(HARMFUL)
    full = tab.page.locator("#examples button", has_text=HARMFUL).inner_text().split("\n")[1]
    assert plain == asked(address, full, steer_profiles=[]) and steered == asked(address, full)
    assert plain != steered and tab.page.locator(".turn mark").count() == 1
    marked = tab.page.locator(".turn mark").inner_text()
    assert steered.split(marked)[0].strip() == plain[: len(steered.split(marked)[0])].strip()
    assert "The gate opened" in tab.why() and "safety: fired" in tab.why() and "truthfulness: did not fire" in tab.why()
    assert "is above the threshold" in tab.why() and re.search(r"expert \d, \w+.*%", tab.why())

    tab.page.locator("#again").click()
    plain, steered = tab.ask(HARMLESS)
    assert plain == steered and tab.page.locator(".turn mark").count() == 0
    assert "The gate stayed shut" in tab.why() and "is below the threshold" in tab.why()
    assert tab.errors == [] and tab.hosts == {httpx.URL(address).netloc.decode()}


def test_the_slider_and_the_switches(opened, address):
    tab = opened()
    plain, steered = tab.ask(HARMFUL)
    assert plain != steered

    def set_(selector, value):
        tab.page.locator(selector).evaluate(
            "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }", value
        )
        tab.page.wait_for_timeout(400)  # the controls settle, then the answer follows
        return tab.answers()

    assert set_("#strength", "0") == (plain, plain) and "Strength 0" in tab.why()
    assert set_("#strength", "1")[1] == steered
    assert set_("#gate", "closed")[1] == plain and "forced shut" in tab.why()
    set_("#gate", "auto")
    tab.page.locator("#profiles-on input[value=safety]").uncheck()
    tab.page.wait_for_timeout(400)
    assert tab.answers()[1] == plain and "safety" not in tab.why()
    assert set_("#max-tokens", "3")[1] != plain and tab.errors == []


def test_several_turns_and_five_strengths(opened):
    tab = opened()
    tab.ask(HARMLESS)
    tab.page.locator("#prompt").fill("And again, please")
    tab.page.locator("#prompt").press("Enter")
    tab.answers()
    assert tab.page.locator(".turn").count() == 2
    tab.page.locator("#again").click()
    plain, steered = tab.ask(HARMFUL)
    tab.page.locator("#strip-run").click()
    tab.until("!document.getElementById('strip-run').disabled")
    cards = tab.page.locator("#strip .answer")
    texts = [cards.nth(i).locator(".text").inner_text() for i in range(cards.count())]
    heads = [cards.nth(i).locator("strong").inner_text() for i in range(cards.count())]
    assert heads == ["λ = 0", "λ = 0.5", "λ = 1", "λ = 2", "λ = 4"]
    assert texts[0] == plain and texts[2] == steered and tab.errors == []


def test_stop_frees_the_row(opened, address):
    tab = opened()
    tab.page.locator("#max-tokens").fill("900")
    tab.page.locator("#prompt").fill("Tell me a story about a lighthouse")
    tab.page.evaluate("document.getElementById('gate').value = 'open'")
    tab.page.locator("#strength").evaluate(
        "e => { e.value = 4; e.dispatchEvent(new Event('input', {bubbles: true})); }"
    )
    tab.page.locator("#send").click()
    tab.until("[...document.querySelectorAll('.turn .text')].some(e => e.textContent)")
    tab.page.locator("#cancel").click()
    tab.settle()
    deadline = time.monotonic() + 10
    while sample(httpx.get(f"{address}/metrics").text, "num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sample(httpx.get(f"{address}/metrics").text, "num_requests_running") == 0
    assert sample(httpx.get(f"{address}/metrics").text, "request_success_total", finished_reason="abort") >= 1
    assert "stopped" in tab.page.locator(".turn").inner_text()


def test_watch_and_profiles(opened, address):
    tab = opened()
    tab.ask(HARMFUL)
    tab.page.locator("nav button[data-view=watch]").click()
    tab.page.wait_for_selector("#watch .card")
    shown = tab.page.locator("#watch .card", has_text="safety").inner_text()
    text = httpx.get(f"{address}/metrics").text
    fired, evaluated = (int(sample(text, f"gate_{kind}_total", profile="safety")) for kind in ("fired", "evaluations"))
    assert f"fired on {fired} of {evaluated} queries" in shown and fired > 0
    tab.page.locator("nav button[data-view=profiles]").click()
    assert (
        "0.4227" in tab.page.locator("#profiles").inner_text() or "0.423" in tab.page.locator("#profiles").inner_text()
    )
    tab.page.locator("#profiles .card", has_text="safety").locator("button").click()
    frame = tab.page.frame_locator("#profiles iframe")
    assert "safety" in frame.locator("h1").inner_text() and tab.errors == []


def test_a_wrong_key_and_a_dead_server_are_explained(browser, tmp_path):
    with launched(*OPTIONS, log=tmp_path / "log", FINESTEER_API_KEY="sesame") as (server, address):
        tab = Opened(browser, address)
        tab.page.wait_for_selector("#key-form:not([hidden])")
        tab.page.locator("#key").fill("wrong")
        tab.page.locator("#key-form button").click()
        tab.until("document.getElementById('problem').textContent.includes('API key')")
        tab.page.locator("#key").fill("sesame")
        tab.page.locator("#key-form button").click()
        tab.page.wait_for_selector("#examples button")
        plain, steered = tab.ask(HARMFUL)
        assert plain != steered and tab.page.locator("#problem").is_hidden()
        server.kill()
        server.wait()
        tab.page.locator("#examples button", has_text=HARMLESS).click()
        tab.until("document.getElementById('problem').textContent.includes('does not answer')")
        assert "Start it again" in tab.page.locator("#problem").inner_text()
        tab.context.close()


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_axe_finds_nothing_serious(opened, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed (browser extra)")
    tab = opened(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.ask(HARMFUL)
    assert tab.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    for view in ("compare", "watch", "profiles"):
        tab.page.locator(f"nav button[data-view={view}]").click()
        tab.page.wait_for_timeout(300)
        found = axe.Axe().run(tab.page).response["violations"]
        assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == [], (view, found)


def test_nothing_jumps_while_it_streams(opened):
    """Cumulative layout shift, as browsers measure it, from the click to the end."""
    tab = opened(viewport={"width": 1600, "height": 900})
    tab.page.evaluate(
        "() => { window.shift = 0; new PerformanceObserver((l) => l.getEntries().forEach((e) => {"
        " if (!e.hadRecentInput) window.shift += e.value; })).observe({type: 'layout-shift', buffered: true}); }"
    )
    tab.ask(HARMLESS)
    assert tab.page.evaluate("window.shift") < 0.1


def test_it_paints_at_once_and_is_small(opened, address):
    tab = opened()
    paints = []
    for _ in range(5):
        tab.page.goto(f"{address}/")
        tab.until("performance.getEntriesByName('first-contentful-paint').length")
        paints.append(tab.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    assert sorted(paints)[2] < 300, paints
    static = Path(__file__).parents[2] / "server/page/static"
    assert sum(file.stat().st_size for file in static.iterdir()) < 250_000


def test_model_text_is_never_html(opened):
    tab = opened()
    tab.page.locator("#prompt").fill('<img src=x onerror="window.hit=1"><b>bold</b>')
    tab.page.locator("#send").click()
    tab.answers()
    assert tab.page.evaluate("window.hit") is None and tab.page.locator(".turn img, .turn b").count() == 0
    sources = [f.read_text() for f in (Path(__file__).parents[2] / "server/page/static").glob("*.js")]
    assert not any(re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", s) for s in sources)


def test_the_request_can_be_copied(opened, address):
    tab = opened()
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    _, steered = tab.ask(HARMFUL)
    tab.page.locator("#copy-curl").click()
    tab.until("document.getElementById('copied').textContent === 'copied'")
    command = tab.page.evaluate("navigator.clipboard.readText()")
    answer = json.loads(
        subprocess.run(["bash", "-c", command + " -s"], capture_output=True, text=True, check=True).stdout
    )
    assert answer["choices"][0]["message"]["content"] == steered
    tab.page.locator("#copy-python").click()
    tab.page.wait_for_timeout(300)
    code = tab.page.evaluate("navigator.clipboard.readText()")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith(steered) and "gate_open" in said


@contextlib.contextmanager
def behind(address: str, prefix: str):
    """A reverse proxy that hands `prefix`/… on to the server, a piece at a time."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            assert self.path.startswith(f"{prefix}/"), f"{self.path} is outside of the prefix"
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {k: v for k, v in self.headers.items() if k.lower() in ("content-type", "accept")}
            url = address + self.path.removeprefix(prefix)
            with httpx.stream(self.command, url, content=body, headers=headers, timeout=60) as response:
                self.send_response(response.status_code)
                for name in ("content-type", "content-security-policy"):
                    if name in response.headers:
                        self.send_header(name, response.headers[name])
                self.end_headers()
                for piece in response.iter_bytes():
                    self.wfile.write(piece)

        do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}"
    finally:
        server.shutdown()
        server.server_close()


def test_it_works_behind_a_path_prefix(opened, address):
    with behind(address, "/models/demo") as outside:
        tab = opened(address=outside)
        plain, steered = tab.ask(HARMFUL)
        tab.page.locator("nav button[data-view=watch]").click()
        tab.page.wait_for_selector("#watch .card")
        tab.page.locator("nav button[data-view=profiles]").click()
        tab.page.locator("#profiles .card", has_text="safety").locator("button").click()
        assert "safety" in tab.page.frame_locator("#profiles iframe").locator("h1").inner_text()
        assert plain != steered and "The gate opened" in tab.page.locator("#why-reason").text_content()
        assert tab.errors == [] and tab.hosts == {httpx.URL(outside).netloc.decode()}
