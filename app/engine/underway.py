"""What is known of a call while vLLM's handlers work on it; set where the call comes in, read far below them."""

from __future__ import annotations

import hashlib
import json
from contextvars import ContextVar
from dataclasses import dataclass, field

from app.domain import Call, Timings
from app.errors import AppError

# How an answer is delivered, and to whom: the engine computes the same for either.
_DELIVERY = frozenset({"stream", "stream_options", "user", "metadata", "safety_identifier", "return_token_ids"})


@dataclass(slots=True)
class Underway:
    """One call. `key` names what is asked; `error` is what vLLM's handlers would turn into words of their own.

    A probe is asked of a core that takes no other calls yet.
    """

    key: str = ""
    is_probe: bool = False
    timings: Timings = field(default_factory=Timings)
    error: AppError | None = None


underway: ContextVar[Underway | None] = ContextVar("underway", default=None)


def key_of(call: Call) -> str:
    """A digest of what this call has the engine compute, whoever asks and in whichever form."""
    asked = {name: value for name, value in call.body.items() if name not in _DELIVERY}
    content = json.dumps(asked, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(f"{call.endpoint} {content}".encode("utf-8", "surrogatepass")).hexdigest()
