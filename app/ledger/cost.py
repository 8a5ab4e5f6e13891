"""What inference and training cost, what was saved, and when weights of one's own pay for themselves. Pure.

The ledger has what was used; money is made of it at the prices that are set now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.ledger.record import SPARED, Prices
from app.ledger.sums import Question, Sums, Tally, summed

DAY_S = 86_400
# What a shorter time says of a day is worth nothing.
LEAST_SPAN_S = 60.0


@dataclass(frozen=True, slots=True)
class Saved:
    """`device_s` is an estimate, `cost` follows from it and from the prices of tokens."""

    by: str
    calls: int
    tokens: int
    device_s: float
    cost: float


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Against another API, at the rate of the time that was looked at.

    `days` and `tokens` are None where it never comes. `needed_tokens_per_day` is then the rate at which own devices,
    which cost the same however much they do, and the other API cost the same; None where no rate helps.
    """

    api_cost_per_day: float
    own_cost_per_day: float
    saving_per_day: float
    days: float | None
    tokens: float | None
    needed_tokens_per_day: float | None


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds are device-seconds. `generation` is what answers used, `overhead` what else the engine did (its probes,
    and generations whose record was lost), `idle` when it did nothing, loading included."""

    first: float
    last: float
    calls: int
    tokens: int
    tokens_per_day: float
    training: list[tuple[str, float, float]]
    training_cost: float
    generation_s: float
    overhead_s: float
    idle_s: float
    generation_cost: float
    device_cost: float
    cost_per_day: float
    cost_per_1000_tokens: float
    saved: list[Saved]
    break_even: BreakEven | None

    def told(self) -> dict[str, Any]:
        return asdict(self)


def costs(
    folder: Path, question: Question, own: Prices, other: Prices, *, devices: int = 1, idle_is_free: bool = False
) -> Costs | None:
    """None where there was no call. Training counts whenever it was. Raises OSError."""
    sums = summed(folder, Question(("cache", "model"), question.since, question.until, question.model))
    if idle_is_free:
        sums.idle_s = 0.0
    trained = summed(folder, Question(model=question.model)) if question.since or question.until else sums
    return reckon(sums, trained.training, own, other, devices=devices) if sums.total.calls else None


def reckon(sums: Sums, trained: Mapping[str, float], own: Prices, other: Prices, *, devices: int = 1) -> Costs:
    """`sums` are by cache and model."""
    total = sums.total
    first, last = min(total.first, sums.up_from), max(total.last, sums.up_to)
    days = max(last - first, LEAST_SPAN_S) / DAY_S
    training = [(model, seconds, own.of(device_s=seconds)) for model, seconds in sorted(trained.items())]
    training_cost = sum(cost for _, _, cost in training)
    paid_tokens = own.of(
        prompt_tokens=total.prompt_tokens - total.spared_prompt_tokens,
        completion_tokens=total.completion_tokens - total.spared_completion_tokens,
    )
    # What the devices cost is paid whether they work or not.
    device_s = max(sums.busy_s, total.device_s) + sums.idle_s
    device_cost = own.of(device_s=device_s) + paid_tokens
    return Costs(
        first=first,
        last=last,
        calls=total.calls,
        tokens=total.tokens,
        tokens_per_day=total.tokens / days,
        training=training,
        training_cost=training_cost,
        generation_s=total.device_s,
        overhead_s=max(0.0, sums.busy_s - total.device_s),
        idle_s=sums.idle_s,
        generation_cost=own.of(device_s=total.device_s) + paid_tokens,
        device_cost=device_cost,
        cost_per_day=device_cost / days,
        cost_per_1000_tokens=device_cost / total.tokens * 1000 if total.tokens else 0.0,
        saved=_saved(sums, own, devices),
        break_even=_break_even(total, days, device_cost, own.of(device_s=device_s) / days, training_cost, other),
    )


# --- what was saved ------------------------------------------------------------------------------


def _saved(sums: Sums, own: Prices, devices: int) -> list[Saved]:
    cached = [
        _spared(sums, own, name, caches) for name, caches in (("cache", ("hit", "stale")), ("sharing", ("shared",)))
    ]
    generated = _generated(sums)
    alone_s = max(0.0, generated.engine_s * devices - generated.device_s)
    batching = Saved("batching", generated.calls, 0, alone_s, own.of(device_s=alone_s))
    prefixes = Saved("prefix cache", generated.calls, generated.prefix_tokens, 0.0, 0.0)
    return [*cached, prefixes, batching]


def _spared(sums: Sums, own: Prices, name: str, caches: tuple[str, ...]) -> Saved:
    """As if each of these answers had taken as long per token of its text as those of its model that were generated."""
    calls = tokens = 0
    device_s = cost = 0.0
    for (cache, model), tally in sums.groups.items():
        if cache not in caches:
            continue
        seconds = _device_s_per_token(sums, model) * tally.spared_completion_tokens
        calls += tally.spared_calls
        tokens += tally.spared_tokens
        device_s += seconds
        cost += own.of(
            device_s=seconds,
            prompt_tokens=tally.spared_prompt_tokens,
            completion_tokens=tally.spared_completion_tokens,
        )
    return Saved(name, calls, tokens, device_s, cost)


def _device_s_per_token(sums: Sums, model: str) -> float:
    """Of what was generated: of this model, or of all where none was of it."""
    for tally in (_generated(sums, model), _generated(sums)):
        if tally.completion_tokens:
            return tally.device_s / tally.completion_tokens
    return 0.0


def _generated(sums: Sums, model: str | None = None) -> Tally:
    found = Tally()
    for (cache, name), tally in sums.groups.items():
        if cache not in SPARED and model in (None, name):
            found.join(tally)
    return found


# --- when it pays --------------------------------------------------------------------------------


def _break_even(
    total: Tally, days: float, own_cost: float, fixed_per_day: float, training_cost: float, other: Prices
) -> BreakEven | None:
    """None where no other API's prices are set."""
    if not (other.prompt_per_million or other.completion_per_million):
        return None
    api_cost = other.of(prompt_tokens=total.prompt_tokens, completion_tokens=total.completion_tokens)
    saving_per_day = (api_cost - own_cost) / days
    pays = saving_per_day > 0
    # Beyond the devices' price each token saves this much.
    margin = (api_cost - (own_cost - fixed_per_day * days)) / total.tokens if total.tokens else 0.0
    return BreakEven(
        api_cost_per_day=api_cost / days,
        own_cost_per_day=own_cost / days,
        saving_per_day=saving_per_day,
        days=training_cost / saving_per_day if pays else None,
        tokens=training_cost / saving_per_day * total.tokens / days if pays else None,
        needed_tokens_per_day=None if pays or margin <= 0 else fixed_per_day / margin,
    )
