"""Two tenants before an engine that is arithmetic: what the order alone does, without a machine's noise.

The engine works in steps, as vLLM does. All that entered before a step take part in it: a new call with its whole
prompt, a running one with a token. A step takes what such a step takes on two CPU cores.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

import pytest

from app.admission.fair import Entry, FairQueue, Places
from app.admission.work import Work
from app.domain import Priority

SECONDS = 300.0


@dataclass(frozen=True)
class Model:
    """Seconds of a step, and of each token in it; `per_s`: what the quiet tenant asks."""

    step_s: float
    prompt_token_s: float
    output_token_s: float
    per_s: float


SLOW = Model(0.015, 0.001, 0.001, per_s=1.0)
# The default model, compiled, on two cores with AVX-512 (benchmarks/LOG.md).
FAST = Model(0.0105, 0.00034, 0.00085, per_s=3.0)


@dataclass(eq=False)
class Asked:
    tenant: str
    at: float
    prompt: int
    output: int
    first_s: float | None = None
    said: int = 0


def poisson(tenant: str, per_s: float, prompt: int, output: int) -> list[Asked]:
    chance, at, found = random.Random(f"{tenant} {prompt}"), 0.0, []
    while (at := at + chance.expovariate(per_s)) < SECONDS:
        found.append(Asked(tenant, at, prompt, output))
    return found


def simulated(calls: list[Asked], model: Model) -> None:
    """Run until the calls have all come; what is not begun by then stays so."""
    queue, entries, rested, running, now = FairQueue(), {}, {}, [], 0.0
    queue.places = Places(sequences=136, kv_tokens=90_000, quantum=int(0.05 / model.prompt_token_s))
    coming = sorted(calls, key=lambda each: each.at, reverse=True)

    def let_in(at: float) -> None:
        while coming and coming[-1].at <= at:
            call = coming.pop()
            entry = Entry(call.tenant, Priority.INTERACTIVE, Work(call.prompt, call.output), call.at)
            entries[entry] = call
            queue.add(entry, call.at)
        while (entry := queue.next(at)) is not None:
            entry.entered = at
            running.append(entry)

    while coming or running:
        let_in(now)
        if not running:
            now = coming[-1].at
            continue
        step = list(running)
        fresh = [entries[each] for each in step if not entries[each].said]
        now += model.step_s + model.prompt_token_s * sum(each.prompt for each in fresh)
        now += model.output_token_s * (len(step) - len(fresh))
        for entry in step:
            call = entries[entry]
            call.said += 1
            if call.first_s is None:
                call.first_s = now - call.at
                rested[entry] = now + queue.rest_s(entry, now)
            if now >= rested[entry]:
                queue.said(entry)
            if call.said == call.output:
                running.remove(entry)
                queue.end(entry, now, entry.work.cost)
        if now > SECONDS:
            return


def first_token_s(calls: list[Asked]) -> float:
    return statistics.median(each.first_s for each in calls if each.first_s is not None)


@pytest.mark.parametrize(
    ("model", "quiet_prompt", "flood_prompt"),
    [(SLOW, 200, 200), (SLOW, 200, 60), (SLOW, 300, 200), (SLOW, 100, 100), (FAST, 215, 215), (FAST, 215, 100)],
)
def test_a_tenant_that_is_flooded_waits_at_most_twice_as_long_for_its_first_token(
    model: Model, quiet_prompt: int, flood_prompt: int
) -> None:
    """One call against ten; which is one and a half to three times what the engine can do.

    What it costs: the flood gets its prompts through one by one, long ones with rests.
    """
    alone = poisson("quiet", model.per_s, quiet_prompt, 32)
    simulated(alone, model)
    quiet, flood = poisson("quiet", model.per_s, quiet_prompt, 32), poisson("flood", 10 * model.per_s, flood_prompt, 32)
    simulated([*quiet, *flood], model)
    assert first_token_s(quiet) <= 2 * first_token_s(alone)
    one_tenant = [Asked("quiet", each.at, each.prompt, each.output) for each in (*quiet, *flood)]
    simulated(one_tenant, model)
    told = sum(each.said for each in (*quiet, *flood)) / sum(each.said for each in one_tenant)
    assert told >= 0.75
