"""Images in a file that is mapped into memory: as an array is used, and in a bounded part of memory."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

IMAGE_SIZE = 32
SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
IMAGE_BYTES = IMAGE_SIZE * IMAGE_SIZE * 3
MOMENTS_BYTES = 2 * 3 * 4

# After so many images the pages of the file are given back. The system brings 64 KiB of it for each image that is
# read from anywhere, so that they take 256 MiB at most; to bring them anew takes less than 0.1 us an image.
IMAGES_HELD = 4096

Images: TypeAlias = "NDArray[np.uint8] | MappedImages"
Rows: TypeAlias = slice | list[int] | NDArray[np.integer[Any]] | NDArray[np.bool_]


class MappedImages:
    """Images (N, 32, 32, 3) of a file, or some of them in any order. Indexing is that of an array, and always copies.

    The system has the pages of a file once, however many processes map it, and drops those that nobody needs.
    `np.asarray` gives all of the images as an array in memory.
    """

    def __init__(self, file: "_MappedFile", rows: NDArray[np.int64]) -> None:
        self._file, self._rows = file, rows

    @classmethod
    def open(cls, path: Path, count: int) -> "MappedImages":
        """Returns all images of a file, which has so many and, after them, their moments (`moments`)."""
        return cls(_MappedFile(path, count), np.arange(count))

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
        if rows.size <= IMAGES_HELD:
            return self._file.gather(rows)
        images = np.empty((rows.size, *SHAPE), np.uint8)
        for start in range(0, rows.size, IMAGES_HELD):
            images[start : start + IMAGES_HELD] = self._file.gather(rows[start : start + IMAGES_HELD])
        return images

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("images of a file become an array only by a copy")
        return self[:].astype(dtype or np.uint8, copy=False)

    def take(self, rows: Rows) -> "MappedImages":
        """Returns some of the images, without reading any."""
        return MappedImages(self._file, self._rows[rows])

    def moments(self) -> NDArray[np.uint32]:
        """Returns for each image the sum and the sum of squares of each channel, (N, 2, 3), as the file has them."""
        return self._file.moments[self._rows]


class _MappedFile:
    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count, self.touched = path, count, 0
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.images = np.frombuffer(self.map, np.uint8, count * IMAGE_BYTES).reshape(count, *SHAPE)
        self.moments = np.frombuffer(self.map, np.uint32, count * 6, count * IMAGE_BYTES).reshape(count, 2, 3)

    def __reduce__(self) -> tuple[Any, ...]:  # for data workers that are not forked
        return _MappedFile, (self.path, self.count)

    def gather(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        images = self.images.take(rows, axis=0)
        self.touched += rows.size
        if self.touched > IMAGES_HELD:
            self.map.madvise(mmap.MADV_DONTNEED)  # they are not lost: read-only pages come from the file again
            self.touched = 0
        return images


def moments(images: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Returns for each image the sum and the sum of squares of each channel, (N, 2, 3), exact up to 256x256 pixels."""
    sums = images.sum(axis=1, dtype=np.uint32).sum(axis=1, dtype=np.uint32)  # by rows first: faster
    squares = np.einsum("nhwc,nhwc->nc", images, images, dtype=np.uint32, casting="unsafe")
    return np.stack([sums, squares], axis=1)
