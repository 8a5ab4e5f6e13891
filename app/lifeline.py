"""Children that never outlive us, however we end."""

from __future__ import annotations

import ctypes
import os

PR_SET_PDEATHSIG = 1


def die_with_parent(with_signal: int) -> None:
    """Have the kernel send this process `with_signal` when its parent dies (Linux, prctl(2)).

    To be called in the child, right after the fork.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, with_signal, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os.kill(os.getpid(), with_signal)
