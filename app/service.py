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
from hashlib import sha256

from app import forms, wire
from app.cache import reuse
from app.cache.explain import Explanation, explain
from app.cache.key import cache_key, is_deterministic, why_uncacheable
from app.cache.policy import NONE, Directives
from app.cache.recording import Recording
from app.cache.refusals import Refusals
from app.cache.reuse import Rule, Shape, reads_the_same_streamed
from app.cache.store import Slot, Store, age_s
from app.domain import Answer, CacheStatus, Call, Caller, Endpoint, Form, Reply, Timings, Weights
from app.engine import Engine, Phase
from app.errors import AppError, BadCall, Incomplete, NotCached, NotFound
from app.flight.flight import Flight, Ticket, lost
from app.flight.flights import Flights
from app.flight.names import Position
from app.flight.ride import Ride
from app.observe import metrics
from app.settings import Settings

# In place of a tenant where everybody shares; no tenant can be called so.
EVERYBODY = "*"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the cache may do for one call. Without a slot: nothing, for this reason.

    The slot is its family's; there may be one of its own beside it (`exact`), for what the family's does not serve.
    """

    slot: Slot | None
    shape: Shape
    may_read: bool
    may_write: bool
    directives: Directives
    bypass_reason: str | None = None
    samples: int = 0

    @property
    def exact(self) -> Slot | None:
        return replace(self.slot, key=self.shape.key(self.slot.key)) if self.slot else None

    @property
    def status(self) -> CacheStatus:
        """What `x-cache` says if the answer has to be generated."""
        return CacheStatus.MISS if self.slot and self.may_write else CacheStatus.BYPASS


@dataclass(frozen=True, slots=True)
class Boarding:
    """A client aboard a flight. `status` is what is known at once, and is the reply's unless another server leads."""

    ride: Ride
    status: CacheStatus
    weights: str
    key: str | None
    alone: Callable[[], Awaitable[Reply]] | None = None
    instead: Callable[[AppError], Awaitable[Reply]] | None = None

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
        except AppError as error:
            if self.instead is None:
                raise
            return await self.instead(error)
        status = self.status if self.ride.seat.flight.is_led_here else CacheStatus.SHARED
        metrics.child(metrics.calls, self.endpoint.label, status.value).inc()
        return Reply(answer, status, self.weights, self.key, stream_id=self.ride.stream_id)


