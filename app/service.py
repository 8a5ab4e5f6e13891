"""The journey of a call. Read it from top to bottom; every other room is a detail of one of its steps.

```
1. plan      for which weights is it? is its answer anybody else's too?     serving, cache.key, cache.policy
2. recall    an answer that was given before                               cache.store
3. wait      while weights are swapped, and for an engine that still loads, within bounds                 engine.state
4. generate  the engine's answer, live                                     engine
5. record    if it ended well, and before its client sees the end          cache.store
```
What is refused is refused before the first byte. Nothing here knows HTTP, Redis or vLLM.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from app import wire
from app.cache.key import cache_key, is_deterministic, why_uncacheable
from app.cache.near import Held
from app.cache.policy import Directives
from app.cache.recording import Recording
from app.cache.store import Slot, Store, age_s, jittered
from app.domain import Answer, CacheStatus, Call, Endpoint, Form, Reply, Timings, Weights
from app.engine import Engine, Phase
from app.errors import Draining, Incomplete, NotCached, UnknownModel
from app.observe import metrics
from app.serving import Catalog, Serving
from app.settings import Settings

# The closing usage event is asked of the engine for each of these streams, since a later client may want it.
_USAGE_ON_REQUEST = (Endpoint.CHAT, Endpoint.COMPLETIONS)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which weights answer one call, and what the cache may do for it. Without a slot: nothing, for this reason."""

    serving: Serving
    slot: Slot | None
    may_read: bool
    may_write: bool
    directives: Directives
    bypass_reason: str | None = None

    @property
    def status(self) -> CacheStatus:
        """What `x-cache` says if the answer has to be generated."""
        return CacheStatus.MISS if self.slot and self.may_write else CacheStatus.BYPASS


class Service:
    """What is served, and one cache. Other weights come in by a new `catalog`; calls keep what they were planned on."""

    def __init__(
        self, settings: Settings, weights: Weights, engine: Engine, store: Store, adapters: Sequence[Weights] = ()
    ) -> None:
        self._settings = settings
        base = Serving(weights, engine)
        self.catalog = Catalog(base, {each.name: Serving(each, engine, base) for each in adapters})
        self.store = store
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
        reason = self._why_bypass(call, weights)
        if reason is not None:
            metrics.bypasses.labels(reason).inc()
            return Plan(serving, None, False, False, directives, reason)
        key = cache_key(call, weights, tenant=call.caller.tenant)
        slot = Slot(call.caller.tenant, weights.name, key)
        return Plan(serving, slot, not directives.no_cache, not directives.no_store, directives)

    async def board(self, call: Call, plan: Plan) -> Plan:
        """A plan on weights that take new calls: `plan` itself, or a new one if others have come in meanwhile.

        Waits while a swap holds calls. Hold the plan's serving before the next `await`, and keep it until the answer
        is out: that is what keeps its engine alive.
        """
        if plan.serving.is_retired:
            await self._open.wait()
            plan = self.plan(call, plan.directives)
            if plan.serving.is_retired:  # the swap was cut off: the server stops
                raise Draining("the server is shutting down", retry_after_s=5)
        return plan

    async def boarded(self, model: str | None) -> Serving | None:
        """What serves `model` and takes calls, when a swap does not hold them; None where nothing is called that."""
        await self._open.wait()
        return self.catalog.of(model)

    def _why_bypass(self, call: Call, weights: Weights) -> str | None:
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
        if self._settings.cache == "deterministic" and not is_deterministic(call, weights):
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
            held = await self.store.find(plan.slot)
            if held is not None and plan.directives.accepts(age := age_s(held.recording)):
                found = held.recording
                metrics.hits.add(call.endpoint.label, found.prompt_tokens, found.completion_tokens, found.seconds)
                answer = _replay(held, call)
                answer.timings.cache_s = time.perf_counter() - began
                return Reply(answer, CacheStatus.HIT, plan.serving.weights.short, plan.slot.key, int(age))
        if plan.directives.only_if_cached:
            raise NotCached("the answer is not in the cache, and the request allows nothing else")
        return None

    # 3, 4, 5 -------------------------------------------------------------------------------------

    async def generate(self, call: Call, plan: Plan, *, looked_s: float) -> Reply:
        """The engine's answer; recorded on its way out where the plan allows it. `looked_s` went into `recall`.

        Raises:
            AppError: refused or broken before there was anything to send. Cancelling frees the engine.
        """
        began = time.perf_counter()
        engine = plan.serving.engine
        await engine.state.ready(self._settings.loading_wait_s)
        with metrics.in_flight.track_inprogress():
            answer = await engine.answer(_asking_for_usage(call))
        answer.timings.cache_s = looked_s
        if answer.body is not None:
            await self._record_body(call, plan, answer.body, answer.timings, began)
        else:
            answer = replace(answer, events=self._recorded(call, plan, answer, began))
        metrics.child(metrics.calls, call.endpoint.label, plan.status.value).inc()
        return Reply(answer, plan.status, plan.serving.weights.short, plan.slot.key if plan.slot else None)

    async def _recorded(self, call: Call, plan: Plan, answer: Answer, began: float) -> AsyncGenerator[bytes, None]:
        """The live events, kept as they pass. The recording is made before the last one is handed on, so a
        client that has seen the end and asks again is answered from it."""
        assert answer.events is not None  # noqa: S101 - a stream, by the only caller
        kept: list[bytes] | None = [] if plan.slot and plan.may_write else None
        kept_bytes = 0
        with metrics.in_flight.track_inprogress(), plan.serving.hold():
            async with aclosing(answer.events) as events:  # type: ignore[type-var]
                async for event in events:
                    if kept is not None:
                        kept.append(event)
                        kept_bytes += len(event)
                        if kept_bytes > self._settings.cache_max_entry_bytes * 8:  # it compresses, but not that well
                            metrics.not_recorded.labels("too_large").inc()
                            kept = None
                        elif wire.is_last(call.endpoint, event):
                            await self._record_events(call, plan, kept, answer.timings, began)
                    if call.wants_usage_event or not _is_usage_event(call.endpoint, event):
                        yield event

    async def _record_body(self, call: Call, plan: Plan, body: bytes, timings: Timings, began: float) -> None:
        if plan.slot is None or not plan.may_write:
            return
        document = json.loads(body)
        try:
            wire.check_body(call.endpoint, document)
        except Incomplete:
            metrics.not_recorded.labels("incomplete").inc()
            return
        await self._keep(call, plan.slot, Form.BODY, document, (body, b"", b""), timings, began)

    async def _record_events(self, call: Call, plan: Plan, events: list[bytes], timings: Timings, began: float) -> None:
        assert plan.slot is not None  # noqa: S101 - nothing is kept without one
        try:
            document = wire.fold(call.endpoint, events)
        except Incomplete:
            metrics.not_recorded.labels("incomplete").inc()
            return
        parts = wire.split_usage(call.endpoint, events)
        await self._keep(call, plan.slot, Form.EVENTS, document, parts, timings, began)

    async def _keep(
        self,
        call: Call,
        slot: Slot,
        form: Form,
        document: dict[str, Any],
        parts: tuple[bytes, bytes, bytes],
        timings: Timings,
        began: float,
    ) -> None:
        prompt_tokens, completion_tokens = wire.usage(call.endpoint, document)
        ident, created = wire.identity(call.endpoint, document)
        now = time.time()
        recording = Recording(
            form=form,
            recorded_at=now,
            ident=ident,
            created=created,
            head=parts[0],
            usage=parts[1],
            tail=parts[2],
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            seconds=time.perf_counter() - began,
            expires_at=now + jittered(self._settings.cache_ttl_s),
        )
        if await self.store.keep(slot, recording):
            metrics.recorded.labels(call.endpoint.label).inc()


