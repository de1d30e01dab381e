"""Who wins: body, header, alias or default; and what the operator's policy lets through. Pure, by tables."""

from __future__ import annotations

import pytest

from server.errors import ApiError, ForbiddenError, InvalidRequestError
from server.steering_options import SteeringHeaders, SteeringPolicy, alias_profiles, aliases, resolve
from server.wire.steering import SteeringFields
from steering.manifest import ExpertsManifest, GateManifest, ModelReference, ProfileManifest


def manifest(name, strength=3.0, positions="all"):
    reference = ModelReference("m", "0", 8, 4, "float32")
    gate, experts = GateManifest("always"), ExpertsManifest("constant")
    return ProfileManifest(name, "caa", reference, 1, positions, strength, gate, experts, "0")


LOADED = {"a": manifest("a"), "b": manifest("b", -2.0, "last")}


def settle(*, headers=None, alias=None, policy=None, **fields):
    return resolve(
        SteeringFields(**fields), SteeringHeaders(**(headers or {})), alias, LOADED, policy or SteeringPolicy()
    )


def active(resolved):
    return [(x.profile, x.strength, x.strength_source) for x in resolved.options.activations]


DEFAULT = [("a", 3.0, "profile"), ("b", -2.0, "profile")]


@pytest.mark.parametrize(
    ("asked", "expected", "kinds"),
    [
        ({}, DEFAULT, set()),
        ({"steer_profiles": None, "steer_strength": None, "steer_gate": None}, DEFAULT, set()),
        ({"steer_profiles": ["b", "a"]}, DEFAULT, {"profiles"}),
        ({"steer_profiles": ["b"]}, DEFAULT[1:], {"profiles"}),
        ({"steer_profiles": []}, [], {"opt_out"}),
        ({"alias": ()}, [], {"opt_out"}),
        ({"alias": ("b",)}, DEFAULT[1:], {"profiles"}),
        ({"headers": {"profiles": " b , "}}, DEFAULT[1:], {"profiles"}),
        ({"headers": {"profiles": ""}, "alias": ("b",)}, [], {"opt_out"}),
        ({"headers": {"profiles": ""}, "steer_profiles": ["a"]}, DEFAULT[:1], {"profiles"}),
        ({"steer_strength": 1}, [("a", 1.0, "request"), ("b", 1.0, "request")], {"strength"}),
        ({"steer_strength": {"b": 1}}, [DEFAULT[0], ("b", 1.0, "request")], {"strength"}),
        ({"headers": {"strength": "1"}}, [("a", 1.0, "header"), ("b", 1.0, "header")], {"strength"}),
        (
            {"headers": {"strength": "a=1, b=4"}, "steer_strength": {"b": 5}},
            [("a", 1.0, "header"), ("b", 5.0, "request")],
            {"strength"},
        ),
        ({"headers": {"strength": "4"}, "steer_profiles": []}, [], {"opt_out"}),
        ({"headers": {"strength": "b=4"}, "steer_profiles": ["a"]}, DEFAULT[:1], {"profiles"}),
        ({"steer_strength": 0, "steer_profiles": []}, [], {"opt_out"}),
        ({"steer_strength": {}}, DEFAULT, set()),
    ],
)
def test_precedence(asked, expected, kinds):
    resolved = settle(**asked)
    assert active(resolved) == expected
    assert resolved.overrides == kinds
    assert resolved.options.opted_out is (not expected)


def test_gate_positions_and_mode():
    resolved = settle(policy=SteeringPolicy(modes={"b": "shadow"}))
    assert [(x.gate, x.positions, x.shadow) for x in resolved.options.activations] == [
        ("auto", "all", False),
        ("auto", "last", True),
    ]
    resolved = settle(steer_gate="open", steer_positions="last")
    assert [(x.gate, x.positions) for x in resolved.options.activations] == [("open", "last")] * 2
    assert resolved.overrides == {"gate", "positions"}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"steer_profiles": ["c"]}, "steer_profiles"),
        ({"steer_profiles": ["a", "a"]}, "steer_profiles"),
        ({"steer_strength": {"c": 1}}, "steer_strength"),
        ({"steer_strength": {"b": 1}, "steer_profiles": ["a"]}, "steer_strength"),
        ({"steer_strength": 1, "alias": ()}, "steer_strength"),
        ({"steer_strength": 20.1}, "steer_strength"),
        ({"steer_strength": -20.1}, "steer_strength"),
        ({"steer_strength": 20.1, "steer_profiles": []}, "steer_strength"),
        ({"steer_gate": "open", "steer_profiles": []}, "steer_gate"),
        ({"headers": {"strength": "x"}}, "X-FineSteer-Strength"),
        ({"headers": {"strength": ""}}, "X-FineSteer-Strength"),
        ({"headers": {"strength": "a="}}, "X-FineSteer-Strength"),
        ({"headers": {"strength": "inf"}}, "X-FineSteer-Strength"),
        ({"headers": {"strength": "21"}, "steer_strength": 1}, "X-FineSteer-Strength"),
        ({"headers": {"strength": "1"}, "alias": ()}, "X-FineSteer-Strength"),
        ({"headers": {"profiles": "c"}}, "X-FineSteer-Profiles"),
        ({"headers": {"profiles": "a,a"}}, "X-FineSteer-Profiles"),
    ],
)
def test_contradictions_are_refused_by_name(asked, param):
    with pytest.raises(InvalidRequestError) as caught:
        settle(**asked)
    assert (caught.value.param, caught.value.status) == (param, 400)


