"""The journey of a call. Read it from top to bottom; every other room is a detail of one of its steps.

```
1. plan      is this call's answer anybody else's too? under which key?     cache.key, cache.policy
2. recall    an answer that was given before                               cache.store
3. board     a generation of this very answer that is under way, or begin one    flight
4. wait      for an engine that still loads, within bounds                 engine.state
5. generate  the engine's answer, live                                     engine
6. record    if it ended well, and before its clients see the end          cache.store
```
Steps 4 to 6 are the flight's own and run in its task, for everybody aboard. What is refused is refused before the
first byte. Nothing here knows HTTP, Redis or vLLM.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from app import wire
from app.cache.key import cache_key, is_deterministic, why_uncacheable
from app.cache.policy import Directives
from app.cache.recording import Recording
from app.cache.reuse import reads_the_same_streamed
from app.cache.store import Slot, Store, age_s
from app.domain import Answer, CacheStatus, Call, Caller, Endpoint, Form, Reply, Timings, Weights
from app.engine import Engine
from app.errors import Incomplete, NotCached, NotFound
from app.flight.flight import Flight, Ticket, lost
from app.flight.flights import Flights
from app.flight.names import Position
from app.flight.ride import Ride
from app.observe import metrics
from app.settings import Settings

# The closing usage event is asked of the engine for each of these streams, since a later client may want it.
_USAGE_ON_REQUEST = (Endpoint.CHAT, Endpoint.COMPLETIONS)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the cache may do for one call. Without a slot: nothing, for this reason."""

    slot: Slot | None
    may_read: bool
    may_write: bool
    directives: Directives
    bypass_reason: str | None = None

    @property
    def status(self) -> CacheStatus:
        """What `x-cache` says if the answer has to be generated."""
        return CacheStatus.MISS if self.slot and self.may_write else CacheStatus.BYPASS


@dataclass(frozen=True, slots=True)
class Boarding:
    """A client aboard a flight: `status` is known at once, `reply` once there is something to send."""

    ride: Ride
    status: CacheStatus
    weights: str
    key: str | None
    alone: Callable[[], Awaitable[Reply]] | None = None

    @property
    def endpoint(self) -> Endpoint:
        return self.ride.seat.flight.ticket.endpoint

    async def reply(self) -> Reply:
        """Raises AppError: refused or broken before there was anything to send."""
        try:
            answer = await self.ride.answer()
        except Incomplete:  # the shared stream has no body in it (a tool's input that was cut short)
            if self.alone is None:
                raise
            return await self.alone()
        metrics.child(metrics.calls, self.endpoint.label, self.status.value).inc()
        return Reply(answer, self.status, self.weights, self.key, stream_id=self.ride.stream_id)


