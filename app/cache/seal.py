"""What closes our values in Redis, so that nothing else opens as one of them. Pure.

```
without a secret     BLAKE2b-128 · content                    accidents are noticed
cache_secret         the same, keyed: a MAC                   nobody else can make one
... and encrypted    nonce (12 bytes) · AES-256-GCM-SIV       and nobody else can read it
```
Each covers the purpose of the value and its name, so that one that was moved does not open. GCM-SIV (RFC 8452) since
nonces are drawn by chance, by many servers, and it alone gives nothing away where two are equal.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

TAG_BYTES = 16
_NONCE_BYTES = 12


class Purpose(Enum):
    """What is sealed: a value of one kind does not open as another."""

    RECORD = b"refrain.record"
    LIVE = b"refrain.live"


class NotOurs(Exception):
    """Raised when a value was not closed with one of these secrets, for this purpose and name, or not left whole."""


class Seal:
    """Closes with the first of the secrets and opens what any closed: older ones stay until their values expire."""

    def __init__(self, purpose: Purpose, keys: Sequence[bytes] = (), *, encrypts: bool = False) -> None:
        self._purpose = purpose
        self._keys = tuple(keys) or (b"",)
        self._ciphers = tuple(_cipher(purpose, key) for key in keys) if encrypts else ()

    def close(self, content: bytes, name: bytes) -> bytes:
        if self._ciphers:
            nonce = secrets.token_bytes(_NONCE_BYTES)
            return nonce + self._ciphers[0].encrypt(nonce, content, name)
        return self._tag(content, name, self._keys[0]) + content

    def open(self, value: bytes, name: bytes) -> bytes:
        """The content. Raises NotOurs."""
        return self._decrypted(value, name) if self._ciphers else self._checked(value, name)

    def _checked(self, value: bytes, name: bytes) -> bytes:
        tag, content = value[:TAG_BYTES], value[TAG_BYTES:]
        for key in self._keys:
            if hmac.compare_digest(tag, self._tag(content, name, key)):
                return content
        raise NotOurs

    def _decrypted(self, value: bytes, name: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        nonce, content = value[:_NONCE_BYTES], value[_NONCE_BYTES:]
        for cipher in self._ciphers:
            try:
                return cipher.decrypt(nonce, content, name)
            except (InvalidTag, ValueError):  # ValueError: too short to hold a nonce and a tag
                continue
        raise NotOurs

    def _tag(self, content: bytes, name: bytes, key: bytes) -> bytes:
        digest = hashlib.blake2b(name, digest_size=TAG_BYTES, key=key, person=self._purpose.value)
        digest.update(content)
        return digest.digest()


def _cipher(purpose: Purpose, secret: bytes) -> AESGCMSIV:
    """A key of its own for each purpose, derived by HKDF (RFC 5869); the MAC is keyed by the secret itself."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = purpose.value + b" aes-256-gcm-siv"
    return AESGCMSIV(HKDF(SHA256(), length=32, salt=None, info=info).derive(secret))
