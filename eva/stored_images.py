"""Images that stay in a file: used as an array is, and read when they are asked for."""

import errno
import os
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

IMAGE_SIZE = 32
SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
IMAGE_BYTES = IMAGE_SIZE * IMAGE_SIZE * 3
MOMENTS_BYTES = 2 * 3 * 4
MOST_READ = 2**19  # images by one call of the system, which reads less than 2 GiB

Images: TypeAlias = "NDArray[np.uint8] | StoredImages"
Rows: TypeAlias = slice | list[int] | NDArray[np.integer[Any]] | NDArray[np.bool_]


class StoredImages:
    """Images (N, 32, 32, 3) of a file, or some of them in any order. Indexing is that of an array, and always copies.

    Rows are read from the system's cache of the file, which all processes share, in 1.5 us instead of the 0.5 us of a
    copy in memory. A mapping of the file would be as fast as memory, but not bounded: Linux 6.18 brings up to 2 MiB
    into a process for each image. And of a file that became shorter, or is gone from a server, this gives an error;
    a mapping ends the process.
    """

    def __init__(self, file: "_ImageFile", rows: NDArray[np.int64]) -> None:
        self._file, self._rows = file, rows

    @classmethod
    def open(cls, path: Path, count: int) -> "StoredImages":
        """Returns all images of a file, which has so many and, after them, their moments (`moments`)."""
        return cls(_ImageFile(path, count), np.arange(count))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As an array has it."""
        return (len(self), *SHAPE)

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        """As an array has it."""
        return np.dtype(np.uint8)

    def __getitem__(self, key: int | np.integer[Any] | Rows) -> NDArray[np.uint8]:
        rows = self._rows[key]
        return self._file.read(rows.reshape(-1)).reshape(*rows.shape, *SHAPE)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("images of a file become an array only by a copy")
        return self[:].astype(dtype or np.uint8, copy=False)

    def take(self, rows: Rows) -> "StoredImages":
        """Returns some of the images, without reading any."""
        return StoredImages(self._file, self._rows[rows])

    def moments(self) -> NDArray[np.uint32]:
        """Returns for each image the sum and the sum of squares of each channel, (N, 2, 3), as the file has them."""
        return self._file.moments()[self._rows]


class _ImageFile:
    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.number)

    def __reduce__(self) -> tuple[Any, ...]:  # for data workers that are not forked
        return _ImageFile, (self.path, self.count)

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        images = np.empty((len(rows), IMAGE_BYTES), np.uint8)
        # Those that lie one after the other in the file are read at once.
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        for start, end in pairwise([0, *ends.tolist(), len(rows)]):
            for first in range(start, end, MOST_READ):
                part = images[first : min(first + MOST_READ, end)]
                self._fill(part, int(rows[first]) * IMAGE_BYTES)
        return images

    def moments(self) -> NDArray[np.uint32]:
        found = np.empty((self.count, 2, 3), np.uint32)
        self._fill(found, self.count * IMAGE_BYTES)
        return found

    def _fill(self, part: NDArray[Any], offset: int) -> None:
        if os.preadv(self.number, [part.data], offset) != part.nbytes:
            raise OSError(errno.EIO, "the file of decoded images became shorter while it was used", str(self.path))


def moments(images: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Returns for each image the sum and the sum of squares of each channel, (N, 2, 3), exact up to 256x256 pixels."""
    sums = images.sum(axis=1, dtype=np.uint32).sum(axis=1, dtype=np.uint32)  # by rows first: faster
    squares = np.einsum("nhwc,nhwc->nc", images, images, dtype=np.uint32, casting="unsafe")
    return np.stack([sums, squares], axis=1)
