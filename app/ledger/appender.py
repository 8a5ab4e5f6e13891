"""Appending to this process's own file so that what was appended is on the disk, and nothing is half there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from app.ledger import files


class Appender:
    """Begins a new file with each day, above `max_bytes`, and after each failure."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._path: Path | None = None
        self._fd = -1
        self._size = 0

    def append(self, lines: bytes) -> bool:
        """Write whole lines; they are on the disk when this returns. Whether a new file was begun for them.

        Raises:
            OSError: the disk is full, gone, or cannot be written; nothing of `lines` was kept.
        """
        begins = self._is_to_begin(len(lines))
        try:
            if begins:
                self.close()
                self._begin()
            view = memoryview(lines)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError:
            self._abandon()
            raise
        self._size += len(lines)
        return begins

    def close(self) -> None:
        if self._path is not None:
            os.close(self._fd)
            self._path = None

    def _is_to_begin(self, more_bytes: int) -> bool:
        if self._path is None or (self._size and self._size + more_bytes > self._max_bytes):
            return True
        return files.day_of(self._path) != time.strftime("%Y%m%d", time.gmtime())

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._folder / files.new_name()
        unlocked = path.with_suffix(".new")  # another process's `tidy` must not find it before it is locked
        self._fd = os.open(unlocked, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._path, self._size = unlocked, 0
        with contextlib.suppress(OSError):  # a file system without locks: `tidy` cannot lock it either
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._path = unlocked.rename(path)
        files.sync(self._folder)

    def _abandon(self) -> None:
        """Back to the last whole line, and never write to this file again: what comes next begins another."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):  # then a torn line is its last, which readers skip
            os.ftruncate(self._fd, self._size)
            if not self._size:
                self._path.unlink()
        self.close()
