"""A cheap HTTP/1.1 client: one request, sent again on each of N kept-alive connections as soon as it is answered.

It shares the machine with the server it measures, so it does little: one `asyncio.Protocol` per connection under
uvloop, in a process of its own, the same for every server. Every response is checked: its status, that it is whole
(its length, or the last chunk), and that it holds the marks it is told to expect.
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import uvloop

WARM_UP_S = 0.3


def measure(
    url: str,
    body: bytes,
    marks: list[str],
    connections: int,
    seconds: float,
    *,
    pause_s: float = 0.0,
    key: str = "none",
) -> dict[str, float]:
    """Run the client for a while, and return requests/s, latencies in ms, and its own share of a core.

    `pause_s` is how long each connection waits between an answer and its next request.

    Raises:
        RuntimeError: a response was not what it must be; nothing is reported then.
    """
    order = {
        "url": url,
        "body": body.decode(),
        "marks": marks,
        "connections": connections,
        "seconds": seconds,
        "pause_s": pause_s,
        "key": key,
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"], input=json.dumps(order), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"load on {url}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout))


class Run:
    """What all connections share."""

    def __init__(self, request: bytes, marks: list[bytes], seconds: float, pause_s: float) -> None:
        self.request = request
        self.pause_s = pause_s
        self.marks = marks
        self.from_s = time.perf_counter() + WARM_UP_S
        self.until_s = self.from_s + seconds
        self.latencies_s: list[float] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, why: str) -> None:
        if not self.over.done():
            self.over.set_exception(RuntimeError(why))


class Connection(asyncio.Protocol):
    def __init__(self, run: Run) -> None:
        self.run = run
        self.received = b""
        self.sent_s = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.received = b""
        self.sent_s = time.perf_counter()
        self.transport.write(self.run.request)

    def data_received(self, data: bytes) -> None:
        self.received = received = self.received + data if self.received else data
        if not is_whole(received):
            return
        now, run = time.perf_counter(), self.run
        if not received.startswith(b"HTTP/1.1 200 ") or not all(mark in received for mark in run.marks):
            run.fail(f"not the answer that was expected: {received[:2000]!r}")
            return
        if self.sent_s >= run.from_s and now < run.until_s:
            run.latencies_s.append(now - self.sent_s)
        if now < run.until_s and run.pause_s:
            asyncio.get_running_loop().call_later(run.pause_s, self.send)
        elif now < run.until_s:
            self.send()
        elif not run.over.done():
            run.over.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.run.fail("the server closed a connection")


def is_whole(received: bytes) -> bool:
    """Whether these bytes are one complete response; only one is ever under way on a connection."""
    head = received.find(b"\r\n\r\n")
    if head < 0:
        return False
    at = received.find(b"content-length:", 0, head)
    if at < 0:
        return received.endswith(b"\r\n0\r\n\r\n")
    return len(received) >= head + 4 + int(received[at + 15 : received.find(b"\r\n", at)])


async def _run(order: dict[str, Any]) -> dict[str, float]:
    target, body = urlsplit(order["url"]), order["body"].encode()
    head = (
        f"POST {target.path} HTTP/1.1\r\nhost: {target.netloc}\r\nauthorization: Bearer {order['key']}\r\n"
        f"content-type: application/json\r\naccept: */*\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    run = Run(head.encode() + body, [mark.encode() for mark in order["marks"]], order["seconds"], order["pause_s"])
    loop = asyncio.get_running_loop()
    for _ in range(order["connections"]):
        await loop.create_connection(lambda: Connection(run), target.hostname, target.port)
    began, used = time.perf_counter(), _cpu_s()
    await run.over
    share = (_cpu_s() - used) / (time.perf_counter() - began)
    took = sorted(run.latencies_s)
    return {
        "requests_per_s": len(took) / order["seconds"],
        "p50_ms": statistics.median(took) * 1000,
        "p99_ms": took[int(len(took) * 0.99)] * 1000,
        "requests": len(took),
        "client_core_share": share,
    }


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    gc.disable()
    print(json.dumps(uvloop.run(_run(json.load(sys.stdin)))))
