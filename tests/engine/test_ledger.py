"""Device-seconds of the real engine: what calls are charged is what it was busy."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.conftest import TEST_HOME, Process, until
from tests.engine.conftest import wait_idle
from tests.ledger.reading import records

pytestmark = pytest.mark.engine

CHAT = "/v1/chat/completions"


def busy_s(server: Process) -> float:
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith('refrain_device_seconds{state="busy"}')).split()[1])


def ask(server: Process, **fields: Any) -> str:
    """A call of its own, to its end or to its first word; its id."""
    ident = secrets.token_hex(8)
    is_left = fields.pop("is_left", False)
    body = {"messages": [{"role": "user", "content": f"{ident}: count to ten, please."}], "max_tokens": 12} | fields
    with (
        server.client(headers={"x-request-id": ident}) as client,
        client.stream("POST", CHAT, json=body) as answer,
    ):
        assert answer.status_code == 200
        next(answer.iter_bytes()) if is_left else answer.read()
    return ident


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "stream": True},
    {"temperature": 1},
    {"temperature": 1, "n": 3},
    {"temperature": 0, "stream": True, "max_tokens": 4000, "is_left": True},
    {"temperature": 0, "max_tokens": 1},
]


def test_the_calls_device_seconds_are_those_that_the_engine_was_busy(
    engine_server: Process, http: httpx.Client
) -> None:
    before = busy_s(engine_server)
    with ThreadPoolExecutor(6) as pool:
        asked = list(pool.map(lambda kind: ask(engine_server, **kind), KINDS * 2))
    wait_idle(http)  # what was left goes on for a moment; its records come before those of the next calls
    alone = [ask(engine_server, temperature=0) for _ in range(3)]
    idents = {*asked, *alone}

    def found() -> dict[str, Any]:
        return {record.id: record for record in records(TEST_HOME, kind="call") if record.id in idents}

    calls = until(lambda: (there := found()).keys() == idents and there)
    spent_s = busy_s(engine_server) - before
    # What an abandoned generation was at work on when its client left is its tenant's, in a record of its own.
    since = min(record.time - record.total_s for record in calls.values())
    rest = [record for record in records(TEST_HOME, kind="rest") if record.time >= since]
    charged_s = sum(record.device_s for record in [*calls.values(), *rest])
    assert charged_s == pytest.approx(spent_s, rel=0.01, abs=0.02)
    assert all(record.device_s > 0 for record in calls.values())

    # The least disturbed of them: what goes to and fro between the processes is not in all of these figures.
    ratios = [calls[ident].device_s / (calls[ident].prefill_s + calls[ident].decode_s) for ident in alone]
    assert min(abs(ratio - 1) for ratio in ratios) < 0.5, f"alone, its time is all the engine's: {ratios}"
    shared_s = sum(calls[ident].prefill_s + calls[ident].decode_s for ident in asked)
    assert sum(calls[ident].device_s for ident in asked) < shared_s, "in a batch each pays a part"
    assert {calls[ident].finish for ident in asked} == {"whole", "left"}
