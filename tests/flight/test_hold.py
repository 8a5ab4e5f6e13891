"""Answers under way have a limit in bytes, each and together; what is beyond it costs nobody a word."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.cache.link import Link
from app.domain import Endpoint, Timings
from app.errors import Incomplete, StreamLost
from app.flight.flight import Flight, Seat, Ticket
from app.flight.flights import Flights
from app.flight.names import Position
from app.flight.ride import Ride
from app.observe import metrics
from tests.conftest import RedisServer, Running, chat, make_settings, until
from tests.flight.asking import Asking, boarded, on_loop, script_of

LIMIT = 2**16
EVENT = b'data: {"id":"i","created":1,"choices":[{"index":0,"delta":{"content":"' + b"x" * 4000 + b'"}}]}\n\n'
EVENTS = 100
WORD = "x" * 8000 + " "


def ticket(key: str = "a" * 64, *, is_kept: bool = False) -> Ticket:
    return Ticket(key, Endpoint.CHAT, "tenant t", "m@0", is_stream=True, is_shared=True, is_kept=is_kept)


class Model:
    """Says EVENTS events as fast as they are taken from it."""

    def __init__(self) -> None:
        self.said = self.runs = 0

    async def fly(self, _: Flight) -> AsyncGenerator[bytes, None]:
        self.runs += 1
        for _ in range(EVENTS):
            self.said += 1
            yield EVENT
            await asyncio.sleep(0)


@pytest.fixture
async def flights(tmp_path: Path, shared_redis: RedisServer) -> AsyncIterator[Flights]:
    settings = make_settings(tmp_path, shared_redis, flight_max_bytes=LIMIT, flights_max_bytes=2**20)
    link = Link(settings, shared_redis.url)
    flights = Flights(settings, link, shared_redis.url, is_alone=True)
    yield flights
    await flights.close()
    await link.close()
    assert flights.size_bytes == 0, "what nobody needs is not counted any more"


async def read(seat: Seat, pause_s: float = 0.0) -> int:
    count = 0
    async for number, event in seat.events():
        count += 1
        assert (number, event) == (count, EVENT)
        await asyncio.sleep(pause_s)
    return count


async def settled(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_flight_beyond_its_limit_holds_no_more_than_its_readers_need(flights: Flights) -> None:
    model, most = Model(), 0
    with flights.board(ticket(), model.fly, is_streaming=True) as seat:
        flight = seat.flight
        async for _ in seat.events():
            most = max(most, flight.size_bytes)
        assert (seat.read, flight.is_closed, flight.said) == (EVENTS, True, EVENTS)
    assert most <= LIMIT + 2 * len(EVENT)
    assert flight.size_bytes == 0


async def test_a_generation_waits_for_its_only_reader(flights: Flights) -> None:
    model = Model()
    with flights.board(ticket(), model.fly, is_streaming=True) as seat:
        await settled(lambda: seat.flight.is_closed)
        await asyncio.sleep(0.05)
        assert model.said < EVENTS / 2, "it went on though nobody read"
        assert seat.flight.size_bytes <= LIMIT + 2 * len(EVENT)
        assert await read(seat) == EVENTS


async def test_who_comes_late_to_a_closed_flight_gets_one_of_his_own(flights: Flights) -> None:
    model = Model()
    with flights.board(ticket(), model.fly, is_streaming=True) as first:
        await settled(lambda: first.flight.is_closed)
        with flights.board(ticket(), model.fly, is_streaming=True) as late:
            assert late.is_first
            assert await asyncio.gather(read(first), read(late)) == [EVENTS, EVENTS]
    assert model.runs == 2


async def test_who_reads_slowly_is_put_off_where_others_have_read_all(
    flights: Flights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flights._hold, "_patience_s", 0.3)
    model, before = Model(), metrics.flight_put_off._value.get()
    with ExitStack() as seats:
        fast, slow = (seats.enter_context(flights.board(ticket(), model.fly, is_streaming=True)) for _ in range(2))
        slowly = asyncio.create_task(read(slow, pause_s=0.05))
        assert await read(fast) == EVENTS
        with pytest.raises(StreamLost):
            await slowly
    assert model.runs == 1
    assert metrics.flight_put_off._value.get() == before + 1


async def test_who_comes_aboard_at_the_last_moment_has_time_to_catch_up(flights: Flights) -> None:
    model = Model()
    with flights.board(ticket(), model.fly, is_streaming=True) as first:
        reading = asyncio.create_task(read(first))
        while first.flight.size_bytes < LIMIT - 2 * len(EVENT):
            await asyncio.sleep(0)
        assert not first.flight.is_closed
        with flights.board(ticket(), model.fly, is_streaming=True) as second:
            assert await asyncio.gather(reading, read(second)) == [EVENTS, EVENTS]
    assert model.runs == 1


async def test_who_reads_nothing_is_put_off_in_time(flights: Flights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights._hold, "_patience_s", 0.1)
    model = Model()
    with flights.board(ticket(), model.fly, is_streaming=True) as seat:
        await settled(lambda: seat.flight.is_over)
        assert model.said < EVENTS, "the engine is freed"
        assert seat.flight.size_bytes == 0
        with pytest.raises(StreamLost):
            await read(seat)


async def test_together_they_have_a_limit_too_and_the_largest_meets_it(flights: Flights) -> None:
    """Each is below its own limit."""
    flights._hold._all_bytes = 40_000

    async def stands_still(said: int) -> AsyncGenerator[bytes, None]:
        for _ in range(said):
            yield EVENT
        await asyncio.Event().wait()

    with ExitStack() as seats:
        boarded = [
            seats.enter_context(flights.board(ticket(f"{n}" * 64), lambda _, n=n: stands_still(n), is_streaming=True))
            for n in (1, 8, 2)
        ]
        await settled(lambda: any(seat.flight.is_closed for seat in boarded))
        assert [seat.flight.is_closed for seat in boarded] == [False, True, False]


async def test_who_wants_a_body_is_told_at_once_that_this_flight_cannot_give_it(flights: Flights) -> None:
    model = Model()
    with ExitStack() as seats:
        body, stream = (
            seats.enter_context(flights.board(ticket(), model.fly, is_streaming=streams)) for streams in (False, True)
        )
        asked = asyncio.create_task(Ride(body, False, False, {}, Timings()).answer())
        reading = asyncio.create_task(read(stream))
        with pytest.raises(Incomplete):
            await asked
        assert stream.read < EVENTS
        assert await reading == EVENTS


async def test_nobody_comes_back_to_a_closed_flight(flights: Flights) -> None:
    model = Model()
    with flights.board(ticket(is_kept=True), model.fly, is_streaming=True) as seat:
        position = Position(seat.flight.uid, "abcdef", False)
        assert await read(seat) == EVENTS
    async with flights.resume(position, ["tenant t"]) as back:
        assert back is None
    assert flights._kept == {}


async def test_a_closed_flight_that_everybody_left_ends(flights: Flights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its ticket says that clients may come back to it for a long time."""
    model = Model()
    with flights.board(ticket(is_kept=True), model.fly, is_streaming=True) as seat:
        await settled(lambda: seat.flight.is_closed)
    await settled(lambda: seat.flight.is_over)
    assert model.said < EVENTS


def test_all_get_the_whole_text_through_the_door(serve: Callable[..., Running]) -> None:
    """A stream goes on; a body that joined it is generated for itself; who comes later leads again."""
    running = serve(is_driven=True, flight_max_bytes=LIMIT)
    stream = Asking(running.url, chat(stream=True))
    first = script_of(running)
    body = Asking(running.url, chat())
    until(lambda: boarded(running) == 2)
    for _ in range(10):
        on_loop(running, first.say, WORD)
    own = script_of(running)
    late = Asking(running.url, chat(stream=True))
    again = script_of(running)
    for _ in range(10):
        on_loop(running, first.say, WORD)
    for script in (own, again):
        for _ in range(20):
            on_loop(running, script.say, WORD)
    for script in (first, own, again):
        on_loop(running, script.finish)
    assert {asked.done().text for asked in (stream, body, late)} == {WORD * 20}
    assert stream.is_whole
    assert late.is_whole
    assert body.response.status_code == 200
    with running.client() as client:
        said = client.get("/metrics").text
    assert 'refrain_flight_closed_total{limit="own"}' in said
    assert json.loads("\n".join(body.lines))["usage"]["completion_tokens"] == 20
