"""Boarding, leading, following, taking over, leaving: the flights of one process.

```
board    a flight of this key is here: take a seat. Else begin one, in a task of its own (its pilot)
pilot    lease taken: lead.   Held by another process: follow its live stream.   No Redis: lead, alone
follow   the leader's lease ran out: one of the followers takes it, generates again, and goes on where it was
leave    somebody is left, here or elsewhere: it goes on. Nobody: it ends at once, or after `stream_resume_s`
```
It knows nothing of what is generated: `Takeoff` is the service's. What breaks in Redis ends here: a flight without
it is shared within its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager

from app import wire
from app.cache.link import Link
from app.cache.seal import Purpose, Seal
from app.domain import Endpoint
from app.errors import AppError, Broken, Diverged, Draining, EngineFailed, Incomplete, LeaseLost, RedisDown
from app.flight import names
from app.flight.flight import Flight, Seat, Ticket, lost, settle
from app.flight.hold import Hold
from app.flight.idempotency import Claims
from app.flight.lease import Boarded, Lease, Leases
from app.flight.live import Following, Reader, Script, Told
from app.flight.logbook import DIVERGED, LogBook, Unreadable
from app.flight.names import Position
from app.flight.publisher import Publisher
from app.observe import metrics
from app.settings import Settings

log = logging.getLogger(__name__)

Takeoff = Callable[[Flight], AsyncGenerator[bytes, None]]

# The statuses of what is wrong with this server, or with how much a tenant asks of it, and not with the call.
UNAVAILABLE = (429, 503)
# How long a stream is looked for that a client comes back to.
FIND_S = 0.5


class Flights:
    """All flights of this process. `is_alone`: no other process shares the Redis, so nothing is published there.
    `on_rest` hears of device-seconds that no client aboard paid for."""

    def __init__(self, settings: Settings, link: Link, url: str, *, is_alone: bool) -> None:
        self._settings = settings
        self.is_alone = is_alone
        self._script = Script(Seal(Purpose.LIVE, settings.cache_secrets, encrypts=settings.cache_encrypt))
        self._leases = Leases(settings, link)
        self.claims = Claims(settings, self._leases)
        self._reader = Reader(settings, link, url, self._script)
        self._by_key: dict[str, Flight] = {}
        self._by_uid: dict[str, Flight] = {}
        self._kept: dict[str, Flight] = {}
        self._held: dict[Flight, Lease] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._hold = Hold(settings, self._spawn)
        self.on_rest: Callable[[Ticket, float], None] = lambda ticket, device_s: None

    async def close(self) -> None:
        """End what flies here. Other processes that follow carry it on."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._reader.close()

    @property
    def size_bytes(self) -> int:
        """What all flights take of this process's memory."""
        return self._hold.bytes

    # --- getting on and off --------------------------------------------------------------------

    @contextmanager
    def board(
        self, ticket: Ticket, takeoff: Takeoff, *, is_streaming: bool, position: Position | None = None
    ) -> Iterator[Seat]:
        """A seat on the flight of this key, which begins if there is none. Leaving the context leaves the flight."""
        flight = self._by_key.get(ticket.key) if ticket.is_shared else None
        is_first = flight is None or flight.is_over or flight.is_closed
        if flight is None or is_first:
            flight = Flight(ticket, names.new_uid(ticket.key), ticket.is_stream)
            self._hold.take(flight)
            self._by_key[ticket.key] = self._by_uid[flight.uid] = flight
            flight.pilot = self._spawn(self._pilot(flight, takeoff), "flight")
        metrics.child(metrics.boarded, "leader" if is_first else "follower").inc()
        flight.was_streamed |= is_streaming
        seat = Seat(flight, is_first=is_first, is_streaming=is_streaming, position=position)
        with self._seated(seat):
            yield seat

    def flies(self, ticket: Ticket) -> bool:
        """Whether a call with this ticket would share a flight that is under way here."""
        flight = self._by_key.get(ticket.key) if ticket.is_shared else None
        return flight is not None and not flight.is_over

    def launch(self, ticket: Ticket, takeoff: Takeoff) -> None:
        """Fly for no client, unless the same flies already: what comes of it is recorded on the way."""
        if ticket.key not in self._by_key:
            self._spawn(self._launched(ticket, takeoff), "flight-launched")

    async def _launched(self, ticket: Ticket, takeoff: Takeoff) -> None:
        with self.board(ticket, takeoff, is_streaming=False) as seat:
            try:
                await seat.whole()
            except AppError as error:
                log.warning("a refresh failed, and what is there stays: %s", error.message)
            except Incomplete as error:
                log.warning("a refresh was given up, and what is there stays: %s", error)

    @asynccontextmanager
    async def resume(
        self, position: Position, owners: Collection[str], *, here_alone: bool = False
    ) -> AsyncIterator[Seat | None]:
        """A seat on a flight that this client was on, here or elsewhere; None where it cannot be found any more.

        `here_alone`: elsewhere it is not looked for. Who knows the call boards with the position instead, and can then
        carry on what its leader left.
        """
        flight = self._by_uid.get(position.uid)
        if flight is None and not here_alone:
            flight = await self._found_elsewhere(position.uid)
        if flight is None or flight.is_closed or flight.ticket.owner not in owners:
            yield None
            return
        with self._seated(Seat(flight, is_first=False, position=position)) as seat:
            yield seat

    @contextmanager
    def _seated(self, seat: Seat) -> Iterator[Seat]:
        seat.flight.seats.add(seat)
        seat.leave = lambda: self._left(seat)
        try:
            yield seat
        finally:
            self._left(seat)

    def _left(self, seat: Seat) -> None:
        flight = seat.flight
        if seat not in flight.seats:
            return
        flight.seats.discard(seat)
        flight.trim()
        flight.wake()
        if not flight.seats:
            self._hold.leave(flight) if flight.is_over else self._deserted(flight)
        self._settle_rest(flight)

    def _deserted(self, flight: Flight) -> None:
        if not _is_awaited(flight) and flight not in self._held:
            self._end(flight)  # at once: the engine is freed before anything else happens
        else:
            self._spawn(self._end_when_nobody_is_left(flight), "deserted")

    async def _end_when_nobody_is_left(self, flight: Flight) -> None:
        if _is_awaited(flight):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.stream_resume_s):
                    while not (flight.seats or flight.is_over or flight.is_closed):
                        await flight.news()
        while not flight.seats and not flight.is_over:
            if flight.is_closed or not await self._is_followed(flight):
                if not flight.seats:
                    self._end(flight)
                return
            await asyncio.sleep(self._settings.flight_lease_s / 3)  # as often as followers say that they are there

    async def _is_followed(self, flight: Flight) -> bool:
        """Whether other processes follow it; where none does, its lease is given up."""
        lease = self._held.get(flight)
        if lease is None:
            return False
        try:
            return await lease.abandon()
        except RedisDown:
            return False

    # --- flying --------------------------------------------------------------------------------

    async def _pilot(self, flight: Flight, takeoff: Takeoff) -> None:
        try:
            await self._fly(flight, takeoff)
        except asyncio.CancelledError:
            flight.fail(Draining("the server stopped before the answer was complete", retry_after_s=5))
            raise
        except AppError as error:
            flight.fail(error)
        except Exception:  # a fault of ours, at the edge of its task: who waits must hear of it
            log.exception("a flight broke")
            flight.fail(Broken("the server failed on this answer; its log names the reason"))
        finally:
            self._landed(flight)

    async def _fly(self, flight: Flight, takeoff: Takeoff) -> None:
        if self.is_alone or not _is_published(flight.ticket):
            await self._lead(flight, takeoff, None)
            return
        try:
            if not flight.ticket.can_lead() and not await self._leases.is_held(flight.ticket.key):
                await flight.ticket.wait()  # a lease held by who cannot generate would hold up those who can
            boarded = await self._leases.board(flight.ticket.key, flight.uid)
            while boarded.lease is None:
                self._take_name(flight, boarded.uid)
                followed = await self._follow(flight)
                if followed is None:
                    return
                boarded = followed
            self._take_name(flight, boarded.uid)
            if boarded.is_inherited and not flight.said:
                await self._read_what_was_flown(flight)
        except (RedisDown, Unreadable):  # the answer is generated here, and continues what was sent already
            await self._lead(flight, takeoff, None)
            return
        if boarded.is_inherited:
            metrics.child(metrics.boarded, "takeover").inc()
        if flight.is_over or (flight.events and not flight.is_stream):  # the leader had said it all, but for the end
            flight.finish()
            with contextlib.suppress(RedisDown, LeaseLost):
                await boarded.lease.publish(is_last=True)
            return
        await self._lead(flight, takeoff, boarded.lease)

    async def _lead(self, flight: Flight, takeoff: Takeoff, lease: Lease | None) -> None:
        """Generate, tell everybody aboard, and, with a lease, the world."""
        flight.is_led_here = True
        if not flight.events:
            flight.is_stream = flight.ticket.is_stream
        splice = wire.Splice(flight.ticket.endpoint, flight.events) if flight.events else None
        async with self._publishing(flight, lease) as publisher:
            try:
                async with aclosing(takeoff(flight)) as events:
                    async for event in events:
                        if publisher is not None:
                            publisher.say(event)
                        fresh = splice.fit(event) if splice else event
                        if fresh is not None:
                            flight.add(fresh)
                        if flight.is_closed:
                            await self._hold.room(flight)
            except Diverged as error:
                log.warning("a flight that was taken over ends in an error: %s", error)
                raise EngineFailed(DIVERGED) from error
            flight.finish()

    @asynccontextmanager
    async def _publishing(self, flight: Flight, lease: Lease | None) -> AsyncIterator[Publisher | None]:
        """A publisher while a lease is held. What ends the context is the stream's last entry."""
        if lease is None:
            yield None
            return
        publisher = Publisher(flight, lease, self._script, self._settings)
        self._held[flight] = lease
        try:
            yield publisher
            await publisher.end(publisher.entry("end", tokens=_tokens(flight)))
        except AppError as error:
            flight.fail(error)  # before the world hears of it: clients of this process need not wait for Redis
            if error.status in UNAVAILABLE:  # this engine is down or full; another server's may not be
                await publisher.stop()
                with contextlib.suppress(RedisDown):
                    await lease.release()
                raise
            await publisher.end(publisher.entry("fail", error=Told.of(error)))
            raise
        except BaseException:  # this server stops, or nobody is left; who follows elsewhere carries it on
            await publisher.stop()
            with contextlib.suppress(RedisDown):
                await asyncio.shield(lease.release())
            raise
        finally:
            del self._held[flight]
            await publisher.stop()

    # --- following -----------------------------------------------------------------------------

    async def _follow(self, flight: Flight) -> Boarded | None:
        """Pass on what another process flies. None when it ended; else what boarding gave, once something changed.

        Raises:
            RedisDown, Unreadable: there is nothing to follow any more.
        """
        log_book = LogBook(flight)
        following = await self._reader.follow(flight.uid, log_book.take)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.flight_lease_s / 3):
                        while not flight.is_over and not log_book.is_unreadable:
                            await flight.news()
                if flight.is_over:
                    return None
                if log_book.is_unreadable:
                    raise Unreadable
                boarded = await self._leases.board(flight.ticket.key, flight.uid)
                if boarded.lease is not None:
                    await self._reader.catch_up(following)  # the last that the old leader said
                    return boarded
                if boarded.uid != flight.uid:
                    return boarded
        finally:
            self._reader.leave(following)
            with contextlib.suppress(RedisDown):
                await self._leases.leave(flight.ticket.key)

    async def _read_what_was_flown(self, flight: Flight) -> None:
        """Take over a flight that nobody here followed: what its clients have seen comes first. Raises RedisDown."""
        self._reader.leave(await self._reader.follow(flight.uid, LogBook(flight).take))

    async def _found_elsewhere(self, uid: str) -> Flight | None:
        """A flight of another process by its uid, followed from its first event; None where there is none."""
        if self.is_alone:
            return None
        flight = Flight(Ticket("", Endpoint.CHAT, "", "", True, True, True), uid, True)
        log_book = LogBook(flight)
        try:
            following = await self._reader.follow(uid, log_book.take)
        except RedisDown:
            return None
        try:  # it may be so young that nothing of it is written yet
            async with asyncio.timeout(FIND_S):
                while not (log_book.is_open or log_book.is_unreadable):
                    await flight.news()
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            self._reader.leave(following)
            raise
        known = self._by_uid.get(uid)  # another request may have found it meanwhile
        if known is not None or log_book.is_unreadable or not log_book.is_open:
            self._reader.leave(following)
            return known
        self._by_uid[uid] = flight
        self._hold.take(flight)
        flight.pilot = self._spawn(self._watch(flight, log_book, following), "flight-resumed")
        return flight

    async def _watch(self, flight: Flight, log_book: LogBook, following: Following) -> None:
        """Pass on a flight that this process could not lead: it has not seen its call."""
        unheld, beat_s = 0, self._settings.flight_lease_s / 3
        try:
            while not flight.is_over and not log_book.is_unreadable:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(beat_s):
                        await flight.news()
                        continue
                unheld = 0 if await self._leases.is_held(flight.ticket.key) else unheld + 1
                if unheld > 6:  # two leases long nobody took it over
                    break
        except RedisDown:
            pass
        finally:
            flight.fail(lost())
            self._reader.leave(following)
            self._landed(flight)

    def _end(self, flight: Flight) -> None:
        """Nobody is aboard; and from now on nobody can come aboard either."""
        if self._by_key.get(flight.ticket.key) is flight:
            del self._by_key[flight.ticket.key]
        if flight.pilot is not None:
            flight.pilot.cancel()

    # --- bookkeeping ---------------------------------------------------------------------------

    def _take_name(self, flight: Flight, uid: str) -> None:
        if uid != flight.uid:
            self._by_uid.pop(flight.uid, None)
            flight.uid = uid
            self._by_uid[uid] = flight

    def _settle_rest(self, flight: Flight) -> None:
        """What the engine did that no client was there to pay for is told of, once that is sure."""
        if flight.is_over and not flight.seats and (rest_s := settle(flight)) > 0:
            self.on_rest(flight.ticket, rest_s)

    def _landed(self, flight: Flight) -> None:
        self._settle_rest(flight)
        if self._by_key.get(flight.ticket.key) is flight:
            del self._by_key[flight.ticket.key]
        if not flight.seats:
            self._hold.leave(flight)
        elif flight.is_closed:
            self._spawn(self._hold.room(flight), "flight-room")
        if not flight.ticket.is_kept or not flight.is_finished or flight.is_closed:
            self._forget(flight)
            return
        self._kept[flight.uid] = flight
        while self._kept_bytes() > self._settings.stream_keep_bytes:
            metrics.streams_evicted.inc()
            self._forget(next(iter(self._kept.values())))
        metrics.streams_kept_bytes.set(self._kept_bytes())
        asyncio.get_running_loop().call_later(self._settings.stream_resume_s, self._forget, flight)

    def _kept_bytes(self) -> int:
        return sum(kept.size_bytes for kept in self._kept.values())

    def _forget(self, flight: Flight) -> None:
        if self._by_uid.get(flight.uid) is flight:
            del self._by_uid[flight.uid]
        if self._kept.get(flight.uid) is flight:
            del self._kept[flight.uid]
            metrics.streams_kept_bytes.set(self._kept_bytes())

    def _spawn(self, work: object, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _is_published(ticket: Ticket) -> bool:
    return ticket.is_shared or ticket.is_kept


def _is_awaited(flight: Flight) -> bool:
    """Whether a client may come back for the rest: only a stream can be gone on with."""
    return flight.ticket.is_kept and flight.was_streamed and not flight.is_closed


def _tokens(flight: Flight) -> tuple[int, int] | None:
    timings = flight.timings
    if timings.prompt_tokens is None or timings.completion_tokens is None:
        return None
    return timings.prompt_tokens, timings.completion_tokens
