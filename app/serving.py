"""Which weights are served by which engine, pinned to each call from its plan to its recording.

A swap replaces the whole `Catalog` in one assignment. What was planned before keeps its own `Serving`, so a call's key,
its headers, its text and its recording always speak of the same digest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from app.domain import Weights
from app.engine import Engine


class Serving:
    """Weights and the engine that serves them; for an adapter, the engine of its base.

    `hold` it while a call works with the engine: the engine is shut down when nobody holds it any more.
    """

    def __init__(self, weights: Weights, engine: Engine, base: Serving | None = None) -> None:
        self.weights = weights
        self.engine = engine
        self._base = base
        self._holders = 0
        self._retired = False
        self._left = asyncio.Event()

    @property
    def is_retired(self) -> bool:
        """It takes no new call; those that hold it go on."""
        return self._retired or (self._base is not None and self._base.is_retired)

    def retire(self) -> None:
        self._retired = True

    @contextmanager
    def hold(self) -> Iterator[None]:
        for serving in self._line():
            serving._holders += 1
        try:
            yield
        finally:
            for serving in self._line():
                serving._holders -= 1
                if not serving._holders:
                    serving._left.set()

    def hold_until(self, task: asyncio.Task[None]) -> None:
        """Hold it from now on until the task has ended, whoever awaits that."""
        holding = self.hold()
        holding.__enter__()
        task.add_done_callback(lambda _: holding.__exit__(None, None, None))

    async def left(self) -> None:
        """Return when nobody holds it, an adapter's callers counted with their base's."""
        while self._holders:
            self._left.clear()
            await self._left.wait()

    def _line(self) -> tuple[Serving, ...]:
        return (self,) if self._base is None else (self, self._base)


@dataclass(frozen=True, slots=True, eq=False)
class Catalog:
    """All that is served at one moment. Never changed, only replaced."""

    base: Serving
    adapters: Mapping[str, Serving] = field(default_factory=dict)

    def of(self, model: str | None) -> Serving | None:
        """What a call that names `model` is for; without a name it is for the base."""
        if model is None or model == self.base.weights.name:
            return self.base
        return self.adapters.get(model)

    def called(self, model: str) -> str:
        """The name, for a metric: one that is served here, whatever another server may call its weights."""
        serving = self.of(model)
        return serving.weights.name if serving else "other"

    @property
    def names(self) -> list[str]:
        return [self.base.weights.name, *self.adapters]

    def __iter__(self) -> Iterator[Serving]:
        yield self.base
        yield from self.adapters.values()
