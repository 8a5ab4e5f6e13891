"""One request for an answer, from its bytes to the last byte of the reply.

A hit is sent by the task that uvicorn gave us. Only who is aboard a generation pays for two more: one that notices
the client leaving (and gives up its seat), one that keeps a silent stream alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from functools import partial
from typing import Any, NamedTuple

from starlette.types import Receive, Scope, Send

from app import wire
from app.api.body import is_json, parse, read
from app.api.charged import Charged, encoded, telling
from app.api.deadline import time_left
from app.cache.policy import directives
from app.counting import at_most, exactly
from app.domain import CacheStatus, Call, Caller, Endpoint, Limits, Reply, Timings
from app.errors import AppError, BadCall, Broken, DeadlineExceeded, Draining, EngineFailed, UnknownModel
from app.flight.names import Position, position
from app.gate.economy import TRIMMED, Trimmed, capped, has_turns, output_limit, trimmed
from app.gate.keys import Gate
from app.gate.owned import check_id, new_id
from app.gate.quotas import Quotas
from app.gate.screen import Screen
from app.ledger.record import Record
from app.observe import logs, metrics
from app.observe.bounded import Recent
from app.observe.traces import span
from app.service import Boarding, Look, Plan, Service
from app.serving import Catalog
from app.settings import Settings, listed

log = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]

# What is understood of recent requests is kept up to this much memory, and not for bodies larger than that.
MEMO_BYTES = 16 * 2**20
MEMO_BODY_BYTES = 64 * 2**10

RESPONSE_ID = "resp_"

# The headers beside which a hot hit needs nothing more than its body and its key: what SDKs send with every call, and
# none of it can change what is answered. Any other header may mean something, and its call goes the whole way.
_NOTHING_MORE = frozenset(
    name.encode()
    for name in (
        "host connection user-agent accept accept-encoding accept-language content-type content-length "
        "transfer-encoding authorization x-api-key x-request-id cache-control openai-organization openai-project "
        "anthropic-version x-stainless-lang x-stainless-package-version x-stainless-os x-stainless-arch "
        "x-stainless-runtime x-stainless-runtime-version x-stainless-async x-stainless-retry-count "
        "x-stainless-read-timeout x-stainless-timeout x-stainless-helper-method x-stainless-raw-response "
        "x-stainless-stream-helper"
    ).split()
)


class _Question(NamedTuple):
    """All that `AnswerRoute` derives a call and its plan from; equal questions have equal plans."""

    caller: Caller
    catalog: Catalog
    cache_control: bytes | None
    content: bytes

    def __hash__(self) -> int:
        return hash((self.content, self.caller.tenant, self.cache_control))


class _Understood(NamedTuple):
    """`told`: headers that say what of the body was changed."""

    body: dict[str, Any]
    plan: Plan
    memory_bytes: int
    told: dict[str, str]


class AnswerRoute:
    """The ASGI app behind one of the endpoints that generate. Without quotas it only answers hot hits."""

    def __init__(
        self, endpoint: Endpoint, service: Service, gate: Gate, quotas: Quotas | None, settings: Settings
    ) -> None:
        self._endpoint = endpoint
        self._screen = screen_of(settings)
        self._service = service
        self._gate = gate
        self._quotas = quotas
        self._settings = settings
        self._text_bytes = settings.ledger_text_bytes
        self._memo: Recent[_Question, _Understood] = Recent("calls", MEMO_BYTES, lambda known: known.memory_bytes)
        self._memo_of = service.catalog

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        headers, fields, record = dict(scope["headers"]), scope["refrain"], scope["record"]
        with span("gate"):
            caller = self._admit(headers, fields, record)
            content = await read(headers, receive, self._settings)
            if self._text_bytes:
                record.request = content[: self._text_bytes].decode(errors="replace")
            question = _Question(caller, self._service.catalog, headers.get(b"cache-control"), content)
            call, plan, told = await self._understood(question)
        record.stream, record.weights = call.is_streaming, plan.serving.weights.short

        if (idempotency_key := headers.get(b"idempotency-key")) is not None:
            plan = await self._service.claimed(call, plan, idempotency_key.decode("latin-1"))
        plan = self._service.drawn(call, plan)
        may_come_back = call.is_streaming and not plan.directives.only_if_cached
        came_back = _position(headers.get(b"last-event-id")) if may_come_back else None

        charged = None
        if caller.limits.is_counted and self._quotas is not None:
            charged = Charged(self._quotas, self._settings, call, plan, told)
        if charged is not None or told:
            send = telling(send, told if charged is None else charged.told)
        with span("cache"):
            found = await self._service.recall(call, plan) if came_back is None else Look()
        if isinstance(found, Reply):
            status, timings = found.cache, found.answer.timings
            if charged is not None:
                await charged.replayed(found)
            record.note_answer(status.value, found.weights, timings)
            await _send(found, send)
        else:
            within_s = time_left(headers.get(b"x-request-timeout"), self._settings, time.perf_counter() - began)
            aboard = self._service.aboard(call, plan, look=found, position=came_back, within_s=within_s)
            aboard = aboard if charged is None else charged.aboard(aboard)
            status, timings = await answer_aboard(
                aboard, call.endpoint, self._settings, receive, send, record, within_s
            )
        _tell(fields, status, timings, time.perf_counter() - began)

    def at_once(
        self, headers: Headers, content: bytes, fields: dict[str, Any], record: Record
    ) -> tuple[Headers, bytes] | None:
        """The response to a hot hit, headers and body, without asking or waiting for anybody. None: it is no such hit,
        or there is more to it, and the call goes the whole way (`__call__`), refusals included."""
        began = time.perf_counter()
        question = self._plain(headers, content, fields, record)
        known = self._memo.get(question) if question is not None else None
        if question is None or known is None:
            return None
        call = Call(self._endpoint, known.body, question.caller, "")
        reply = self._service.at_hand(call, known.plan)
        return self._response(question, call, reply, known.told, fields, record, began)

    async def fetched(
        self, headers: Headers, content: bytes, fields: dict[str, Any], record: Record
    ) -> tuple[Headers, bytes] | None:
        """The same for a hit that Redis has; it is then held here, and the next one is `at_once`."""
        began = time.perf_counter()
        question = self._plain(headers, content, fields, record)
        if question is None:
            return None
        try:
            call, plan, told = await self._understood(question)
        except AppError:
            return None
        reply = await self._service.fetched(call, plan)
        return self._response(question, call, reply, told, fields, record, began)

    def _plain(self, headers: Headers, content: bytes, fields: dict[str, Any], record: Record) -> _Question | None:
        """What is asked, where there is nothing more to it than its body and its key, and nothing to count."""
        named = dict(headers)
        if not named.keys() <= _NOTHING_MORE or len(named) != len(headers) or not is_json(named):
            return None
        try:
            caller = self._admit(named, fields, record)
        except AppError:
            return None
        if caller.limits.is_counted or caller.limits.trims:
            return None
        return _Question(caller, self._service.catalog, named.get(b"cache-control"), content)

    def _response(
        self,
        question: _Question,
        call: Call,
        reply: Reply | None,
        told: dict[str, str],
        fields: dict[str, Any],
        record: Record,
        began: float,
    ) -> tuple[Headers, bytes] | None:
        if reply is None or reply.answer.body is None:
            return None
        record.stream = call.is_streaming
        headers = _reply_headers(reply, b"text/event-stream" if record.stream else b"application/json")
        if told:
            headers += encoded(told)
        if self._text_bytes:
            record.request = question.content[: self._text_bytes].decode(errors="replace")
            record.response = reply.answer.body[: self._text_bytes].decode(errors="replace")
        _tell(fields, reply.cache, reply.answer.timings, time.perf_counter() - began)
        record.note_answer(fields["cache"], reply.weights, reply.answer.timings)
        return headers, reply.answer.body

    def _admit(self, headers: dict[bytes, bytes], fields: dict[str, Any], record: Record) -> Caller:
        caller = self._gate.admit(presented_key(headers, allow_x_api_key=self._endpoint is Endpoint.MESSAGES))
        fields["tenant"] = record.tenant = caller.tenant
        if caller.key_id:
            fields["key"] = record.key = caller.key_id
        return caller

    async def _understood(self, question: _Question) -> tuple[Call, Plan, dict[str, str]]:
        """The call, and what the cache may do for it. The same bytes from the same caller are understood once."""
        if question.catalog is not self._memo_of:  # old plans are of no use, and would keep an old engine alive
            self._memo.clear()
            self._memo_of = question.catalog
        known = self._memo.get(question)
        if known is None:
            known = await self._understand(question)
            if known.plan.slot is not None and len(question.content) <= MEMO_BODY_BYTES:
                self._memo[question] = known
        return Call(self._endpoint, known.body, question.caller, logs.request_id.get() or ""), known.plan, known.told

    async def _understand(self, question: _Question) -> _Understood:
        body = parse(question.content, self._settings.max_json_depth)
        header = (question.cache_control or b"").decode("latin-1")
        wanted = directives(header, body.pop("cache", None))
        limits = question.caller.limits
        body, told = await self._economical(self._checked(body, limits), limits)
        call = Call(self._endpoint, body, question.caller, "")
        plan = self._service.plan(call, wanted)
        if self._endpoint is Endpoint.RESPONSES:
            self._name_response(body, question.caller.tenant)
        # The bytes, and about three times as much for the objects made of them.
        return _Understood(body, plan, 1024 + 4 * len(question.content), told)

    def _name_response(self, body: dict[str, Any], tenant: str) -> None:
        """vLLM would let a client choose the id that its response is stored under, and read any that it knows of."""
        body.pop("request_id", None)
        if self._settings.responses_store and body.get("store") is not False:  # understood anew each time
            body["request_id"] = new_id(RESPONSE_ID, tenant)
        if isinstance(before := body.get("previous_response_id"), str):
            check_id(before, RESPONSE_ID, tenant)

    async def _economical(self, body: dict[str, Any], limits: Limits) -> tuple[dict[str, Any], dict[str, str]]:
        """What is left of the body under the caller's limits of length, and headers that say so. Raises BadCall."""
        told: dict[str, str] = {}
        refuses = self._settings.limit_output == "refuse"
        allowed = capped(self._endpoint, body, limits.max_output_tokens, refuses=refuses)
        if allowed is not body:
            told["x-refrain-max-output-tokens"] = str(limits.max_output_tokens)
        if limits.trims and self._endpoint in TRIMMED:
            short = await self._trimmed(allowed)
            if short.turns:
                allowed = short.body
                told["x-refrain-trimmed"] = f"turns={short.turns}; tokens={short.tokens}"
        return allowed, told

    async def _trimmed(self, body: dict[str, Any]) -> Trimmed:
        """Without its oldest turns where prompt and answer would not fit into the model. Raises PromptTooLong."""
        serving, (_, limit) = self._service.catalog.of(body.get("model")), output_limit(self._endpoint, body)
        longest = serving.weights.max_model_len if serving is not None else None
        # Of a call without a limit an eighth of what the model takes is kept free for the answer.
        room = 0 if longest is None else longest - (longest // 8 if limit is None else limit)
        if serving is None or longest is None or room <= 0 or at_most(body) <= room or not has_turns(body):
            return Trimmed(body, 0, 0)
        with serving.hold():
            await serving.engine.state.ready(self._settings.loading_wait_s)
            return await trimmed(body, room, longest, partial(exactly, self._endpoint, engine=serving.engine))

    def _checked(self, body: dict[str, Any], limits: Limits) -> dict[str, Any]:
        """What must hold before a key can be made: the model is ours and the caller's, `stream` is a boolean, nothing
        is reached for."""
        model = body.get("model")
        if model is not None and not isinstance(model, str):
            raise BadCall("`model` must be a string", param="model")
        serving = self._service.catalog.of(model)
        if serving is None or not limits.allows(serving.weights.name):
            served = ", ".join(f"`{name}`" for name in self._service.catalog.names if limits.allows(name))
            raise UnknownModel(f"the model `{model}` does not exist here; this server serves {served}", param="model")
        if not isinstance(body.get("stream", False), bool | None):
            raise BadCall("`stream` must be true or false", param="stream")
        self._screen.check(body)
        return body


def screen_of(settings: Settings) -> Screen:
    """What the settings allow a request to reach for."""
    hosts = frozenset(host.lower() for host in listed(settings.media_hosts))
    return Screen(hosts, frozenset(listed(settings.trusted_fields)), settings.grammar_max_bytes)


class StreamRoute:
    """`GET /v1/streams/{id}`: the rest of a stream that was cut off, from `Last-Event-ID` on."""

    def __init__(self, service: Service, gate: Gate, settings: Settings) -> None:
        self._service = service
        self._gate = gate
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        caller = self._gate.admit(presented_key(headers, allow_x_api_key=True))
        named = _position(scope["path_params"]["stream_id"].encode())
        seen = _position(headers.get(b"last-event-id"))
        if seen is not None and (named is None or seen.stream_id != named.stream_id):
            raise BadCall("Last-Event-ID is no event of this stream", param="Last-Event-ID")
        record: Record = scope["record"]
        record.tenant, record.key, record.stream = caller.tenant, caller.key_id or "", True
        aboard = self._service.back_aboard(seen or named, caller)
        status, _ = await answer_aboard(aboard, None, self._settings, receive, send, record)
        scope["refrain"]["cache"] = status.value


async def answer_aboard(
    aboard: AbstractAsyncContextManager[Boarding],
    endpoint: Endpoint | None,
    settings: Settings,
    receive: Receive,
    send: Send,
    record: Record,
    within_s: float | None = None,
) -> tuple[CacheStatus, Timings]:
    """Answer a client with the flight that it is on, while it is there. Raises what it raises, before the first byte.

    `endpoint` is known beforehand where the client made the call, and not where it only comes back to it. What came
    of it is noted in `record`, however it ends. After `within_s` its time is up: it leaves the flight, which goes on
    only where somebody else wants it.
    """
    stream = _Stream(send, settings.keep_alive_s, endpoint, record)
    work = asyncio.create_task(_answer(aboard, stream, send), name="answer")
    gone = asyncio.create_task(_gone(receive), name="client-gone")
    try:
        done, _ = await asyncio.wait({work, gone}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            await _stop_late(work, stream)
            return stream.status, Timings()
        if not work.done():
            metrics.left.inc()
            record.finish = "left"
            log.info("the client left; its generation goes on only where somebody else wants it")
            return stream.status, Timings()
        return stream.status, work.result()
    except asyncio.CancelledError:  # the drain budget is spent; this is the outermost task, so it ends here
        stopped = Draining("the server stopped before the answer was complete; another may go on", retry_after_s=5)
        if not stream.started:
            raise stopped from None
        work.cancel()
        with contextlib.suppress(Exception):
            await asyncio.shield(stream.fail(stopped))
        return stream.status, Timings()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.wait({work, gone})
        stream.note()


async def _stop_late(work: asyncio.Task[Timings], stream: _Stream) -> None:
    """Leave the flight, which frees the engine, and then say so. Raises DeadlineExceeded where nothing was sent yet."""
    metrics.deadlines_missed.inc()
    work.cancel()
    await asyncio.wait({work})
    late = DeadlineExceeded("the time for this call was up before its answer was complete")
    if not stream.started:
        raise late
    await stream.fail(late)


async def _answer(aboard: AbstractAsyncContextManager[Boarding], stream: _Stream, send: Send) -> Timings:
    async with aboard as boarding:
        stream.board(boarding)
        if not boarding.ride.is_streaming:
            with span("flight"):
                reply = await boarding.reply()
            stream.answer(reply)
            await _send(reply, send)
            return reply.answer.timings
        async with stream.kept_alive():
            try:
                with span("flight"):
                    reply = await boarding.reply()
                stream.answer(reply)
                assert reply.answer.events is not None  # noqa: S101 - a streaming call
                async with aclosing(reply.answer.events) as events:  # type: ignore[type-var]
                    await stream.run(reply, events)
            except AppError as error:
                if not stream.started:
                    raise
                log.warning("a stream ended with an error: %s", error.message)
                await stream.fail(error)
                return Timings()
            except Exception:  # a fault of ours; the client is told all the same that this is no end
                if not stream.started:
                    raise
                log.exception("a stream broke")
                await stream.fail(Broken("the server failed on this answer; its log names the reason"))
                return Timings()
            return reply.answer.timings


class _Stream:
    """A response of server-sent events: started late, kept alive, ended by its last event or an error event."""

    def __init__(self, send: Send, keep_alive_s: float, endpoint: Endpoint | None, record: Record) -> None:
        self._send = send
        self._record = record
        self._weights = record.weights
        self._timings: list[Timings] = []
        self._keep_alive_s = keep_alive_s
        self._early_headers: Headers = []
        self._comment_end = b"\n\n"
        self._endpoint = endpoint
        self._last_sent = time.monotonic()
        self.status = CacheStatus.BYPASS
        self.started = False

    def board(self, boarding: Boarding) -> None:
        """What is known before the engine has said anything: a stream may have to start with a keep-alive."""
        self.status = boarding.status
        self._weights, self._timings = boarding.weights, [boarding.ride.timings]
        self._endpoint = boarding.endpoint
        if boarding.ride.has_ids:  # once an event had an id, the official clients take a blank line for an event
            self._comment_end = b"\n"
        self._early_headers = _headers(
            boarding.status, boarding.weights, boarding.key, None, Timings(), b"text/event-stream"
        )

    def answer(self, reply: Reply) -> None:
        """The answer begins; it may be another than that of the flight that was boarded."""
        self.status, self._weights = reply.cache, reply.weights
        if reply.answer.timings is not self._timings[0]:
            self._timings.append(reply.answer.timings)

    def note(self) -> None:
        """What was answered, once its flights have been left, since these say what there is to pay."""
        for timings in self._timings:
            self._record.note_answer(self.status.value, self._weights, timings)

    async def run(self, reply: Reply, events: AsyncIterator[bytes]) -> None:
        """Send the events as they come.

        Raises:
            AppError: the answer broke. It has no end then, and `fail` must tell the client so.
        """
        is_whole = False
        async for event in events:
            if not self.started:
                await self._start(_reply_headers(reply, b"text/event-stream"))
            is_whole = self._endpoint is not None and wire.is_last(self._endpoint, event)
            if is_whole:
                timing = server_timing(reply.answer.timings)
                event = b": server-timing " + timing.encode() + self._comment_end + event
            await self._write(event)
        if not is_whole:
            raise EngineFailed("the answer broke off before it was complete")
        await self._end()

    async def fail(self, error: AppError) -> None:
        """One error event, and the end: never a silent cut, never a [DONE]."""
        self._record.finish, self._record.error = "broken", error.code or error.type
        body = json.dumps(error.body(logs.request_id.get()), ensure_ascii=False).encode()
        named = b"event: error\n" if self._endpoint in (Endpoint.MESSAGES, Endpoint.RESPONSES) else b""
        retry = error.headers.get("retry-after")  # what resumes a stream by itself waits so long, and asks elsewhere
        again = f"retry: {int(retry) * 1000}\n".encode() if retry else b""
        await self._write(named + again + b"data: " + body + b"\n\n")
        await self._end()

    @contextlib.asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        ticking = asyncio.create_task(self._tick(), name="keep-alive")
        try:
            yield
        finally:
            ticking.cancel()

    async def _tick(self) -> None:
        while True:
            silent_s = time.monotonic() - self._last_sent
            if silent_s >= self._keep_alive_s:
                if not self.started:
                    await self._start(self._early_headers)
                await self._write(b": keep-alive" + self._comment_end)
                silent_s = 0.0
            await asyncio.sleep(self._keep_alive_s - silent_s)

    async def _start(self, headers: Headers) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _write(self, data: bytes) -> None:
        self._last_sent = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(reply: Reply, send: Send) -> None:
    """A reply that is there already: a recording in either form, or a generated body."""
    answer = reply.answer
    if answer.body is not None:
        headers = _reply_headers(reply, b"application/json")
        headers.append((b"content-length", str(len(answer.body)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})
        return
    assert answer.events is not None  # noqa: S101 - an answer has one form or the other
    await send({"type": "http.response.start", "status": 200, "headers": _reply_headers(reply, b"text/event-stream")})
    async for piece in answer.events:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _gone(receive: Receive) -> None:
    """Return when the client closes its side."""
    while (await receive())["type"] != "http.disconnect":
        continue


def _position(given: bytes | None) -> Position | None:
    """The client's place in a stream of ours; None where it names none (a proxy's or another server's event id)."""
    return None if given is None else position(given.decode("latin-1").strip())


def presented_key(headers: dict[bytes, bytes], *, allow_x_api_key: bool = False) -> str | None:
    """The key of `Authorization: Bearer`, or of `x-api-key` where Anthropic's clients send it."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and token:
        return token.strip().decode("latin-1")
    if allow_x_api_key and (given := headers.get(b"x-api-key")):
        return given.decode("latin-1")
    return None


_CACHE_STATUS = {status: status.value.encode() for status in CacheStatus}


def _reply_headers(reply: Reply, content_type: bytes) -> Headers:
    headers = _headers(reply.cache, reply.weights, reply.key, reply.age_s, reply.answer.timings, content_type)
    if reply.stream_id is not None:
        headers.append((b"x-stream-id", reply.stream_id.encode()))
    return headers


def _headers(
    cache: CacheStatus, weights: str, key: str | None, age_s: int | None, timings: Timings, content_type: bytes
) -> Headers:
    headers = [
        (b"content-type", content_type if content_type == b"application/json" else content_type + b"; charset=utf-8"),
        (b"x-cache", _CACHE_STATUS[cache]),
        (b"x-weights", weights.encode()),
        (b"server-timing", server_timing(timings).encode()),
    ]
    if key is not None:
        headers.append((b"x-cache-key", key.encode()))
    if age_s is not None:
        headers.append((b"age", str(age_s).encode()))
    if content_type == b"text/event-stream":
        # Proxies (nginx) would collect the stream before passing it on.
        headers += [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
    return headers


def server_timing(timings: Timings) -> str:
    """W3C Server-Timing, milliseconds: the phases that are known by now."""
    known = [f"{name};dur={max(0.0, seconds) * 1000:.2f}" for name, seconds in _phases(timings)]
    return ", ".join(known) or "cache;dur=0"


def _tell(fields: dict[str, Any], status: CacheStatus, timings: Timings, seconds: float) -> None:
    fields["cache"] = status.value
    if timings.completion_tokens is not None:
        fields["in"], fields["out"] = timings.prompt_tokens, timings.completion_tokens
    metrics.child(metrics.duration, status.value).observe(seconds)
    for name, taken_s in _phases(timings):
        metrics.child(metrics.phases, name).observe(max(0.0, taken_s))


def _phases(timings: Timings) -> list[tuple[str, float]]:
    """Name and seconds of the phases that are known by now."""
    if timings.queue_s is None:  # a hit, or not yet generated
        return [] if timings.cache_s is None else [("cache", timings.cache_s)]
    phases = (
        ("cache", timings.cache_s),
        ("queue", timings.queue_s + timings.waited_s),
        ("prefill", timings.prefill_s),
        ("decode", timings.decode_s),
    )
    return [(name, seconds) for name, seconds in phases if seconds is not None]
