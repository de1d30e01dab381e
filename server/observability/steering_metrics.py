"""The steering half of the metrics: series labelled by profile."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from steering.decision import REASON_PRECEDENCE, ProfileDecision
from steering.manifest import ProfileManifest

PREFIX = "finesteer:"
SOURCES = ("request", "header", "profile")
SKIP_REASONS = tuple(reason for reason in REASON_PRECEDENCE if reason not in ("gate_open", "forced_open"))
UNIT_BUCKETS = tuple(i / 20 for i in range(1, 21))
GATE_BUCKETS = (0.0, 0.001, *UNIT_BUCKETS)
STRENGTH_BUCKETS = (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 15, 20)
DOSE_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 1, 1.5, 2, 5)  # 0.7: an alert's limit
ENTROPY_BUCKETS = (0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 3)


class ProfileFamilies:
    """The metrics that are labelled by profile. `threshold` and `info` are those of loaded profiles; the rest stay for good."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, ("profile", *labels), registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(PREFIX + name, text, ("profile", *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(PREFIX + name, text, ("profile", *labels), buckets=buckets, registry=registry)

        self.evaluations = counter("gate_evaluations", "Decisions made: prompts x active profiles, forced gates too.")
        self.fired = counter("gate_fired", "Decisions with gate > 0.")
        self.gate = histogram("gate_value", "g, per finite decision.", GATE_BUCKETS)
        self.energy_ratio = histogram("energy_ratio", "Subspace energy ratio of the query state.", UNIT_BUCKETS)
        self.calibration_rank = histogram(
            "calibration_rank",
            "Of the gate's calibration queries that open it fully, the share with a lower energy ratio, per decision that "
            "reaches the threshold: evenly spread, with mean 0.5, while traffic is like the calibration.",
            UNIT_BUCKETS,
        )
        self.threshold = gauge(
            "gate_threshold", "What opens the gate fully: an energy ratio, or a cosine gate's cosine."
        )
        self.steered_requests = counter("steered_requests", "Requests that were answered under this profile's vector.")
        self.steered_tokens = counter("steered_tokens", "Tokens delivered under this profile's vector.")
        self.skipped = counter("steering_skipped", "Decisions that changed nothing, by reason.", "reason")
        self.strength = histogram(
            "steer_strength", "Size of the strength in force, by who set it.", STRENGTH_BUCKETS, "source"
        )
        self.relative_norm = histogram("steering_relative_norm", "Dose of applied vectors.", DOSE_BUCKETS)
        self.entropy = histogram("routing_entropy", "Entropy of the routing, in nats.", ENTROPY_BUCKETS)
        self.expert_weight = counter("expert_weight", "Sum of the routing weights of each expert.", "expert")
        self.info = gauge(
            "profile_info", "1 for each loaded profile.", "version", "method", "layer", "positions", "gate_kind"
        )


class ProfileMetrics:
    """One profile's series, looked up once."""

    def __init__(self, family: ProfileFamilies, name: str, manifest: ProfileManifest) -> None:
        self._evaluations = family.evaluations.labels(profile=name)
        self._fired = family.fired.labels(profile=name)
        self._gate = family.gate.labels(profile=name)
        self._energy_ratio = family.energy_ratio.labels(profile=name)
        self._calibration_rank = family.calibration_rank.labels(profile=name)
        self._skipped = {reason: family.skipped.labels(profile=name, reason=reason) for reason in SKIP_REASONS}
        self._strength = {source: family.strength.labels(profile=name, source=source) for source in SOURCES}
        self._relative_norm = family.relative_norm.labels(profile=name)
        self._entropy = family.entropy.labels(profile=name)
        experts = range(manifest.experts.num_prototypes or 0)
        self._expert_weight = [family.expert_weight.labels(profile=name, expert=str(i)) for i in experts]
        self.steered_requests = family.steered_requests.labels(profile=name)
        self.steered_tokens = family.steered_tokens.labels(profile=name)
        self._family, self._name, self._manifest = family, name, manifest

    def show(self) -> None:
        """Say that this version is the one that is loaded."""
        manifest = self._manifest
        if manifest.gate.threshold is not None:
            self._family.threshold.labels(profile=self._name).set(manifest.gate.threshold)
        self._family.info.labels(
            profile=self._name,
            version=manifest.version,
            method=manifest.method,
            layer=manifest.layer,
            positions=manifest.positions,
            gate_kind=manifest.gate.kind,
        ).set(1)

    def decided(self, decision: ProfileDecision) -> None:
        """Count one decision of this profile."""
        self._evaluations.inc()
        if decision.fired:
            self._fired.inc()
        self._strength[decision.strength_source].observe(abs(decision.strength))
        if decision.applied:
            self._relative_norm.observe(decision.relative_norm)
        else:
            self._skipped[decision.reason].inc()
        if decision.reason == "non_finite":  # a single NaN would make a sum NaN for good
            return
        self._gate.observe(decision.gate)
        if decision.energy_ratio is not None:
            self._energy_ratio.observe(decision.energy_ratio)
        if decision.calibration_rank is not None:
            self._calibration_rank.observe(decision.calibration_rank)
        if decision.routing is not None:
            self._entropy.observe(-sum(weight * math.log(weight) for weight in decision.routing if weight > 0))
            for series, weight in zip(self._expert_weight, decision.routing, strict=True):
                series.inc(weight)
