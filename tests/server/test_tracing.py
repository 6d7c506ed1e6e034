"""Traces of requests."""

from __future__ import annotations

import gzip
import http.server
import itertools
import socket
import sys
import threading
import types
from collections.abc import Iterator

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from icarus_jax import cli
from icarus_jax.errors import UsageError
from icarus_jax.scheduling.request import TokenOutput
from icarus_jax.server.streams import Delta
from icarus_jax.server.timeline import Timeline
from icarus_jax.server.tracing import MAX_CHOICES, Traces
from tests.server.served import CHAT, GOOD, Served, ids_of, serving, wait_for

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Traced:
    """The served double, and the spans of the requests to it."""

    def __init__(self, served: Served, exporter: InMemorySpanExporter):
        self.served, self._exporter = served, exporter

    def spans(self) -> list[ReadableSpan]:
        """Those of the one request since the last call, its own first; they are written after the answer."""
        wait_for(self._server_spans)
        self.served.http.get("/health")  # the event loop has written the others too when it answers
        found = self._exporter.get_finished_spans()
        self._exporter.clear()
        return sorted(found, key=lambda span: span.kind is not SpanKind.SERVER)

    def _server_spans(self) -> list[ReadableSpan]:
        done = [span for span in self._exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
        return done if not self.served.engine.running else []

    def ask(self, path: str, body: dict, status: int = 200, **headers: str) -> list[ReadableSpan]:
        answer = self.served.http.post(path, json=body, headers=headers)
        assert answer.status_code == status, answer.text
        return self.spans()


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with serving(traces=Traces(provider), step_seconds=0.001) as served:
        yield Traced(served, exporter)


def inside(parent: ReadableSpan, spans: list[ReadableSpan]) -> list[ReadableSpan]:
    return [span for span in spans if span.parent and span.parent.span_id == parent.context.span_id]


def names(spans: list[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        ("/v1/completions", {**GOOD, "prompt": [5, 6, 7]}, "text_completion"),
        ("/v1/chat/completions", CHAT, "chat"),
        ("/v1/responses", {"model": "trunk", "input": "hi"}, "chat"),
    ],
)
def test_a_request_has_a_span_with_its_choice_and_its_phases(traced, path, body, operation, stream):
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {**body, limit: 4, "temperature": 0.5, "top_p": 0.9, "stream": stream}
    request, *rest = spans = traced.ask(path, body, **{"X-Request-Id": "mine"})
    assert (request.name, request.kind, request.parent) == (f"POST {path}", SpanKind.SERVER, None)
    assert dict(request.attributes) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": path,
        "gen_ai.request.id": "mine",
        "gen_ai.usage.num_sequences": 1,
    }
    (choice,) = inside(request, rest)
    assert (choice.name, choice.kind) == (f"{operation} trunk", SpanKind.INTERNAL)
    phases = inside(choice, rest)
    assert names(phases) == ["queue", "prefill", "decode trunk"] and len(spans) == 5
    # One after the other, within the choice, which lies within the request.
    assert (phases[0].start_time, phases[-1].end_time) == (choice.start_time, choice.end_time)
    assert all(a.end_time == b.start_time for a, b in itertools.pairwise(phases))
    assert request.start_time <= choice.start_time <= choice.end_time <= request.end_time
    assert all(span.status.status_code is StatusCode.UNSET and span.start_time <= span.end_time for span in spans)

    said = dict(choice.attributes)
    latencies = {name: said.pop(name) for name in list(said) if name.startswith("gen_ai.latency.")}
    prompt = traced.served.engine.requests[-1].prompt_ids
    assert said == {
        "gen_ai.operation.name": operation,
        "gen_ai.request.model": "trunk",
        "gen_ai.response.model": "trunk",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": len(prompt),
        "gen_ai.usage.cache_read.input_tokens": said["gen_ai.usage.cache_read.input_tokens"],
        "gen_ai.usage.output_tokens": 4,
    }
    seconds = [(span.end_time - span.start_time) / 1e9 for span in phases]
    for name, expected in zip(("time_in_queue", "time_in_model_prefill", "time_in_model_decode"), seconds, strict=True):
        assert latencies.pop(f"gen_ai.latency.{name}") == pytest.approx(expected, abs=1e-6)
    first, whole = latencies.pop("gen_ai.latency.time_to_first_token"), latencies.pop("gen_ai.latency.e2e")
    assert seconds[0] + seconds[1] <= first + 1e-6 and first <= whole and not latencies


def test_cached_tokens_are_told(traced):
    body = {**GOOD, "prompt": list(range(40, 50))}
    cached = [traced.ask("/v1/completions", body)[1].attributes["gen_ai.usage.cache_read.input_tokens"] for _ in "12"]
    assert cached == [0, 9]


