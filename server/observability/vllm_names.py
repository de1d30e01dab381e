"""The generic half of the metrics under vLLM's own names, made of ours when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from server.observability.steering_metrics import PREFIX

VLLM_PREFIX = "vllm:"
NAMES = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "num_preemptions",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "prompt_tokens",
        "generation_tokens",
        "request_success",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_inference_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_max_num_generation_tokens",
        "request_params_max_tokens",
        "request_params_n",
    }
)
ADDED_UP = "steered"  # a label that vLLM has not: its values' series are summed
PART = "upper"  # of the prefix cache: what was found there passed no layer at all, vLLM's meaning


class VllmNames(Collector):
    """Collects from `registry`; belongs into another."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """vLLM's families."""
        for family in self._registry.collect():
            if family.name.removeprefix(PREFIX) in NAMES:
                yield _renamed(family)


def _renamed(family: Metric) -> Metric:
    renamed = Metric(VLLM_PREFIX + family.name.removeprefix(PREFIX), family.documentation, family.type)
    totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for sample in family.samples:
        if sample.labels.get("layers", PART) != PART or sample.name.endswith("_created"):
            continue
        labels = tuple((key, value) for key, value in sample.labels.items() if key not in (ADDED_UP, "layers"))
        key = VLLM_PREFIX + sample.name.removeprefix(PREFIX), labels
        totals[key] = totals.get(key, 0.0) + sample.value
    for (name, labels), value in totals.items():
        renamed.add_sample(name, dict(labels), value)
    return renamed
