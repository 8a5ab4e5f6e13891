"""`Idempotency-Key`: what a key was first used for, here and in Redis, so that a retry is one and nothing else.

The first use leaves a fingerprint of its call under the key. Without Redis this process's own memory of them
has to do: a retry that reaches it is still recognised.
"""

from __future__ import annotations

import json
from hashlib import sha256

from app.domain import Call
from app.errors import BadCall, KeyReused, RedisDown
from app.flight import names
from app.flight.lease import Leases
from app.observe.bounded import Brief
from app.settings import Settings

MAX_KEY_CHARS = 255
# What this process remembers by itself: two digests a key, and the objects around them.
MEMORY_BYTES = 4 * 2**20
_CLAIM_BYTES = 400
# What a retry may change without being another call: the form in which it wants the answer.
_FORM = frozenset({"stream", "stream_options"})


class Claims:
    """The keys that were used."""

    def __init__(self, settings: Settings, leases: Leases) -> None:
        self._namespace = settings.redis_namespace
        self._ttl_s = settings.idempotency_ttl_s
        self._leases = leases
        self._known: Brief[str, str] = Brief("claims", MEMORY_BYTES, self._ttl_s, lambda _: _CLAIM_BYTES)

    async def claim(self, call: Call, given: str) -> str:
        """The key's name, which no other caller's key has.

        Raises:
            KeyReused: it stands for another call. BadCall: it is no key.
        """
        if not 0 < len(given) <= MAX_KEY_CHARS or not given.isprintable():
            raise BadCall(f"an Idempotency-Key has 1 to {MAX_KEY_CHARS} printable characters", param="Idempotency-Key")
        caller = call.caller
        key = sha256(json.dumps([caller.tenant, caller.key_id, given]).encode()).hexdigest()
        mine = _fingerprint(call)
        first = self._known.get(key)
        if first is None:
            first = await self._first_use(key, mine)
            self._known[key] = first
        if first != mine:
            raise KeyReused("this Idempotency-Key was used with another request", param="Idempotency-Key")
        return key

    async def _first_use(self, key: str, mine: str) -> str:
        try:
            found = await self._leases.run("claim", [names.claim(self._namespace, key)], [mine, self._ttl_s * 1000])
        except RedisDown:
            return mine
        return found.decode() if isinstance(found, bytes) else str(found)


def _fingerprint(call: Call) -> str:
    asked = {name: value for name, value in call.body.items() if name not in _FORM}
    return sha256(json.dumps([call.endpoint.value, asked], sort_keys=True).encode()).hexdigest()
