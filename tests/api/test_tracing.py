"""Spans: by the SDK's in-memory exporter, and over the wire to a collector's receiver, decoded by OpenTelemetry's own types."""

from __future__ import annotations

import asyncio
import gzip
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the otel extra is not installed")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the otel extra is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server.access.keys import Access
from server.observability import tracing as tracing_module
from server.observability.tracing import Tracer
from tests.checkpoint import CALM, FIRING
from tests.serving import Connection, serving

CHAT = "/v1/chat/completions"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traced:
    """A tracer that keeps its spans."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracer = Tracer(self._exporter, "tiny", "0")

    def spans(self):
        self.tracer._provider.force_flush()
        return list(self._exporter.get_finished_spans())

    async def of(self, number: int):
        """All spans, once there are so many: a span is made after the answer has gone."""
        async with asyncio.timeout(10):
            while len(spans := self.spans()) < number:
                await asyncio.sleep(0.01)
        return spans


async def test_a_span_tells_of_request_and_decision(artifacts):
    traced = Traced()
    async with serving(artifacts, tracer=traced.tracer, access=Access.of("k")) as served:
        served.client.headers["Authorization"] = "Bearer k"
        begun = time.time_ns()
        response = await served.chat(
            FIRING[0],
            n=2,
            seed=5,
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            presence_penalty=0.5,
            headers={"X-Request-Id": "r"},
        )
        answer = response.json()
        [span] = await traced.of(1)
    attributes = dict(span.attributes)
    assert (span.name, span.kind, span.status.status_code) == ("chat tiny", SpanKind.SERVER, StatusCode.UNSET)
    assert begun <= span.start_time < span.end_time <= time.time_ns()
    assert span.parent is None
    [report] = answer["steering"]["profiles"]
    assert 0 < attributes.pop("gen_ai.response.time_to_first_chunk") < 60
    assert attributes.pop("finesteer.profile.gates") == pytest.approx((report["gate"],), rel=1e-4)
    assert attributes.pop("finesteer.profile.relative_norms") == pytest.approx((report["relative_norm"],), rel=1e-4)
    assert attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": CHAT,
        "url.path": CHAT,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "finesteer",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.request.max_tokens": 12,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.presence_penalty": 0.5,
        "gen_ai.request.seed": 5,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": answer["usage"]["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "finesteer.request.id": "r",
        "finesteer.key": "key-1",
        "finesteer.applied": True,
        "finesteer.reason": ("gate_open",),
        "finesteer.profile.names": ("safety",),
        "finesteer.profile.versions": (report["version"],),
        "finesteer.profile.fired": (True,),
        "finesteer.profile.applied": (True,),
        "finesteer.profile.strengths": (6.0,),
    }


async def test_what_is_not_a_plain_chat(artifacts):
    traced = Traced()
    async with serving(artifacts, ("safety", "tone"), tracer=traced.tracer) as served:
        body = {"model": "tiny", "max_tokens": 2, "prompt": ["zyx", "wvut"], "stream": True}
        text = (await served.client.post("/v1/completions", json=body)).text
        await served.client.post("/v1/responses", json={"model": "tiny:unsteered", "input": CALM[0], "store": False})
        await served.client.get("/v1/models/tiny")
        await served.client.get("/health")
        refused = await served.chat(FIRING[0], mood="calm")
        assert refused.status_code == 400
        spans = await traced.of(4)
    names = ["text_completion tiny", "chat tiny:unsteered", "GET /v1/models/{model}", f"POST {CHAT}"]
    assert [span.name for span in spans] == names, "and none for /health"
    several, unsteered, model, bad = [dict(span.attributes) for span in spans]
    assert f'"id":"{several["gen_ai.response.id"]}"' in text.replace(" ", "")
    assert len(several["finesteer.profile.names"]) == 4 and several["gen_ai.usage.output_tokens"] == 4
    assert unsteered["finesteer.reason"] == ("opted_out",) and unsteered["finesteer.profile.names"] == ()
    assert unsteered["gen_ai.response.model"] == "tiny"
    assert not any(key.startswith("gen_ai") for key in (*model, *bad))
    assert bad["http.response.status_code"] == 400 and "error.type" not in bad
    assert not any("house" in str(value) or "zyx" in str(value) for span in spans for value in span.attributes.values())


async def test_the_callers_trace_goes_on(artifacts, caplog):
    traced = Traced()
    async with serving(artifacts, tracer=traced.tracer) as served:
        with caplog.at_level("INFO", logger="finesteer"):
            await served.chat(FIRING[0], headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"})
            await served.chat(FIRING[0], headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})  # not to be sampled
            await served.chat(FIRING[0], headers={"traceparent": "nonsense"})
            first, third = await traced.of(2)
    assert f"{first.context.trace_id:032x}" == TRACE and f"{first.parent.span_id:016x}" == PARENT
    assert first.context.trace_state.get("a") == "b"
    assert third.parent is None and third.context.trace_id != first.context.trace_id
    lines = [record.getMessage() for record in caplog.records if "trace=" in record.getMessage()]
    assert [f"trace={TRACE}" in line for line in lines] == [True, True, False]


async def test_failures_are_errors(artifacts, monkeypatch):
    traced = Traced()
    async with serving(artifacts, tracer=traced.tracer) as served:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": FIRING[0]}],
            "ignore_eos": True,
            "stream": True,
        }
        connection = Connection(served.app, CHAT, body)
        running = asyncio.create_task(connection.run())
        await connection.first_event.wait()
        connection.cut()
        await asyncio.wait_for(running, 5)

        async def broken(messages):
            raise RuntimeError("secret detail")

        monkeypatch.setattr(served.prompter, "chat", broken)
        await served.chat(FIRING[0])
        left, failed = await traced.of(2)
    assert left.attributes["error.type"] == "abort" and left.status.status_code is StatusCode.ERROR
    assert left.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert failed.attributes["error.type"] == "500" and failed.status.status_code is StatusCode.ERROR


class Receiver(ThreadingHTTPServer):
    """An OTLP/HTTP receiver: keeps what it is sent."""

    def __init__(self) -> None:
        receiver = self
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.headers["Content-Type"] == "application/x-protobuf"
                receiver.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.mark.parametrize(("path", "reached"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/own/way", "/own/way")])
async def test_over_the_wire(artifacts, path, reached):
    with Receiver() as receiver:
        tracer = Tracer.to(f"http://127.0.0.1:{receiver.server_port}{path}", "tiny", "1.2.3")
        async with serving(artifacts, tracer=tracer) as served:
            answer = (await served.chat(FIRING[0], headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})).json()
        receiver.shutdown()  # closing the application has sent what there was
        [(sent_to, request)] = receiver.requests
    assert sent_to == reached
    [resource] = request.resource_spans
    named = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert (named["service.name"], named["service.version"]) == ("finesteer", "1.2.3")
    [span] = resource.scope_spans[0].spans
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == (TRACE, PARENT, "chat tiny")
    attributes = {item.key: item.value for item in span.attributes}
    assert attributes["gen_ai.usage.output_tokens"].int_value == answer["usage"]["completion_tokens"]
    assert attributes["finesteer.applied"].bool_value
    assert [value.string_value for value in attributes["finesteer.profile.names"].array_value.values] == ["safety"]


async def test_a_collector_that_is_away_holds_nobody_up(artifacts, monkeypatch):
    monkeypatch.setattr(tracing_module, "CLOSE_S", 0.3)
    begun = time.monotonic()
    async with serving(artifacts, tracer=Tracer.to("http://127.0.0.1:9", "tiny", "0")) as served:
        assert (await served.chat(FIRING[0])).status_code == 200
        ending = time.monotonic()
    assert time.monotonic() - ending < 5 and ending - begun < 30
