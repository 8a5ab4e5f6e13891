"""A call of a key with limits, on its way: counted before it is answered, told how it stands, settled when it ended."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

from starlette.types import Message, Send

from app.counting import most_usage
from app.domain import Call, Reply, Timings
from app.errors import AppError
from app.flight.flight import Seat
from app.gate.limits import Usage
from app.gate.quotas import Quotas, Standing, headers
from app.service import Boarding, Plan
from app.settings import Settings


class Charged:
    """One call. `told` are the headers of its answer, whatever that is."""

    def __init__(self, quotas: Quotas, settings: Settings, call: Call, plan: Plan, told: dict[str, str]) -> None:
        self._quotas = quotas
        self._hits_cost = settings.limit_hits
        self._call = call
        self._plan = plan
        self.told = dict(told)

    async def replayed(self, reply: Reply) -> None:
        """A hit is charged what the setting says. Raises RateLimited, LimitsUnknown."""
        if self._hits_cost == "free":
            return
        took = _usage(reply.answer.timings) if self._hits_cost == "full" else Usage()
        self._tell(await self._quotas.charge(self._call.caller, took))

    @contextlib.asynccontextmanager
    async def aboard(self, aboard: AbstractAsyncContextManager[Boarding]) -> AsyncIterator[Boarding]:
        """The same boarding, reserved for before and settled after, however it ends.

        Raises:
            RateLimited, LimitsUnknown: it is not let in.
        """
        most = await self._most()
        async with self._quotas.reserved(self._call.caller, most) as hold:
            self._tell(hold.standing)
            seat = None
            try:
                async with aboard as boarding:
                    seat = boarding.ride.seat
                    yield boarding
            except AppError as error:
                error.headers = error.headers | self.told
                raise
            finally:
                if seat is not None:
                    hold.took = self._took(seat, most)

    async def _most(self) -> Usage:
        if not self._call.caller.limits.counts_tokens:
            return Usage()
        serving = self._plan.serving
        with serving.hold():
            return await most_usage(self._call, serving)

    def _took(self, seat: Seat, most: Usage) -> Usage:
        """What this call is charged for the flight that it was on, in decisions/0020-limits-of-keys.md."""
        flight = seat.flight
        if flight.error is not None:
            return Usage()
        if not (seat.is_first and flight.is_led_here):  # somebody else's generation, or a recording after all
            return _usage(flight.timings) if self._hits_cost == "full" and flight.is_finished else Usage()
        goes_on = not flight.is_over and (bool(flight.seats) or flight.ticket.is_kept)
        if goes_on:
            return most
        if flight.timings.completion_tokens is None:  # not known: it was left before the engine had said anything
            return Usage(most.prompt, 0) if flight.is_stream and not flight.is_finished else most
        return _usage(flight.timings)

    def _tell(self, standing: Standing | None) -> None:
        if standing is not None:
            self.told |= headers(self._call.caller.limits, standing)


def _usage(timings: Timings) -> Usage:
    # What was counted by the engine for one choice, and what came in the events of all.
    return Usage(timings.prompt_tokens or 0, max(timings.completion_tokens or 0, timings.streamed_tokens))


def telling(send: Send, told: dict[str, str]) -> Send:
    """`send` that adds these headers; they may be known only when the response starts."""

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start" and told:
            message["headers"] = [*message.get("headers", ()), *encoded(told)]
        await send(message)

    return with_headers


def encoded(told: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in told.items()]
