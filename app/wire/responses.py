"""Responses: a `response` object as a body; as a stream, typed and numbered events that end with the same object.

The shapes and the order are those of vLLM's handler, which closes with `response.completed` even where the
answer was cut short by `max_output_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from app.errors import Incomplete
from app.wire import ends, sse, text
from app.wire.stamp import Identity, Template

__all__ = ["ID_PREFIX", "check_body", "fold", "identity", "split_usage", "template", "unfold", "usage"]

Json = dict[str, Any]
# An event's type and its fields, before it has its sequence number.
Event = tuple[str, Json]

ID_PREFIX = "resp_"

_LAST = ("response.completed", "response.incomplete")
_BROKEN = ("error", "response.failed", "response.cancelled")
# What only the finished response holds.
_UNKNOWN_AT_FIRST = (
    "incomplete_details",
    "usage",
    "kv_transfer_params",
    "ec_transfer_params",
    "input_messages",
    "output_messages",
)
# What a response repeats of its request without it making a different answer; of the limit see `_renewed`.
_ECHOED = ("metadata", "user", "store")


def fold(events: Sequence[bytes]) -> Json:
    documents = [sse.parse(payload) for payload in sse.payloads(events) if payload != b"[DONE]"]
    if any(document.get("type") in _BROKEN or document.get("error") is not None for document in documents):
        raise Incomplete("the stream holds an error")
    if not documents or documents[-1].get("type") not in _LAST:
        raise Incomplete("the stream does not end with the response")
    body: Json = documents[-1]["response"]
    check_body(body)
    return body | {"output": _as_in_a_body(body["output"])}


def unfold(body: Json) -> list[bytes]:
    events = [
        *_opening(body),
        *(event for at, item in enumerate(body["output"]) for event in _item(at, item)),
        ("response.completed", {"response": body}),
    ]
    return [
        sse.event(fields | {"sequence_number": number, "type": kind}, name=kind)
        for number, (kind, fields) in enumerate(events)
    ]


def check_body(body: Json) -> None:
    if body.get("object") != "response" or body.get("error") is not None or body.get("output") is None:
        raise Incomplete("the body is not a whole response")
    status, details = body.get("status"), body.get("incomplete_details") or {}
    if status != "completed" and (status, details.get("reason")) != ("incomplete", "max_output_tokens"):
        raise Incomplete(f"the response did not finish: {status}")
    if not isinstance(body.get("usage"), dict):
        raise Incomplete("the response has no usage")


def split_usage(events: Sequence[bytes]) -> tuple[bytes, bytes, bytes]:
    return b"".join(events), b"", b""


def usage(body: Json) -> tuple[int, int]:
    return body["usage"]["input_tokens"], body["usage"]["output_tokens"]


def identity(document: Json) -> tuple[str, int | None]:
    response = document.get("response", document)
    return response["id"], response["created_at"]


def template(content: bytes, _: Identity) -> Template:
    """The old identity is not needed: it is the response objects that get the new id, time and echoes."""
    if content[:1] == b"{":
        body = sse.parse(content)
        return lambda new, request_body: msgspec.json.encode(_renewed(body, new, request_body))
    events = ends.split(content)
    return lambda new, request_body: b"".join(_renewed_event(event, new, request_body) for event in events)


def _as_in_a_body(output: list[Json]) -> list[Json]:
    """vLLM's streams call a reasoning item "completed" where its bodies say nothing, and they keep the blanks
    around tool calls as a message of their own, which its bodies drop.
    """
    has_calls = any(item["type"].endswith("_call") for item in output)
    kept = [item for item in output if not (has_calls and _is_blank(item))]
    return [item | {"status": None} if _is_whole_reasoning(item) else item for item in kept]


def _is_blank(item: Json) -> bool:
    texts = [part.get("text") for part in item["content"]] if item["type"] == "message" else []
    return bool(texts) and all(said is not None and not said.strip() for said in texts)


def _is_whole_reasoning(item: Json) -> bool:
    return item["type"] == "reasoning" and item.get("status") == "completed"


def _opening(body: Json) -> Iterator[Event]:
    begun = {key: value for key, value in body.items() if key != "metrics"}
    begun |= {key: None for key in _UNKNOWN_AT_FIRST if key in body} | {"output": [], "status": "in_progress"}
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}


def _item(at: int, item: Json) -> Iterator[Event]:
    build = _ITEMS.get(item["type"])
    if build is None:
        yield _added(at, item, {})
    else:
        yield from build(at, item)
    yield "response.output_item.done", {"item": item, "output_index": at}


def _message(at: int, item: Json) -> Iterator[Event]:
    yield _added(at, item, {"content": [], "status": "in_progress"})
    for content_at, part in enumerate(item["content"]):
        where = {"content_index": content_at, "item_id": item["id"], "output_index": at}
        yield from _text_part(where, part) if part["type"] == "output_text" else _refusal_part(where, part)


def _text_part(where: Json, part: Json) -> Iterator[Event]:
    yield "response.content_part.added", where | {"part": part | {"text": "", "annotations": [], "logprobs": []}}
    for piece, logprobs in _cut(part["text"], part.get("logprobs") or []):
        yield "response.output_text.delta", where | {"delta": piece, "logprobs": logprobs}
    yield "response.output_text.done", where | {"logprobs": [], "text": part["text"]}
    yield "response.content_part.done", where | {"part": part}


def _refusal_part(where: Json, part: Json) -> Iterator[Event]:
    yield "response.content_part.added", where | {"part": part | {"refusal": ""}}
    for piece in text.pieces(part["refusal"]):
        yield "response.refusal.delta", where | {"delta": piece}
    yield "response.refusal.done", where | {"refusal": part["refusal"]}
    yield "response.content_part.done", where | {"part": part}


def _reasoning(at: int, item: Json) -> Iterator[Event]:
    yield _added(at, item, {"content": None, "status": "in_progress"})
    for content_at, part in enumerate(item.get("content") or ()):
        where = {"content_index": content_at, "item_id": item["id"], "output_index": at}
        yield "response.content_part.added", where | {"part": part | {"text": ""}}
        for piece in text.pieces(part["text"]):
            yield "response.reasoning_text.delta", where | {"delta": piece}
        yield "response.reasoning_text.done", where | {"text": part["text"]}
        yield "response.content_part.done", where | {"part": part}


def _function_call(at: int, item: Json) -> Iterator[Event]:
    where = {"item_id": item["id"], "output_index": at}
    yield _added(at, item, {"arguments": "", "status": "in_progress"})
    for piece in text.pieces(item["arguments"]):
        yield "response.function_call_arguments.delta", where | {"delta": piece}
    yield "response.function_call_arguments.done", where | {"arguments": item["arguments"], "name": item["name"]}


def _custom_tool_call(at: int, item: Json) -> Iterator[Event]:
    where = {"item_id": item["id"], "output_index": at}
    yield _added(at, item, {"input": ""})
    for piece in text.pieces(item["input"]):
        yield "response.custom_tool_call_input.delta", where | {"delta": piece}
    yield "response.custom_tool_call_input.done", where | {"input": item["input"]}


_ITEMS: dict[str, Callable[[int, Json], Iterator[Event]]] = {
    "message": _message,
    "reasoning": _reasoning,
    "function_call": _function_call,
    "custom_tool_call": _custom_tool_call,
}


def _added(at: int, item: Json, unfinished: Json) -> Event:
    return "response.output_item.added", {"item": item | unfinished, "output_index": at}


def _cut(said: str, logprobs: list[Json]) -> list[tuple[str, list[Json]]]:
    """The pieces, each with its tokens' logprobs; tokens after the text go with the last piece."""
    pieces: list[tuple[str, list[Json]]] = []
    at = 0
    for piece, count in text.along(said, [token["token"] for token in logprobs]):
        own = [_delta_logprob(token) for token in logprobs[at : at + count]]
        at += count
        if piece or not pieces:
            pieces.append((piece, own))
        else:
            pieces[-1][1].extend(own)
    return pieces


def _delta_logprob(token: Json) -> Json:
    tops = [{"token": top["token"], "logprob": top["logprob"]} for top in token.get("top_logprobs") or ()]
    return {"token": token["token"], "logprob": token["logprob"], "top_logprobs": tops}


def _renewed_event(event: bytes, new: Identity, request_body: Json) -> bytes:
    # Most events are deltas, which hold no response; in their text the quotes would be escaped.
    if b'"response":' not in event:
        return event
    (payload,) = sse.payloads([event])
    document = sse.parse(payload)
    if not isinstance(document.get("response"), dict):
        return event
    renewed = _renewed(document["response"], new, request_body)
    return sse.event(document | {"response": renewed}, name=document["type"])


def _renewed(response: Json, new: Identity, request_body: Json) -> Json:
    echoes = {key: request_body.get(key) for key in _ECHOED if key in response}
    asked, told = request_body.get("max_output_tokens"), response.get("max_output_tokens")
    if type(asked) is int and type(told) is int:
        echoes["max_output_tokens"] = min(asked, told)  # `told` is what the model has room for, or asked of it before
    return response | {"id": new[0], "created_at": new[1]} | echoes
