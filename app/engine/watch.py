"""Whether a core hangs. Judged by its steps: a core that is asked how it is answers late because it is busy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil

TICK_S = 1.0
# Of one core's time. A process that waits for something stays below it, one that works comes far above.
IDLE_SHARE = 0.01


class Watch:
    """Counts how long a core that has calls has ended no step.

    Hung is a core that did nothing at all for `hang_s`: stopped, deadlocked, waiting for what does not come. Of one
    that computes (a long prefill, a compilation) nobody can say from outside, so it has `stuck_s`. 0: never.
    Time is counted in looks, a second each, so that a pause of our own process is nobody's fault.
    """

    def __init__(self, hang_s: float, stuck_s: float) -> None:
        self._hang_s = hang_s
        self._stuck_s = stuck_s
        self._steps = -1
        self._silent_s = self._idle_s = self._cpu_s = 0.0

    @property
    def is_silent(self) -> bool:
        """Whether there was no step at the last look. Only then is the time of its processes of interest."""
        return self._silent_s > 0

    def look(self, *, steps: int, has_calls: bool, cpu_s: float | None) -> str | None:
        """One more second has passed; what is wrong, if something is.

        Args:
            steps: how many steps the core has ended so far.
            has_calls: whether it works on anything.
            cpu_s: processor time that its processes have used so far; None: they wait for a disk, which is work.
        """
        if steps != self._steps or not has_calls:
            self._steps = steps
            self._silent_s = self._idle_s = 0.0
            return None
        self._silent_s += TICK_S
        if cpu_s is None or abs(cpu_s - self._cpu_s) > IDLE_SHARE * TICK_S * max(1.0, self._idle_s):
            self._idle_s = 0.0
            self._cpu_s = cpu_s or 0.0
        else:
            self._idle_s += TICK_S
        if self._hang_s and self._idle_s >= self._hang_s:
            return f"no step and no work for {self._idle_s:.0f} s"
        if self._stuck_s and self._silent_s >= self._stuck_s:
            return f"no step for {self._silent_s:.0f} s"
        return None


def cpu_seconds(processes: Iterable[psutil.Process]) -> float | None:
    """Processor time of them all; None while one of them waits for a disk."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_DISK_SLEEP:
                return None
            times = process.cpu_times()
            total += times.user + times.system
    return total


def family(pids: Iterable[int]) -> list[psutil.Process]:
    """The processes of these ids and all that they started."""
    found: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
    return found
