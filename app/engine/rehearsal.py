"""Schemas, regexes and grammars are compiled in a child process first, under a limit of processor time.

A grammar of a hundred bytes can take a fifth of a second for each token that it is asked about, and the engine asks
between two steps of the whole batch; others compile for as long as one lets them. So it is rehearsed: parsed,
compiled and walked a few tokens, in a child that the kernel ends when its time is up. What is found is remembered.
What vLLM does not take is left for vLLM to refuse, whose message says why.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import pickle
import resource
import signal
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from cachetools import LRUCache

from app.engine.constraints import Constraint, constraints, digest
from app.engine.stage import Stage
from app.errors import BadCall, Busy

log = logging.getLogger(__name__)

# What the child may take beyond what it has when it begins. A grammar that wants more ends it.
MEMORY_BYTES = 2 * 2**30
# The child is niced, and a busy machine may let it wait; it is also how long the first one may take to load.
PATIENCE_S = 60.0
REMEMBERED = 4096


class Rehearsals:
    """The child is begun with the first constraint, and again after one that ended it.

    One constraint is rehearsed at a time, and one of each tenant waits for its turn; so a tenant that sends hostile
    ones by the dozen holds up another's first by one or two of them.
    """

    def __init__(self, cpu_s: float, prepare: Callable[[], Any]) -> None:
        """`prepare` gives what the child needs to compile as the engine does: picklable, given to `Stage`."""
        self._cpu_s = cpu_s
        self._prepare = prepare
        self._known: LRUCache[str, str | None] = LRUCache(REMEMBERED)
        self._turn = asyncio.Lock()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._child: tuple[Any, Connection] | None = None

    async def check(self, body: dict[str, Any], tenant: str) -> None:
        """Return when everything that the body holds the output to was compiled once.

        Raises:
            BadCall: it takes too much time or memory. Busy: the child is not there, or the machine too busy.
        """
        for constraint in constraints(body):
            name = digest(constraint)
            if name not in self._known:
                await self._rehearse_in_turn(name, constraint, tenant)
            if (reason := self._known.get(name)) is not None:
                raise BadCall(reason, code="grammar_too_complex", param=next(iter(constraint)))

    async def close(self) -> None:
        async with self._turn:
            await asyncio.to_thread(self._end)

    async def _rehearse_in_turn(self, name: str, constraint: Constraint, tenant: str) -> None:
        own = self._turns[tenant]
        try:
            async with own, self._turn:
                if name not in self._known:
                    self._known[name] = await asyncio.shield(asyncio.to_thread(self._rehearse, constraint))
        finally:
            if not own.locked():
                self._turns.pop(tenant, None)

    def _rehearse(self, constraint: Constraint) -> str | None:
        """Why the constraint is too complex; None where it is not, or where vLLM will refuse it."""
        try:
            pipe = self._begun()
            pipe.send(constraint)
            if not pipe.poll(PATIENCE_S):
                self._end()
                raise Busy("the machine is too busy to compile this constraint", retry_after_s=10)
            found: str | None = pipe.recv()
        except (EOFError, OSError):
            self._end()
            return (
                f"the schema, regex or grammar takes more than {self._cpu_s:g} s of processor time to compile "
                "(REFRAIN_GRAMMAR_CPU_S), or too much memory"
            )
        return found

    def _begun(self) -> Connection:
        """The pipe to a child that is ready. Raises Busy where none can be begun."""
        if self._child is None:
            ours, theirs = multiprocessing.Pipe()
            given = pickle.dumps(self._prepare())
            child = multiprocessing.get_context("forkserver").Process(
                target=_rehearse_all, args=(theirs, given, self._cpu_s), name="rehearsal", daemon=True
            )
            child.start()
            theirs.close()
            self._child = child, ours
            if not _says_something(ours):
                self._end()
                raise Busy("constraints cannot be compiled now", retry_after_s=10)
        return self._child[1]

    def _end(self) -> None:
        if self._child is not None:
            (child, pipe), self._child = self._child, None
            pipe.close()
            child.kill()
            child.join()
            child.close()


def _says_something(pipe: Connection) -> bool:
    try:
        return pipe.poll(PATIENCE_S) and bool(pipe.recv())
    except EOFError:
        return False


# --- in the child --------------------------------------------------------------------------------------------------


def _rehearse_all(pipe: Connection, given: bytes, cpu_s: float) -> None:
    """Answer each constraint with why it is too complex, or None. Running out of time or memory ends the process."""
    os.nice(10)
    stage = Stage(pickle.loads(given))  # noqa: S301 - our parent made it
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY_BYTES, hard))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    pipe.send("ready")
    while True:
        try:
            constraint = pipe.recv()
        except EOFError:
            return
        # Processor time of all threads; what it signals ends the process, deep in a compiler as well.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            found = stage.rehearse(constraint)
        except MemoryError:
            return
        except Exception:  # whatever it is, vLLM will say it of the same constraint
            found = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(found)


def _address_space() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[0]) * resource.getpagesize()
