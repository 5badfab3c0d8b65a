"""JSON files are read as they are, and what is no JSON file is told in one line."""

import datetime
import json
from pathlib import Path

import pytest

from eva.config import UserError
from eva.files import read_json, write_json


def test_what_was_written_is_read(tmp_path: Path) -> None:
    values = {"name": "<ü> \u2028", "list": [1, 0.1, None, True], "inner": {"1": 1e-300}}
    write_json(tmp_path / "file.json", values)
    assert repr(read_json(tmp_path / "file.json")) == repr(values)


@pytest.mark.parametrize(
    "content", [b"", b'{"a": 1', b"\xff\xfe", b"[" * 100_000], ids=["empty", "cut", "bytes", "deep"]
)
def test_a_damaged_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(UserError, match=r"file\.json' is damaged: it is not JSON$"):
        read_json(tmp_path / "file.json")


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read '.*none\.json': No such file or directory$"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"cannot read '.*': Is a directory$"):
        read_json(tmp_path)


def test_dates_and_numbers_that_are_not_finite_are_plain_in_json(tmp_path: Path) -> None:
    write_json(tmp_path / "values.json", {"day": datetime.date(2020, 1, 2), "inner": [float("nan"), 1.5]})
    assert json.loads((tmp_path / "values.json").read_text()) == {"day": "2020-01-02", "inner": [None, 1.5]}
