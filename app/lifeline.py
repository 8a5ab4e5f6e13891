"""Children that never outlive us, however we end."""

from __future__ import annotations

import ctypes
import os

PR_SET_PDEATHSIG = 1


def die_with_parent(with_signal: int, parent: int | None = None) -> None:
    """Have the kernel send this process `with_signal` when its parent dies (Linux, prctl(2)).

    To be called in the child, right after the fork; where it can only be called later, with the `parent`'s pid: one
    that died before the call is no parent any more, and the kernel tells nothing of the past.
    """
    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, with_signal, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), with_signal)
