"""The framing of server-sent events: the bytes of events to JSON documents and back. Knows no endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from app.errors import Incomplete

DONE = b"data: [DONE]\n\n"


def event(document: dict[str, Any], name: str | None = None) -> bytes:
    """One complete event; `name` gives it an `event:` line."""
    line = b"" if name is None else b"event: " + name.encode() + b"\n"
    return line + b"data: " + msgspec.json.encode(document) + b"\n\n"


def payloads(events: Sequence[bytes]) -> list[bytes]:
    """What the events carry, in order; comments (vLLM's keep-alive) carry nothing and are left out."""
    return [payload for payload in map(_payload, events) if payload is not None]


def parse(payload: bytes) -> dict[str, Any]:
    """Raises `Incomplete` when the payload is not one whole JSON object."""
    try:
        return _decode_object(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise Incomplete("an event does not hold a JSON object") from exc


_decode_object = msgspec.json.Decoder(dict[str, Any]).decode


def _payload(one: bytes) -> bytes | None:
    data = [line[5:].removeprefix(b" ") for line in one.splitlines() if line.startswith(b"data:")]
    return b"\n".join(data) if data else None
