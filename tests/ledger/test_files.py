"""The ledger on the disk: torn lines, files that change form, rotation, retention."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from app.ledger import files
from app.ledger.appender import Appender
from app.ledger.record import Record
from tests.ledger.reading import records

MIB = 1 << 20


def line(ident: str, **fields: object) -> bytes:
    return msgspec.json.encode(Record(time=time.time(), id=ident, **fields)) + b"\n"  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


def ids(folder: Path) -> list[str]:
    return sorted(record.id for record in records(folder.parent))


def test_a_torn_last_line_is_skipped_and_never_merged_with_what_comes_next(folder: Path) -> None:
    appender = Appender(folder, MIB)
    appender.append(line("a") + line("b"))
    appender.close()
    (path,) = folder.iterdir()
    with path.open("ab") as file:  # as a crash in the middle of a write leaves it
        file.write(line("c")[:20])
    after = Appender(folder, MIB)
    after.append(line("d"))
    after.close()
    skipped = files.Skipped()
    assert sorted(record.id for record in records(folder.parent, skipped=skipped)) == ["a", "b", "d"]
    assert skipped.lines == 1


def test_a_spoiled_line_spoils_no_other(folder: Path) -> None:
    folder.mkdir()
    spoiled = [line("a"), b"\0" * 50 + b"\n", b'{"time": "x"}\n', line("b")[:20] + b"\n", b"\xff\xfe\n", line("c")]
    (folder / files.new_name()).write_bytes(b"".join(spoiled))
    skipped = files.Skipped()
    assert [record.id for record in records(folder.parent, skipped=skipped)] == ["a", "c"]
    assert skipped.lines == 4


def test_lines_that_fall_on_the_edge_of_a_block_are_whole(folder: Path) -> None:
    folder.mkdir()
    many = [line(f"{number:06}", request="x" * (number % 700)) for number in range(9000)]
    (folder / files.new_name()).write_bytes(b"".join(many))
    assert sum(len(each) for each in many) > 3 * MIB
    assert ids(folder) == [f"{number:06}" for number in range(9000)]


def test_a_full_file_is_followed_by_another_and_so_is_a_day(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yesterday = (datetime.now(UTC) - timedelta(days=1)).strftime("%Y%m%d-%H%M%S")
    name = files.new_name
    monkeypatch.setattr(files, "new_name", lambda: yesterday + name()[15:])
    appender = Appender(folder, 3 * len(line("a")) + 15)  # three lines, never four
    assert appender.append(line("a"))
    monkeypatch.undo()
    assert appender.append(line("b")), "yesterday's file is not written to today"
    assert [appender.append(line(each)) for each in "cdef"] == [False, False, True, False]
    appender.close()
    assert len(list(folder.iterdir())) == 3
    assert ids(folder) == list("abcdef")


def test_a_file_that_is_begun_while_another_process_tidies_is_written_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = os.open

    def tidied(path: Path, *arguments: int) -> int:
        fd = begin(path, *arguments)
        monkeypatch.undo()
        files.tidy(folder, keep_days=0)  # before it is locked
        return fd

    appender = Appender(folder, MIB)
    monkeypatch.setattr(os, "open", tidied)
    appender.append(line("a"))
    assert ids(folder) == ["a"]
    appender.append(line("b"))
    appender.close()
    assert ids(folder) == ["a", "b"]
    assert len(list(folder.iterdir())) == 1


def test_what_nobody_writes_any_more_is_compressed_and_what_is_old_is_removed(folder: Path) -> None:
    writing, closed = Appender(folder, MIB), Appender(folder, MIB)
    writing.append(line("a"))
    closed.append(line("b"))
    closed.close()
    for days in (9, 11):
        day = (datetime.now(UTC) - timedelta(days=days)).strftime("%Y%m%d")
        (folder / f"{day}-000000-host-1-0000000{days % 10}.jsonl").write_bytes(line(f"{days} days"))
    files.tidy(folder, keep_days=10)
    assert sorted(path.suffix for path in folder.iterdir()) == [".jsonl", ".zst", ".zst"]
    assert ids(folder) == ["9 days", "a", "b"]
    files.tidy(folder, keep_days=5)  # a compressed one goes in its turn
    assert ids(folder) == ["a", "b"]
    writing.append(line("c"))
    writing.close()
    files.tidy(folder, keep_days=0)
    assert ids(folder) == ["a", "b", "c"]
    assert {path.suffix for path in folder.iterdir()} == {".zst"}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_compression_that_was_interrupted_counts_nothing_twice(folder: Path) -> None:
    appender = Appender(folder, MIB)
    appender.append(line("a"))
    appender.close()
    (path,) = folder.iterdir()
    content = path.read_bytes()
    files.tidy(folder, keep_days=0)
    path.write_bytes(content)  # killed before the plain file was removed
    assert ids(folder) == ["a"]
    files.tidy(folder, keep_days=0)
    assert ids(folder) == ["a"]
    assert len(list(folder.iterdir())) == 1


def test_a_damaged_compressed_file_is_counted_and_stops_nothing(folder: Path) -> None:
    folder.mkdir()
    (folder / files.new_name().replace(files.PLAIN, files.PACKED)).write_bytes(b"\x28\xb5\x2f\xfdnonsense")
    (folder / files.new_name()).write_bytes(line("a"))
    skipped = files.Skipped()
    assert [record.id for record in records(folder.parent, skipped=skipped)] == ["a"]
    assert skipped.lines == 1


def test_only_files_of_the_time_that_is_asked_for_are_read(folder: Path) -> None:
    folder.mkdir()
    for day in ("20261101", "20261110", "20261120"):
        (folder / f"{day}-000000-host-1-00000000.jsonl").write_bytes(line(day))
    at = datetime(2026, 11, 10, 12, tzinfo=UTC).timestamp()
    assert [files.day_of(path) for path in files.listed(folder, since=at)] == ["20261110", "20261120"]
    assert [files.day_of(path) for path in files.listed(folder, until=at)] == ["20261101", "20261110"]
