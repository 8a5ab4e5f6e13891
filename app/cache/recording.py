"""A recording: one complete, successful answer in its wire form, and its bytes in Redis.

```
"RFR2" · flags (1 byte, bit 0: zstd) · content, closed under key and flags (`seal.py`)
```
A value that was cut short, bit-flipped, written by somebody else, or moved to another key does not open.
Content is a msgpack array, compressed above a size.
"""

from __future__ import annotations

import threading
from typing import Final

import msgspec
import zstandard

from app.cache.seal import NotOurs, Purpose, Seal
from app.domain import Form
from app.errors import BrokenRecording

MAGIC: Final = b"RFR2"
_HEADER_BYTES: Final = len(MAGIC) + 1
_ZSTD: Final = 1
# A recording that says it unpacks to more than this was not written by us.
_MAX_UNPACKED_BYTES: Final = 256 * 2**20


class Recording(msgspec.Struct, frozen=True, array_like=True):
    """An answer that ended well: nothing else is ever recorded.

    `head + usage + tail` is the wire form; `usage` is the closing usage event of a stream, apart because
    only clients that ask for it get it (empty for a body). `ident` and `created` are what the answer calls
    itself; a replay puts fresh ones in their place. `seconds` is what generating it took, `weights` (`name@digest`)
    whose answer it is. Times are unix seconds.

    The rest is what tells which other calls it serves (`reuse.py`): the shape of the call that it was made for,
    whether it `ended` by itself, the tokens generated up to each event that it can be cut at (`counts`; 0 elsewhere)
    and in each choice, and `most`, the limit that the engine went by, where its answer tells it. `body` is what the
    events fold into, since to fold them again would double the time of a hit.
    """

    form: Form
    recorded_at: float
    ident: str
    created: int | None
    head: bytes
    usage: bytes
    tail: bytes
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    expires_at: float
    weights: str
    limit: int | None = None
    n: int = 1
    logprobs: int | None = None
    ended: bool = False
    counts: list[int] | None = None
    body: bytes = b""
    choice_tokens: list[int] | None = None
    most: int | None = None

    def content(self, *, with_usage: bool = True) -> bytes:
        return self.head + self.usage + self.tail if with_usage else self.head + self.tail

    def with_content(self, form: Form, head: bytes, usage: bytes, tail: bytes, *, completion_tokens: int) -> Recording:
        return msgspec.structs.replace(
            self, form=form, head=head, usage=usage, tail=tail, completion_tokens=completion_tokens, body=b""
        )

    def counting(
        self, *, counts: list[int] | None = None, body: bytes = b"", choice_tokens: list[int] | None = None
    ) -> Recording:
        return msgspec.structs.replace(self, counts=counts, body=body, choice_tokens=choice_tokens)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Recording)


class _Zstd(threading.local):
    """A pair for each thread: they work without the interpreter's lock, and two threads in one of them crash both."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=3)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _Zstd()


UNSIGNED: Final = Seal(Purpose.RECORD)


def pack(recording: Recording, key: str, *, compress_above_bytes: int, seal: Seal = UNSIGNED) -> bytes:
    """The value for Redis."""
    content, flags = _encoder.encode(recording), 0
    if len(content) > compress_above_bytes:
        content, flags = _zstd.compressor.compress(content), _ZSTD
    return MAGIC + bytes((flags,)) + seal.close(content, _name(key, flags))


def unpack(value: bytes, key: str, *, seal: Seal = UNSIGNED) -> Recording:
    """The recording that `pack` wrote for this key with such a seal.

    Raises:
        BrokenRecording: anything else.
    """
    if len(value) < _HEADER_BYTES or not value.startswith(MAGIC):
        raise BrokenRecording("foreign")
    flags = value[4]
    try:
        content = seal.open(value[_HEADER_BYTES:], _name(key, flags))
        return _decoder.decode(_decompressed(content) if flags & _ZSTD else content)
    except NotOurs:
        raise BrokenRecording("corrupt") from None
    except (ValueError, zstandard.ZstdError, MemoryError) as error:  # msgspec's errors, and bad UTF-8, are ValueErrors
        raise BrokenRecording("unreadable") from error


def _name(key: str, flags: int) -> bytes:
    return key.encode() + bytes((flags,))


def _decompressed(content: bytes) -> bytes:
    # The frame says how large it is (ours all do), and `decompress` believes it, whatever limit it is given.
    if not 0 <= zstandard.frame_content_size(content) <= _MAX_UNPACKED_BYTES:
        raise BrokenRecording("unreadable")
    return _zstd.decompressor.decompress(content)
