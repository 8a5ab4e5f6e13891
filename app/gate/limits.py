"""The limits of a key: how they are written down, and what is in force where a key sets none of its own. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

from app.domain import Budget, Limits, Period
from app.errors import StartRefused
from app.settings import BUDGET, Settings

_MILLION = 1_000_000

Count = Annotated[int, Meta(ge=1, le=2**31)] | None | UnsetType


class OwnLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a key says of its own, as it stands in the file: absent is the server's default, null is no limit."""

    rpm: Count = UNSET
    tpm: Count = UNSET
    concurrency: Count = UNSET
    max_output_tokens: Count = UNSET
    models: list[str] | UnsetType | None = UNSET
    budget: str | UnsetType | None = UNSET
    trim: Literal["oldest"] | UnsetType | None = UNSET

    def changed(self, given: Mapping[str, str | None]) -> OwnLimits:
        """With what an operator typed: `default` and `none` for any of them; None: as it was. Raises StartRefused."""
        read = {name: _read(name, text) for name, text in given.items() if text is not None}
        own = {name: value for name, value in (self.own() | read).items() if value is not UNSET}
        try:
            return msgspec.convert(own, OwnLimits)
        except msgspec.ValidationError as error:
            raise StartRefused(f"these are no limits: {error}") from error

    def over(self, defaults: Limits) -> Limits:
        """What is in force. Raises ValueError over a budget that is none."""
        own = self.own()
        if own.get("models") is not None:
            own["models"] = frozenset(own["models"])
        if own.get("budget") is not None:
            own["budget"] = budget(own["budget"])
        if "trim" in own:
            own["trims"] = own.pop("trim") is not None
        return replace(defaults, **own)

    def own(self) -> dict[str, Any]:
        """Those that it sets, by name."""
        return msgspec.to_builtins(self)  # type: ignore[no-any-return]


NONE_OF_ITS_OWN = OwnLimits()


def _read(name: str, text: str) -> Any:
    text = text.strip()
    if text == "default":
        return UNSET
    if text == "none":
        return None
    if name == "models":
        return [model.strip() for model in text.split(",") if model.strip()]
    if name == "budget":
        try:
            budget(text)
        except ValueError as error:
            raise StartRefused(str(error)) from error
        return text
    if name == "trim":
        return text
    if not text.isascii() or not text.isdigit():
        raise StartRefused(f"{name}: a whole number, `none` or `default` is needed, not {text!r}")
    return int(text)


def budget(text: str) -> Budget:
    """`1000000 tokens/day`, `25.50 money/month`. Raises ValueError over anything else."""
    found = BUDGET.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} is no budget: `1000000 tokens/day` or `25.50 money/month`; hour, day, month, forever"
        )
    period = Period(found["period"])
    if found["tokens"] is not None:
        return Budget(int(found["tokens"]), False, period)
    return Budget(round(float(found["money"]) * _MILLION), True, period)


def defaults(settings: Settings) -> Limits:
    return Limits(
        rpm=settings.limit_rpm,
        tpm=settings.limit_tpm,
        concurrency=settings.limit_concurrency,
        max_output_tokens=settings.limit_max_output_tokens,
        budget=budget(settings.limit_budget) if settings.limit_budget else None,
        trims=settings.limit_trim == "oldest",
    )


class Usage(NamedTuple):
    """Tokens in and out."""

    prompt: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion


NO_USAGE = Usage()


class Prices(NamedTuple):
    """Of a million tokens: so the price of one token is as many millionths."""

    prompt: float
    completion: float

    def cost(self, usage: Usage, of: Budget) -> int:
        """In the budget's unit; of money every begun millionth counts."""
        if not of.is_money:
            return usage.total
        return math.ceil(usage.prompt * self.prompt + usage.completion * self.completion)


def amount(value: int, of: Budget) -> str:
    """For people."""
    return f"{value / _MILLION:.6f}".rstrip("0").rstrip(".") if of.is_money else f"{value} tokens"
