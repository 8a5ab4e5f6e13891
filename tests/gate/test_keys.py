"""API keys: hashed on disk, checked at the gate, and a change of the file is seen by a server that runs."""

from __future__ import annotations

import hashlib
import json
import stat
import threading
from pathlib import Path

import pytest

from app.domain import Priority
from app.errors import StartRefused, Unauthenticated
from app.gate import keys
from app.gate.keys import Gate, KeyFile


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "home" / "keys.json")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "keys.json"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until a test moves it: `clock[0] += 2`."""
    now = [1000.0]
    monkeypatch.setattr(keys.time, "monotonic", lambda: now[0])
    return now


def test_no_file_is_no_keys(file: KeyFile) -> None:
    assert file.read() == []
    assert file.stamp() is None


def test_what_is_kept_of_a_key_is_its_hash(file: KeyFile, path: Path) -> None:
    secret, key = file.create("shop")
    assert secret.startswith("rf-")
    assert len(secret) > 40
    assert key.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert secret not in path.read_text()
    assert secret[3:] not in path.read_text()


def test_only_the_owner_may_read_the_file_and_no_other_is_left_beside_it(file: KeyFile, path: Path) -> None:
    file.create("shop")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {each.name for each in path.parent.iterdir()} <= {"keys.json", "keys.json.lock"}


def test_keys_differ_and_are_listed_in_the_order_they_were_made(file: KeyFile) -> None:
    made = [file.create(f"t{number}", admin=number == 1) for number in range(3)]
    assert len({secret for secret, _ in made}) == len({key.id for _, key in made}) == 3
    assert file.read() == [key for _, key in made]
    assert [key.admin for key in file.read()] == [False, True, False]


@pytest.mark.parametrize("tenant", ["a", "shop-1", "A.b_c@d", "9", "x" * 64])
def test_tenant_names_that_are_taken(file: KeyFile, tenant: str) -> None:
    assert file.create(tenant)[1].tenant == tenant


@pytest.mark.parametrize("tenant", ["", " ", "a b", "a:b", "*", "-a", "ä", "a\n", "x" * 65, "a/b"])
def test_tenant_names_that_are_refused(file: KeyFile, path: Path, tenant: str) -> None:
    with pytest.raises(StartRefused, match="tenant name"):
        file.create(tenant)
    assert not path.exists()


def test_a_revoked_key_is_gone_and_the_others_stay(file: KeyFile) -> None:
    (_, one), (_, other) = file.create("one"), file.create("other")
    assert file.revoke(one.id) == one
    assert file.read() == [other]
    with pytest.raises(StartRefused, match="there is no key"):
        file.revoke(one.id)


def test_writers_at_the_same_time_lose_nothing(file: KeyFile) -> None:
    threads = [threading.Thread(target=file.create, args=(f"t{number}",)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.tenant for key in file.read()} == {f"t{number}" for number in range(12)}


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b'[{"id": "x"}]', b"\xff\xfe", b'[{"id": "\xff"}]'])
def test_a_file_that_cannot_be_understood_refuses_to_start_in_one_line(
    file: KeyFile, path: Path, content: bytes
) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(StartRefused, match=r"keys\.json cannot be read") as refused:
        Gate(file)
    assert "\n" not in str(refused.value)


def test_without_keys_everybody_is_the_default_tenant(file: KeyFile) -> None:
    gate = Gate(file)
    assert gate.is_open
    for presented in (None, "", "anything"):
        caller = gate.admit(presented)
        assert (caller.tenant, caller.key_id, caller.is_admin) == ("default", None, False)


def test_a_key_stands_for_its_tenant(file: KeyFile) -> None:
    (user, user_key), (admin, admin_key) = file.create("shop"), file.create("ops", admin=True)
    gate = Gate(file)
    assert not gate.is_open
    for secret, key in [(user, user_key), (admin, admin_key)]:
        caller = gate.admit(secret)
        assert (caller.tenant, caller.key_id, caller.is_admin) == (key.tenant, key.id, key.admin)


@pytest.mark.parametrize("presented", [None, "", "rf-", "wrong", "ÿÿ", "\x00", "x" * 100_000])
def test_without_a_right_key_there_is_no_entry_where_keys_are_needed(file: KeyFile, presented: str | None) -> None:
    secret, key = file.create("shop")
    gate = Gate(file)
    for wrong in (presented, secret[:-1], secret + "a", secret.upper(), key.sha256, key.id):
        with pytest.raises(Unauthenticated):
            gate.admit(wrong)


def test_a_key_made_or_revoked_counts_within_a_second(file: KeyFile, clock: list[float]) -> None:
    gate = Gate(file)
    one, one_key = file.create("one")
    clock[0] += keys.LOOK_AGAIN_S
    assert gate.admit(one).tenant == "one"
    other, _ = file.create("other")
    file.revoke(one_key.id)
    clock[0] += keys.LOOK_AGAIN_S
    assert gate.admit(other).tenant == "other"
    with pytest.raises(Unauthenticated):
        gate.admit(one)


def test_the_file_is_looked_at_once_a_second_however_many_ask(
    file: KeyFile, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(file)
    looks = []
    monkeypatch.setattr(file, "stamp", lambda: looks.append(1))
    for _ in range(50):
        gate.admit(None)
    assert not looks
    clock[0] += keys.LOOK_AGAIN_S
    for _ in range(50):
        gate.admit(None)
    assert len(looks) == 1


def test_revoking_the_last_key_or_removing_the_file_opens_no_door(
    file: KeyFile, path: Path, clock: list[float]
) -> None:
    secret, key = file.create("shop")
    gate = Gate(file)
    file.revoke(key.id)
    for _ in range(2):
        clock[0] += keys.LOOK_AGAIN_S
        assert not gate.is_open
        for presented in (None, secret):
            with pytest.raises(Unauthenticated):
                gate.admit(presented)
        path.unlink(missing_ok=True)


def test_a_file_broken_while_we_run_leaves_the_known_keys_in_force(
    file: KeyFile, path: Path, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    secret, _ = file.create("shop")
    gate = Gate(file)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    for _ in range(3):
        clock[0] += keys.LOOK_AGAIN_S
        assert gate.admit(secret).tenant == "shop"
        with pytest.raises(Unauthenticated):
            gate.admit(None)
    assert len(caplog.records) == 1, "said once per change, not once per look"
    path.write_bytes(whole)
    clock[0] += keys.LOOK_AGAIN_S
    assert gate.admit(secret).tenant == "shop"


def test_a_broken_file_closes_a_door_that_was_open(file: KeyFile, path: Path, clock: list[float]) -> None:
    """It used to answer one request a second with a 500 and let all the others in."""
    gate = Gate(file)
    path.parent.mkdir()
    path.write_bytes(b"[{")
    clock[0] += keys.LOOK_AGAIN_S
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            gate.admit(None)


def test_the_file_is_plain_json_that_an_operator_can_read(file: KeyFile, path: Path) -> None:
    file.create("shop", admin=True)
    (row,) = json.loads(path.read_text())
    assert set(row) == {"id", "tenant", "sha256", "created", "admin", "priority", "limits"}


def test_a_key_may_be_for_work_in_bulk_and_older_files_say_nothing_of_it(file: KeyFile, path: Path) -> None:
    bulk = file.create("night", priority=Priority.BATCH)[0]
    rows = json.loads(path.read_text())
    assert rows[0]["priority"] == "batch"
    old = file.create("shop")[0]
    rows = json.loads(path.read_text())
    del rows[1]["priority"]
    path.write_text(json.dumps(rows))
    gate = Gate(file)
    assert gate.admit(bulk).priority is Priority.BATCH
    assert gate.admit(old).priority is Priority.INTERACTIVE
