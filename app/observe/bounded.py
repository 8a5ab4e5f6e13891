"""Memories with a bound in bytes, what they push out counted, and what they hold shown. `name` is a metric's label."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from cachetools import LRUCache, TTLCache

from app.observe import metrics

_K = TypeVar("_K")
_V = TypeVar("_V")


class Recent(LRUCache[_K, _V]):
    """Forgets what was longest not asked for."""

    def __init__(self, name: str, max_bytes: int, weigh: Callable[[_V], int]) -> None:
        super().__init__(max_bytes, weigh)
        self._evicted = metrics.memory_evicted.labels(name)
        metrics.watch(name, self)

    def popitem(self) -> tuple[_K, _V]:
        self._evicted.inc()
        return super().popitem()


class Brief(TTLCache[_K, _V]):
    """Forgets after `ttl_s`, which is no eviction, and before that what was longest not asked for."""

    def __init__(self, name: str, max_bytes: int, ttl_s: float, weigh: Callable[[_V], int]) -> None:
        super().__init__(max_bytes, ttl_s, getsizeof=weigh)
        self._evicted = metrics.memory_evicted.labels(name)
        metrics.watch(name, self)

    def popitem(self) -> tuple[_K, _V]:
        self._evicted.inc()
        return super().popitem()
