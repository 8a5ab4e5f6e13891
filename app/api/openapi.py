"""`python -m app.api.openapi` writes `openapi.json`: every route, from vLLM's request and response models and ours.

Run it after a change of vLLM's version, of a route or of this file; a test fails until it is. The server only
reads the file, so its description is there while the engine still loads. vLLM is imported inside `build` alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from app import __version__
from app.api import openapi_examples as examples
from app.api.openapi_examples import MODEL
from app.domain import CacheStatus
from app.errors import (
    AppError,
    BadCall,
    BodyTimedOut,
    BodyTooLarge,
    EngineFailed,
    Forbidden,
    KeyReused,
    Loading,
    NotCached,
    NotJson,
    RateLimited,
    StreamLost,
    SwapFailed,
    Unauthenticated,
    UnknownModel,
)

Json = dict[str, Any]

PATH = Path(__file__).with_name("openapi.json")
_REQUEST_ID = "req_5b0c8f4f0c2e4d1f9a3d2f6b7c8d9e0f"
_SCHEMAS = "#/components/schemas/"


def main() -> None:
    PATH.write_text(render(build()), encoding="utf-8")
    print(f"{PATH}: {PATH.stat().st_size / 1e6:.2f} MB")  # noqa: T201 - a command's answer


def render(document: Json) -> str:
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def build() -> Json:
    """The whole document. Imports vLLM (seconds)."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Refrain",
            "version": __version__,
            "summary": "Your own model behind the OpenAI API, and no answer computed twice.",
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
        "security": [{}, {"bearer": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A key made by `refrain keys create`. A server without any binds loopback only, and "
                    "answers everybody there.",
                },
                "x-api-key": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "x-api-key",
                    "description": "The same key, where Anthropic's clients put it. For `/v1/messages` and below.",
                },
            },
            "parameters": _PARAMETERS,
            "headers": _HEADERS,
            "responses": {name: _error_response(text, error) for name, text, error in _ERRORS},
            "schemas": _schemas(),
        },
    }


_DESCRIPTION = """\
An OpenAI-compatible server around vLLM, with an exact response cache in front.

**Cache.** `x-cache` says where an answer came from: `hit` (a recording), `stale` (one past its time, where the server
allows that), `shared` (a generation that another call had begun), `miss` (generated, and recorded if that is
allowed), `bypass` (kept apart from the cache). Unless the server is set otherwise, only calls that would be answered
the same again are cached: those with `temperature: 0` or a `seed`. A recording made without `stream` answers a stream,
and the reverse. Ask for something else with the header `Cache-Control`, or with a `cache` object in the body
(`extra_body` in OpenAI's SDK).

**Streams** carry event ids where the server keeps them for a while (`REFRAIN_STREAM_RESUME_S`). One that was cut off
goes on after the event that you name in `Last-Event-ID`: repeat the POST with it, or `GET /v1/streams/{stream_id}`.

**Errors** have OpenAI's shape; `type` and `request_id` beside it are for Anthropic's clients. A stream that breaks
ends with one error event, never with a silent cut.

**Requests** are validated by vLLM itself. Fields that it does not know are accepted and change nothing, but they are
part of the cache key.
"""

_TAGS = {
    "generate": "Answers from the model, or from the cache.",
    "models": "What is served.",
    "tokens": "Text to tokens and back, and how many there are.",
    "operate": "For load balancers and monitoring; no key is needed.",
    "admin": "The cache and the served weights, for keys made with `--admin`.",
}


class CacheDirectives(BaseModel):
    """What this call may do with the cache; the stricter of this and the header `Cache-Control` holds."""

    model_config = ConfigDict(extra="forbid")

    no_cache: bool = Field(False, description="Generate anew, and record that.")
    no_store: bool = Field(False, description="Record nothing.")
    max_age: int | None = Field(None, ge=0, description="Take no recording that is older, in seconds.")
    only_if_cached: bool = Field(False, description="A recording or a 504; the engine is not asked.")
    samples: int | None = Field(
        None, ge=0, le=64, description="A sampled call draws from a pool of so many answers; 0: from none."
    )
    sticky: bool | None = Field(None, description="From a pool the same `user` draws the same answer.")


class ErrorDetail(BaseModel):
    message: str
    type: str = Field(description="A family of errors, such as `invalid_request_error`.")
    param: str | None = Field(description="The field at fault, where there is one.")
    code: str | None = Field(description="What exactly is wrong, for programs.")


