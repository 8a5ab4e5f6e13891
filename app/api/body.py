"""From a request's bytes to a JSON object, within bounds of size, time, depth and type."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec
from starlette.types import Receive, Scope

from app.errors import BadCall, BodyTimedOut, BodyTooLarge, NotJson
from app.settings import Settings

DISCARD_S = 5.0

_decoder = msgspec.json.Decoder()


class ClientLeft(Exception):
    """Raised when the client closes the connection before its request is complete."""


async def read_object(scope: Scope, receive: Receive, settings: Settings) -> dict[str, Any]:
    """`read` and `parse` in one."""
    return parse(await read(dict(scope["headers"]), receive, settings), settings.max_json_depth)


async def read(headers: dict[bytes, bytes], receive: Receive, settings: Settings) -> bytes:
    """The bytes of a JSON request's body.

    Raises:
        NotJson: another content type. BodyTooLarge, BodyTimedOut: past the bounds.
        ClientLeft: nobody is there any more.
    """
    if not is_json(headers):
        raise NotJson("the content type must be application/json")
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > settings.max_body_bytes:
        if b"expect" not in headers:  # a client that asks first has not sent anything yet
            await _discard(receive)
        raise _too_large(settings.max_body_bytes)
    if _is_there(receive):  # nearly always; then there is nothing to wait for, and no clock is needed
        return await _read(receive, settings.max_body_bytes)
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            return await _read(receive, settings.max_body_bytes)
    except TimeoutError:
        raise BodyTimedOut(
            f"the request body did not arrive within {settings.body_timeout_s:g} s", headers={"connection": "close"}
        ) from None


def _is_there(receive: Receive) -> bool:
    """Whether the whole body has arrived, where the server lets us know: uvicorn's `receive` is a method of its
    request's cycle, which says so. Anywhere else: not known."""
    return getattr(getattr(receive, "__self__", None), "more_body", True) is False


def is_json(headers: dict[bytes, bytes]) -> bool:
    """Whether the body is said to be JSON."""
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    return media_type == b"application/json" or media_type.endswith(b"+json")


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
            if message.get("more_body", False):
                await _discard(receive)
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return b"".join(chunks)
        message = await receive()


async def _discard(receive: Receive) -> None:
    """Take in what a client still sends and forget it, for a while: to close the connection under a client
    that is sending resets it, and then what we answer is lost."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while (await receive()).get("more_body", False):
                continue


def _too_large(max_bytes: int) -> BodyTooLarge:
    # There may be more on its way than we read, so the connection cannot be used again.
    return BodyTooLarge(f"the request body is larger than {max_bytes} bytes", headers={"connection": "close"})


def parse(body: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object in `body`; raises BadCall where there is none, or one nested deeper than `max_depth`."""
    try:
        parsed = _decoder.decode(body)
    except RecursionError:
        raise BadCall(f"the body is nested deeper than {max_depth} levels") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadCall(f"the body is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise BadCall(f"the body must be a JSON object, not {_kind(parsed)}")
    # Every level has a bracket; those inside strings count too, so this only ever errs towards looking closer.
    if body.count(b"[") + body.count(b"{") > max_depth and _is_deeper(parsed, max_depth):
        raise BadCall(f"the body is nested deeper than {max_depth} levels")
    return parsed


def _is_deeper(parsed: Any, max_depth: int) -> bool:
    """Whether arrays and objects are nested deeper than that; level by level, without recursion."""
    level = [parsed]
    for _ in range(max_depth):
        inner = [value for each in level for value in (each.values() if type(each) is dict else each)]
        level = [value for value in inner if type(value) is dict or type(value) is list]
        if not level:
            return False
    return True


def _kind(value: Any) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
