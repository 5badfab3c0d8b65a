"""CIFAR-10, digits and image folders as uint8 arrays; fixed splits, channel statistics."""

import hashlib
import http.client
import json
import math
import os
import tarfile
import time
import unicodedata
import urllib.error
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eva.config import UserError, unknown_name
from eva.image_cache import decoded
from eva.image_files import EXTENSIONS, ImageFiles, Listing, joined, list_images, names_image
from eva.stored_images import IMAGE_SIZE, Images, StoredImages
from eva.text import printable

DIGITS_TEST_FRACTION = 0.2

# Every fixed random choice has a stream of its own, so that none is a function of another.
HOLD_OUT_STREAM, LIMIT_STREAM, DIGITS_STREAM = 1, 2, 3


@dataclass(frozen=True)
class Split:
    """Images with their labels and names.

    Attributes:
        images: uint8 RGB of shape (N, 32, 32, 3): in memory, or for folders in the file of the cache. Either way an
            index, a slice or an array of indices gives an array.
        labels: int64 class indices of shape (N,).
        ids: Names of shape (N,), as text or as objects, that stay the same wherever the data lie: "train/00017"
            (split and index) for cifar10 and digits, the path below the data root ("train/cat/0001.jpg") for folders.
    """

    images: Images
    labels: NDArray[np.int64]
    ids: NDArray[Any]

    def __len__(self) -> int:
        return len(self.labels)

    def as_array(self) -> NDArray[np.uint8]:
        """Returns all images in memory, uint8 (N, 32, 32, 3): those of a file as a copy."""
        return np.asarray(self.images)

    def take(self, indices: NDArray[np.int64] | NDArray[np.bool_] | slice) -> "Split":
        """Returns the images at these indices (or of this boolean mask or slice), in that order.

        As with any NumPy array, a slice gives a view, the others a copy; of images in a file none is read.
        """
        images = self.images.take(indices) if isinstance(self.images, StoredImages) else self.images[indices]
        return Split(images, self.labels[indices], self.ids[indices])


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
    """Loads a data set; images of a folder stay in the cache's file, so that there may be more than memory holds.

    Args:
        data: "cifar10" (downloaded by torchvision, checksums verified), "digits" (scikit-learn's 1,797
            handwritten digits, 20 % of each class for test) or "folder:PATH" with PATH/train/CLASS/* and
            PATH/test/CLASS/*. Images of a folder may have any size: they are decoded and resized to 32x32
            once (the aspect ratio is not kept, transparency is dropped, EXIF orientation is applied, of an
            animation the first picture is taken), then cached by content. A file is read again only if its size,
            dates, inode or device changed, or it had changed within 2 s before it was read.
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
    if data.startswith("folder:"):
        return _load_folder(data, data_dir, workers, progress)
    if data == "cifar10":
        classes, train, test = _load_cifar10(data_dir)
    elif data == "digits":
        classes, train, test = _load_digits()
    else:
        raise UserError(unknown_name("data", data, ("cifar10", "digits", "folder:PATH")))
    return Dataset(data, classes, train, test, _fingerprint(classes, train, test))


def _fingerprint(classes: Sequence[str], train: Split, test: Split) -> str:
    # The sizes in the header make the concatenation of the arrays unambiguous.
    digest = hashlib.sha256(json.dumps([list(classes), len(train), len(test)]).encode())
    for split in (train, test):
        for start in range(0, len(split), 1024):
            digest.update(np.ascontiguousarray(split.images[start : start + 1024]).data)
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
        with members_stay_inside():
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


@contextmanager
def members_stay_inside() -> Iterator[None]:
    """Makes `tarfile` refuse members that would leave the folder (PEP 706): torchvision before 0.29.2 does not ask."""
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


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


def _load_folder(data: str, data_dir: Path, workers: int | None, progress: bool) -> Dataset:
    path = data.removeprefix("folder:")
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        raise UserError(f"data=folder:PATH needs an existing folder, but got PATH={path!r}")
    left_out: Counter[str] = Counter()
    looked = time.time_ns()
    try:
        train, test = (_list_classes(root, split, left_out) for split in ("train", "test"))
    except OSError as error:
        raise UserError(f"cannot list {str(error.filename)!r}: {error.strerror}") from None
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))[:5]
    told = ", ".join(f"{count:,} {what}" for what, count in most) + ", and others" * (len(left_out) > len(most))
    _check_classes(root, train, test, told)
    if told and progress:
        print(f"left out in {str(root)!r}: {told} (images: {', '.join(sorted(EXTENSIONS))})")

    classes = tuple(train)
    listings = [by_class[name] for by_class in (train, test) for name in classes]
    files = ImageFiles(root, joined(listings), looked)
    _check_names(root, files.listing.paths)
    sizes = [len(listing) for listing in listings]
    labels = np.repeat(np.tile(np.arange(len(classes)), 2), sizes)
    ids = np.array(files.listing.paths, object)  # np.str_ would take the longest one's room for each
    num_train = sum(sizes[: len(classes)])

    def splits(images: Images) -> tuple[Split, Split]:
        both = Split(images, labels, ids)
        return both.take(slice(num_train)), both.take(slice(num_train, None))

    def fingerprint(images: Images) -> str:
        return _fingerprint(classes, *splits(images))

    with warnings.catch_warnings():
        # Pillow warns about images so large that they may be an attack: they are told as unreadable, by name.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        images, digest = decoded(files, data_dir, fingerprint, workers or os.cpu_count() or 1, progress)
    return Dataset(data, classes, *splits(images), digest)


def _list_classes(root: Path, split: str, left_out: Counter[str]) -> dict[str, Listing]:
    """Returns the images of each class, classes sorted by name.

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
    beside = [entry.name for entry in entries if entry.name not in names and names_image(entry.name)]
    left_out.update("images beside the folders of classes" for _ in beside)
    return {name: list_images(root, folder / name, left_out) for name in names}


