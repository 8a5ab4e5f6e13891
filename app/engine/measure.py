"""Asking an engine about the fixed probes: their prompts' log-probabilities, through the endpoints that it serves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable

from app.domain import Answer, Call, Caller, Endpoint
from app.errors import Refused
from app.weights import PROBES, Probe

_NOBODY = Caller(tenant="refrain")


async def measure(ask: Callable[[Call], Awaitable[Answer]], model: str) -> dict[str, tuple[str, list[float]]]:
    """By probe: a hash of the prompt's token ids, and the log-probability of each token but the first.

    A probe that the model refuses (no chat template, a context too short for it) is left out; so all are, of a model
    that does not generate. One after the other, so that nothing depends on how they fall into batches.
    """
    found = {}
    for probe in PROBES:
        try:
            answer = await ask(_call(probe, model))
        except Refused:
            continue
        if (measured := _read(answer, probe)) is not None:
            found[probe.name] = measured
    return found


def _call(probe: Probe, model: str) -> Call:
    # Zero alternatives: the prompt's own tokens alone. One token is the least that may be generated.
    body = {"model": model, "temperature": 0, "max_tokens": 1, "prompt_logprobs": 0}
    if probe.text is not None:
        return Call(Endpoint.COMPLETIONS, body | {"prompt": probe.text}, _NOBODY, "fingerprint")
    return Call(Endpoint.CHAT, body | {"messages": list(probe.messages)}, _NOBODY, "fingerprint")


def _read(answer: Answer, probe: Probe) -> tuple[str, list[float]] | None:
    told = json.loads(answer.body or b"{}")
    tokens = (told["choices"][0] if probe.text is not None else told).get("prompt_logprobs")
    if not tokens:
        return None
    one_each = [
        next(iter(token.items())) for token in tokens if token
    ]  # the first token has none: nothing is before it
    prompt = hashlib.sha256(",".join(ident for ident, _ in one_each).encode()).hexdigest()[:16]
    return prompt, [float(entry["logprob"]) for _, entry in one_each]
