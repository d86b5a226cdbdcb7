"""Spans by OpenTelemetry's SDK, which comes with Ray: into the run directory, and to where its own variables say.

RUN/spans.jsonl holds OTLP's JSON, one line for each tree of spans: what the specification calls a file exporter, and a
collector's `otlpjsonfile` receiver reads. Each step is a trace of its own, linked to the run's: a trace of a whole run
is more than any store takes. The SDK is loaded when a run begins.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict, deque
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from ray_ep.driver.ending import STATUS
from ray_ep.driver.records import Event, StepRecord, now
from ray_ep.errors import BadInput
from ray_ep.observe.trackers.spans import PREFIX, Span, Spans, Value, nanoseconds
from ray_ep.observe.trackers.told import Told

FILE, OLDER = "spans.jsonl", "spans.1.jsonl"
"""Files of the run directory: the newest spans, and those before."""
MOST_BYTES = 64 << 20
"""Size at which the newest become the older ones, and those of before are gone."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OTLP = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
_REMEMBERED = 2000  # spans that later ones may be linked to


def _set(names: Sequence[str]) -> str:
    """The first of these variables that is set; OpenTelemetry's own, as its specification has them."""
    return next((os.environ[n].strip() for n in names if os.environ.get(n, "").strip()), "")


def wanted() -> list[EntryPoint]:
    """Exporters that OTEL_TRACES_EXPORTER names, or OTLP's where only an endpoint is given; none: the file alone.

    Raises:
        BadInput: one is not installed, or a protocol is none of OTLP's.
    """
    names = [n.strip() for n in _set(["OTEL_TRACES_EXPORTER"]).split(",") if n.strip()]
    if not names and _set(_ENDPOINTS):
        names = ["otlp"]
    found = []
    for name in dict.fromkeys(names):
        if name == "none":
            continue
        there = [e for n in _entries(name) for e in entry_points(group="opentelemetry_traces_exporter", name=n)]
        if not there:
            how = "install the package that has it"
            if name == "otlp":
                grpc = _set(_PROTOCOLS) == "grpc"
                how = f"pip install {'opentelemetry-exporter-otlp-proto-grpc' if grpc else repr('ray_ep[otel]')}"
            raise BadInput(f"tracking.to=otel: the exporter {name!r} (OTEL_TRACES_EXPORTER) is not installed: {how}")
        found.append(there[0])
    return found


def _entries(name: str) -> list[str]:
    """Names under which an exporter may be installed."""
    if name != "otlp":
        return [name]
    protocol = _set(_PROTOCOLS)
    if protocol and protocol not in _OTLP:
        raise BadInput(f"{_PROTOCOLS[1]}={protocol!r}: expected {' or '.join(_OTLP)}")
    return [_OTLP[protocol]] if protocol else list(_OTLP.values())


def check_exporters() -> None:
    """As `wanted`."""
    wanted()


class _Words(logging.Handler):
    """The last two warnings of OpenTelemetry's own: why nothing arrives; without it these go to the terminal."""

    def __init__(self) -> None:
        super().__init__()
        self._last: deque[str] = deque(maxlen=2)

    def emit(self, record: logging.LogRecord) -> None:
        self._last.append(" ".join(record.getMessage().split()))

    def __str__(self) -> str:
        return " ".join(self._last) or "no reason given"


