"""Anthropic messages: a `message` as a body; as a stream, named events that build it block by block.

vLLM's bodies leave nulls out and hold at most one thinking and one text block, before the tools, while its
streams may alternate: folding puts the blocks in the body's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from app.errors import Incomplete
from app.wire import sse, text
from app.wire.stamp import template

__all__ = ["ID_PREFIX", "check_body", "fold", "identity", "split_usage", "template", "unfold", "usage"]

Json = dict[str, Any]

ID_PREFIX = "msg_"

_LATER = ("content", "stop_reason", "stop_sequence", "usage")


def fold(events: Sequence[bytes]) -> Json:
    documents = [sse.parse(payload) for payload in sse.payloads(events)]
    if any(document.get("type") == "error" for document in documents):
        raise Incomplete("the stream holds an error")
    if not documents or documents[-1].get("type") != "message_stop":
        raise Incomplete("the stream does not end with message_stop")
    start, closing = _only(documents, "message_start")["message"], _only(documents, "message_delta")
    body = {
        **{key: value for key, value in start.items() if key not in _LATER},
        "content": _in_order(_blocks(documents)),
        **closing["delta"],
        "usage": closing["usage"],
    }
    body = {key: value for key, value in _body_order(body).items() if value is not None}
    check_body(body)
    return body


def unfold(body: Json) -> list[bytes]:
    return [sse.event(document, name=document["type"]) for document in _documents(body)]


def check_body(body: Json) -> None:
    if body.get("type") != "message" or not body.get("content") or not isinstance(body.get("usage"), dict):
        raise Incomplete("the body is not a whole message")
    # vLLM gives no stop reason to what was aborted.
    if body.get("stop_reason") is None:
        raise Incomplete("the message did not finish")


def split_usage(events: Sequence[bytes]) -> tuple[bytes, bytes, bytes]:
    return b"".join(events), b"", b""


def usage(body: Json) -> tuple[int, int]:
    """Anthropic counts the prompt tokens that came from or went into a prefix cache apart from the others."""
    counts = body["usage"]
    cached = (counts.get("cache_read_input_tokens") or 0) + (counts.get("cache_creation_input_tokens") or 0)
    return counts["input_tokens"] + cached, counts["output_tokens"]


def identity(document: Json) -> tuple[str, int | None]:
    return document.get("message", document)["id"], None


def _only(documents: list[Json], kind: str) -> Json:
    found = [document for document in documents if document.get("type") == kind]
    if len(found) != 1:
        raise Incomplete(f"the stream has {len(found)} {kind} events")
    return found[0]


def _blocks(documents: list[Json]) -> list[Json]:
    """The content blocks in the stream's order. Raises `Incomplete` when one was not closed."""
    opened: dict[int, Json] = {}
    deltas: dict[int, list[Json]] = {}
    open_now: set[int] = set()
    for document in documents:
        match document.get("type"):
            case "content_block_start":
                opened[document["index"]] = document["content_block"]
                deltas[document["index"]] = []
                open_now.add(document["index"])
            case "content_block_delta":
                deltas[document["index"]].append(document["delta"])
            case "content_block_stop":
                open_now.discard(document["index"])
    if open_now:
        raise Incomplete("a content block was not closed")
    return [_block(opened[index], deltas[index]) for index in sorted(opened)]


def _block(start: Json, deltas: list[Json]) -> Json:
    match start["type"]:
        case "text":
            return {"type": "text", "text": start.get("text", "") + _said(deltas, "text")}
        case "thinking":
            thinking = start.get("thinking", "") + _said(deltas, "thinking")
            return {"type": "thinking", "thinking": thinking, "signature": _said(deltas, "signature")}
        case "tool_use":
            given = _input(_said(deltas, "partial_json")) or start.get("input") or {}
            return {"type": "tool_use", "id": start["id"], "name": start["name"], "input": given}
        case kind:
            raise Incomplete(f"a content block of an unknown type: {kind}")


def _input(arguments: str) -> Json:
    """Raises `Incomplete` for what `max_tokens` cut short: a body has no place for half an object."""
    try:
        return msgspec.json.decode(arguments, type=Json) if arguments else {}
    except msgspec.MsgspecError as exc:
        raise Incomplete("the input of a tool is not a whole JSON object") from exc


def _said(deltas: list[Json], key: str) -> str:
    return "".join(delta.get(key) or "" for delta in deltas)


def _in_order(blocks: list[Json]) -> list[Json]:
    thoughts, texts, tools = ([b for b in blocks if b["type"] == kind] for kind in ("thinking", "text", "tool_use"))
    thinking, said = _said(thoughts, "thinking"), _said(texts, "text")
    content: list[Json] = []
    if thinking:
        content.append({"type": "thinking", "thinking": thinking} | _signature(thoughts[-1]))
    # Blanks around tool calls count as nothing in vLLM's bodies.
    if said and not (tools and not said.strip()):
        content.append({"type": "text", "text": said})
    return content + tools or [{"type": "text", "text": ""}]


def _signature(thought: Json) -> Json:
    return {"signature": thought["signature"]} if thought["signature"] else {}


def _body_order(body: Json) -> Json:
    keys = ("id", "type", "role", "content", "model", "stop_reason", "stop_sequence", "usage")
    return {key: body.get(key) for key in keys} | body


def _documents(body: Json) -> Iterator[Json]:
    counts = body["usage"]
    nothing_yet = {"input_tokens": sum(usage(body)) - counts["output_tokens"], "output_tokens": 0}
    unfinished: Json = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": nothing_yet}
    yield {"type": "message_start", "message": body | unfinished}
    for index, block in enumerate(body["content"]):
        yield from _block_documents(index, block)
    stop = {"stop_reason": body["stop_reason"], "stop_sequence": body.get("stop_sequence")}
    yield {"type": "message_delta", "delta": stop, "usage": counts}
    yield {"type": "message_stop"}


def _block_documents(index: int, block: Json) -> Iterator[Json]:
    start, deltas = _taken_apart(block)
    yield {"type": "content_block_start", "content_block": start, "index": index}
    for delta in deltas:
        yield {"type": "content_block_delta", "delta": delta, "index": index}
    yield {"type": "content_block_stop", "index": index}


def _taken_apart(block: Json) -> tuple[Json, list[Json]]:
    match block["type"]:
        case "text":
            return block | {"text": ""}, [{"type": "text_delta", "text": p} for p in text.pieces(block["text"])]
        case "thinking":
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in text.pieces(block["thinking"])]
            if block.get("signature"):
                deltas.append({"type": "signature_delta", "signature": block["signature"]})
            return block | {"thinking": "", "signature": ""}, deltas
        case "tool_use":
            arguments = msgspec.json.encode(block["input"]).decode()
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in text.pieces(arguments)]
            return block | {"input": {}}, deltas
        case _:
            return block, []
