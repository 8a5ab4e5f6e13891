"""What the streams of chat and completions have in common: chunks with choices, one usage chunk, `[DONE]`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, islice, zip_longest
from typing import Any

from app.errors import Incomplete
from app.wire import sse, text

Json = dict[str, Any]

# What vLLM's bodies hold and its streams have no place for. In a replay it rides along, so that nothing is lost.
BODY_ONLY = ("service_tier", "kv_transfer_params", "ec_transfer_params")

_BROKEN_OFF = ("error", "abort")
_USAGE: Json = {
    "prompt_tokens": 0,
    "total_tokens": 0,
    "completion_tokens": 0,
    "prompt_tokens_details": None,
    "completion_tokens_details": None,
}
_PROMPT_DETAILS: Json = {"cached_tokens": None, "created_cache_tokens": None, "multimodal_tokens": None}
_COMPLETION_DETAILS: Json = {"reasoning_tokens": 0}
_METRICS: Json = dict.fromkeys(
    (
        "time_to_first_token_ms",
        "generation_time_ms",
        "queue_time_ms",
        "mean_itl_ms",
        "tokens_per_second",
        "speculative_decoding",
    )
)
_SPECULATIVE: Json = {"per_step_accepted": None, "per_step_drafted": None}


def read(events: Sequence[bytes]) -> tuple[list[Json], Json]:
    """The chunks with choices, and the usage chunk. Raises `Incomplete` when the stream is not whole."""
    payloads = sse.payloads(events)
    if not payloads or payloads.pop() != b"[DONE]":
        raise Incomplete("the stream does not end with [DONE]")
    documents = [sse.parse(payload) for payload in payloads]
    if any(document.get("error") is not None for document in documents):
        raise Incomplete("the stream holds an error")
    *chunks, usage = documents or [{}]
    if usage.get("choices") != [] or not usage.get("usage"):
        raise Incomplete("the stream does not end with its usage")
    if not chunks:
        raise Incomplete("the stream has no choices")
    return chunks, usage


def by_index(chunks: Iterable[Json]) -> list[list[Json]]:
    """Each choice's parts, in order. Raises `Incomplete` when a choice is missing or not finished."""
    found: dict[int, list[Json]] = {}
    for part in chain.from_iterable(chunk["choices"] for chunk in chunks):
        found.setdefault(part["index"], []).append(part)
    if sorted(found) != list(range(len(found))):
        raise Incomplete("a choice is missing")
    for parts in found.values():
        check_finish(last(parts, "finish_reason"))
    return [found[index] for index in sorted(found)]


def check(body: Json, kind: str) -> None:
    """Raises `Incomplete` unless the body is a `kind` with its usage, every choice of it finished."""
    choices = body.get("choices")
    if body.get("object") != kind or not choices or not isinstance(body.get("usage"), dict):
        raise Incomplete(f"the body is not a whole {kind}")
    for choice in choices:
        check_finish(choice.get("finish_reason"))


def check_finish(reason: str | None) -> None:
    if reason is None or reason in _BROKEN_OFF:
        raise Incomplete(f"a choice did not finish: {reason}")


def first(parts: Iterable[Json], key: str) -> Any:
    return next((part[key] for part in parts if part.get(key) is not None), None)


def last(parts: Sequence[Json], key: str) -> Any:
    return first(reversed(parts), key)


def joined(parts: Iterable[Json], key: str) -> list[Any] | None:
    """The parts' lists under `key`, end to end; None when no part has one."""
    lists = [part[key] for part in parts if part.get(key) is not None]
    return list(chain.from_iterable(lists)) if lists else None


def full_usage(usage: Json) -> Json:
    """The usage as a body shows it: a stream leaves the nulls out."""
    full = _USAGE | usage
    return full | {
        "prompt_tokens_details": _filled(_PROMPT_DETAILS, full["prompt_tokens_details"]),
        "completion_tokens_details": _filled(_COMPLETION_DETAILS, full["completion_tokens_details"]),
    }


def full_metrics(metrics: Json | None) -> Json | None:
    full = _filled(_METRICS, metrics)
    if full is not None:
        full["speculative_decoding"] = _filled(_SPECULATIVE, full["speculative_decoding"])
    return full


def usage_event(body: Json, kind: str) -> bytes:
    fields = {key: body.get(key) for key in ("usage", "system_fingerprint", "metrics")}
    return sse.event(head(body, kind) | {"choices": []} | _without_nulls(fields))


def head(body: Json, kind: str) -> Json:
    return {"id": body["id"], "object": kind, "created": body["created"], "model": body["model"]}


def present(source: Json, keys: Iterable[str]) -> Json:
    return {key: source[key] for key in keys if source.get(key) is not None}


def dealt(things: Iterable[Any] | None, counts: Sequence[int]) -> list[list[Any] | None]:
    """The things in runs of the given lengths; a None for each when there is nothing to deal."""
    if things is None:
        return [None] * len(counts)
    pile = iter(things)
    return [list(islice(pile, count)) for count in counts]


def token_shares(token_ids: Sequence[int] | None, counts: list[int]) -> list[int]:
    """How many token ids each part takes: as many as it takes tokens, where that is known."""
    total = len(token_ids or ())
    return counts if sum(counts) == total else text.shares(total, len(counts))


def in_turn(choices: Iterable[Sequence[Json]]) -> list[Json]:
    """Several choices' parts as one stream brings them: one of each in turn."""
    return [part for turn in zip_longest(*choices) for part in turn if part is not None]


def split_usage(events: Sequence[bytes]) -> tuple[bytes, bytes, bytes]:
    for at in range(len(events) - 1, -1, -1):
        if _is_usage(events[at]):
            return b"".join(events[:at]), events[at], b"".join(events[at + 1 :])
    return b"".join(events), b"", b""


def usage(body: Json) -> tuple[int, int]:
    counts = body["usage"]
    return counts["prompt_tokens"], counts.get("completion_tokens") or 0


def identity(document: Json) -> tuple[str, int | None]:
    return document["id"], document["created"]


def _filled(defaults: Json, value: Json | None) -> Json | None:
    return None if value is None else defaults | value


def _without_nulls(value: Json) -> Json:
    return {
        key: _without_nulls(inner) if isinstance(inner, dict) else inner
        for key, inner in value.items()
        if inner is not None
    }


def _is_usage(event: bytes) -> bool:
    # Text cannot look like this: the quotes in a JSON string are escaped.
    return b'"choices":[]' in event or b'"choices": []' in event
