"""From a request's bytes to a JSON object, within bounds of size, time, depth and type."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
from starlette.types import Receive, Scope

from app.errors import BadCall, BodyTimedOut, BodyTooLarge, NotJson
from app.settings import Settings

_decoder = msgspec.json.Decoder()


class ClientLeft(Exception):
    """Raised when the client closes the connection before its request is complete."""


async def read_object(scope: Scope, receive: Receive, settings: Settings) -> dict[str, Any]:
    """The request's body as a JSON object.

    Raises:
        NotJson: another content type. BodyTooLarge, BodyTimedOut: past the bounds.
        BadCall: not JSON, not an object, nested too deeply.
        ClientLeft: nobody is there any more.
    """
    _check_headers(scope, settings.max_body_bytes)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            body = await _read(receive, settings.max_body_bytes)
    except TimeoutError:
        raise BodyTimedOut(
            f"the request body did not arrive within {settings.body_timeout_s:g} s", headers={"connection": "close"}
        ) from None
    return parse(body, settings.max_json_depth)


def _check_headers(scope: Scope, max_bytes: int) -> None:
    headers = dict(scope["headers"])
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if media_type != b"application/json" and not media_type.endswith(b"+json"):
        raise NotJson("the content type must be application/json")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)


async def _read(receive: Receive, max_bytes: int) -> bytes:
    message = await receive()
    if not message.get("more_body", False) and message["type"] == "http.request":  # nearly always
        body: bytes = message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        return body
    chunks, size = [], 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return b"".join(chunks)
        message = await receive()


def _too_large(max_bytes: int) -> BodyTooLarge:
    # What is still on its way will not be read, so the connection cannot be used again.
    return BodyTooLarge(f"the request body is larger than {max_bytes} bytes", headers={"connection": "close"})


def parse(body: bytes, max_depth: int) -> dict[str, Any]:
    """Raises BadCall unless `body` is a JSON object nested no deeper than `max_depth`."""
    # Brackets inside strings count too, so this only ever errs towards looking closer.
    if body.count(b"[") + body.count(b"{") > max_depth and _depth(body) > max_depth:
        raise BadCall(f"the body is nested deeper than {max_depth} levels")
    try:
        parsed = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadCall(f"the body is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise BadCall(f"the body must be a JSON object, not {_kind(parsed)}")
    return parsed


def _depth(body: bytes) -> int:
    """Deepest nesting, looking past strings. Linear, without recursion."""
    deepest = depth = at = 0
    while at < len(body):
        byte = body[at]
        if byte == 0x22:  # a string: skip to its closing quote
            at += 1
            while at < len(body) and body[at] != 0x22:
                at += 2 if body[at] == 0x5C else 1
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
        at += 1
    return deepest


def _kind(value: Any) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
