"""The nouns every room speaks. No vendor is imported here.

A *call* is what one client asks once. The engine gives an *answer* in one of two wire forms: a
complete JSON body, or a stream of server-sent events. A *reply* is an answer plus what the service
knows about it (from the cache or not, how old, what it cost).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Endpoint(StrEnum):
    """The paths whose answers are made by the model; the value is the HTTP path."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"
    EMBEDDINGS = "/v1/embeddings"

    @property
    def label(self) -> str:
        """Short name for metrics and logs: `chat`, `completions`, ..."""
        return _LABELS[self]


_LABELS = {
    Endpoint.CHAT: "chat",
    Endpoint.COMPLETIONS: "completions",
    Endpoint.RESPONSES: "responses",
    Endpoint.MESSAGES: "messages",
    Endpoint.EMBEDDINGS: "embeddings",
}


class CacheStatus(StrEnum):
    """What `x-cache` says: answered from a recording (perhaps past its time), with another call's generation, ..."""

    HIT = "hit"
    STALE = "stale"
    SHARED = "shared"
    MISS = "miss"
    BYPASS = "bypass"


class Form(StrEnum):
    """The two wire forms of an answer."""

    BODY = "body"
    EVENTS = "events"


class Period(StrEnum):
    """After which a budget begins anew: hours, days and months are UTC's."""

    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    FOREVER = "forever"


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent in a period: `amount` is in tokens, or in millionths of the currency that prices are in."""

    amount: int
    is_money: bool
    period: Period


@dataclass(frozen=True, slots=True)
class Limits:
    """What one caller may do; None: as much as it likes. `trims`: over-long prompts lose their oldest turns."""

    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    max_output_tokens: int | None = None
    models: frozenset[str] | None = None
    budget: Budget | None = None
    trims: bool = False

    @property
    def is_counted(self) -> bool:
        """Whether anything of it has to be counted."""
        return bool(self.rpm or self.tpm or self.concurrency or self.budget)

    @property
    def counts_tokens(self) -> bool:
        return bool(self.tpm or self.budget)

    def allows(self, model: str) -> bool:
        return self.models is None or model in self.models


NO_LIMITS = Limits()


class Priority(StrEnum):
    """Whose calls go first: somebody waits for an interactive answer, and nobody in particular for a batch's."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. Without keys everybody on loopback is the tenant `default`."""

    tenant: str = "default"
    key_id: str | None = None
    is_admin: bool = False
    priority: Priority = Priority.INTERACTIVE
    limits: Limits = NO_LIMITS


@dataclass(frozen=True, slots=True)
class Call:
    """One request for an answer; `body` is the client's JSON object, less the `cache` object."""

    endpoint: Endpoint
    body: dict[str, Any]
    caller: Caller
    request_id: str

    @property
    def is_streaming(self) -> bool:
        return self.body.get("stream") is True

    @property
    def priority(self) -> Priority:
        """Its key's, or lower: by vLLM's `priority` (above 0 is later), or OpenAI's tier for work in bulk."""
        number = self.body.get("priority")
        is_lowered = isinstance(number, int | float) and number > 0
        if is_lowered or self.body.get("service_tier") == "flex":
            return Priority.BATCH
        return self.caller.priority

    @property
    def wants_usage_event(self) -> bool:
        """OpenAI's `stream_options.include_usage`: the client asked for the closing usage event."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))


@dataclass(slots=True)
class Timings:
    """Where the seconds of one call went; a phase that has not happened is None.

    `device_s` is the engine's time that its generation has used so far (`engine/meter.py`). `paid_s` is the part of it
    that somebody has paid: on a call's own timings what it pays itself, on a flight's what all aboard paid together.
    """

    cache_s: float | None = None
    waited_s: float = 0.0  # for a turn at the engine; what the engine's own queue took is the next
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    # Tokens in the events that a stream has brought so far; what is counted above may already be ahead of them.
    streamed_tokens: int = 0
    # Tokens of the prompt that the engine had computed before, for another call.
    prefix_tokens: int = 0
    device_s: float = 0.0
    paid_s: float = 0.0

    def engine_phases(self) -> tuple[tuple[str, float | None], ...]:
        """What the engine's seconds went into, in order."""
        return ("queue", self.queue_s), ("prefill", self.prefill_s), ("decode", self.decode_s)


@dataclass(slots=True)
class Answer:
    """What the engine gives: `body` is one JSON document, `events` are complete SSE events.

    Exactly one of the two is set. Each event is the bytes of one SSE event with its blank line, for
    example `b'data: {...}\\n\\n'`. Whoever iterates `events` closes it (`aclosing`).
    """

    body: bytes | None = None
    events: AsyncIterator[bytes] | None = None
    timings: Timings = field(default_factory=Timings)


@dataclass(slots=True)
class Reply:
    """An answer on its way to the client, with what its headers will say."""

    answer: Answer
    cache: CacheStatus
    weights: str
    key: str | None = None
    age_s: int | None = None
    stream_id: str | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that are served: what they are called, where they lie, and the digest that *is* them.

    `digest` is the SHA-256 (hex) over the content of every file that can change an answer; `settings_digest`
    covers what the engine was told about them (dtype, quantization, parsers, vLLM's version, ...). `dtype` is what
    the engine computes in. `sampling_defaults` are the generation config's values for parameters that a call
    leaves out. `fingerprint` is what the engine said to fixed probes when these weights were published, if anybody
    asked it then. `base` is set for a LoRA adapter alone: the digest of the weights that it changes.
    """

    name: str
    path: str
    digest: str
    settings_digest: str
    sampling_defaults: dict[str, float]
    created: int = 0
    max_model_len: int | None = None
    dtype: str = "auto"
    fingerprint: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    base: str | None = None

    @property
    def mark(self) -> str:
        """What `system_fingerprint` says in chat completions and completions."""
        return f"rf_{self.digest[:12]}"

    @property
    def short(self) -> str:
        """`name@digest`, the digest cut to 12 characters: for headers, logs and people."""
        return f"{self.name}@{self.digest[:12]}"
