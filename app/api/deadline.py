"""How long a client waits for its answer: its `x-request-timeout`, or what the settings say."""

from __future__ import annotations

import re

from app.errors import BadCall
from app.settings import Settings

_TIMEOUT = re.compile(rb"(\d{1,9}(?:\.\d{1,9})?)\s*(ms|s)?")


def time_left(header: bytes | None, settings: Settings, passed_s: float) -> float | None:
    """Seconds that are left, None where there is no limit. `x-request-timeout` is `1.5`, `1.5s` or `1500ms`.

    The official clients' `x-stainless-timeout` and `x-stainless-read-timeout` are no such limit: they tell how long
    the client waits for the next byte, and a stream is kept alive with comments.

    Raises:
        BadCall: the header is no length of time.
    """
    if header is None:
        return settings.request_timeout_s - passed_s if settings.request_timeout_s else None
    match = _TIMEOUT.fullmatch(header.strip())
    seconds = float(match[1]) / (1000 if match[2] == b"ms" else 1) if match else 0.0
    if not seconds:
        raise BadCall("`x-request-timeout` must be a time like 1.5, 1.5s or 1500ms", param="x-request-timeout")
    return seconds - passed_s
