"""Image files decoded once: 32x32 pixels in a cache that is keyed by what the files contain."""

import errno
import fcntl
import hashlib
import io
import json
import os
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from eva.config import UserError

IMAGE_SIZE = 32

# Decoded folders are kept under this version: raise it when the same files would decode to other pixels.
CACHE_VERSION = 1
# How the name of an entry ends, and of one that is being built.
ENTRY, PART = ".images", ".part"
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"})
# The decoders behind those extensions. Pillow would otherwise try all that it has, Ghostscript's included.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")


def decoded(root: Path, paths: list[str], cache: Path, workers: int, progress: bool) -> NDArray[np.uint8]:
    """Returns the images, (N, 32, 32, 3), from the cache when these very files were decoded before.

    The cache is keyed by the content of every file, never by its date, so that a changed file cannot bring a
    stale image; a file that changes while it is decoded is refused. Of several processes that need the same
    images one decodes them, and the others wait for it.
    """
    bar = partial(tqdm, total=len(paths), unit="image", disable=None if progress else True)  # None: on terminals only
    with ThreadPoolExecutor(workers) as pool:
        digests = list(bar(pool.map(partial(_digest, root), paths), "reading"))
        facts = json.dumps([CACHE_VERSION, IMAGE_SIZE, list(zip(paths, digests, strict=True))])
        cached = cache / f"{hashlib.sha256(facts.encode()).hexdigest()}{ENTRY}"
        images = np.empty((len(paths), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        if _read_cache(cached, images):
            return images
        # Begun before the decoding: a folder that cannot be written is told at once, not after minutes.
        with _building(cached) as part:
            if _read_cache(cached, images):  # another process was building it until now
                return images
            outcomes = list(bar(pool.map(partial(_decode_into, root), paths, digests, images), "decoding"))
            if problems := [problem for problem in outcomes if problem]:
                more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
                raise UserError(
                    f"{len(problems)} unreadable image(s) in {str(root)!r}: {', '.join(problems[:3])}{more}; "
                    "mend or remove them"
                )
            if part is not None:
                _keep(part, cached, images)
    return images


def _digest(root: Path, path: str) -> str:
    try:
        return hashlib.sha256((root / path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read image {str(root / path)!r}: {error.strerror or error}") from None


def _decode_into(root: Path, path: str, digest: str, pixels: NDArray[np.uint8]) -> str | None:
    """Decodes one image into `pixels`, (32, 32, 3); returns what is wrong with the file, if anything."""
    try:
        data = (root / path).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError("changed while it was read")
        pixels[:] = _resize(_decode(data))
    except UnidentifiedImageError:
        return f"{path} (not an image of a known format)"
    except Exception as error:  # Pillow's readers raise a dozen types for a broken file
        return f"{path} ({' '.join(str(error).split()) or type(error).__name__})"
    return None


def _decode(data: bytes) -> NDArray[np.uint8]:
    """Returns the upright image, RGB of shape (H, W, 3).

    Pillow instead of OpenCV, because it refuses truncated files by default and says what is wrong; a 32x32
    JPEG takes about 50 us.
    """
    if not data:
        raise ValueError("empty file")
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):
            # Pillow would clip those to 255 instead of scaling them.
            raise ValueError(f"more than 8 bits a channel, Pillow mode {image.mode!r}")
        if image.mode == "P":
            image = image.convert("RGBA")  # by way of RGBA, or Pillow warns about transparent palettes
        return np.asarray(image.convert("RGB"))


def _resize(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the image at 32x32: first the sides that shrink (by area), then those that grow (cubic)."""
    height, width = image.shape[:2]
    size = (min(width, IMAGE_SIZE), min(height, IMAGE_SIZE))
    shrunk = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(shrunk, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_CUBIC), np.uint8)


# An entry of the cache is a digest, then the pixels as they lie in memory. The digest covers the entry's name too,
# so that neither damage nor two entries that changed places bring wrong images.


def _seal(cached: Path, images: NDArray[np.uint8]) -> bytes:
    digest = hashlib.sha256(cached.name.encode())
    digest.update(images.data)
    return digest.digest()


def _read_cache(cached: Path, images: NDArray[np.uint8]) -> bool:
    """Fills `images` from the cache; returns whether it was there and intact."""
    try:
        with cached.open("rb") as file:
            seal = file.read(hashlib.sha256().digest_size)
            whole = file.readinto(images.data) == images.nbytes and not file.read(1)
    except OSError:
        return False
    return whole and seal == _seal(cached, images)


def _keep(part: io.FileIO, cached: Path, images: NDArray[np.uint8]) -> None:
    """Makes a cache entry of `images`. If that fails, a line says so: images in memory are no reason to end a run."""
    try:
        part.truncate(0)  # who held it before may have been killed while it wrote
        for content in (_seal(cached, images), images.data.cast("B")):
            rest = memoryview(content)
            while rest:  # a nearly full disk takes a part, and fails at the next one
                rest = rest[part.write(rest) :]
        os.fsync(part.fileno())
        os.replace(str(part.name), cached)
    except OSError as error:
        _warn_of_loss(cached, error)


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