class Service:
    """One model, one engine, one cache."""

    def __init__(self, settings: Settings, weights: Weights, engine: Engine, store: Store, flights: Flights) -> None:
        self._settings = settings
        self.weights = weights
        self.engine = engine
        self.store = store
        self.flights = flights
        self.claims = flights.claims
        self._refusals = Refusals(settings.cache_negative_s)

    # 1 -------------------------------------------------------------------------------------------

    def plan(self, call: Call, directives: Directives) -> Plan:
        """Whether this call has a key that others may share, and which."""
        reason = self._why_bypass(call, directives)
        if reason is not None:
            metrics.bypasses.labels(reason).inc()
            return Plan(None, Shape(), False, False, directives, reason)
        relaxed, shape = reuse.family(call)
        key = cache_key(relaxed, self.weights, tenant=self._scope(call.caller))
        whose = EVERYBODY if self._settings.cache_scope == "global" else call.caller.tenant
        slot = Slot(whose, self.weights.name, key)
        samples = 0 if is_deterministic(call, self.weights) else self._samples(directives)
        return Plan(slot, shape, not directives.no_cache, not directives.no_store, directives, samples=samples)

    def _scope(self, caller: Caller) -> str:
        """The name, in every key, of those who share answers; no tenant is called like another scope's."""
        if self._settings.cache_scope == "tenant":
            return caller.tenant
        return EVERYBODY if self._settings.cache_scope == "global" else f"{caller.tenant}:{caller.key_id}"

    def _samples(self, directives: Directives) -> int:
        return self._settings.cache_samples if directives.samples is None else directives.samples

    def drawn(self, call: Call, plan: Plan) -> Plan:
        """For a call that draws from a pool of sampled answers: the plan for the one that it drew.

        Each answer of the pool has a place of its own and is generated when it is first drawn. So the draw is
        uniform from the first call on, and a call is generated only where its answer is not there yet.
        """
        if not plan.samples or plan.slot is None:
            return plan
        metrics.pool_draws.inc()
        sticky = self._settings.cache_samples_sticky if plan.directives.sticky is None else plan.directives.sticky
        user = call.body.get("user")
        if sticky and isinstance(user, str):
            number = int(sha256(f"{plan.slot.key} {user}".encode()).hexdigest(), 16) % plan.samples
        else:
            number = secrets.randbelow(plan.samples)
        key = sha256(f"{plan.shape.key(plan.slot.key)} sample {number}".encode()).hexdigest()
        return replace(plan, slot=replace(plan.slot, key=key), shape=Shape())

    def _why_bypass(self, call: Call, directives: Directives) -> str | None:
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
        if (
            self._settings.cache == "deterministic"
            and not self._samples(directives)
            and not is_deterministic(call, self.weights)
        ):
            return "not_deterministic"
        return None

    async def claimed(self, call: Call, plan: Plan, idempotency_key: str) -> Plan:
        """The plan under an `Idempotency-Key`: what may not be shared with others is shared with its own retries.

        Raises:
            KeyReused: the key was used with another body. BadCall: it is no key.
        """
        key = await self.claims.claim(call, idempotency_key)
        if plan.slot is not None and plan.may_read and plan.may_write and not plan.samples:
            return plan  # its retries get the same as everybody
        slot = Slot(call.caller.tenant, self.weights.name, key, ttl_s=self._settings.idempotency_ttl_s)
        return replace(plan, slot=slot, shape=Shape(), may_read=True, may_write=True, directives=NONE, samples=0)

    def explain(self, call: Call, directives: Directives) -> Explanation:
        """What the key of this call is made of, or why it has none."""
        reason = self._why_bypass(call, directives)
        return explain(call, self.weights, scope=self._scope(call.caller), reason=reason)

    # 2 -------------------------------------------------------------------------------------------

    async def recall(self, call: Call, plan: Plan) -> Reply | None:
        """The answer from a recording, under a fresh id and in the form that this client asked for.

        Raises:
            NotCached: `only-if-cached`, and there is none that the call accepts.
        """
        began = time.perf_counter()
        if plan.slot is not None and plan.may_read:
            recording, _ = await self._find(plan)
            if recording is not None and plan.directives.accepts(age := age_s(recording)):
                stale_s = self._stale_s(plan, age)
                if stale_s <= self._settings.cache_stale_while_revalidate_s:
                    if stale_s > 0:
                        self._refresh(call, plan)
                    reply = self._replayed(call, plan, recording, CacheStatus.STALE if stale_s > 0 else CacheStatus.HIT)
                    reply.answer.timings.cache_s = time.perf_counter() - began
                    return reply
        if plan.directives.only_if_cached:
            raise NotCached("the answer is not in the cache, and the request allows nothing else")
        return None

    def _replayed(self, call: Call, plan: Plan, recording: Recording, status: CacheStatus) -> Reply:
        _count_hit(call, recording, status)
        key = plan.slot.key if plan.slot else None
        return Reply(_replay(recording, call), status, self.weights.short, key, int(age_s(recording)))

    def _stale_s(self, plan: Plan, age: float) -> float:
        """Seconds past its time; without a setting that gives a recording more, Redis ends it in time."""
        if (
            plan.slot is None
            or plan.slot.ttl_s is not None
            or self._settings.cache_keep_s == self._settings.cache_ttl_s
        ):
            return 0.0
        return age - self._settings.cache_ttl_s

    def _refresh(self, call: Call, plan: Plan) -> None:
        metrics.refreshed.inc()
        anew = replace(plan, directives=replace(plan.directives, max_age_s=self._settings.cache_ttl_s))
        self.flights.launch(self._ticket(call, plan), lambda flight: self._flown(call, anew, flight))

    async def _instead(self, call: Call, plan: Plan, error: AppError) -> Reply:
        """A recording past its time, where generating anew failed. Raises the error where there is none."""
        if error.status >= 500 and self._settings.cache_stale_if_error_s and plan.may_read:
            recording, _ = await self._find(plan)
            age = age_s(recording) if recording is not None else float("inf")
            is_good_enough = self._stale_s(plan, age) <= self._settings.cache_stale_if_error_s
            if recording is not None and is_good_enough and plan.directives.accepts(age):
                return self._replayed(call, plan, recording, CacheStatus.STALE)
        raise error

    async def _find(self, plan: Plan) -> tuple[Recording | None, Recording | None]:
        """The recording that serves this call, made to its measure; and what stands in its family's place."""
        if plan.slot is None:
            return None, None
        standing = await self.store.find(plan.slot)
        if standing is None:
            return None, None
        fitting = self._fitted(standing, plan.shape)
        if fitting is None and (exact := plan.exact) is not None and exact != plan.slot:
            own = await self.store.find(exact)
            fitting = self._fitted(own, plan.shape) if own is not None else None
        return fitting, standing

    def _fitted(self, recording: Recording, shape: Shape) -> Recording | None:
        rule = reuse.rule(recording, shape, self.weights.max_model_len)
        if rule is None or rule is Rule.SAME:
            return recording if rule else None
        metrics.child(metrics.reused, rule.value).inc()
        return forms.cut_to_measure(recording, shape, rule)

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
            async with self.flights.resume(position, self._owned_by(call.caller)) as seat:
                if seat is not None:
                    metrics.child(metrics.resumed, "flight").inc()
                    ride = Ride(seat, True, position.wants_usage, call.body, timings)
                    yield Boarding(ride, CacheStatus.SHARED, self.weights.short, key)
                    return
            if not ticket.is_shared:
                raise lost()
            metrics.child(metrics.resumed, "again").inc()
        if ticket.is_shared:
            self._refusals.check(f"{ticket.key} {ticket.is_stream}")
        with self.flights.board(
            ticket,
            lambda flight: self._flown(call, plan, flight),
            is_streaming=call.is_streaming,
            position=position,
        ) as seat:
            wants_usage = position.wants_usage if position else call.wants_usage_event
            ride = Ride(seat, call.is_streaming, wants_usage, call.body, timings)
            status = plan.status if seat.is_first else CacheStatus.SHARED
            yield Boarding(
                ride,
                status,
                self.weights.short,
                key,
                alone=lambda: self._alone(call, plan),
                instead=lambda error: self._instead(call, plan, error),
            )
            if seat.flight.is_finished and not (seat.is_first and seat.flight.is_led_here):
                _count_saved(seat.flight.timings)

    @asynccontextmanager
    async def back_aboard(self, position: Position | None, caller: Caller) -> AsyncIterator[Boarding]:
        """A seat on the flight of a stream that this client lost, from there on. Raises NotFound."""
        if position is None:
            raise NotFound("this is no id of a stream")
        async with self.flights.resume(position, self._owned_by(caller)) as seat:
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
        is_recorded = plan.slot is not None and plan.may_write
        is_stream = call.is_streaming or (is_recorded and reads_the_same_streamed(call))
        is_kept = self._settings.stream_resume_s > 0 and is_stream and not plan.directives.no_store
        key = plan.exact.key if plan.exact is not None and is_shared else secrets.token_hex(32)
        shared_by, own = self._owned_by(call.caller)
        return Ticket(
            key,
            call.endpoint,
            shared_by if is_shared else own,
            is_stream,
            is_shared,
            is_kept,
            can_lead=lambda: self.engine.state.phase is Phase.READY,
            wait=lambda: self.engine.state.ready(self._settings.loading_wait_s),
        )

    def _owned_by(self, caller: Caller) -> tuple[str, str]:
        """Whose streams a caller may come back to: those of all that share answers with it, and its tenant's own."""
        return f"scope {self._scope(caller)}", f"tenant {caller.tenant}"

    # 4, 5, 6 -------------------------------------------------------------------------------------

    async def _flown(self, call: Call, plan: Plan, flight: Flight) -> AsyncGenerator[bytes, None]:
        """What everybody aboard gets: the engine's events, usage and all, or its one body; recorded on the way.

        Raises:
            AppError: refused or broken. Cancelling frees the engine.
        """
        standing = None
        if flight.ticket.is_shared:  # it may have landed between the look and the boarding
            recording, standing = await self._find(plan)
            is_fresh = recording is not None and self._stale_s(plan, age_s(recording)) <= 0
            if recording is not None and is_fresh and plan.directives.accepts(age_s(recording)):
                flight.timings, flight.is_led_here = forms.timings_of(recording), False
                for event in forms.in_form(recording, call.endpoint, is_stream=flight.is_stream):
                    yield event
                return
        try:
            async with aclosing(self._generated(call, plan, flight, standing)) as events:
                async for event in events:
                    yield event
        except BadCall as error:  # the same call will not be better in a moment
            if flight.ticket.is_shared and not flight.events:
                self._refusals.remember(f"{flight.ticket.key} {flight.is_stream}", error)
            raise

    async def _generated(
        self, call: Call, plan: Plan, flight: Flight, standing: Recording | None
    ) -> AsyncGenerator[bytes, None]:
        began = time.perf_counter()
        await self.engine.state.ready(self._settings.loading_wait_s)
        with metrics.in_flight.track_inprogress():
            counts_choices = plan.may_write and forms.counts_choices(call, plan.shape, is_stream=flight.is_stream)
            asked = forms.in_engine_form(call, is_stream=flight.is_stream)
            answer = await self.engine.answer(forms.asking_for_token_ids(asked) if counts_choices else asked)
            flight.timings = answer.timings
            if answer.body is not None:
                body, choice_tokens = forms.without_token_ids(answer.body) if counts_choices else (answer.body, None)
                await self._record_body(call, plan, flight, standing, body, choice_tokens, began)
                yield body
                return
            kept = forms.Kept(self._settings.cache_max_entry_bytes * 8)  # it compresses, but not that well
            assert answer.events is not None  # noqa: S101 - an answer has one form or the other
            async with aclosing(answer.events) as events:  # type: ignore[type-var]
                async for event in events:
                    kept.add(event, answer.timings.streamed_tokens)
                    if wire.is_last(call.endpoint, event):
                        await self._record_events(call, plan, flight, standing, kept, began)
                    yield event

    async def _record_body(
        self,
        call: Call,
        plan: Plan,
        flight: Flight,
        standing: Recording | None,
        body: bytes,
        choice_tokens: list[int] | None,
        began: float,
    ) -> None:
        if plan.slot is None or not (plan.may_write and flight.may_record):
            return
        document = json.loads(body)
        try:
            wire.check_body(call.endpoint, document)
        except Incomplete:
            metrics.not_recorded.labels("incomplete").inc()
            return
        recording = forms.made(call, plan.shape, Form.BODY, document, (body, b"", b""), began)
        await self._keep(call, plan, standing, recording.counting(choice_tokens=choice_tokens))

    async def _record_events(
        self, call: Call, plan: Plan, flight: Flight, standing: Recording | None, kept: forms.Kept, began: float
    ) -> None:
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
        parts = wire.split_usage(call.endpoint, kept.events)
        recording = forms.made(call, plan.shape, Form.EVENTS, document, parts, began)
        is_counted = plan.shape.is_cuttable and kept.counts[-1] == recording.completion_tokens
        recording = recording.counting(counts=kept.counts if is_counted else None, body=forms.dump(document))
        await self._keep(call, plan, standing, recording)

    async def _keep(self, call: Call, plan: Plan, standing: Recording | None, recording: Recording) -> None:
        """In the family's place if it serves all that stands there serves; else beside it."""
        slot = plan.slot if standing is None or reuse.covers(recording, standing) else plan.exact
        if slot is not None and await self.store.keep(slot, recording):
            metrics.recorded.labels(call.endpoint.label).inc()


