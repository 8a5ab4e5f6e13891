"""One generation and those aboard: its events in memory, its end, and the seats of who reads them. No Redis here."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import zlib
from array import array
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from app import wire
from app.domain import Caller, Endpoint, Timings
from app.errors import AppError, Incomplete, StreamLost
from app.flight import names
from app.flight.names import Position

# What an event takes in memory beside its bytes: the objects around it and its checksum.
_EVENT_OVERHEAD_BYTES = 64


async def _at_once() -> None:
    return


@dataclass(frozen=True, slots=True)
class Ticket:
    """What is asked of a flight.

    `key`: calls with equal keys may share one. `owner`: who may come back to its stream. `weights`: whose answer it is.
    `is_stream`: the form in which this process would lead it. `is_shared`: others may come aboard, and carry it on.
    `is_kept`: it goes on when everybody has left, and can be come back to. `caller`: pays what nobody aboard does.
    `can_lead`, `wait`: whether this process
    could generate now, and to wait until it can (raises AppError).
    """

    key: str
    endpoint: Endpoint
    owner: str
    weights: str
    is_stream: bool
    is_shared: bool
    is_kept: bool
    caller: Caller = field(default_factory=Caller)
    can_lead: Callable[[], bool] = lambda: True
    wait: Callable[[], Awaitable[None]] = _at_once


@dataclass(eq=False)
class Flight:
    """Absent, failed and finished are three things: `error` is set, or `is_finished`, or it still flies.

    `is_closed`: nobody comes aboard any more, and of `events` only those are held that somebody aboard has still to
    read; `dropped` went before them. `on_weight` hears of every change of `size_bytes`.
    """

    ticket: Ticket
    uid: str
    is_stream: bool
    timings: Timings = field(default_factory=Timings)
    events: list[bytes] = field(default_factory=list)
    dropped: int = 0
    checks: array[int] = field(default_factory=lambda: array("I"))
    error: AppError | None = None
    is_finished: bool = False
    is_led_here: bool = False
    was_streamed: bool = False
    may_record: bool = True
    identity: wire.Identity | None = None
    is_closed: bool = False
    size_bytes: int = 0
    seats: set[Seat] = field(default_factory=set)
    pilot: asyncio.Task[None] | None = None
    on_weight: Callable[[Flight, int], None] = lambda _flight, _bytes: None
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.is_finished or self.error is not None

    @property
    def said(self) -> int:
        """How many events there have been so far."""
        return self.dropped + len(self.events)

    def add(self, event: bytes) -> None:
        """One more event of the stream, or the body."""
        if not self.said:
            with contextlib.suppress(Incomplete):  # embeddings as plain bytes, which have no name
                self.identity = wire.identity_of(self.ticket.endpoint, event)
        self.checks.append(self.check(event, self.checks[-1] if self.checks else 0))
        self.events.append(event)
        self._weigh(_weight(event))
        self.trim()
        self.wake()

    def close(self) -> None:
        """Take nobody aboard any more, and hold no more than those aboard need."""
        self.is_closed = True
        self.trim()
        self.wake()

    def trim(self) -> None:
        """Where it is closed: drop what everybody has read. Who waits for a whole body is not waited for."""
        if not self.is_closed:
            return
        needed = min((seat.read for seat in self.readers), default=self.said)
        gone = self.events[: max(0, needed - self.dropped)]
        if gone:
            del self.events[: len(gone)]
            self.dropped += len(gone)
            self._weigh(-sum(map(_weight, gone)))

    @property
    def readers(self) -> list[Seat]:
        """Those aboard who read event by event."""
        return [seat for seat in self.seats if seat.is_reading]

    def _weigh(self, change_bytes: int) -> None:
        self.size_bytes += change_bytes
        self.on_weight(self, change_bytes)

    def check(self, event: bytes, before: int) -> int:
        """The checksum that goes on over one more event, less the names and the time, which each generation makes up.

        Against accidents, not forgers: whose stream it is is asked apart.
        """
        return zlib.crc32(_nameless(event, self.identity), before)

    def finish(self) -> None:
        if not self.is_over:
            self.is_finished = True
        self.wake()

    def fail(self, error: AppError) -> None:
        if not self.is_over:
            self.error = error
        self.wake()

    def wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def news(self) -> None:
        """Return at the next event, or the end."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future


