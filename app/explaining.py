"""`refrain cache explain`: a request from a file, seen as the server would see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.api.body import parse
from app.cache.explain import Explanation, differences
from app.cache.policy import directives
from app.cache.reuse import rule
from app.cache.store import Slot, Store, age_s
from app.domain import Call, Caller, Endpoint, Weights
from app.errors import StartRefused
from app.main import create_service, find_weights
from app.service import EVERYBODY
from app.settings import Settings


@dataclass(frozen=True, slots=True)
class Explained:
    """One request, explained."""

    call: Call
    weights: Weights
    explanation: Explanation

    @property
    def is_cacheable(self) -> bool:
        return self.explanation.reason is None

    @property
    def told(self) -> dict[str, Any]:
        if self.explanation.reason is not None:
            return {"bypass": self.explanation.reason}
        shape = self.explanation.shape
        return {
            "canonical form": self.explanation.form,
            "left out of the key": self.explanation.left_out,
            "decided when read": {"limit": shape.limit, "n": shape.n, "logprobs": shape.logprobs},
            "key": self.explanation.family,
            "key of just this shape": self.explanation.exact,
        }

    def against(self, other: Explained) -> dict[str, Any]:
        """What differs between two requests."""
        if not (self.is_cacheable and other.is_cacheable):
            return {"bypass": [self.explanation.reason, other.explanation.reason]}
        found = differences(self.explanation.form, other.explanation.form)
        return {
            "same key": self.explanation.family == other.explanation.family,
            "same shape": self.explanation.shape == other.explanation.shape,
            "differs": [{"field": name, "first": mine, "second": theirs} for name, mine, theirs in found],
        }


def explained(settings: Settings, file: Path, endpoint: str, tenant: str, report: Callable[[str], None]) -> Explained:
    """Raises StartRefused where the file, the endpoint or the weights are not there; BadCall for what is no request."""
    try:
        content, path = file.read_bytes(), Endpoint(endpoint)
    except OSError as error:
        raise StartRefused(f"{file} cannot be read: {error.strerror}") from error
    except ValueError:
        raise StartRefused(f"{endpoint} is none of {', '.join(Endpoint)}") from None
    body = parse(content, settings.max_json_depth)
    wanted = directives("", body.pop("cache", None))
    weights = find_weights(settings, report)
    call = Call(path, body, Caller(tenant), "")
    return Explained(call, weights, create_service(settings, weights).explain(call, wanted))


async def looked_up(store: Store, asked: Explained) -> str:
    """What the cache has for it at this moment."""
    explanation, shape = asked.explanation, asked.explanation.shape
    for name in dict.fromkeys((explanation.family, explanation.exact)):
        whose = EVERYBODY if explanation.form["tenant"] == EVERYBODY else asked.call.caller.tenant
        held = await store.find(Slot(whose, asked.weights.name, name))
        if held is None:
            continue
        recording = held.recording
        fits = rule(recording, shape, asked.weights.max_model_len)
        if fits is not None:
            return f"hit ({fits.value}), recorded {age_s(recording):.0f} s ago for a limit of {recording.limit}"
    return "miss: there is no recording that serves it"
