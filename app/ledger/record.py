"""What is recorded of a call, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from app.domain import CacheStatus, Timings
from app.settings import Settings

SPARED = frozenset({CacheStatus.HIT.value, CacheStatus.STALE.value, CacheStatus.SHARED.value})


class Record(msgspec.Struct, omit_defaults=True, gc=False):
    """One line of the ledger; what is not there has the value below. Times are unix seconds, `_s` are seconds.

    kind: `call`; `rest` is what a generation used that no client was there to pay for (a refresh, a stream kept for
    its client); `training` is a phase of a fine-tuning job; `engine` is the devices' busy and idle time since the last.
    time: when the call ended. weights: the model's name, `@`, and the first 12 digits of its digest. cache: what
    `x-cache` said. finish: `whole`, `refused`, `broken` (an error of ours, in the status or in the stream) or `left`
    (the client was gone); error: its code. spared_tokens: those that need not be computed for it. total_s: to the
    last byte; of the devices, the time that is told of.

    It is filled in while the call lasts, by whoever knows, and is all that a hot hit pays: nothing is computed here.
    """

    time: float = 0.0
    kind: str = "call"
    id: str = ""
    tenant: str = ""
    key: str = ""
    endpoint: str = ""
    weights: str = ""
    status: int = 200
    cache: str = ""
    finish: str = "whole"
    error: str = ""
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    spared_tokens: int = 0
    device_s: float = 0.0
    idle_s: float = 0.0
    cost: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0
    request: str = ""
    response: str = ""

    @property
    def is_spared(self) -> bool:
        """It was answered with what was generated for another call, or before."""
        return self.cache in SPARED

    def note_answer(self, cache: str, weights: str, timings: Timings) -> None:
        """Where its answer came from, and what it took so far."""
        self.cache, self.weights = cache, weights
        self.prompt_tokens = timings.prompt_tokens or 0
        self.completion_tokens = timings.completion_tokens or 0
        if cache in SPARED:
            self.spared_tokens = self.prompt_tokens + self.completion_tokens
        else:
            self.spared_tokens = timings.prefix_tokens
        if timings.paid_s:
            self.device_s += timings.paid_s
        if timings.queue_s is not None:
            self.queue_s = timings.queue_s
            self.prefill_s, self.decode_s = timings.prefill_s or 0.0, timings.decode_s or 0.0


@dataclass(frozen=True, slots=True)
class Prices:
    """Per device and hour, and per million tokens, in one currency, whichever it is."""

    device_hour: float = 0.0
    prompt_per_million: float = 0.0
    completion_per_million: float = 0.0

    @classmethod
    def own(cls, settings: Settings) -> Prices:
        return cls(settings.price_device_hour, settings.price_prompt_per_million, settings.price_completion_per_million)

    @classmethod
    def compared(cls, settings: Settings) -> Prices:
        """Those of another API."""
        return cls(0.0, settings.compare_prompt_per_million, settings.compare_completion_per_million)

    def of(self, *, device_s: float = 0.0, prompt_tokens: float = 0, completion_tokens: float = 0) -> float:
        tokens = prompt_tokens * self.prompt_per_million + completion_tokens * self.completion_per_million
        return device_s / 3600 * self.device_hour + tokens / 1e6

    def cost(self, record: Record) -> float:
        """Its share of the device, and its tokens where they were generated for it: a hit costs nothing."""
        if record.is_spared:
            return self.of(device_s=record.device_s)
        return self.of(
            device_s=record.device_s,
            prompt_tokens=record.prompt_tokens,
            completion_tokens=record.completion_tokens,
        )