class OpenTelemetry:
    """Spans of a run, as they are made known."""

    def __init__(self, told: Told):
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        self._spans, self._why = Spans(told.run_dir, told.start), ""
        resource = Resource.create({f"{PREFIX}run": told.run_dir.name})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "ray_ep"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporters = [e.load()() for e in wanted()]
        self._failed, self._raised, self._closing = [False] * len(self._exporters), False, False
        self._words = _Words()
        logging.getLogger("opentelemetry").addHandler(self._words)
        for place in range(len(self._exporters)):
            self._provider.add_span_processor(self._processor(place))
        self._tracer = self._provider.get_tracer("ray_ep", version_of("ray_ep"))
        self._known: OrderedDict[str, Any] = OrderedDict()  # key -> context
        self._file = _File(told.run_dir, resource)
        # Ends last; all others are linked to it.
        self._run: Any = self._tracer.start_span("run", _nowhere(), start_time=nanoseconds(told.start.at))

    def _processor(self, place: int) -> Any:
        """One that sends in batches, from a thread of its own, and notes whether they arrive."""
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

        exporter, outer = self._exporters[place], self

        class Noting(SpanExporter):
            def export(self, spans: Any) -> Any:
                if outer._closing and outer._failed[place]:  # it would try each batch for ten seconds
                    return SpanExportResult.FAILURE
                result = exporter.export(spans)
                outer._failed[place] = outer._failed[place] or result is not SpanExportResult.SUCCESS
                return result

            def shutdown(self) -> None:
                exporter.shutdown()

        return BatchSpanProcessor(Noting())

    def step(self, record: StepRecord) -> None:
        """A step, its phases, and what came after it."""
        self._send(self._spans.of_step(record))

    def event(self, event: Event) -> None:
        """What an event ends."""
        if event.kind in STATUS:
            self._why = event.words
        self._send(self._spans.of_event(event))

    def close(self, status: str) -> None:
        """The run's own span, and what waits to be sent."""
        span = self._spans.of_run(now(), status, self._why)
        self._file.write(self._ended(self._run, span))
        self._closing = True
        self._provider.shutdown()
        logging.getLogger("opentelemetry").removeHandler(self._words)
        self._check()

    def _send(self, spans: Sequence[Span]) -> None:
        from opentelemetry.trace import Link

        for span in spans:
            contexts = [self._run.get_span_context(), *(self._known[k] for k in span.links if k in self._known)]
            made = self._tracer.start_span(
                span.name, context=_nowhere(), links=[Link(c) for c in contexts], start_time=span.start
            )
            if span.key:
                self._known[span.key] = made.get_span_context()
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
            self._file.write(self._ended(made, span))
        self._check()

    def _ended(self, made: Any, span: Span) -> list[Any]:
        """A span that was begun, with all that it is to say and those inside it; parents come first."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        inside = set_span_in_context(made)
        below = [
            each
            for child in span.children
            for each in self._ended(self._tracer.start_span(child.name, inside, start_time=child.start), child)
        ]
        made.set_attributes(dict(span.attributes))
        if span.failed:
            made.set_status(Status(StatusCode.ERROR, span.failed))
        made.end(span.end)
        return [made, *below]

    def _check(self) -> None:
        """Say once that what is sent does not arrive."""
        if any(self._failed) and not self._raised:
            self._raised = True
            raise ConnectionError(f"spans do not arrive where OTEL_* variables say: {self._words}")


def _nowhere() -> Any:
    """A context without a span: what is begun in it is the root of a trace."""
    from opentelemetry.context import Context

    return Context()


class _File:
    """spans.jsonl."""

    def __init__(self, run_dir: Path, resource: Any):
        self._path, self._older = run_dir / FILE, run_dir / OLDER
        self._resource = {"attributes": _pairs(resource.attributes)}

    def write(self, spans: Sequence[Any]) -> None:
        """One line for a tree; a sampler, or OTEL_SDK_DISABLED, may have left it out."""
        if not hasattr(spans[0], "instrumentation_scope"):
            return
        scope = spans[0].instrumentation_scope
        told = {"scope": {"name": scope.name, "version": scope.version or ""}, "spans": [_otlp(s) for s in spans]}
        tree = {"resourceSpans": [{"resource": self._resource, "scopeSpans": [told]}]}
        line = json.dumps(tree, separators=(",", ":"))
        if self._path.exists() and self._path.stat().st_size + len(line) > MOST_BYTES:
            os.replace(self._path, self._older)
        with open(self._path, "a", encoding="utf-8") as f:
            f.write(line + "\n")


def _otlp(span: Any) -> dict[str, Any]:
    """A span as OTLP's JSON has it: ids in hexadecimal, 64-bit numbers as text."""
    told = {
        "traceId": f"{span.context.trace_id:032x}",
        "spanId": f"{span.context.span_id:016x}",
        "name": span.name,
        "kind": 1,  # internal
        "startTimeUnixNano": str(span.start_time),
        "endTimeUnixNano": str(span.end_time),
        "attributes": _pairs(span.attributes),
        "links": [{"traceId": f"{k.context.trace_id:032x}", "spanId": f"{k.context.span_id:016x}"} for k in span.links],
        "status": {"code": 2, "message": span.status.description or ""} if not span.status.is_unset else {},
    }
    return told if span.parent is None else {**told, "parentSpanId": f"{span.parent.span_id:016x}"}


def _pairs(attributes: Any) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Value) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    return {"arrayValue": {"values": [_value(v) for v in value]}}
