"""What a ledger holds."""

from __future__ import annotations

from pathlib import Path

from app.ledger import files
from app.ledger.record import Record


def records(home: Path, *, kind: str | None = None, skipped: files.Skipped | None = None) -> list[Record]:
    told = skipped or files.Skipped()
    return [
        record
        for path in files.listed(home / "ledger")
        for lines in files.blocks(path, Record, told)
        for record in lines
        if kind in (None, record.kind)
    ]


def calls(home: Path) -> dict[str, Record]:
    """By request id, each of which is there once."""
    found = records(home, kind="call")
    by_id = {record.id: record for record in found}
    assert len(by_id) == len(found), "a call is recorded twice"
    return by_id
