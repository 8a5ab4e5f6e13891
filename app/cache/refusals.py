"""Calls that the engine refused for good, remembered for a moment: a retry storm then costs it nothing."""

from __future__ import annotations

import copy

from app.errors import BadCall
from app.observe import metrics
from app.observe.bounded import Brief

# An error each, without the call it was about: its message, and the objects around it.
MEMORY_BYTES = 4 * 2**20
_OVERHEAD_BYTES = 1000


class Refusals:
    """`ttl_s` 0 remembers nothing."""

    def __init__(self, ttl_s: float) -> None:
        self._errors: Brief[str, BadCall] | None = Brief("refusals", MEMORY_BYTES, ttl_s, _weight) if ttl_s else None

    def remember(self, key: str, error: BadCall) -> None:
        if self._errors is not None and _weight(error) < MEMORY_BYTES:
            self._errors[key] = error

    def check(self, key: str) -> None:
        """Raises BadCall: what the engine said to this call."""
        if self._errors is not None and (error := self._errors.get(key)) is not None:
            metrics.spared_refusals.inc()
            raise copy.copy(error).with_traceback(None)


def _weight(error: BadCall) -> int:
    return _OVERHEAD_BYTES + len(error.message)
