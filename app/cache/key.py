"""What makes two answers the same: the cache key. Pure: no vendor, no clock, no waiting.

The key is the SHA-256 over the RFC 8785 bytes of the *canonical form*:

```
{"schema": 1, "endpoint": ..., "weights": ..., "settings": ..., "tenant": ...,
 "fields": {name: string | number | boolean | null},      the call's plain fields
 "texts":  {name: JSON text of an array or an object}}    its other fields, each written out
```

A field that is not there and one that says what the server would assume anyway are both left out
(`fields.py` has the lists). A client's field cannot meet a name of ours: it sits one level down.

Arrays and objects are kept as text, their members in the client's order and their numbers as they were
read, because vLLM sees both: the order of a JSON schema's properties is the order in which xgrammar makes
the model write them, and a chat template prints a tool's parameters in their order, `1.0` unlike `1`.
Where the order is lost before anything reads it (a message, a content part) the members are sorted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import msgspec
import rfc8785

from app.cache import fields
from app.cache.fields import FIELDS
from app.domain import Call, Endpoint, Weights

# Raised when the canonical form changes: recordings made under another form are then never found.
SCHEMA = 1

_MAX_SAFE_INT = 2**53 - 1  # RFC 8785, Appendix D
_encode_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")).encode
_encode_plain = msgspec.json.Encoder(order="sorted").encode


def canonical(call: Call, weights: Weights, *, tenant: str) -> dict[str, Any]:
    """The canonical form: equal only for calls whose answers may stand in for each other.

    Made for calls of which `why_uncacheable` says None; for any other it may raise ValueError or RecursionError.
    """
    plain, texts = _split(call, weights)
    return _envelope(call, weights, tenant, plain, texts)


def cache_key(call: Call, weights: Weights, *, tenant: str) -> str:
    """SHA-256 (hex) of the canonical form's RFC 8785 bytes; the same conditions as for `canonical`."""
    plain, texts = _split(call, weights)
    form = _envelope(call, weights, tenant, plain, texts)
    return sha256(_encode_plain(form) if _is_simple(plain, texts) else rfc8785.dumps(form)).hexdigest()


def why_uncacheable(call: Call, weights: Weights) -> str | None:
    """Why this call is kept apart from the cache (a slug for logs and metrics), or None."""
    body = call.body
    for name, (reason, as_good_as_absent) in FIELDS[call.endpoint].uncacheable.items():
        if name in body and not _is_among(body[name], as_good_as_absent):
            return reason
    return (
        _why_endpoint(call.endpoint, body)
        or _why_content(body.get("messages"))
        or _why_content(body.get("input"))
        or _why_bytes(body)
    )


def is_deterministic(call: Call, weights: Weights) -> bool:
    """True if asking the engine again gives the same answer: greedy, or sampled from a given seed.

    Only 0 is greedy: SamplingParams lifts any other temperature below 0.01 to 0.01. A seed of -1 is no
    seed to it, beam search takes none, and Anthropic's API knows none. What is not a plain number is
    not judged: the call then counts as random, and at worst is not cached.
    """
    if call.endpoint is Endpoint.EMBEDDINGS:
        return True
    body = call.body
    temperature = body.get("temperature")
    if temperature is None:
        temperature = weights.sampling_defaults.get("temperature", 1.0)
    if type(temperature) in (int, float) and temperature == 0:
        return True
    seed = body.get("seed")
    takes_seed = call.endpoint is not Endpoint.MESSAGES and not body.get("use_beam_search")
    return takes_seed and type(seed) is int and seed != -1


def _envelope(
    call: Call, weights: Weights, tenant: str, plain: dict[str, Any], texts: dict[str, str]
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "endpoint": call.endpoint.value,
        "weights": weights.digest,
        "settings": weights.settings_digest,
        "tenant": tenant,
        "fields": plain,
        "texts": texts,
    }


