"""Which calls an engine died of.

A core that dies takes down whatever it was working on, so one death accuses many and convicts nobody. But all that ran
goes on, each from where it was: a call that was somewhere else at the last death did not cause this one. One that
stands at the same token at two deaths did, and is not let in again for a while. So does a call that was there at
`MOST_DEATHS`, however far it came: a call may cost an engine so often and not more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cachetools import TTLCache

from app.errors import Quarantined

MOST_DEATHS = 4
MOST_CALLS = 4096


@dataclass(slots=True)
class _Suspect:
    deaths: int = 0
    place: int = -1


class Quarantine:
    """By the key of a call (`underway.key_of`). With `seconds` 0 nobody is ever kept out."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._suspects: TTLCache[str, _Suspect] = TTLCache(MOST_CALLS, seconds, clock)
        self._until: TTLCache[str, float] = TTLCache(MOST_CALLS, seconds, clock)

    def __len__(self) -> int:
        self._until.expire()
        return len(self._until)

    def died(self, key: str, place: int) -> bool:
        """The engine died when it had made so many tokens of this call, those counted that it made again. Whether the
        call is to blame, and kept out from now on."""
        if not (self._seconds and key):  # a probe has none
            return False
        suspect = self._suspects.get(key) or _Suspect()
        suspect.deaths += 1
        is_guilty = place == suspect.place or suspect.deaths >= MOST_DEATHS
        suspect.place = place
        self._suspects[key] = suspect
        if is_guilty:
            self._until[key] = self._clock() + self._seconds
            del self._suspects[key]
        return is_guilty

    def ended(self, key: str) -> None:
        """It came to its end, so it is innocent."""
        self._suspects.pop(key, None)

    def check(self, key: str) -> None:
        """Raises Quarantined where this call is kept out."""
        if self._until and (until := self._until.get(key)) is not None:
            raise self.error(until - self._clock())

    def error(self, left_s: float | None = None) -> Quarantined:
        return Quarantined(
            "the engine died at this call again and again; it is not taken for a while",
            retry_after_s=max(1, round(self._seconds if left_s is None else left_s)),
        )
