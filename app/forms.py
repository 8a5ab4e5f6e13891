"""An answer between engine, recording and client: in which form it is asked for, what is kept of it, and how a
recording is made to the measure of another call. Pure, but for the time of a recording.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

from app import wire
from app.cache.recording import Recording
from app.cache.reuse import Rule, Shape
from app.domain import Call, Endpoint, Form, Timings

# The closing usage event is asked of the engine for each of these streams, since a later client may want it.
_USAGE_ON_REQUEST = (Endpoint.CHAT, Endpoint.COMPLETIONS)


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


def in_form(recording: Recording, endpoint: Endpoint, *, is_stream: bool) -> list[bytes]:
    """The recorded answer as a flight's events, usage and all, or as its one body."""
    if is_stream:
        if recording.form is Form.EVENTS:
            return wire.split(recording.content())
        return wire.unfold(endpoint, json.loads(recording.head))
    if recording.form is Form.BODY:
        return [recording.head]
    return [recording.body or dump(wire.fold(endpoint, wire.split(recording.content())))]


def dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def timings_of(recording: Recording) -> Timings:
    return Timings(prompt_tokens=recording.prompt_tokens, completion_tokens=recording.completion_tokens)


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
    return dump(document), counts


def made(
    call: Call, shape: Shape, form: Form, document: dict[str, Any], parts: tuple[bytes, bytes, bytes], began: float
) -> Recording:
    prompt_tokens, completion_tokens = wire.usage(call.endpoint, document)
    ident, created = wire.identity(call.endpoint, document)
    return Recording(
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
        limit=shape.limit,
        n=shape.n,
        logprobs=shape.logprobs,
        ended=wire.ended_by_itself(call.endpoint, document),
    )


def cut_to_measure(recording: Recording, shape: Shape, rule: Rule) -> Recording:
    """The recording as the engine would have answered a call of this shape."""
    if rule is Rule.CUT and shape.limit is not None and recording.counts is not None:
        events = wire.shorten(wire.split(recording.content()), recording.counts, shape.limit)
        head, usage, tail = wire.split_usage(Endpoint.CHAT, events)
        return recording.with_content(Form.EVENTS, head, usage, tail, completion_tokens=shape.limit)
    if rule is Rule.FEWER:
        document = _body_of(recording)
        tokens = recording.choice_tokens or [recording.completion_tokens]
        fewer = wire.fewer(document, shape.n, tokens, logprobs=shape.logprobs is not None)
        content = dump(fewer)
        return recording.with_content(Form.BODY, content, b"", b"", completion_tokens=sum(tokens[: shape.n]))
    return recording


def _body_of(recording: Recording) -> dict[str, Any]:
    if recording.form is Form.BODY:
        body: dict[str, Any] = json.loads(recording.head)
        return body
    # Several choices and log-probabilities are chat's and completions' alone, and the chunks say which of the two.
    endpoint = Endpoint.COMPLETIONS if b'"object":"text_completion"' in recording.head[:300] else Endpoint.CHAT
    return wire.fold(endpoint, wire.split(recording.content()))
