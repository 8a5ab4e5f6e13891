"""What is known of a call reaches the engine whenever a handler asks it: at once, or after its first event."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from app.engine.translation import as_answer
from app.engine.underway import Underway, underway


async def test_a_handler_that_asks_late_asks_for_its_own_call() -> None:
    """As that of Responses does; `answer` has returned by then."""
    about, seen = Underway("key"), []

    async def handler() -> AsyncGenerator[str, None]:
        yield "data: 1\n\n"
        seen.append(underway.get())
        yield "data: 2\n\n"

    answer = await as_answer(handler(), about, by_alias=False)
    assert answer.events is not None
    assert [event async for event in answer.events] == [b"data: 1\n\n", b"data: 2\n\n"]
    assert seen == [about]
