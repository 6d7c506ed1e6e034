"""Traces of requests, sent to an OpenTelemetry collector. Only a server that sends them imports this.

The spans of a request, written when it has been answered:

    POST /v1/chat/completions
        chat planner               a choice; a handoff is an event of it
            queue                  from its submission to its admission
            prefill                up to its first token
            decode planner
            decode actor           from the handoff on

Attributes have the names of OpenTelemetry's conventions for HTTP and generative AI, else vLLM's, else `icarus.*`. They
say nothing of what prompts and answers contain.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from icarus_jax import __version__
from icarus_jax.server.exchange import Exchange, current
from icarus_jax.server.timeline import Timeline, between

MAX_CHOICES = 64  # of a request, that have spans: those of a thousand would hold up the event loop
GOOD_ENDS = ("stop", "length", "abort")  # the finish_reasons of choices that did not fail
Attributes = Mapping[str, AttributeValue]
Event = tuple[float, str, Attributes]  # when, in seconds (monotonic), its name, and more


class Traces:
    """Makes the spans of requests."""

    def __init__(self, provider: TracerProvider):
        """Takes what the spans are given to."""
        self._provider = provider
        self._tracer = provider.get_tracer("icarus_jax", __version__)

    @classmethod
    def to(cls, endpoint: str) -> Traces:
        """Makes traces that are sent to a collector, by a thread of their own.

        The SDK reads the OTEL_* environment variables: the service's name, the sampler, the exporter's headers.

        Args:
            endpoint: the collector's URL for traces, in OTLP over HTTP.

        Raises:
            ValueError: it is no such URL, or an OTEL_* variable makes no sense.
        """
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"{endpoint!r} is no URL of OTLP over HTTP, such as http://localhost:4318/v1/traces")
        own = Resource({"service.name": "icarus-jax", "service.version": __version__})
        provider = TracerProvider(resource=Resource.create().merge(own).merge(OTELResourceDetector().detect()))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        return cls(provider)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Wraps an app: each POST gets a span. What is polled, such as /metrics, gets none: it would hide the others.

        Args:
            app: the ASGI app that answers the requests.
        """

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST":
                return await app(scope, receive, send)
            status = 500  # if the app raises before it answers

            async def tracked(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, tracked)
            finally:
                _Writer(self._tracer).request(current(), scope, status)

        return traced

    def close(self) -> None:
        """Sends what has not been sent, and ends the thread. It waits for the collector, but not for long."""
        self._provider.shutdown()


class _Writer:
    """Writes the spans of one request that has been answered."""

    def __init__(self, tracer: trace.Tracer):
        """Takes what makes spans."""
        self._tracer = tracer
        self._ahead = time.time_ns() - time.monotonic_ns()

    def request(self, exchange: Exchange, scope: Scope, status: int) -> None:
        """Writes the span of the request, which goes on the trace that its headers name, and those of its choices.

        Args:
            exchange: the request.
            scope: its connection.
            status: the status of its answer.
        """
        attributes: dict[str, AttributeValue] = {
            "http.request.method": exchange.method,
            "http.response.status_code": status,
            "gen_ai.request.id": exchange.request_id,
        }
        name, route, timelines = exchange.method, scope.get("route"), exchange.timelines
        if route is not None:  # a path of the client's own would be one more name of spans
            name, attributes["http.route"] = f"{name} {route.path}", route.path
        if timelines:
            attributes["gen_ai.usage.num_sequences"] = len(timelines)
        parent = propagate.extract(dict(Headers(scope=scope)))
        error, now = str(status) if status >= 500 else None, time.monotonic()
        inside = self._span(name, exchange.started, now, attributes, parent, SpanKind.SERVER, error)
        operation = "text_completion" if exchange.path.endswith("/v1/completions") else "chat"
        for timeline in timelines[:MAX_CHOICES]:
            self._choice(operation, timeline, inside)

    def _choice(self, operation: str, timeline: Timeline, parent: Context) -> None:
        """Writes the span of a choice, and those of its phases, of which one that never answered has none."""
        choice, ended = timeline.choice, timeline.ended
        assert ended is not None
        writers = [next(iter(choice.tokens_by_model)), *(model for _, model in choice.handoffs)]
        events: list[Event] = [
            (at, "handoff", {"icarus.handoff.from": old, "icarus.handoff.to": new, "icarus.handoff.token": token})
            for at, (old, new), (token, _) in zip(
                timeline.handoffs, itertools.pairwise(writers), choice.handoffs, strict=True
            )
        ]
        reason = timeline.finish_reason
        error = None if reason in GOOD_ENDS else reason
        attributes = {"gen_ai.operation.name": operation, **_attributes(timeline, writers)}
        name, start = f"{operation} {writers[0]}", timeline.submitted
        inside = self._span(name, start, ended, attributes, parent, error=error, events=events)
        if timeline.admitted is None or timeline.prefilled is None:
            return
        self._span("queue", start, timeline.admitted, {}, inside)
        self._span("prefill", timeline.admitted, timeline.prefilled, {}, inside)
        times = [timeline.prefilled, *timeline.handoffs, ended]
        tokens = [0, *(token for token, _ in choice.handoffs), choice.num_tokens]
        for i, model in enumerate(writers):
            wrote: Attributes = {"gen_ai.response.model": model, "icarus.decode.tokens": tokens[i + 1] - tokens[i]}
            self._span(f"decode {model}", times[i], times[i + 1], wrote, inside)

    def _span(
        self,
        name: str,
        start: float,
        end: float,
        attributes: Attributes,
        parent: Context,
        kind: SpanKind = SpanKind.INTERNAL,
        error: str | None = None,
        events: Sequence[Event] = (),
    ) -> Context:
        """Writes a span, its times in seconds (monotonic), and returns the context of those inside it."""
        attributes = attributes if error is None else {**attributes, "error.type": error}
        span = self._tracer.start_span(name, parent, kind, attributes, start_time=self._at(start))
        for at, what, details in events:
            span.add_event(what, details, self._at(at))
        if error is not None:
            span.set_status(StatusCode.ERROR)
        span.end(self._at(end))
        return trace.set_span_in_context(span)

    def _at(self, seconds: float) -> int:
        """Returns a time in nanoseconds since 1970."""
        return self._ahead + int(seconds * 1e9)


def _attributes(timeline: Timeline, writers: Sequence[str]) -> Attributes:
    """Returns what the span of a choice says of it."""
    choice, params = timeline.choice, timeline.choice.params
    found: dict[str, AttributeValue | None] = {
        "gen_ai.request.model": writers[0],
        "gen_ai.response.model": writers[-1],
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.response.finish_reasons": [timeline.finish_reason or ""],
        "gen_ai.usage.input_tokens": len(choice.prompt.ids),
        "gen_ai.usage.cache_read.input_tokens": choice.cached_tokens,
        "gen_ai.usage.output_tokens": choice.num_tokens,
        "gen_ai.latency.time_in_queue": timeline.queue_seconds,
        "gen_ai.latency.time_to_first_token": between(timeline.arrival, timeline.first_token),
        "gen_ai.latency.time_in_model_prefill": timeline.prefill_seconds,
        "gen_ai.latency.time_in_model_decode": timeline.decode_seconds,
        "gen_ai.latency.e2e": between(timeline.arrival, timeline.ended),
    }
    return {name: value for name, value in found.items() if value is not None}
