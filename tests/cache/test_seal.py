"""What is closed opens for its own purpose and name, by who has the secret, and for nothing and nobody else."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cache.seal import NotOurs, Purpose, Seal

OLD, NEW = b"o" * 16, b"n" * 32
SEALS = {
    "unsigned": Seal(Purpose.RECORD),
    "signed": Seal(Purpose.RECORD, [NEW]),
    "encrypted": Seal(Purpose.RECORD, [NEW], encrypts=True),
}
kinds = pytest.mark.parametrize("seal", SEALS.values(), ids=SEALS)


@kinds
@given(content=st.binary(max_size=200), name=st.binary(max_size=70))
def test_what_is_closed_opens_under_its_name_alone(seal: Seal, content: bytes, name: bytes) -> None:
    value = seal.close(content, name)
    assert seal.open(value, name) == content
    with pytest.raises(NotOurs):
        seal.open(value, name + b"x")


@kinds
def test_every_byte_counts_and_every_length(seal: Seal) -> None:
    value = seal.close(b"content", b"name")
    for at in range(len(value)):
        for changed in (value[:at] + bytes((value[at] ^ 1,)) + value[at + 1 :], value[:at], value + b"x"):
            with pytest.raises(NotOurs):
                seal.open(changed, b"name")


def test_nothing_opens_what_another_kind_another_purpose_or_another_secret_closed() -> None:
    others = [
        *SEALS.values(),
        *(Seal(Purpose.LIVE, [NEW], encrypts=encrypts) for encrypts in (False, True)),
        *(Seal(Purpose.RECORD, [OLD], encrypts=encrypts) for encrypts in (False, True)),
    ]
    for one, other in itertools.permutations(others, 2):
        with pytest.raises(NotOurs):
            other.open(one.close(b"content", b"name"), b"name")


@pytest.mark.parametrize("encrypts", [False, True])
def test_an_older_secret_still_opens_and_closes_nothing_new(encrypts: bool) -> None:
    before, after = (Seal(Purpose.RECORD, keys, encrypts=encrypts) for keys in ([OLD], [NEW, OLD]))
    assert after.open(before.close(b"content", b"name"), b"name") == b"content"
    with pytest.raises(NotOurs):
        before.open(after.close(b"content", b"name"), b"name")


def test_encrypted_nothing_of_the_content_is_seen_and_no_two_are_alike() -> None:
    seal = SEALS["encrypted"]
    values = {seal.close(b"what the model said", b"name") for _ in range(100)}
    assert len(values) == 100
    assert not any(b"model" in value for value in values)
    assert b"model" in SEALS["signed"].close(b"what the model said", b"name")
