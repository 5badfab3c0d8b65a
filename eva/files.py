"""Files that are there in full or not at all."""

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eva.config import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, brings it to the disk and renames it to `path`.

    A reader sees the old file or the new one, never a part of it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Brings the names of a folder's files to the disk, where the file system can: a rename counts only then."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a mapping as JSON, atomically. Numbers that are not finite become null, as strict readers want."""
    text = json.dumps(finite(values), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
        UserError: The file is missing, unreadable or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{str(path)!r} is damaged: it is not JSON") from None


def finite(value: Any) -> Any:
    """Returns plain values as JSON has them: NaN and infinities become None, dates text."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    if isinstance(value, datetime.date):  # YAML makes one of 2020-01-01
        return value.isoformat()
    if isinstance(value, float) and not (-float("inf") < value < float("inf")):
        return None
    return value
