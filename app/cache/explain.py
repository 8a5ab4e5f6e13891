"""Why a call hit or missed: its canonical form, its keys, and what was left out of them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.cache import key, reuse
from app.cache.reuse import Shape
from app.domain import Call, Weights


@dataclass(frozen=True, slots=True)
class Explanation:
    """`reason` is why the call is kept apart from the cache, else the rest is there."""

    reason: str | None
    form: dict[str, Any]
    family: str
    exact: str
    shape: Shape
    left_out: dict[str, Any]


def explain(call: Call, weights: Weights, *, scope: str, reason: str | None) -> Explanation:
    """What the key of this call is made of. `reason`: why the server keeps it apart, if it does."""
    if reason is not None:
        return Explanation(reason, {}, "", "", Shape(), {})
    relaxed, shape = reuse.family(call)
    form = key.canonical(relaxed, weights, tenant=scope)
    family = key.cache_key(relaxed, weights, tenant=scope)
    kept = form["fields"].keys() | form["texts"].keys()
    left_out = {name: value for name, value in call.body.items() if name not in kept}
    return Explanation(None, form, family, shape.key(family), shape, left_out)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two canonical forms differ: the name, and what each has there (None: nothing)."""
    found = []
    for name in sorted(one.keys() | other.keys()):
        mine, theirs = one.get(name), other.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += [(f"{name}.{inner}", a, b) for inner, a, b in differences(mine, theirs)]
        elif mine != theirs:
            found.append((name, mine, theirs))
    return found
