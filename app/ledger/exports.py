"""Every record in one file."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import msgspec

from app.errors import StartRefused
from app.ledger import files
from app.ledger.record import Record


def records(folder: Path, since: float | None, until: float | None) -> Iterator[list[Record]]:
    """Of that time, a few thousand at a time, file by file. Raises OSError."""
    first, last = since if since is not None else 0.0, until if until is not None else float("inf")
    for path in files.listed(folder, since=since, until=until):
        for lines in files.blocks(path, Record, files.Skipped()):
            yield [record for record in lines if first <= record.time < last]


def to_jsonl(path: Path, found: Iterator[list[Record]]) -> int:
    """How many there were."""
    encoder, count = msgspec.json.Encoder(), 0
    with path.open("wb") as file:
        for lines in found:
            file.write(encoder.encode_lines(lines))
            count += len(lines)
    return count


def to_parquet(path: Path, found: Iterator[list[Record]]) -> int:
    """How many there were; every column is there, whatever the lines left out.

    Raises:
        StartRefused: pyarrow is not installed.
    """
    if find_spec("pyarrow") is None:
        raise StartRefused("Parquet needs pyarrow: install refrain[train], or export with --jsonl")
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}
    schema = pa.schema([(each.name, kinds[each.type]) for each in msgspec.structs.fields(Record)])
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for lines in found:
            columns = [[getattr(record, name) for record in lines] for name in schema.names]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            count += len(lines)
    return count
