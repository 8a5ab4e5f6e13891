"""Where a call that has to be generated waits for its turn, or is told at once that it cannot have one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from app.admission.bounds import Bounds, misfit, retry_after_s
from app.admission.fair import Entry, FairQueue, Places
from app.admission.learned import Drain, Learned
from app.admission.work import asked, cost
from app.domain import Call, Priority, Timings
from app.engine import Capacity, Engine
from app.errors import AppError, DeadlineUnreachable, Refused
from app.observe import metrics
from app.settings import Settings

# vLLM is handed this part of its places beyond them, so that a place is taken again in the very next step.
_AHEAD = 16
# What one tenant may have in prefill while others are there: prompts of so long, and at most this part of a step.
_QUANTUM_S = 0.05
_QUANTUM_OF_STEP = 4
_QUANTUM_TOKENS = 64
# By default so many times the places may wait, at least so many calls.
_WAITING_PER_PLACE = 8
_WAITING_CALLS = 1024
# For a call that is answered in one piece, until finished calls have taught how long prompts take.
_SILENCE_S = 0.2


class Turn:
    """A call's place in the engine; `watch` and `said` tell how far it is."""

    def __init__(self, entry: Entry, on_said: Callable[[Entry], None]) -> None:
        self.entry = entry
        self.timings: Timings | None = None
        self.waited_s = 0.0
        self.was_refused = False
        self._has_said = False
        self._on_said = on_said

    def watch(self, timings: Timings) -> None:
        self.timings, timings.waited_s = timings, self.waited_s

    def said(self) -> None:
        """The engine said something: its prefill is over."""
        if not self._has_said:
            self._has_said = True
            self._on_said(self.entry)

    @property
    def cost(self) -> float:
        """What it has cost by now. A call whose engine told nothing yet when it left counts its prompt."""
        work, timings = self.entry.work, self.timings
        if self.was_refused:
            return 0.0
        if timings is None or timings.prompt_tokens is None:
            return cost(work.prompt_tokens, 0)
        if work.sequences > 1:  # told of one sequence at a time
            return work.cost
        return cost(timings.prompt_tokens, timings.completion_tokens or 0)


