"""Summing the ledger: by tenant, key, model, day or whatever else a record tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec

from app.errors import BadCall
from app.ledger import files
from app.ledger.record import SPARED

# What can be summed by, and what of a line that is.
DIMENSIONS = ("tenant", "key", "model", "weights", "day", "cache", "endpoint", "status", "finish")


class Line(msgspec.Struct, gc=False):
    """What sums need of a record; decoding no more than that takes half the time."""

    time: float = 0.0
    kind: str = "call"
    tenant: str = ""
    key: str = ""
    endpoint: str = ""
    weights: str = ""
    status: int = 200
    cache: str = ""
    finish: str = "whole"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    spared_tokens: int = 0
    device_s: float = 0.0
    idle_s: float = 0.0
    cost: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0


@dataclass(slots=True)
class Tally:
    """Of some records. `spared_*` is of the calls that cost no generation; `prefix_tokens` are those of all other
    prompts that the engine had computed before. `engine_s` is the time that generations took, each by its own clock.
    """

    calls: int = 0
    failed: int = 0
    spared_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    spared_tokens: int = 0
    spared_prompt_tokens: int = 0
    spared_completion_tokens: int = 0
    prefix_tokens: int = 0
    device_s: float = 0.0
    engine_s: float = 0.0
    cost: float = 0.0
    total_s: float = 0.0
    first: float = float("inf")
    last: float = 0.0

    def add(self, line: Line) -> None:
        self.device_s += line.device_s
        self.cost += line.cost
        if line.time < self.first:
            self.first = line.time
        if line.time > self.last:
            self.last = line.time
        if line.kind != "call":  # the rest of a generation
            return
        self.calls += 1
        self.total_s += line.total_s
        self.failed += line.finish != "whole"
        self.prompt_tokens += line.prompt_tokens
        self.completion_tokens += line.completion_tokens
        self.spared_tokens += line.spared_tokens
        if line.cache in SPARED:
            self.spared_calls += 1
            self.spared_prompt_tokens += line.prompt_tokens
            self.spared_completion_tokens += line.completion_tokens
        else:
            self.prefix_tokens += line.spared_tokens
            self.engine_s += line.prefill_s + line.decode_s

    def join(self, other: Tally) -> None:
        for each in fields(self):
            if each.name not in ("first", "last"):
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def told(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "failed": self.failed,
            "spared_calls": self.spared_calls,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "spared_tokens": self.spared_tokens,
            "device_s": round(self.device_s, 3),
            "cost": round(self.cost, 6),
            "mean_s": round(self.total_s / self.calls, 6) if self.calls else 0.0,
        }


@dataclass(frozen=True, slots=True)
class Question:
    """What of the ledger is asked for: times are unix seconds, `by` names of `DIMENSIONS`."""

    by: tuple[str, ...] = ()
    since: float | None = None
    until: float | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        for name in self.by:
            if name not in DIMENSIONS:
                raise BadCall(f"there is no `{name}` to sum by; there are {', '.join(DIMENSIONS)}", param="by")


@dataclass(slots=True)
class Sums:
    """The answer: a tally for each group, and what is no call's: the device-seconds of fine-tuning by the model's name,
    the devices' own time, and from when to when they are told of."""

    by: tuple[str, ...]
    groups: dict[tuple[str, ...], Tally] = field(default_factory=dict)
    total: Tally = field(default_factory=Tally)
    training: dict[str, float] = field(default_factory=dict)
    busy_s: float = 0.0
    idle_s: float = 0.0
    up_from: float = float("inf")
    up_to: float = 0.0
    skipped_lines: int = 0

    def told(self) -> dict[str, Any]:
        """As JSON says it."""
        rows = [dict(zip(self.by, group, strict=True)) | tally.told() for group, tally in sorted(self.groups.items())]
        return {
            "by": list(self.by),
            "rows": rows,
            "total": self.total.told(),
            "training": [
                {"model": model, "device_s": round(device_s, 3)} for model, device_s in sorted(self.training.items())
            ],
            "devices": {"busy_s": round(self.busy_s, 3), "idle_s": round(self.idle_s, 3)},
            "first": self.total.first if self.total.last else None,
            "last": self.total.last or None,
            "skipped_lines": self.skipped_lines,
        }


