"""CIFAR-10, digits and image folders as uint8 arrays; fixed splits, channel statistics, loaders."""

import errno
import fcntl
import hashlib
import http.client
import io
import json
import math
import os
import signal
import sys
import tarfile
import threading
import unicodedata
import urllib.error
import uuid
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from eva.config import UserError, unknown_name
from eva.text import printable

IMAGE_SIZE = 32
# How often workers may die over one batch.
MOST_DEATHS = 3

# Decoded folders are kept under this version: raise it when the same files would decode to other pixels.
CACHE_VERSION = 1
# How the name of an entry ends, and of one that is being built.
ENTRY, PART = ".images", ".part"
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"})
# The decoders behind those extensions. Pillow would otherwise try all that it has, Ghostscript's included.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")

DIGITS_TEST_FRACTION = 0.2

# Every fixed random choice has a stream of its own, so that none is a function of another.
HOLD_OUT_STREAM, LIMIT_STREAM, DIGITS_STREAM = 1, 2, 3
# First in the entropy and larger than any seed in use: NumPy pads entropy with zeros, so [seed, epoch] alone
# would be the stream of [seed, epoch, 0], which a policy may well use for sample 0.
ORDER_STREAM = int.from_bytes(b"order")

Policy = Callable[[NDArray[np.uint8], tuple[int, int, int] | None], torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]
Sample = tuple[torch.Tensor, int]


@dataclass(frozen=True)
class Split:
    """Images in memory with their labels and names.

    Attributes:
        images: uint8 RGB of shape (N, 32, 32, 3).
        labels: int64 class indices of shape (N,).
        ids: Names of shape (N,) that stay the same wherever the data lie: "train/00017" (split and index) for
            cifar10 and digits, the path below the data root ("train/cat/0001.jpg") for folders.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64] | NDArray[np.bool_] | slice) -> "Split":
        """Returns the images at these indices (or of this boolean mask or slice), in that order.

        As with any NumPy array, a slice gives a view, the others a copy.
        """
        return Split(self.images[indices], self.labels[indices], self.ids[indices])


@dataclass(frozen=True)
class Dataset:
    """Train and test images of one data set.

    Attributes:
        name: The data specification it was loaded from.
        classes: Class names; a label is an index into them.
        fingerprint: sha256 (hex) over class names, images and labels of both splits, wherever they came from.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    fingerprint: str


def load_dataset(
    data: str, data_dir: Path = Path("data"), *, workers: int | None = None, progress: bool = False
) -> Dataset:
    """Loads a data set into memory.

    Args:
        data: "cifar10" (downloaded by torchvision, checksums verified), "digits" (scikit-learn's 1,797
            handwritten digits, 20 % of each class for test) or "folder:PATH" with PATH/train/CLASS/* and
            PATH/test/CLASS/*. Images of a folder may have any size: they are decoded and resized to 32x32
            once (the aspect ratio is not kept, transparency is dropped, EXIF orientation is applied, of an
            animation the first picture is taken), then cached by content.
        data_dir: Folder for downloads and for the cache of decoded images; made when needed.
        workers: Threads that read and decode a folder; None for one per CPU.
        progress: Whether to tell what happens: progress bars while reading and decoding a folder, and a line
            about the files in it that are no images by their names.

    Raises:
        UserError: `data` names nothing known; CIFAR-10 can be neither found nor fetched, or its checksum
            differs; the folder lacks a split or class, has an empty class, a name that is no text, or a link
            that leads nowhere or around, or holds images that cannot be read (they are named); `data_dir`
            cannot be written.
    """
    if data == "cifar10":
        classes, train, test = _load_cifar10(data_dir)
    elif data == "digits":
        classes, train, test = _load_digits()
    elif data.startswith("folder:"):
        classes, train, test = _load_folder(data.removeprefix("folder:"), data_dir, workers, progress)
    else:
        raise UserError(unknown_name("data", data, ("cifar10", "digits", "folder:PATH")))
    return Dataset(data, classes, train, test, _fingerprint(classes, train, test))


