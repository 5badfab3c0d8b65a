"""Image files decoded once: 32x32 pixels in a cache that is keyed by what the files contain."""

import errno
import fcntl
import hashlib
import io
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from eva.config import UserError
from eva.image_files import DIGEST_SIZE, FILES_PER_TASK, ImageFiles, contents, in_order, lines
from eva.stored_images import IMAGE_BYTES, MOMENTS_BYTES, SHAPE, Images, StoredImages, moments
from eva.stored_images import IMAGE_SIZE as IMAGE_SIZE

# Decoded folders are kept under this version: raise it when the same files would decode to other pixels, or entries
# look different.
CACHE_VERSION = 2
# How the name of an entry ends, and of one that is being built.
ENTRY, PART = ".images", ".part"
# The decoders behind the endings of images. Pillow would otherwise try all that it has, Ghostscript's included.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")

Block: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.uint32]]  # images and their moments


def decoded(
    files: ImageFiles,
    data_dir: Path,
    fingerprint: Callable[[Images], str],
    workers: int,
    progress: bool,
) -> tuple[Images, str]:
    """Returns the images, (N, 32, 32, 3), and their fingerprint; from the cache if these files were decoded before.

    The cache is keyed by the content of every file, never by its date, so that a changed file cannot bring a
    stale image; a file that changes while it is decoded is refused. Of several processes that need the same
    images one decodes them, and the others wait for it.

    Args:
        files: The image files.
        data_dir: The folder that has the cache and the index of what files contain.
        fingerprint: Digests all images, a sha256 (hex); it finds damage too.
        workers: Threads that read and decode.
        progress: Whether to show progress bars.
    """
    bar = partial(tqdm, total=len(files), unit="image", disable=None if progress else True)  # None: on terminals only
    with ThreadPoolExecutor(workers) as pool:
        with bar(desc="reading") as shown:
            digests, keep_index = contents(files, data_dir / "index", pool, 2 * workers, shown.update)
        key = hashlib.sha256(f"{CACHE_VERSION} {IMAGE_SIZE} {len(files)}\n".encode())
        for content in (lines(files.listing.paths), digests.data):
            key.update(content)
        cached = data_dir / "cache" / f"{key.hexdigest()}{ENTRY}"

        def decode() -> Iterator[Block]:
            with bar(desc="decoding") as shown:
                yield from _decode_all(files, digests, pool, 2 * workers, shown.update)

        found = _read_entry(cached, len(files), fingerprint) or _build(cached, len(files), fingerprint, decode)
    keep_index()
    return found


def _build(
    cached: Path, count: int, fingerprint: Callable[[Images], str], decode: Callable[[], Iterator[Block]]
) -> tuple[Images, str]:
    """Returns images and fingerprint of an entry that is made, by this process or by another one meanwhile.

    If the disk takes no entry, a line says so, and they are in memory: no reason to end a run.
    """
    # Begun before the decoding: a folder that cannot be written is told at once, not after minutes.
    with _building(cached) as part:
        if found := _read_entry(cached, count, fingerprint):  # another process was building it until now
            return found
        if part is not None:
            try:
                return _write_entry(part, cached, count, fingerprint, decode())
            except OSError as error:
                _warn_of_loss(cached, error)
        images = np.empty((count, *SHAPE), np.uint8)
        start = 0
        for block, _ in decode():
            images[start : start + len(block)] = block
            start += len(block)
        return images, fingerprint(images)


def _decode_all(
    files: ImageFiles, digests: NDArray[np.uint8], pool: Executor, ahead: int, advance: Callable[[int], object]
) -> Iterator[Block]:
    """Yields all images in their order, in blocks.

    Raises:
        UserError: Some of them cannot be read; after all were tried.
    """
    tasks = [range(start, min(start + FILES_PER_TASK, len(files))) for start in range(0, len(files), FILES_PER_TASK)]
    problems = []
    for images, sums, told in in_order(pool, partial(_decode_some, files, digests), tasks, ahead):
        problems += told
        advance(len(images))
        yield images, sums
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"{len(problems)} unreadable image(s) in {str(files.root)!r}: {', '.join(problems[:3])}{more}; "
            "mend or remove them"
        )


def _decode_some(
    files: ImageFiles, digests: NDArray[np.uint8], indices: range
) -> tuple[NDArray[np.uint8], NDArray[np.uint32], list[str]]:
    """Returns images, their moments, and what is wrong with files, if anything."""
    images = np.zeros((len(indices), *SHAPE), np.uint8)
    problems = []
    for pixels, index in zip(images, indices, strict=True):
        path = files.listing.paths[index]
        try:
            data = files.read(index)
            if hashlib.sha256(data).digest() != digests[index].tobytes():
                raise ValueError("changed while it was read")
            pixels[:] = _resize(_decode(data))
        except UnidentifiedImageError:
            problems.append(f"{path} (not an image of a known format)")
        except Exception as error:  # Pillow's readers raise a dozen types for a broken file
            problems.append(f"{path} ({' '.join(str(error).split()) or type(error).__name__})")
    return images, moments(images), problems