class Error(BaseModel):
    """OpenAI's error object; `type` and `request_id` are what Anthropic's clients read."""

    error: ErrorDetail
    type: Literal["error"]
    request_id: str | None


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time.")
    owned_by: str
    max_model_len: int | None = Field(description="Tokens that prompt and answer may have together.")
    weights: str = Field(description="SHA-256 over everything on disk that can change an answer.")
    parent: str | None = Field(None, description="For a LoRA adapter: the model that it changes.")
    base: str | None = Field(None, description="For a LoRA adapter: the digest of the weights that it changes.")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Alive(BaseModel):
    status: Literal["alive"]


class SwapStep(BaseModel):
    step: str
    at_s: float = Field(description="Seconds since the swap began.")


class Swap(BaseModel):
    """Other weights into the running server: how far it got, or how it ended."""

    status: Literal["running", "swapped", "unchanged", "failed"]
    served: str = Field(description="`name@digest`.")
    wanted: str | None = Field(None, description="`name@digest`.")
    way: Literal["beside", "pause"] | None = Field(
        None, description="By a second engine beside the first, or after it, while calls waited."
    )
    detail: str | None = None
    held_s: float | None = Field(None, description="How long calls waited.")
    steps: list[SwapStep]


class Served(BaseModel):
    name: str
    digest: str
    kind: Literal["model", "adapter"]


class ModelsServed(BaseModel):
    served: list[Served]
    swap: Swap | None = Field(description="The last one.")
    adapter: str | None = Field(None, description="The adapter that was asked for, `name@digest`.")


class DrainBegun(BaseModel):
    status: Literal["draining"]
    since: str = Field(description="ISO 8601, UTC.")
    detail: str
    delay_s: float = Field(description="So long all work is still taken.")
    budget_s: float = Field(description="So long what runs may take after that.")


