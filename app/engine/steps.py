"""vLLM's steps, told to a meter: whose tokens each of them computed. Seen from our process; the core is as it is."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from app.domain import Timings
from app.engine.meter import Meter


def watch_steps(llm: Any, meter: Meter, timings: Callable[[], Timings | None]) -> None:
    """Tell `meter` of all that this AsyncLLM computes, from before its first call on.

    `timings` gives those of the call in whose task it is asked.
    """
    steps = _Steps(meter, llm.output_processor.request_states)
    receive = llm.engine_core.get_output_async

    async def received() -> Any:
        step = await receive()
        steps.note(step)
        return step

    def metered(ask: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
        async def asked(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            request_id = kwargs["request_id"] if "request_id" in kwargs else args[2]
            with steps.of(request_id, timings() or Timings()):
                async with aclosing(ask(*args, **kwargs)) as outputs:
                    async for output in outputs:
                        yield output

        return asked

    llm.engine_core.get_output_async = received
    llm.generate, llm.encode = metered(llm.generate), metered(llm.encode)


class _Steps:
    """A prompt longer than one step's budget is computed over several, and vLLM tells of it with the last: what the
    others took is counted as that step's if nobody else was served, and else as theirs who got tokens in them.
    """

    def __init__(self, meter: Meter, states: dict[str, Any]) -> None:
        self._meter = meter
        self._states = states
        self._calls: dict[str, Timings] = {}
        self._finished_at: dict[str, float] = {}

    @contextmanager
    def of(self, request_id: str, timings: Timings) -> Iterator[None]:
        """What is computed for this request, while the context is open, is these timings'."""
        self._calls[request_id] = timings
        self._meter.begin()
        try:
            yield
        finally:
            del self._calls[request_id]
            # The engine was done with it before our loop came to hear of it.
            self._meter.end(timings, at=self._finished_at.pop(request_id, None))

    def note(self, step: Any) -> None:
        shares = []
        for output in step.outputs:
            request_id = self._asked_as(output.request_id)
            timings = self._calls.get(request_id)
            if timings is None:  # it was aborted a moment ago
                continue
            computed = len(output.new_token_ids)
            if (prompt := output.prefill_stats) is not None:
                timings.prefix_tokens += prompt.num_cached_tokens
                computed += prompt.num_computed_tokens
            shares.append((timings, computed))
            if output.finish_reason is not None:
                self._finished_at[request_id] = step.timestamp
        self._meter.step(shares, at=step.timestamp)

    def _asked_as(self, internal_id: str) -> str:
        """vLLM makes ids of its own, several where a call wants several choices."""
        state = self._states.get(internal_id)
        return "" if state is None else str(state.external_req_id)