def _fingerprint(classes: Sequence[str], train: Split, test: Split) -> str:
    # The sizes in the header make the concatenation of the arrays unambiguous.
    digest = hashlib.sha256(json.dumps([list(classes), len(train), len(test)]).encode())
    for split in (train, test):
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(split.labels.astype("<i8").data)
    return digest.hexdigest()


def _numbered(name: str, images: NDArray[np.uint8], labels: Iterable[int]) -> Split:
    ids = np.array([f"{name}/{index:05d}" for index in range(len(images))])
    return Split(np.ascontiguousarray(images), np.asarray(labels, np.int64), ids)


# --- CIFAR-10 and digits ---


def _load_cifar10(data_dir: Path) -> tuple[tuple[str, ...], Split, Split]:
    from torchvision.datasets import CIFAR10

    # torchvision unpickles a file only if its MD5 is right; otherwise it fetches the archive again.
    try:
        train = CIFAR10(str(data_dir), train=True, download=True)
        test = CIFAR10(str(data_dir), train=False)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        archive = data_dir / CIFAR10.filename
        found = f" ({archive} has a wrong checksum)" if archive.exists() else ""
        raise UserError(
            f"could not fetch {CIFAR10.url}: {reason}{found}; without a network use --data=digits, "
            f"--data=folder:PATH, or put {CIFAR10.filename} in data_dir={str(data_dir)!r}"
        ) from None
    except RuntimeError:
        raise UserError(
            f"CIFAR-10 in data_dir={str(data_dir)!r} has a wrong checksum; delete {CIFAR10.filename} and "
            f"{CIFAR10.base_folder}/ there to have them fetched again"
        ) from None
    except (tarfile.TarError, EOFError, zlib.error) as error:  # a member that would leave the folder is one
        raise UserError(f"CIFAR-10 in data_dir={str(data_dir)!r} cannot be extracted: {error}") from None
    except OSError as error:
        raise UserError(f"cannot keep CIFAR-10 in data_dir={str(data_dir)!r}: {error.strerror or error}") from None
    return (
        tuple(train.classes),
        _numbered("train", train.data, train.targets),
        _numbered("test", test.data, test.targets),
    )


def _load_digits() -> tuple[tuple[str, ...], Split, Split]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.stack(
        [cv2.resize(image, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_LINEAR) for image in digits.images]
    )  # (N, 32, 32), 0..16
    images = np.rint(grey * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=3)
    labels = digits.target.astype(np.int64)
    shares = [round(DIGITS_TEST_FRACTION * size) for size in np.bincount(labels).tolist()]
    in_test = _choose(labels, shares, DIGITS_STREAM)
    return (
        tuple(str(name) for name in digits.target_names),
        _numbered("train", images[~in_test], labels[~in_test]),
        _numbered("test", images[in_test], labels[in_test]),
    )


# --- image folders ---


def _load_folder(
    path: str, data_dir: Path, workers: int | None, progress: bool
) -> tuple[tuple[str, ...], Split, Split]:
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(f"data=folder:PATH needs an existing folder, but got PATH={path!r}")
    left_out: Counter[str] = Counter()
    try:
        train, test = (_list_images(root, split, left_out) for split in ("train", "test"))
    except OSError as error:
        raise UserError(f"cannot list {str(error.filename)!r}: {error.strerror}") from None
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))[:5]
    told = ", ".join(f"{count:,} {what}" for what, count in most) + ", and others" * (len(left_out) > len(most))
    _check_classes(root, train, test, told)
    if told and progress:
        print(f"left out in {str(root)!r}: {told} (images: {', '.join(sorted(EXTENSIONS))})")

    classes = tuple(train)
    paths = [path for by_class in (train, test) for name in classes for path in by_class[name]]
    _check_names(root, paths)
    with warnings.catch_warnings():
        # Pillow warns about images so large that they may be an attack: they are told as unreadable, by name.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        images = _decoded(root, paths, data_dir / "cache", workers or os.cpu_count() or 1, progress)
    sizes = [len(by_class[name]) for by_class in (train, test) for name in classes]
    labels = np.repeat(np.tile(np.arange(len(classes)), 2), sizes)
    both = Split(images, labels, np.array(paths))
    num_train = sum(sizes[: len(classes)])
    return classes, both.take(slice(num_train)), both.take(slice(num_train, None))


