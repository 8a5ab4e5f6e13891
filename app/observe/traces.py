"""Spans of a call, for whoever traces calls; without a tracer each is one look at a context variable.

A flight's task inherits the trace of the call that began it, so the engine's spans stand under that call. Hot hits in
the protocol are one span each, made when they have ended. The vendor is in `otel.py` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Protocol, Self

# Gives the name and seconds of phases that followed each other up to the end of a span.
Phases = Callable[[], Iterable[tuple[str, float | None]]]


class Trace(Protocol):
    """One call's trace."""

    def child(self, name: str, began_ns: int, ended_ns: int, error: BaseException | None, phases: Phases) -> None:
        """A span under the call's own, and under it one for each phase that is known. Times are unix nanoseconds."""

    def carrier(self) -> Mapping[str, str]:
        """The headers that make another service's spans part of this trace (W3C Trace Context)."""


class Tracer(Protocol):
    """Where spans go."""

    def begin(self, headers: Iterable[tuple[bytes, bytes]], method: str, path: str) -> str:
        """A trace is current from here on, the caller's if it brought one; its id, for log lines."""

    def note(
        self, request_id: str, method: str, path: str, status: int, seconds: float, told: Mapping[str, Any]
    ) -> None:
        """The call has ended; `told` are its attributes. One that was never begun becomes a span now."""

    def close(self) -> None:
        """Send what is left. Blocks, for a few seconds at most."""


current: ContextVar[Trace | None] = ContextVar("trace", default=None)


class span:  # noqa: N801 - read as a statement: `with span("cache"):`
    """A part of the current call; nothing where it is not traced."""

    __slots__ = ("_began_ns", "_name", "_trace", "phases")

    def __init__(self, name: str) -> None:
        self._name = name
        self.phases: Phases = tuple

    def __enter__(self) -> Self:
        self._trace = current.get()
        self._began_ns = time.time_ns() if self._trace is not None else 0
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if self._trace is not None:
            self._trace.child(self._name, self._began_ns, time.time_ns(), error, self.phases)


def carrier() -> Mapping[str, str] | None:
    """What another service is to be sent; None where the call is not traced."""
    trace = current.get()
    return None if trace is None else trace.carrier()
