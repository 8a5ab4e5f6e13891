"""Other weights into a running server: noticed or asked for, proved, put in, and the old ones let go.

```
1. find      what the name stands for now; the same digest: nothing to do
2. load      a second engine beside the first; it must say what these weights said at publication
3. switch    one assignment: calls planned from here on are for the new weights
4. let go    the old engine ends when the last call that began on it has its answer
```
Where memory does not allow two engines, calls wait (hits do not): the old engine finishes what it has and ends, then
the new one starts; if that fails, the old weights are started again. Whatever fails, what was served before is
served on, and `/readyz`, the log and a metric say what was wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.domain import Weights
from app.engine import Engine
from app.errors import AdapterFailed, AppError, Draining, NotFound, StartRefused, SwapFailed
from app.observe import metrics
from app.service import Service
from app.serving import Catalog, Serving

log = logging.getLogger(__name__)

# The longest that an old engine is kept for calls that began on it: a client that reads nothing must not hold it.
LET_GO_S = 900.0


@dataclass(frozen=True, slots=True)
class Sources:
    """Where weights and engines come from: the wiring's part of a swap.

    `find` may take long and raise StartRefused. `adapter` finds an adapter of the given base. `fits` says whether a
    second engine may be started beside the first, and why.
    """

    find: Callable[[], Weights]
    adapter: Callable[[str, Weights], Weights]
    make: Callable[[Weights, list[Weights]], Engine]
    fits: Callable[[Weights], tuple[bool, str]]
    pointer: Path | None = None


@dataclass(slots=True)
class Progress:
    """One swap, step by step, for the answer of the admin route and for /readyz."""

    began: float = field(default_factory=time.time)
    status: str = "running"
    served: str = ""
    wanted: str | None = None
    way: str | None = None
    detail: str = ""
    held_s: float | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)

    def step(self, what: str) -> None:
        self.steps.append({"step": what, "at_s": round(time.time() - self.began, 3)})
        log.info("swap: %s", what)

    def told(self) -> dict[str, Any]:
        known = {
            "status": self.status,
            "served": self.served,
            "wanted": self.wanted,
            "way": self.way,
            "detail": self.detail,
            "held_s": self.held_s,
            "steps": self.steps,
        }
        return {name: value for name, value in known.items() if value not in (None, "")}


class Swapper:
    """The only one who replaces the service's catalog. One swap at a time; who asks meanwhile waits for a turn."""

    def __init__(
        self, service: Service, sources: Sources, *, watch_s: float, tell: Callable[[list[str]], Awaitable[None]]
    ) -> None:
        """`tell` gets the digests in use, whenever they change; a change is over when it has returned."""
        self.last: Progress | None = None
        self._service = service
        self._sources = sources
        self._watch_s = watch_s
        self._tell = tell
        self._turn = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._letting_go: set[asyncio.Task[None]] = set()
        self._work: set[asyncio.Task[Any]] = set()
        # Nothing yet: the first look also finds what moved between the choice of the weights and now.
        self._seen: tuple[int, int] | None = None

    async def start(self) -> None:
        await self._tell_served()
        if self._watch_s and self._sources.pointer is not None:
            self._watching = asyncio.create_task(self._watch(), name="watch-current")

    async def close(self) -> None:
        """End what is under way; an engine that was to come or to go is shut down."""
        tasks = {*self._work, *self._letting_go, *([self._watching] if self._watching else [])}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def is_failed(self) -> bool:
        return self.last is not None and self.last.status == "failed"

    async def reload(self) -> Progress:
        """Serve what the name stands for now. Returns when it is served, or when there is nothing to do.

        The swap is a task of its own: a client that asked for it and left does not end it half-way.

        Raises:
            SwapFailed: it cannot be served; what was served before still is.
            Draining: the server is about to stop.
        """
        work = asyncio.create_task(self._reload(), name="swap")
        self._work.add(work)
        work.add_done_callback(self._worked)
        return await asyncio.shield(work)

    def _worked(self, work: asyncio.Task[Any]) -> None:
        self._work.discard(work)
        if not work.cancelled():
            work.exception()  # said in the log already, should nobody wait for it any more

    async def _watch(self) -> None:
        """Look at the pointer's inode and time of change: it is replaced by a rename, whatever the file system."""
        while True:
            await asyncio.sleep(self._watch_s)
            if await asyncio.to_thread(_stamp, self._sources.pointer) == self._seen:
                continue
            with contextlib.suppress(AppError):  # said in the log and on /readyz; tried again when it moves again
                await self.reload()

    async def _reload(self) -> Progress:
        async with self._turn:
            # Looked at before it is read: what moves in between is noticed at the next look.
            self._seen = await asyncio.to_thread(_stamp, self._sources.pointer)
            before = self._service.catalog.base
            progress = Progress(served=before.weights.short)
            try:
                await self._swap(progress, before)
            except (AppError, StartRefused) as error:
                self._note(progress, "failed", str(error))
                log.error("swap failed: %s; %s is served on", error, before.weights.short)  # noqa: TRY400
                metrics.swaps.labels(progress.way or "none", "failed").inc()
                raise error if isinstance(error, AppError) else SwapFailed(str(error)) from error
            except asyncio.CancelledError:
                self._note(progress, "failed", "the server stops")
                raise
            return progress

    def _note(self, progress: Progress, status: str, detail: str = "") -> None:
        progress.status, progress.detail = status, detail
        self.last = progress
        metrics.swap_failed.set(status == "failed")

    async def _swap(self, progress: Progress, before: Serving) -> None:
        if self._service.is_draining:
            raise Draining("the server is shutting down", retry_after_s=5)
        # 1. Find.
        weights = await asyncio.to_thread(self._sources.find)
        progress.wanted = weights.short
        if (weights.digest, weights.settings_digest) == (before.weights.digest, before.weights.settings_digest):
            self._note(progress, "unchanged")
            return
        self._note(progress, "running", "loading")
        adapters = await self._adapters_for(weights)
        fits, why = self._sources.fits(weights)
        progress.way = "beside" if fits else "pause"
        progress.step(f"{before.weights.short} to {weights.short}, {progress.way}: {why}")
        # 2, 3, 4.
        swapped = self._beside if fits else self._in_a_pause
        await swapped(progress, before, weights, adapters)
        progress.served = weights.short
        self._note(progress, "swapped")
        metrics.swaps.labels(progress.way, "swapped").inc()
        metrics.swap_seconds.observe(time.time() - progress.began)

    async def _beside(self, progress: Progress, before: Serving, weights: Weights, adapters: list[Weights]) -> None:
        engine = self._sources.make(weights, adapters)
        await engine.try_start()
        progress.step("the new engine is ready, and says what its weights said")
        if self._service.is_draining:
            await engine.close()
            raise Draining("the server is shutting down", retry_after_s=5)
        self._switch(engine, weights, adapters)
        progress.step("new calls go to it")
        task = asyncio.create_task(self._let_go(before), name="let-go")
        self._letting_go.add(task)
        task.add_done_callback(self._letting_go.discard)
        await self._tell_served()

    async def _in_a_pause(self, progress: Progress, before: Serving, weights: Weights, adapters: list[Weights]) -> None:
        service, held = self._service, time.monotonic()
        before.retire()
        service.hold_calls()
        progress.step("calls wait")
        try:
            await self._let_go(before)
            progress.step("the old engine has ended")
            engine = self._sources.make(weights, adapters)
            try:
                await engine.try_start()
                self._switch(engine, weights, adapters)
            except Exception:
                old = [each.weights for each in service.catalog.adapters.values()]
                engine = self._sources.make(before.weights, old)
                await engine.start()
                self._switch(engine, before.weights, old)
                await self._tell_served()
                raise
            await self._tell_served()
            progress.step("new calls go to the new engine")
        finally:
            progress.held_s = round(time.monotonic() - held, 3)
            service.let_calls_go()

    def _switch(self, engine: Engine, weights: Weights, adapters: list[Weights]) -> None:
        before = self._service.catalog.base
        base = Serving(weights, engine)
        self._service.catalog = Catalog(base, {each.name: Serving(each, engine, base) for each in adapters})
        before.retire()

    async def _let_go(self, serving: Serving) -> None:
        """Shut the engine down when its last call is answered, or when that takes too long, or when we end."""
        try:
            async with asyncio.timeout(LET_GO_S):
                await serving.left()
        except TimeoutError:
            log.warning("calls still run on %s after %.0f s; they are ended", serving.weights.short, LET_GO_S)
        finally:
            await serving.engine.close()
            log.info("the engine of %s has ended", serving.weights.short)

    async def _tell_served(self) -> None:
        metrics.weights_served.clear()
        for serving in self._service.catalog:
            metrics.weights_served.labels(serving.weights.name, serving.weights.digest[:12]).set(1)
        await self._tell([serving.weights.digest for serving in self._service.catalog])

    # --- adapters -----------------------------------------------------------------------------

    async def _adapters_for(self, base: Weights) -> list[Weights]:
        """Those of the served adapters that are adapters of `base` too; the others are served no more."""
        found = []
        for name in self._service.catalog.adapters:
            try:
                found.append(await asyncio.to_thread(self._sources.adapter, name, base))
            except StartRefused as error:
                log.warning("swap: %s; it is not served any more", error)
        return found

    async def load_adapter(self, name: str) -> Weights:
        """Serve a published adapter of the served weights as a model of its own; again: its current digest.

        Raises:
            AdapterFailed: there is none, it is not one of these weights, it does not load, or there is no room.
        """
        async with self._turn:
            catalog = self._service.catalog
            try:
                adapter = await asyncio.to_thread(self._sources.adapter, name, catalog.base.weights)
            except StartRefused as error:
                raise AdapterFailed(str(error)) from error
            known = catalog.of(adapter.name)
            if known is catalog.base:
                raise AdapterFailed(f"{adapter.name!r} is what the base is called")
            if known is not None and known.weights.digest == adapter.digest:
                return adapter
            if known is not None:
                await self._drop(known)
            await catalog.base.engine.state.ready(0)
            await catalog.base.engine.load_adapter(adapter)
            serving = Serving(adapter, catalog.base.engine, catalog.base)
            self._replace({**self._service.catalog.adapters, adapter.name: serving})
            await self._tell_served()
            log.info("serving adapter %s of %s", adapter.short, catalog.base.weights.short)
            return adapter

    async def unload_adapter(self, name: str) -> None:
        """Serve it no more; what it is answering it answers. Raises NotFound where it is not served."""
        async with self._turn:
            serving = self._service.catalog.adapters.get(name)
            if serving is None:
                raise NotFound(f"no adapter {name!r} is served")
            await self._drop(serving)

    async def _drop(self, serving: Serving) -> None:
        name = serving.weights.name
        self._replace({other: each for other, each in self._service.catalog.adapters.items() if other != name})
        serving.retire()
        await self._tell_served()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LET_GO_S):
                await serving.left()
        await serving.engine.unload_adapter(name)

    def _replace(self, adapters: Mapping[str, Serving]) -> None:
        self._service.catalog = Catalog(self._service.catalog.base, adapters)


def _stamp(pointer: Path | None) -> tuple[int, int] | None:
    """Changes when the pointer is moved. None where there is none yet."""
    if pointer is None:
        return None
    try:
        status = pointer.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
