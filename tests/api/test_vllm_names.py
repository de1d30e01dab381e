"""`--metrics-compat vllm` against the names, labels and buckets that vLLM publishes (docs/usage/metrics, V1 engine)."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.checkpoint import CALM, FIRING
from tests.serving import serving

PLAIN = {"model_name", "engine"}
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200)  # 1, 2, 5, … up to the context, which is 256 here

# What the reference Grafana dashboard of vLLM asks for, then what its page lists besides and this server has.
PUBLISHED = {
    "e2e_request_latency_seconds": ("histogram", PLAIN, LATENCY),
    "prompt_tokens": ("counter", PLAIN, None),
    "generation_tokens": ("counter", PLAIN, None),
    "inter_token_latency_seconds": ("histogram", PLAIN, BETWEEN),
    "time_to_first_token_seconds": ("histogram", PLAIN, FIRST_TOKEN),
    "num_requests_running": ("gauge", PLAIN, None),
    "num_requests_waiting": ("gauge", PLAIN, None),
    "kv_cache_usage_perc": ("gauge", PLAIN, None),
    "request_prompt_tokens": ("histogram", PLAIN, TOKENS),
    "request_generation_tokens": ("histogram", PLAIN, TOKENS),
    "request_success": ("counter", PLAIN | {"finished_reason"}, None),
    "request_queue_time_seconds": ("histogram", PLAIN, LATENCY),
    "request_prefill_time_seconds": ("histogram", PLAIN, LATENCY),
    "request_decode_time_seconds": ("histogram", PLAIN, LATENCY),
    "request_max_num_generation_tokens": ("histogram", PLAIN, TOKENS),
    "request_inference_time_seconds": ("histogram", PLAIN, LATENCY),
    "request_time_per_output_token_seconds": ("histogram", PLAIN, BETWEEN),
    "request_params_n": ("histogram", PLAIN, (1, 2, 5, 10, 20)),
    "request_params_max_tokens": ("histogram", PLAIN, TOKENS),
    "num_preemptions": ("counter", PLAIN, None),
    "prefix_cache_queries": ("counter", PLAIN, None),
    "prefix_cache_hits": ("counter", PLAIN, None),
}


async def families(served, prefix):
    """`/metrics` as a Prometheus reads it: each family of a prefix, without it."""
    text = (await served.client.get("/metrics")).text
    found = [f for f in text_string_to_metric_families(text) if f.name.startswith(prefix)]
    names = [f.name.removeprefix(prefix) for f in found if not f.name.endswith("_created")]
    assert len(names) == len(set(names)), "a family is there twice"
    return {f.name.removeprefix(prefix): f for f in found if not f.name.endswith("_created")}


async def test_names_types_labels_and_buckets(artifacts):
    async with serving(artifacts, metrics_compat="vllm") as served:
        found = await families(served, "vllm:")
        assert set(found) == set(PUBLISHED)
        for name, (kind, labels, buckets) in PUBLISHED.items():
            family = found[name]
            assert family.type == kind, name
            assert {frozenset(s.labels) - {"le"} for s in family.samples} == {frozenset(labels)}, name
            bounds = [s.labels["le"] for s in family.samples if "le" in s.labels]
            assert bounds == ([*(str(float(bound)) for bound in buckets), "+Inf"] if buckets else []), name


async def test_the_same_values(artifacts):
    async with serving(artifacts, metrics_compat="vllm") as served:
        for text in (FIRING[0], CALM[0], CALM[1]):
            assert (await served.chat(text, ignore_eos=True)).status_code == 200
        found = await families(served, "vllm:")

        def value(name, sample=None, **labels):
            return sum(
                s.value
                for s in found[name].samples
                if s.name == f"vllm:{sample or name}" and labels.items() <= s.labels.items()
            )

        assert value("generation_tokens", "generation_tokens_total") == 36
        assert value("request_success", "request_success_total", finished_reason="length") == 3
        # 1 steered and 2 plain requests: 3 in all
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
            assert value(name, f"{name}_count") == value(name, f"{name}_bucket", le="+Inf") == 3
        assert value("inter_token_latency_seconds", "inter_token_latency_seconds_count") == 33
        ours = await families(served, "finesteer:")
        for name in ("time_to_first_token_seconds", "request_decode_time_seconds"):
            both = sum(s.value for s in ours[name].samples if s.name.endswith("_sum"))
            assert value(name, f"{name}_sum") == both > 0
        prompts = value("prompt_tokens", "prompt_tokens_total")
        assert value("prefix_cache_queries", "prefix_cache_queries_total") == prompts > 0


async def test_only_when_asked(artifacts):
    async with serving(artifacts) as served:
        assert await families(served, "vllm:") == {}
        assert len(await families(served, "finesteer:")) > len(PUBLISHED)
