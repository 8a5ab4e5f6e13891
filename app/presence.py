"""Who of those that share a folder still lives: each holds a lock there, which the kernel ends with its process.

A process's number does not tell: in containers everybody is number 1, and several of them share a volume.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def new_name() -> str:
    """A name that no other process takes; the number at its front is for people."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def hold(lock: Path) -> int:
    """Make and lock a file until the descriptor returned is closed, or we die."""
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # somebody removed it as a dead one's before it was locked


@contextlib.contextmanager
def is_gone(lock: Path) -> Iterator[bool]:
    """Whether its maker has ended; False where unknown. Nobody takes it inside, so what was left can be removed."""
    fd = -1
    try:
        fd = os.open(lock, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        gone = True
    except FileNotFoundError:
        gone = True
    except OSError:
        gone = False
    try:
        yield gone
    finally:
        if fd >= 0:
            os.close(fd)
