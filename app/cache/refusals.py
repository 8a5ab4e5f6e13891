"""Calls that the engine refused for good, remembered for a moment: a retry storm then costs it nothing."""

from __future__ import annotations

import copy

from cachetools import TTLCache

from app.errors import BadCall
from app.observe import metrics

# An error each, without the call it was about.
REMEMBERED = 4096


class Refusals:
    """`ttl_s` 0 remembers nothing."""

    def __init__(self, ttl_s: float) -> None:
        self._errors: TTLCache[str, BadCall] | None = TTLCache(REMEMBERED, ttl_s) if ttl_s else None

    def remember(self, key: str, error: BadCall) -> None:
        if self._errors is not None:
            self._errors[key] = error

    def check(self, key: str) -> None:
        """Raises BadCall: what the engine said to this call."""
        if self._errors is not None and (error := self._errors.get(key)) is not None:
            metrics.spared_refusals.inc()
            raise copy.copy(error).with_traceback(None)