class Service:
    """One model, one engine, one cache."""

    def __init__(self, settings: Settings, weights: Weights, engine: Engine, store: Store, flights: Flights) -> None:
        self._settings = settings
        self.weights = weights
        self.engine = engine
        self.store = store
        self.flights = flights

    # 1 -------------------------------------------------------------------------------------------

    def plan(self, call: Call, directives: Directives) -> Plan:
        """Whether this call has a key that others may share, and which."""
        reason = self._why_bypass(call)
        if reason is not None:
            metrics.bypasses.labels(reason).inc()
            return Plan(None, False, False, directives, reason)
        key = cache_key(call, self.weights, tenant=call.caller.tenant)
        slot = Slot(call.caller.tenant, self.weights.name, key)
        return Plan(slot, not directives.no_cache, not directives.no_store, directives)

    def _why_bypass(self, call: Call) -> str | None:
        if self._settings.cache == "off":
            return "off"
        if reason := why_uncacheable(call, self.weights):
            return reason
        if (
            self._settings.responses_store
            and call.endpoint is Endpoint.RESPONSES
            and call.body.get("store") is not False
        ):
            return "stored"  # its id must be one that the engine can be asked for
        if self._settings.cache == "deterministic" and not is_deterministic(call, self.weights):
            return "not_deterministic"
        return None

    # 2 -------------------------------------------------------------------------------------------

    async def recall(self, call: Call, plan: Plan) -> Reply | None:
        """The answer from a recording, under a fresh id and in the form that this client asked for.

        Raises:
            NotCached: `only-if-cached`, and there is none that the call accepts.
        """
        began = time.perf_counter()
        if plan.slot is not None and plan.may_read:
            recording = await self.store.find(plan.slot)
            if recording is not None and plan.directives.accepts(age := age_s(recording)):
                _count_hit(call, recording)
                answer = _replay(recording, call)
                answer.timings.cache_s = time.perf_counter() - began
                return Reply(answer, CacheStatus.HIT, self.weights.short, plan.slot.key, int(age))
        if plan.directives.only_if_cached:
            raise NotCached("the answer is not in the cache, and the request allows nothing else")
        return None

    # 3 -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def aboard(
        self, call: Call, plan: Plan, *, looked_s: float, position: Position | None = None
    ) -> AsyncIterator[Boarding]:
        """A seat on the flight that answers this call; leaving the context gives it up.

        `looked_s` went into `recall`. With a position the client comes back to a stream that it lost.

        Raises:
            StreamLost: its stream is gone, and generating again would not give the same.
        """
        ticket = self._ticket(call, plan)
        timings = Timings(cache_s=looked_s)
        key = plan.slot.key if plan.slot else None
        if position is not None:
            async with self.flights.resume(position, call.caller.tenant) as seat:
                if seat is not None:
                    metrics.child(metrics.resumed, "flight").inc()
                    ride = Ride(seat, True, position.wants_usage, call.body, timings)
                    yield Boarding(ride, CacheStatus.SHARED, self.weights.short, key)
                    return
            if not ticket.is_shared:
                raise lost()
            metrics.child(metrics.resumed, "again").inc()
        with self.flights.board(
            ticket,
            lambda flight: self._flown(call, plan, flight),
            is_streaming=call.is_streaming,
            position=position,
        ) as seat:
            wants_usage = position.wants_usage if position else call.wants_usage_event
            ride = Ride(seat, call.is_streaming, wants_usage, call.body, timings)
            status = plan.status if seat.is_first else CacheStatus.SHARED
            yield Boarding(ride, status, self.weights.short, key, lambda: self._alone(call, plan))
            if not seat.is_first and seat.flight.is_finished:
                _count_saved(seat.flight.timings)

    @asynccontextmanager
    async def back_aboard(self, position: Position | None, caller: Caller) -> AsyncIterator[Boarding]:
        """A seat on the flight of a stream that this client lost, from there on. Raises NotFound."""
        if position is None:
            raise NotFound("this is no id of a stream")
        async with self.flights.resume(position, caller.tenant) as seat:
            if seat is None:
                raise NotFound("there is no such stream any more; ask again")
            metrics.child(metrics.resumed, "flight").inc()
            ride = Ride(seat, True, position.wants_usage, {}, Timings())
            yield Boarding(ride, CacheStatus.SHARED, self.weights.short, None)

    async def _alone(self, call: Call, plan: Plan) -> Reply:
        """A body generated for this call by itself. Raises AppError."""
        async with self.aboard(call, replace(plan, slot=None), looked_s=0.0) as boarding:
            return await boarding.reply()

    def _ticket(self, call: Call, plan: Plan) -> Ticket:
        """Calls that may read and write the same entry share a flight; every other has one of its own."""
        is_shared = plan.slot is not None and plan.may_read and plan.may_write
        is_stream = call.is_streaming or (is_shared and reads_the_same_streamed(call))
        is_kept = self._settings.stream_resume_s > 0 and is_stream and not plan.directives.no_store
        key = plan.slot.key if plan.slot is not None and is_shared else secrets.token_hex(32)
        return Ticket(key, call.endpoint, call.caller.tenant, is_stream, is_shared, is_kept)

    # 4, 5, 6 -------------------------------------------------------------------------------------

    async def _flown(self, call: Call, plan: Plan, flight: Flight) -> AsyncGenerator[bytes, None]:
        """What everybody aboard gets: the engine's events, usage and all, or its one body; recorded on the way.

        Raises:
            AppError: refused or broken. Cancelling frees the engine.
        """
        if plan.slot is not None and flight.ticket.is_shared:  # it may have landed between the look and the boarding
            recording = await self.store.find(plan.slot)
            if recording is not None and plan.directives.accepts(age_s(recording)):
                flight.timings = _timings(recording)
                for event in _in_form(recording, call.endpoint, is_stream=flight.is_stream):
                    yield event
                return
        began = time.perf_counter()
        await self.engine.state.ready(self._settings.loading_wait_s)
        with metrics.in_flight.track_inprogress():
            answer = await self.engine.answer(_in_engine_form(call, is_stream=flight.is_stream))
            flight.timings = answer.timings
            if answer.body is not None:
                await self._record_body(call, plan, flight, answer.body, began)
                yield answer.body
                return
            kept = _Kept(self._settings.cache_max_entry_bytes * 8)  # it compresses, but not that well
            assert answer.events is not None  # noqa: S101 - an answer has one form or the other
            async with aclosing(answer.events) as events:  # type: ignore[type-var]
                async for event in events:
                    kept.add(event)
                    if wire.is_last(call.endpoint, event):
                        await self._record_events(call, plan, flight, kept, began)
                    yield event

    async def _record_body(self, call: Call, plan: Plan, flight: Flight, body: bytes, began: float) -> None:
        if plan.slot is None or not (plan.may_write and flight.may_record):
            return
        document = json.loads(body)
        try:
            wire.check_body(call.endpoint, document)
        except Incomplete:
            metrics.not_recorded.labels("incomplete").inc()
            return
        await self._keep(call, plan.slot, Form.BODY, document, (body, b"", b""), began)

    async def _record_events(self, call: Call, plan: Plan, flight: Flight, kept: _Kept, began: float) -> None:
        if plan.slot is None or not (plan.may_write and flight.may_record):
            return
        if kept.is_too_large:
            metrics.not_recorded.labels("too_large").inc()
            return
        try:
            document = wire.fold(call.endpoint, kept.events)
        except Incomplete:
            metrics.not_recorded.labels("incomplete").inc()
            return
        await self._keep(call, plan.slot, Form.EVENTS, document, wire.split_usage(call.endpoint, kept.events), began)

    async def _keep(
        self,
        call: Call,
        slot: Slot,
        form: Form,
        document: dict[str, Any],
        parts: tuple[bytes, bytes, bytes],
        began: float,
    ) -> None:
        prompt_tokens, completion_tokens = wire.usage(call.endpoint, document)
        ident, created = wire.identity(call.endpoint, document)
        recording = Recording(
            form=form,
            recorded_at=time.time(),
            ident=ident,
            created=created,
            head=parts[0],
            usage=parts[1],
            tail=parts[2],
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            seconds=time.perf_counter() - began,
        )
        if await self.store.keep(slot, recording):
            metrics.recorded.labels(call.endpoint.label).inc()