# --- pure helpers of the steps, in the order they are used -----------------------------------------


def _count_hit(call: Call, recording: Recording, status: CacheStatus) -> None:
    metrics.child(metrics.calls, call.endpoint.label, status.value).inc()
    _count_saved(forms.timings_of(recording))
    metrics.seconds_saved.inc(recording.seconds)


def _count_saved(timings: Timings) -> None:
    metrics.child(metrics.tokens_saved, "prompt").inc(timings.prompt_tokens or 0)
    metrics.child(metrics.tokens_saved, "completion").inc(timings.completion_tokens or 0)


def _replay(recording: Recording, call: Call) -> Answer:
    """The recorded answer as this client wants it: either form serves both."""
    timings = forms.timings_of(recording)
    fresh = (wire.new_id(call.endpoint), int(time.time()))
    old = (recording.ident, recording.created)
    if call.is_streaming:
        if recording.form is Form.BODY:
            head, usage, tail = wire.split_usage(call.endpoint, wire.unfold(call.endpoint, json.loads(recording.head)))
            content = head + usage + tail if call.wants_usage_event else head + tail
        else:
            content = recording.content(with_usage=call.wants_usage_event)
        return Answer(events=_in_pieces(wire.freshen(call.endpoint, content, old, fresh, call.body)), timings=timings)
    (content,) = forms.in_form(recording, call.endpoint, is_stream=False)
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
