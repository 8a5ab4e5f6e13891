"""Whatever redis-py may raise, nobody but the link's own room ever sees it: each class is tried, new ones too."""

from __future__ import annotations

import asyncio
import inspect
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.exceptions
import uvloop

from app.cache.link import Deadline, Link, ended
from app.cache.recording import Recording
from app.cache.store import Slot, Store
from app.domain import Call, Caller, Endpoint, Form
from app.errors import RedisDown
from app.flight.flights import Flights
from app.flight.lease import Leases
from app.flight.live import Following
from app.settings import Settings
from tests.conftest import RedisServer, chat, make_settings

ONE = Recording(Form.BODY, 1.7e9, "chatcmpl-1", 1, b"{}", b"", b"", 3, 5, 0.25, 4e9, "m@0")
SLOT = Slot("t", "m", "k" * 64)


def raised() -> list[BaseException]:
    """One of each: of redis-py, and of the system."""
    kinds = [kind for _, kind in inspect.getmembers(redis.exceptions, inspect.isclass) if issubclass(kind, Exception)]
    of_redis = [kind for kind in kinds if kind.__module__ == "redis.exceptions"]
    assert len(of_redis) > 30
    # Redirections are made of what the server says: a slot and a node.
    ours = [kind("1 127.0.0.1:7000" if issubclass(kind, redis.exceptions.AskError) else "said") for kind in of_redis]
    return [*ours, OSError("said"), ConnectionResetError(), BrokenPipeError(), TimeoutError()]


class Raising:
    """A client all of whose commands fail."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __getattr__(self, _: str) -> Any:
        async def fails(*_: Any, **__: Any) -> Any:
            raise self._error

        return fails


@pytest.fixture(params=raised(), ids=lambda error: type(error).__name__)
async def broken(request: pytest.FixtureRequest, tmp_path: Path, shared_redis: RedisServer) -> AsyncIterator[Any]:
    settings = make_settings(tmp_path, shared_redis)
    link = Link(settings, shared_redis.url)
    await link.client.aclose()
    link.client = Raising(request.param)
    yield settings, link
    await link.close()


async def test_a_question_raises_ours_or_that_it_was_wrong_for_its_key(broken: tuple[Settings, Link]) -> None:
    _, link = broken
    with pytest.raises((RedisDown, redis.exceptions.ResponseError)):
        await link.ask(lambda client: client.get("name"))


async def test_the_store_reads_a_miss_and_writes_nothing(broken: tuple[Settings, Link]) -> None:
    settings, link = broken
    store = Store(settings, link)
    assert await store.find(SLOT) is None
    link._up = True  # as if it were the first to notice
    assert await store.keep(SLOT, ONE) is False


async def test_flights_and_claims_go_on_without_redis(broken: tuple[Settings, Link]) -> None:
    settings, link = broken
    leases = Leases(settings, link)
    for question in (lambda: leases.board("k" * 64, "u"), lambda: leases.leave("k" * 64), lambda: leases.is_held("k")):
        link._up = True
        with pytest.raises(RedisDown):
            await question()
    flights = Flights(settings, link, settings.redis_url.get_secret_value(), is_alone=False)
    link._up = True
    assert await flights.claims.claim(Call(Endpoint.CHAT, chat(), Caller(), "r"), "key")
    link._up = True
    with pytest.raises(RedisDown):
        await flights._reader.follow("u" * 24, lambda _: None)
    await flights.close()


async def test_the_reader_of_live_streams_tries_again(broken: tuple[Settings, Link]) -> None:
    settings, link = broken
    reader = Flights(settings, link, settings.redis_url.get_secret_value(), is_alone=False)._reader
    reader._client = link.client
    reader._following.add(Following("n", "u" * 24, lambda _: None))
    reading = asyncio.create_task(reader._read_on())
    await asyncio.sleep(0.02)
    assert not reading.done()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_a_task_that_loses_a_cancellation_is_ended_all_the_same() -> None:
    """As `asyncio.wait_for` does on Python 3.11, in the moment in which it is done; the server's end would hang."""

    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await ended(task)
    assert task.cancelled()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_loop_that_was_busy_does_not_take_a_healthy_server_for_a_dead_one(
    tmp_path: Path, own_redis: RedisServer, loop: Callable[[], asyncio.AbstractEventLoop], is_stopped: bool
) -> None:
    """Each time the loop comes round it is held up for longer than Redis may take altogether."""
    within_s = 0.04
    other = redis.Redis.from_url(own_redis.url)
    if is_stopped:
        own_redis.send(signal.SIGSTOP)

    async def busy() -> None:
        while True:
            time.sleep(within_s * 1.5)  # that is what is tried
            if not is_stopped:
                other.ping()  # this machine may hold up a healthy server too; it has then read what was asked before
            await asyncio.sleep(0)

    async def ask() -> bool:
        link = Link(make_settings(tmp_path, own_redis, redis_timeout_s=within_s), own_redis.url)
        hog = asyncio.create_task(busy())
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(20):
                    group.create_task(link.ask(lambda client, number=number: client.set("name", number)))
        except* RedisDown:
            assert not link.is_up
        finally:
            hog.cancel()
        is_up = link.is_up
        await link.close()
        return is_up

    with other, asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(ask()) is not is_stopped


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_short_deadline_is_not_shorter_than_it_says(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """uvloop's timers count in whole milliseconds, and a part of this one has less."""

    async def wait() -> float:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            async with Deadline(0.018):
                await asyncio.sleep(60)
        return time.monotonic() - began

    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(wait()) >= 0.016


async def test_a_server_that_refuses_every_client_is_down(tmp_path: Path) -> None:
    """A Redis in protected mode, say, asked from another machine: it answers the first command so, and hangs up."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"-DENIED Redis is running in protected mode because protected mode is enabled\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        link = Link(make_settings(tmp_path, None), f"redis://127.0.0.1:{port}")
        with pytest.raises(RedisDown):
            await link.ask(lambda client: client.get("name"))
        assert not link.is_up
        await link.close()