def _split(call: Call, weights: Weights) -> tuple[dict[str, Any], dict[str, str]]:
    """The call's fields that count, plain ones and the JSON texts of the others."""
    endpoint, body = call.endpoint, call.body
    skipped, absent = _SKIPPED[endpoint], _ABSENT[endpoint]
    sampled, defaults = FIELDS[endpoint].sampled, weights.sampling_defaults
    plain: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for name, value in body.items():
        if name in skipped or (name in absent and _is_among(value, absent[name])):
            continue
        if name in sampled and (value is None or _is_among(value, (defaults.get(name, sampled[name]),))):
            continue
        if isinstance(value, (dict, list)):
            texts[name] = _encode_text(_sorted_items(value) if name in _LISTS_OF_ITEMS else value)
        else:
            plain[name] = _plain_number(value) if type(value) is float else value
    if (ruled := _RULES.get(endpoint)) is not None:
        ruled(body, plain, weights)
    return plain, texts


def _is_among(value: Any, values: tuple[Any, ...]) -> bool:
    """Membership as JSON sees it: `true` is not 1, and 1.0 is 1."""
    # Not `any()`: this runs for most fields of every call, and a generator doubles its time.
    for each in values:  # noqa: SIM110
        if value == each and (type(value) is bool) == (type(each) is bool):
            return True
    return False


def _plain_number(value: float) -> float | int:
    """A whole float is that integer: what it is to RFC 8785, and to vLLM, which coerces scalar fields by type."""
    return int(value) if value.is_integer() and abs(value) <= _MAX_SAFE_INT else value


def _is_simple(plain: dict[str, Any], texts: dict[str, str]) -> bool:
    """True where msgspec, 30 times faster, writes the same bytes as rfc8785 (a property test holds them together).

    They differ in how they order names beyond ASCII and write very small and large numbers.
    """
    if not ("".join(plain) + "".join(texts)).isascii():
        return False
    return not any(type(value) is float and not 1e-3 < abs(value) < 1e9 for value in plain.values())


# The fields that hold a list of messages, items or parts.
_LISTS_OF_ITEMS = frozenset({"messages", "input", "system"})
# A content part of these members alone is rebuilt by vLLM; others it passes on to the chat template in their order.
_REBUILT_PART = frozenset({"type", "text", "image_url", "audio_url", "video_url", "input_audio", "detail"})


def _sorted_items(items: Any) -> Any:
    """A list of objects with each one's members sorted, and so those of the parts in its `content`.

    Deeper objects (the arguments of a tool call, say) are printed into prompts as they come, and stay so.
    """
    if not isinstance(items, list) or not items or type(items[0]) is not dict:
        return items
    return [_sorted_item(item) if type(item) is dict else item for item in items]


def _sorted_item(item: dict[str, Any]) -> dict[str, Any]:
    parts = item.get("content")
    if type(parts) is list:
        parts = [_sorted(part) if type(part) is dict and part.keys() <= _REBUILT_PART else part for part in parts]
        item = {**item, "content": parts}
    return _sorted(item)


def _sorted(members: dict[str, Any]) -> dict[str, Any]:
    return {name: members[name] for name in sorted(members)}


def _rule_chat(body: dict[str, Any], plain: dict[str, Any], weights: Weights) -> None:
    _rule_model(body, plain, weights)
    # 1. vLLM takes `max_completion_tokens` and else `max_tokens`, for all it does with either.
    if "max_tokens" in plain and "max_completion_tokens" not in plain:
        plain["max_completion_tokens"] = plain.pop("max_tokens")
    # 2. An absent `tool_choice` is "auto" with tools and "none" without.
    if plain.get("tool_choice") == ("auto" if body.get("tools") else "none"):
        del plain["tool_choice"]


def _rule_responses(body: dict[str, Any], plain: dict[str, Any], weights: Weights) -> None:
    _rule_model(body, plain, weights)
    # Without tools vLLM makes "none" of "auto"; with them absent is "auto".
    if plain.get("tool_choice") in (("auto",) if body.get("tools") else ("auto", "none")):
        del plain["tool_choice"]


def _rule_model(body: dict[str, Any], plain: dict[str, Any], weights: Weights) -> None:
    """Without a name the served model is meant; vLLM takes null and "" for that too."""
    if "model" not in body or body["model"] is None or body["model"] == "":
        plain["model"] = weights.name


_RULES: Mapping[Endpoint, Callable[[dict[str, Any], dict[str, Any], Weights], None]] = {
    Endpoint.CHAT: _rule_chat,
    Endpoint.COMPLETIONS: _rule_model,
    Endpoint.RESPONSES: _rule_responses,
    Endpoint.EMBEDDINGS: _rule_model,
}


