"""The image files of a folder: which there are, and what they contain, without reading again what did not change."""

import errno
import hashlib
import os
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from eva.config import UserError
from eva.files import write_atomically
from eva.text import printable

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"})

# How the name of an index ends. Its content has this version.
INDEX, INDEX_VERSION = ".index", 1
# A file that changed so shortly before it was looked at may change again without a later date: clocks of file systems
# have steps of up to 2 s.
RACY_NANOSECONDS = 2 * 10**9
# Files that a thread reads at a time; a task of its own for each would take as long as the reading.
FILES_PER_TASK = 256

DIGEST_SIZE = hashlib.sha256().digest_size
Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Listing:
    """Image files as a look at their folders found them.

    Attributes:
        paths: Sorted posix paths below the root.
        states: int64 (N, 5), a row a file: what the system changes with its content, see `_state`.
    """

    paths: list[str]
    states: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class ImageFiles:
    """All image files of a data set, in its order.

    Attributes:
        root: The folder of the data set.
        listing: The files.
        looked: Nanoseconds since the epoch, from before the first of them was looked at.
    """

    root: Path
    listing: Listing
    looked: int

    def __len__(self) -> int:
        return len(self.listing)

    def read(self, index: int) -> bytes:
        """Returns what a file contains."""
        with open(os.path.join(self.root, self.listing.paths[index]), "rb", buffering=0) as file:
            return file.readall()


def joined(listings: Iterable[Listing]) -> Listing:
    """Returns several listings as one, in their order."""
    listings = list(listings)
    return Listing(
        [path for listing in listings for path in listing.paths],
        np.concatenate([listing.states for listing in listings]),
    )


# --- which files there are ---


def names_image(name: str) -> bool:
    """Tells whether a file is an image by its name."""
    return name[name.rfind(".") :].lower() in EXTENSIONS


def list_images(root: Path, folder: Path, left_out: Counter[str]) -> Listing:
    """Returns the images in a folder below `root` and in the folders within it, but for links to folders.

    What is left out is counted in `left_out`, by what it is; what is hidden is not.

    Raises:
        UserError: What has an image's name is no file.
        OSError: A folder cannot be read.
    """
    paths, states = list[str](), array("q")
    for path, status in _walk(f"{folder}", f"{folder.relative_to(root).as_posix()}/", left_out):
        paths.append(path)
        states.extend(_state(status))
    order = sorted(range(len(paths)), key=paths.__getitem__)
    rows = np.frombuffer(states, np.int64).reshape(-1, 5)
    return Listing([paths[index] for index in order], rows[order])


def _walk(folder: str, prefix: str, left_out: Counter[str]) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                if entry.is_symlink():
                    left_out["links to folders"] += 1
                else:
                    yield from _walk(entry.path, f"{prefix}{name}/", left_out)
            elif not names_image(name):
                left_out[printable(Path(name).suffix.lower()) or "without an ending"] += 1
            else:
                yield prefix + name, _file_status(entry)


