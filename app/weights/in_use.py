"""Which weights running servers serve, so that nobody removes them: one small file per server, under the home."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from app.weights.durable import write_whole


class InUse:
    """A file that a killed server leaves names a process that is gone, and counts for nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / f"{os.getpid()}.json"

    def tell(self, digests: Iterable[str]) -> None:
        with suppress(OSError):  # a read-only home: `refrain models gc` is then run where it can be written
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._own, json.dumps({"digests": sorted(digests), "started": _started(os.getpid())}).encode())

    def end(self) -> None:
        with suppress(OSError):
            self._own.unlink(missing_ok=True)

    def digests(self) -> frozenset[str]:
        """What servers of this home serve now; files of dead ones are removed."""
        found: set[str] = set()
        for file in self._folder.glob("*.json"):
            try:
                told = json.loads(file.read_bytes())
                if told["started"] == _started(int(file.stem)):
                    found.update(told["digests"])
                    continue
                file.unlink(missing_ok=True)
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return frozenset(found)


def _started(pid: int) -> str | None:
    """When a process began, in ticks since boot; None where there is none. A number alone may have been given again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]
