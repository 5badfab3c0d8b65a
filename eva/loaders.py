"""Batches of a split: shuffled and augmented for training, plain and in order for an evaluation.

They are made on the training device, many at a time, where all of a policy runs on batches (`eva.batched`), and
otherwise image by image, in worker processes if there are any.
"""

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.utils.data
from numpy.typing import NDArray

from eva.batched import BatchedPolicy, Draws, batched, require_batched, take
from eva.config import UserError
from eva.data import Split
from eva.distributed import ALONE, World
from eva.image_cache import IMAGE_SIZE

# How often workers may die over one batch.
MOST_DEATHS = 3

# First in the entropy and larger than any seed in use: NumPy pads entropy with zeros, so [seed, epoch] alone
# would be the stream of [seed, epoch, 0], which a policy may well use for sample 0.
ORDER_STREAM = int.from_bytes(b"order")

# A GPU makes so many images at once, whatever the batch size: it has something to do, and the host has not.
IMAGES_AT_ONCE = 4096
# Images stay on the host if they would take more than this share of what is free on the GPU.
MOST_OF_FREE_MEMORY = 1 / 3

CPU = torch.device("cpu")

Augmentation = Literal["auto", "batched", "albumentations"]
Policy = Callable[[NDArray[np.uint8], tuple[int, int, int] | None], torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]
Sample = tuple[torch.Tensor, int]


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
    following one. Of each batch only what this process of the world takes is delivered.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, world: World = ALONE) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.next_epoch = 0
        self.start_batch = 0

    @property
    def images_per_epoch(self) -> int:
        drops_last = self.batch_size > 1 and self.num_images % self.batch_size == 1
        return self.num_images - drops_last

    def __len__(self) -> int:
        return math.ceil(self.images_per_epoch / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._keys(self.next_epoch, self.start_batch)

    def _keys(self, epoch: int, start_batch: int) -> Iterator[list[tuple[int, int]]]:
        # Begins at the first batch, not in __iter__: a DataLoader with workers calls that twice at first.
        for indices in self.begin(epoch, start_batch):
            yield [(epoch, index) for index in indices.tolist()]

    def begin(self, epoch: int, start_batch: int) -> list[NDArray[np.int64]]:
        """Returns the batches of an epoch from `start_batch` on as indices; the following one is the next then."""
        self.next_epoch, self.start_batch = epoch + 1, 0
        order = np.random.default_rng([ORDER_STREAM, self.seed, epoch]).permutation(self.num_images)
        starts = range(start_batch * self.batch_size, self.images_per_epoch, self.batch_size)
        whole = (order[start : min(start + self.batch_size, self.images_per_epoch)] for start in starts)
        return [np.array(self.world.take(batch.tolist())) if self.world.size > 1 else batch for batch in whole]


class DeviceImages:
    """Images of a split that a batched policy makes batches of, on a device.

    On a GPU they lie in its memory, as uint8, unless they would take too much of it: then those of a few batches at a
    time come from the host.

    Args:
        split: The images; nothing is read before the first batch.
        policy: Moved to the device.
        device: Where the batches are wanted.
    """

    def __init__(self, split: Split, policy: BatchedPolicy, device: torch.device) -> None:
        self.split = split
        self.policy = policy.to(device)
        self.device = device
        self._labels: torch.Tensor | None = None
        self._resident: torch.Tensor | None = None

    def batches(self, indices: Sequence[NDArray[np.int64]], draws: Draws) -> Iterator[Batch]:
        """Yields the batches of these indices: float32 (B, 3, 32, 32), channels-last in memory, and int64 (B,).

        Args:
            indices: Those of each batch.
            draws: Of all images of the split, on the host.
        """
        if not indices:
            return
        if self._labels is None:
            self._labels, self._resident = self._moved(torch.from_numpy(np.array(self.split.labels))), self._copied()
        draws = tuple(map(self._moved, draws))
        at_once = max(1, IMAGES_AT_ONCE // len(indices[0])) if self.device.type == "cuda" else 1
        for first in range(0, len(indices), at_once):
            group = indices[first : first + at_once]
            on_host = np.concatenate(group)
            where = self._moved(torch.from_numpy(on_host))
            if self._resident is None:
                images = self._moved(torch.from_numpy(np.asarray(self.split.images[on_host])))
            else:
                images = self._resident.index_select(0, where)
            sizes = [len(batch) for batch in group]
            made = self.policy(images, take(draws, where))
            labels = self._labels.index_select(0, where)
            yield from zip(torch.split(made, sizes), torch.split(labels, sizes), strict=True)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor of the host on the device, without waiting for what the device still has to do."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _copied(self) -> torch.Tensor | None:
        """Returns the images in the memory of a GPU, or None if they stay on the host."""
        if self.device.type != "cuda":
            return None
        shape = len(self.split), IMAGE_SIZE, IMAGE_SIZE, 3
        if math.prod(shape) > MOST_OF_FREE_MEMORY * torch.cuda.mem_get_info(self.device)[0]:
            return None
        images = torch.empty(shape, dtype=torch.uint8, device=self.device)
        for start in range(
            0, len(images), 16 * IMAGES_AT_ONCE
        ):  # whatever lies on a disk is not wanted whole on the host
            part = slice(start, start + 16 * IMAGES_AT_ONCE)
            images[part] = torch.from_numpy(np.array(self.split.images[part]))
        return images


class BatchedEpochs(torch.utils.data.IterableDataset[Batch]):
    """Training batches of a batched policy; each iteration is the next epoch of `batches`."""

    def __init__(self, images: DeviceImages, batches: ShuffledBatches) -> None:
        self._images = images
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return self._epoch(self._batches.next_epoch, self._batches.start_batch)

    def _epoch(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        indices = self._batches.begin(epoch, start_batch)
        draws = self._images.policy.draw(len(self._images.split), self._batches.seed, epoch)
        yield from self._images.batches(indices, draws)


class BatchedSplit(torch.utils.data.IterableDataset[Batch]):
    """All images in their order, or this process's share, through a batched policy that draws nothing."""

    def __init__(self, images: DeviceImages, batch_size: int, world: World = ALONE) -> None:
        self._images = images
        self._batch_size = batch_size
        self._own = world.share(len(images.split))

    def __len__(self) -> int:
        return math.ceil(len(self._own) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = np.array(self._own, np.int64)
        indices = [order[start : start + self._batch_size] for start in range(0, len(order), self._batch_size)]
        return self._images.batches(indices, self._images.policy.draw(len(self._images.split), 0, 0))


class TrainLoader:
    """Training batches that depend on (seed, epoch, batch number) alone, for any number of workers.

    Attributes:
        loader: The DataLoader underneath. Iterating over it directly gives one epoch each time, the one after
            the last epoch begun (0 at first); that is what torch_lr_finder's `range_test` does.
        num_images: Images that an epoch delivers: all, less one if it would be a last batch of its own.
    """

    def __init__(self, batches: ShuffledBatches, make: "Callable[[], torch.utils.data.DataLoader[Any]]") -> None:
        self._batches = batches
        self._make = make
        self.loader = make()
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


def train_loader(
    split: Split,
    policy: Policy,
    batch_size: int,
    seed: int,
    workers: int | None,
    device: torch.device = CPU,
    augmentation: Augmentation = "auto",
    world: World = ALONE,
) -> TrainLoader:
    """Returns shuffled, augmented batches.

    Args:
        split: The training images.
        policy: Turns a uint8 (H, W, 3) image and a draw (seed, epoch, index) into float32 (3, H, W); it must
            be picklable and depend on nothing else.
        batch_size: Images per batch; the last one may be smaller.
        seed: Seed of the order and of the augmentation, not negative.
        workers: Processes that apply the policy, 0 for none; None for 0 on a CPU (they would only take cores
            from the network) and up to 8 beside a GPU. Where batches are made as a whole there is none.
        device: Where batches are made, if they are as a whole; otherwise they come on the host.
        augmentation: batched makes them as a whole, albumentations image by image; auto: as a whole if the policy
            can be. One seed gives other draws of the same distribution.
        world: The processes that share each batch.

    Raises:
        UserError: `batch_size` is not between 1 and the number of images, or `augmentation` is batched and the
            policy can't be.
    """
    if not 1 <= batch_size <= len(split):
        raise UserError(
            f"batch_size must be between 1 and the number of train images, but got {batch_size=} "
            f"with {len(split)} train images"
        )
    batches = ShuffledBatches(len(split), batch_size, seed, world)
    if (whole := _batched(policy, augmentation)) is not None:
        epochs = BatchedEpochs(DeviceImages(split, whole, device), batches)
        return TrainLoader(batches, partial(_batched_loader, epochs))
    images = PolicyImages(split, policy, seed)
    return TrainLoader(batches, partial(_data_loader, images, _num_workers(workers), batch_sampler=batches))


class EvalLoader:
    """All images in their order, once in each iteration; see `eval_loader`."""

    def __init__(self, images: PolicyImages, batch_size: int, workers: int, world: World = ALONE) -> None:
        self._keys = [(0, index) for index in world.share(len(images))]
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


def eval_loader(
    split: Split,
    policy: Policy,
    batch_size: int,
    workers: int | None,
    device: torch.device = CPU,
    augmentation: Augmentation = "auto",
    world: World = ALONE,
) -> "EvalLoader | torch.utils.data.DataLoader[Batch]":
    """Returns a loader of all images in their order, without draws: float32 (B, 3, 32, 32) and int64 (B,).

    Args:
        split: The images.
        policy: Called with None for the draw.
        batch_size: Images per batch; the last one may be smaller.
        workers: As for `train_loader`.
        device: As for `train_loader`.
        augmentation: As for `train_loader`.
        world: The processes that share the images: each has other ones, and together they have all, once.
    """
    if (whole := _batched(policy, augmentation)) is not None and not whole.is_random:
        return _batched_loader(BatchedSplit(DeviceImages(split, whole, device), batch_size, world))
    return EvalLoader(PolicyImages(split, policy, seed=None), batch_size, _num_workers(workers), world)


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


def _batched(policy: Policy, augmentation: Augmentation) -> BatchedPolicy | None:
    if augmentation == "albumentations":
        return None
    return require_batched(policy) if augmentation == "batched" else batched(policy)


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


def _batched_loader(batches: "torch.utils.data.IterableDataset[Batch]") -> "torch.utils.data.DataLoader[Batch]":
    return torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=_as_it_is, generator=torch.Generator())


def _as_it_is(batch: Any) -> Any:
    return batch


def _stack(samples: Sequence[Sample]) -> Batch:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)


def _use_one_thread(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
