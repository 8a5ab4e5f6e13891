"""A recorded answer as it would have come under a smaller limit, with fewer choices, or without log-probabilities.

Only for chat and completions; what may be done to which recording is decided elsewhere (`app/cache/reuse.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.wire import sse

Json = dict[str, Any]


def shorten(events: Sequence[bytes], counts: Sequence[int], limit: int) -> list[bytes]:
    """The events of a stream cut at this many tokens. `counts`: the tokens up to each event; one of them is `limit`."""
    last = max(at for at, count in enumerate(counts) if count == limit and _has_choice(events[at]))
    usage = next(event for event in reversed(events) if not _has_choice(event) and not event.startswith(sse.DONE))
    return [*events[:last], _finished(events[last]), _with_tokens(usage, limit), sse.DONE]


def fewer(body: Json, n: int, choice_tokens: Sequence[int], *, logprobs: bool) -> Json:
    """The body with its first choices alone, and perhaps without their log-probabilities."""
    choices = [choice if logprobs else choice | {"logprobs": None} for choice in body["choices"][:n]]
    tokens = sum(choice_tokens[:n])
    usage = body["usage"] | {"completion_tokens": tokens, "total_tokens": body["usage"]["prompt_tokens"] + tokens}
    return body | {"choices": choices, "usage": usage}


def _has_choice(event: bytes) -> bool:
    return event.startswith(b"data: {") and b'"choices":[{' in event


def _finished(event: bytes) -> bytes:
    (payload,) = sse.payloads([event])
    document = sse.parse(payload)
    (choice,) = document["choices"]
    ended = choice | {"finish_reason": "length", "stop_reason": None}
    return sse.event(document | {"choices": [ended]})


def _with_tokens(event: bytes, tokens: int) -> bytes:
    (payload,) = sse.payloads([event])
    document = sse.parse(payload)
    usage = document["usage"]
    usage |= {"completion_tokens": tokens, "total_tokens": usage["prompt_tokens"] + tokens}
    return sse.event(document | {"usage": usage})