def _decode(data: bytes) -> NDArray[np.uint8]:
    """Returns the upright image, RGB of shape (H, W, 3).

    Pillow instead of OpenCV, because it refuses truncated files by default and says what is wrong; a 32x32
    JPEG takes about 50 us.
    """
    if not data:
        raise ValueError("empty file")
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        ImageOps.exif_transpose(opened, in_place=True)
        image: Image.Image = opened
        if image.mode.startswith(("I", "F")):
            # Pillow would clip those to 255 instead of scaling them.
            raise ValueError(f"more than 8 bits a channel, Pillow mode {image.mode!r}")
        if image.mode == "P":
            image = image.convert("RGBA")  # by way of RGBA, or Pillow warns about transparent palettes
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _resize(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the image at 32x32: first the sides that shrink (by area), then those that grow (cubic)."""
    height, width = image.shape[:2]
    if (height, width) == (IMAGE_SIZE, IMAGE_SIZE):
        return image
    size = (min(width, IMAGE_SIZE), min(height, IMAGE_SIZE))
    shrunk = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(shrunk, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_CUBIC), np.uint8)


# An entry of the cache has the pixels as they lie in memory, the images' moments, the fingerprint, and a digest of the
# latter two and of the entry's name. Whoever opens it computes the fingerprint from the pixels, so that neither damage
# nor two entries that changed places bring wrong images: one pass serves for both.


def _read_entry(cached: Path, count: int, fingerprint: Callable[[Images], str]) -> tuple[Images, str] | None:
    """Returns images and fingerprint of an entry that is there and intact."""
    try:
        if cached.stat().st_size != count * (IMAGE_BYTES + MOMENTS_BYTES) + 2 * DIGEST_SIZE:
            return None
        images = StoredImages.open(cached, count)
        with cached.open("rb") as file:
            file.seek(-2 * DIGEST_SIZE, os.SEEK_END)
            said, seal = file.read(DIGEST_SIZE), file.read()
    except (OSError, ValueError):
        return None
    if seal != _seal(cached, images.moments(), said) or said.hex() != fingerprint(images):
        return None
    return images, said.hex()


def _write_entry(
    part: io.FileIO, cached: Path, count: int, fingerprint: Callable[[Images], str], blocks: Iterable[Block]
) -> tuple[Images, str]:
    """Makes a cache entry of the images that come in blocks.

    Raises:
        OSError: The disk doesn't take it.
    """
    part.truncate(0)  # who held it before may have been killed while it wrote
    sums = []
    for images, sum_ in blocks:
        _write(part, images.data)
        sums.append(sum_)
    found = np.concatenate(sums)
    _write(part, found.data)
    written = StoredImages.open(Path(str(part.name)), count)
    said = fingerprint(written)
    _write(part, memoryview(bytes.fromhex(said) + _seal(cached, found, bytes.fromhex(said))))
    os.fsync(part.fileno())
    os.replace(str(part.name), cached)
    return StoredImages.open(cached, count), said


def _write(part: io.FileIO, content: memoryview) -> None:
    rest = content.cast("B")
    while rest:  # a nearly full disk takes a part, and fails at the next one
        rest = rest[part.write(rest) :]


def _seal(cached: Path, sums: NDArray[np.uint32], fingerprint: bytes) -> bytes:
    digest = hashlib.sha256(cached.name.encode())
    digest.update(sums.data)
    digest.update(fingerprint)
    return digest.digest()


def _warn_of_loss(cached: Path, error: OSError) -> None:
    print(
        f"warning: decoded images cannot be kept in {str(cached.parent)!r} ({error.strerror or error}); "
        "the next run will decode them again",
        file=sys.stderr,
    )


@contextmanager
def _building(cached: Path) -> Iterator[io.FileIO | None]:
    """Yields the file that is to become a cache entry, for this process alone; None if the disk has no room for it.

    The file itself is locked: others that want to build the same entry wait here until it is done, or has failed.
    The system frees the lock of a process that dies, so what a killed one left is known by its free lock, and removed.

    Raises:
        UserError: The folder cannot be written.
    """
    part = None
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        for left in cached.parent.glob(f"*{PART}"):
            _remove_left(left)
        part = _lock(cached.with_suffix(PART))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"data_dir must be writable, but {str(cached.parent)!r} is not: {error.strerror or error}"
            ) from None
        _warn_of_loss(cached, error)
    try:
        yield part
    finally:
        if part is not None:
            with part, suppress(OSError):
                if _is_at(part, Path(str(part.name))):  # it did not become the entry
                    os.unlink(str(part.name))


def _lock(path: Path) -> io.FileIO:
    """Returns the file at `path`, made if needed and locked; waits for the process that has it.

    Where a file system has no locks, or the file is another user's, it is a new file beside it: every process then
    builds the entry for itself, and the last one stays, which is the same as the others.
    """
    while True:
        try:
            file = _open_locked(path)
        except OSError:
            own = io.FileIO(path.with_suffix(f".{uuid.uuid4().hex}{PART}"), "xb")
            with suppress(OSError):
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells others that it is not left over
            return own
        # Whoever had it until now has renamed or removed it: what is locked then is not what the others will lock.
        if _is_at(file, path):
            return file
        file.close()


def _open_locked(path: Path) -> io.FileIO:
    file = io.FileIO(path, "ab")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another process that decodes the same images", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):
            path.unlink(missing_ok=True)
        raise
    return file


def _remove_left(path: Path) -> None:
    """Removes the unfinished entry of a process that is no more."""
    with suppress(OSError), path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, path):
            path.unlink()


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
