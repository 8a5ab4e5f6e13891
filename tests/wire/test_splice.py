"""A stream continued by one that says the same: nothing twice, nothing missing, nothing mixed."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import wire
from app.domain import Endpoint
from app.errors import Diverged
from tests.wire import bodies
from tests.wire.test_round_trip import answers

TEXT = st.text(alphabet='abc ñ€😀\n"\\', min_size=1, max_size=30)


def chunks(pieces: list[str], ident: str, *, ends: bool = True, created: int = 1) -> list[bytes]:
    def event(delta: dict, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        document = {
            "id": ident,
            "object": "chat.completion.chunk",
            "created": created,
            "model": "m",
            "choices": [choice],
        }
        return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"

    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    closing = {
        "id": ident,
        "object": "chat.completion.chunk",
        "created": created,
        "model": "m",
        "choices": [],
        "usage": usage,
    }
    events = [event({"role": "assistant", "content": ""}), *(event({"content": piece}) for piece in pieces)]
    events += [
        event({"content": ""}, "stop"),
        b"data: " + json.dumps(closing, separators=(",", ":")).encode() + b"\n\n",
        b"data: [DONE]\n\n",
    ]
    return events if ends else events[: 1 + len(pieces)]


def cut_up(text: str, at: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(each % (len(text) + 1) for each in at)})
    return [text[a:b] for a, b in pairwise(edges)]


@given(TEXT, st.lists(st.integers(0, 99), max_size=6), st.lists(st.integers(0, 99), max_size=6), st.data())
def test_wherever_it_is_cut_and_however_chunks_fall_the_whole_is_the_same(
    text: str, first: list[int], second: list[int], data: st.DataObject
) -> None:
    old = chunks(cut_up(text, first), "chatcmpl-old")
    new = chunks(cut_up(text, second), "chatcmpl-new", created=2)
    sent = old[: data.draw(st.integers(1, len(old)))]
    splice = wire.Splice(Endpoint.CHAT, sent)
    whole = sent + [event for event in map(splice.fit, new) if event is not None]
    assert wire.fold(Endpoint.CHAT, whole)["choices"] == wire.fold(Endpoint.CHAT, old)["choices"]
    assert whole[-1] == b"data: [DONE]\n\n"
    assert b"chatcmpl-new" not in b"".join(whole), "one answer has one name"
    assert b'"created":2' not in b"".join(whole), "and one time"
    assert b"".join(whole).count(b'"role":"assistant"') == 1


@given(TEXT, TEXT)
def test_what_says_something_else_is_never_mixed_in(sent: str, other: str) -> None:
    splice = wire.Splice(Endpoint.CHAT, chunks([sent], "chatcmpl-old", ends=False))
    if other.startswith(sent) or sent.startswith(other):
        return
    with pytest.raises(Diverged):
        list(map(splice.fit, chunks([other], "chatcmpl-new")))


@given(answers, st.data())
@settings(max_examples=300)
def test_a_stream_of_every_kind_can_be_continued_from_every_event(
    answer: tuple[Endpoint, bodies.Json], data: st.DataObject
) -> None:
    """Reasoning, tools, several choices, log-probabilities: what was sent is left out, under the same names."""
    endpoint, body = answer
    events = wire.unfold(endpoint, body)
    cut = data.draw(st.integers(1, len(events)))
    splice = wire.Splice(endpoint, events[:cut])
    rest = [event for event in map(splice.fit, events) if event is not None]
    assert wire.fold(endpoint, [*events[:cut], *rest]) == body
