"""The page's table of metrics is the code's, and holds all that the design names."""

from __future__ import annotations

import re

import pytest

from server.observability import metrics as metrics_module
from server.observability.reference import COMMAND, PAGE, page, table

TEXT = PAGE.read_text(encoding="utf-8")
ROWS = {
    name: (kind, set(re.findall(r"`(\w+)`", labels)))
    for name, kind, labels in re.findall(r"^\| `([\w:]+)`¹? \| (\w+) \| (.*?) \| .+ \|$", TEXT, re.M)
}
STEERING = {
    "gate_evaluations_total": ("counter", {"profile"}),
    "gate_fired_total": ("counter", {"profile"}),
    "gate_value": ("histogram", {"profile"}),
    "energy_ratio": ("histogram", {"profile"}),
    "gate_threshold": ("gauge", {"profile"}),
    "steered_requests_total": ("counter", {"profile"}),
    "steered_tokens_total": ("counter", {"profile"}),
    "steering_skipped_total": ("counter", {"profile", "reason"}),
    "steering_overrides_total": ("counter", {"kind"}),
    "steer_strength": ("histogram", {"profile", "source"}),
    "steering_relative_norm": ("histogram", {"profile"}),
    "routing_entropy": ("histogram", {"profile"}),
    "expert_weight_total": ("counter", {"profile", "expert"}),
    "steering_compute_seconds": ("histogram", set()),
    "profile_info": ("gauge", {"profile", "version", "method", "layer", "positions", "gate_kind"}),
}


def test_the_table_is_the_codes():
    assert page(TEXT) == TEXT, f"the metrics have changed: run `{COMMAND}` and look at {PAGE.name}'s diff"


def test_a_changed_metric_changes_the_page(monkeypatch):
    monkeypatch.setattr(metrics_module, "PART_TEXT", "something else")
    assert "something else" in page(TEXT)


@pytest.mark.parametrize("name", STEERING)
def test_what_the_design_names_is_there(name):
    assert ROWS[f"finesteer:{name}"] == STEERING[name]


def test_latencies_are_split_by_steering():
    latencies = {name for name in ROWS if re.search(r"finesteer:.*(latency|time).*_seconds", name)}
    assert len(latencies) >= 8
    assert all("steered" in ROWS[name][1] for name in latencies)


def test_every_row_is_read():
    assert len(ROWS) == table().count("\n") - 1