# --- pure helpers of the steps, in the order they are used -----------------------------------------


def _count_hit(call: Call, recording: Recording) -> None:
    metrics.child(metrics.calls, call.endpoint.label, "hit").inc()
    _count_saved(_timings(recording))
    metrics.seconds_saved.inc(recording.seconds)


def _count_saved(timings: Timings) -> None:
    metrics.child(metrics.tokens_saved, "prompt").inc(timings.prompt_tokens or 0)
    metrics.child(metrics.tokens_saved, "completion").inc(timings.completion_tokens or 0)


def _replay(recording: Recording, call: Call) -> Answer:
    """The recorded answer as this client wants it: either form serves both."""
    timings = _timings(recording)
    fresh = (wire.new_id(call.endpoint), int(time.time()))
    old = (recording.ident, recording.created)
    if call.is_streaming:
        if recording.form is Form.BODY:
            head, usage, tail = wire.split_usage(call.endpoint, wire.unfold(call.endpoint, json.loads(recording.head)))
            content = head + usage + tail if call.wants_usage_event else head + tail
        else:
            content = recording.content(with_usage=call.wants_usage_event)
        return Answer(events=_in_pieces(wire.freshen(call.endpoint, content, old, fresh, call.body)), timings=timings)
    if recording.form is Form.EVENTS:
        folded = wire.fold(call.endpoint, wire.split(recording.content()))
        content = json.dumps(folded, ensure_ascii=False, separators=(",", ":")).encode()
    else:
        content = recording.head
    return Answer(body=wire.freshen(call.endpoint, content, old, fresh, call.body), timings=timings)


async def _in_pieces(content: bytes) -> AsyncGenerator[bytes, None]:
    """Whole events, a few kilobytes at a time, so that a long replay neither blocks the loop nor fills a buffer."""
    at = 0
    while at < len(content):
        end = content.find(b"\n\n", at + _PIECE_BYTES)
        end = len(content) if end < 0 else end + 2
        yield content[at:end]
        at = end


_PIECE_BYTES = 8192


def _in_engine_form(call: Call, *, is_stream: bool) -> Call:
    """The call as the engine is asked: in the flight's form, and for the closing usage event in every stream."""
    body = call.body
    if is_stream != call.is_streaming:
        body = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
        body |= {"stream": True} if is_stream else {}
    if is_stream and call.endpoint in _USAGE_ON_REQUEST:
        options = body.get("stream_options")
        if options is None or isinstance(options, dict):  # anything else the engine refuses in its own words
            body = body | {"stream_options": (options or {}) | {"include_usage": True}}
    return call if body is call.body else replace(call, body=body)


def _in_form(recording: Recording, endpoint: Endpoint, *, is_stream: bool) -> list[bytes]:
    """The recorded answer as a flight's events, usage and all, or as its one body."""
    if is_stream:
        if recording.form is Form.EVENTS:
            return wire.split(recording.content())
        return wire.unfold(endpoint, json.loads(recording.head))
    if recording.form is Form.BODY:
        return [recording.head]
    folded = wire.fold(endpoint, wire.split(recording.content()))
    return [json.dumps(folded, ensure_ascii=False, separators=(",", ":")).encode()]


def _timings(recording: Recording) -> Timings:
    return Timings(prompt_tokens=recording.prompt_tokens, completion_tokens=recording.completion_tokens)


class _Kept:
    """The events of one generation, for its recording, as long as they are not too many."""

    def __init__(self, room_bytes: int) -> None:
        self.events: list[bytes] = []
        self._room_bytes = room_bytes

    @property
    def is_too_large(self) -> bool:
        return self._room_bytes < 0

    def add(self, event: bytes) -> None:
        self._room_bytes -= len(event)
        if self.is_too_large:
            self.events.clear()
        else:
            self.events.append(event)
