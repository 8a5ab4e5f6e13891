"""Where one event ends and where a whole stream does, by bytes alone: asked of every event that passes."""

from __future__ import annotations

from app.domain import Endpoint

# `event:` lines are ours or vLLM's to write, and `[DONE]` stands alone: generated text is JSON-escaped inside `data:`.
_LAST: dict[Endpoint, tuple[bytes, ...]] = {
    Endpoint.CHAT: (b"data: [DONE]",),
    Endpoint.COMPLETIONS: (b"data: [DONE]",),
    Endpoint.RESPONSES: (b"event: response.completed\n", b"event: response.incomplete\n"),
    Endpoint.MESSAGES: (b"event: message_stop\n",),
}


def is_last(endpoint: Endpoint, event: bytes) -> bool:
    """Whether this is the event that ends a successful stream of this endpoint."""
    if event.startswith(b"id: "):
        event = event[event.index(b"\n") + 1 :]
    return event.startswith(_LAST[endpoint])


def split(content: bytes) -> list[bytes]:
    """The events of concatenated events, each with its blank line."""
    return [event + b"\n\n" for event in content.split(b"\n\n") if event]
