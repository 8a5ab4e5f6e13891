"""Forms of answers: what the engine is asked for, what is kept of its answer, what is made of a recording. Pure."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from app import wire
from app.cache.near import Held
from app.cache.recording import Recording
from app.cache.reuse import Rule, Shape
from app.domain import Answer, Call, Endpoint, Form, Timings

# The closing usage event is asked of the engine for each of these streams, since a later client may want it.
_USAGE_ON_REQUEST = (Endpoint.CHAT, Endpoint.COMPLETIONS)
# A long replay leaves in pieces of about this size.
_PIECE_BYTES = 8192


# --- a recording's answer ----------------------------------------------------------------------------


def replay(held: Held, call: Call) -> bytes:
    """The recorded answer as this client wants it, under a fresh id: either form serves both."""
    recording = held.recording
    with_usage = call.is_streaming and call.wants_usage_event
    template = held.replay((call.is_streaming, with_usage), lambda: _template(call, recording, with_usage=with_usage))
    return template((wire.new_id(call.endpoint), int(time.time())), call.body)


def replayed(held: Held, call: Call) -> Answer:
    content, timings = replay(held, call), timings_of(held.recording)
    if call.is_streaming:
        return Answer(events=_in_pieces(content), timings=timings)
    return Answer(body=content, timings=timings)


def timings_of(recording: Recording) -> Timings:
    return Timings(prompt_tokens=recording.prompt_tokens, completion_tokens=recording.completion_tokens)


def in_form(recording: Recording, endpoint: Endpoint, *, is_stream: bool) -> list[bytes]:
    """The recorded answer as a flight's events, usage and all, or as its one body."""
    if is_stream:
        if recording.form is Form.EVENTS:
            return wire.split(recording.content())
        return wire.unfold(endpoint, json.loads(recording.head))
    if recording.form is Form.BODY:
        return [recording.head]
    if recording.body:
        return [recording.body]
    return [wire.dump(wire.fold(endpoint, wire.split(recording.content())))]


def _template(call: Call, recording: Recording, *, with_usage: bool) -> tuple[wire.Template, int]:
    content = _content(call, recording, with_usage=with_usage)
    return wire.template(call.endpoint, content, (recording.ident, recording.created)), len(content)


def _content(call: Call, recording: Recording, *, with_usage: bool) -> bytes:
    if call.is_streaming and recording.form is Form.EVENTS:
        return recording.content(with_usage=with_usage)
    parts = in_form(recording, call.endpoint, is_stream=call.is_streaming)
    if not call.is_streaming:
        return parts[0]
    head, usage, tail = wire.split_usage(call.endpoint, parts)
    return head + usage + tail if with_usage else head + tail


async def _in_pieces(content: bytes) -> AsyncGenerator[bytes, None]:
    """Whole events, a few kilobytes at a time, so that a long replay neither blocks the loop nor fills a buffer."""
    at = 0
    while at < len(content):
        end = content.find(b"\n\n", at + _PIECE_BYTES)
        end = len(content) if end < 0 else end + 2
        yield content[at:end]
        at = end


# --- a recording for a call of another shape ---------------------------------------------------------


def cut_to_measure(recording: Recording, shape: Shape, rule: Rule) -> Recording:
    """The recording as the engine would have answered a call of this shape."""
    if rule is Rule.CUT and shape.limit is not None and recording.counts is not None:
        events = wire.shorten(shape.endpoint, wire.split(recording.content()), recording.counts, shape.limit)
        head, usage, tail = wire.split_usage(shape.endpoint, events)
        return recording.with_content(Form.EVENTS, head, usage, tail, completion_tokens=shape.limit)
    if rule is Rule.FEWER:
        document = _body_of(recording)
        tokens = recording.choice_tokens or [recording.completion_tokens]
        fewer = wire.fewer(document, shape.n, tokens, logprobs=shape.logprobs is not None)
        return recording.with_content(Form.BODY, wire.dump(fewer), b"", b"", completion_tokens=sum(tokens[: shape.n]))
    return recording


def _body_of(recording: Recording) -> dict[str, Any]:
    if recording.form is Form.BODY:
        body: dict[str, Any] = json.loads(recording.head)
        return body
    # Several choices and log-probabilities are chat's and completions' alone, and the chunks say which of the two.
    endpoint = Endpoint.COMPLETIONS if b'"object":"text_completion"' in recording.head[:300] else Endpoint.CHAT
    return wire.fold(endpoint, wire.split(recording.content()))


# --- what the engine is asked ------------------------------------------------------------------------


def in_engine_form(call: Call, *, is_stream: bool) -> Call:
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


def counts_choices(call: Call, shape: Shape, *, is_stream: bool) -> bool:
    """Whether to ask how long each of several choices is: then the recording serves a call for fewer of them."""
    is_one_prompt = call.endpoint is Endpoint.CHAT or isinstance(call.body.get("prompt"), str)
    return shape.n > 1 and not is_stream and is_one_prompt and not call.body.get("return_token_ids")


def asking_for_token_ids(call: Call) -> Call:
    return replace(call, body=call.body | {"return_token_ids": True})


def without_token_ids(body: bytes) -> tuple[bytes, list[int] | None]:
    """The body as if nobody had asked for the ids, and how many each choice has."""
    document = json.loads(body)
    ids = [choice.get("token_ids") for choice in document.get("choices") or ()]
    for holder in (document, *(document.get("choices") or ())):
        for name in ("prompt_token_ids", "token_ids"):
            if name in holder:
                holder[name] = None
    counts = [len(each) for each in ids] if ids and all(isinstance(each, list) for each in ids) else None
    return wire.dump(document), counts


# --- a recording -------------------------------------------------------------------------------------


def made(
    call: Call,
    shape: Shape,
    form: Form,
    document: dict[str, Any],
    parts: tuple[bytes, bytes, bytes],
    *,
    seconds: float,
    ttl_s: float,
    weights: str,
) -> Recording:
    """What is kept of an answer: `document` is its body, `parts` its wire form, head, usage and tail."""
    prompt_tokens, completion_tokens = wire.usage(call.endpoint, document)
    ident, created = wire.identity(call.endpoint, document)
    now = time.time()
    return Recording(
        form=form,
        recorded_at=now,
        ident=ident,
        created=created,
        head=parts[0],
        usage=parts[1],
        tail=parts[2],
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        seconds=seconds,
        expires_at=now + ttl_s,
        weights=weights,
        limit=shape.limit,
        n=shape.n,
        logprobs=shape.logprobs,
        ended=wire.ended_by_itself(call.endpoint, document),
        most=document.get("max_output_tokens"),
    )


class Kept:
    """The events of one generation, for its recording, as long as they are not too many."""

    def __init__(self, room_bytes: int) -> None:
        self.events: list[bytes] = []
        self.counts: list[int] = []
        self._room_bytes = room_bytes

    @property
    def is_too_large(self) -> bool:
        return self._room_bytes < 0

    def add(self, event: bytes, tokens: int) -> None:
        self._room_bytes -= len(event)
        if self.is_too_large:
            self.events.clear()
        else:
            self.events.append(event)
            self.counts.append(tokens)
