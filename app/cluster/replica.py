"""One replica: the whole server, in a process that Ray started and will stop.

```
__init__      settings, and what a cluster needs beyond them: one Redis for all, and keys
reconfigure   the first time: weights, engine, then the port. Later: other weights, by a swap
check_health  fails when the engine will not come back by itself, or the port is gone; Ray then starts another
drain         as on SIGTERM; Ray waits for it
```
It has two doors. Its own port is uvicorn's, with hits answered where they are parsed; replicas of one machine share it,
and the kernel deals connections out. Ray's proxy leads to the same app by `door`. Nothing here imports Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI

from app import main
from app.engine import Phase
from app.errors import AppError, EngineDown, StartRefused
from app.gate.keys import Gate, KeyFile
from app.observe import logs
from app.settings import Settings, load

log = logging.getLogger(__name__)

# The longest that weights may take to load before Ray is told that they do not.
LOAD_S = 3600.0
# Between the port's closing and the first refusal: who had connected by then has sent its request.
SETTLE_S = 0.5
# What may be changed in a replica that runs; anything else is for a new one.
CHANGEABLE = frozenset({"model"})


class Replica:
    """`given` are settings by name, in front of the environment; secrets belong into the environment."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given
        self._settings = load(**given)
        check_shared(self._settings)
        logs.configure(format=self._settings.log_format, level=self._settings.log_level)
        self._started: _Started | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Start with these settings, or serve other weights from now on.

        Weights that cannot be served leave those that are: Ray is told nothing, or it would end a replica that works.
        `/readyz`, `refrain_swap_failed` and the log say it.

        Raises:
            StartRefused: settings that do not fit, or cannot change, or weights that do not load at the start.
        """
        if unknown := set(user_config) - CHANGEABLE:
            raise StartRefused(f"user_config may set {', '.join(CHANGEABLE)}; {min(unknown)} belongs into args")
        wanted = load(**self._given | user_config)
        has_changed, self._settings = wanted.model != self._settings.model, wanted
        if self._started is None:
            await self._start(wanted)
        elif has_changed:
            with contextlib.suppress(AppError):
                await self._app.state.swapper.reload()

    async def check_health(self) -> None:
        """Raises EngineDown where another replica is needed. One that loads, or restarts its engine, is well."""
        if self._started is None:
            return
        if self._started.serving.done():
            raise EngineDown("the server of this replica has ended")
        state = self._app.state.service.engine.state
        if state.phase is Phase.FAILED:
            raise EngineDown(f"the engine is down: {state.detail}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The load of the engine, whichever door it came by: hits and followers are none. For `scaling.by_calls`."""
        return {"calls": self._app.state.service.admission.calls if self._started else 0}

    async def drain(self) -> None:
        """Leave as on SIGTERM: readiness first, then the port, then no new work; over when what runs has ended.

        The port closes before anything is refused, so that a new connection comes to another replica.
        """
        if self._started is not None:
            self._app.state.drain.begin("Ray stops this replica")
            await asyncio.sleep(self._settings.drain_delay_s)
            self._started.server.stop_listening()
            await asyncio.wait({self._started.serving})

    async def door(self, scope: Any, receive: Any, send: Any) -> None:
        """The app for Ray's proxy. Its lifespan is that of the port, so here it is only acknowledged."""
        if scope["type"] == "lifespan":
            await _acknowledge(receive, send)
        else:
            await self._app(scope, receive, send)

    @property
    def _app(self) -> FastAPI:
        if self._started is None:  # Ray sends nothing before `reconfigure` has returned
            raise RuntimeError("this replica is not started")
        return self._started.app

    async def _start(self, settings: Settings) -> None:
        """Returns when the engine is ready and the port open, in that order."""
        weights = await asyncio.to_thread(main.find_weights, settings, log.info)
        sources = replace(main.swap_sources(settings), find=lambda: main.find_weights(self._settings, log.info))
        delayed = settings.model_copy(update={"drain_delay_s": settings.drain_delay_s + SETTLE_S})
        app = main.create_app(delayed, weights, sources=sources, on_progress=log.info)
        app.router.lifespan_context = _until_ready(app)
        listening = asyncio.Event()

        def opened(url: str) -> None:
            log.info("listening on %s; serving %s", url, weights.short)
            listening.set()

        server = Hosted(main.uvicorn_config(settings, app), app, opened)
        listener = main.bound(settings, is_shared=True)
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="server")
        serving.add_done_callback(lambda _: listener.close())
        waiting = asyncio.create_task(listening.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if serving.done():
            await serving
            raise StartRefused("the server did not start; the replica's log says why")
        self._started = _Started(app, server, serving)


class Hosted(main.Server):
    """The server in a process, and a thread, whose signals are somebody else's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop_listening(self) -> None:
        for server in self.servers:
            server.close()


@dataclass(frozen=True, slots=True)
class _Started:
    app: FastAPI
    server: Hosted
    serving: asyncio.Task[None]


def check_shared(settings: Settings) -> None:
    """What one server alone can do without.

    Raises:
        StartRefused: there is no Redis that replicas share, or no key. Ray's proxy listens where Ray is told to, so
            that an address of ours on loopback protects nothing.
    """
    if settings.redis_url is None:
        raise StartRefused("replicas share one Redis: set REFRAIN_REDIS_URL")
    if Gate(KeyFile(settings.keys_path)).is_open:
        raise StartRefused(
            f"refusing to serve on Ray without API keys: make one with `refrain keys create --tenant NAME`, "
            f"and let every replica read it ({settings.keys_path}, or REFRAIN_KEYS_FILE)"
        )


def _until_ready(app: FastAPI) -> Any:
    """The app's lifespan, begun when its engine is ready: a port that is shared must not take calls that then wait."""
    opened = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[Any]:
        async with opened(app) as state:
            await app.state.service.engine.state.ready(LOAD_S)
            yield state

    return lifespan


async def _acknowledge(receive: Any, send: Any) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
