"""What the service may ask of an engine. Two implementations: vLLM, and a scripted one."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from app.domain import Answer, Call, Timings, Weights
from app.engine.meter import Meter
from app.errors import Draining, EngineDown, Loading


class Phase(StrEnum):
    """Where an engine is in its life; `/readyz` says it in these words."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(slots=True)
class EngineState:
    """The phase, since when (unix seconds), one line about it for people, how often it died and was restarted, and
    how many calls it died of are kept out."""

    phase: Phase = Phase.LOADING
    since: float = field(default_factory=time.time)
    detail: str = "starting"
    restarts: int = 0
    quarantined: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def become(self, phase: Phase, detail: str = "") -> None:
        """From draining there is no way back: a core that dies then is replaced for the calls that it had alone."""
        if self.phase is Phase.DRAINING:
            return
        if phase is not self.phase:
            self.since = time.time()
        self.phase, self.detail = phase, detail
        self._changed.set()
        self._changed = asyncio.Event()

    async def ready(self, wait_s: float) -> None:
        """Return when the engine is ready.

        Raises:
            Loading: it is still loading after `wait_s` seconds.
            EngineDown: it failed and will not come back by itself.
            Draining: it takes no new work.
        """
        deadline = time.monotonic() + wait_s
        while self.phase is not Phase.READY:
            if self.phase is Phase.FAILED:
                raise EngineDown(f"the engine is down: {self.detail}", retry_after_s=30)
            if self.phase is Phase.DRAINING:
                raise Draining("the server is shutting down", retry_after_s=5)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise Loading(f"the engine is still loading ({self.detail})", retry_after_s=10)
            try:
                await asyncio.wait_for(self._changed.wait(), remaining)
            except TimeoutError:
                continue


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine works on at a time: sequences, tokens in KV cache, tokens in a step. None: no limit known."""

    sequences: int | None = None
    kv_tokens: int | None = None
    step_tokens: int | None = None


class Engine(Protocol):
    """A thing that answers calls.

    Every method raises only `AppError`s: what vLLM or the script raises is translated at this door.
    Cancelling the task that awaits `answer` or iterates its events frees the engine at once.
    """

    state: EngineState
    meter: Meter

    @property
    def capacity(self) -> Capacity:
        """Known once it is loaded."""

    async def start(self) -> None:
        """Begin to load, and return; `state` tells the rest."""

    async def try_start(self) -> None:
        """Load, and return when ready; after that like an engine that was started.

        Raises:
            SwapFailed: the weights do not load, or are not what they should be; nothing is left running.
        """

    async def close(self) -> None:
        """End everything that `start` began. Safe to call at any time, more than once."""

    async def load_adapter(self, adapter: Weights) -> None:
        """Serve a LoRA adapter: calls whose `model` is its name are answered by it. A restart keeps it.

        Raises:
            AdapterFailed: it does not load, or there is no place for it.
        """

    async def unload_adapter(self, name: str) -> None:
        """Serve it no more. Nothing happens where there is none of that name."""

    async def examine(self, call: Call) -> None:
        """Before the call takes a turn: whether what it holds the output to can be compiled in time.

        Raises:
            BadCall: it cannot. Busy: nobody can tell now.
        """

    async def answer(self, call: Call, timings: Timings | None = None) -> Answer:
        """Generate. A refusal is raised here, before there is an event to send.

        `timings` are the answer's: they tell what was used also of an answer that never comes.
        """

    async def tokens(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """`/tokenize`, `/detokenize` and `/v1/messages/count_tokens`: body in, body out."""

    async def stored_response(self, response_id: str, *, starting_after: int | None, stream: bool) -> Answer:
        """A response of the Responses API that the engine still holds. Raises NotFound."""

    async def cancel_response(self, response_id: str) -> Answer:
        """Stop a background response. Raises NotFound."""
