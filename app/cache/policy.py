"""Who may read and write the cache for one call: HTTP's directives, the body's `cache` object, the setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.errors import BadCall

_BODY_FIELDS = ("no_cache", "no_store", "only_if_cached", "max_age", "samples", "sticky")
MOST_SAMPLES = 64


@dataclass(frozen=True, slots=True)
class Directives:
    """RFC 9111's request directives that mean something here.

    `no_cache`: generate anew (and record). `no_store`: record nothing; a recording that is there already
    may be used (section 5.2.1.5). `max_age_s`: an older recording is a miss. `only_if_cached`: a recording
    or a 504. `samples`: a sampled call draws from a pool of so many answers, 0 for none; `sticky`: the same user
    draws the same. None leaves either to the server's settings.
    """

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age_s: int | None = None
    samples: int | None = None
    sticky: bool | None = None

    def accepts(self, age_s: float) -> bool:
        return self.max_age_s is None or age_s <= self.max_age_s


NONE = Directives()


def directives(header: str, body_object: Any) -> Directives:
    """What the `Cache-Control` header and the body's `cache` object ask for, the stricter of the two.

    Unknown directives of the header are ignored, as HTTP says; in our own object they are an error, so that
    a typing mistake does not silently cache.

    Raises:
        BadCall: the object is not one, has unknown fields, or a wrong value.
    """
    if not header and body_object is None:
        return NONE
    return _stricter(_from_header(header), _from_body(body_object))


def _from_header(header: str) -> Directives:
    parts = [part.strip().lower().partition("=") for part in header.split(",")]
    names = {name.strip() for name, _, _ in parts}
    ages = [value.strip().strip('"') for name, _, value in parts if name.strip() == "max-age"]
    # RFC 9111, 4.2.1: what is not a number of seconds is treated as stale, that is as 0.
    age = min((_seconds(age) for age in ages), default=None)
    return Directives("no-cache" in names, "no-store" in names, "only-if-cached" in names, age)


def _seconds(age: str) -> int:
    if not (age.isascii() and age.isdigit()):
        return 0
    return int(age) if len(age) <= 10 else 2**31  # RFC 9111, 1.2.2: what is too large to hold is 2^31


def _from_body(given: Any) -> Directives:
    if given is None:
        return NONE
    if not isinstance(given, dict):
        raise BadCall('`cache` must be an object such as {"no_cache": true}', param="cache")
    fields = {str(name).replace("-", "_"): value for name, value in given.items()}
    for name, value in fields.items():
        if name not in _BODY_FIELDS:
            raise BadCall(f"`cache.{name}` is not known; there are {', '.join(_BODY_FIELDS)}", param=f"cache.{name}")
        if name == "samples":
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_SAMPLES:
                raise BadCall(f"`cache.samples` must be a whole number from 0 to {MOST_SAMPLES}", param="cache.samples")
        elif name == "max_age":
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise BadCall("`cache.max_age` must be a whole number of seconds, 0 or more", param="cache.max_age")
        elif not isinstance(value, bool):
            raise BadCall(f"`cache.{name}` must be true or false", param=f"cache.{name}")
    return Directives(
        fields.get("no_cache", False),
        fields.get("no_store", False),
        fields.get("only_if_cached", False),
        fields.get("max_age"),
        fields.get("samples"),
        fields.get("sticky"),
    )


def _stricter(a: Directives, b: Directives) -> Directives:
    ages = [age for age in (a.max_age_s, b.max_age_s) if age is not None]
    return Directives(
        a.no_cache or b.no_cache,
        a.no_store or b.no_store,
        a.only_if_cached or b.only_if_cached,
        min(ages, default=None),
        b.samples,
        b.sticky,
    )