def _list_images(root: Path, split: str, left_out: Counter[str]) -> dict[str, list[str]]:
    """Returns the images of each class, as sorted posix paths below root, classes sorted by name.

    What is left out is counted in `left_out`, by what it is; what is hidden is not.
    """
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"{str(root)!r} must hold {split}/CLASS/* images, but has no folder {split!r}")
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    for entry in entries:
        if entry.is_symlink():
            _check_link(entry)
    names = [entry.name for entry in entries if entry.is_dir()]
    if not names:
        raise UserError(f"{str(folder)!r} must hold a folder of images per class, but has none")
    beside = [entry.name for entry in entries if entry.name not in names and _names_image(entry.name)]
    left_out.update("images beside the folders of classes" for _ in beside)
    return {name: sorted(_walk_images(root, folder / name, left_out)) for name in names}


def _check_link(link: Path) -> None:
    """Raises a UserError if what stands for a class is a link to nothing, or to a folder that it lies in."""
    if not link.exists():
        raise UserError(f"{str(link)!r} must be a folder, but is a link to {os.readlink(link)!r}, which leads nowhere")
    if link.parent.resolve().is_relative_to(link.resolve()):
        raise UserError(f"{str(link)!r} must be a folder of one class, but is a link to a folder around it")


def _names_image(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS


def _walk_images(root: Path, folder: Path, left_out: Counter[str]) -> Iterator[str]:
    def refuse(error: OSError) -> None:  # os.walk would silently leave out a folder that it cannot read
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        left_out.update("links to folders" for name in folders if os.path.islink(os.path.join(parent, name)))
        for name in names:
            path = Path(parent) / name
            if name.startswith("."):
                continue
            if not _names_image(name):
                left_out[printable(path.suffix.lower()) or "without an ending"] += 1
            elif not path.is_file():  # reading a pipe or a device might never end
                raise UserError(f"cannot read image {str(path)!r}: it is no file, or a link to none")
            else:
                yield path.relative_to(root).as_posix()


def _check_names(root: Path, paths: Iterable[str]) -> None:
    """Raises a UserError if a name would break lines, or cannot be written as text."""
    for path in paths:
        # The first is fast, and refuses some that are sound. Bytes that are no UTF-8 are lone surrogates (Cs).
        if not path.isprintable() and {"Cc", "Cs"} & set(map(unicodedata.category, path)):
            raise UserError(f"names in {str(root)!r} must be UTF-8 without control characters, but got {path!r}")


def _check_classes(root: Path, train: dict[str, list[str]], test: dict[str, list[str]], left_out: str) -> None:
    problems = []
    if missing := sorted(train.keys() - test.keys()):
        problems.append(f"missing from test: {printable(', '.join(missing))}")
    if extra := sorted(test.keys() - train.keys()):
        problems.append(f"only in test: {printable(', '.join(extra))}")
    if problems:
        raise UserError(f"train and test of {str(root)!r} must have the same classes, but {'; '.join(problems)}")
    empty = [
        f"class {name!r} of {split} is empty"
        for split, by_class in (("train", train), ("test", test))
        for name, files in by_class.items()
        if not files
    ]
    if empty:
        found = f"left out: {left_out}; " if left_out else ""
        raise UserError(f"{'; '.join(empty)} in {str(root)!r} ({found}images: {', '.join(sorted(EXTENSIONS))})")


def _decoded(root: Path, paths: list[str], cache: Path, workers: int, progress: bool) -> NDArray[np.uint8]:
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


# --- fixed splits and statistics ---


def hold_out(train: Split, fraction: float, num_classes: int) -> tuple[Split, Split]:
    """Returns (train, val): the same stratified split for every run, whatever its seed; order is kept.

    Args:
        train: All training images.
        fraction: Share of each class that goes to val, rounded to whole images; 0 leaves val empty.
        num_classes: Number of classes K.

    Raises:
        UserError: With `fraction` > 0, a class would have no image left in val or in train.
    """
    if fraction == 0:
        return train, train.take(np.zeros(len(train), bool))
    sizes = np.bincount(train.labels, minlength=num_classes).tolist()
    shares = [round(fraction * size) for size in sizes]
    for label, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        if not 0 < share < size:
            raise UserError(
                f"val_fraction must leave every class an image in train and in val, but got {fraction} "
                f"with {size} image(s) of class number {label}"
            )
    in_val = _choose(train.labels, shares, HOLD_OUT_STREAM)
    return train.take(~in_val), train.take(in_val)


def limit(split: Split, count: int, num_classes: int) -> Split:
    """Returns `count` images, the same for every run, with about the same share of each class; order is kept.

    Every class gets one image, then the rest are apportioned to what the classes have left by largest
    remainders (Hamilton's method), so that exactly `count` come back.

    Raises:
        UserError: `count` is larger than the split or smaller than the number of classes.
    """
    if not num_classes <= count <= len(split):
        raise UserError(
            f"train_limit must be between {num_classes} (one per class) and {len(split)} (all images), but got {count}"
        )
    spare = np.bincount(split.labels, minlength=num_classes) - 1
    if spare.min() < 0:
        raise UserError(f"train_limit needs an image of every class, but class number {spare.argmin()} has none")
    quotas, remainders = np.divmod((count - num_classes) * spare, max(spare.sum(), 1))
    largest = np.argsort(-remainders, kind="stable")[: count - num_classes - quotas.sum()]
    quotas[largest] += 1
    return split.take(_choose(split.labels, (1 + quotas).tolist(), LIMIT_STREAM))


def _choose(labels: NDArray[np.int64], shares: Sequence[int], stream: int) -> NDArray[np.bool_]:
    """Returns a mask over the labels that holds shares[k] images of class k, a fixed random choice."""
    chosen = np.zeros(len(labels), bool)
    for label, share in enumerate(shares):
        # RandomState, because NumPy froze its streams (NEP 19); those of default_rng may change.
        order = np.random.RandomState([stream, label]).permutation(np.flatnonzero(labels == label))
        chosen[order[:share]] = True
    return chosen


def channel_statistics(
    images: NDArray[np.uint8],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Returns mean and population deviation of each channel of (N, H, W, 3) images, in units of [0, 1].

    Exact up to the last division: both come from the integer histogram of each channel.
    """
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 1024):  # bincount copies to int64: a part at a time
        pixels = images[start : start + 1024].reshape(-1, 3)
        counts += [np.bincount(pixels[:, channel], minlength=256) for channel in range(3)]
    levels = np.arange(256)
    number = int(counts[0].sum())
    means, deviations = [], []
    for count in counts:
        total, squares = (
            int(count @ levels),
            int(count @ levels**2),
        )  # Python's integers: the products are beyond 64 bits
        means.append(total / number / 255)
        deviations.append(math.sqrt(number * squares - total**2) / number / 255)
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])


# --- loaders ---


class PolicyImages(torch.utils.data.Dataset[Sample]):
    """Images seen through a policy, addressed by (epoch, index); stateless: any worker may serve any batch.

    Args:
        split: The images.
        policy: Turns a uint8 (H, W, 3) image and a draw (seed, epoch, index) into float32 (3, H, W).
        seed: Seed of the draws; None to call the policy without a draw.
    """

    def __init__(self, split: Split, policy: Policy, seed: int | None) -> None:
        self.split = split
        self.policy = policy
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        draw = None if self.seed is None else (self.seed, epoch, index)
        return self.policy(self.split.images[index], draw), int(self.split.labels[index])

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Sample]:
        return [self[key] for key in keys]


class ShuffledBatches(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """The batches of an epoch as lists of (epoch, index), in an order that depends on (seed, epoch) alone.

    The last batch may be smaller; one of a single image is dropped (unless all are), as batch normalization
    cannot normalize one value. Each iteration covers one epoch from `start_batch`, then `next_epoch` is the
    following one.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.next_epoch = 0
        self.start_batch = 0

    @property
    def images_per_epoch(self) -> int:
        drops_last = self.batch_size > 1 and self.num_images % self.batch_size == 1
        return self.num_images - drops_last

    def __len__(self) -> int:
        return math.ceil(self.images_per_epoch / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches(self.next_epoch, self.start_batch)

    def _batches(self, epoch: int, start_batch: int) -> Iterator[list[tuple[int, int]]]:
        # Advance at the first batch, not in __iter__: a DataLoader with workers calls that twice at first.
        self.next_epoch, self.start_batch = epoch + 1, 0
        order = np.random.default_rng([ORDER_STREAM, self.seed, epoch]).permutation(self.num_images).tolist()
        for start in range(start_batch * self.batch_size, self.images_per_epoch, self.batch_size):
            yield [(epoch, index) for index in order[start : min(start + self.batch_size, self.images_per_epoch)]]


class TrainLoader:
    """Training batches that depend on (seed, epoch, batch number) alone, for any number of workers.

    Attributes:
        loader: The DataLoader underneath. Iterating over it directly gives one epoch each time, the one after
            the last epoch begun (0 at first); that is what torch_lr_finder's `range_test` does.
        num_images: Images that an epoch delivers: all, less one if it would be a last batch of its own.
    """

    def __init__(self, images: PolicyImages, batches: ShuffledBatches, workers: int) -> None:
        self._batches = batches
        self._make = partial(_data_loader, images, workers, batch_sampler=batches)
        self.loader = self._make()
        self.num_images = batches.images_per_epoch

    def __len__(self) -> int:
        """Returns the number of batches in an epoch."""
        return len(self._batches)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Returns the batches of an epoch from `start_batch` on: float32 (B, 3, 32, 32) and int64 (B,).

        Beginning an epoch ends the one before, also if that was left half-way. If a worker dies, others take over.

        Raises:
            ValueError: `start_batch` is not in [0, len(self)].
        """
        self.start(epoch, start_batch)
        begin = partial(self._begin, epoch)
        return _surviving(begin, start_batch) if self.loader.num_workers else begin(start_batch, False)

    def _begin(self, epoch: int, batch: int, anew: bool) -> Iterator[Batch]:
        if anew:
            self.loader = self._make()
        self.start(epoch, batch)
        return iter(self.loader)

    def start(self, epoch: int, start_batch: int = 0) -> None:
        """Makes the next iteration over `loader` begin at a batch of an epoch.

        Raises:
            ValueError: `start_batch` is not in [0, len(self)].
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch must be between 0 and {len(self)}, but got {start_batch}")
        self._batches.next_epoch, self._batches.start_batch = epoch, start_batch


def train_loader(split: Split, policy: Policy, batch_size: int, seed: int, workers: int | None) -> TrainLoader:
    """Returns shuffled, augmented batches.

    Args:
        split: The training images.
        policy: Turns a uint8 (H, W, 3) image and a draw (seed, epoch, index) into float32 (3, H, W); it must
            be picklable and depend on nothing else.
        batch_size: Images per batch; the last one may be smaller.
        seed: Seed of the order and of the augmentation, not negative.
        workers: Processes that apply the policy, 0 for none; None for 0 on a CPU (they would only take cores
            from the network) and up to 8 beside a GPU.

    Raises:
        UserError: `batch_size` is not between 1 and the number of images.
    """
    if not 1 <= batch_size <= len(split):
        raise UserError(
            f"batch_size must be between 1 and the number of train images, but got {batch_size=} "
            f"with {len(split)} train images"
        )
    batches = ShuffledBatches(len(split), batch_size, seed)
    return TrainLoader(PolicyImages(split, policy, seed), batches, _num_workers(workers))


class EvalLoader:
    """All images in their order, once in each iteration; see `eval_loader`."""

    def __init__(self, images: PolicyImages, batch_size: int, workers: int) -> None:
        self._keys = [(0, index) for index in range(len(images))]
        self._batch_size = batch_size
        self._make = partial(_data_loader, images, workers, batch_size=batch_size)
        self._loader = self._make(sampler=self._keys)

    def __len__(self) -> int:
        """Returns the number of batches."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        return _surviving(self._begin, 0) if self._loader.num_workers else self._begin(0, False)

    def _begin(self, batch: int, anew: bool) -> Iterator[Batch]:
        if anew:
            self._loader = self._make(sampler=self._keys)
        return iter(self._make(sampler=self._keys[batch * self._batch_size :]) if batch else self._loader)


def eval_loader(split: Split, policy: Policy, batch_size: int, workers: int | None) -> EvalLoader:
    """Returns a loader of all images in their order, without draws: float32 (B, 3, 32, 32) and int64 (B,).

    Args:
        split: The images.
        policy: Called with None for the draw.
        batch_size: Images per batch; the last one may be smaller.
        workers: As for `train_loader`.
    """
    return EvalLoader(PolicyImages(split, policy, seed=None), batch_size, _num_workers(workers))


def _surviving(begin: Callable[[int, bool], Iterator[Batch]], batch: int) -> Iterator[Batch]:
    """Yields batches from a number on. If a worker process dies, new ones go on at the batch that is owed.

    Args:
        begin: Returns the batches from a number on, from new workers if it is told so.
        batch: The first one's number.

    Raises:
        UserError: They die again and again over one batch.
    """
    deaths = 0
    batches: Iterator[Batch] | None = None
    while True:
        try:
            if batches is None:  # workers that live on from another iteration may have died since
                batches = _begun(begin, batch, deaths > 0)
            item = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not _tells_of_a_death(error):
                raise
            deaths += 1
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if deaths > MOST_DEATHS:
                raise UserError(f"data workers die ({reason}); choose fewer --workers, they may lack memory") from None
            print(f"warning: {reason}; others go on with batch {batch}", file=sys.stderr, flush=True)
            batches = None
            continue
        yield item
        batch, deaths = batch + 1, 0


def _tells_of_a_death(error: Exception) -> bool:
    """Tells whether an exception comes of a worker's death, rather than that a worker raised it."""
    if str(error).startswith("Caught "):  # as torch passes on what a worker raised
        return False
    lost_on_the_way = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    return lost_on_the_way or any(told in str(error) for told in ("DataLoader worker (pid", "Pin memory thread exited"))


def _begun(begin: Callable[[int, bool], Iterator[Batch]], batch: int, anew: bool) -> Iterator[Batch]:
    # torch would raise a worker's death in the main thread wherever that is, in the middle of a step for one; without
    # its handler it looks for the living every five seconds while it waits for a batch.
    before = signal.getsignal(signal.SIGCHLD)
    batches = begin(batch, anew)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)
    return batches


def _num_workers(workers: int | None) -> int:
    if workers is not None:
        return workers
    return min(8, (os.cpu_count() or 1) - 1) if torch.cuda.is_available() else 0


def _data_loader(images: PolicyImages, workers: int, **batching: Any) -> "torch.utils.data.DataLoader[Sample]":
    return torch.utils.data.DataLoader(
        images,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=workers > 0 and torch.cuda.is_available(),
        collate_fn=_stack,
        worker_init_fn=_use_one_thread,
        # A DataLoader draws a number at each iteration: from torch's global stream it would shift dropout.
        generator=torch.Generator(),
        **batching,
    )


def _stack(samples: Sequence[Sample]) -> Batch:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


def _use_one_thread(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
