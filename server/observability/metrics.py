"""Prometheus metrics: a generic half under vLLM's names (`finesteer:` for `vllm:`), and a steering half by profile.

Every series exists from start-up; label values come from configuration, never from a request.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily

from server.engine.base import PREFIX_CACHE_PARTS, Engine, GenerationRequest
from server.steering_options import OVERRIDE_KINDS
from steering.decision import REASON_PRECEDENCE, ProfileDecision, SteeringDecision
from steering.manifest import ProfileManifest

PREFIX = "finesteer:"
SOURCES = ("request", "header", "profile")
FINISHED_REASONS = ("stop", "length", "abort", "error")
SKIP_REASONS = tuple(reason for reason in REASON_PRECEDENCE if reason not in ("gate_open", "forced_open"))

PART_TEXT = "lower: layers up to the first site, keyed by tokens; upper: those above, keyed by tokens and vector."

# vLLM's buckets, so that its dashboards and alerts keep their meaning.
FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)  # fmt: skip
INTER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)  # fmt: skip
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)  # fmt: skip
UNIT_BUCKETS = tuple(i / 20 for i in range(1, 21))
GATE_BUCKETS = (0.0, 0.001, *UNIT_BUCKETS)
STRENGTH_BUCKETS = (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 15, 20)
DOSE_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 1, 1.5, 2, 5)  # 0.7: an alert's limit
ENTROPY_BUCKETS = (0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 3)
COMPUTE_BUCKETS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1)


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, … up to `limit`: vLLM's token-count buckets."""
    values = (m * 10**e for e in range(len(str(limit)) + 1) for m in (1, 2, 5))
    return tuple(value for value in values if value <= limit)