# vLLM would read 1 or "yes" as true, where `Call.is_streaming` does not.
_BOOL_OR_NULL = (bool, type(None))


def _why_endpoint(endpoint: Endpoint, body: dict[str, Any]) -> str | None:
    if endpoint is Endpoint.CHAT or endpoint is Endpoint.COMPLETIONS:
        return _why_stream(body)
    if type(body.get("stream")) not in _BOOL_OR_NULL:
        return fields.REFUSED
    if endpoint is Endpoint.RESPONSES:
        return fields.SERVER_TOOLS if _has_server_tools(body.get("tools")) else None
    if endpoint is Endpoint.EMBEDDINGS and body.get("encoding_format") in ("bytes", "bytes_only"):
        return fields.BINARY
    return None


def _why_stream(body: dict[str, Any]) -> str | None:
    """What hangs on `stream`, which the key leaves out, in chat and completions."""
    stream, options = body.get("stream"), body.get("stream_options")
    if type(stream) not in _BOOL_OR_NULL:
        return fields.REFUSED
    if options:
        if not stream:
            return fields.REFUSED
        if isinstance(options, dict) and options.get("continuous_usage_stats"):
            return fields.CONTINUOUS_USAGE
    if stream and (body.get("prompt_logprobs") or body.get("use_beam_search")):
        return fields.REFUSED
    return None


def _has_server_tools(tools: Any) -> bool:
    """Responses only: a tool of a kind that the server itself would use (web search, code, MCP)."""
    return isinstance(tools, list) and any(
        isinstance(tool, dict)
        and tool.get("type") not in ("function", "custom")
        and (tool.get("type") != "namespace" or _has_server_tools(tool.get("tools")))
        for tool in tools
    )


def _why_content(items: Any) -> str | None:
    """What messages, items and their parts refer to instead of holding it."""
    if type(items) is not list:
        return None
    for item in items:
        if type(item) is dict:
            if item.get("type") == "item_reference" or item.get("uuid") is not None:
                return fields.STATEFUL  # an earlier item, or an image in the engine's memory
            if not _REFERRING.isdisjoint(item) and _is_remote(item):
                return fields.REMOTE_CONTENT
            for inner in ("content", "output"):
                if why := _why_content(_as_list(item.get(inner))):
                    return why
        elif type(item) is list and (why := _why_content(item)):
            return why
    return None


# The members of a content part whose value the server may fetch, and the names of a reference inside one.
_REFERRING = frozenset({"image_url", "audio_url", "video_url", "file_url", "file_id", "file", "source"})
_REFERENCES = ("url", "file_url", "file_id")


def _is_remote(part: dict[str, Any]) -> bool:
    return any(_is_reference(name, part[name]) for name in _REFERRING if name in part)


def _is_reference(name: str, value: Any) -> bool:
    if isinstance(value, dict):
        return any(_is_reference(inner, value[inner]) for inner in _REFERENCES if inner in value)
    return isinstance(value, str) and name != "source" and value != "" and not value.startswith("data:")


def _as_list(value: Any) -> Any:
    return [value] if type(value) is dict else value


def _why_bytes(body: dict[str, Any]) -> str | None:
    """What cannot be written down as RFC 8785 wants it, or at all."""
    for value in body.values():
        if type(value) is int and not -_MAX_SAFE_INT <= value <= _MAX_SAFE_INT:
            return fields.NUMBER_OUT_OF_RANGE
    try:
        _encode_text(body).encode()
    except (UnicodeEncodeError, RecursionError):
        return fields.NOT_ENCODABLE
    except ValueError:
        return fields.NUMBER_OUT_OF_RANGE
    return None


_SKIPPED: Mapping[Endpoint, frozenset[str]] = {
    endpoint: kinds.ignored | fields.EXTRAS_IGNORED[endpoint] for endpoint, kinds in FIELDS.items()
}
_ABSENT: Mapping[Endpoint, dict[str, tuple[Any, ...]]] = {
    endpoint: {
        **{name: values for name, values in kinds.keyed.items() if values},
        **{name: values for name, (_, values) in kinds.uncacheable.items()},
        **({"max_tokens": (None,), "max_completion_tokens": (None,)} if endpoint is Endpoint.CHAT else {}),
    }
    for endpoint, kinds in FIELDS.items()
}
