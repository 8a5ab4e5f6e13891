"""The two wire forms of an answer, a complete JSON body and a stream of SSE events, and pure functions between them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from app.domain import Endpoint
from app.errors import Incomplete
from app.wire import chat, completions, embeddings, messages, responses, sse, stamp
from app.wire.ends import is_last, split
from app.wire.shorten import boundaries, fewer, shorten
from app.wire.splice import Splice
from app.wire.stamp import Identity, Template

__all__ = [
    "Identity",
    "Splice",
    "Template",
    "boundaries",
    "check_body",
    "dump",
    "ended_by_itself",
    "fewer",
    "fold",
    "identity",
    "identity_of",
    "is_last",
    "named",
    "new_id",
    "renaming",
    "shorten",
    "split",
    "split_usage",
    "template",
    "unfold",
    "usage",
]


def dump(body: dict[str, Any]) -> bytes:
    """A body's bytes, written as vLLM's own routes write them."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def fold(endpoint: Endpoint, events: Sequence[bytes]) -> dict[str, Any]:
    """The body that a call without `stream` would have given; each event is one SSE event with its blank line.

    Raises `Incomplete` unless the events are one whole, successful answer, usage event and all. Raises
    ValueError for an endpoint that does not stream.
    """
    try:
        return _WIRES[endpoint].fold(events)
    except (KeyError, TypeError, AttributeError) as exc:
        raise Incomplete(f"not a stream of {endpoint.label}: {exc!r}") from exc


def unfold(endpoint: Endpoint, body: dict[str, Any]) -> list[bytes]:
    """The events that a streaming call would have given, with the usage event; `fold` makes the same body of them.

    The body must have passed `check_body`. Raises ValueError for an endpoint that does not stream.
    """
    return _WIRES[endpoint].unfold(body)


def check_body(endpoint: Endpoint, body: dict[str, Any]) -> None:
    """Raises `Incomplete` unless the body is a complete, successful answer."""
    try:
        _WIRES[endpoint].check_body(body)
    except (KeyError, TypeError, AttributeError) as exc:
        raise Incomplete(f"not a body of {endpoint.label}: {exc!r}") from exc


def split_usage(endpoint: Endpoint, events: Sequence[bytes]) -> tuple[bytes, bytes, bytes]:
    """Head, usage event and tail: all three for a client that asked for usage, the outer two for one that did not.

    The usage event is empty where there is none of its own kind; then everything is in the head.
    """
    return _WIRES[endpoint].split_usage(events)


def usage(endpoint: Endpoint, body: dict[str, Any]) -> tuple[int, int]:
    """Prompt tokens and completion tokens."""
    return _WIRES[endpoint].usage(body)


def identity(endpoint: Endpoint, document: dict[str, Any]) -> Identity:
    """The answer's id and time of creation (messages have none), from its body or its first event's JSON."""
    return _WIRES[endpoint].identity(document)


def identity_of(endpoint: Endpoint, content: bytes) -> Identity | None:
    """The same from the bytes of a body or of a stream's first event; None for a comment. Raises `Incomplete`."""
    payloads = [content] if content[:1] == b"{" else sse.payloads([content])
    try:
        return identity(endpoint, sse.parse(payloads[0])) if payloads else None
    except (KeyError, TypeError, AttributeError) as exc:
        raise Incomplete(f"not the first event of {endpoint.label}: {exc!r}") from exc


def template(endpoint: Endpoint, content: bytes, old: Identity) -> Template:
    """A body or concatenated events, to be sent under other identities; called with one, and with the request that it
    answers (responses repeat parts of it), it gives the bytes to send."""
    return _WIRES[endpoint].template(content, old)


def renaming(endpoint: Endpoint, old: Identity, new: str, request_body: dict[str, Any]) -> Callable[[bytes], bytes]:
    """The same for what passes event by event, all of it under one other id and the old time."""
    if endpoint is Endpoint.RESPONSES:  # its id is not all that differs between two requests
        return lambda content: template(endpoint, content, old)((new, old[1]), request_body)
    return stamp.renaming(old[0], new)


def ended_by_itself(endpoint: Endpoint, body: dict[str, Any]) -> bool:
    """Whether no choice of this body was cut short by a limit; False where that cannot be told."""
    if endpoint is Endpoint.RESPONSES:
        return body.get("status") == "completed"
    if endpoint is Endpoint.MESSAGES:
        return body.get("stop_reason") in ("end_turn", "stop_sequence", "tool_use")
    choices = body.get("choices") or ()
    return bool(choices) and all(choice.get("finish_reason") in ("stop", "tool_calls") for choice in choices)


def new_id(endpoint: Endpoint) -> str:
    # An id must be unique and need not be secret; the kernel's generator would be the dearest step of a hit's stamp.
    return f"{_WIRES[endpoint].ID_PREFIX}{_random.getrandbits(128):032x}"


def named(endpoint: Endpoint, digits: str) -> str:
    """An id of the endpoint's kind with these digits."""
    return f"{_WIRES[endpoint].ID_PREFIX}{digits}"


_random = random.Random()  # noqa: S311


class _Wire(Protocol):
    """What the module of each endpoint has; the functions above say what they promise."""

    @property
    def ID_PREFIX(self) -> str: ...  # noqa: N802

    def fold(self, events: Sequence[bytes]) -> dict[str, Any]: ...
    def unfold(self, body: dict[str, Any]) -> list[bytes]: ...
    def check_body(self, body: dict[str, Any]) -> None: ...
    def split_usage(self, events: Sequence[bytes]) -> tuple[bytes, bytes, bytes]: ...
    def usage(self, body: dict[str, Any]) -> tuple[int, int]: ...
    def identity(self, document: dict[str, Any]) -> Identity: ...
    def template(self, content: bytes, old: Identity) -> Template: ...


_WIRES: dict[Endpoint, _Wire] = {
    Endpoint.CHAT: chat,
    Endpoint.COMPLETIONS: completions,
    Endpoint.RESPONSES: responses,
    Endpoint.MESSAGES: messages,
    Endpoint.EMBEDDINGS: embeddings,
}
