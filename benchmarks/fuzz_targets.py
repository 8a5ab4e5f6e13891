"""What a fuzzer may feed: each target takes any bytes, and whatever it raises is a fault.

A refusal (BadCall) of what a client sends, and a RoomError (a miss, another try) over what Redis holds, are right
answers and no faults. The seeds are whole and good: a fuzzer begins from them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import zstandard

from app import wire
from app.api.body import parse
from app.cache import reuse
from app.cache.key import cache_key, is_deterministic, why_uncacheable
from app.cache.policy import directives
from app.cache.recording import MAGIC, UNSIGNED, Recording, _name, unpack
from app.cache.seal import Purpose, Seal
from app.domain import Call, Caller, Endpoint, Form, Weights
from app.engine.constraints import constraints, digest
from app.engine.scripted import _body, _Name
from app.errors import BadCall, BrokenRecording, Incomplete
from app.flight.flight import Flight, Ticket
from app.flight.live import About, Entry, Script
from app.flight.live import _encode as encode
from app.flight.logbook import LogBook
from app.flight.names import Position, new_rider, new_uid, position
from app.gate.screen import Screen

_WEIGHTS = Weights("m", "", "a" * 64, "b" * 64, {}, max_model_len=8192)
_STREAMING = [endpoint for endpoint in Endpoint if endpoint is not Endpoint.EMBEDDINGS]


def body(data: bytes) -> None:
    """A request's body: parsed, screened, understood, and its key made; written down anew, it has the same key."""
    endpoint = list(Endpoint)[data[0] % len(Endpoint)] if data else Endpoint.CHAT
    with contextlib.suppress(BadCall):
        parsed = parse(data[1:], 64)
        directives("", parsed.pop("cache", None))
        Screen().check(parsed)
        for each in constraints(parsed):
            digest(each)
        key = _key(endpoint, parsed)
        if key is not None:
            again = json.loads(json.dumps(parsed))
            assert _key(endpoint, again) == key, "the same body, another key"
            assert _key(endpoint, dict(reversed(again.items()))) == key, "the order of members changed the key"


def _key(endpoint: Endpoint, parsed: dict[str, Any]) -> str | None:
    call = Call(endpoint, parsed, Caller(), "")
    if why_uncacheable(call, _WEIGHTS) is not None:
        return None
    is_deterministic(call, _WEIGHTS)
    family, shape = reuse.family(call)
    reuse.reads_the_same_streamed(call)
    return shape.key(cache_key(family, _WEIGHTS, tenant="t"))


def headers(data: bytes) -> None:
    """What clients say in headers: `Cache-Control`, `Last-Event-ID`, and the `cache` object."""
    text = data.decode("latin-1")
    with contextlib.suppress(BadCall):
        directives(text, None)
    found = position(text)
    assert found is None or position(found.stream_id) is not None
    with contextlib.suppress(BadCall, ValueError):
        directives("", json.loads(text))


def streams(data: bytes) -> None:
    """Events: folded to a body."""
    endpoint = _STREAMING[data[0] % len(_STREAMING)] if data else Endpoint.CHAT
    events = wire.split(data[1:])
    with contextlib.suppress(Incomplete):
        wire.fold(endpoint, events)
    for event in events:
        wire.is_last(endpoint, event)


def recordings(data: bytes) -> None:
    """A value of Redis under a recording's key, as it is and behind a head that was made for it."""
    flags, content = data[0] & 1 if data else 0, data[1:]
    for value in (data, MAGIC + bytes([flags]) + UNSIGNED.close(content, _name("k", flags))):
        with contextlib.suppress(BrokenRecording):
            found = unpack(value, "k")
            found.content()


def entries(data: bytes) -> None:
    """Entries of another server's live stream, signed as that server would, and of one that takes it over."""
    flight = Flight(Ticket("", Endpoint.CHAT, "", "", True, True, True), "u", True)
    log_book, seal = LogBook(flight), Seal(Purpose.LIVE)
    for content in data.split(b"\xff\xff"):
        entry = Script(seal).read(seal.close(content, b"u"), "u")
        assert entry is None or isinstance(entry, Entry)
        log_book.take(entry)


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (body, headers, streams, recordings, entries)
}


def seeds(target: str) -> list[bytes]:
    """Whole, good inputs."""
    match target:
        case "body":
            return [bytes([number]) + json.dumps(each).encode() for each in _BODIES for number in range(len(Endpoint))]
        case "headers":
            samples = b'{"samples":4,"sticky":true,"max_age":60}'
            return [
                b"no-cache, max-age=60, min-fresh=1, only-if-cached",
                Position(new_uid("k" * 64), new_rider(), True).event_id(3, 5).encode(),
                samples,
            ]
        case "streams":
            return [bytes([number]) + b"".join(each) for number, each in enumerate(_streams())]
        case "recordings":
            return [b"\0" + _content(), b"\1" + zstandard.compress(_content())]
    return [b"\xff\xff".join(_written(each, stream)) for each, stream in zip(_STREAMING, _streams(), strict=True)]


def _written(endpoint: Endpoint, stream: list[bytes]) -> Iterator[bytes]:
    """A leader that dies half-way, and the whole of who takes over."""
    about = About("k", endpoint.value, "o", "w", True)
    for token, events in (("t", stream[: len(stream) // 2]), ("u", stream)):
        yield encode(Entry("open", token, 0, about=about))
        for number, event in enumerate(events):
            yield encode(Entry("events", token, number + 1, event))
    yield encode(Entry("end", "u", len(stream) + 1, tokens=(1, 2)))


_BODIES: list[dict[str, Any]] = [
    {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"image_url": {"url": "data:,x"}}]}],
        "temperature": 0,
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}],
        "cache": {"max_age": 5, "no_store": True},
    },
    {"prompt": ["a", [1, 2]], "seed": 1, "logit_bias": {"5": 1.5}, "structured_outputs": {"regex": "a+"}},
    {"input": [{"role": "user", "content": "x"}], "tools": [{"type": "mcp", "server_label": "s"}], "store": False},
]


def _streams() -> Iterator[list[bytes]]:
    for each in _STREAMING:
        call = Call(each, {"messages": []}, Caller(), "")
        yield wire.unfold(each, _body(call, ["one ", "two "], _Name("i", 1, "m", "rf")))


def _content() -> bytes:
    found = Recording(Form.BODY, 1.0, "i", 1, b"{}", b"", b"", 1, 2, 0.5, 2.0, "m@a", counts=[1, 2], body=b"{}")
    return msgspec.msgpack.encode(found)
