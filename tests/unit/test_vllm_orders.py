"""Orders and reports cross vLLM's processes as plain data, and come out as they went in."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from server.engine.vllm.orders import KEY, Addition, Order, Report
from server.engine.vllm.settings import PluginSettings
from steering.decision import ProfileActivation, SteeringOptions, decide_profile

ACTIVATIONS = (
    ProfileActivation("a", -1.5, "request", "open", "last", True, "sha256:1"),
    ProfileActivation("ü", 1e-7, version="sha256:2"),
)
ORDERS = {
    "read": Order(read=(1, 12)),
    "add": Order(add=(Addition(3, None, bytes(range(256))), Addition(4, b"", b"\0"))),
    "both": Order((2,), (Addition(1, b"p", b"a"),)),
    "decide": Order(decide=SteeringOptions(ACTIVATIONS, opted_out=False)),
    "decide, opted out": Order(decide=SteeringOptions(opted_out=True)),
}


def told(**options):
    numbers = {"version": "v", "method": "finesteer", "layer": 1, "gate": 0.1, "vector_norm": 1 / 3, "state_norm": 2.0}
    return decide_profile(ACTIVATIONS[1], **numbers | options)


REPORTS = {
    "nothing": Report({}, ()),
    "states": Report({1: b"\0\xff", 12: b""}, (1, 12)),
    "decided": Report({}, (1,), ((told(), told(routing=(0.25, 0.75), energy_ratio=0.1, residual_norm=2.0)), 1.25)),
    "not finite": Report({}, (), ((told(gate=float("nan")),), 0.0)),
    "decided of none": Report({}, (), ((), 0.0)),
}


def carried(data):
    """By msgpack or pickle: no type of ours, and tuples may come out as lists."""

    def plain(value):
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)
            return {key: plain(item) for key, item in value.items()}
        assert value is None or type(value) in (int, float, str, bytes, bool), type(value)
        return value

    return pickle.loads(pickle.dumps(plain(data)))


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_orders(order):
    found = Order.from_args(carried(order.to_args()) | {"another's": 1})
    assert found == order and hash(found) == hash(order)


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_reports(report):
    assert Report.from_params(carried(report.to_params())) == report


@pytest.mark.parametrize("absent", [None, {}, {"another's": 1}, {KEY: None}])
def test_where_there_is_none(absent):
    assert Order.from_args(absent) is None and Report.from_params(absent) is None


def test_an_order_of_nothing_is_an_order():
    """Its request is reported, and so proves that the plugin is there."""
    assert Order.from_args(Order().to_args()) == Order()


def test_settings():
    settings = PluginSettings((1, 3), {"a": "folder"}, {"a": "sha256:1"})
    assert PluginSettings.from_config(carried(settings.to_config()) | {"another's": 1}) == settings
    assert settings.one_pass and not replace(settings, profiles={}).one_pass
    for config in (None, {}, {"another's": 1}, "text"):
        assert PluginSettings.from_config(config) is None