def _check_link(link: Path) -> None:
    """Raises a UserError if what stands for a class is a link to nothing, or to a folder that it lies in."""
    if not link.exists():
        raise UserError(f"{str(link)!r} must be a folder, but is a link to {os.readlink(link)!r}, which leads nowhere")
    if link.parent.resolve().is_relative_to(link.resolve()):
        raise UserError(f"{str(link)!r} must be a folder of one class, but is a link to a folder around it")


def _check_names(root: Path, paths: Iterable[str]) -> None:
    """Raises a UserError if a name would break lines, or cannot be written as text."""
    for path in paths:
        # The first is fast, and refuses some that are sound. Bytes that are no UTF-8 are lone surrogates (Cs).
        if not path.isprintable() and {"Cc", "Cs"} & set(map(unicodedata.category, path)):
            raise UserError(f"names in {str(root)!r} must be UTF-8 without control characters, but got {path!r}")


def _check_classes(root: Path, train: dict[str, Listing], test: dict[str, Listing], left_out: str) -> None:
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


def channel_statistics(images: Images) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Returns mean and population deviation of each channel of (N, H, W, 3) images, in units of [0, 1].

    Exact up to the last division: both come from sums of integers, which images in the cache's file have with them.
    """
    if isinstance(images, StoredImages):
        totals, squares = images.moments().sum(axis=0, dtype=np.int64).tolist()
    else:
        counts = np.zeros((3, 256), np.int64)
        for start in range(0, len(images), 1024):  # bincount copies to int64: a part at a time
            pixels = images[start : start + 1024].reshape(-1, 3)
            counts += [np.bincount(pixels[:, channel], minlength=256) for channel in range(3)]
        levels = np.arange(256)
        totals, squares = (counts @ levels).tolist(), (counts @ levels**2).tolist()
    number = math.prod(images.shape[:3])
    means, deviations = [], []
    for total, square in zip(totals, squares, strict=True):  # Python's integers: products are beyond 64 bits
        means.append(total / number / 255)
        deviations.append(math.sqrt(number * square - total**2) / number / 255)
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])
