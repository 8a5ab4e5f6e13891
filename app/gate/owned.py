"""Ids of what the server keeps for a tenant (stored responses): nobody else's open them, and nobody chooses one.

An id carries a tag (a MAC) over itself and its tenant, so there is no list to keep. The engine forgets what it stored
when this process ends, and so does the process its secret.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from app.errors import NotFound

_SECRET = secrets.token_bytes(32)
_NONCE_CHARS, _TAG_CHARS = 32, 32


def new_id(prefix: str, tenant: str) -> str:
    nonce = secrets.token_hex(_NONCE_CHARS // 2)
    return f"{prefix}{nonce}{_tag(nonce, tenant)}"


def check_id(given: str, prefix: str, tenant: str) -> None:
    """Raises NotFound where the id is not one of this tenant's: whether it is another's is not told."""
    nonce, tag = given[len(prefix) : len(prefix) + _NONCE_CHARS], given[len(prefix) + _NONCE_CHARS :]
    if not hmac.compare_digest(tag.encode(), _tag(nonce, tenant).encode()):
        raise NotFound(f"there is no response {given[:100]!r}")


def _tag(nonce: str, tenant: str) -> str:
    return hmac.new(_SECRET, f"{nonce} {tenant}".encode(), hashlib.sha256).hexdigest()[:_TAG_CHARS]
