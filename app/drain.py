"""Leaving without dropping a call.

```
begin    /readyz says `draining`; calls are taken as ever, for as long as a balancer needs to notice
over     no new generation, the port closes; what runs may finish (`drain_s`), then the process ends
```
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from app.service import Service

log = logging.getLogger(__name__)


class Drain:
    """Begun by a signal or an admin, once; whoever asks again cuts the delay short. `on_over` ends the server."""

    def __init__(self, service: Service, delay_s: float) -> None:
        self._service = service
        self._delay_s = delay_s
        self._timer: asyncio.TimerHandle | None = None
        self.since: float | None = None
        self.reason = ""
        self.on_over: Callable[[], None] = lambda: None

    def begin(self, reason: str) -> None:
        is_first = self.since is None
        if is_first:
            self.since, self.reason = time.time(), reason
            log.info("%s: draining", reason)
        if is_first and self._delay_s:
            self._timer = asyncio.get_running_loop().call_later(self._delay_s, self._over)
        else:
            self.close()
            self._over()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _over(self) -> None:
        self._service.drain(self.reason)
        self.on_over()
