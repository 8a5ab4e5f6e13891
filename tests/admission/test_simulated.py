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

STEP_S, PROMPT_TOKEN_S, OUTPUT_TOKEN_S = 0.015, 0.001, 0.001
SECONDS = 300.0


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


def simulated(calls: list[Asked]) -> None:
    """Run until the calls have all come; what is not begun by then stays so."""
    queue, entries, running, now = FairQueue(), {}, [], 0.0
    queue.places = Places(sequences=136, kv_tokens=90_000, quantum=50)
    coming = sorted(calls, key=lambda each: each.at, reverse=True)

    def let_in(at: float) -> None:
        while coming and coming[-1].at <= at:
            call = coming.pop()
            entry = Entry(call.tenant, Priority.INTERACTIVE, Work(call.prompt, call.output), call.at)
            entries[entry] = call
            queue.add(entry, call.at)
        while (entry := queue.next(at)) is not None:
            running.append(entry)

    while coming or running:
        let_in(now)
        if not running:
            now = coming[-1].at
            continue
        step = list(running)
        fresh = [entries[each] for each in step if not entries[each].said]
        now += STEP_S + PROMPT_TOKEN_S * sum(each.prompt for each in fresh) + OUTPUT_TOKEN_S * (len(step) - len(fresh))
        for entry in step:
            call = entries[entry]
            call.said += 1
            call.first_s = now - call.at if call.first_s is None else call.first_s
            queue.said(entry)
            if call.said == call.output:
                running.remove(entry)
                queue.end(entry, now, entry.work.cost)
        if now > SECONDS:
            return


def first_token_s(calls: list[Asked]) -> float:
    return statistics.median(each.first_s for each in calls if each.first_s is not None)


@pytest.mark.parametrize(("quiet_prompt", "flood_prompt"), [(200, 200), (200, 60), (300, 200), (100, 100)])
def test_a_tenant_that_is_flooded_waits_at_most_twice_as_long_for_its_first_token(
    quiet_prompt: int, flood_prompt: int
) -> None:
    """One call a second against ten; which is one and a half to three times what the engine can do.

    What it costs: the flood gets its prompts through one by one.
    """
    alone = poisson("quiet", 1.0, quiet_prompt, 32)
    simulated(alone)
    quiet, flood = poisson("quiet", 1.0, quiet_prompt, 32), poisson("flood", 10.0, flood_prompt, 32)
    simulated([*quiet, *flood])
    assert first_token_s(quiet) <= 2 * first_token_s(alone)
    one_tenant = [Asked("quiet", each.at, each.prompt, each.output) for each in (*quiet, *flood)]
    simulated(one_tenant)
    told = sum(each.said for each in (*quiet, *flood)) / sum(each.said for each in one_tenant)
    assert told >= 0.85
