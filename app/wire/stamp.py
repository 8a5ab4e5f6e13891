"""The id and the time of creation of an answer that is ready as bytes, replaced in place."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

Identity = tuple[str, int | None]
# A ready answer that waits for its identity, and for the request it answers (responses repeat parts of it).
Template = Callable[[Identity, dict[str, Any]], bytes]


def template(content: bytes, old: Identity) -> Template:
    """`content` cut at the fragments `"id":"old"` and `"created":N`, to be joined again around others.

    No parsing: making it is one scan, and filling it in one join, which is what a hot hit pays. Text cannot match,
    for JSON escapes the quotes in it.
    """
    ident, created = old
    marks = [rb'"id":(?P<ident> ?)' + re.escape(msgspec.json.encode(ident))]
    if created is not None:
        marks.append(rb'"created":(?P<created> ?)' + str(created).encode() + rb"(?=[,}])")
    pieces: list[bytes] = []
    idents: list[int] = []
    createds: list[int] = []
    at = 0
    for found in re.finditer(b"|".join(marks), content):
        group = found.lastgroup
        assert group is not None  # noqa: S101 - each alternative has one
        pieces += [content[at : found.end(group)], b""]
        (idents if group == "ident" else createds).append(len(pieces) - 1)
        at = found.end()
    pieces.append(content[at:])

    def filled(new: Identity, _: dict[str, Any]) -> bytes:
        parts = pieces.copy()
        ident, at = msgspec.json.encode(new[0]), str(new[1] if new[1] is not None else created).encode()
        for index in idents:
            parts[index] = ident
        for index in createds:
            parts[index] = at
        return b"".join(parts)

    return filled


def renaming(old: str, new: str) -> Callable[[bytes], bytes]:
    """For the events of a stream that passes: two searches each, where a template would scan for both fragments, be
    made and be filled once an event."""
    before, after = msgspec.json.encode(old), msgspec.json.encode(new)
    tight, loose = b'"id":' + before, b'"id": ' + before

    def renamed(content: bytes) -> bytes:
        return content.replace(tight, b'"id":' + after).replace(loose, b'"id": ' + after)

    return renamed
