"""Profiles that come, are replaced and go while requests run: each request's answer is that of the version it began with."""

from __future__ import annotations

import pytest

from server.engine.native.live_profiles import LiveProfiles
from server.engine.native.runner import Runner
from server.engine.native.sequence import SteeringState
from steering.decision import ProfileActivation
from steering.errors import ProfileError
from tests.engine import answers, asked, carry_out, reference_model, tiny_core
from tests.tiny import layered_profile, tiny_model, tiny_profile

CHANGES = range(1, 12, 3)  # before which step: in every phase of the requests below
OPTIONS = {"max_batched_tokens": 5, "prefix_cache_bytes": 2**20, "live_profiles": True}
BYTES = OPTIONS["prefix_cache_bytes"]


def profile(name="p", layer=1, seed=0, strength=3.0):
    return tiny_profile(reference_model(), layer, name=name, strength=strength, seed=seed)


def under(*profiles):
    return tuple(ProfileActivation(p.name, p.manifest.strength, gate="open", version=p.version) for p in profiles)


def prompt(number, length):
    return [2 + (7 * number + 3 * i) % 200 for i in range(length)]


LENGTHS = (3, 11, 17, 6)


def requests(activations, tag=""):
    """Of several lengths, one unsteered, one with two completions: prefilled in chunks, so that a change meets each stage."""
    made = [asked(f"{tag}{i}", prompt(i, n), *activations, max_tokens=6, n=1 + (i == 1)) for i, n in enumerate(LENGTHS)]
    return [*made, asked(f"{tag}plain", prompt(9, 8), max_tokens=6)]


ALONE = {}


def alone(profiles, asks):
    """Each by itself, in a core that never had other profiles; kept, since many cases ask for the same."""
    key = (*[(p.name, p.version) for p in profiles], asks[0].request_id)
    if key not in ALONE:
        core = tiny_core(profiles, prefix_cache_bytes=0)
        ALONE[key] = {ask.request_id: answers(core, [ask])[ask.request_id] for ask in asks}
    return ALONE[key]


def same(found, wanted, when):
    for name, answer in wanted.items():
        for index in range(len(answer.completions)):
            assert found[name].tokens(index) == answer.tokens(index), (when, name)
            assert found[name].logprobs(index) == pytest.approx(answer.logprobs(index), abs=2e-4), (when, name)
        versions = [[p.version for p in a.decision.profiles] for a in (found[name], answer)]
        assert versions[0] == versions[1], (when, name)


def change_at(before, change, after, step, *, paged=None):
    """Requests under `before`'s profiles, `change(live)` at a step, then requests under `after`'s; all against their own."""
    core = tiny_core(before, paged=paged, **OPTIONS)
    live = LiveProfiles(core, reference_model(), before, BYTES)
    first, second = requests(under(*before), "old-"), requests(under(*after), "new-")
    arrivals = [(i, ask) for i, ask in enumerate(first)] + [(step + i, ask) for i, ask in enumerate(second)]

    def at(now):
        if now == step:
            change(live)
        if live.retired:
            live.sweep()

    found = carry_out(core, arrivals, at) if step else {}
    same(found, alone(before, first) | alone(after, second), step)
    live.sweep()
    return core, live


OLD = profile()
CASES = {
    "replaced at its layer": ([OLD], profile(seed=5), True),
    "replaced at a later layer": ([OLD], profile(layer=2, seed=5), True),
    "replaced at an earlier layer": ([profile(layer=2)], profile(layer=0, seed=5), True),
    "one more below": ([profile(layer=2)], profile("q", layer=0, seed=5), False),
    "one more above": ([OLD], profile("q", layer=3, seed=5), False),
    "one more at the same layer": ([OLD], profile("q", seed=5), False),
    "the first": ([], profile("q", seed=5), False),
    "one of several layers": ([OLD], layered_profile(reference_model(), 0, (1, 3), name="q", strength=2.0), False),
}


@pytest.mark.parametrize("step", CHANGES)
@pytest.mark.parametrize("case", CASES)
def test_a_profile_comes_under_running_requests(case, step):
    before, new, replaces = CASES[case]

    def change(live):
        live.add(new)
        if replaces:
            live.retire("p", before[0].version)

    after = [new] if replaces else [*before, new]
    core, _ = change_at(before, change, after, step)
    acting = {(p.name, layer.layer) for layer in core.runner.sites for p in layer.profiles}
    assert acting == {(p.name, layer) for p in after for layer in p.manifest.layers}, (
        "the old one went with its last request"
    )


@pytest.mark.parametrize("step", CHANGES)
def test_a_profile_goes_under_running_requests(step):
    gone, stays = profile("gone", layer=0, seed=4), profile("p", layer=2)
    core, _ = change_at([gone, stays], lambda live: live.retire("gone", gone.version), [stays], step)
    assert [site.layer for site in core.runner.sites] == [2] and len(core.runner.segments) == 2


def test_the_last_profile_goes():
    core, _ = change_at([OLD], lambda live: live.retire("p", OLD.version), [], 5)
    assert core.runner.sites == [] and len(core.runner.segments) == 1


def test_pages_follow_as_rows_do():
    change_at([OLD], lambda live: live.add(profile("q", layer=3, seed=5)), [OLD], 5, paged=True)


@pytest.mark.parametrize("fault", ["doses", "prefill"])
def test_the_comparison_can_fail(monkeypatch, fault):
    """Without the doses' move a request loses its vector; without beginning again a prompt skips layers."""
    if fault == "doses":
        move = SteeringState.move
        monkeypatch.setattr(SteeringState, "move", lambda self, b, a, d: (move(self, b, a, d), self.doses.reverse()))
    else:
        change_sites = Runner.change_sites
        monkeypatch.setattr(Runner, "change_sites", lambda self, sites, n, groups: change_sites(self, sites, n, []))
    before, new, _ = CASES["one more below"]
    with pytest.raises(Exception):  # noqa: B017 - wrong tokens, or an index that is none
        for step in CHANGES:
            change_at(before, lambda live: live.add(new), [*before, new], step)


def test_a_profile_of_another_model_changes_nothing():
    core = tiny_core([OLD], **OPTIONS)
    live = LiveProfiles(core, reference_model(), [OLD], BYTES)
    sites = list(core.runner.sites)
    other = tiny_profile(tiny_model("qwen3"), 1, name="q")
    with pytest.raises(ProfileError, match="was trained for model"):
        live.add(other)
    assert core.runner.sites == sites and [p.name for p in sites[0].profiles] == ["p"]


def test_memory_for_the_prefix_cache_stays_what_it_was():
    core = tiny_core([OLD], **OPTIONS)
    live = LiveProfiles(core, reference_model(), [OLD], BYTES)

    def held():
        cache = core.runner.prefix_cache
        return sum(store.nbytes for stores in cache._stores for store in stores)

    sizes = [held()]
    for layer in (0, 2, 3):
        live.add(profile(f"q{layer}", layer=layer, seed=layer))
        sizes.append(held())
    assert max(sizes) <= BYTES and min(sizes) > 0.8 * BYTES
