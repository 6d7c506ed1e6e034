"""Draws docs/images/trace.png: the spans of one request, as the server exports them.

    PYTHONPATH=. python docs/draw_trace.py

serves configs/multi.py in this process, asks it for a fan-out with a handoff, and draws the spans of the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
from draw import BAND, BLUE, INK, LINE, PAPER, SAND, heading, write
from matplotlib import pyplot
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from icarus_jax import cli
from icarus_jax.server.app import create_app
from icarus_jax.server.tracing import Traces

IMAGE = Path(__file__).resolve().parent / "images" / "trace.png"
WIDTH, ROW, LABELS = 11.0, 0.27, 3.3  # inches
COLOURS = ("#0969da", "#1a7f37", "#bf3989", "#9a6700")  # of the models that decode
QUESTION = (
    "The capital of {} is a large city. Write down what you know of its history, and of the people who live there."
)
REQUEST = {"models": ["smollm2-135m-instruct", "sql", "math"], "max_tokens": 48, "temperature": 0, "ignore_eos": True}


def record() -> list[ReadableSpan]:
    """The spans of the second of two requests: the first has the programs compiled."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    served = cli.build(cli.load_config("multi.py"))
    served.start()
    app = create_app(served.engine, served.tokenizer, served.eos_ids, served.loader, traces=Traces(provider))

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            for country in ("Spain", "France"):
                exporter.clear()
                body = {"prompt": QUESTION.format(country) * 12, "handoff": [{"on": ".", "model": "intent"}], **REQUEST}
                (await client.post("/v1/completions", json=body, timeout=None)).raise_for_status()

    asyncio.run(ask())
    served.engine.shutdown()
    return list(exporter.get_finished_spans())


def tree(spans: list[ReadableSpan], parent: int | None = None, depth: int = 0) -> Iterator[tuple[int, ReadableSpan]]:
    """Each span after the one that it lies in, with its depth."""
    inside = [span for span in spans if (span.parent.span_id if span.parent else None) == parent]
    for span in sorted(inside, key=lambda span: span.start_time):
        yield depth, span
        yield from tree(spans, span.context.span_id, depth + 1)


def note(span: ReadableSpan) -> str:
    said = span.attributes or {}
    if "gen_ai.usage.input_tokens" in said:
        prompt, cached = said["gen_ai.usage.input_tokens"], said["gen_ai.usage.cache_read.input_tokens"]
        return f"{prompt} prompt tokens, {cached} of them cached"
    return f"{said['icarus.decode.tokens']} tokens" if "icarus.decode.tokens" in said else ""


def draw(spans: list[ReadableSpan]) -> None:
    rows = list(tree(spans))
    begin, end = rows[0][1].start_time, rows[0][1].end_time
    scale = (WIDTH - LABELS - 0.2) / (end - begin)
    height = 0.75 + ROW * len(rows)
    figure = pyplot.figure(figsize=(WIDTH, height), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    heading(axes, 0.15, 0.32, "One request: three models, one prefill, and a handoff", 12)
    decoding = [str(span.attributes["gen_ai.response.model"]) for _, span in rows if span.name.startswith("decode ")]
    colours = dict(zip(dict.fromkeys(decoding), COLOURS, strict=False))
    for i, (depth, span) in enumerate(rows):
        top = 0.55 + i * ROW
        if i % 2:
            axes.axhspan(top, top + ROW, color=BAND, linewidth=0)
        write(axes, 0.15 + 0.22 * depth, top + ROW / 2, span.name, 9, va="center")
        left, width = LABELS + (span.start_time - begin) * scale, (span.end_time - span.start_time) * scale
        fill = {"queue": PAPER, "prefill": SAND}.get(span.name, BLUE)
        if span.name.startswith("decode "):
            fill = colours[str(span.attributes["gen_ai.response.model"])]
        axes.barh(top + ROW / 2, max(width, 0.02), ROW * 0.6, left, color=fill, edgecolor=LINE, linewidth=0.7)
        ink = PAPER if span.name.startswith("decode ") else INK
        write(axes, left + 0.06, top + ROW / 2, note(span), 7.5, va="center", color=ink, clip_on=True)
        for event in span.events:
            at = LABELS + (event.timestamp - begin) * scale
            axes.plot([at], [top + ROW / 2], marker="D", color=INK, markersize=5)
            write(axes, at + 0.08, top + ROW / 2, event.name, 7.5, va="center")
    figure.savefig(IMAGE, dpi=110, pil_kwargs={"optimize": True})
    print(IMAGE)


if __name__ == "__main__":
    draw(record())
