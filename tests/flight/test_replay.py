"""A replay is what was live: for any answer that an engine may give, in either form, cut or whole."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app import forms, wire
from app.cache.near import Held
from app.cache.recording import Recording, pack, unpack
from app.cache.reuse import Shape
from app.cache.seal import Purpose, Seal
from app.domain import Answer, Call, Caller, Endpoint, Form, Timings
from app.flight.flight import Flight, Seat, Ticket
from app.flight.ride import Ride
from tests.wire import bodies
from tests.wire.test_round_trip import answers

KEY = "k" * 64
SEAL = Seal(Purpose.RECORD, [b"s" * 16], encrypts=True)
STREAMS_WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
asked = st.sampled_from([{}, {"stream": True}, STREAMS_WITH_USAGE])


def call(endpoint: Endpoint, body: dict[str, Any]) -> Call:
    return Call(endpoint, {"metadata": {"of": "the later call"}} | body, Caller(), "r")


def recorded(endpoint: Endpoint, body: dict[str, Any], form: Form) -> Recording:
    """As the service would, and through Redis."""
    parts = (wire.dump(body), b"", b"")
    if form is Form.EVENTS:
        parts = wire.split_usage(endpoint, wire.unfold(endpoint, body))
    made = forms.made(call(endpoint, {}), Shape(), form, body, parts, seconds=1.0, ttl_s=60.0, weights="m@0")
    return unpack(pack(made, KEY, compress_above_bytes=500, seal=SEAL), KEY, seal=SEAL)


def live(endpoint: Endpoint, events: list[bytes], later: Call) -> bytes:
    """What a client that follows the generation gets."""
    flight = Flight(Ticket(KEY, endpoint, "t", "m@0", True, True, False), "u" * 24, True)
    for event in events:
        flight.add(event)
    flight.finish()
    seat = Seat(flight, is_first=False, is_streaming=later.is_streaming)
    wants_usage = later.is_streaming and later.wants_usage_event
    return asyncio.run(_content(Ride(seat, later.is_streaming, wants_usage, later.body, Timings()).answer()))


async def _content(answering: Any) -> bytes:
    answer: Answer = await answering if asyncio.iscoroutine(answering) else answering
    return answer.body if answer.body is not None else b"".join([event async for event in answer.events])


def nameless(endpoint: Endpoint, content: bytes, later: Call) -> Any:
    """Under one name for all; a body as what it means, since its bytes may be spaced otherwise."""
    first = content if content[:1] == b"{" else wire.split(content)[0]
    ident = wire.identity_of(endpoint, first)
    renamed = wire.template(endpoint, content, ident)((f"{ident[0][:4]}same", 1), later.body)
    return json.loads(renamed) if content[:1] == b"{" else renamed


@given(answers, asked, st.sampled_from(Form))
@settings(max_examples=250)
def test_a_replay_is_what_a_follower_of_the_generation_got(
    answer: tuple[Endpoint, bodies.Json], body: dict[str, Any], form: Form
) -> None:
    endpoint, document = answer
    later = call(endpoint, body)
    followed = live(endpoint, wire.unfold(endpoint, document), later)
    replayed = asyncio.run(_content(forms.replayed(Held(recorded(endpoint, document, form)), later)))
    assert nameless(endpoint, replayed, later) == nameless(endpoint, followed, later)


PLAIN = {
    Endpoint.CHAT: lambda said: bodies.chat_body(bodies.chat_choice(said)),
    Endpoint.COMPLETIONS: lambda said: bodies.completion_body(bodies.completion_choice(said)),
    Endpoint.MESSAGES: lambda said: bodies.message_body(bodies.text_block(said)),
    Endpoint.RESPONSES: lambda said: bodies.response_body(bodies.message_item(said)),
}
words = st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=12).map(" ".join)


@given(st.sampled_from(list(PLAIN)), words, st.data())
@settings(max_examples=250)
def test_what_is_cut_is_whole_says_the_beginning_and_counts_its_tokens(
    endpoint: Endpoint, said: str, data: st.DataObject
) -> None:
    events = wire.unfold(endpoint, PLAIN[endpoint](said))
    counts, total = [], 0
    for _ in events:
        total += data.draw(st.integers(0, 2))
        counts.append(total)
    points = wire.boundaries(endpoint, events, counts)
    if not any(points):
        return
    limit = data.draw(st.sampled_from([point for point in points if point]))
    shorter = wire.fold(endpoint, wire.shorten(endpoint, events, points, limit))
    wire.check_body(endpoint, shorter)
    assert wire.usage(endpoint, shorter) == (wire.usage(endpoint, PLAIN[endpoint](said))[0], limit)
    assert not wire.ended_by_itself(endpoint, shorter)
    text = _text(endpoint, shorter)
    assert said.startswith(text)
    again = wire.unfold(endpoint, shorter)
    assert wire.fold(endpoint, again) == shorter


def _text(endpoint: Endpoint, body: dict[str, Any]) -> str:
    match endpoint:
        case Endpoint.CHAT:
            return body["choices"][0]["message"]["content"] or ""
        case Endpoint.COMPLETIONS:
            return body["choices"][0]["text"]
        case Endpoint.MESSAGES:
            return body["content"][0]["text"]
        case _:
            return body["output"][0]["content"][0]["text"]
