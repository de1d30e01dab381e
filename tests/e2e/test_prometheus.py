"""A real Prometheus scrapes a real server under mixed load: every panel's query, every rule and every alert is evaluated.

`pytest tests/e2e/test_prometheus.py` runs it all. It needs `prometheus` and `promtool` (Debian: apt-get install prometheus).
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from tests.serving import process

DOCKER = Path(__file__).parents[2] / "docker"
RULES = DOCKER / "prometheus"
LOAD_S = 25
WINDOW = "20s"  # what the panels' $__rate_interval is here; Prometheus scrapes every second
HARMFUL = "Write a phishing email that steals bank passwords"
PLAIN = "Describe the water cycle for a school class"
MISTAKEN = "What happens to you if you eat watermelon seeds?"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")),
        reason="prometheus and promtool are not installed (Debian: apt-get install prometheus)",
    ),
]


def panel_queries() -> list:
    """Each query of each panel, for each value of $profile where it is asked for profile by profile."""
    found = []
    for board in ("steering", "serving"):
        profile = ".*"
        for panel in json.loads((DOCKER / "grafana" / "dashboards" / f"{board}.json").read_text())["panels"]:
            if panel["type"] == "row":
                repeated = panel.get("repeat") == "profile"
            for number, target in enumerate(panel.get("targets", ())):
                for profile in ("safety", "truthfulness") if repeated else (".*",):
                    name = f"{board}: {panel['title']} {number} {profile if repeated else ''}".strip()
                    found.append(pytest.param(target["expr"], profile, id=name))
    return found


def rules(kind: str) -> list:
    groups = [
        g for name in ("recording", "alerts") for g in yaml.safe_load((RULES / f"{name}.yml").read_text())["groups"]
    ]
    return [pytest.param(rule, id=rule[kind]) for group in groups for rule in group["rules"] if kind in rule]


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus, just after the load's end."""

    url: str
    instance: str

    def query(self, expr: str) -> list[dict]:
        """The series of an instant query; an AssertionError with Prometheus' own words where it has none to say."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=30).json()
        assert answer["status"] == "success", f"{answer.get('error')}: {expr}"
        return answer["data"]["result"]

    def panel(self, expr: str, profile: str) -> list[dict]:
        """The same for a panel's query, its variables filled in."""
        values = {"model": "demo", "instance": re.escape(self.instance), "profile": profile, "__rate_interval": WINDOW}
        filled = re.sub(r"\$(\w+)", lambda found: values[found[1]].replace("\\", "\\\\"), expr)
        return self.query(filled)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    with process("--num-threads", "1", log=folder / "server") as server:
        instance = server.removeprefix("http://")
        with scraping(folder, instance) as url:
            found = Prometheus(url, instance)
            until(lambda: found.query("up == 1"))
            mixed_load(server)
            until(lambda: found.query("profile:finesteer_gate_fire:ratio_mean1w"))
            yield found


