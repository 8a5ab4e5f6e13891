"""Which calls are of one family, and which of its recordings serves which call: by properties, without an engine."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cache.recording import Recording
from app.cache.reuse import Rule, Shape, covers, family, rule
from app.domain import Endpoint, Form
from tests.cache.test_key import BODIES, WEIGHTS, call, json_values
from tests.cache.test_key import key as key_of

LIMITS = {
    Endpoint.CHAT: "max_tokens",
    Endpoint.COMPLETIONS: "max_tokens",
    Endpoint.MESSAGES: "max_tokens",
    Endpoint.RESPONSES: "max_output_tokens",
}
endpoints = st.sampled_from(list(LIMITS))
limits = st.integers(1, 10_000)


def key(endpoint: Endpoint, body: dict[str, Any]) -> str:
    relaxed, _ = family(call(endpoint, body))
    return key_of(endpoint, relaxed.body)


@given(endpoints, limits, limits)
def test_calls_that_differ_in_their_limit_alone_are_one_family_of_two_shapes(
    endpoint: Endpoint, one: int, other: int
) -> None:
    bodies = [BODIES[endpoint] | {LIMITS[endpoint]: limit} for limit in (one, other)]
    keys = [key(endpoint, body) for body in bodies]
    assert keys[0] == keys[1]
    shapes = [family(call(endpoint, body))[1] for body in bodies]
    assert (shapes[0].key(keys[0]) == shapes[1].key(keys[1])) is (one == other)


@given(endpoints, st.text(min_size=1), json_values)
def test_any_other_field_makes_another_family(endpoint: Endpoint, name: str, value: Any) -> None:
    body = BODIES[endpoint] | {LIMITS[endpoint]: 7}
    other = body | {f"x {name}": value}
    assert key(endpoint, body) != key(endpoint, other)


@given(st.integers(1, 128), st.sampled_from([{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}]))
def test_choices_and_log_probabilities_are_a_shape_in_chat(n: int, logprobs: dict[str, Any]) -> None:
    body = BODIES[Endpoint.CHAT]
    assert key(Endpoint.CHAT, body | {"n": n} | logprobs) == key(Endpoint.CHAT, body)


@pytest.mark.parametrize("truncation", ["auto", None])
def test_a_prompt_that_depends_on_its_limit_is_no_family(truncation: str | None) -> None:
    bodies = [BODIES[Endpoint.RESPONSES] | {"truncation": truncation, "max_output_tokens": limit} for limit in (5, 6)]
    assert key(Endpoint.RESPONSES, bodies[0]) != key(Endpoint.RESPONSES, bodies[1])


@given(st.sampled_from([0, -1, 1.5, True, "7", None, [7]]), endpoints)
def test_a_limit_that_is_none_is_left_to_the_engine(limit: Any, endpoint: Endpoint) -> None:
    shape = family(call(endpoint, BODIES[endpoint] | {LIMITS[endpoint]: limit}))[1]
    assert shape.limit in (None, 16)  # absent, or what completions make of that


def recording(**fields: Any) -> Recording:
    made = Recording(Form.EVENTS, 1.7e9, "i", 1, b"x", b"", b"", 10, 8, 0.25, 4e9, "m@0")
    return msgspec.structs.replace(made, **fields)


def told(limit: int | None, most: int, *, ended: bool = True) -> Recording:
    """Of Responses, that repeat the limit which they went by."""
    return recording(limit=limit, most=most, ended=ended)


def responses(limit: int | None) -> Shape:
    return Shape(limit, endpoint=Endpoint.RESPONSES)


def test_a_response_serves_the_limits_that_the_engine_would_tell_as_they_were_asked() -> None:
    assert rule(told(None, 100), responses(None), 200) is Rule.SAME
    assert [rule(told(None, 100), responses(limit), 200) for limit in (7, 8, 100, 101)] == [
        None,
        Rule.ENDED,
        Rule.ENDED,
        None,
    ]
    assert rule(told(50, 50), responses(None), 200) is None, "the engine would tell what it has room for"
    assert rule(told(50, 50, ended=False), responses(60), 200) is None


def test_a_response_takes_the_place_of_none_that_tells_more() -> None:
    assert covers(told(None, 100), told(50, 50))
    assert not covers(told(50, 50), told(None, 100))
    assert not covers(told(50, 50), told(60, 60))
    assert covers(told(None, 100), told(None, 100))


@given(limits, st.integers(1, 100), st.booleans(), limits)
def test_what_did_not_end_by_itself_serves_no_larger_limit(limit: int, tokens: int, streams: bool, asked: int) -> None:
    made = recording(limit=limit, completion_tokens=min(tokens, limit), ended=False, counts=[1, 2] if streams else None)
    found = rule(made, Shape(asked, is_cuttable=True), WEIGHTS.max_model_len)
    if asked > limit:
        assert found is None
    if found is Rule.CUT:
        assert asked in (1, 2)