def settle(flight: Flight) -> float:
    """Device-seconds that the flight used and nobody has paid for yet; who asks pays them."""
    timings = flight.timings
    due, timings.paid_s = timings.device_s - timings.paid_s, timings.device_s
    return due


class Seat:
    """One client's place on a flight. `is_first`: it took off for this one; all others share it.

    `read`: how many of the flight's events it has had. `is_reading`: it reads them one by one, and has not been put
    off. `held_up_s`: how long others waited for it. `leave`: give the place up before its context ends.
    """

    def __init__(
        self, flight: Flight, *, is_first: bool, is_streaming: bool = True, position: Position | None = None
    ) -> None:
        self.flight = flight
        self.is_first = is_first
        self.is_reading = is_streaming
        self.read = position.number if position else 0
        self.held_up_s = 0.0
        self.leave: Callable[[], None] = lambda: None
        self._position = position
        # Kept streams are found again under names of their own, whoever generates them by then.
        keeps_names = is_first and not (flight.ticket.is_shared and flight.ticket.is_kept)
        self._rider = names.FIRST if keeps_names else names.new_rider()
        self._own: Position | None = position

    def position(self, *, wants_usage: bool) -> Position:
        """Where this client's stream is: what it came back with, or the beginning of a new one."""
        if self._own is None:  # not before there is an event: until then a flight may take another's name
            self._own = Position(self.flight.uid, self._rider, wants_usage)
        return self._own

    def pay(self) -> float:
        """What this client pays when it leaves: the first aboard all that was used by then, the last what is left."""
        is_last = not self.flight.seats - {self}
        return settle(self.flight) if self.is_first or is_last else 0.0

    async def opened(self) -> bool:
        """Wait for the first event; whether the flight is a stream, and not one body.

        Raises:
            AppError: the flight failed before it. `StreamLost`: it has not the events that this client saw.
        """
        while not self.flight.said and not self.flight.is_over:
            await self.flight.news()
        if not self.flight.said and self.flight.error is not None:
            raise _again(self.flight.error)
        return self.flight.is_stream

    def put_off(self) -> None:
        """As if its client had left, who reads too slowly and will be told so when it reads on."""
        self.is_reading = False
        self.leave()

    async def events(self) -> AsyncGenerator[tuple[int, bytes], None]:
        """The events after the seat's position, each with its number, as they come.

        Raises:
            AppError: the flight failed. `StreamLost`: its events are not those that this client saw, or it read
                them too slowly.
        """
        at, flight = self.read, self.flight
        while flight.said < at and not flight.is_over:
            await flight.news()
        if at and (flight.said < at or (self._position and flight.checks[at - 1] != self._position.check)):
            raise _again(flight.error) if flight.error else lost()
        while True:
            while self.read < flight.said and self.is_reading:
                event = flight.events[self.read - flight.dropped]
                self.read += 1
                if flight.is_closed:
                    flight.trim()
                    flight.wake()  # its pilot may wait for room
                yield self.read, event
            if not self.is_reading:
                raise StreamLost("this stream was read too slowly to be held any longer; ask again")
            if flight.error is not None:
                raise _again(flight.error)
            if flight.is_finished:
                return
            await flight.news()

    async def whole(self) -> list[bytes]:
        """All events (or the one body), once it ended well.

        Raises:
            AppError: it did not. Incomplete: it became too large to be held as a whole.
        """
        while not self.flight.is_over and not self.flight.dropped:
            await self.flight.news()
        if self.flight.error is not None:
            raise _again(self.flight.error)
        if self.flight.dropped:
            raise Incomplete("the stream is not held as a whole")
        return self.flight.events


def checks_of(endpoint: Endpoint, events: Sequence[bytes], identity: wire.Identity) -> Iterator[int]:
    """What `Flight.checks` would be for these events."""
    check = 0
    for event in events:
        check = zlib.crc32(_nameless(event, identity), check)
        yield check


def _weight(event: bytes) -> int:
    return len(event) + _EVENT_OVERHEAD_BYTES


def _nameless(event: bytes, identity: wire.Identity | None) -> bytes:
    if identity is None:
        return event
    ident, created = identity
    event = event.replace(ident.encode(), b"")
    return event if created is None else event.replace(str(created).encode(), b"")


def lost() -> StreamLost:
    return StreamLost("this stream cannot be gone on with from here; ask again without Last-Event-ID")


def _again(error: AppError) -> AppError:
    """Several clients get the same error, each as an exception of its own."""
    return copy.copy(error).with_traceback(None)