def test_the_trace_of_the_client_goes_on(traced):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=x"}
    spans = traced.ask("/v1/completions", GOOD, **headers)
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE}
    assert f"{spans[0].parent.span_id:016x}" == PARENT and spans[0].context.trace_state == {"vendor": "x"}


@pytest.mark.parametrize("traceparent", ["", "00-0-0-01", f"00-{'0' * 32}-{PARENT}-01", "x" * 9000])
def test_a_broken_traceparent_begins_a_trace(traced, traceparent):
    assert traced.ask("/v1/completions", GOOD, traceparent=traceparent)[0].parent is None


def test_what_the_client_does_not_want_sampled_is_not(traced):
    answer = traced.served.http.post(
        "/v1/completions", json=GOOD, headers={"traceparent": f"00-{TRACE}-{PARENT}-00", "X-Request-Id": "dark"}
    )
    assert answer.status_code == 200
    spans = traced.ask("/v1/completions", GOOD, **{"X-Request-Id": "light"})  # the requests end in this order
    assert [span.attributes.get("gen_ai.request.id") for span in spans if span.kind is SpanKind.SERVER] == ["light"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_fan_out_with_a_handoff(traced, stream):
    # 'trunk' counts on from the prompt's last token: the second of its tokens hands over, and 'parrot' writes two more.
    body = {**GOOD, "models": ["trunk", "parrot"], "prompt": [8, 9, 20], "max_tokens": 4, "stream": stream}
    request, *rest = traced.ask("/v1/completions", body | {"handoff": [{"on": 22, "model": "parrot"}]})
    assert request.attributes["gen_ai.usage.num_sequences"] == 2
    handed, plain = inside(request, rest)
    assert names([handed, plain]) == ["text_completion trunk", "text_completion parrot"]
    models = [(c.attributes["gen_ai.request.model"], c.attributes["gen_ai.response.model"]) for c in (handed, plain)]
    assert models == [("trunk", "parrot"), ("parrot", "parrot")] and not plain.events
    *_, before, after = phases = inside(handed, rest)
    assert names(phases) == ["queue", "prefill", "decode trunk", "decode parrot"]
    assert [dict(span.attributes) for span in (before, after)] == [
        {"gen_ai.response.model": "trunk", "icarus.decode.tokens": 2},
        {"gen_ai.response.model": "parrot", "icarus.decode.tokens": 2},
    ]
    (event,) = handed.events
    said = {"icarus.handoff.from": "trunk", "icarus.handoff.to": "parrot", "icarus.handoff.token": 2}
    assert (event.name, dict(event.attributes)) == ("handoff", said)
    assert before.start_time < before.end_time == event.timestamp == after.start_time < after.end_time
    assert names(inside(plain, rest)) == ["queue", "prefill", "decode parrot"]


def test_what_was_refused_has_a_span_alone(traced):
    (bad,) = traced.ask("/v1/completions", {}, 400)
    assert bad.attributes["http.response.status_code"] == 400 and bad.status.status_code is StatusCode.UNSET
    (lost,) = traced.ask("/made/up", {}, 404)  # names of spans are not up to clients
    assert lost.name == "POST" and "http.route" not in lost.attributes
    traced.served.engine.fail = RuntimeError("boom")
    try:
        (bug,) = traced.ask("/v1/completions", GOOD, 500)
    finally:
        traced.served.engine.fail = None
    assert bug.status.status_code is StatusCode.ERROR and bug.attributes["error.type"] == "500"


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_engine(traced, stream):
    body = {**GOOD, "models": ["broken", "trunk"], "prompt": [2], "max_tokens": 100, "stream": stream}
    request, *rest = traced.ask("/v1/completions", body, 200 if stream else 500)
    broken, other = inside(request, rest)
    assert broken.status.status_code is StatusCode.ERROR and broken.attributes["error.type"] == "error"
    assert broken.attributes["gen_ai.usage.output_tokens"] == 2
    assert other.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert other.status.status_code is StatusCode.UNSET
    assert request.status.status_code is (StatusCode.UNSET if stream else StatusCode.ERROR)


def test_a_client_that_leaves(traced):
    body = {**GOOD, "max_tokens": 100, "stream": True, "prompt": [3]}
    with traced.served.http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    request, *rest = traced.spans()
    (choice,) = inside(request, rest)
    assert choice.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert 1 <= choice.attributes["gen_ai.usage.output_tokens"] < 100
    assert choice.status.status_code is StatusCode.UNSET


def test_a_request_that_ends_before_its_first_token(traced):
    traced.served.engine.step_seconds = 1.0
    try:
        spans = traced.ask("/v1/completions", {**GOOD, "timeout": 0.05, "max_tokens": 100}, 408)
    finally:
        traced.served.engine.step_seconds = 0.001
    assert names(spans) == ["POST /v1/completions", "text_completion trunk"]
    assert spans[1].status.status_code is StatusCode.ERROR and spans[1].attributes["error.type"] == "timeout"
    assert "gen_ai.latency.time_to_first_token" not in spans[1].attributes


def test_many_choices_have_no_spans_of_their_own(traced):
    body = {**GOOD, "prompt": [[5]] * (MAX_CHOICES + 1)}
    request, *rest = traced.ask("/v1/completions", body)
    assert len(inside(request, rest)) == MAX_CHOICES
    assert request.attributes["gen_ai.usage.num_sequences"] == MAX_CHOICES + 1


def test_nothing_is_said_of_texts(traced):
    text = "Hello, world! How are you today?"
    spans = traced.ask("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": text}], "user": "ann"})
    spans += traced.ask("/v1/completions?secret=Hello", {**GOOD, "prompt": ids_of(text), "model": "parrot"})
    written = "".join(span.to_json() for span in spans)
    assert "POST /v1/completions" in written and not any(word in written for word in ("Hello", "today", 'ann"'))


