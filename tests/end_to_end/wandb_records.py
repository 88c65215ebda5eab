"""Read an offline W&B run back: a 7-byte header, then LevelDB log records of ``Record`` messages."""

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32 * 1024


def read_records(run_directory: Path, patience: float = 60.0) -> list[Record]:
    """Return all records of a finished run.

    ``Run.finish`` tells W&B's background process to close the file and does not wait for it: one that lacks its exit
    record yet is read again for up to ``patience`` seconds.
    """
    (path,) = run_directory.glob("run-*.wandb")
    deadline = time.monotonic() + patience
    while True:
        records = _parse(path.read_bytes())
        if any(record.HasField("exit") for record in records):
            return records
        if time.monotonic() > deadline:
            raise AssertionError(f"{path} has no exit record after {patience:g} s")
        time.sleep(0.05)


def _parse(data: bytes) -> list[Record]:
    position, partial, records = 7, b"", []
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):  # being written
            break
        partial += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            records.append(Record.FromString(partial))
            partial = b""
    return records


def config(records: list[Record]) -> dict[str, Any]:
    (run,) = [record.run for record in records if record.HasField("run")][:1]
    return {item.key: json.loads(item.value_json) for item in run.config.update}


def history(records: list[Record]) -> list[dict[str, Any]]:
    """What was logged, a dict a step; the keys of media are nested, as in ``NAME/_type``."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]


def summary(records: list[Record]) -> dict[str, Any]:
    """What the run's summary was told explicitly, beside the last value of each metric; nested keys joined by /."""
    return {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.HasField("summary")
        for item in record.summary.update
    }


def exit_code(records: list[Record]) -> int:
    (code,) = [record.exit.exit_code for record in records if record.HasField("exit")]
    return code
