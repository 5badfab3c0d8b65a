"""The file in which W&B's client keeps a run until it is sent: which rows it holds, and an end that can be read.

It is a log in LevelDB's format (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind seven bytes of
W&B's own, with plain CRC-32; every record in it is a protobuf message. The client writes it in blocks, so a killed
process leaves it cut off in the middle of a record, and `wandb sync` then gives up on the later parts of the run.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HEADER = 7  # bytes, also those before each chunk: CRC-32 of type and content, length, type
BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields each whole record of a log with the offset of its end, up to the first that is damaged or cut off."""
    position, parts = HEADER, list[bytes]()
    while True:
        left = BLOCK - position % BLOCK
        if left < HEADER:  # a block's last bytes stay empty if no chunk's header fits
            position += left
            continue
        if position + HEADER > len(content):
            return
        checksum, length, kind = struct.unpack_from("<IHB", content, position)
        end = position + HEADER + length
        if not FULL <= kind <= LAST or end > len(content) or length > left - HEADER:
            return
        if zlib.crc32(content[position + HEADER - 1 : end]) != checksum:
            return
        if (kind in (FULL, FIRST)) == bool(parts):  # a part without its beginning, or a beginning without its end
            return
        parts.append(content[position + HEADER : end])
        position = end
        if kind in (FULL, LAST):
            yield b"".join(parts), end
            parts = []


def mend(path: Path) -> int | None:
    """Cuts a log off after its last whole record, if there is anything behind it.

    Returns:
        The step after that of its last row (0 if it has no row); None if it doesn't even tell which run it is of.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    content = path.read_bytes()
    whole, steps, begun = min(HEADER, len(content)), 0, False
    for body, end in records(content):
        record = Record.FromString(body)
        if record.HasField("history"):
            steps = record.history.step.num + 1
        begun = begun or record.HasField("run")
        whole = end
    if whole < len(content):
        os.truncate(path, whole)
    return steps if begun else None


class Holding(NamedTuple):
    """What a log holds: how many rows, and whether the run's end."""

    rows: int
    ended: bool


def holding(path: Path) -> Holding:
    """Returns what a log holds, which may still be written."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    rows, ended = 0, False
    for body, _ in records(path.read_bytes()):
        kind = Record.FromString(body).WhichOneof("record_type")
        rows += kind == "history"
        ended = ended or kind == "exit"
    return Holding(rows, ended)