def test_what_is_polled_has_no_spans(traced):
    for path in ("/health", "/metrics", "/v1/models", "/page/stats"):
        assert traced.served.http.get(path).status_code == 200
    assert [s.name for s in traced.ask("/tokenize", {"model": "trunk", "prompt": "hi"})] == ["POST /tokenize"]


def test_a_handoff_happens_at_the_last_token_before_it():
    choice = types.SimpleNamespace(handoffs=[])
    timeline = Timeline(choice, arrival=0.0, submitted=0.5)
    for now, handoffs in ((1.0, []), (2.0, []), (3.0, [(2, "parrot")]), (4.0, [(2, "parrot")])):
        choice.handoffs = handoffs
        timeline.take(TokenOutput(0, [5], admitted_at=0.7), Delta(token_ids=[5]), now)
    assert timeline.handoffs == [2.0]
    assert (timeline.admitted, timeline.prefilled, timeline.first_token, timeline.last_token) == (0.7, 1.0, 1.0, 4.0)


# ---- a collector


class Collector:
    """An OTLP/HTTP receiver. `gate` holds its answers up while it is not set."""

    def __init__(self):
        self.spans, self.resources, self.headers = [], [], []
        self.gate = threading.Event()
        self.gate.set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                body = self.rfile.read(int(self.headers["Content-Length"]))
                body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                collector.gate.wait()
                for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resources.append({a.key: a.value.string_value for a in sent.resource.attributes})
                    collector.spans += [span for scope in sent.scope_spans for span in scope.spans]
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.end_headers()

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.close()


def test_the_collector_has_every_span_at_the_servers_end(collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")  # nothing but the end sends them
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=abc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    with serving(traces=cli.tracing(collector.url)) as served:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert served.http.post("/v1/completions", json=GOOD, headers=headers).status_code == 200
        assert not collector.spans
    assert [span.name for span in collector.spans] == [
        "POST /v1/completions", "text_completion trunk", "queue", "prefill", "decode trunk"
    ]  # fmt: skip
    request = collector.spans[0]
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    (resource,) = collector.resources
    assert resource["service.name"] == "icarus-jax" and resource["service.version"]
    assert collector.headers[0]["x-api-key"] == "abc"


def test_they_are_sent_in_the_background(collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    with serving(traces=cli.tracing(collector.url)) as served:
        assert served.http.post("/v1/completions", json=GOOD).status_code == 200
        wait_for(lambda: len(collector.spans) == 5)
    assert collector.resources[0]["service.name"] == "mine"


def test_a_collector_that_hangs_holds_nobody_up(collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")  # the spans of two requests fill it
    collector.gate.clear()
    with serving(traces=cli.tracing(collector.url)) as served:
        for _ in range(4):
            assert served.http.post("/v1/completions", json=GOOD).status_code == 200
        wait_for(lambda: collector.headers)
        assert not collector.spans
        collector.gate.set()
    assert 0 < len(collector.spans) <= 8 + 2


def test_a_collector_that_is_down_fails_nobody(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with socket.socket() as taken:  # nobody listens there
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1/traces"
        with serving(traces=cli.tracing(url)) as served:
            for _ in range(3):
                assert served.http.post("/v1/completions", json=GOOD).status_code == 200


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://localhost:4317", "http://", "http:///v1/traces"])
def test_an_endpoint_that_is_none(endpoint):
    with pytest.raises(UsageError, match=r"config\.server\.otlp_traces_endpoint.*http://localhost:4318/v1/traces"):
        cli.tracing(endpoint)


def test_off_is_the_default_and_imports_nothing(monkeypatch):
    assert cli.tracing(cli.serving_config().server.otlp_traces_endpoint) is None
    for name in [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "icarus_jax.server.tracing"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with serving() as served:
        assert served.http.post("/v1/completions", json=GOOD).status_code == 200
    with pytest.raises(UsageError, match=r"otlp_traces_endpoint needs OpenTelemetry: pip install 'icarus-jax\[otel\]'"):
        cli.tracing("http://localhost:4318/v1/traces")
