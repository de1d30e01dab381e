"""OpenTelemetry: one span for each request, by the gen_ai semantic conventions and `finesteer.*` for the decision.

Needs the `otel` extra. A span is made when its request has ended, so tracing costs a running request nothing, and says nothing
of one that the process did not live to end.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from server.observability.account import RequestAccount

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from server.answers.generation import Generation

OPERATIONS = {"/v1/chat/completions": "chat", "/v1/responses": "chat", "/v1/completions": "text_completion"}
CLOSE_S = 5.0  # how long the end of the server waits for what the collector has not taken yet


class TracingError(Exception):
    """The server cannot trace; says what to do."""


class Tracer:
    """Sends spans on, from a thread of its own; those that a collector does not take are dropped in the end.

    What the OTEL_* variables of the SDK set is heeded, but for the endpoint.
    """

    def __init__(self, exporter: SpanExporter, model: str, version: str) -> None:
        """Raises TracingError without the SDK."""
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, Status, StatusCode
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise _absent() from error
        # The SDK lets OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over these.
        resource = Resource.create({"service.name": "finesteer", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("finesteer", version)
        self._context = TraceContextTextMapPropagator()
        self._kind, self._failed = SpanKind.SERVER, Status(StatusCode.ERROR)
        self._model = model

    @classmethod
    def to(cls, endpoint: str, model: str, version: str) -> Tracer:
        """A tracer that sends OTLP over HTTP to a collector, at `/v1/traces` where `endpoint` has no path.

        Raises TracingError where the extra is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            raise _absent() from error
        bare = urlsplit(endpoint).path in ("", "/")
        return cls(OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces" if bare else endpoint), model, version)

    def ended(self, account: RequestAccount) -> str:
        """Make the span of a request that has ended. Returns its trace's id in hex."""
        operation = OPERATIONS.get(account.route or "") if account.generations else None
        name = f"{operation} {account.model}" if operation else f"{account.method} {account.route or ''}".rstrip()
        began_ns = int(account.began_s * 1e9)
        attributes = self._attributes(account, operation)
        span = self._tracer.start_span(
            name,
            context=self._context.extract(account.trace_headers or {}),
            kind=self._kind,
            attributes=attributes,
            start_time=began_ns,
        )
        if "error.type" in attributes:
            span.set_status(self._failed)
        span.end(began_ns + int(account.seconds * 1e9))
        return f"{span.get_span_context().trace_id:032x}"

    def close(self) -> None:
        """Send what waits, for `CLOSE_S` at most."""
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-end", daemon=True)
        closing.start()
        closing.join(CLOSE_S)

    def _attributes(self, account: RequestAccount, operation: str | None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "http.request.method": account.method,
            "http.response.status_code": account.status,
            "url.path": account.path,
            "http.route": account.route,
            "finesteer.request.id": account.request_id,
            "finesteer.key": account.key,
            "error.type": _error_type(account),
        }
        if operation is not None:
            found |= {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "finesteer",
                "gen_ai.request.model": account.model,
                "gen_ai.response.model": self._model,
                "gen_ai.response.finish_reasons": account.finish_reasons,
                "gen_ai.response.time_to_first_chunk": account.first_token_s,
                "gen_ai.usage.input_tokens": account.prompt_tokens,
                "gen_ai.usage.output_tokens": account.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": sum(g.cached_tokens for g in account.generations),
                **_asked(account.generations),
                **_decided(account),
            }
        return {key: value for key, value in found.items() if value is not None}


def _error_type(account: RequestAccount) -> str | None:
    """What went wrong on the server's side or its client's: a 5xx, a broken-off answer, a client that left."""
    if account.status >= 500:
        return str(account.status)
    return next((reason for reason in ("error", "abort") if reason in account.finish_reasons), None)


def _asked(generations: Sequence[Generation]) -> dict[str, Any]:
    """The first prompt's request: all share their options."""
    request = generations[0].request
    sampling = request.sampling
    return {
        "gen_ai.response.id": request.request_id if len(generations) == 1 else request.request_id.rpartition("-")[0],
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": float(sampling.temperature),
        "gen_ai.request.top_p": float(sampling.top_p),
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.presence_penalty": sampling.presence_penalty or None,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty or None,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.choice.count": request.n if request.n > 1 else None,
    }


def _decided(account: RequestAccount) -> dict[str, Any]:
    """The decisions; of the profiles, in parallel lists, prompt by prompt."""
    decisions = account.decisions
    if not decisions:
        return {}
    profiles = [profile for decision in decisions for profile in decision.profiles]
    return {
        "finesteer.applied": any(decision.applied for decision in decisions),
        "finesteer.reason": list(dict.fromkeys(decision.reason for decision in decisions)),
        "finesteer.profile.names": [profile.name for profile in profiles],
        "finesteer.profile.versions": [profile.version for profile in profiles],
        "finesteer.profile.fired": [profile.fired for profile in profiles],
        "finesteer.profile.applied": [profile.applied for profile in profiles],
        "finesteer.profile.gates": [float(profile.gate) for profile in profiles],
        "finesteer.profile.strengths": [float(profile.strength) for profile in profiles],
        "finesteer.profile.relative_norms": [float(profile.relative_norm) for profile in profiles],
    }


def _absent() -> TracingError:
    return TracingError(
        "--otlp-endpoint needs OpenTelemetry, which is not installed: pip install 'finesteer-server[otel]'."
    )
