"""Recordings that this process holds itself, so that a hot hit asks nobody.

What may be in here is Redis's word alone: `tracking.py` hears of every change there and tells `forget`. This file
knows no network; it owns the bound in bytes, and the race between a value that is being read and the word that it
has changed.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from cachetools import LRUCache

from app.cache.recording import Recording
from app.observe import metrics

_R = TypeVar("_R")

# An entry costs its bytes and about this much for the objects around them.
_OVERHEAD_BYTES = 1500
# What a number in a list takes.
_COUNT_BYTES = 36
# A larger entry than this share would push out too many others.
_LARGEST_SHARE = 16


class Held:
    """A recording in this process, with the replays that were made of it: each is made once."""

    __slots__ = ("__weakref__", "_on_growth", "_replays", "_whole", "recording", "size_bytes")

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        parts = (recording.head, recording.usage, recording.tail, recording.body)
        self.size_bytes = _OVERHEAD_BYTES + sum(map(len, parts)) + _COUNT_BYTES * len(recording.counts or ())
        self._replays: dict[Any, Any] = {}
        self._on_growth: Callable[[], None] | None = None
        self._whole: weakref.ref[Held] | None = None

    def replay(self, which: Any, make: Callable[[], tuple[_R, int]]) -> _R:
        """The replay called `which`; `make` gives it and its size in bytes."""
        found = self._replays.get(which)
        if found is None:
            found, size_bytes = make()
            self._replays[which] = found
            self._grow(size_bytes)
        return cast(_R, found)

    def part(self, recording: Recording) -> Held:
        """Another recording made of this one, which is held with it: what it grows by, this grows by."""
        part = Held(recording)
        part._whole = weakref.ref(self)
        return part

    def _grow(self, size_bytes: int) -> None:
        self.size_bytes += size_bytes
        if self._whole is not None and (whole := self._whole()) is not None:
            whole._grow(size_bytes)
        if self._on_growth:
            self._on_growth()


class _Bounded(LRUCache[str, Held]):
    def popitem(self) -> tuple[str, Held]:
        metrics.near_evicted.inc()
        return super().popitem()


class _Read:
    """One read from Redis that is under way, and what was forgotten since it began."""

    def __init__(self) -> None:
        self.forgotten: set[str] = set()
        self.is_void = False


class Near:
    """Key to `Held`, at most `max_bytes` of them, least recently used first out. It takes nothing in until `open`."""

    def __init__(self, max_bytes: int) -> None:
        self._kept = _Bounded(max_bytes, lambda held: held.size_bytes)
        self._largest = max_bytes // _LARGEST_SHARE
        self.is_open = False
        self._reads: set[_Read] = set()

    def get(self, key: str) -> Held | None:
        try:
            held = self._kept[key]
        except KeyError:
            return None
        if held.recording.expires_at <= time.time():
            self._kept.pop(key)
            return None
        return held

    @contextmanager
    def reading(self) -> Iterator[Callable[[str, Held], None]]:
        """Around a read from Redis; gives the function that takes in what was read.

        ```
        we:      GET k ............................ old value: not taken in
        redis:         answers old | SET k, tells of it
        tracking:                      hears of k
        ```
        The answer and the word of the change come by different connections, so the word may be here first. What
        was forgotten since the read began is therefore not taken in.
        """
        read = _Read()
        self._reads.add(read)

        def take_in(key: str, held: Held) -> None:
            if self.is_open and not read.is_void and key not in read.forgotten:
                self._put(key, held)

        try:
            yield take_in
        finally:
            self._reads.discard(read)

    def forget(self, keys: Iterable[str]) -> None:
        """These have changed in Redis, or are gone."""
        for key in keys:
            for read in self._reads:
                read.forgotten.add(key)
            self._kept.pop(key, None)
        self._measure()

    def clear(self) -> None:
        """Anything may have changed."""
        for read in self._reads:
            read.is_void = True
        self._kept.clear()
        self._measure()

    def open(self) -> None:
        """From now on every change is heard of. What was held before may be old, and goes."""
        self.clear()
        self.is_open = True
        metrics.near_on.set(1)

    def close(self) -> None:
        """Changes are not heard of any more: what is held may still be given, but nothing is taken in."""
        self.is_open = False
        metrics.near_on.set(0)

    def _put(self, key: str, held: Held) -> None:
        def remeasure() -> None:
            if self._kept.pop(key, None) is held:
                self._put(key, held)
                if held.size_bytes > self._largest:
                    metrics.near_evicted.inc()

        if held.size_bytes <= self._largest:
            held._on_growth = remeasure
            self._kept[key] = held
        self._measure()

    def _measure(self) -> None:
        metrics.near_bytes.set(self._kept.currsize)