def summed(folder: Path, question: Question) -> Sums:
    """Read what the question is about. Raises OSError."""
    skipped = files.Skipped()
    sums = Sums(question.by)
    found: dict[Any, Tally] = {}
    for path in files.listed(folder, since=question.since, until=question.until):
        for lines in files.blocks(path, Line, skipped):
            _add(sums, found, _asked_for(lines, question))
    sums.skipped_lines = skipped.lines
    for raw, tally in found.items():
        sums.total.join(tally)
        if question.by:
            sums.groups.setdefault(_named(raw, question.by), Tally()).join(tally)
    return sums


def _asked_for(lines: Sequence[Line], question: Question) -> Iterable[Line]:
    since, until = question.since, question.until
    if question.model is not None:
        begins = f"{question.model}@"
        lines = [line for line in lines if line.kind == "engine" or line.weights.startswith(begins)]
    if since is None and until is None:
        return lines
    first, last = since if since is not None else 0.0, until if until is not None else float("inf")
    return (line for line in lines if first <= line.time < last)


def _add(sums: Sums, found: dict[Any, Tally], lines: Iterable[Line]) -> None:
    """Into groups that are cheap to tell apart and too fine; a million lines pass here."""
    raw_of = _raw(sums.by)
    for line in lines:
        if line.kind == "engine":
            sums.busy_s += line.device_s
            sums.idle_s += line.idle_s
            sums.up_from = min(sums.up_from, line.time - line.total_s)
            sums.up_to = max(sums.up_to, line.time)
        elif line.kind == "training":
            model = line.weights.partition("@")[0]
            sums.training[model] = sums.training.get(model, 0.0) + line.device_s
        else:
            raw = raw_of(line)
            tally = found.get(raw)
            if tally is None:
                tally = found[raw] = Tally()
            tally.add(line)


# Of each dimension, the field that it is made of.
_FIELDS = {name: name for name in DIMENSIONS} | {"model": "weights"}


def _raw(by: tuple[str, ...]) -> Callable[[Line], Any]:
    names = [_FIELDS[name] for name in by if name != "day"]
    if not names:
        return (lambda line: line.time // 86_400) if by else (lambda line: None)
    fields = attrgetter(*names)
    return fields if "day" not in by else lambda line: (fields(line), line.time // 86_400)


def _named(raw: Any, by: tuple[str, ...]) -> tuple[str, ...]:
    """The group's name as people know it."""
    values, day = raw, 0.0
    if by == ("day",):
        values, day = (), raw
    elif "day" in by:
        values, day = raw
    left = iter(values if isinstance(values, tuple) else (values,))
    return tuple(_day(day) if name == "day" else _said(name, next(left)) for name in by)


def _said(name: str, value: Any) -> str:
    if name == "model":
        value = value.rpartition("@")[0]
    return str(value) or ("none" if name == "cache" else "-")


def _day(number: float) -> str:
    """`2026-11-25`, in UTC."""
    return datetime.fromtimestamp(number * 86_400, UTC).strftime("%Y-%m-%d")


# --- as people give it ---------------------------------------------------------------------------

_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def dimensions(given: str) -> tuple[str, ...]:
    """Of names set apart by commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))


def moment(given: str | None) -> float | None:
    """Unix seconds of `7d` or `12h` (ago), or of an ISO date, in UTC where it does not say. Raises BadCall."""
    if not given:
        return None
    amount, unit = given[:-1], given[-1]
    if unit in _UNITS and amount.isdecimal() and len(amount) <= 5:
        return time.time() - timedelta(**{_UNITS[unit]: int(amount)}).total_seconds()
    try:
        found = datetime.fromisoformat(given)
    except ValueError:
        found = None
    if found is None or not 1970 < found.year < 9999:
        raise BadCall(f"{given[:40]} is no time: give 7d, 12h, 30m, 2026-11-25 or 2026-11-25T08:00")
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