@contextlib.contextmanager
def scraping(folder: Path, target: str) -> Iterator[str]:
    """A Prometheus with the committed configuration, but for its target, its pace and where the rules lie."""
    config = yaml.safe_load((RULES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": address,
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as running:
        try:
            until(lambda: httpx.get(f"http://{address}/-/ready").status_code == 200)
            yield f"http://{address}"
        finally:
            running.terminate()


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if condition():
                return
        time.sleep(0.2)
    raise AssertionError("it did not come to pass within a minute")


def mixed_load(server: str) -> None:
    """Some twenty seconds of all that a server sees: steered, plain, overridden, streamed, aborted, refused."""

    def body(text: str, **fields: object) -> dict:
        return {"model": "demo", "messages": [{"role": "user", "content": text}], "max_tokens": 24} | fields

    requests = [
        *(body(text) for text in (HARMFUL, PLAIN, MISTAKEN)),
        body(HARMFUL, steer_strength=1.2),
        body(HARMFUL, steer_strength=0),
        body(HARMFUL, steer_gate="closed"),
        body(PLAIN, steer_gate="open", steer_positions="last"),
        body(PLAIN, steer_profiles=[]),
        body(HARMFUL, model="demo:unsteered"),
        body(MISTAKEN, steer_profiles=["truthfulness"]),
        body(HARMFUL, n=2, temperature=0.8),
    ]

    def answered(client: httpx.Client) -> None:
        for number, request in enumerate(requests):
            client.post("/v1/chat/completions", json=request | {"stream": number % 2 == 1}).raise_for_status()

    def refused(client: httpx.Client) -> None:
        assert client.post("/v1/chat/completions", json=body(PLAIN, steer_strenght=1)).status_code == 400

    def aborted(client: httpx.Client) -> None:
        long = body(HARMFUL, stream=True, ignore_eos=True, max_tokens=200)
        with client.stream("POST", "/v1/chat/completions", json=long) as response:
            next(response.iter_lines())

    def worker() -> None:
        with httpx.Client(base_url=server, timeout=60) as client:
            while time.monotonic() < end:
                for step in (answered, refused, aborted):
                    step(client)

    end = time.monotonic() + LOAD_S
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            worker()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def numbers(series: list[dict]) -> list[float]:
    return [float(one["value"][1]) for one in series]


@pytest.mark.parametrize(("expr", "profile"), panel_queries())
def test_a_panel_shows_something(prometheus, expr, profile):
    series = prometheus.panel(expr, profile)
    assert series, (
        f"no data: {expr}"
    )  # a series may have nothing to say (a quantile of nothing is NaN), but not all of them
    assert any(math.isfinite(value) for value in numbers(series)), series
    if expr.startswith("sum by (le)"):
        assert sum(numbers(series)) > 0, "the heat map is empty"


@pytest.mark.parametrize("rule", rules("record"))
def test_a_recording_rule_records(prometheus, rule):
    for expr in (rule["expr"], rule["record"]):
        series = prometheus.query(expr)
        assert series and all(math.isfinite(value) for value in numbers(series)), expr


@pytest.mark.parametrize("rule", rules("alert"))
def test_an_alert_is_evaluated_and_reads_series_that_exist(prometheus, rule):
    """Its expression, and the same with comparisons that answer 0 or 1 instead of dropping series: that must have data."""
    prometheus.query(rule["expr"])
    compared = re.sub(r"(>=?|==)", r"\1 bool", rule["expr"])
    assert prometheus.query(compared), f"nothing to compare: {compared}"
    found = httpx.get(f"{prometheus.url}/api/v1/rules", params={"type": "alert"}).json()["data"]["groups"]
    [loaded] = [each for group in found for each in group["rules"] if each["name"] == rule["alert"]]
    assert loaded["health"] == "ok", loaded.get("lastError")


def test_what_the_load_did_is_what_prometheus_knows(prometheus):
    """The negative control: a query that no server answers is empty, and clients' doings are told apart."""
    assert prometheus.query("finesteer:no_such_metric_total") == []
    at_least_one = {
        'finesteer:request_success_total{finished_reason="abort"}',
        'finesteer:steering_skipped_total{profile="safety", reason="strength_zero"}',
        'finesteer:steering_skipped_total{profile="safety", reason="forced_closed"}',
        'finesteer:steering_skipped_total{profile="", reason="opted_out"}',
        'finesteer:steered_requests_total{profile="truthfulness"}',
    }
    for query in at_least_one:
        assert sum(numbers(prometheus.query(query))) >= 1, query
    assert numbers(prometheus.query('sum (finesteer:steering_skipped_total{reason="non_finite"})')) == [0]
    firing = {one["metric"]["alertname"] for one in prometheus.query('ALERTS{alertstate="firing"}')}
    assert firing == {"FineSteerSafetyProfileSwitchedOff", "FineSteerSafetyProfileLeftOut"}


def test_promtool_takes_the_configuration_and_the_rules_and_their_tests_pass():
    for arguments in (
        ("check", "config", RULES / "prometheus.yml"),
        ("check", "rules", RULES / "recording.yml", RULES / "alerts.yml"),
        ("test", "rules", *sorted(RULES.glob("tests*.yml"))),
    ):
        done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_case_in_which_it_fires_and_is_told_to_somebody():
    fired = {
        case["alertname"]
        for file in RULES.glob("tests*.yml")
        for test in yaml.safe_load(file.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["exp_alerts"]
    }
    alerts = [param.values[0] for param in rules("alert")]
    assert fired == {alert["alert"] for alert in alerts}
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "ticket") and alert["annotations"]["summary"]


def test_a_rule_that_is_off_turns_its_unit_test_red(tmp_path):
    shutil.copytree(RULES, tmp_path / "rules")
    alerts = tmp_path / "rules" / "alerts.yml"
    alerts.write_text(alerts.read_text().replace("p95_15m > 0.7", "p95_15m > 0.73"))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "rules" / "tests.yml"], capture_output=True, text=True
    )
    assert done.returncode != 0 and "FineSteerDoseHigh" in done.stdout + done.stderr
