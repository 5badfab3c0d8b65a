"""The cache of decoded images under kills, full disks and processes at once: never a wrong one, and nothing left."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import pytest
from PIL import Image

import eva.image_cache
from eva.config import UserError
from eva.data import Dataset, load_dataset

FORK = multiprocessing.get_context("fork")  # torch need not be imported anew
COUNT = 48


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 images that take some milliseconds each; no test may change it."""
    return make_images(tmp_path_factory.mktemp("images"))


def make_images(root: Path, size: int = 400) -> Path:
    rng = np.random.default_rng(0)
    drawn = [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(6)]
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(COUNT // 4):
                drawn[(index + len(name) + len(split)) % 6].save(root / split / name / f"{index:02}.bmp")
    return root


@pytest.fixture(scope="module")
def expected(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the images, decoded where nothing disturbed."""
    return load(images, tmp_path_factory.mktemp("undisturbed")).fingerprint


def load(root: Path, data_dir: Path) -> Dataset:
    return load_dataset(f"folder:{root}", data_dir, workers=1)


def entries(data_dir: Path) -> list[str]:
    """Returns the endings of all that is in the cache."""
    return sorted(path.suffix for path in (data_dir / "cache").iterdir())


def part_of(root: Path, data_dir: Path) -> Path:
    """Returns where the entry of a folder is built, found out in another place."""
    load(root, data_dir.with_name("elsewhere"))
    (entry,) = (data_dir.with_name("elsewhere") / "cache").iterdir()
    (data_dir / "cache").mkdir(parents=True, exist_ok=True)
    return data_dir / "cache" / f"{entry.stem}.part"


# --- processes ---


HELD: list[IO[bytes]] = []


def start(task: Callable[..., object], *arguments: object) -> BaseProcess:
    def run() -> None:
        for file in HELD:  # a lock is held by whoever has inherited it
            file.close()
        task(*arguments)

    process = FORK.Process(target=run, daemon=True)
    process.start()
    return process


def end(process: BaseProcess) -> int | None:
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def load_only(root: Path, data_dir: Path) -> None:
    cv2.setNumThreads(0)
    load(root, data_dir)


def load_and_tell(root: Path, data_dir: Path, told: Path) -> None:
    """Writes the fingerprint, or what is wrong, and how many images this process decoded."""
    cv2.setNumThreads(0)
    decoded = 0
    decode = eva.image_cache._decode

    def counted(data: bytes) -> np.ndarray:
        nonlocal decoded
        decoded += 1
        return decode(data)

    eva.image_cache._decode = counted
    try:
        outcome = load(root, data_dir).fingerprint
    except UserError as error:
        outcome = str(error)
    told.write_text(f"{decoded} {outcome}")


@contextlib.contextmanager
def held(part: Path) -> Iterator[None]:
    """Holds an entry as a process does that builds it."""
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        HELD.append(file)
        yield
        HELD.remove(file)


def wait_for_waiting(part: Path, number: int) -> None:
    """Waits until so many processes wait for the lock of a file, by the kernel's list."""
    inode = f":{part.stat().st_ino} "
    for _ in range(1000):
        if sum("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines()) == number:
            return
        time.sleep(0.02)
    raise AssertionError(f"{number} processes should wait for {part}")


def test_of_several_processes_one_decodes_and_all_have_the_images(images: Path, expected: str, tmp_path: Path) -> None:
    part = part_of(images, tmp_path / "data")
    with held(part):
        processes = [start(load_and_tell, images, tmp_path / "data", tmp_path / f"{i}") for i in range(3)]
        wait_for_waiting(part, 3)
    assert [end(process) for process in processes] == [0] * 3
    told = [(tmp_path / f"{i}").read_text().split() for i in range(3)]
    assert [fingerprint for _, fingerprint in told] == [expected] * 3
    assert sorted(int(decoded) for decoded, _ in told) == [0, 0, COUNT]
    assert entries(tmp_path / "data") == [".images"]


def test_who_waits_is_told_and_builds_if_the_other_one_failed(
    images: Path, expected: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    part = part_of(images, tmp_path / "data")
    with held(part):
        part.write_bytes(b"half an entry")
        process = start(load_and_tell, images, tmp_path / "data", tmp_path / "told")
        wait_for_waiting(part, 1)
    assert end(process) == 0
    assert (tmp_path / "told").read_text() == f"{COUNT} {expected}"
    assert capfd.readouterr().err == "waiting for another process that decodes the same images\n"
    assert entries(tmp_path / "data") == [".images"]
    assert end(start(load_and_tell, images, tmp_path / "data", tmp_path / "told")) == 0
    assert (tmp_path / "told").read_text() == f"0 {expected}"


def test_of_those_that_wait_one_builds_if_the_other_one_gave_up(
    images: Path, expected: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its file is gone, and with it what they waited for."""
    part = part_of(images, tmp_path / "data")
    with held(part):
        processes = [start(load_and_tell, images, tmp_path / "data", tmp_path / f"{i}") for i in range(2)]
        wait_for_waiting(part, 2)
        part.unlink()
    assert [end(process) for process in processes] == [0, 0]
    told = [(tmp_path / f"{i}").read_text().split() for i in range(2)]
    assert sorted(told) == [["0", expected], [str(COUNT), expected]]
    assert "warning" not in capfd.readouterr().err
    assert entries(tmp_path / "data") == [".images"]


def test_who_waits_reads_what_was_built_meanwhile(images: Path, expected: str, tmp_path: Path) -> None:
    part = part_of(images, tmp_path / "data")
    (entry,) = (tmp_path / "elsewhere" / "cache").iterdir()
    with held(part):
        process = start(load_and_tell, images, tmp_path / "data", tmp_path / "told")
        wait_for_waiting(part, 1)
        part.write_bytes(entry.read_bytes())
        part.rename(part.with_suffix(".images"))
    assert end(process) == 0
    assert (tmp_path / "told").read_text() == f"0 {expected}"
    assert entries(tmp_path / "data") == [".images"]


def test_processes_that_start_at_once_agree(images: Path, expected: str, tmp_path: Path) -> None:
    for attempt in range(5):
        data_dir = tmp_path / f"data{attempt}"
        processes = [start(load_and_tell, images, data_dir, tmp_path / f"{attempt}-{i}") for i in range(4)]
        assert [end(process) for process in processes] == [0] * 4
        told = [(tmp_path / f"{attempt}-{i}").read_text().split() for i in range(4)]
        assert {fingerprint for _, fingerprint in told} == {expected}
        assert sum(int(decoded) for decoded, _ in told) == COUNT
        assert entries(data_dir) == [".images"]


# --- kills ---


def test_a_builder_killed_at_any_moment_leaves_no_cache_and_nothing_that_stays(
    images: Path, expected: str, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    began = time.monotonic()
    assert end(start(load_only, images, tmp_path / "timed")) == 0
    took = time.monotonic() - began
    draw = random.Random(0)
    unfinished = 0
    for _ in range(20):
        process = start(load_only, images, data_dir)
        time.sleep(draw.uniform(0, took))
        os.kill(process.pid or 0, signal.SIGKILL)
        killed = end(process) == -signal.SIGKILL
        left = entries(data_dir) if (data_dir / "cache").exists() else []
        if left == [".part"] and killed:
            unfinished += 1
        for entry in (data_dir / "cache").glob("*.images"):  # it was finished: begin again
            assert load(images, data_dir).fingerprint == expected
            entry.unlink()
    assert unfinished, "no kill came while the cache was built"
    assert load(images, data_dir).fingerprint == expected
    assert entries(data_dir) == [".images"]


def die_at(offset: int, root: Path, data_dir: Path) -> None:
    """Loads, and is ended by the kernel when a file grows beyond `offset` bytes: no line of Python runs after that."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (offset, offset))
    load_only(root, data_dir)


@pytest.mark.parametrize("offset", [0, 5, 32, 33, 4096, 32 + COUNT * 3072 - 1])
def test_a_builder_that_dies_while_it_writes_leaves_a_part_that_no_one_reads(
    offset: int, images: Path, expected: str, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    assert end(start(die_at, offset, images, data_dir)) == -signal.SIGXFSZ
    (part,) = (data_dir / "cache").iterdir()
    assert part.suffix == ".part" and part.stat().st_size == offset
    assert end(start(load_and_tell, images, data_dir, tmp_path / "told")) == 0
    assert (tmp_path / "told").read_text() == f"{COUNT} {expected}"
    assert entries(data_dir) == [".images"]


def test_what_a_killed_builder_left_goes_when_other_images_are_built(images: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    assert end(start(die_at, 1000, images, data_dir)) == -signal.SIGXFSZ
    (part,) = (data_dir / "cache").iterdir()
    load(make_images(tmp_path / "others", size=20), data_dir)
    assert not part.exists() and entries(data_dir) == [".images"]


def test_what_another_process_is_building_stays(images: Path, tmp_path: Path) -> None:
    part = part_of(images, tmp_path / "data")
    with held(part):
        load(make_images(tmp_path / "others", size=20), tmp_path / "data")
        assert part.exists() and entries(tmp_path / "data") == [".images", ".part"]


def test_a_part_that_is_whole_is_no_cache_all_the_same(images: Path, expected: str, tmp_path: Path) -> None:
    """As a kill right before the renaming leaves it."""
    part = part_of(images, tmp_path / "data")
    (entry,) = (tmp_path / "elsewhere" / "cache").iterdir()
    part.write_bytes(entry.read_bytes())
    assert end(start(load_and_tell, images, tmp_path / "data", tmp_path / "told")) == 0
    assert (tmp_path / "told").read_text() == f"{COUNT} {expected}"
    assert entries(tmp_path / "data") == [".images"]


# --- sources that change, entries that are damaged ---


def test_an_image_that_changes_between_reading_and_decoding_is_named(tmp_path: Path) -> None:
    root = make_images(tmp_path / "images", size=20)
    part = part_of(root, tmp_path / "data")
    changed = root / "train" / "dog" / "03.bmp"
    with held(part):
        process = start(load_and_tell, root, tmp_path / "data", tmp_path / "told")
        wait_for_waiting(part, 1)  # it has read all of them
        Image.new("RGB", (20, 20), (1, 2, 3)).save(changed)
    assert end(process) == 0
    _, told = (tmp_path / "told").read_text().split(" ", 1)
    assert (
        told
        == f"1 unreadable image(s) in {str(root)!r}: train/dog/03.bmp (changed while it was read); mend or remove them"
    )
    assert entries(tmp_path / "data") == []
    dataset = load(root, tmp_path / "data")
    assert (dataset.train.images[dataset.train.ids.tolist().index("train/dog/03.bmp")] == (1, 2, 3)).all()


def test_two_bytes_that_changed_places_are_noticed(images: Path, expected: str, tmp_path: Path) -> None:
    load(images, tmp_path)
    (entry,) = (tmp_path / "cache").iterdir()
    content = entry.read_bytes()
    draw = random.Random(0)
    for _ in range(20):
        first, second = draw.sample(range(len(content)), 2)
        damaged = bytearray(content)
        damaged[first], damaged[second] = damaged[second], damaged[first] ^ (damaged[first] == damaged[second])
        entry.write_bytes(damaged)
        assert load(images, tmp_path).fingerprint == expected
        assert entry.read_bytes() == content


def test_entries_that_changed_places_are_noticed(images: Path, expected: str, tmp_path: Path) -> None:
    other = make_images(tmp_path / "others", size=20)  # as many, so that the files have the same length
    load(images, tmp_path)
    expected_other = load(other, tmp_path).fingerprint
    first, second = sorted((tmp_path / "cache").iterdir())
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    assert expected != expected_other
    assert load(images, tmp_path).fingerprint == expected
    assert load(other, tmp_path).fingerprint == expected_other


# --- disks ---


def warning(data_dir: Path) -> str:
    return (
        f"warning: decoded images cannot be kept in {str(data_dir / 'cache')!r} (No space left on device); "
        "the next run will decode them again\n"
    )


@pytest.mark.parametrize("room", [0, 1, 100, COUNT * 3072 // 2], ids=lambda room: f"{room} bytes left")
def test_a_full_disk_costs_the_cache_and_not_the_run(
    room: int,
    images: Path,
    expected: str,
    small_disk: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    data_dir = small_disk("1m")
    (data_dir / "cache").mkdir()
    with (data_dir / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(data_dir / "filling", (data_dir / "filling").stat().st_size - room)
    assert load(images, data_dir).fingerprint == expected
    assert capfd.readouterr().err == warning(data_dir)
    assert entries(data_dir) == []
    (data_dir / "filling").unlink()
    assert load(images, data_dir).fingerprint == expected
    assert entries(data_dir) == [".images"] and capfd.readouterr().err == ""


@pytest.mark.parametrize("files", [1, 2], ids=["no room for a folder", "no room for a file"])
def test_a_disk_that_takes_no_further_file_costs_the_cache_and_not_the_run(
    files: int, images: Path, expected: str, small_disk: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    data_dir = small_disk("1m", f"nr_inodes={files}")
    assert load(images, data_dir).fingerprint == expected
    assert capfd.readouterr().err == warning(data_dir)


def test_a_read_only_disk_is_an_error_unless_it_has_the_cache(
    images: Path, expected: str, small_disk: Callable[..., Path]
) -> None:
    data_dir = small_disk("1m")
    assert os.system(f"mount -o remount,ro {data_dir}") == 0
    with pytest.raises(UserError, match=r"data_dir must be writable, but '.*/cache' is not: Read-only file system$"):
        load(images, data_dir)
    assert os.system(f"mount -o remount,rw {data_dir}") == 0
    load(images, data_dir)
    assert os.system(f"mount -o remount,ro {data_dir}") == 0
    assert load(images, data_dir).fingerprint == expected


def test_without_locks_every_process_builds_for_itself(
    images: Path, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file system without locks can be made here, so that the refusal is made up."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    part = part_of(images, tmp_path / "data")
    monkeypatch.setattr(fcntl, "flock", refuse)
    processes = [start(load_and_tell, images, tmp_path / "data", tmp_path / f"{i}") for i in range(2)]
    assert [end(process) for process in processes] == [0, 0]
    assert [(tmp_path / f"{i}").read_text().split()[1] for i in range(2)] == [expected] * 2
    assert entries(tmp_path / "data") == [".images"] and not part.exists()


def test_an_entry_that_another_user_is_building_is_built_beside_it(tmp_path: Path) -> None:
    """Their file can't be opened, and so not be waited for."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    root = make_images(tmp_path / "images", size=20)
    part = part_of(root, tmp_path / "data")
    part.touch(0o600)
    for folder, mode in ((tmp_path, 0o755), (part.parent, 0o777)):
        folder.chmod(mode)

    def load_as_nobody() -> None:
        os.chdir(tmp_path)  # the folders above may be closed to others
        os.setuid(65534)
        decode = eva.image_cache._decode

        def decode_beside_others(data: bytes) -> np.ndarray:
            for left in part.parent.relative_to(tmp_path).glob("*.*.part"):
                eva.image_cache._remove_left(left)  # as a process does that builds other images
            return decode(data)

        eva.image_cache._decode = decode_beside_others
        load_and_tell(Path("images"), Path("data"), part.parent.relative_to(tmp_path) / "told")

    assert end(start(load_as_nobody)) == 0
    assert (part.parent / "told").read_text().startswith(f"{COUNT} ")
    assert entries(tmp_path / "data") == ["", ".images", ".part"]
