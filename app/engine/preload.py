"""What the fork server loads before any engine core is forked from it, and what each core does first.

A core that vLLM spawns imports everything again, about 7 s; one that is forked from a warm server
starts at once, also after a crash. The fork server ends when our process ends, however that happens,
and every core asks the kernel to be killed with it: no core outlives us to spin and hold memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal

from app.lifeline import die_with_parent


def _in_core() -> None:
    with contextlib.suppress(PermissionError):  # already a session leader
        os.setsid()  # the terminal's Ctrl-C is for the server, which drains; the core must finish first
    die_with_parent(signal.SIGKILL)


# It says once per process that Triton is not there, which on a CPU is as it should be. A filter, since vLLM
# configures logging anew, and that takes `disabled` back.
logging.getLogger("torch._library.triton").addFilter(lambda _: False)

if server := os.environ.get("_REFRAIN_FORKSERVER"):
    # Its own way to notice our end, a pipe, stays open as long as a core does: each core holds a copy. The server may
    # have been killed while this interpreter started: hence its pid, not whoever is the parent by now.
    die_with_parent(signal.SIGKILL, int(server))
    os.register_at_fork(after_in_child=_in_core)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # vLLM compiles some small functions on their first use, which may be a call's: 13 s for a kernel that counts
        # what is greater than a log-probability. They are read when their modules are imported, hence before those.
        current_platform.simple_compile_backend = "eager"
    import vllm.v1.engine.async_llm
    import vllm.v1.engine.core
    import vllm.v1.executor.uniproc_executor  # noqa: F401

    if current_platform.is_cpu():
        import app.engine.compiled
        import app.engine.norms  # noqa: F401
