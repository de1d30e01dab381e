"""*Serving*: traffic, latency, queue, cache, tokens and errors, as for any inference server."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.models import units
from panels import INSTANCE, MODEL, SERVER, Query, lines, number, page, quantiles, rate, ratio, source

INSTANCES = 'instance=~"$instance"'
ENDED = "finesteer:request_success_total"
QUANTILES = (0.5, 0.95, 0.99)


def build() -> Dashboard:
    """The dashboard."""
    board = page(
        "FineSteer: Serving",
        "finesteer-serving",
        "Traffic, latency, queue, cache, tokens and errors.",
        [source(), MODEL, INSTANCE],
        "finesteer",
    )
    for title, panels in (
        ("Now", _now()),
        ("Traffic and queue", _traffic()),
        ("Latency", _latency()),
        ("Tokens", _tokens()),
        ("Memory and caches", _caches()),
        ("Process", _process()),
    ):
        board = board.with_row(Row(title))
        for panel in panels:
            board = board.with_panel(panel)
    return board


def _gauge(name: str) -> str:
    return f"sum (finesteer:{name}{{{SERVER}}})"


def _errors() -> str:
    failed, all_but_aborts = f'{SERVER}, finished_reason="error"', f'{SERVER}, finished_reason!="abort"'
    return ratio(rate(ENDED, failed), rate(ENDED, all_but_aborts))


def _now():
    yield number(
        "Running",
        "Completions that hold a row of the batch.",
        units.Short,
        Query(_gauge("num_requests_running"), "running"),
    )
    yield number(
        "Waiting",
        "Requests in the queue. An alert has more than 64 for minutes.",
        units.Short,
        Query(_gauge("num_requests_waiting"), "waiting"),
        limit=64,
    )
    yield number(
        "Completions",
        "Completions that ended in a second, well or not.",
        "completions/s",
        Query(rate(ENDED, SERVER), "ended"),
    )
    yield number(
        "Tokens",
        "Tokens delivered in a second.",
        "tokens/s",
        Query(rate("finesteer:generation_tokens_total", SERVER), "generated"),
    )
    yield number(
        "Failed",
        "Completions that failed, of those that ended other than by an abort. An alert has more than 1 %.",
        units.PercentUnit,
        Query(_errors(), "failed"),
        limit=0.01,
    )
    yield number(
        "KV memory",
        "Share of the memory for running sequences' keys and values that is in use, on the fullest server.",
        units.PercentUnit,
        Query(f"max (finesteer:kv_cache_usage_perc{{{SERVER}}})", "in use"),
        limit=0.95,
    )


def _traffic():
    yield lines(
        "Completions by how they ended",
        "stop: an end token or a stop string. length: the limit. abort: the client went. error: ours.",
        "completions/s",
        [Query(rate(ENDED, SERVER, "finished_reason"), "{{finished_reason}}")],
        stacked=True,
    )
    yield lines(
        "Running and waiting",
        "Completions that hold a row of the batch, and requests in the queue.",
        units.Short,
        [
            Query(f"finesteer:num_requests_running{{{SERVER}}}", "{{instance}} running"),
            Query(f"finesteer:num_requests_waiting{{{SERVER}}}", "{{instance}} waiting"),
        ],
        limit=64,
    )
    yield lines(
        "Failed and aborted",
        "Shares of the completions that ended: failed of those that were not aborted (an alert has more than 1 %), aborted of all.",
        units.PercentUnit,
        [
            Query(_errors(), "failed"),
            Query(ratio(rate(ENDED, f'{SERVER}, finished_reason="abort"'), rate(ENDED, SERVER)), "aborted"),
        ],
        limit=0.01,
    )
    yield lines(
        "Answers by status",
        "Requests of every path that ended in a second, by class of HTTP status: refused ones, too, which are no completions.",
        "requests/s",
        [Query(rate("finesteer:http_requests_total", INSTANCES, "status"), "{{status}}")],
        stacked=True,
    )
    yield lines(
        "Preemptions",
        "Sequences in a second that had to go back to the queue because KV memory ran out.",
        "preemptions/s",
        [Query(rate("finesteer:num_preemptions_total", SERVER, "instance"), "{{instance}}")],
    )


def _latency():
    for title, description, name in (
        ("Time to first token", "From arrival to the first token, queueing included. An alert has p95 beyond 2.5 s.", "time_to_first_token_seconds"),
        ("Between tokens", "Between two tokens of a completion.", "inter_token_latency_seconds"),
        ("Whole request", "From arrival to the end.", "e2e_request_latency_seconds"),
        ("Decoding", "From the first token to the end.", "request_decode_time_seconds"),
    ):  # fmt: skip
        limit = 2.5 if name == "time_to_first_token_seconds" else None
        queries = quantiles(QUANTILES, f"finesteer:{name}", SERVER)
        yield lines(title, description, units.Seconds, queries, limit=limit)
    yield lines(
        "Mean time per token of a request",
        "Percentiles over requests, each with the mean of its own tokens.",
        units.Seconds,
        quantiles(QUANTILES, "finesteer:request_time_per_output_token_seconds", SERVER),
        span=24,
    )


def _tokens():
    yield lines(
        "Tokens",
        "Prompt tokens prefilled (cached ones too) and tokens delivered, in a second.",
        "tokens/s",
        [
            Query(rate("finesteer:prompt_tokens_total", SERVER), "prompt"),
            Query(rate("finesteer:generation_tokens_total", SERVER), "generated"),
        ],
    )
    yield lines(
        "Length of prompts and answers",
        "Percentiles of a request's prompt tokens and of the tokens that it was given, all its completions together.",
        "tokens",
        [
            Query(query.expr, f"{what} {query.legend}")
            for what, name in (("prompt", "request_prompt_tokens"), ("answer", "request_generation_tokens"))
            for query in quantiles((0.5, 0.95), f"finesteer:{name}", SERVER)
        ],
    )
    yield lines(
        "Limit on answers",
        "Percentiles of the most tokens that a completion could have.",
        "tokens",
        quantiles((0.5, 0.95), "finesteer:request_params_max_tokens", SERVER),
    )
    yield lines(
        "Completions of a request",
        "Percentiles of n.",
        units.NoUnit,
        quantiles((0.5, 0.95), "finesteer:request_params_n", SERVER),
    )


def _caches():
    yield lines(
        "Caches in use",
        "Shares of the memory for running sequences and of that for finished prompts. The latter fills up and stays full.",
        units.PercentUnit,
        [
            Query(f"finesteer:kv_cache_usage_perc{{{SERVER}}}", "{{instance}} running"),
            Query(f"finesteer:prefix_cache_usage_perc{{{SERVER}}}", "{{instance}} prefix cache"),
        ],
        high=1,
    )
    hits, queries = "finesteer:prefix_cache_hits_total", "finesteer:prefix_cache_queries_total"
    yield lines(
        "Prefix cache hits",
        "Share of the prompt tokens looked up that were found. lower: layers up to the first site, the same for all; upper: those "
        "above, kept apart by vector.",
        units.PercentUnit,
        [Query(ratio(rate(hits, SERVER, "layers"), rate(queries, SERVER, "layers")), "{{layers}}")],
        high=1,
    )
    yield lines(
        "Memory set apart",
        "For running sequences' keys and values, and for finished prompts.",
        units.BytesIEC,
        [
            Query(f"finesteer:kv_cache_bytes{{{SERVER}}}", "{{instance}} running"),
            Query(f"finesteer:prefix_cache_bytes{{{SERVER}}}", "{{instance}} prefix cache"),
        ],
        span=24,
    )


def _process():
    yield lines(
        "Resident memory",
        "Of the server's process.",
        units.BytesIEC,
        [Query(f"process_resident_memory_bytes{{{INSTANCES}}}", "{{instance}}")],
    )
    yield lines(
        "CPU",
        "Cores that the process keeps busy.",
        units.NoUnit,
        [Query(rate("process_cpu_seconds_total", INSTANCES, "instance"), "{{instance}}")],
    )
    yield lines(
        "Open files",
        "File descriptors, sockets among them, and the most that there may be.",
        units.Short,
        [
            Query(f"process_open_fds{{{INSTANCES}}}", "{{instance}}"),
            Query(f"process_max_fds{{{INSTANCES}}}", "{{instance}} limit"),
        ],
        dashed="/limit/",
    )
    yield lines(
        "Uptime",
        "Since the process started; a fall is a restart.",
        units.Seconds,
        [Query(f"time() - process_start_time_seconds{{{INSTANCES}}}", "{{instance}}")],
    )
