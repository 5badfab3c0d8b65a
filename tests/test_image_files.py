"""Files that did not change are not read again, and every file that changed is."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eva.image_files
from eva.data import Dataset, load_dataset
from eva.image_files import ImageFiles

COLOURS = [(10, 20, 30), (200, 0, 0), (0, 200, 0), (0, 0, 200)]
NAMES = [f"{split}/cat/{index}.bmp" for split in ("train", "test") for index in range(2)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, colour in zip(NAMES, COLOURS, strict=True):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        paint(tmp_path / "images" / name, colour)
    return tmp_path / "images"


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as unchanged for long, without waiting for it."""
    monkeypatch.setattr(eva.image_files, "RACY_NANOSECONDS", -(10**18))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is read, in the order of the paths; each load of new images reads twice: to digest and to decode."""
    names: list[str] = []
    original = ImageFiles.read

    def noting(files: ImageFiles, index: int) -> bytes:
        names.append(files.listing.paths[index])
        return original(files, index)

    monkeypatch.setattr(ImageFiles, "read", noting)
    return names


def paint(path: Path, colour: tuple[int, int, int]) -> None:
    Image.new("RGB", (32, 32), colour).save(path)


def load(root: Path) -> Dataset:
    return load_dataset(f"folder:{root}", root.parent / "data", workers=1)


def seen(dataset: Dataset) -> list[tuple[int, ...]]:
    return [tuple(image[0, 0].tolist()) for split in (dataset.train, dataset.test) for image in split.images]


def index_of(root: Path) -> Path:
    (path,) = (root.parent / "data" / "index").iterdir()
    return path


def test_what_did_not_change_is_not_read_again(old: None, read: list[str], root: Path) -> None:
    first = load(root)
    assert sorted(read) == sorted(NAMES * 2)
    written = index_of(root).stat()
    read.clear()
    again = load(root)
    assert read == [] and seen(again) == COLOURS and again.fingerprint == first.fingerprint
    assert index_of(root).stat() == written or index_of(root).stat().st_mtime_ns == written.st_mtime_ns


def test_what_changed_just_before_is_read_until_it_is_older(root: Path, read: list[str]) -> None:
    load(root)
    read.clear()
    load(root)
    assert sorted(read) == sorted(NAMES)
    time.sleep(2.1)
    for expected in (sorted(NAMES), []):  # once more, and then it is known
        read.clear()
        assert seen(load(root)) == COLOURS and sorted(read) == expected


def rewrite(path: Path) -> None:
    paint(path, (1, 2, 3))


def rewrite_with_the_same_date(path: Path) -> None:
    status = path.stat()
    paint(path, (1, 2, 3))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns and path.stat().st_size == status.st_size


def replace_with_the_same_date(path: Path) -> None:
    shutil.copy2(path, path.with_name(".aside.bmp"))
    rewrite_with_the_same_date(path.with_name(".aside.bmp"))
    os.replace(path.with_name(".aside.bmp"), path)


def make_a_link_to_another(path: Path) -> None:
    paint(path.parents[2] / "other.bmp", (1, 2, 3))
    path.unlink()
    path.symlink_to(path.parents[2] / "other.bmp")


CHANGES = [rewrite, rewrite_with_the_same_date, replace_with_the_same_date, make_a_link_to_another]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changed_is_read_and_nothing_else(
    change: Callable[[Path], None], old: None, read: list[str], root: Path
) -> None:
    load(root)
    time.sleep(0.02)  # a tick of the file system's clock: else this were the case of the next test
    change(root / NAMES[1])
    read.clear()
    dataset = load(root)
    assert read[0] == NAMES[1] and sorted(read) == sorted([NAMES[1], *NAMES])  # all are decoded for the new entry
    assert seen(dataset) == [COLOURS[0], (1, 2, 3), *COLOURS[2:]]


def test_a_file_that_is_written_again_and_again_is_never_an_older_one(root: Path) -> None:
    for value in range(40):
        rewrite_colour = (value, 255 - value, 7)
        with (root / NAMES[0]).open("r+b") as file:  # in its place, as fast as can be
            pixels = np.full((32, 32, 3), rewrite_colour[::-1], np.uint8)
            file.seek(54)
            file.write(pixels.tobytes())
        assert seen(load(root))[0] == rewrite_colour


def test_names_that_come_and_go_leave_the_others_known(old: None, read: list[str], root: Path) -> None:
    load(root)
    (root / NAMES[0]).unlink()
    paint(root / "train/cat/a.bmp", (9, 9, 9))
    read.clear()
    assert seen(load(root)) == [COLOURS[1], (9, 9, 9), *COLOURS[2:]]
    assert read[0] == "train/cat/a.bmp" and len(read) == 1 + 4


def test_a_damaged_index_is_no_index(old: None, read: list[str], root: Path) -> None:
    load(root)
    intact = index_of(root).read_bytes()
    damaged = [
        intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :]
        for position in range(0, len(intact), 7)
    ]
    for content in (b"", b"noise", intact[:-1], intact + b"\n", *damaged):
        index_of(root).write_bytes(content)
        read.clear()
        assert seen(load(root)) == COLOURS and sorted(read) == sorted(NAMES)
        assert index_of(root).read_bytes() == intact


def test_the_index_of_another_folder_is_no_index(old: None, read: list[str], root: Path) -> None:
    load(root)
    path = index_of(root)
    moved = root.rename(root.with_name("moved"))
    load(moved)
    (other,) = set(path.parent.iterdir()) - {path}
    path.replace(other)
    read.clear()
    assert seen(load(moved)) == COLOURS and sorted(read) == sorted(NAMES)


def test_without_room_for_an_index_files_are_read_each_time(old: None, read: list[str], root: Path) -> None:
    (root.parent / "data").mkdir()
    (root.parent / "data" / "index").write_text("in its place")
    load(root)
    read.clear()
    assert seen(load(root)) == COLOURS and sorted(read) == sorted(NAMES)
