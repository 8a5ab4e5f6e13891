"""A plan: what fits, how fast it is, what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from app.errors import StartRefused
from app.plan.machines import GIB, Machine
from app.plan.shape import Shape

# Activations, CUDA graphs and the runtime's own, per replica.
RESERVED_BYTES = 1.5 * GIB


@dataclass(frozen=True, slots=True)
class Load:
    """A typical call, in tokens."""

    prompt_tokens: int
    output_tokens: int

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Point:
    """`batch` calls at a time. Output tokens per second in all and in each; seconds to the first token of a call that
    needs not wait; money per million output tokens, if a price is known."""

    batch: int
    tokens_per_s: float
    tokens_per_s_each: float
    first_token_s: float
    cost_per_million: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    shape: Shape
    machine: Machine
    load: Load
    kv_room_bytes: float
    points: list[Point]

    @property
    def kv_tokens(self) -> int:
        return int(self.kv_room_bytes / self.shape.kv_bytes_per_token)

    @property
    def concurrency(self) -> int:
        """Calls of this load whose caches fit at the same time."""
        return self.kv_tokens // self.load.context


def plan(shape: Shape, machine: Machine, load: Load, *, kv_bytes: float | None = None, price_hour: float = 0.0) -> Plan:
    """`kv_bytes`: what is set aside for the cache; by default all that the weights leave.

    Raises:
        StartRefused: the weights do not fit, or not one call does, or it is longer than the model allows.
    """
    if load.context > shape.max_context:
        raise StartRefused(
            f"{load.context} tokens are more than the {shape.max_context} that {shape.name} was made for"
        )
    left = machine.memory_bytes - shape.weight_bytes - RESERVED_BYTES
    if left <= 0:
        raise StartRefused(
            f"{shape.name} does not fit: {shape.weight_bytes / GIB:.1f} GiB of weights and {RESERVED_BYTES / GIB:.1f} "
            f"besides, {machine.memory_bytes / GIB:.1f} on {machine.name}; take more or larger cards, or a quantization"
        )
    room = left if kv_bytes is None else min(kv_bytes, left)
    most = int(room / shape.kv_bytes_per_token) // load.context
    if not most:
        raise StartRefused(f"not one call of {load.context} tokens fits into the {room / GIB:.1f} GiB that are left")
    batches = [batch for batch in (1, 4, 8, 16, 32, 64, 128, 256) if batch < most]
    points = [point(shape, machine, load, batch, price_hour) for batch in [*batches, min(most, 512)]]
    return Plan(shape, machine, load, room, points)


def point(shape: Shape, machine: Machine, load: Load, batch: int, price_hour: float = 0.0) -> Point:
    """At a steady `batch`, each call's prefill takes its time from the others' decoding."""
    first_s = machine.prefill_s(shape, load.prompt_tokens)
    step_s = machine.step_s(shape, batch, load.prompt_tokens + load.output_tokens // 2)
    round_s = (load.output_tokens - 1) * step_s + batch * first_s
    per_s = batch * load.output_tokens / round_s
    cost = price_hour / 3600 / per_s * 1e6 if price_hour else None
    return Point(batch, per_s, per_s / batch, first_s, cost)
