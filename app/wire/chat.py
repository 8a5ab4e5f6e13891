"""Chat completions: `chat.completion` as a body, `chat.completion.chunk` events as a stream.

The shapes are those of vLLM's handler. Its bodies show every field, null or not; its chunks show what the
handler set, and the usage chunk leaves nulls out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from app.errors import Incomplete
from app.wire import chunks, sse, text
from app.wire.chunks import Json, identity, split_usage, usage
from app.wire.stamp import template

__all__ = ["ID_PREFIX", "check_body", "fold", "identity", "split_usage", "template", "unfold", "usage"]

ID_PREFIX = "chatcmpl-"

_BODY = "chat.completion"
_CHUNK = "chat.completion.chunk"
_FIRST_CHUNK = ("prompt_token_ids", "prompt_text")
_BODY_ONLY = (*chunks.BODY_ONLY, "prompt_logprobs")
_WHOLE_FIELDS = ("annotations", "audio", "function_call")


def fold(events: Sequence[bytes]) -> Json:
    found, closing = chunks.read(events)
    return {
        **chunks.head(found[0], _BODY),
        "choices": [_choice(index, parts) for index, parts in enumerate(chunks.by_index(found))],
        "service_tier": chunks.first(found, "service_tier"),
        "system_fingerprint": chunks.first([closing, *found], "system_fingerprint"),
        "usage": chunks.full_usage(closing["usage"]),
        "prompt_logprobs": chunks.first(found, "prompt_logprobs"),
        "prompt_token_ids": chunks.first(found, "prompt_token_ids"),
        "prompt_text": chunks.first(found, "prompt_text"),
        "kv_transfer_params": chunks.first(found, "kv_transfer_params"),
        "ec_transfer_params": chunks.first(found, "ec_transfer_params"),
        "metrics": chunks.full_metrics(closing.get("metrics")),
    }


def unfold(body: Json) -> list[bytes]:
    head = chunks.head(body, _CHUNK) | chunks.present(body, ("system_fingerprint",))
    opening = [head | {"choices": [_opening(choice)]} | _first_fields(body) for choice in body["choices"]]
    opening[0] |= chunks.present(body, _BODY_ONLY)
    parts = chunks.in_turn([_parts(choice) for choice in body["choices"]])
    return [
        *(sse.event(chunk) for chunk in opening),
        *(sse.event(head | {"choices": [part]}) for part in parts),
        chunks.usage_event(body, _CHUNK),
        sse.DONE,
    ]


def check_body(body: Json) -> None:
    chunks.check(body, _BODY)


def _choice(index: int, parts: list[Json]) -> Json:
    finish_reason = chunks.last(parts, "finish_reason")
    return {
        "index": index,
        "message": _message([part["delta"] for part in parts], finish_reason),
        "logprobs": _logprobs(parts),
        "finish_reason": finish_reason,
        "stop_reason": chunks.last(parts, "stop_reason"),
        "token_ids": chunks.joined(parts, "token_ids"),
        "routed_experts": chunks.last(parts, "routed_experts"),
    }


def _message(deltas: list[Json], finish_reason: str) -> Json:
    calls = _calls(deltas)
    return {
        "role": chunks.first(deltas, "role"),
        "content": _content(deltas, bool(calls), finish_reason),
        "refusal": _said(deltas, "refusal") or None,
        **{key: chunks.first(deltas, key) for key in _WHOLE_FIELDS},
        **({"tool_calls": calls} if calls else {}),
        "reasoning": _said(deltas, "reasoning") or None,
    }


def _content(deltas: list[Json], has_calls: bool, finish_reason: str) -> str | None:
    """The text; without one, the null or the empty string that the body has in its place.

    vLLM's streams open with `content: ""` whatever comes, so what its body has there is inferred: null beside
    tool calls (blanks around them count as nothing) or reasoning, and "" for an empty answer or a named tool,
    which alone finishes with "stop". Our own streams say it: null in the opening delta, or "" said again in
    the second.
    """
    said = _said(deltas, "content")
    if said and not (has_calls and not said.strip()):
        return said
    if deltas[0].get("content") is None:
        return None
    if not has_calls and not _said(deltas, "reasoning"):
        return ""
    is_said_again = len(deltas) > 1 and deltas[1].get("content") == ""
    return "" if is_said_again or (has_calls and finish_reason == "stop") else None


def _said(deltas: list[Json], key: str) -> str:
    return "".join(delta.get(key) or "" for delta in deltas)


def _calls(deltas: list[Json]) -> list[Json]:
    calls: dict[int, list[Json]] = {}
    for delta in deltas:
        for piece in delta.get("tool_calls") or ():
            calls.setdefault(piece["index"], []).append(piece)
    return [_call(calls[index]) for index in sorted(calls)]


def _call(pieces: list[Json]) -> Json:
    functions = [piece.get("function") or {} for piece in pieces]
    name, call_id = chunks.first(functions, "name"), chunks.first(pieces, "id")
    if not name or not call_id:
        raise Incomplete("a tool call has no name or no id")
    return {
        "id": call_id,
        "type": chunks.first(pieces, "type") or "function",
        "function": {"name": name, "arguments": _said(functions, "arguments")},
    }


def _logprobs(parts: list[Json]) -> Json | None:
    tokens = chunks.joined([part.get("logprobs") or {} for part in parts], "content")
    return None if tokens is None else {"content": [_token(token) for token in tokens]}


def _token(token: Json) -> Json:
    # A token outside the top logprobs comes with its defaults left out.
    return {
        "token": token["token"],
        "logprob": token.get("logprob", -9999.0),
        "bytes": token.get("bytes"),
        "top_logprobs": token.get("top_logprobs", []),
    }


def _first_fields(body: Json) -> Json:
    return {key: body.get(key) for key in _FIRST_CHUNK}


def _opening(choice: Json) -> Json:
    message = choice["message"]
    content = None if message.get("content") is None else ""
    delta = {"role": message["role"], "content": content} | chunks.present(message, _WHOLE_FIELDS)
    return {"index": choice["index"], "delta": delta, "logprobs": None, "finish_reason": None}


def _parts(choice: Json) -> list[Json]:
    logprobs, token_ids = choice.get("logprobs"), choice.get("token_ids")
    tokens = None if logprobs is None else logprobs["content"]
    taken = _deltas(choice["message"], [token["token"] for token in tokens or ()])
    counts = [count for _, count in taken]
    shares = zip(
        chunks.dealt(tokens, counts),
        chunks.dealt(token_ids, chunks.token_shares(token_ids, counts)),
        strict=True,
    )
    parts = [
        {
            "index": choice["index"],
            "delta": delta,
            "logprobs": None if own is None else {"content": own},
            "finish_reason": None,
            "token_ids": ids,
        }
        for (delta, _), (own, ids) in zip(taken, shares, strict=True)
    ]
    parts[-1] |= {"finish_reason": choice["finish_reason"], "stop_reason": choice.get("stop_reason")}
    parts[-1] |= chunks.present(choice, ("routed_experts",))
    return parts


def _deltas(message: Json, tokens: list[str]) -> list[tuple[Json, int]]:
    """The deltas after the opening one, the last of them for the finish; each with how many tokens it takes."""
    content, calls = message.get("content"), message.get("tool_calls") or []
    spoken = list(_spoken(message.get("reasoning") or "", content or "", tokens))
    left = len(tokens) - sum(count for _, count in spoken)
    if content == "" and (calls or message.get("reasoning")):
        spoken.insert(0, ({"content": ""}, 0))
    silent: list[Json] = [{"refusal": piece} for piece in text.pieces(message.get("refusal") or "")]
    silent += [{"tool_calls": [piece]} for index, call in enumerate(calls) for piece in _call_pieces(index, call)]
    silent += [{} if content is None else {"content": ""}]
    return spoken + list(zip(silent, text.shares(left, len(silent)), strict=True))


def _spoken(reasoning: str, content: str, tokens: list[str]) -> Iterator[tuple[Json, int]]:
    if not tokens:
        yield from (({"reasoning": piece}, 0) for piece in text.pieces(reasoning))
        yield from (({"content": piece}, 0) for piece in text.pieces(content))
        return
    at = 0
    for piece, count in text.along(reasoning + content, tokens):
        thought, said = piece[: max(0, len(reasoning) - at)], piece[max(0, len(reasoning) - at) :]
        at += len(piece)
        if thought:
            yield {"reasoning": thought}, 0 if said else count
        if said:
            yield {"content": said}, count


def _call_pieces(index: int, call: Json) -> Iterator[Json]:
    function = call["function"]
    named = {"name": function["name"], "arguments": ""}
    yield {"id": call["id"], "type": call["type"], "index": index, "function": named}
    for piece in text.pieces(function["arguments"]):
        yield {"index": index, "function": {"arguments": piece}}
