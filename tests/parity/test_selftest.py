"""The start-up proof: a profile that steers is served, whatever it makes of the probe; one that cannot is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from server.engine.native import selftest
from server.engine.native.selftest import LENGTH, check_steering
from steering.errors import ProfileError
from steering.experts import LinearMap
from tests.engine import reference_model, tiny_decoder
from tests.tiny import PROFILES


def check(profile) -> None:
    check_steering(tiny_decoder(), reference_model(), [profile])


@torch.no_grad()
def nearly_blind(leak: float, size: float = 1.0):
    """An AlphaSteer profile whose map keeps a share `leak` of the probe's state and all of what is orthogonal to it."""
    profile = PROFILES["alphasteer"](reference_model(), 1, name="p", strength=1.0)
    probe = torch.arange(1, LENGTH + 1)[None, :5]
    state = reference_model()(input_ids=probe, output_hidden_states=True).hidden_states[2][0, -1]
    unit = state / state.norm()
    right = profile.experts.right
    right = right - (1 - leak) * (right @ unit)[:, None] * unit
    return replace(profile, experts=LinearMap(size * profile.experts.left, right))


@pytest.mark.parametrize("made", PROFILES)
def test_every_kind_of_profile_passes(made):
    check(PROFILES[made](reference_model(), 1, name="p", strength=3.0))


def test_a_map_that_makes_next_to_nothing_of_the_probe_passes(monkeypatch):
    profile = nearly_blind(1e-7, size=1e-3)
    check(profile)
    monkeypatch.setattr(selftest, "_raised_strength", lambda core, profile, alone: None)
    with pytest.raises(ProfileError, match="it changes nothing"):  # judged by the probe alone
        check(profile)


@pytest.mark.parametrize("made", ["alphasteer", "blind"])
def test_a_map_too_small_to_steer_anything_is_refused(made):
    profile = nearly_blind(1.0 if made == "alphasteer" else 1e-3, size=1e-12)
    with pytest.raises(ProfileError, match="it changes nothing"):
        check(profile)


@pytest.mark.parametrize(("layer", "said"), [(1, "'p, layer 1'"), (2, "'p, layer 2'"), (3, "'p, layer 3'")])
def test_every_layer_of_a_profile_must_arrive(layer, said):
    """Each alone: together the others would hide the one that does nothing."""
    profile = PROFILES["layered"](reference_model(), 1, name="p", strength=3.0)
    profile.experts.vectors[layer - 1] = 0
    with pytest.raises(ProfileError, match=f"{said} does not steer .* it changes nothing"):
        check(profile)


def test_a_layer_that_is_weak_by_itself_passes(monkeypatch):
    profile = PROFILES["layered"](reference_model(), 1, name="p", strength=3.0)
    profile.experts.vectors[1] *= 1e-12
    check(profile)
    monkeypatch.setattr(selftest, "_raised_strength", lambda core, profile, alone: None)
    with pytest.raises(ProfileError, match=r"'p, layer 2' .* it changes nothing"):
        check(profile)


def test_a_map_of_zeros_is_refused():
    with pytest.raises(ProfileError, match="it changes nothing"):
        check(nearly_blind(1.0, size=0.0))
