"""Which weights running servers serve, so that nobody removes them: one small file per server, under the home."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from app import presence
from app.weights.durable import write_whole


class InUse:
    """A file beside a lock; what a killed server leaves is locked by nobody, and counts for nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / f"{presence.new_name()}.json"
        self._lock_fd: int | None = None

    def tell(self, digests: Iterable[str]) -> None:
        with suppress(OSError):  # a read-only home: `refrain models gc` is then run where it can be written
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._lock_fd is None:
                self._lock_fd = presence.hold(_lock(self._own))
            write_whole(self._own, json.dumps({"digests": sorted(digests)}).encode())

    def end(self) -> None:
        with suppress(OSError):
            _remove(self._own)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def digests(self) -> frozenset[str]:
        """What servers of this home serve now; files of dead ones are removed."""
        found: set[str] = set()
        for file in {each.with_suffix(".json") for each in self._folder.glob("[0-9]*")}:
            with suppress(OSError, ValueError, KeyError, TypeError), presence.is_gone(_lock(file)) as gone:
                if gone:
                    _remove(file)
                else:
                    found.update(json.loads(file.read_bytes())["digests"])
        return frozenset(found)


def _lock(file: Path) -> Path:
    return file.with_suffix(".lock")


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    _lock(file).unlink(missing_ok=True)
