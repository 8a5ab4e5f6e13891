"""What is known of a call reaches the engine whenever a handler asks it: at once, or after its first event."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from app.engine.translation import _rest
from app.engine.underway import Underway, underway


async def test_a_handler_that_asks_late_asks_for_its_own_call() -> None:
    """As that of Responses does; `answer` has returned by then."""
    about, seen = Underway("key"), []

    async def late() -> AsyncGenerator[bytes, None]:
        seen.append(underway.get())
        yield b"second"

    assert [event async for event in _rest(b"first", late(), about)] == [b"first", b"second"]
    assert seen == [about]
