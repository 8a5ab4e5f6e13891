"""A recording opens exactly where it was made for, whole; anything else is no recording."""

from __future__ import annotations

import random
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from app.cache.recording import MAGIC, UNSIGNED, Recording, pack, unpack
from app.cache.seal import TAG_BYTES
from app.domain import Form
from app.errors import BrokenRecording

KEY = "ab" * 32
HEADER_BYTES = len(MAGIC) + 1 + TAG_BYTES

keys = st.text(alphabet="0123456789abcdef", min_size=64, max_size=64)
recordings = st.builds(
    Recording,
    form=st.sampled_from(Form),
    recorded_at=st.floats(0, 4e9),
    ident=st.text(max_size=40),
    created=st.none() | st.integers(0, 2**40),
    head=st.binary(max_size=3000) | st.binary(max_size=40).map(lambda part: part * 100),
    usage=st.binary(max_size=60),
    tail=st.binary(max_size=60),
    prompt_tokens=st.integers(0, 2**31),
    completion_tokens=st.integers(0, 2**31),
    seconds=st.floats(0, 1e6),
    expires_at=st.floats(0, 4e9),
    weights=st.text(max_size=20),
)
ONE = Recording(
    Form.BODY, 1.7e9, "chatcmpl-1", 1_700_000_000, b'{"id": "chatcmpl-1"}' * 20, b"", b"", 3, 5, 0.25, 2e9, "m@0"
)


def forged(content: bytes, flags: int = 0, key: str = KEY) -> bytes:
    """A value with a right tag, as somebody who may write to our Redis could make it."""
    return MAGIC + bytes((flags,)) + UNSIGNED.close(content, key.encode() + bytes((flags,)))


@given(recordings, keys, st.sampled_from([0, 100, 10**9]))
def test_what_was_packed_opens_the_same(recording: Recording, key: str, compress_above_bytes: int) -> None:
    assert unpack(pack(recording, key, compress_above_bytes=compress_above_bytes), key) == recording


@given(recordings, st.sampled_from([0, 10**9]), st.data())
def test_one_flipped_bit_anywhere_breaks_it(
    recording: Recording, compress_above_bytes: int, data: st.DataObject
) -> None:
    value = bytearray(pack(recording, KEY, compress_above_bytes=compress_above_bytes))
    at = data.draw(st.integers(0, len(value) - 1))
    value[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(BrokenRecording):
        unpack(bytes(value), KEY)


@given(recordings, st.sampled_from([0, 10**9]), st.data())
def test_cut_short_or_made_longer_it_does_not_open(
    recording: Recording, compress_above_bytes: int, data: st.DataObject
) -> None:
    value = pack(recording, KEY, compress_above_bytes=compress_above_bytes)
    with pytest.raises(BrokenRecording):
        unpack(value[: data.draw(st.integers(0, len(value) - 1))], KEY)
    with pytest.raises(BrokenRecording):
        unpack(value + data.draw(st.binary(min_size=1, max_size=9)), KEY)


@given(recordings, keys, keys)
def test_under_another_key_it_does_not_open(recording: Recording, key: str, other: str) -> None:
    value = pack(recording, key, compress_above_bytes=0)
    if key != other:
        with pytest.raises(BrokenRecording):
            unpack(value, other)


def test_every_single_byte_counts() -> None:
    """Without chance: each byte of one value changed, each length shorter than the whole."""
    for compress_above_bytes in (0, 10**9):
        value = pack(ONE, KEY, compress_above_bytes=compress_above_bytes)
        for at in range(len(value)):
            for changed in (value[:at] + bytes((value[at] ^ 0xFF,)) + value[at + 1 :], value[:at]):
                with pytest.raises(BrokenRecording):
                    unpack(changed, KEY)


@given(st.binary(max_size=300))
def test_bytes_from_elsewhere_are_foreign(value: bytes) -> None:
    with pytest.raises(BrokenRecording, match=r"foreign|corrupt"):
        unpack(value, KEY)
    with pytest.raises(BrokenRecording, match=r"foreign|corrupt"):
        unpack(MAGIC + value, KEY)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(None),
        msgspec.msgpack.encode({"form": "body"}),
        msgspec.msgpack.encode(["body"]),
        msgspec.msgpack.encode(["novel", 1.0, "i", 1, b"", b"", b"", 1, 1, 1.0]),
        msgspec.msgpack.encode(["body", "soon", "i", 1, b"", b"", b"", 1, 1, 1.0]),
        # A string that is not UTF-8: msgspec raises another kind of error for it.
        b"\x9a\xa4body\xcb"
        + struct.pack(">d", 1.0)
        + b"\xa2\xff\xff\x01\xc4\x00\xc4\x00\xc4\x00\x01\x01\xcb"
        + bytes(8),
        msgspec.msgpack.encode(ONE) + b"more",
    ],
)
@given(flags=st.sampled_from([0, 1, 2, 255]))
def test_even_with_a_right_tag_nonsense_is_refused(content: bytes, flags: int) -> None:
    with pytest.raises(BrokenRecording):
        unpack(forged(content, flags), KEY)


@pytest.mark.parametrize("is_size_told", [True, False])
def test_a_decompression_bomb_takes_no_memory(is_size_told: bool) -> None:
    """zstd's limit on output is ignored where the frame itself names a size: 10 kB asked for 300 MB."""
    compressor = zstandard.ZstdCompressor(write_content_size=is_size_told).compressobj(
        size=300 * 2**20 if is_size_told else -1
    )
    bomb = b"".join(compressor.compress(bytes(2**20)) for _ in range(300)) + compressor.flush()
    assert len(bomb) < 20_000
    value = forged(bomb, 1)
    tracemalloc.start()
    try:
        with pytest.raises(BrokenRecording):
            unpack(value, KEY)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    frame = bytearray(zstandard.ZstdCompressor(write_content_size=True).compress(bytes(10_000)))
    size = (10_000 - 256).to_bytes(2, "little")
    at = frame.index(size)
    for told in (5, 60_000):
        frame[at : at + 2] = (told).to_bytes(2, "little")
        with pytest.raises(BrokenRecording):
            unpack(forged(bytes(frame), 1), KEY)


def test_small_ones_lie_plain_and_large_ones_compressed() -> None:
    large = msgspec.structs.replace(ONE, head=b"the same again " * 1000)
    assert pack(ONE, KEY, compress_above_bytes=1024)[4] == 0
    packed = pack(large, KEY, compress_above_bytes=1024)
    assert packed[4] == 1
    assert len(packed) < 1000


def test_the_header_is_as_the_docstring_says() -> None:
    value = pack(ONE, KEY, compress_above_bytes=10**9)
    assert value[:4] == b"RFR2"
    assert msgspec.msgpack.decode(value[HEADER_BYTES:])[0] == "body"


def test_several_threads_pack_and_open_at_once() -> None:
    """Each server of a process has a thread of its own; compression works beside the interpreter's lock."""

    def broken(seed: int) -> int:
        drawn, wrong = random.Random(seed), 0
        for _ in range(100):
            head = bytes(drawn.choices(b"abcdefgh {}\n", k=drawn.randrange(2_000, 40_000)))
            recording = Recording(Form.BODY, 1.7e9, "chatcmpl-1", 1, head, b"", b"", 3, 5, 0.25, 4e9, "m@0")
            wrong += unpack(pack(recording, KEY, compress_above_bytes=1024), KEY) != recording
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(broken, range(4))) == 0