class Metrics:
    """All of one server's metrics, in a registry of its own. An `EngineObserver`: safe from the engine's thread.

    Construct it before the engine (which wants an observer), then `attach` the engine, then serve.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = {"model_name": model_name, "engine": "0"}
        self._profiles: dict[tuple[str, str], _ProfileMetrics] = {}  # by name and version
        ProcessCollector(registry=self.registry)

    def attach(self, engine: Engine) -> None:
        """Make every series that this engine and its profiles can have. Call once."""
        labels = tuple(self._model)
        gauges = (
            ("num_requests_running", "Completions that hold a row of the batch.", lambda: engine.stats().num_running),
            ("num_requests_waiting", "Requests in the queue.", lambda: engine.stats().num_waiting),
            ("kv_cache_usage_perc", "Share of the KV memory in use, 0 to 1.", lambda: engine.stats().kv_cache_usage),
            (
                "prefix_cache_usage_perc",
                "Share of the prefix cache that holds something, 0 to 1.",
                lambda: engine.stats().prefix_cache_usage,
            ),
        )
        for name, text, read in gauges:
            self._gauge(name, text, labels).labels(**self._model).set_function(read)
        for name, size in (
            ("kv_cache_bytes", engine.info.kv_cache_bytes),
            ("prefix_cache_bytes", engine.info.prefix_cache_bytes),
        ):
            self._gauge(name, "Memory set apart, in bytes.", labels).labels(**self._model).set(size)
        self.registry.register(_EngineCounters(engine, self._model))
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens prefilled.", labels).labels(**self._model)
        self._generation_tokens = self._counter("generation_tokens", "Tokens delivered.", labels).labels(**self._model)
        success = self._counter("request_success", "Completions ended, by reason.", (*labels, "finished_reason"))
        self._ended = {r: success.labels(**self._model, finished_reason=r) for r in FINISHED_REASONS}
        self._attach_latencies(labels)
        lengths = one_two_five(engine.info.max_model_len)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", lengths)
        self._completion_length = self._histogram("request_generation_tokens", "Tokens a request was given.", lengths)
        self._max_tokens = self._histogram("request_params_max_tokens", "The limit a request ran under.", lengths)
        self._n = self._histogram("request_params_n", "Completions asked for.", (1, 2, 5, 10, 20))
        self._attach_steering(engine.profiles)

    def _attach_latencies(self, labels: tuple[str, ...]) -> None:
        split = (*labels, "steered")

        def latency(name: str, text: str, buckets: tuple[float, ...]) -> dict[bool, Histogram]:
            metric = Histogram(PREFIX + name, text, split, buckets=buckets, registry=self.registry)
            return {steered: metric.labels(**self._model, steered=str(steered).lower()) for steered in (False, True)}

        self._first_token_s = latency("time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_BUCKETS)
        self._inter_token_s = latency("inter_token_latency_seconds", "Between tokens.", INTER_TOKEN_BUCKETS)
        self._request_s = latency("e2e_request_latency_seconds", "Arrival to end.", REQUEST_BUCKETS)
        self._decode_s = latency("request_decode_time_seconds", "First token to end.", REQUEST_BUCKETS)
        self._per_token_s = latency(
            "request_time_per_output_token_seconds", "A request's mean time per token.", INTER_TOKEN_BUCKETS
        )

    def _attach_steering(self, manifests: Mapping[str, ProfileManifest]) -> None:
        self._families = family = _ProfileFamilies(self.registry)
        for manifest in manifests.values():
            self.add_profile(manifest)
        self.show_profiles(manifests)
        self._unprofiled = {
            reason: family.skipped.labels(profile="", reason=reason) for reason in ("opted_out", "no_profile")
        }
        overrides = self._counter("steering_overrides", "Requests that set a steering option, by kind.", ("kind",))
        self._overrides = {kind: overrides.labels(kind=kind) for kind in OVERRIDE_KINDS}
        self._compute = Histogram(
            PREFIX + "steering_compute_seconds",
            "Gates and vectors, in the step that decided.",
            buckets=COMPUTE_BUCKETS,
            registry=self.registry,
        )

    def add_profile(self, manifest: ProfileManifest) -> None:
        """Make the series of a profile, before any request can be under it."""
        key = manifest.name, manifest.version
        if key not in self._profiles:
            self._profiles[key] = _ProfileMetrics(self._families, manifest.name, manifest)

    def show_profiles(self, manifests: Mapping[str, ProfileManifest]) -> None:
        """Tell which profiles are loaded now, all of them added before. Counts of those that went stay: requests under way
        still add to them."""
        self._families.info.clear()
        for manifest in manifests.values():
            self._profiles[manifest.name, manifest.version].show()

    def render(self) -> bytes:
        """The text of `/metrics`."""
        return generate_latest(self.registry)

    def decided(self, decision: SteeringDecision) -> None:
        """A prompt's decision was made (also where its client has gone). Called on the engine's thread."""
        if not decision.profiles:
            self._unprofiled["opted_out" if decision.reason == "opted_out" else "no_profile"].inc()
            return
        self._compute.observe(decision.compute_ms / 1000)
        for profile in decision.profiles:
            self._profiles[profile.name, profile.version].decided(profile)

    def overridden(self, kinds: frozenset[str]) -> None:
        """A request set these kinds of steering option."""
        for kind in kinds:
            self._overrides[kind].inc()

    def first_token(self, decision: SteeringDecision, seconds: float, num_prompt_tokens: int) -> None:
        """A request's first token arrived."""
        self._first_token_s[decision.applied].observe(seconds)
        self._prompt_tokens.inc(num_prompt_tokens)
        for profile in decision.profiles:
            if profile.applied:
                self._profiles[profile.name, profile.version].steered_requests.inc()

    def token(self, decision: SteeringDecision, gap_s: float | None) -> None:
        """A token was delivered, `gap_s` after the same completion's last one."""
        self._generation_tokens.inc()
        if gap_s is not None:
            self._inter_token_s[decision.applied].observe(gap_s)
        for profile in decision.profiles:
            if profile.applied:
                self._profiles[profile.name, profile.version].steered_tokens.inc()

    def completion_ended(self, reason: str) -> None:
        """One of a request's completions ended."""
        self._ended[reason].inc()

    def request_ended(
        self,
        request: GenerationRequest,
        decision: SteeringDecision,
        *,
        completion_tokens: int,
        total_s: float,
        decode_s: float,
    ) -> None:
        """A request that had been prefilled ended, well or not."""
        self._n.observe(request.n)
        self._max_tokens.observe(request.sampling.max_tokens)
        self._prompt_length.observe(len(request.prompt_token_ids))
        self._completion_length.observe(completion_tokens)
        self._request_s[decision.applied].observe(total_s)
        self._decode_s[decision.applied].observe(decode_s)
        if completion_tokens > request.n:
            self._per_token_s[decision.applied].observe(decode_s * request.n / (completion_tokens - request.n))

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...]) -> Gauge:
        return Gauge(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(PREFIX + name, text, tuple(self._model), buckets=buckets, registry=self.registry)
        return metric.labels(**self._model)


class _EngineCounters:
    """Counters that the engine keeps itself, read when they are asked for."""

    def __init__(self, engine: Engine, model: Mapping[str, str]) -> None:
        self._engine = engine
        self._model = model

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The families, for the registry."""
        stats, labels = self._engine.stats(), list(self._model)
        values = list(self._model.values())
        preemptions = CounterMetricFamily(
            PREFIX + "num_preemptions", "Sequences sent back to the queue for want of KV memory.", labels=labels
        )
        preemptions.add_metric(values, stats.num_preemptions)
        yield preemptions
        for name, text, counts in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits),
        ):
            family = CounterMetricFamily(PREFIX + name, text + " " + PART_TEXT, labels=[*labels, "layers"])
            for part, count in zip(PREFIX_CACHE_PARTS, counts, strict=True):
                family.add_metric([*values, part], count)
            yield family


class _ProfileFamilies:
    """The metrics that are labelled by profile."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, text, ("profile", *labels), registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(PREFIX + name, text, ("profile", *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(PREFIX + name, text, ("profile", *labels), buckets=buckets, registry=registry)

        self.evaluations = counter("gate_evaluations", "Decisions made: prompts x active profiles, forced gates too.")
        self.fired = counter("gate_fired", "Decisions with gate > 0.")
        self.gate = histogram("gate_value", "g, per decision.", GATE_BUCKETS)
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
        self.steered_requests = counter("steered_requests", "Requests whose numbers this profile changed.")
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


class _ProfileMetrics:
    """One profile's series, looked up once."""

    def __init__(self, family: _ProfileFamilies, name: str, manifest: ProfileManifest) -> None:
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
        self._gate.observe(decision.gate)
        self._strength[decision.strength_source].observe(abs(decision.strength))
        if decision.energy_ratio is not None:
            self._energy_ratio.observe(decision.energy_ratio)
        if decision.calibration_rank is not None:
            self._calibration_rank.observe(decision.calibration_rank)
        if decision.applied:
            self._relative_norm.observe(decision.relative_norm)
        else:
            self._skipped[decision.reason].inc()
        if decision.routing is not None:
            self._entropy.observe(-sum(weight * math.log(weight) for weight in decision.routing if weight > 0))
            for series, weight in zip(self._expert_weight, decision.routing, strict=True):
                series.inc(weight)
