"""The ledger while the server runs: calls are noted on the event loop, and written by a thread, many at a time.

What a `kill -9` or a power cut can lose is what was noted in the last `ledger_flush_s`, and while that was written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from pathlib import Path
from typing import Protocol, Self

import msgspec

from app.domain import Caller
from app.ledger import files
from app.ledger.appender import Appender
from app.ledger.record import Prices, Record
from app.observe import metrics
from app.settings import Settings

log = logging.getLogger(__name__)

# So many records are held while the disk takes none: about 40 MB, and 12 s of the fastest hits.
MOST_HELD = 100_000
_WRITE_BYTES = 1 << 20
_ENGINE_EVERY_S = 60.0
_RETRY_S = 1.0
# A disk that hangs must not keep a server from stopping.
_LAST_WRITE_S = 10.0

# The thread stops for a moment after so many, so that no hit waits long for the interpreter.
_LOT = 64
_BREATH_S = 0.0005

_encode = msgspec.json.Encoder().encode


class DeviceClock(Protocol):
    """Device-seconds since the server began."""

    @property
    def busy_s(self) -> float: ...

    @property
    def idle_s(self) -> float: ...


class Ledger:
    """Takes notes at any time; they are written while it is open (`async with`)."""

    def __init__(self, settings: Settings, devices: DeviceClock) -> None:
        self._folder = settings.ledger_root
        self._settings = settings
        self._prices = Prices.own(settings)
        self._devices = devices
        self._told = (0.0, 0.0)
        self._told_at = time.monotonic()
        # Appended to by the loop and emptied by the thread: both are atomic.
        self._noted: deque[Record] = deque()
        self._held: deque[bytes] = deque()
        self._appender = Appender(self._folder, settings.ledger_file_mib << 20)
        self._is_up = True
        self._stopping = threading.Event()
        self._writing = threading.Thread(target=self._write_regularly, name="ledger", daemon=True)
        self._tidying: threading.Thread | None = None

    def note(self, record: Record) -> None:
        """Remember one call that has ended. Never waits, and never fails."""
        if len(self._noted) < MOST_HELD:
            self._noted.append(record)
        else:  # the disk does not fail but hang
            metrics.ledger_lost.inc()

    def note_rest(self, caller: Caller, endpoint: str, weights: str, device_s: float) -> None:
        """What a generation used that no client was there to pay for."""
        self.note(
            Record(
                time=time.time(),
                kind="rest",
                tenant=caller.tenant,
                key=caller.key_id or "",
                endpoint=endpoint,
                weights=weights,
                device_s=device_s,
            )
        )

    async def __aenter__(self) -> Self:
        self._writing.start()
        self._tidy()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping.set()
        await asyncio.to_thread(self._writing.join, _LAST_WRITE_S)
        if self._tidying is not None:
            await asyncio.to_thread(self._tidying.join, _LAST_WRITE_S)

    # --- the thread -----------------------------------------------------------------------------

    def _write_regularly(self) -> None:
        while not self._stopping.wait(self._settings.ledger_flush_s if self._is_up else _RETRY_S):
            self._write()
        self._note_engine()
        self._write()
        if lost := len(self._held):
            metrics.ledger_lost.inc(lost)
            log.error("%d records of the usage ledger are lost: they could not be written before the end", lost)
        self._appender.close()

    def _write(self) -> None:
        if time.monotonic() - self._told_at >= _ENGINE_EVERY_S:
            self._note_engine()
        self._take()
        try:
            while self._held:
                lines = self._next_lines()
                if self._appender.append(b"".join(lines)):
                    self._tidy()
                for _ in lines:
                    self._held.popleft()
                metrics.ledger_records.inc(len(lines))
        except OSError as error:
            self._become(up=False, why=error.strerror or str(error))
        else:
            self._become(up=True)
        metrics.ledger_held.set(len(self._held))

    def _take(self) -> None:
        while self._noted:
            for _ in range(min(_LOT, len(self._noted))):
                record = self._noted.popleft()
                if record.kind != "engine" and (record.device_s or not record.spared_tokens):  # else it is a hit
                    record.cost = self._prices.cost(record)
                self._held.append(_encode(record) + b"\n")
            time.sleep(_BREATH_S)
        over = len(self._held) - MOST_HELD
        if over > 0:
            for _ in range(over):
                self._held.popleft()
            metrics.ledger_lost.inc(over)

    def _next_lines(self) -> list[bytes]:
        """As many as one write takes, so that a disk with a little room takes what it can."""
        lines: list[bytes] = []
        size = 0
        for line in self._held:
            if lines and size + len(line) > _WRITE_BYTES:
                break
            lines.append(line)
            size += len(line)
        return lines

    def _note_engine(self) -> None:
        busy_s, idle_s = self._devices.busy_s, self._devices.idle_s
        told_busy_s, told_idle_s = self._told
        now, told_at = time.monotonic(), self._told_at
        self._told, self._told_at = (busy_s, idle_s), now
        self.note(
            Record(
                time=time.time(),
                kind="engine",
                device_s=busy_s - told_busy_s,
                idle_s=idle_s - told_idle_s,
                total_s=now - told_at,
            )
        )

    def _become(self, *, up: bool, why: str = "") -> None:
        metrics.ledger_up.set(up)
        if up is self._is_up:
            return
        self._is_up = up
        if up:
            log.info("the usage ledger is written again")
        else:
            log.warning(
                "the usage ledger cannot be written (%s: %s); calls go on, the last %d records are held in memory",
                self._folder,
                why,
                MOST_HELD,
            )

    def _tidy(self) -> None:
        if self._tidying is None or not self._tidying.is_alive():
            self._tidying = threading.Thread(target=self._tidied, name="ledger-tidy", daemon=True)
            self._tidying.start()

    def _tidied(self) -> None:
        with contextlib.suppress(OSError):  # old files stay large for now; the writer tells of a full disk
            files.tidy(self._folder, self._settings.ledger_keep_days, self._stopping.is_set)


def note_training(folder: Path, *, model: str, phase: str, device_s: float) -> None:
    """Record one phase of a fine-tuning job for weights that are to be called `model`. Raises OSError."""
    record = Record(time=time.time(), kind="training", weights=f"{model}@", endpoint=phase, device_s=device_s)
    appender = Appender(folder, 1 << 20)
    try:
        appender.append(_encode(record) + b"\n")
    finally:
        appender.close()
