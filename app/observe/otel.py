"""Spans to an OpenTelemetry collector: over OTLP, as the standard `OTEL_*` variables say (endpoint, headers, sampler,
service name). Prompts, answers and keys are in none of them. Needs `refrain[otel]`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace import Tracer as Vendor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.observe.traces import Phases, current

_SHOWN_PATH = 200
_w3c = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class _Call:
    """One call's span, and what its parts stand under."""

    vendor: Vendor
    span: Span
    context: Context

    def child(self, name: str, began_ns: int, ended_ns: int, error: BaseException | None, phases: Phases) -> None:
        part = self.vendor.start_span(name, self.context, start_time=began_ns)
        if error is not None:  # its kind alone: a message may hold what the client sent
            part.set_status(Status(StatusCode.ERROR, type(error).__name__))
        within, at = set_span_in_context(part, self.context), ended_ns
        for phase, seconds in reversed(list(phases())):
            if seconds is not None:
                began = at - round(max(0.0, seconds) * 1e9)
                self.vendor.start_span(phase, within, start_time=began).end(at)
                at = began
        part.end(ended_ns)

    def carrier(self) -> Mapping[str, str]:
        headers: dict[str, str] = {}
        _w3c.inject(headers, self.context)
        return headers


class OtelTracer:
    """A `Tracer` that sends spans in batches, from a thread of its own; what a collector does not take is dropped."""

    def __init__(self, version: str, exporter: SpanExporter | None = None) -> None:
        named = Resource({SERVICE_NAME: "refrain", "service.version": version})
        self._provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._vendor = self._provider.get_tracer("refrain", version)

    def begin(self, headers: Iterable[tuple[bytes, bytes]], method: str, path: str) -> str:
        call = self._call(_carried(headers), method, path, time.time_ns())
        current.set(call)
        return f"{call.span.get_span_context().trace_id:032x}"

    def note(
        self, request_id: str, method: str, path: str, status: int, seconds: float, told: Mapping[str, Any]
    ) -> None:
        call = current.get()
        if not isinstance(call, _Call):
            call = self._call({}, method, path, time.time_ns() - round(seconds * 1e9))
        call.span.set_attribute("http.response.status_code", status)
        call.span.set_attribute("refrain.request_id", request_id)
        call.span.set_attributes({f"refrain.{name}": value for name, value in told.items() if value not in ("", None)})
        if status >= 500:
            call.span.set_status(Status(StatusCode.ERROR))
        call.span.end()
        current.set(None)

    def close(self) -> None:
        self._provider.shutdown()

    def _call(self, carried: Mapping[str, str], method: str, path: str, began_ns: int) -> _Call:
        shown = path[:_SHOWN_PATH]
        span = self._vendor.start_span(
            f"{method} {shown}",
            _w3c.extract(carried),
            SpanKind.SERVER,
            {"http.request.method": method, "url.path": shown},
            start_time=began_ns,
        )
        return _Call(self._vendor, span, set_span_in_context(span, Context()))


def _carried(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in headers
        if name in (b"traceparent", b"tracestate")
    }