def _file_status(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        status = entry.stat()
        is_file = S_ISREG(status.st_mode)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        is_file = False
    if not is_file:  # reading a pipe or a device might never end
        raise UserError(f"cannot read image {entry.path!r}: it is no file, or a link to none")
    return status


def _state(status: os.stat_result) -> tuple[int, int, int, int, int]:
    # No user can set a file's time of change (ctime): of a file that was written to, it is another one.
    inode, device = status.st_ino & 2**63 - 1, status.st_dev & 2**63 - 1
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, inode, device


# --- what they contain ---


def contents(
    files: ImageFiles, folder: Path, pool: Executor, ahead: int, advance: Callable[[int], object]
) -> tuple[NDArray[np.uint8], Callable[[], None]]:
    """Returns the sha256 of each file, (N, 32), and what keeps them in an index for the next time.

    As git's index does, it has the state of each file beside its digest, and a file of the same state is not read
    again. That a state is the same does not say so if the file had just changed when it was looked at ("racy"): such
    a file is read again until it is older.

    Args:
        files: The files.
        folder: Where indexes are, one for each folder of a data set.
        pool: Its threads read.
        ahead: Tasks that may wait in it.
        advance: Called with numbers of files that are done.

    Raises:
        UserError: A file cannot be read.
    """
    path = folder / f"{hashlib.sha256(os.fsencode(os.path.realpath(files.root))).hexdigest()}{INDEX}"
    found, known = _known(files.listing, path)
    unknown = np.flatnonzero(~known)
    advance(len(files) - len(unknown))
    tasks = [unknown[start : start + FILES_PER_TASK] for start in range(0, len(unknown), FILES_PER_TASK)]
    for task, read in zip(tasks, in_order(pool, partial(_digest, files), tasks, ahead), strict=True):
        found[task] = read
        advance(len(task))

    def keep() -> None:
        if len(unknown):
            with suppress(OSError):  # the next time takes longer
                _write_index(path, files, found)

    return found, keep


def in_order(
    pool: Executor, function: Callable[[Task], Outcome], tasks: Iterable[Task], ahead: int
) -> Iterator[Outcome]:
    """Yields the outcomes of tasks in their order, of which only so many are begun before the first is taken."""
    begun = deque[Future[Outcome]]()
    for task in tasks:
        begun.append(pool.submit(function, task))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _digest(files: ImageFiles, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
    found = bytearray()
    for index in indices.tolist():
        try:
            found += hashlib.sha256(files.read(index)).digest()
        except OSError as error:
            path = str(files.root / files.listing.paths[index])
            raise UserError(f"cannot read image {path!r}: {error.strerror or error}") from None
    return np.frombuffer(found, np.uint8).reshape(-1, DIGEST_SIZE)


# An index is a digest of the rest and of its own name; then how many files there are, their states, their digests, and
# their paths, a line each.


def _known(listing: Listing, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Returns digests (N, 32) from an index, and of which files they are theirs."""
    found, known = np.zeros((len(listing), DIGEST_SIZE), np.uint8), np.zeros(len(listing), bool)
    try:
        content = path.read_bytes()
    except OSError:
        return found, known
    rest = memoryview(content)[DIGEST_SIZE:]
    if content[:DIGEST_SIZE] != _seal(path, rest):
        return found, known
    count = int.from_bytes(rest[:8], "little")
    states = np.frombuffer(rest[8:], np.int64, count * 5).reshape(-1, 5)
    kept = np.frombuffer(rest[8 + states.nbytes :], np.uint8, count * DIGEST_SIZE).reshape(-1, DIGEST_SIZE)
    paths = bytes(rest[8 + states.nbytes + kept.nbytes :])
    if paths == lines(listing.paths):
        here = there = np.arange(count)
    else:
        place = {line: index for index, line in enumerate(paths.decode().split("\n"))}
        pairs = [(index, place[line]) for index, line in enumerate(listing.paths) if line in place]
        here, there = np.array(pairs, np.int64).reshape(-1, 2).T
    same = (listing.states[here] == states[there]).all(axis=1)
    found[here[same]], known[here[same]] = kept[there[same]], True
    return found, known


def _write_index(path: Path, files: ImageFiles, found: NDArray[np.uint8]) -> None:
    states = files.listing.states.copy()
    states[states[:, 1:3].max(axis=1) > files.looked - RACY_NANOSECONDS] = 0  # no file has this state
    rest = b"".join([len(files).to_bytes(8, "little"), states.tobytes(), found.tobytes(), lines(files.listing.paths)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(_seal(path, rest) + rest))


def _seal(path: Path, rest: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(f"{INDEX_VERSION} {path.name}\n".encode())
    digest.update(rest)
    return digest.digest()


def lines(paths: list[str]) -> bytes:
    """Returns paths, which have no line breaks in them, as one text."""
    return "\n".join(paths).encode()
