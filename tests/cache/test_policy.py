"""What a client may ask of the cache, by header and by body: tables of what is said and what it means."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cache.policy import NONE, Directives, directives
from app.errors import BadCall

HEADERS: list[tuple[str, Directives]] = [
    ("", NONE),
    ("no-cache", Directives(no_cache=True)),
    ("NO-CACHE", Directives(no_cache=True)),
    (" no-cache ,  no-store ", Directives(no_cache=True, no_store=True)),
    ("no-store", Directives(no_store=True)),
    ("only-if-cached", Directives(only_if_cached=True)),
    ("max-age=60", Directives(max_age_s=60)),
    ('max-age="60"', Directives(max_age_s=60)),
    ("Max-Age = 60", Directives(max_age_s=60)),
    ("max-age=0", Directives(max_age_s=0)),
    ("max-age=007", Directives(max_age_s=7)),
    # RFC 9111, 4.2.1: what cannot be understood is stale.
    ("max-age=", Directives(max_age_s=0)),
    ("max-age", Directives(max_age_s=0)),
    ("max-age=soon", Directives(max_age_s=0)),
    ("max-age=-1", Directives(max_age_s=0)),
    ("max-age=1.5", Directives(max_age_s=0)),
    ("max-age=٣", Directives(max_age_s=0)),
    # RFC 9111, 1.2.2: what is too large to hold is 2^31.
    ("max-age=" + "9" * 30, Directives(max_age_s=2**31)),
    ("max-age=" + "9" * 5000, Directives(max_age_s=2**31)),
    ("max-age=60, max-age=5", Directives(max_age_s=5)),
    ("no-cache, max-age=5, only-if-cached", Directives(no_cache=True, only_if_cached=True, max_age_s=5)),
    # What we do not know, HTTP wants ignored.
    ("no-transform, stale-if-error=5, private", NONE),
    ("no-cache-please", NONE),
    (",,,", NONE),
    ("=", NONE),
]


@pytest.mark.parametrize(("header", "meant"), HEADERS, ids=[header[:30] for header, _ in HEADERS])
def test_the_header_means_what_http_says(header: str, meant: Directives) -> None:
    assert directives(header, None) == meant


BODIES: list[tuple[Any, Directives]] = [
    (None, NONE),
    ({}, NONE),
    ({"no_cache": True}, Directives(no_cache=True)),
    ({"no-cache": True}, Directives(no_cache=True)),
    ({"no_cache": False}, NONE),
    ({"no_store": True, "max_age": 5}, Directives(no_store=True, max_age_s=5)),
    ({"only_if_cached": True}, Directives(only_if_cached=True)),
    ({"max_age": 0}, Directives(max_age_s=0)),
    ({"max_age": 10**30}, Directives(max_age_s=10**30)),
    ({"max_age": None}, NONE),
]


@pytest.mark.parametrize(("given_object", "meant"), BODIES)
def test_the_object_of_the_body_says_the_same(given_object: Any, meant: Directives) -> None:
    assert directives("", given_object) == meant


@pytest.mark.parametrize(
    ("given_object", "param"),
    [
        (True, "cache"),
        ("no-cache", "cache"),
        ([], "cache"),
        (0, "cache"),
        ({"nocache": True}, "cache.nocache"),
        ({"": True}, "cache."),
        ({"no_cache": 1}, "cache.no_cache"),
        ({"no_cache": None}, "cache.no_cache"),
        ({"no_store": "true"}, "cache.no_store"),
        ({"only_if_cached": []}, "cache.only_if_cached"),
        ({"max_age": -1}, "cache.max_age"),
        ({"max_age": True}, "cache.max_age"),
        ({"max_age": 1.5}, "cache.max_age"),
        ({"max_age": "60"}, "cache.max_age"),
        ({"max_age": {}}, "cache.max_age"),
    ],
)
def test_a_mistake_in_the_object_is_an_error_that_names_the_field(given_object: Any, param: str) -> None:
    with pytest.raises(BadCall) as refused:
        directives("", given_object)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("header", "given_object", "meant"),
    [
        ("no-cache", {"no_store": True}, Directives(no_cache=True, no_store=True)),
        ("max-age=60", {"max_age": 5}, Directives(max_age_s=5)),
        ("max-age=5", {"max_age": 60}, Directives(max_age_s=5)),
        ("max-age=5", {"max_age": None}, Directives(max_age_s=5)),
        ("no-cache", {"no_cache": False}, Directives(no_cache=True)),
    ],
)
def test_the_stricter_of_the_two_counts(header: str, given_object: Any, meant: Directives) -> None:
    assert directives(header, given_object) == meant


@pytest.mark.parametrize(
    ("max_age", "age", "is_accepted"),
    [(None, 1e9, True), (60, 60.0, True), (60, 60.1, False), (0, 0.0, True), (0, 0.001, False), (2**31, 1e9, True)],
)
def test_an_older_recording_than_asked_for_is_not_accepted(max_age: int | None, age: float, is_accepted: bool) -> None:
    assert Directives(max_age_s=max_age).accepts(age) is is_accepted


@given(st.text(max_size=200))
def test_no_header_is_an_error(header: str) -> None:
    directives(header, None)