class Admission:
    """One queue in front of the engine. Hits and followers never come here."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._queue = FairQueue()
        self._learned = Learned()
        self._drain = Drain()
        self._done = 0.0
        self._capacity = Capacity()

    @asynccontextmanager
    async def turn(self, call: Call, engine: Engine, context: int | None, name: str) -> AsyncIterator[Turn]:
        """A place in the engine, as soon as it is this call's turn; leaving the context gives it back.

        `name` is the flight's, by which `hasten` finds it; `context` is the longest prompt plus answer.

        Raises:
            QueueFull, QueueShareUsed: it would have to wait, and there is no room. At once, or never.
        """
        self._look_at(engine.capacity)
        size = asked(call)
        entry = Entry(call.caller.tenant, call.priority, self._learned.expected(size, context), self._clock(), name)
        turn = Turn(entry, self._said)
        await self._wait(entry, has_key=call.caller.key_id is not None)
        entry.entered = self._clock()
        turn.waited_s = entry.entered - entry.since
        metrics.child(metrics.queue_wait, entry.priority.value).observe(turn.waited_s)
        silence = self._assume_said(entry)
        try:
            yield turn
            if turn.timings is not None:
                self._learned.learn(size, turn.timings)
                self._queue.places = replace(self._queue.places, quantum=self._quantum(self._capacity))
        except AppError as error:
            turn.was_refused = isinstance(error, Refused)
            raise
        finally:
            silence.cancel()
            self._end(turn)

    def hasten(self, name: str, call: Call) -> None:
        """An interactive call shares the answer of a flight that may wait as a batch's."""
        if call.priority is Priority.INTERACTIVE and self._queue.calls(Priority.BATCH):
            self._queue.hasten(name, self._clock())
            self._pump()

    def check_deadline(self, call: Call, context: int | None, within_s: float) -> None:
        """Raises DeadlineUnreachable where, by all that is known, the answer would not be complete in time."""
        work = self._learned.expected(asked(call), context)
        wait_s = self.wait_s(call)
        needed_s = wait_s + self._learned.prefill_s(work) + self._learned.decode_s(work)
        if needed_s > within_s:
            told = f"this call needs about {needed_s:.1f} s now, {wait_s:.1f} of them to wait, and has {within_s:.1f}"
            retry = retry_after_s(self._queue.cost(), self._drain.per_s)
            raise self._refused(DeadlineUnreachable(told, retry_after_s=retry))

    def wait_s(self, call: Call) -> float:
        """How long a call like this would wait if it came now; 0 as long as nothing ever waited."""
        per_s = self._drain.per_s
        return self._queue.ahead(call.caller.tenant, call.priority) / per_s if per_s else 0.0

    @property
    def calls(self) -> int:
        """How many are in the engine or wait for it."""
        return self._queue.running + sum(self._queue.calls(priority) for priority in Priority)

    def tell(self) -> None:
        """Set the gauges."""
        for priority in Priority:
            metrics.queue_calls.labels(priority.value).set(self._queue.calls(priority))
            metrics.queue_tokens.labels(priority.value).set(self._queue.tokens(priority))
        metrics.engine_calls.set(self._queue.running)
        per_s = self._drain.per_s
        metrics.queue_drain_seconds.set(self._queue.cost() / per_s if per_s else 0.0)

    # --- waiting -------------------------------------------------------------------------------

    async def _wait(self, entry: Entry, *, has_key: bool) -> None:
        entered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry.enter = lambda: None if entered.done() else entered.set_result(None)
        self._queue.add(entry, self._clock())
        self._pump()
        if not entered.done():
            refusal = misfit(self._queue, entry, self._bounds, self._drain.per_s, has_key=has_key)
            if refusal is not None:
                self._queue.remove(entry)
                raise self._refused(refusal)
        try:
            await entered
        except asyncio.CancelledError:
            self._withdraw(entry, has_entered=entered.done() and not entered.cancelled())
            raise

    def _withdraw(self, entry: Entry, *, has_entered: bool) -> None:
        if has_entered:  # its turn came in the moment that nobody wanted it any more
            self._queue.end(entry, self._clock(), 0.0)
        else:
            self._queue.remove(entry)
        self._pump()

    def _assume_said(self, entry: Entry) -> asyncio.TimerHandle:
        """A call that is answered in one piece says nothing before its end: its prefill is taken to be over in time."""
        expected_s = self._learned.prefill_s(entry.work)
        return asyncio.get_running_loop().call_later(2 * expected_s + _SILENCE_S, self._rested, entry)

    def _said(self, entry: Entry) -> None:
        asyncio.get_running_loop().call_later(self._queue.rest_s(entry, self._clock()), self._rested, entry)

    def _rested(self, entry: Entry) -> None:
        if entry.is_prefilling:
            self._queue.said(entry)
            self._pump()

    def _end(self, turn: Turn) -> None:
        self._done += turn.cost
        self._queue.end(turn.entry, self._clock(), turn.cost)
        self._pump()

    def _pump(self) -> None:
        """Let in whoever may enter now."""
        now = self._clock()
        while (entry := self._queue.next(now)) is not None:
            entry.enter()
        self._drain.note(now, self._done, is_busy=self._queue.is_behind)

    # --- what there is room for ----------------------------------------------------------------

    def _look_at(self, capacity: Capacity) -> None:
        """An engine that other weights brought, or that was started again, may be of another size."""
        if capacity == self._capacity:
            return
        self._capacity = capacity
        most = capacity.sequences
        self._queue.places = Places(
            sequences=None if most is None else most + max(1, most // _AHEAD),
            kv_tokens=capacity.kv_tokens,
            quantum=self._quantum(capacity),
        )

    def _quantum(self, capacity: Capacity) -> int:
        tokens = self._learned.prefilled_in(_QUANTUM_S) or _QUANTUM_TOKENS
        return tokens if capacity.step_tokens is None else min(tokens, capacity.step_tokens // _QUANTUM_OF_STEP)

    @property
    def _bounds(self) -> Bounds:
        given, places = self._settings, self._capacity.sequences
        calls = given.queue_max_calls
        if calls is None and places is not None:
            calls = max(_WAITING_CALLS, _WAITING_PER_PLACE * places)
        return Bounds(calls, given.queue_max_tokens, given.queue_max_wait_s)

    def _refused(self, error: AppError) -> AppError:
        metrics.refused.labels(error.code or "").inc()
        return error
