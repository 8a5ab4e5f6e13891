"""Clients of the real server, and what all its tests ask it.

Its home is kept between runs and its cache with it, so the first call of a test says `no-cache`: generated
anew, and recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Process, until

MODEL = "smollm2-135m-instruct"
# Not of France: there the first token is a tie in bfloat16, which engines decide differently (benchmarks/LOG.md).
QUESTION = [{"role": "user", "content": "What is the capital of Germany?"}]
CHAT = "/v1/chat/completions"
ANEW = {"Cache-Control": "no-cache"}
ONLY_CACHED = {"Cache-Control": "only-if-cached"}
# What the engine works on, and what clients wait for: this one is more, as calls wait for a turn.
RUNNING, IN_FLIGHT = "vllm:num_requests_running", "refrain_generations_in_flight"
# Two busy cores give a few tokens a second; this is how long a hang takes to be one.
PATIENCE_S = 240


@pytest.fixture
def http(engine_server: Process) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=engine_server.url, timeout=PATIENCE_S) as client:
        wait_idle(client)
        yield client


@pytest.fixture
def client(engine_server: Process, http: httpx.Client) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{engine_server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 32} | fields


def payloads(stream: str) -> list[Any]:
    """What each event of a stream holds; "[DONE]" as itself."""
    data = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def wait_idle(http: httpx.Client, timeout_s: float = PATIENCE_S) -> None:
    """Until the engine has nothing to do. What a client left a moment ago would be counted with what comes next, and in
    bfloat16 a text may depend on what else is in the batch."""
    until(lambda: metric(http, IN_FLIGHT) == 0 and metric(http, RUNNING) == 0, timeout_s, 0.05)


def metric(http: httpx.Client, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    assert samples, f"there is no metric {name}"
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())
