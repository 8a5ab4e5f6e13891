"""Traces, by a collector of our own on a real socket: one trace per call, through gate, cache, flight and engine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app.errors import StartRefused
from app.main import open_tracer
from tests.conftest import REPOSITORY, Running, chat, until

PATH = "/v1/chat/completions"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET = "mellon-and-a-prompt"


class Collector:
    """What an OTLP collector got, span by span."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.raw = b""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                collector.raw += content
                for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
                    named = {each.key: each.value.string_value for each in resource.resource.attributes}
                    collector.services.add(named["service.name"])
                    collector.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def named(self, trace_id: str) -> dict[str, Any]:
        return {span.name: span for span in list(self.spans) if span.trace_id.hex() == trace_id}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    found = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_a_call_is_one_trace_and_its_callers(serve: Callable[..., Running], collector: Collector) -> None:
    server = serve(traces=True)
    with server.client(headers={"traceparent": PARENT}) as client:
        response = client.post(PATH, json=chat(SECRET, stream=True))
        assert response.status_code == 200
    parts = {f"POST {PATH}", "gate", "cache", "flight", "turn", "engine", "queue", "prefill", "decode", "record"}
    until(lambda: set(collector.named(PARENT[3:35])) == parts)
    spans = collector.named(PARENT[3:35])
    call = spans[f"POST {PATH}"]
    assert call.parent_span_id.hex() == PARENT[36:52]
    for name in ("gate", "cache", "flight", "turn", "engine"):
        assert spans[name].parent_span_id == call.span_id, name
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent_span_id == spans["engine"].span_id
        assert spans["engine"].start_time_unix_nano <= spans[name].start_time_unix_nano + 10**8
    told = {each.key: each.value for each in call.attributes}
    assert told["http.response.status_code"].int_value == 200
    assert told["refrain.cache"].string_value == "miss"
    assert told["refrain.request_id"].string_value == response.headers["x-request-id"]
    assert collector.services == {"refrain"}
    assert SECRET.encode() not in collector.raw


def test_a_hit_is_a_span_also_in_the_protocol(serve: Callable[..., Running], collector: Collector) -> None:
    server = serve(traces=True)
    with server.client() as client:
        for _ in range(6):
            last = client.post(PATH, json=chat())
        assert last.headers["x-cache"] == "hit"

    def caches() -> list[str]:
        return [
            each.value.string_value
            for span in list(collector.spans)
            for each in span.attributes
            if each.key == "refrain.cache"
        ]

    until(lambda: len(caches()) == 6)
    assert sorted(caches()) == ["hit"] * 5 + ["miss"]
    assert len({span.trace_id for span in collector.spans}) == 6


def test_errors_are_told_without_what_the_client_sent(serve: Callable[..., Running], collector: Collector) -> None:
    server = serve(traces=True)
    with server.client(headers={"traceparent": PARENT, "authorization": f"Bearer {SECRET}"}) as client:
        assert client.post(PATH, json=chat(model=SECRET)).status_code == 404
    until(lambda: f"POST {PATH}" in collector.named(PARENT[3:35]))
    assert "gate" in collector.named(PARENT[3:35])
    assert SECRET.encode() not in collector.raw


def test_a_log_line_names_its_trace_and_traceparent_nonsense_is_none(
    serve: Callable[..., Running], collector: Collector, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(traces=True, log_format="json")
    with server.client() as client:
        client.post(PATH, json=chat("traced"), headers={"traceparent": PARENT})
        client.post(PATH, json=chat("untraced"), headers={"traceparent": "00-zz-\xff-01".encode("latin-1")})
    until(lambda: len(collector.spans) > 5)
    server.stop()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    traces = [line["trace"] for line in lines if line.get("logger") == "app.access"]
    assert PARENT[3:35] in traces
    assert len(set(traces)) >= 2


def test_a_collector_that_is_away_holds_nobody_up(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    server = serve(traces=True)
    with server.client() as client:
        assert [client.post(PATH, json=chat(f"{number}")).status_code for number in range(5)] == [200] * 5
    server.stop()


def test_without_traces_nothing_of_it_is_loaded() -> None:
    program = "import sys, app.main; print({'app.observe.otel', 'opentelemetry.exporter'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()"


def test_without_opentelemetry_it_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "app.observe.otel", raising=False)
    with pytest.raises(StartRefused, match=r"pip install 'refrain\[otel\]'"):
        open_tracer()
