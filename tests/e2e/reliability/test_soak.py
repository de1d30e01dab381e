"""The soak's short form, and proofs that its judgement can fail."""

from __future__ import annotations

import pytest

from tests.e2e.reliability.soak import ALLOWED_GROWTH_MIB, Asked, Said, Sample, Soak, run, slope, table


@pytest.mark.slow
def test_a_minute_of_mixed_traffic():
    soak = run(minutes=1)
    report = table(soak, 1, "pytest tests/e2e/reliability/test_soak.py")
    assert not soak.problems(), report
    for kind in ("streams", "whole answers", "responses", "streams cut by the client", "profiles replaced"):
        assert soak.done[kind] > 5, report


def soaked(*rss_mib: float, descriptors: int = 7) -> Soak:
    last = len(rss_mib) - 1
    return Soak(samples=[Sample(i, rss, 7 if i < last else descriptors, 7) for i, rss in enumerate(rss_mib)])


def test_a_slope_is_that_of_the_line():
    assert slope([0, 1, 2, 3], [5, 7, 9, 11]) == pytest.approx(2)
    assert slope([0, 1, 2], [4, 4, 4]) == pytest.approx(0, abs=1e-9)


def test_what_fills_up_in_the_warm_up_is_no_leak_and_what_goes_on_is():
    full = (100, 180, 199, *[200] * 27)
    assert soaked(*full).problems() == []
    [problem] = soaked(*(rss + 0.6 * i for i, rss in enumerate(full))).problems()
    assert "memory grows by 0.60 MiB a minute" in problem
    assert soaked(100, 140, 150, 155, 180).problems() == [], "too short to tell"
    [problem] = soaked(100, 140, 141, 150, 150 + ALLOWED_GROWTH_MIB).problems()
    assert "74 MiB since the warm-up" in problem  # 140 → 214
    [problem] = soaked(*[200.0] * 8, descriptors=12).problems()
    assert problem == "num_descriptors grew from 7 to 12"


def test_a_wrong_answer_is_noticed():
    right = Said("yes", (("safety", "sha256:1", True),), True)
    soak = soaked(*[200.0] * 4)
    asked = Asked("p", 0)
    soak.alone[asked] = {right}
    soak.judge(asked, right)
    assert soak.problems() == []
    for wrong in (
        Said("no", right.steering, True),
        Said("yes", right.steering, False),
        Said("yes", (("safety", "sha256:2", True),), True),
    ):
        soak.judge(asked, wrong)
    assert len(soak.wrong) == 3 and len(soak.problems()) == 3