# Profile a: λ = 3 by default, positions all. Profile b: λ = −2, so raising means going below −2; positions last.
@pytest.mark.parametrize(
    ("asked", "raise_only", "none"),
    [
        ({}, True, True),
        ({"steer_strength": {"a": 3, "b": -2}}, True, True),
        ({"steer_strength": {"a": 3.5}}, True, False),
        ({"steer_strength": {"a": 2.9}}, False, False),
        ({"steer_strength": {"a": -4}}, False, False),
        ({"steer_strength": {"b": -2.5}}, True, False),
        ({"steer_strength": {"b": -1}}, False, False),
        ({"steer_strength": {"b": 4}}, False, False),
        ({"headers": {"strength": "a=2"}}, False, False),
        ({"steer_profiles": ["a"]}, False, False),
        ({"steer_profiles": ["a", "b"]}, True, True),
        ({"steer_profiles": []}, False, False),
        ({"alias": ()}, False, False),
        ({"alias": ("a",)}, False, False),
        ({"headers": {"profiles": "b"}}, False, False),
        ({"steer_gate": "auto"}, True, True),
        ({"steer_gate": "open"}, True, False),
        ({"steer_gate": "closed"}, False, False),
        ({"steer_positions": "all"}, True, False),
        ({"steer_positions": "last"}, False, False),
    ],
)
def test_locks(asked, raise_only, none):
    for override, allowed in (("any", True), ("raise_only", raise_only), ("none", none)):
        policy = SteeringPolicy(overrides={"a": override, "b": override})
        if allowed:
            settle(policy=policy, **asked)
            continue
        with pytest.raises(ForbiddenError) as caught:
            settle(policy=policy, **asked)
        assert (caught.value.code, caught.value.status) == ("steering_locked", 403)
        assert caught.value.param


def test_a_lock_binds_its_own_profile_only():
    policy = SteeringPolicy(overrides={"a": "none"})
    assert active(settle(policy=policy, steer_strength={"b": 7})) == [DEFAULT[0], ("b", 7.0, "request")]
    assert active(settle(policy=policy, steer_profiles=["a"])) == DEFAULT[:1]
    with pytest.raises(ForbiddenError, match="'a'"):
        settle(policy=policy, steer_strength=7)


@pytest.mark.parametrize(
    ("cap", "asked", "level"),
    [
        ("full", None, "summary"),
        ("full", "full", "full"),
        ("full", "none", "none"),
        ("summary", None, "summary"),
        ("summary", "full", None),
        ("none", None, "none"),
        ("none", "summary", None),
        ("none", "none", "none"),
    ],
)
def test_metadata_cap(cap, asked, level):
    policy = SteeringPolicy(metadata_cap=cap)
    if level is None:
        with pytest.raises(ApiError) as caught:
            settle(policy=policy, steer_metadata=asked)
        assert (caught.value.status, caught.value.param) == (403, "steer_metadata")
    else:
        assert settle(policy=policy, steer_metadata=asked).metadata == level


def test_aliases():
    assert alias_profiles("m", "m", LOADED) is None
    assert alias_profiles("m:unsteered", "m", LOADED) == ()
    assert alias_profiles("m:b", "m", LOADED) == ("b",)
    assert alias_profiles("org/m:8b:a", "org/m:8b", LOADED) == ("a",)
    for unknown in ("x", "m:", "m:c", "m:a:b", "M", ":a"):
        with pytest.raises(KeyError):
            alias_profiles(unknown, "m", LOADED)


def test_aliases_that_a_lock_forbids_are_not_offered():
    assert aliases("m", LOADED, SteeringPolicy()) == {"m": ("a", "b"), "m:unsteered": (), "m:a": ("a",), "m:b": ("b",)}
    assert list(aliases("m", LOADED, SteeringPolicy(overrides={"a": "none"}))) == ["m", "m:a"]
    assert list(aliases("m", LOADED, SteeringPolicy(overrides={"a": "none", "b": "raise_only"}))) == ["m"]
