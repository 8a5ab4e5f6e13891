"""What a web page may do with this server: nothing, unless its origin is allowed.

A server that asks for keys is safe from pages: no browser adds a key by itself. One without (on loopback only) would
answer any page that its developer happens to open. So there a request that names an origin must come from an allowed
one or from this server's own pages, and one whose `Host` is some domain's name is not for this server: the page's
domain was pointed here to look like its own ("DNS rebinding"). Programs send neither, and notice nothing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from app.errors import Forbidden
from app.gate.keys import Gate

# What a page of an allowed origin may read, and send, besides what every page may.
READABLE = (
    "age retry-after server-timing x-cache x-cache-key x-request-id x-stream-id x-weights x-ratelimit-limit-requests "
    "x-ratelimit-limit-tokens x-ratelimit-remaining-requests x-ratelimit-remaining-tokens x-ratelimit-reset-requests "
    "x-ratelimit-reset-tokens"
).split()
METHODS = ("GET", "POST", "DELETE")


@dataclass(frozen=True, slots=True)
class Browsers:
    """`origins` may use the server from their pages; `hosts` are names that it goes by besides addresses."""

    gate: Gate
    origins: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises Forbidden where a page asks that may not."""
        if not self.gate.is_open:
            return
        origin = host = ""
        for name, value in headers:
            if name == b"origin":
                origin = value.decode("latin-1")
            elif name == b"host":
                host = value.decode("latin-1")
        if not self._is_ours(host):
            raise Forbidden(
                f"this server has no keys, and is not called {_shown(host)}: REFRAIN_ALLOWED_HOSTS names more names",
                code="host_not_allowed",
            )
        if origin and self.origins.isdisjoint((origin, "*")) and origin.partition("://")[2] != host:
            raise Forbidden(
                f"this server has no keys, and pages of {_shown(origin)} may not use it: see REFRAIN_CORS_ORIGINS",
                code="origin_not_allowed",
            )

    def _is_ours(self, host: str) -> bool:
        """An address, or a name that no public domain can have; else one that is listed."""
        name = host.lower().removesuffix(f":{host.rpartition(':')[2]}") if host[-1:].isdigit() else host.lower()
        return "." not in name or name in self.hosts or name.endswith(".localhost") or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _shown(given: str) -> str:
    return repr(given[:200])
