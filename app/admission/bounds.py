"""How much may wait, and what is said to whom there is no room for. Pure."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from app.admission.fair import Entry, FairQueue
from app.errors import AppError, QueueFull, QueueShareUsed

# A tenant with a key may hold four times what is still free, which is four fifths of an else empty queue: so there is
# room for others whenever they come. (Dynamic thresholds: Choudhury and Hahne, IEEE/ACM ToN 1998.)
_SHARE_OF_FREE = 4
# OpenAI's clients heed a Retry-After of up to a minute.
_LONGEST_RETRY_S = 60


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of what waits, the newcomer included; None is no bound."""

    calls: int | None
    tokens: int | None
    wait_s: float | None


def misfit(queue: FairQueue, entry: Entry, bounds: Bounds, per_s: float | None, *, has_key: bool) -> AppError | None:
    """Why a call that waits already may not stay; None where it may. `per_s`: the cost that drains in a second."""
    calls, tokens = queue.calls(), queue.tokens()
    retry = retry_after_s(queue.cost(), per_s)
    if bounds.calls is not None and calls > bounds.calls:
        return QueueFull(
            f"{calls - 1} calls wait for the engine, and no more may", code="queue_full", retry_after_s=retry
        )
    if bounds.tokens is not None and tokens > bounds.tokens:
        waiting = tokens - entry.work.tokens
        told = f"{waiting} tokens wait for the engine, and this call's {entry.work.tokens} (estimated) do not fit"
        return QueueFull(told, code="queue_full_tokens", retry_after_s=retry)
    wait_s = queue.ahead(entry.tenant, entry.priority) / per_s if per_s else 0.0
    if bounds.wait_s is not None and wait_s > bounds.wait_s:
        told = f"this call would wait for about {wait_s:.0f} s, and none may for more than {bounds.wait_s:g}"
        return QueueFull(told, code="queue_slow", retry_after_s=retry)
    own_calls, own_tokens = queue.of_tenant(entry.tenant)
    is_above = _is_above_share(own_calls, calls, bounds.calls) or _is_above_share(own_tokens, tokens, bounds.tokens)
    if has_key and own_calls > 1 and is_above:
        told = f"{own_calls - 1} calls of this tenant wait already, and what is free is for others"
        return QueueShareUsed(told, retry_after_s=retry)
    return None


def _is_above_share(own: int, all_of_them: int, bound: int | None) -> bool:
    return bound is not None and own > _SHARE_OF_FREE * (bound - all_of_them)


def retry_after_s(cost: float, per_s: float | None) -> int:
    """When what waits now will be done, in whole seconds; scattered a little, so that not all come back at once."""
    drained_s = cost / per_s if per_s else 1.0
    return max(1, min(_LONGEST_RETRY_S, math.ceil(drained_s * random.uniform(0.8, 1.2))))  # noqa: S311
