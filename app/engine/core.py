"""The core that vLLM's front end talks to: one for as long as the engine lives, whichever process is behind it.

```
lost      the process died, or hung and was killed. Calls that it worked on are kept, new ones wait with them
replaced  another process is there. Probes may pass: is it what it should be?
go_on     the calls that were kept go in one by one, each once the one before it got further than it was; then all
given_up  there will be no other: every call ends with EngineDeadError
```
One by one, since any of them may be what the process died of: should that happen again, it is known which.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from app.engine.quarantine import Quarantine
from app.engine.running import Course, Running, going_on
from app.engine.underway import Underway, underway
from app.errors import AppError, EngineFailed

log = logging.getLogger(__name__)


class LastingCore:
    """Takes the place of vLLM's `AsyncMPClient` in an `AsyncLLM`; all that is not here is the client's own."""

    def __init__(self, client: Any, states: Any, capacity: int, renew: Callable[[Running], Any]) -> None:
        """`states` is vLLM's `OutputProcessor`, `capacity` how many calls a core works on at one time, `renew` gives a
        call a state in which nothing has happened yet."""
        self.quarantine = Quarantine(0)
        self.steps = 0
        self.is_given_up = False
        self._client = client
        self._states = states
        self._capacity = capacity
        self._renew = renew
        self._running: dict[str, Running] = {}
        self._is_open = True
        self._changed = asyncio.Event()
        self._left = asyncio.Event()
        self._read_to_its_end = asyncio.Event()
        self._going_on: asyncio.Task[None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    @property
    def is_lost(self) -> bool:
        return self._client.resources.engine_dead or self._read_to_its_end.is_set()

    @property
    def has_calls(self) -> bool:
        return any(running.is_in_core for running in self._running.values())

    @property
    def pids(self) -> list[int]:
        manager = self._client.resources.engine_manager
        return [process.pid for process in getattr(manager, "processes", ()) if process.pid is not None]

    # --- what AsyncLLM asks -------------------------------------------------------------------

    async def add_request_async(self, request: Any) -> None:
        about = underway.get() or Underway()
        state = self._states.request_states.get(request.request_id)
        if state is None:  # no call: a message about one
            await self._client.add_request_async(request)
            return
        running = self._running[request.request_id] = Running(request, state, about)
        if self._is_open or about.is_probe:
            await self._put_in(running, request)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._leave(request_id)
        await self._client.abort_requests_async(request_ids)

    async def get_output_async(self) -> Any:
        """What one step brought. While there is no process this waits for the next, for ever if there will be none."""
        while True:
            client = self._client
            try:
                outputs = await client.get_output_async()
            except Exception as error:  # whatever it is, nothing can be heard from this process any more
                if client is self._client:
                    await self._replaced(error)
                continue
            self.steps += 1
            outputs.outputs = [output for output in outputs.outputs if self._is_news(output)]
            return outputs

    # --- life ---------------------------------------------------------------------------------

    def replace(self, client: Any) -> None:
        """Another process is there; nothing but probes goes to it before `go_on`."""
        self._hold()
        self._blame()
        if not self._read_to_its_end.is_set():
            self._client.outputs_queue.put_nowait(dead_error())
        self._client = client
        self._changed.set()
        self._changed = asyncio.Event()
        self._read_to_its_end = asyncio.Event()

    def go_on(self) -> None:
        """Let calls in again. Those that were kept come first."""
        self._going_on = asyncio.create_task(self._go_on(), name="going-on")

    def give_up(self) -> None:
        """End every call with EngineDeadError."""
        self._hold()
        self.is_given_up = True
        self._states.propagate_error(dead_error())

    def _hold(self) -> None:
        """From here on calls wait."""
        if self._going_on is not None:
            self._going_on.cancel()
        self._is_open = False

    def _blame(self) -> None:
        """Calls that the process worked on saw its death, each key once; who is to blame is ended."""
        seen: dict[str, list[Running]] = defaultdict(list)
        for running in self._running.values():
            if running.is_in_core:
                running.is_in_core, running.has_died = False, True
                seen[running.underway.key].append(running)
        for key, calls in seen.items():
            if self.quarantine.died(key, max(running.place for running in calls)):
                for running in calls:
                    self._end(running, self.quarantine.error())

    async def _replaced(self, error: Exception) -> None:
        """Return when there is another process. Probes are not kept: what is asked of the next, it asks anew."""
        self._read_to_its_end.set()
        for running in list(self._running.values()):
            if running.underway.is_probe:
                self._end(running, error)
        await self._changed.wait()

    async def _go_on(self) -> None:
        while (running := self._next()) is not None:
            while sum(each.is_in_core for each in self._running.values()) >= self._capacity:
                self._left.clear()
                await self._left.wait()
            if running.request.request_id in self._running:
                await self._take_up(running)
            if self.is_lost:
                return  # it begins again with the next
        self._is_open = True

    async def _take_up(self, running: Running) -> None:
        try:
            await self._put_in(running, self._prepared(running))
        except Exception as error:  # the others must go on
            log.exception("a call cannot go on")
            self._end(running, error if isinstance(error, AppError) else EngineFailed("the call cannot go on"))
            return
        if running.has_died and running.is_in_core:
            await running.is_further.wait()

    def _next(self) -> Running | None:
        """Of those that wait, the one that goes in next: at last those that must make again what they had."""
        waiting = [each for each in self._running.values() if not each.is_in_core]
        return min(waiting, key=lambda each: each.has_died and each.course is not Course.ON, default=None)

    def _prepared(self, running: Running) -> Any:
        running.is_further.clear()
        course = running.course if running.has_died else Course.ANEW
        request = going_on(running, course)
        if course is Course.ANEW and running.goal:
            running.state = self._renew(running)
        return request

    # --- calls --------------------------------------------------------------------------------

    async def _put_in(self, running: Running, request: Any) -> None:
        running.is_in_core = True
        try:
            await self._client.add_request_async(request)
        except type(dead_error()):
            running.is_in_core = False  # it goes in when there is another
            if running.underway.is_probe:
                raise

    def _is_news(self, output: Any) -> bool:
        running = self._running.get(output.request_id)
        if running is None:
            return True
        is_news = True
        if running.has_died:
            try:
                is_news = running.took(output)
            except AppError as error:
                self._end(running, error)
                return False
        if output.finish_reason is not None:
            self.quarantine.ended(running.underway.key)
            self._leave(output.request_id)
        return is_news

    def _end(self, running: Running, error: Exception) -> None:
        """Its client gets the error. vLLM's `generate` then aborts it, with all that belong to the same call."""
        self._leave(running.request.request_id)
        running.fail(error)

    def _leave(self, request_id: str) -> None:
        running = self._running.pop(request_id, None)
        if running is not None:
            running.is_further.set()
            self._left.set()


def dead_error() -> Exception:
    from vllm.v1.engine.exceptions import EngineDeadError

    error: Exception = EngineDeadError()
    return error
