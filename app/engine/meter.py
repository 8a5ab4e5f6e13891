"""Whose the engine's time is: each step's time goes to the calls it computed tokens for.

With continuous batching a call's wall time says nothing of what it used. A step's time, from the end of the step
before (or from when the engine was given something to do), is divided among the calls that got tokens in it, by the
tokens computed for each: one for a call that goes on, its whole prompt less what the prefix cache had for one that
begins. So what all calls used is the time that the engine was busy, to the last digit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from app.domain import Timings


class Meter:
    """Of one process's devices: `devices` of them work on each step, and each counts. Not thread-safe."""

    def __init__(self, devices: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.busy_s = 0.0
        self._devices = devices
        self._clock = clock
        self._began = clock()
        self._running = 0
        self._since = self._began

    @property
    def idle_s(self) -> float:
        """Device-seconds in which there was nothing to do, the engine's loading among them."""
        running_s = (self._clock() - self._since) * self._devices if self._running else 0.0
        return max(0.0, (self._clock() - self._began) * self._devices - self.busy_s - running_s)

    def begin(self) -> None:
        """The engine was given one more generation."""
        if not self._running:
            self._since = self._clock()
        self._running += 1

    def skip(self) -> None:
        """What has passed since the last step is nobody's: the engine was away, with calls that wait for it."""
        self._since = self._clock()

    def step(self, shares: Collection[tuple[Timings, int]], *, at: float | None = None) -> None:
        """A step has ended (`at` on the monotonic clock) that computed so many tokens for each of these."""
        tokens = sum(count for _, count in shares)
        if not tokens:
            return
        spent_s = self._spent(self._clock() if at is None else at)
        for timings, count in shares:
            timings.device_s += spent_s * count / tokens

    def end(self, timings: Timings, *, at: float | None = None) -> None:
        """One generation has left the engine. What the last one to leave had begun and not finished is its own."""
        self._running -= 1
        if not self._running:
            timings.device_s += self._spent(self._clock() if at is None else at)

    def _spent(self, at: float) -> float:
        spent_s = max(0.0, at - self._since) * self._devices
        self._since = max(self._since, at)
        self.busy_s += spent_s
        return spent_s