class AdapterLoad(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Of a published adapter: `name`, or `name@digest`.")


class Readiness(BaseModel):
    """When it is not `ready`, the error object stands beside these fields."""

    status: Literal["loading", "ready", "draining", "failed"]
    since: str = Field(description="ISO 8601, UTC.")
    detail: str
    model: str = Field(description="`name@digest`.")
    redis: Literal["up", "down"] = Field(description="While it is down every call goes to the engine.")
    swap: Swap | None = Field(None, description="Other weights that are on their way in, or did not come in.")


class Version(BaseModel):
    version: str
    vllm: str


class CacheTally(BaseModel):
    tenant: str
    model: str
    entries: int


class CacheStats(BaseModel):
    entries: int
    by_model: list[CacheTally]
    redis: dict[str, int] = Field(description="`used_memory` and `maxmemory` in bytes, `evicted_keys`, `expired_keys`.")


class CachePurge(BaseModel):
    """What to delete: a model's recordings, a tenant's, those of both, or all."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1})

    model: str | None = None
    tenant: str | None = None
    all: bool | None = None


class CachePurged(BaseModel):
    purged: int = Field(description="How many recordings were deleted.")


class UsageTally(BaseModel):
    """A row has besides these what it was summed by: `tenant`, `day`, ..."""

    calls: int
    failed: int = Field(description="Refused, broken, or left by their client.")
    spared_calls: int = Field(description="Answered without a generation: hits, stale and shared.")
    prompt_tokens: int
    completion_tokens: int
    spared_tokens: int = Field(description="Of both, what need not be computed.")
    device_s: float = Field(description="Device-seconds of the engine's time.")
    cost: float = Field(description="At the prices that held when the calls were made.")
    mean_s: float = Field(description="Mean time of a call, to its last byte.")


class UsageRow(UsageTally):
    model_config = ConfigDict(extra="allow")


class UsageTraining(BaseModel):
    model: str
    device_s: float


class UsageDevices(BaseModel):
    busy_s: float
    idle_s: float = Field(description="Nothing to do, or loading.")


class Usage(BaseModel):
    by: list[str]
    rows: list[UsageRow]
    total: UsageTally
    training: list[UsageTraining]
    devices: UsageDevices
    first: float | None = Field(description="Unix time of the first call.")
    last: float | None
    skipped_lines: int = Field(description="Lines that are not whole, and not counted.")


_OURS: dict[str, type[BaseModel]] = {
    cls.__name__: cls
    for cls in (
        CacheDirectives, Error, Model, ModelList, Alive, Readiness, Version, CacheStats, CachePurge, CachePurged,
        Swap, ModelsServed, AdapterLoad, Usage, DrainBegun,
    )
}  # fmt: skip


def _theirs() -> dict[str, Any]:
    from openai.types import responses as events
    from vllm.entrypoints.anthropic import protocol as anthropic
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as completion
    from vllm.entrypoints.openai.responses import protocol as responses
    from vllm.entrypoints.pooling.embed import protocol as embed
    from vllm.entrypoints.serve.tokenize import protocol as tokenize

    return {
        "ChatCompletionRequest": chat.ChatCompletionRequest,
        "ChatCompletionResponse": chat.ChatCompletionResponse,
        "ChatCompletionStreamResponse": chat.ChatCompletionStreamResponse,
        "CompletionRequest": completion.CompletionRequest,
        "CompletionResponse": completion.CompletionResponse,
        "CompletionStreamResponse": completion.CompletionStreamResponse,
        "ResponsesRequest": responses.ResponsesRequest,
        "ResponsesResponse": responses.ResponsesResponse,
        # vLLM's own union, and what it sends besides.
        "ResponsesStreamEvent": responses.StreamingResponsesResponse
        | events.ResponseTextDeltaEvent
        | events.ResponseTextDoneEvent
        | events.ResponseFunctionCallArgumentsDeltaEvent
        | events.ResponseFunctionCallArgumentsDoneEvent,
        "AnthropicMessagesRequest": anthropic.AnthropicMessagesRequest,
        "AnthropicMessagesResponse": anthropic.AnthropicMessagesResponse,
        "AnthropicStreamEvent": anthropic.AnthropicStreamEvent,
        "AnthropicCountTokensRequest": anthropic.AnthropicCountTokensRequest,
        "AnthropicCountTokensResponse": anthropic.AnthropicCountTokensResponse,
        "EmbeddingRequest": embed.EmbeddingRequest,
        "EmbeddingResponse": embed.EmbeddingResponse,
        "TokenizeRequest": tokenize.TokenizeRequest,
        "TokenizeResponse": tokenize.TokenizeResponse,
        "DetokenizeRequest": tokenize.DetokenizeRequest,
        "DetokenizeResponse": tokenize.DetokenizeResponse,
    }


def _schemas() -> Json:
    """All models with everything they refer to, under short names, sorted."""
    # "validation" for answers too: fields with a default are often left out of them (`exclude_none`).
    models = {**_theirs(), **_OURS}
    inputs: Any = [(name, "validation", TypeAdapter(model)) for name, model in models.items()]
    roots, rest = TypeAdapter.json_schemas(inputs, ref_template=_SCHEMAS + "{model}")
    schemas: Json = rest["$defs"]
    for (name, _), schema in roots.items():
        schemas.setdefault(name, schema)  # a union has no definition of its own
    schemas = _renamed(_merged(schemas))
    _extend(schemas)
    _correct(schemas)
    return dict(sorted(schemas.items()))


def _extend(schemas: Json) -> None:
    """Our `cache` object, in every request that can be cached."""
    requests = ["ChatCompletionRequest", "CompletionRequest", "ResponsesRequest", "AnthropicMessagesRequest"]
    requests += [member["$ref"].removeprefix(_SCHEMAS) for member in schemas["EmbeddingRequest"]["anyOf"]]
    for name in requests:
        schemas[name]["properties"]["cache"] = {"anyOf": [{"$ref": _SCHEMAS + "CacheDirectives"}, {"type": "null"}]}


def _correct(schemas: Json) -> None:
    """Where the models say less, or something else, than vLLM's validators and handlers do."""
    choice = schemas["ChatCompletionRequest"]["properties"]["tool_choice"]
    choice.pop("default")
    choice["description"] = "Without it: `auto` where there are `tools`, else `none`."
    schemas["ChatCompletionRequest"]["properties"]["max_tokens"].pop("deprecated", None)  # every client sends it
    # Filled in by ResponsesRequest.input_item_parsing.
    for name, filled_in in (
        ("ResponseOutputMessageParam", {"id", "status"}),
        ("ResponseOutputTextParam", {"annotations"}),
        ("ResponseReasoningItemParam", {"id"}),
    ):
        schemas[name]["required"] = [field for field in schemas[name]["required"] if field not in filled_in]
    # Completions wants one of the two; the model has both as optional.
    schemas["CompletionRequest"]["anyOf"] = [{"required": ["prompt"]}, {"required": ["prompt_embeds"]}]


def _sorted_scalars(value: Any) -> Any:
    """Unions of plain types in one order.

    Python's typing module takes `float | str` for `str | float` and hands out whichever was made first, so the order
    in the models depends on what else was imported before.
    """
    if isinstance(value, list):
        return [_sorted_scalars(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    found = {name: _sorted_scalars(inner) for name, inner in value.items()}
    union = found.get("anyOf")
    if isinstance(union, list) and all(set(member) == {"type"} and member["type"] != "null" for member in union):
        found["anyOf"] = sorted(union, key=lambda member: str(member["type"]), reverse=True)
    return found


def _merged(schemas: Json) -> Json:
    """Models of one class name and one content (OpenAI's SDK has most of its twice) as one."""
    schemas = _sorted_scalars(schemas)
    while True:
        kept: dict[tuple[str, str], str] = {}
        refs: dict[str, str] = {}
        for name in sorted(schemas):
            alike = (name.rpartition("__")[2], json.dumps(schemas[name], sort_keys=True))
            if kept.setdefault(alike, name) != name:
                refs[_SCHEMAS + name] = _SCHEMAS + kept[alike]
        if not refs:
            return schemas
        schemas = {name: _with_refs(schemas[name], refs) for name in schemas if _SCHEMAS + name not in refs}


def _renamed(schemas: Json) -> Json:
    """`openai__types__responses__tool_param__Mcp` as `ToolParamMcp`: the class, and what it takes of its module."""
    names = {name: name for name in schemas if "__" not in name}
    for words in range(1, 8):
        candidates: dict[str, list[str]] = {}
        for name in schemas:
            if name not in names:
                candidates.setdefault(_short_name(name, words), []).append(name)
        for short, olds in candidates.items():
            if len(olds) == 1 and short not in names.values():
                names[olds[0]] = short
    refs = {_SCHEMAS + old: _SCHEMAS + new for old, new in names.items()}
    return {names[name]: _with_refs(schema, refs) for name, schema in schemas.items()}


def _short_name(name: str, words: int) -> str:
    *modules, own = name.split("__")[-words:]
    parts = ["".join(word.capitalize() for word in module.split("_")) for module in modules]
    if parts and parts[-1] == own:
        parts.pop()
    return "".join(parts) + own


def _with_refs(value: Any, refs: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _with_refs(inner, refs) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_refs(inner, refs) for inner in value]
    return refs.get(value, value) if isinstance(value, str) else value


# Parts that operations refer to.

_PARAMETERS: Json = {
    "CacheControl": {
        "name": "Cache-Control",
        "in": "header",
        "description": "RFC 9111's `no-cache`, `no-store`, `max-age=N` and `only-if-cached`; others are ignored.",
        "schema": {"type": "string"},
        "examples": {
            "default": {"value": "", "summary": "Recordings are welcome"},
            "fresh": {"value": "no-cache", "summary": "Generate anew, and record it"},
            "recent": {"value": "max-age=60", "summary": "No recording older than a minute"},
            "cached": {"value": "only-if-cached", "summary": "A recording, or 504"},
        },
    },
    "IdempotencyKey": {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "A retry with the same key and body gets the answer of the first try, or joins it. At most 255 "
        "characters, kept for a day.",
        "schema": {"type": "string"},
    },
    "LastEventId": {
        "name": "Last-Event-ID",
        "in": "header",
        "description": "The id of the last event that you have of a stream that was cut off: it goes on after that.",
        "schema": {"type": "string"},
    },
    "RequestTimeout": {
        "name": "x-request-timeout",
        "in": "header",
        "description": "Your time for the whole answer: `2.5`, `2.5s` or `2500ms`. What cannot be answered in it "
        "is not begun (503), what is not complete by then is ended (504, on a stream an error event).",
        "schema": {"type": "string"},
    },
    "RequestId": {
        "name": "x-request-id",
        "in": "header",
        "description": "Your own id for this request (letters, digits and `._:/+=-`, at most 128); it comes back.",
        "schema": {"type": "string"},
    },
}


def _header(description: str, schema: Json, example: Any) -> Json:
    return {"description": description, "schema": schema, "example": example}


_HEADERS: Json = {
    "RequestId": _header("This request's id, as in the log and in errors.", {"type": "string"}, _REQUEST_ID),
    "Cache": _header(
        "Where the answer came from.", {"type": "string", "enum": [status.value for status in CacheStatus]}, "hit"
    ),
    "Age": _header("Seconds since the recording was made. On hits.", {"type": "integer", "minimum": 0}, 12),
    "CacheKey": _header(
        "SHA-256 of the canonical request. Not on calls that are kept apart from the cache.",
        {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "6988772bd37dfeb3a2bc8a9c73f357d4ac4a52a92dcf6277cc7ad6caf5af1e56",
    ),
    "StreamId": _header(
        "For `GET /v1/streams/{stream_id}`. On streams that can be gone on with.",
        {"type": "string"},
        "6988772bd9c0b6f2a4e83d515e21c7f0n",
    ),
    "Weights": _header("The weights that answered: `name@digest`.", {"type": "string"}, f"{MODEL}@3f786850e387"),
    "ServerTiming": _header(
        "Milliseconds by phase (W3C Server-Timing): `cache`, and for a generation `queue`, `prefill`, `decode`.",
        {"type": "string"},
        "cache;dur=0.21, queue;dur=0.05, prefill;dur=38.10, decode;dur=190.42",
    ),
    "RetryAfter": _header("Seconds to wait.", {"type": "integer", "minimum": 0}, 10),
    "WwwAuthenticate": _header("How to authenticate.", {"type": "string"}, "Bearer"),
}
_ANSWER_HEADERS = {
    "x-request-id": "RequestId",
    "x-cache": "Cache",
    "age": "Age",
    "x-cache-key": "CacheKey",
    "x-stream-id": "StreamId",
    "x-weights": "Weights",
    "server-timing": "ServerTiming",
}

_NO_GET = AppError(
    "GET is not allowed on /v1/chat/completions", status=405, type="invalid_request_error", code="method_not_allowed"
)
# Component, meaning, and an instance for status and example.
_ERRORS: list[tuple[str, str, AppError]] = [
    ("BadRequest", "The request is wrong.", BadCall("temperature must be in [0, 2], got 3.0.", param="temperature")),
    ("Unauthenticated", "No key, or an unknown one.", Unauthenticated("this server needs an API key")),
    ("Forbidden", "The key may not do this.", Forbidden("this needs an admin key")),
    ("NotFound", "Not there.", UnknownModel("the model `gpt-5` does not exist here", param="model")),
    ("MethodNotAllowed", "Another method is asked for.", _NO_GET),
    (
        "SwapFailed",
        "Other weights, or an adapter, cannot be served; what was served before still is.",
        SwapFailed("support-bot@5f1c0e3a9d27 does not load: its fingerprint does not match"),
    ),
    ("BodyTimedOut", "The body is late.", BodyTimedOut("the request body did not arrive within 30 s")),
    ("BodyTooLarge", "The body is too large.", BodyTooLarge("the request body is larger than 8388608 bytes")),
    ("NotJson", "The body is not announced as JSON.", NotJson("the content type must be application/json")),
    ("Gone", "The stream cannot be gone on with.", StreamLost("this stream cannot be gone on with from here")),
    ("KeyReused", "The key was used otherwise.", KeyReused("this Idempotency-Key was used with another request")),
    ("RateLimited", "Too many requests.", RateLimited("this key's rate is exceeded", retry_after_s=2)),
    ("Broken", "The generation broke.", EngineFailed("the answer broke off before it was complete")),
    (
        "Unavailable",
        "The engine is loading, draining, full or down, or the time is too short.",
        Loading("the engine is still loading (weights)"),
    ),
    ("TimedOut", "The time was up, or `only-if-cached` found nothing.", NotCached("there is no recording")),
]
_ALWAYS = (401, 405, 500)
_WITH_BODY = (400, 401, 404, 405, 408, 413, 415, 429, 500, 503, 504)
_ANSWERING = (*_WITH_BODY, 410, 422)


def _error_response(description: str, error: AppError) -> Json:
    headers = {"x-request-id": _ref("headers", "RequestId")}
    if error.status in (429, 503):
        headers["retry-after"] = _ref("headers", "RetryAfter")
    content = {"schema": {"$ref": _SCHEMAS + "Error"}, "example": error.body(_REQUEST_ID)}
    return {"description": description, "headers": headers, "content": {"application/json": content}}


def _errors(*statuses: int) -> Json:
    return {str(error.status): _ref("responses", name) for name, _, error in _ERRORS if error.status in statuses}


def _ref(kind: str, name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}


# The operations.

_STORED = (
    "vLLM keeps responses only with `VLLM_ENABLE_RESPONSES_API_STORE=1` in its environment; without it there is "
    "nothing to find, and this is a 404."
)


def _paths() -> Json:
    return {
        "/v1/chat/completions": {"post": _answering("createChatCompletion", "Chat completion", **examples.CHAT)},
        "/v1/completions": {"post": _answering("createCompletion", "Text completion", **examples.COMPLETION)},
        "/v1/responses": {"post": _answering("createResponse", "Response", **examples.RESPONSE)},
        "/v1/responses/{response_id}": {"get": _stored_response()},
        "/v1/responses/{response_id}/cancel": {"post": _cancelled_response()},
        "/v1/streams/{stream_id}": {"get": _resumed_stream()},
        "/v1/messages": {"post": _anthropic(_answering("createMessage", "Message (Anthropic)", **examples.MESSAGE))},
        "/v1/messages/count_tokens": {"post": _anthropic(_simple_post(
            "countMessageTokens", "Count a message's tokens (Anthropic)", "tokens",
            ("AnthropicCountTokensRequest", {"user": ("A question", {"model": MODEL, "messages": [examples.USER]})}),
            ("AnthropicCountTokensResponse", {"input_tokens": 36}),
        ))},
        "/v1/embeddings": {"post": _answering("createEmbedding", "Embeddings", **examples.EMBEDDING)},
        "/v1/models": {"get": _simple_get(
            "listModels", "List models", "models", ("ModelList", {"object": "list", "data": [examples.CARD]}),
            errors=_ALWAYS,
        )},
        "/v1/models/{model_id}": {"get": _simple_get(
            "retrieveModel", "One model", "models", ("Model", examples.CARD), errors=(*_ALWAYS, 404),
            parameters=[_in_path("model_id", "The model's name; it may contain slashes.", MODEL)],
        )},
        "/tokenize": {"post": _simple_post(
            "tokenize", "Text or chat to tokens", "tokens",
            ("TokenizeRequest", {
                "text": ("Text", {"model": MODEL, "prompt": "The capital of France is"}),
                "chat": ("A chat, through the chat template", {"model": MODEL, "messages": [examples.USER]}),
            }),
            ("TokenizeResponse", {"count": 5, "max_model_len": 8192, "tokens": [504, 3575, 282, 4649, 314]}),
        )},
        "/detokenize": {"post": _simple_post(
            "detokenize", "Tokens to text", "tokens",
            ("DetokenizeRequest", {"tokens": ("Tokens", {"model": MODEL, "tokens": [504, 3575, 282, 4649, 314]})}),
            ("DetokenizeResponse", {"prompt": "The capital of France is"}),
        )},
        "/version": {"get": _open(_simple_get(
            "version", "Versions", "operate", ("Version", {"version": __version__, "vllm": "0.32.0"}),
            errors=(405, 500),
        ))},
        "/healthz": {"get": _open(_simple_get(
            "alive", "Is the process alive?", "operate", ("Alive", {"status": "alive"}), errors=(405, 500),
        ))},
        "/readyz": {"get": _open(_readiness())},
        "/metrics": {"get": _open(_metrics())},
        "/admin/cache": {"get": _admin(_simple_get(
            "cacheStats", "What the cache holds", "admin", ("CacheStats", {
                "entries": 42,
                "by_model": [{"tenant": "default", "model": MODEL, "entries": 42}],
                "redis": {"used_memory": 1834624, "maxmemory": 268435456, "evicted_keys": 0, "expired_keys": 3},
            }), errors=(401, 403, 405, 500, 503),
        ))},
        "/admin/cache/purge": {"post": _admin(_simple_post(
            "purgeCache", "Delete recordings", "admin",
            ("CachePurge", {
                "model": ("Of one model", {"model": MODEL}),
                "tenant": ("Of one tenant", {"tenant": "default"}),
                "all": ("All", {"all": True}),
            }),
            ("CachePurged", {"purged": 42}),
            errors=(400, 401, 403, 405, 408, 413, 415, 500, 503),
        ))},
        "/admin/models": {"get": _admin(_simple_get(
            "modelsServed", "What is served", "admin", ("ModelsServed", {"served": [_SERVED], "swap": None}),
            errors=(401, 403, 405, 500),
        ))},
        "/admin/models/reload": {"post": _admin(_simple_get(
            "reloadModels", "Serve what is current now", "admin", ("Swap", _SWAPPED),
            errors=(401, 403, 405, 409, 500, 503),
        ))},
        "/admin/models/adapters": {"post": _admin(_simple_post(
            "loadAdapter", "Serve a LoRA adapter", "admin",
            ("AdapterLoad", {"adapter": ("A published adapter", {"name": "polite"})}),
            ("ModelsServed", {"served": [_SERVED, _ADAPTER], "swap": None, "adapter": "polite@5f1c0e3a9d27"}),
            errors=(400, 401, 403, 405, 408, 409, 413, 415, 500, 503),
        ))},
        "/admin/models/adapters/{name}": {"delete": _admin(_simple_get(
            "unloadAdapter", "Serve an adapter no more", "admin",
            ("ModelsServed", {"served": [_SERVED], "swap": None}), errors=(401, 403, 404, 405, 500, 503),
            parameters=[_in_path("name", "The adapter's name.", "polite")],
        ))},
        "/admin/drain": {"post": _admin(_simple_get(
            "drain", "Stop, and drop no call", "admin", ("DrainBegun", {
                "status": "draining", "since": "2026-11-25T06:40:00+00:00", "detail": "asked to",
                "delay_s": 5.0, "budget_s": 30.0,
            }), errors=(401, 403, 405, 500),
        ))},
        "/admin/usage": {"get": _admin(_simple_get(
            "usage", "What was used, and what it cost", "admin", ("Usage", _USAGE), errors=(400, 401, 403, 405, 500),
            parameters=[
                _in_query("by", "What to sum by, by commas: tenant, key, model, weights, day, cache, endpoint, "
                          "status, finish.", "tenant,day"),
                _in_query("since", "`7d`, `12h`, `30m` (ago), or an ISO 8601 time.", "7d"),
                _in_query("until", "Before when, given like `since`.", "2026-11-25"),
                _in_query("model", "Only this model.", MODEL),
            ],
        ))},
    }  # fmt: skip


_TALLY = {
    "calls": 20,
    "failed": 1,
    "spared_calls": 12,
    "prompt_tokens": 740,
    "completion_tokens": 960,
    "spared_tokens": 1020,
    "device_s": 4.211,
    "cost": 0.00234,
    "mean_s": 0.3127,
}
_USAGE = {
    "by": ["tenant", "day"],
    "rows": [{"tenant": "default", "day": "2026-11-25"} | _TALLY],
    "total": _TALLY,
    "training": [{"model": "support-bot", "device_s": 374.0}],
    "devices": {"busy_s": 4.32, "idle_s": 3595.7},
    "first": 1795567200.0,
    "last": 1795570800.0,
    "skipped_lines": 0,
}
_SERVED = {"name": MODEL, "digest": examples.CARD["weights"], "kind": "model"}
_ADAPTER = {"name": "polite", "digest": "5f1c0e3a9d27" + "0" * 52, "kind": "adapter"}
_SWAPPED = {
    "status": "swapped",
    "served": f"{MODEL}@5f1c0e3a9d27",
    "wanted": f"{MODEL}@5f1c0e3a9d27",
    "way": "beside",
    "steps": [{"step": "new calls go to it", "at_s": 8.214}],
}


def _answering(
    operation_id: str,
    summary: str,
    *,
    description: str,
    request: str,
    examples: dict[str, tuple[str, Json]],
    response: str,
    answer: Json,
    event: str | None = None,
    stream: str = "",
) -> Json:
    """A route whose answers may come from the cache."""
    content: Json = {"application/json": {"schema": {"$ref": _SCHEMAS + response}, "example": answer}}
    if event is not None:
        content["text/event-stream"] = _events(event, stream)
    return {
        "tags": ["generate"],
        "summary": summary,
        "description": description,
        "operationId": operation_id,
        "parameters": [
            _ref("parameters", name)
            for name in ("CacheControl", "IdempotencyKey", "LastEventId", "RequestTimeout", "RequestId")
        ],
        "requestBody": _body(request, examples),
        "responses": {
            "200": {
                "description": "The answer" + (", whole or (with `stream`) as server-sent events." if event else "."),
                "headers": {name: _ref("headers", header) for name, header in _ANSWER_HEADERS.items()},
                "content": content,
            },
            **_errors(*_ANSWERING),
        },
    }


def _resumed_stream() -> Json:
    operation = _simple_get(
        "resumeStream", "The rest of a stream", "generate", ("ChatCompletionStreamResponse", {}),
        errors=(400, 401, 404, 405, 410, 500),
        parameters=[
            _in_path("stream_id", "What `x-stream-id` said, or an event's id up to its first `-`.",
                     "6988772bd9c0b6f2a4e83d515e21c7f0n"),
            _ref("parameters", "LastEventId"),
        ],
    )  # fmt: skip
    operation["description"] = (
        "Goes on after `Last-Event-ID`, or from the first event. On any server that shares the Redis; for its tenant "
        "alone. The events are those of the endpoint that began it."
    )
    events = _events("ChatCompletionStreamResponse", examples.CHAT["stream"])
    operation["responses"]["200"]["content"] = {"text/event-stream": events}
    return operation


def _events(event: str, example: str) -> Json:
    """OpenAPI 3.1 has no words for a stream's items, so the schema of one event's `data` is named beside it."""
    told = f"Server-sent events; each `data` is a {event}. Comments (`: keep-alive`) may come in between."
    return {
        "schema": {"type": "string", "description": told, "x-event-schema": {"$ref": _SCHEMAS + event}},
        "example": example,
    }


def _body(schema: str, examples: dict[str, tuple[str, Json]]) -> Json:
    shown = {name: {"summary": summary, "value": value} for name, (summary, value) in examples.items()}
    content = {"application/json": {"schema": {"$ref": _SCHEMAS + schema}, "examples": shown}}
    return {"required": True, "content": content}


def _ok(schema: str, example: Json) -> Json:
    return {
        "description": "OK",
        "headers": {"x-request-id": _ref("headers", "RequestId")},
        "content": {"application/json": {"schema": {"$ref": _SCHEMAS + schema}, "example": example}},
    }


def _simple_post(
    operation_id: str,
    summary: str,
    tag: str,
    request: tuple[str, dict[str, tuple[str, Json]]],
    response: tuple[str, Json],
    errors: tuple[int, ...] = _WITH_BODY,
) -> Json:
    return {
        "tags": [tag],
        "summary": summary,
        "operationId": operation_id,
        "parameters": [_ref("parameters", "RequestId")],
        "requestBody": _body(*request),
        "responses": {"200": _ok(*response), **_errors(*errors)},
    }


def _simple_get(
    operation_id: str,
    summary: str,
    tag: str,
    response: tuple[str, Json],
    errors: tuple[int, ...],
    parameters: list[Json] | None = None,
) -> Json:
    return {
        "tags": [tag],
        "summary": summary,
        "operationId": operation_id,
        "parameters": [*(parameters or []), _ref("parameters", "RequestId")],
        "responses": {"200": _ok(*response), **_errors(*errors)},
    }


def _in_path(name: str, description: str, example: str) -> Json:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": {"type": "string"},
        "example": example,
    }


def _in_query(name: str, description: str, example: str) -> Json:
    return {
        "name": name,
        "in": "query",
        "description": description,
        "schema": {"type": "string"},
        "example": example,
    }


def _stored_response() -> Json:
    operation = _simple_get(
        "retrieveResponse", "A stored response", "generate", ("ResponsesResponse", examples.RESPONSE["answer"]),
        errors=(400, 401, 404, 405, 500, 503),
        parameters=[
            _in_path("response_id", "The id that the response came with.", examples.RESPONSE["answer"]["id"]),
            {"name": "starting_after", "in": "query", "schema": {"type": "integer"},
             "description": "With `stream`: the number of the last event that you have."},
            {"name": "stream", "in": "query", "schema": {"type": "boolean", "default": False}},
        ],
    )  # fmt: skip
    operation["description"] = _STORED
    events = _events("ResponsesStreamEvent", examples.RESPONSE["stream"])
    operation["responses"]["200"]["content"]["text/event-stream"] = events
    return operation


def _cancelled_response() -> Json:
    operation = _simple_get(
        "cancelResponse", "Stop a background response", "generate", ("ResponsesResponse", examples.RESPONSE["answer"]),
        errors=(400, 401, 404, 405, 500, 503),
        parameters=[_in_path("response_id", "The id that the response came with.", examples.RESPONSE["answer"]["id"])],
    )  # fmt: skip
    operation["description"] = _STORED
    return operation


def _readiness() -> Json:
    told = {"since": "2026-11-24T04:21:33+00:00", "model": f"{MODEL}@3f786850e387", "redis": "up"}
    operation = _simple_get(
        "ready",
        "Can it generate?",
        "operate",
        ("Readiness", {"status": "ready", "detail": "", **told}),
        errors=(405, 500),
    )
    loading = Loading("the engine is loading: weights").body(_REQUEST_ID)
    schema = {"allOf": [{"$ref": _SCHEMAS + "Readiness"}, {"$ref": _SCHEMAS + "Error"}]}
    example = {"status": "loading", "detail": "weights", **told, **loading}
    operation["responses"]["503"] = {
        "description": "Not now. Hits, models and these pages are answered all the same.",
        "headers": {"x-request-id": _ref("headers", "RequestId"), "retry-after": _ref("headers", "RetryAfter")},
        "content": {"application/json": {"schema": schema, "example": example}},
    }
    return operation


def _metrics() -> Json:
    operation = _simple_get("metrics", "Prometheus metrics", "operate", ("Alive", {}), errors=(405, 500))
    operation["description"] = "vLLM's own (`vllm:...`) and ours (`refrain_...`)."
    example = "# TYPE refrain_engine_ready gauge\nrefrain_engine_ready 1.0\n"
    operation["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}, "example": example}}
    return operation


def _open(operation: Json) -> Json:
    return {**operation, "security": []}


def _admin(operation: Json) -> Json:
    return {**operation, "security": [{"bearer": []}]}


def _anthropic(operation: Json) -> Json:
    return {**operation, "security": [{}, {"x-api-key": []}, {"bearer": []}]}


if __name__ == "__main__":
    main()