# --- pure helpers of the steps, in the order they are used -----------------------------------------


def _replay(held: Held, call: Call) -> Answer:
    """The recorded answer as this client wants it: either form serves both."""
    recording = held.recording
    with_usage = call.is_streaming and call.wants_usage_event
    replay = held.replay((call.is_streaming, with_usage), lambda: _template(call, recording, with_usage=with_usage))
    content = replay((wire.new_id(call.endpoint), int(time.time())), call.body)
    timings = Timings(prompt_tokens=recording.prompt_tokens, completion_tokens=recording.completion_tokens)
    if call.is_streaming:
        return Answer(events=_in_pieces(content), timings=timings)
    return Answer(body=content, timings=timings)


def _template(call: Call, recording: Recording, *, with_usage: bool) -> tuple[wire.Template, int]:
    content = _content(call, recording, with_usage=with_usage)
    return wire.template(call.endpoint, content, (recording.ident, recording.created)), len(content)


def _content(call: Call, recording: Recording, *, with_usage: bool) -> bytes:
    if call.is_streaming:
        if recording.form is Form.EVENTS:
            return recording.content(with_usage=with_usage)
        head, usage, tail = wire.split_usage(call.endpoint, wire.unfold(call.endpoint, json.loads(recording.head)))
        return head + usage + tail if with_usage else head + tail
    if recording.form is Form.EVENTS:
        folded = wire.fold(call.endpoint, wire.split(recording.content()))
        return json.dumps(folded, ensure_ascii=False, separators=(",", ":")).encode()
    return recording.head


async def _in_pieces(content: bytes) -> AsyncGenerator[bytes, None]:
    """Whole events, a few kilobytes at a time, so that a long replay neither blocks the loop nor fills a buffer."""
    at = 0
    while at < len(content):
        end = content.find(b"\n\n", at + _PIECE_BYTES)
        end = len(content) if end < 0 else end + 2
        yield content[at:end]
        at = end


_PIECE_BYTES = 8192


def _asking_for_usage(call: Call) -> Call:
    if not call.is_streaming or call.endpoint not in _USAGE_ON_REQUEST:
        return call
    options = call.body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        return call  # the engine refuses it in its own words
    return replace(call, body=call.body | {"stream_options": (options or {}) | {"include_usage": True}})


def _is_usage_event(endpoint: Endpoint, event: bytes) -> bool:
    # Quotes inside JSON strings are escaped, so generated text cannot look like this.
    return endpoint in _USAGE_ON_REQUEST and b'"choices":[],' in event and b'"usage":{' in event
