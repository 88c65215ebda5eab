"""Read an offline W&B run back: a 7-byte header, then LevelDB log records of ``Record`` messages."""

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32 * 1024


def read_records(run_directory: Path) -> list[Record]:
    (path,) = run_directory.glob("run-*.wandb")
    data = path.read_bytes()
    position, partial, records = 7, b"", []
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
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


def exit_code(records: list[Record]) -> int:
    (code,) = [record.exit.exit_code for record in records if record.HasField("exit")]
    return code
