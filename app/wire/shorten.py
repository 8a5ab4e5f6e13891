"""A recorded answer as it would have come under a smaller limit, with fewer choices, or without log-probabilities.

What may be done to which recording is decided elsewhere (`app/cache/reuse.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.domain import Endpoint
from app.wire import sse

Json = dict[str, Any]

_TEXT_DELTA = b"event: response.output_text.delta\n"


def boundaries(endpoint: Endpoint, events: Sequence[bytes], counts: Sequence[int]) -> list[int]:
    """`counts`, the tokens up to each event, less those of events at which an answer cannot be cut: 0 there."""
    if endpoint is Endpoint.RESPONSES and not _is_one_text(events):
        return [0] * len(counts)
    return [count if _is_boundary(endpoint, event) else 0 for event, count in zip(events, counts, strict=True)]


def shorten(endpoint: Endpoint, events: Sequence[bytes], counts: Sequence[int], limit: int) -> list[bytes]:
    """The events of a stream cut at this many tokens, which is one of the `boundaries`."""
    last = max(at for at, count in enumerate(counts) if count == limit and _is_boundary(endpoint, events[at]))
    match endpoint:
        case Endpoint.MESSAGES:
            return _shorter_message(events, last, limit)
        case Endpoint.RESPONSES:
            return _shorter_response(events, last, limit)
    usage = next(event for event in reversed(events) if not _has_choice(event) and not event.startswith(sse.DONE))
    return [*events[:last], _finished(events[last]), _with_tokens(usage, limit), sse.DONE]


def fewer(body: Json, n: int, choice_tokens: Sequence[int], *, logprobs: bool) -> Json:
    """The body with its first choices alone, and perhaps without their log-probabilities."""
    choices = [choice if logprobs else choice | {"logprobs": None} for choice in body["choices"][:n]]
    tokens = sum(choice_tokens[:n])
    usage = body["usage"] | {"completion_tokens": tokens, "total_tokens": body["usage"]["prompt_tokens"] + tokens}
    return body | {"choices": choices, "usage": usage}


def _is_boundary(endpoint: Endpoint, event: bytes) -> bool:
    # By bytes: the quotes in generated text are escaped, so that it cannot look like this.
    match endpoint:
        case Endpoint.MESSAGES:
            return event.startswith(b"event: content_block_delta\n") and b'"type":"text_delta"' in event
        case Endpoint.RESPONSES:
            return event.startswith(_TEXT_DELTA)
    return _has_choice(event)


# --- chat and completions ----------------------------------------------------------------------------


def _has_choice(event: bytes) -> bool:
    return event.startswith(b"data: {") and b'"choices":[{' in event


def _finished(event: bytes) -> bytes:
    document = _document(event)
    (choice,) = document["choices"]
    ended = choice | {"finish_reason": "length", "stop_reason": None}
    return sse.event(document | {"choices": [ended]})


def _with_tokens(event: bytes, tokens: int) -> bytes:
    document = _document(event)
    usage = document["usage"]
    usage |= {"completion_tokens": tokens, "total_tokens": usage["prompt_tokens"] + tokens}
    return sse.event(document | {"usage": usage})


# --- messages ----------------------------------------------------------------------------------------


def _shorter_message(events: Sequence[bytes], last: int, limit: int) -> list[bytes]:
    """The text block is closed where it is, and the message after it."""
    closed = {"type": "content_block_stop", "index": _document(events[last])["index"]}
    recorded = next(event for event in reversed(events) if event.startswith(b"event: message_delta\n"))
    ended = _document(recorded)
    ended |= {"delta": {"stop_reason": "max_tokens", "stop_sequence": None}}
    ended |= {"usage": ended["usage"] | {"output_tokens": limit}}
    return [*events[: last + 1], *(sse.event(each, name=each["type"]) for each in (closed, ended)), events[-1]]


# --- responses ---------------------------------------------------------------------------------------


def _is_one_text(events: Sequence[bytes]) -> bool:
    """Whether the response holds one text and nothing else: then what follows its last delta only says it again."""
    kinds = [event.partition(b"\n")[0] for event in events]
    opened = (b"event: response.output_item.added", b"event: response.content_part.added")
    return all(kinds.count(kind) == 1 for kind in opened) and _TEXT_DELTA.strip() in kinds


def _shorter_response(events: Sequence[bytes], last: int, limit: int) -> list[bytes]:
    said = "".join(_document(event)["delta"] for event in events[: last + 1] if event.startswith(_TEXT_DELTA))
    number = _document(events[last])["sequence_number"]
    shorter = list(events[: last + 1])
    for event in events[last + 1 :]:
        if event.startswith(b"event: ") and not event.startswith(_TEXT_DELTA):
            number += 1
            document = _ending(_document(event), said, limit) | {"sequence_number": number}
            shorter.append(sse.event(document, name=document["type"]))
    return shorter


def _ending(document: Json, said: str, limit: int) -> Json:
    """One of the events after the last delta, of an answer whose text is `said`."""
    match document["type"]:
        case "response.output_text.done":
            return document | {"text": said}
        case "response.content_part.done":
            return document | {"part": document["part"] | {"text": said}}
        case "response.output_item.done":
            return document | {"item": _item(document["item"], said)}
        case _:
            return document | {"response": _incomplete(document["response"], said, limit)}


def _item(item: Json, said: str) -> Json:
    (part,) = item["content"]
    return item | {"content": [part | {"text": said}]}


def _incomplete(response: Json, said: str, limit: int) -> Json:
    (item,) = response["output"]
    usage = response["usage"]
    details = usage["output_tokens_details"]
    if details.get("output_tokens_per_turn"):
        details = details | {"output_tokens_per_turn": [limit]}
    return response | {
        "status": "incomplete",
        "incomplete_details": {"reason": "max_output_tokens"},
        "output": [_item(item, said)],
        "usage": usage
        | {
            "output_tokens": limit,
            "total_tokens": usage["input_tokens"] + limit,
            "output_tokens_details": details,
        },
    }


def _document(event: bytes) -> Json:
    (payload,) = sse.payloads([event])
    return sse.parse(payload)
