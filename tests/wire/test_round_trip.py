"""Unfolding a body and folding it again gives the same body, whatever vLLM may have put into it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import wire
from app.domain import Endpoint
from app.errors import Incomplete
from tests.wire import bodies

BODIES = {
    Endpoint.CHAT: bodies.chat_bodies(),
    Endpoint.COMPLETIONS: bodies.completion_bodies(),
    Endpoint.RESPONSES: bodies.response_bodies(),
    Endpoint.MESSAGES: bodies.message_bodies(),
}
answers = st.sampled_from(list(BODIES)).flatmap(lambda endpoint: st.tuples(st.just(endpoint), BODIES[endpoint]))


@given(answers)
@settings(max_examples=400)
def test_a_body_survives_being_streamed(answer: tuple[Endpoint, bodies.Json]) -> None:
    endpoint, body = answer
    wire.check_body(endpoint, body)
    folded = wire.fold(endpoint, wire.unfold(endpoint, body))
    assert folded == body
    assert json.dumps(folded) == json.dumps(body), "the fields come in the body's order"


@given(answers)
@settings(max_examples=200)
def test_every_event_is_one_whole_sse_event(answer: tuple[Endpoint, bodies.Json]) -> None:
    for event in wire.unfold(*answer):
        *lines, blank, end = event.split(b"\n")
        assert (blank, end) == (b"", b"")
        assert [line.split(b": ")[0] for line in lines] in ([b"data"], [b"event", b"data"])


@given(answers, st.data())
@settings(max_examples=300)
def test_a_stream_with_its_end_cut_off_is_never_whole(
    answer: tuple[Endpoint, bodies.Json], data: st.DataObject
) -> None:
    endpoint, body = answer
    events = wire.unfold(endpoint, body)
    kept = data.draw(st.integers(0, len(events) - 1))
    with pytest.raises(Incomplete):
        wire.fold(endpoint, events[:kept])


@given(answers)
@settings(max_examples=200)
def test_comments_change_nothing(answer: tuple[Endpoint, bodies.Json]) -> None:
    endpoint, body = answer
    events = [part for event in wire.unfold(endpoint, body) for part in (b": keep-alive\n\n", event)]
    assert wire.fold(endpoint, events) == body


@given(answers)
@settings(max_examples=200)
def test_a_fresh_identity_changes_nothing_else(answer: tuple[Endpoint, bodies.Json]) -> None:
    endpoint, body = answer
    old = wire.identity(endpoint, body)
    new = (wire.new_id(endpoint), None if old[1] is None else 1999999999)
    echoes = {"metadata": body.get("metadata"), "user": body.get("user")}
    expected = body | {"id": new[0]} | ({"metadata": body["metadata"]} if "metadata" in body else {})
    if new[1] is not None:
        expected["created_at" if endpoint is Endpoint.RESPONSES else "created"] = new[1]

    compact = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    assert json.loads(wire.template(endpoint, compact, old)(new, echoes)) == expected
    spaced = json.dumps(body).encode()
    assert json.loads(wire.template(endpoint, spaced, old)(new, echoes)) == expected
    stream = wire.template(endpoint, b"".join(wire.unfold(endpoint, body)), old)(new, echoes)
    assert wire.fold(endpoint, [part + b"\n\n" for part in stream.split(b"\n\n") if part]) == expected
    assert old[0].encode() not in stream
    for form in (json.dumps(body).encode(), *wire.unfold(endpoint, body)):
        passed = wire.renaming(endpoint, old, new[0], echoes)(form)
        assert passed == wire.template(endpoint, form, old)((new[0], old[1]), echoes)


@given(answers)
@settings(max_examples=100)
def test_head_and_tail_are_the_stream_without_its_usage_event(answer: tuple[Endpoint, bodies.Json]) -> None:
    endpoint, body = answer
    events = wire.unfold(endpoint, body)
    head, usage, tail = wire.split_usage(endpoint, events)
    assert head + usage + tail == b"".join(events)
    if endpoint in (Endpoint.CHAT, Endpoint.COMPLETIONS):
        assert (usage, tail) == (events[-2], b"data: [DONE]\n\n")
        assert b'"usage"' not in head
    else:
        assert (usage, tail) == (b"", b"")
