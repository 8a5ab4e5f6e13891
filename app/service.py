"""The journey of a call. Read it from top to bottom; every other room is a detail of one of its steps.

```
1. plan      for which weights is it? is its answer anybody else's too?           serving, cache.key, cache.policy
2. recall    an answer that was given before                                     cache.store, forms
3. board     a generation of this very answer that is under way, or begin one    flight
4. wait      while weights are swapped, for an engine that still loads,          serving, engine.state,
             and for a turn at it, or hear at once that there is no room         admission
5. generate  the engine's answer, live                                           engine
6. record    if it ended well, and before its clients see the end                cache.store
```
Steps 4 to 6 are the flight's own and run in its task, for everybody aboard. What is refused is refused before the
first byte. Nothing here knows HTTP, Redis or vLLM.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from app import counting, forms, wire
from app.admission import Admission, Turn
from app.cache import reuse
from app.cache.explain import Explanation, explain
from app.cache.key import cache_key, is_deterministic, why_uncacheable
from app.cache.near import Held
from app.cache.policy import NONE, Directives
from app.cache.recording import Recording
from app.cache.refusals import Refusals
from app.cache.reuse import Rule, Shape, reads_the_same_streamed
from app.cache.store import Slot, Store, age_s, jittered
from app.domain import Answer, CacheStatus, Call, Caller, Endpoint, Form, Reply, Timings, Weights
from app.engine import Engine, Phase
from app.errors import AppError, BadCall, Draining, Incomplete, NotCached, NotFound, PromptTooLong, UnknownModel
from app.flight.flight import Flight, Ticket, lost
from app.flight.flights import Flights
from app.flight.names import Position
from app.flight.ride import Ride
from app.observe import metrics
from app.observe.traces import span
from app.serving import Catalog, Serving
from app.settings import Settings

# In place of a tenant where everybody shares; no tenant can be called so.
EVERYBODY = "*"
# A longer answer leaves in pieces, so that it neither blocks the loop nor fills a buffer.
AT_HAND_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Look:
    """A look into the cache that found nothing to answer with.

    `slot`: where, if anywhere; `standing`: what is there and did not serve the call. `kept`: how many answers this
    process had recorded when it began.
    """

    slot: Slot | None = None
    standing: Recording | None = None
    kept: int = -1
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Which weights answer one call, and what the cache may do for it. Without a slot: nothing, for this reason.

    The slot is its family's; there may be one of its own beside it (`exact`), for what the family's does not serve.
    """

    serving: Serving
    slot: Slot | None
    shape: Shape
    may_read: bool
    may_write: bool
    directives: Directives
    bypass_reason: str | None = None
    samples: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether others get what this call gets, and the other way round."""
        return self.slot is not None and self.may_read and self.may_write

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
    model: str
    alone: Callable[[], Awaitable[Reply]] | None = None
    instead: Callable[[AppError], Awaitable[Reply]] | None = None

    @property
    def endpoint(self) -> Endpoint:
        return self.ride.seat.flight.ticket.endpoint

    async def reply(self) -> Reply:
        """Raises AppError: refused or broken before there was anything to send."""
        try:
            answer = await self.ride.answer()
        except Incomplete:  # the shared stream has no body in it: a tool's input cut short, or too much to be held
            if self.alone is None:
                raise
            self.ride.seat.leave()
            return await self.alone()
        except AppError as error:
            if self.instead is None:
                raise
            return await self.instead(error)
        status = self.status if self.ride.seat.flight.is_led_here else CacheStatus.SHARED
        metrics.child(metrics.calls, self.endpoint.label, status.value, self.model).inc()
        return Reply(answer, status, self.weights, self.key, stream_id=self.ride.stream_id)


class Service:
    """What is served, and one cache. Other weights come in by a new `catalog`; calls keep what they were planned on."""

    def __init__(
        self,
        settings: Settings,
        weights: Weights,
        engine: Engine,
        store: Store,
        flights: Flights,
        adapters: Sequence[Weights] = (),
    ) -> None:
        self._settings = settings
        base = Serving(weights, engine)
        self.catalog = Catalog(base, {each.name: Serving(each, engine, base) for each in adapters})
        self.store = store
        self.flights = flights
        self.claims = flights.claims
        self._refusals = Refusals(settings.cache_negative_s)
        self.admission = Admission(settings)
        self.is_draining = False
        self._open = asyncio.Event()
        self._open.set()

    @property
    def weights(self) -> Weights:
        return self.catalog.base.weights

    @property
    def engine(self) -> Engine:
        return self.catalog.base.engine

    def hold_calls(self) -> None:
        """Calls that need an engine wait from here on; hits are answered as ever."""
        self._open.clear()

    @property
    def holds_calls(self) -> bool:
        return not self._open.is_set()

    def let_calls_go(self) -> None:
        self._open.set()

    def drain(self, detail: str) -> None:
        """Take no new generation, and no other weights: the server is about to stop."""
        self.is_draining = True
        self._open.set()
        self.engine.state.become(Phase.DRAINING, detail)

    # 1 -------------------------------------------------------------------------------------------

    def plan(self, call: Call, directives: Directives) -> Plan:
        """Whether this call has a key that others may share, and which. Raises UnknownModel."""
        serving = self.catalog.of(call.body.get("model"))
        if serving is None:  # an adapter that was unloaded a moment ago
            raise UnknownModel(f"the model `{call.body['model']}` is not served any more", param="model")
        weights = serving.weights
        reason = self._why_bypass(call, weights, directives)
        if reason is not None:
            metrics.child(metrics.bypasses, call.endpoint.label, weights.name, reason).inc()
            return Plan(serving, None, Shape(), False, False, directives, reason)
        relaxed, shape = reuse.family(call)
        key = cache_key(relaxed, weights, tenant=self._scope(call.caller))
        whose = EVERYBODY if self._settings.cache_scope == "global" else call.caller.tenant
        slot = Slot(whose, weights.name, key)
        samples = 0 if is_deterministic(call, weights) else self._samples(directives)
        return Plan(serving, slot, shape, not directives.no_cache, not directives.no_store, directives, samples=samples)

    async def up_to_date(self, call: Call, plan: Plan) -> Plan:
        """A plan on weights that take new calls: `plan` itself, or a new one if others have come in meanwhile.

        Waits while a swap holds calls. Its serving is to be held before the next `await`: that is what keeps an
        engine alive.
        """
        if not plan.serving.is_retired:
            return plan
        await self._open.wait()
        anew = self.plan(call, plan.directives)
        if anew.serving.is_retired:  # the swap was cut off: the server stops
            raise Draining("the server is shutting down", retry_after_s=5)
        if plan.slot is not None and plan.slot.ttl_s is not None:  # the place of an Idempotency-Key, whoever answers
            return replace(plan, serving=anew.serving)
        return self.drawn(call, anew)

    async def boarded(self, model: str | None) -> Serving | None:
        """What serves `model` and takes calls, when a swap does not hold them; None where nothing is called that."""
        await self._open.wait()
        return self.catalog.of(model)

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

    def _why_bypass(self, call: Call, weights: Weights, directives: Directives) -> str | None:
        if self._settings.cache == "off":
            return "off"
        if reason := why_uncacheable(call, weights):
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
            and not is_deterministic(call, weights)
        ):
            return "not_deterministic"
        return None

    async def claimed(self, call: Call, plan: Plan, idempotency_key: str) -> Plan:
        """The plan under an `Idempotency-Key`: what may not be shared with others is shared with its own retries.

        Raises:
            KeyReused: the key was used with another body. BadCall: it is no key.
        """
        key = await self.claims.claim(call, idempotency_key)
        if plan.is_shared and not plan.samples:
            return plan  # its retries get the same as everybody
        slot = Slot(call.caller.tenant, plan.serving.weights.name, key, ttl_s=self._settings.idempotency_ttl_s)
        return replace(plan, slot=slot, shape=Shape(), may_read=True, may_write=True, directives=NONE, samples=0)

    def explain(self, call: Call, directives: Directives) -> Explanation:
        """What the key of this call is made of, or why it has none."""
        reason = self._why_bypass(call, self.weights, directives)
        return explain(call, self.weights, scope=self._scope(call.caller), reason=reason)

    # 2 -------------------------------------------------------------------------------------------

    async def recall(self, call: Call, plan: Plan) -> Reply | Look:
        """The answer from a recording, under a fresh id and in the form that this client asked for; or the look that
        found none.

        Raises:
            NotCached: `only-if-cached`, and there is none that the call accepts.
        """
        began, look = time.perf_counter(), Look()
        if plan.slot is not None and plan.may_read:
            kept = self.store.kept
            held, standing = await self._find(plan)
            look = Look(plan.slot, standing, kept)
            if held is not None and plan.directives.accepts(age := age_s(held.recording)):
                stale_s = self._stale_s(plan, age)
                if stale_s <= self._settings.cache_stale_while_revalidate_s:
                    if stale_s > 0:
                        self._refresh(call, plan)
                    reply = self._replayed(call, plan, held, CacheStatus.STALE if stale_s > 0 else CacheStatus.HIT)
                    reply.answer.timings.cache_s = time.perf_counter() - began
                    return reply
        if plan.directives.only_if_cached:
            raise NotCached("the answer is not in the cache, and the request allows nothing else")
        return replace(look, seconds=time.perf_counter() - began)

    def at_hand(self, call: Call, plan: Plan) -> Reply | None:
        """What `recall` would give, where this process holds it and it is within its time; asks nobody.

        Its `answer.body` is all that is to be sent, also of a stream.
        """
        if plan.slot is None or not plan.may_read or plan.samples:
            return None
        began = time.perf_counter()
        held = self.store.held(plan.slot)
        reply = self._whole(call, plan, held, began) if held is not None else None
        metrics.hits.near += reply is not None
        return reply

    async def fetched(self, call: Call, plan: Plan) -> Reply | None:
        """The same; Redis is asked for what this process does not hold."""
        if plan.slot is None or not plan.may_read or plan.samples:
            return None
        if self.store.held(plan.slot) is not None:
            return self.at_hand(call, plan)
        began = time.perf_counter()
        held = await self.store.find(plan.slot)
        return self._whole(call, plan, held, began) if held is not None else None

    def _whole(self, call: Call, plan: Plan, held: Held, began: float) -> Reply | None:
        age = age_s(held.recording)
        is_too_long = len(held.recording.head) > AT_HAND_BYTES
        if is_too_long or not plan.directives.accepts(age) or self._stale_s(plan, age) > 0:
            return None
        fitting = _fitted(held, plan)
        if fitting is None:
            return None
        answer = Answer(body=forms.replay(fitting, call), timings=forms.timings_of(fitting.recording))
        reply = self._reply(call, plan, fitting, CacheStatus.HIT, answer)
        answer.timings.cache_s = time.perf_counter() - began
        return reply

    def _replayed(self, call: Call, plan: Plan, held: Held, status: CacheStatus) -> Reply:
        return self._reply(call, plan, held, status, forms.replayed(held, call))

    def _reply(self, call: Call, plan: Plan, held: Held, status: CacheStatus, answer: Answer) -> Reply:
        found = held.recording
        model, tokens = plan.serving.weights.name, (found.prompt_tokens, found.completion_tokens)
        metrics.hits.add(call.endpoint.label, status.value, model, *tokens, found.seconds)
        return Reply(answer, status, found.weights, plan.slot.key if plan.slot else None, int(age_s(found)))

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
        later = replace(call, body=call.body | {"priority": 1})  # nobody waits for it
        self.flights.launch(self._ticket(call, plan), lambda flight: self._flown(later, anew, flight, Look()))

    async def _instead(self, call: Call, plan: Plan, error: AppError) -> Reply:
        """A recording past its time, where generating anew failed. Raises the error where there is none."""
        if error.status >= 500 and self._settings.cache_stale_if_error_s and plan.may_read:
            held, _ = await self._find(plan)
            age = age_s(held.recording) if held is not None else float("inf")
            is_good_enough = self._stale_s(plan, age) <= self._settings.cache_stale_if_error_s
            if held is not None and is_good_enough and plan.directives.accepts(age):
                return self._replayed(call, plan, held, CacheStatus.STALE)
        raise error

    async def _find(self, plan: Plan) -> tuple[Held | None, Recording | None]:
        """The recording that serves this call, made to its measure; and what stands in its family's place."""
        if plan.slot is None:
            return None, None
        standing = await self.store.find(plan.slot)
        if standing is None:
            return None, None
        fitting = _fitted(standing, plan)
        if fitting is None and (exact := plan.exact) is not None and exact != plan.slot:
            own = await self.store.find(exact)
            fitting = _fitted(own, plan) if own is not None else None
        return fitting, standing.recording

    # 3 -------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def aboard(
        self,
        call: Call,
        plan: Plan,
        *,
        look: Look,
        position: Position | None = None,
        within_s: float | None = None,
    ) -> AsyncIterator[Boarding]:
        """A seat on the flight that answers this call; leaving the context gives it up.

        `look` is what `recall` gave. With a position the client comes back to a stream that it lost. `within_s` is all
        the time that its client has; to keep it is the caller's.

        Raises:
            StreamLost: its stream is gone, and generating again would not give the same.
            DeadlineUnreachable: it would have to be generated, and that would take longer.
        """
        timings = Timings(cache_s=look.seconds)
        if position is not None:
            owners = self._owned_by(call.caller)
            async with self.flights.resume(position, owners, here_alone=plan.is_shared) as seat:
                if seat is not None:
                    metrics.child(metrics.resumed, "flight").inc()
                    ride = Ride(seat, True, position.wants_usage, call.body, timings)
                    key = plan.slot.key if plan.slot else None
                    model = plan.serving.weights.name
                    with ride.paid():
                        yield Boarding(ride, CacheStatus.SHARED, seat.flight.ticket.weights, key, model)
                    return
            if not plan.is_shared:
                raise lost()
            metrics.child(metrics.resumed, "again").inc()
        plan = await self.up_to_date(call, plan)
        ticket = self._ticket(call, plan)
        if ticket.is_shared:
            self._refusals.check(f"{ticket.key} {ticket.is_stream}")
        if within_s is not None and not self.flights.flies(ticket):
            self.admission.check_deadline(call, plan.serving.weights.max_model_len, within_s)
        with self.flights.board(
            ticket,
            lambda flight: self._flown(call, plan, flight, look),
            is_streaming=call.is_streaming,
            position=position,
        ) as seat:
            if seat.is_first and seat.flight.pilot is not None:
                plan.serving.hold_until(seat.flight.pilot)
            elif not seat.is_first:
                self.admission.hasten(seat.flight.uid, call)
            wants_usage = position.wants_usage if position else call.wants_usage_event
            ride = Ride(seat, call.is_streaming, wants_usage, call.body, timings)
            status = plan.status if seat.is_first else CacheStatus.SHARED
            with ride.paid():
                yield Boarding(
                    ride,
                    status,
                    plan.serving.weights.short,
                    plan.slot.key if plan.slot else None,
                    model=plan.serving.weights.name,
                    alone=lambda: self._alone(call, plan),
                    instead=lambda error: self._instead(call, plan, error),
                )
            if seat.flight.is_finished and not (seat.is_first and seat.flight.is_led_here):
                timings = seat.flight.timings
                saved = (timings.prompt_tokens or 0, timings.completion_tokens or 0)
                metrics.hits.save(plan.serving.weights.name, *saved)

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
            weights = seat.flight.ticket.weights
            with ride.paid():
                yield Boarding(ride, CacheStatus.SHARED, weights, None, self.catalog.called(weights.rpartition("@")[0]))

    async def _alone(self, call: Call, plan: Plan) -> Reply:
        """A body generated for this call by itself. Raises AppError."""
        async with self.aboard(call, replace(plan, slot=None), look=Look()) as boarding:
            return await boarding.reply()

    def _ticket(self, call: Call, plan: Plan) -> Ticket:
        """Calls that may read and write the same entry share a flight; every other has one of its own."""
        is_shared, exact = plan.is_shared, plan.exact
        is_recorded = plan.slot is not None and plan.may_write
        is_stream = call.is_streaming or (is_recorded and reads_the_same_streamed(call))
        is_kept = self._settings.stream_resume_s > 0 and is_stream and not plan.directives.no_store
        key = exact.key if exact is not None and is_shared else secrets.token_hex(32)
        shared_by, own = self._owned_by(call.caller)
        owner = shared_by if is_shared else own
        engine = plan.serving.engine
        return Ticket(
            key,
            call.endpoint,
            owner,
            plan.serving.weights.short,
            is_stream,
            is_shared,
            is_kept,
            call.caller,
            can_lead=lambda: engine.state.phase is Phase.READY,
            wait=lambda: engine.state.ready(self._settings.loading_wait_s),
        )

    def _owned_by(self, caller: Caller) -> tuple[str, str]:
        """Whose streams a caller may come back to: those of all that share answers with it, and its tenant's own."""
        return f"scope {self._scope(caller)}", f"tenant {caller.tenant}"

    # 4, 5, 6 -------------------------------------------------------------------------------------

    async def _flown(self, call: Call, plan: Plan, flight: Flight, look: Look) -> AsyncGenerator[bytes, None]:
        """What everybody aboard gets: the engine's events, usage and all, or its one body; recorded on the way.

        Raises:
            AppError: refused or broken. Cancelling frees the engine.
        """
        standing = look.standing
        if flight.ticket.is_shared and not self._still_holds(look, plan):
            held, standing = await self._find(plan)
            age = age_s(held.recording) if held is not None else 0.0
            if held is not None and self._stale_s(plan, age) <= 0 and plan.directives.accepts(age):
                flight.timings, flight.is_led_here = forms.timings_of(held.recording), False
                for event in forms.in_form(held.recording, call.endpoint, is_stream=flight.is_stream):
                    yield event
                return
        try:
            async with aclosing(self._generated(call, plan, flight, standing)) as events:
                async for event in events:
                    yield event
        except BadCall as error:  # the same call will not be better in a moment
            if flight.ticket.is_shared and not flight.said:
                self._refusals.remember(f"{flight.ticket.key} {flight.is_stream}", error)
            raise

    def _still_holds(self, look: Look, plan: Plan) -> bool:
        """Whether nothing can have landed in this plan's place since that look: where only this process records."""
        return self.flights.is_alone and look.slot == plan.slot and look.kept == self.store.kept

    async def _generated(
        self, call: Call, plan: Plan, flight: Flight, standing: Recording | None
    ) -> AsyncGenerator[bytes, None]:
        began, engine = time.perf_counter(), plan.serving.engine
        await engine.state.ready(self._settings.loading_wait_s)
        await engine.examine(call)
        async with self._in_turn(call, plan, flight) as turn:
            is_counted = plan.may_write and forms.counts_choices(call, plan.shape, is_stream=flight.is_stream)
            asked = forms.in_engine_form(call, is_stream=flight.is_stream)
            flight.timings = Timings(device_s=flight.timings.device_s, paid_s=flight.timings.paid_s)
            turn.watch(flight.timings)
            asked = forms.asking_for_token_ids(asked) if is_counted else asked
            try:
                answer = await engine.answer(asked, flight.timings)
            except PromptTooLong as error:
                raise await counting.in_numbers(error, call, plan.serving) from error
            if answer.body is not None:
                body, choice_tokens = forms.without_token_ids(answer.body) if is_counted else (answer.body, None)
                await self._record_body(call, plan, flight, standing, body, choice_tokens, began)
                yield body
                return
            kept = forms.Kept(self._settings.cache_max_entry_bytes * 8)  # it compresses, but not that well
            assert answer.events is not None  # noqa: S101 - an answer has one form or the other
            async with aclosing(answer.events) as events:  # type: ignore[type-var]
                async for event in events:
                    turn.said()
                    kept.add(event, answer.timings.streamed_tokens)
                    if wire.is_last(call.endpoint, event):
                        await self._record_events(call, plan, flight, standing, kept, began)
                    yield event

    @asynccontextmanager
    async def _in_turn(self, call: Call, plan: Plan, flight: Flight) -> AsyncIterator[Turn]:
        """A place in the engine, which must be one that answers by then. Raises AppError."""
        engine, context = plan.serving.engine, plan.serving.weights.max_model_len
        with metrics.in_flight.track_inprogress(), plan.serving.hold():
            async with AsyncExitStack() as stack:
                with span("turn"):
                    turn = await stack.enter_async_context(self.admission.turn(call, engine, context, flight.uid))
                    if engine.state.phase is Phase.LOADING:  # it died while this call waited for it
                        await engine.state.ready(self._settings.loading_wait_s)
                with span("engine") as told:
                    told.phases = lambda: flight.timings.engine_phases()
                    yield turn

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
        recording = self._recording(call, plan, Form.BODY, document, (body, b"", b""), began)
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
        recording = self._recording(call, plan, Form.EVENTS, document, parts, began)
        is_counted = plan.shape.is_cuttable and kept.counts[-1] == recording.completion_tokens
        counts = wire.boundaries(call.endpoint, kept.events, kept.counts) if is_counted else None
        recording = recording.counting(counts=counts, body=wire.dump(document))
        await self._keep(call, plan, standing, recording)

    def _recording(
        self,
        call: Call,
        plan: Plan,
        form: Form,
        document: dict[str, Any],
        parts: tuple[bytes, bytes, bytes],
        began: float,
    ) -> Recording:
        ttl_s = plan.slot.ttl_s if plan.slot is not None and plan.slot.ttl_s else self._settings.cache_keep_s
        return forms.made(
            call,
            plan.shape,
            form,
            document,
            parts,
            seconds=time.perf_counter() - began,
            ttl_s=jittered(ttl_s),
            weights=plan.serving.weights.short,
        )

    async def _keep(self, call: Call, plan: Plan, standing: Recording | None, recording: Recording) -> None:
        """In the family's place if it serves all that stands there serves; else beside it."""
        slot = plan.slot if standing is None or reuse.covers(recording, standing) else plan.exact
        with span("record"):
            is_kept = slot is not None and await self.store.keep(slot, recording)
        if is_kept:
            metrics.recorded.labels(call.endpoint.label).inc()


def _fitted(held: Held, plan: Plan) -> Held | None:
    """The recording as this plan's call needs it; made once for each shape of call. None: it does not serve it."""
    shape = plan.shape

    def fit() -> tuple[tuple[Rule | None, Held | None], int]:
        rule = reuse.rule(held.recording, shape, plan.serving.weights.max_model_len)
        if rule is None or rule is Rule.SAME or rule is Rule.ENDED:
            return (rule, None), 0
        cut = held.part(forms.cut_to_measure(held.recording, shape, rule))
        return (rule, cut), cut.size_bytes

    rule, cut = held.replay(shape, fit)
    if rule is None:
        return None
    if rule is not Rule.SAME:
        metrics.child(metrics.reused, rule.value).inc()
    return cut or held
