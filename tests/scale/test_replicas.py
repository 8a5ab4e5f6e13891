"""The load generator for replicas: what it counts, and that a server which stands still cannot hide it."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from benchmarks.openloop import Client
from benchmarks.replicas import drive, figures, question
from tests.conftest import Running

ANSWER = b'HTTP/1.1 200 OK\r\nx-cache: hit\r\n\r\ndata: {"content":"yes","completion_tokens":1}\n\ndata: [DONE]\n\n'
STALL_S = 0.8


@contextmanager
def answering(stall_at: int | None = None, answer: bytes = ANSWER) -> Iterator[str]:
    """A server in a thread of its own that answers at once, but for one call at which all of it stands still."""
    loop, ready, urls, numbers = asyncio.new_event_loop(), threading.Event(), [], itertools.count(1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        if next(numbers) == stall_at:
            time.sleep(STALL_S)
        writer.write(answer)
        writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
        urls.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        ready.set()

    def run() -> None:
        loop.run_until_complete(listen())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def test_a_stall_is_charged_to_all_who_came_meanwhile_and_to_one_where_clients_wait() -> None:
    """Of 2 s the server stood still for 0.8: whoever asks at a fixed rate sees it in four of ten calls."""
    with answering(stall_at=75) as url:
        found = figures(await drive([url], 150.0, 2.0, seed=1), 150.0, 2.0)
    assert found["errors"] == 0
    assert found["whole_p99_ms"] > STALL_S * 1000 * 0.9
    assert found["first_p90_ms"] > STALL_S * 1000 * 0.5
    with answering(stall_at=75) as url:
        client = Client(url)
        while len(client.outcomes) < 1000:  # so many that what this machine adds is not one in a hundred
            await client.closed("waits", 1, 0.5, lambda: question(1, 1))
        waited = figures(client.outcomes, 0.0, 2.0)
    assert waited["whole_p99_ms"] < STALL_S * 1000 * 0.5, "the way of counting that hides it does not hide it here"
    assert max(each.done_s for each in client.outcomes) > STALL_S * 0.8


async def test_a_client_that_comes_late_is_charged_for_it_and_says_so() -> None:
    with answering() as url:
        asyncio.get_running_loop().call_later(0.3, time.sleep, 0.5)
        found = figures(await drive([url], 100.0, 1.0, seed=2), 100.0, 1.0)
    assert found["client_late_p99_ms"] > 400
    assert found["whole_p99_ms"] >= found["client_late_p99_ms"] * 0.95


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 503 Busy\r\n\r\n{}", ANSWER.removesuffix(b"data: [DONE]\n\n"), b"", b"no HTTP at all\r\n"],
    ids=["refused", "cut", "closed", "foreign"],
)
async def test_what_is_not_a_whole_answer_is_an_error_and_never_came(answer: bytes) -> None:
    with answering() as well, answering(answer=answer) as ill:
        outcomes = await drive([well, ill], 60.0, 0.5, seed=3)
    alone, both = figures([each for each in outcomes if each.who == ill], 30.0, 0.5), figures(outcomes, 60.0, 0.5)
    assert 0 < alone["errors"] == both["errors"] < len(outcomes)
    assert alone["answered_per_s"] == 0
    assert alone["whole_p50_ms"] is both["whole_p99_ms"] is None


async def test_a_call_that_takes_too_long_is_given_up() -> None:
    with answering(stall_at=1) as url:
        outcomes = await drive([url], 40.0, 0.3, seed=4, timeout_s=0.2)
    assert figures(outcomes, 40.0, 0.3)["errors"] > 0


async def test_nobody_there_is_errors_and_no_exception() -> None:
    outcomes = await drive(["http://127.0.0.1:9"], 40.0, 0.2, seed=5)
    assert figures(outcomes, 40.0, 0.2)["errors"] == len(outcomes) > 0


async def test_two_replicas_share_one_redis_and_the_seed_says_what_is_asked(serve: Callable[..., Running]) -> None:
    namespace = {"redis_namespace": "replicas", "redis_timeout_s": 5.0}
    urls = [serve(**namespace).url, serve(**namespace).url]
    first, second = [await drive(urls, 80.0, 1.0, seed=6) for _ in range(2)]
    assert [each.at_s for each in first] == [each.at_s for each in second]
    found, again = figures(first, 80.0, 1.0), figures(second, 80.0, 1.0)
    assert found["errors"] == again["errors"] == 0
    assert found["hit_share"] < again["hit_share"] == 1.0, "the same prompts, so every one is there now"
