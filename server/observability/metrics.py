"""Prometheus metrics: a generic half under vLLM's names (`finesteer:` for `vllm:`), and a steering half by profile.

Every series exists from start-up; label values come from configuration, never from a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily

from server.engine.base import PREFIX_CACHE_PARTS, Engine, GenerationRequest
from server.observability.audit import AuditLog
from server.observability.steering_metrics import PREFIX, ProfileFamilies, ProfileMetrics
from server.observability.vllm_names import VllmNames
from server.steering_options import OVERRIDE_KINDS
from steering.decision import SteeringDecision
from steering.manifest import ProfileManifest

FINISHED_REASONS = ("stop", "length", "abort", "error")
STATUS_CLASSES = ("2xx", "3xx", "4xx", "5xx")
OTHER_PATHS = "other"
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
        self._compatible = CollectorRegistry()  # the same under other names
        self._model = {"model_name": model_name, "engine": "0"}
        self._profiles: dict[tuple[str, str], ProfileMetrics] = {}  # by name and version
        ProcessCollector(registry=self.registry)

    def attach(self, engine: Engine, paths: Iterable[str] = (), audit: AuditLog | None = None) -> None:
        """Make every series that this engine, its profiles and the server's `paths` can have. Call once."""
        labels = tuple(self._model)
        http = self._counter("http_requests", "Requests ended, by route and class of status.", ("path", "status"))
        self._http = {
            (path, status): http.labels(path=path, status=status)
            for path in (*paths, OTHER_PATHS)
            for status in STATUS_CLASSES
        }
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
        self.registry.register(_AuditCounters(audit))
        self._prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens of requests that got a token.", labels
        ).labels(**self._model)
        self._generation_tokens = self._counter("generation_tokens", "Tokens delivered.", labels).labels(**self._model)
        success = self._counter(
            "request_success",
            "Completions ended, by reason; error: also those refused by a full queue.",
            (*labels, "finished_reason"),
        )
        self._ended = {r: success.labels(**self._model, finished_reason=r) for r in FINISHED_REASONS}
        self._attach_latencies(labels)
        lengths = one_two_five(engine.info.max_model_len)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", lengths)
        self._completion_length = self._histogram("request_generation_tokens", "Tokens a request was given.", lengths)
        self._longest = self._histogram(
            "request_max_num_generation_tokens", "Of a request's longest completion.", lengths
        )
        self._max_tokens = self._histogram("request_params_max_tokens", "The limit a request ran under.", lengths)
        self._n = self._histogram(
            "request_params_n", "Completions run for a request: its n, or best_of.", (1, 2, 5, 10, 20)
        )
        self._attach_steering(engine.profiles)

    def _attach_latencies(self, labels: tuple[str, ...]) -> None:
        split = (*labels, "steered")

        def latency(name: str, text: str, buckets: tuple[float, ...]) -> dict[bool, Histogram]:
            metric = Histogram(PREFIX + name, text, split, buckets=buckets, registry=self.registry)
            return {steered: metric.labels(**self._model, steered=str(steered).lower()) for steered in (False, True)}

        self._first_token_s = latency("time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_BUCKETS)
        self._inter_token_s = latency("inter_token_latency_seconds", "Between tokens.", INTER_TOKEN_BUCKETS)
        self._request_s = latency("e2e_request_latency_seconds", "Arrival to end.", REQUEST_BUCKETS)
        self._queue_s = latency("request_queue_time_seconds", "Arrival to a row of the batch.", REQUEST_BUCKETS)
        self._prefill_s = latency("request_prefill_time_seconds", "A row to first token.", REQUEST_BUCKETS)
        self._inference_s = latency("request_inference_time_seconds", "A row to end.", REQUEST_BUCKETS)
        self._decode_s = latency("request_decode_time_seconds", "First token to end.", REQUEST_BUCKETS)
        self._per_token_s = latency(
            "request_time_per_output_token_seconds", "A request's mean time per token.", INTER_TOKEN_BUCKETS
        )

    def _attach_steering(self, manifests: Mapping[str, ProfileManifest]) -> None:
        self._families = family = ProfileFamilies(self.registry)
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
            self._profiles[key] = ProfileMetrics(self._families, manifest.name, manifest)

    def show_profiles(self, manifests: Mapping[str, ProfileManifest]) -> None:
        """Tell which profiles are loaded now, all of them added before. Counts of those that went stay: requests under way
        still add to them."""
        self._families.info.clear()
        self._families.threshold.clear()
        for manifest in manifests.values():
            self._profiles[manifest.name, manifest.version].show()

    def add_vllm_names(self) -> None:
        """Have the generic half under vLLM's names, too."""
        self._compatible.register(VllmNames(self.registry))

    def render(self) -> bytes:
        """The text of `/metrics`."""
        return generate_latest(self.registry) + generate_latest(self._compatible)

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

    def answered(self, path: str | None, status: int) -> None:
        """A request came to its end. `path`: its route's, as given to `attach`; None for any other."""
        self._http[path or OTHER_PATHS, f"{status // 100}xx"].inc()

    def completion_ended(self, reason: str) -> None:
        """One of a request's completions ended."""
        self._ended[reason].inc()

    def request_ended(
        self,
        request: GenerationRequest,
        decision: SteeringDecision,
        *,
        completion_lengths: Sequence[int],
        queue_s: float,
        first_token_s: float,
        decode_s: float,
    ) -> None:
        """A request that had been prefilled ended, well or not.

        Args:
            completion_lengths: tokens delivered of each completion.
            queue_s, first_token_s: from its arrival to a row, and to its first token; `decode_s`: from there to the end.
        """
        completion_tokens, steered = sum(completion_lengths), decision.applied
        self._n.observe(request.n)
        self._max_tokens.observe(request.sampling.max_tokens)
        self._prompt_length.observe(len(request.prompt_token_ids))
        self._completion_length.observe(completion_tokens)
        self._longest.observe(max(completion_lengths))
        self._request_s[steered].observe(first_token_s + decode_s)
        self._queue_s[steered].observe(queue_s)
        self._prefill_s[steered].observe(first_token_s - queue_s)
        self._inference_s[steered].observe(first_token_s - queue_s + decode_s)
        self._decode_s[steered].observe(decode_s)
        if completion_tokens > request.n:
            self._per_token_s[steered].observe(decode_s * request.n / (completion_tokens - request.n))

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


class _AuditCounters:
    """Counters that the audit log keeps itself; zeros where there is none."""

    def __init__(self, audit: AuditLog | None) -> None:
        self._audit = audit

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The families, for the registry."""
        audit = self._audit
        yield CounterMetricFamily(
            PREFIX + "audit_log_records", "Records written.", value=0 if audit is None else audit.num_records
        )
        errors = CounterMetricFamily(
            PREFIX + "audit_log_errors",
            "write: attempts that failed, each tried again; lost: records that were given up.",
            labels=["kind"],
        )
        errors.add_metric(["write"], 0 if audit is None else audit.num_failures)
        errors.add_metric(["lost"], 0 if audit is None else audit.num_lost)
        yield errors
