"""Text completions: `text_completion` as a body and as a stream, in the shapes of vLLM's handler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.wire import chunks, sse, text
from app.wire.chunks import Json, identity, split_usage, usage
from app.wire.stamp import template

__all__ = ["ID_PREFIX", "check_body", "fold", "identity", "split_usage", "template", "unfold", "usage"]

ID_PREFIX = "cmpl-"

_KIND = "text_completion"
_LOGPROBS = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
_BODY_ONLY_IN_CHOICES = ("prompt_logprobs", "routed_experts")


def fold(events: Sequence[bytes]) -> Json:
    found, closing = chunks.read(events)
    return {
        **chunks.head(found[0], _KIND),
        "choices": [_choice(index, parts) for index, parts in enumerate(chunks.by_index(found))],
        "service_tier": chunks.first(found, "service_tier"),
        "system_fingerprint": chunks.first([closing, *found], "system_fingerprint"),
        "usage": chunks.full_usage(closing["usage"]),
        "kv_transfer_params": chunks.first(found, "kv_transfer_params"),
        "ec_transfer_params": chunks.first(found, "ec_transfer_params"),
        "metrics": chunks.full_metrics(closing.get("metrics")),
    }


def unfold(body: Json) -> list[bytes]:
    head = chunks.head(body, _KIND) | chunks.present(body, ("system_fingerprint",))
    parts = chunks.in_turn([_parts(choice) for choice in body["choices"]])
    stream = [head | {"choices": [part]} for part in parts]
    stream[0] |= chunks.present(body, chunks.BODY_ONLY)
    return [*map(sse.event, stream), chunks.usage_event(body, _KIND), sse.DONE]


def check_body(body: Json) -> None:
    chunks.check(body, _KIND)


def _choice(index: int, parts: list[Json]) -> Json:
    return {
        "index": index,
        "text": "".join(part["text"] for part in parts),
        "logprobs": _joined_logprobs(parts),
        "finish_reason": chunks.last(parts, "finish_reason"),
        "stop_reason": chunks.last(parts, "stop_reason"),
        "token_ids": chunks.joined(parts, "token_ids"),
        "prompt_logprobs": chunks.first(parts, "prompt_logprobs"),
        "prompt_token_ids": chunks.first(parts, "prompt_token_ids"),
        "routed_experts": chunks.first(parts, "routed_experts"),
    }


def _joined_logprobs(parts: list[Json]) -> Json | None:
    # Each chunk's text offsets go on where those of the one before ended, so joining is all there is to do.
    found = [part["logprobs"] for part in parts if part.get("logprobs") is not None]
    return {key: chunks.joined(found, key) for key in _LOGPROBS} if found else None


def _parts(choice: Json) -> list[Json]:
    logprobs, token_ids = choice.get("logprobs"), choice.get("token_ids")
    cut = _cut(choice["text"], logprobs["tokens"] if logprobs else ())
    counts = [count for _, count in cut]
    shares = zip(
        _cut_logprobs(logprobs, counts),
        chunks.dealt(token_ids, chunks.token_shares(token_ids, counts)),
        strict=True,
    )
    parts = [
        {
            "index": choice["index"],
            "text": piece,
            "logprobs": own,
            "finish_reason": None,
            "stop_reason": None,
            "prompt_token_ids": None,
            "token_ids": ids,
        }
        for (piece, _), (own, ids) in zip(cut, shares, strict=True)
    ]
    parts[0] |= {"prompt_token_ids": choice.get("prompt_token_ids")}
    parts[-1] |= {"finish_reason": choice["finish_reason"], "stop_reason": choice.get("stop_reason")}
    parts[-1] |= chunks.present(choice, _BODY_ONLY_IN_CHOICES)
    return parts


def _cut(said: str, tokens: Sequence[str]) -> list[tuple[str, int]]:
    """The pieces with the number of tokens each takes; the last one, for the finish, has no text."""
    cut = text.along(said, tokens)
    return cut if cut and not cut[-1][0] else [*cut, ("", 0)]


def _cut_logprobs(logprobs: Json | None, counts: list[int]) -> list[Any]:
    if logprobs is None:
        return [None] * len(counts)
    columns = [chunks.dealt(logprobs[key], counts) for key in _LOGPROBS]
    return [dict(zip(_LOGPROBS, row, strict=True)) for row in zip(*columns, strict=True)]
