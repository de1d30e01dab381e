"""What the metrics must show after some requests, added up from their answers alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pytest

from tests.serving import samples

# Their values are times, or of this moment, or no answer shows them (test_lifecycle counts the calibration ranks): how often they are observed can be foretold, what is observed cannot.
TIMES = ("_seconds_sum",)
MOMENTARY = (
    "_created",
    "_bucket",
    "num_requests_",
    "kv_cache_",
    "prefix_cache_",
    "num_preemptions",
    "gate_threshold",
    "calibration_rank",
)
Series = tuple[str, frozenset]


def exact(metrics_text: str) -> dict[Series, float]:
    """Every sample that requests and answers determine."""
    return {
        key: value
        for key, value in samples(metrics_text).items()
        if not key[0].endswith((*TIMES, *MOMENTARY)) and not key[0].startswith(MOMENTARY)
    }


class Ledger:
    """Expected growth of every counter and of every histogram's count and sum."""

    def __init__(self) -> None:
        self._expected: dict[Series, float] = defaultdict(float)

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        self._expected[name, frozenset(labels.items())] += amount

    def observe(self, name: str, value: float | None = None, **labels: str) -> None:
        """`value`: None for a time."""
        self.add(f"{name}_count", **labels)
        if value is not None:
            self.add(f"{name}_sum", value, **labels)

    def check(self, before: str, after: str) -> None:
        """Hold two texts of `/metrics` against it: what it expects has grown by so much, and nothing else has changed."""
        old, new = exact(before), exact(after)
        assert set(new) >= set(self._expected), set(self._expected) - set(new)
        grown = {key: value - old.get(key, 0.0) for key, value in new.items()}
        assert not any(math.isnan(value) for value in new.values())
        wrong = {
            key: (growth, self._expected.get(key, 0.0))
            for key, growth in grown.items()
            if growth != pytest.approx(self._expected.get(key, 0.0), rel=1e-4, abs=1e-4)
        }
        assert not wrong, "grown, expected:\n" + "\n".join(f"{key}: {value}" for key, value in sorted(wrong.items()))

    # -- what one request means ------------------------------------------------------------------------------------------

    def http(self, path: str, status: str = "2xx") -> None:
        self.add("http_requests_total", path=path, status=status)

    def answer(self, answer: Mapping[str, Any], *, max_tokens: int, skipped: Mapping[str, str] | None = None) -> None:
        """A whole answer with full metadata, whose completions are all as long as each other.

        Args:
            skipped: why a profile changed nothing, by name; those that are not named changed the numbers.
        """
        usage, finish = answer["usage"], [choice["finish_reason"] for choice in answer["choices"]]
        self.decided(answer["steering"], skipped or {})
        self.generated(
            usage["prompt_tokens"],
            [usage["completion_tokens"] // len(finish)] * len(finish),
            finish,
            answer["steering"],
            max_tokens=max_tokens,
            skipped=skipped or {},
        )

    def decided(self, steering: Mapping[str, Any], skipped: Mapping[str, str]) -> None:
        """A decision: `steering` as a response shows it in full."""
        if not steering["profiles"]:
            self.add("steering_skipped_total", profile="", reason=steering["reason"])
            return
        self.observe("steering_compute_seconds")
        for shown in steering["profiles"]:
            name = shown["name"]
            self.add("gate_evaluations_total", profile=name)
            self.add("gate_fired_total", float(shown["fired"]), profile=name)
            self.observe("steer_strength", abs(shown["strength"]), profile=name, source=shown["strength_source"])
            if name in skipped:
                self.add("steering_skipped_total", profile=name, reason=skipped[name])
            else:
                self.observe("steering_relative_norm", shown["relative_norm"], profile=name)
            if skipped.get(name) == "non_finite":
                continue
            self.observe("gate_value", shown["gate"], profile=name)
            self.observe("energy_ratio", shown["energy_ratio"], profile=name)
            self.observe("routing_entropy", -sum(w * math.log(w) for w in shown["routing"] if w > 0), profile=name)
            for expert, weight in enumerate(shown["routing"]):
                self.add("expert_weight_total", weight, profile=name, expert=str(expert))

    def generated(
        self,
        prompt_tokens: int,
        lengths: list[int],
        finish: list[str],
        steering: Mapping[str, Any],
        *,
        max_tokens: int,
        skipped: Mapping[str, str],
    ) -> None:
        """A prompt that got at least one token; `lengths` and `finish` of its completions."""
        steered = {"steered": str(steering["applied"]).lower()}
        tokens = sum(lengths)
        for shown in steering["profiles"]:
            if shown["name"] not in skipped:
                self.add("steered_requests_total", profile=shown["name"])
                self.add("steered_tokens_total", tokens, profile=shown["name"])
        self.add("prompt_tokens_total", prompt_tokens)
        self.add("generation_tokens_total", tokens)
        for reason in finish:
            self.add("request_success_total", finished_reason=reason)
        for name in (
            "time_to_first_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_inference_time_seconds",
            "request_decode_time_seconds",
        ):
            self.observe(name, **steered)
        gaps = sum(length - 1 for length in lengths if length)
        self.add("inter_token_latency_seconds_count", gaps, **steered)
        if tokens > len(lengths):
            self.observe("request_time_per_output_token_seconds", **steered)
        self.observe("request_prompt_tokens", prompt_tokens)
        self.observe("request_generation_tokens", tokens)
        self.observe("request_max_num_generation_tokens", max(lengths))
        self.observe("request_params_n", len(lengths))
        self.observe("request_params_max_tokens", max_tokens)
