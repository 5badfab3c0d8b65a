"""Batches for training and for evaluation: what they hold, in which order, and what becomes of dead workers."""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_data import make_split
from torch_lr_finder import LRFinder

from eva.config import UserError
from eva.image_cache import IMAGE_SIZE
from eva.loaders import Batch, TrainLoader, eval_loader, train_loader

SHIPPED = Path(__file__).parents[2] / "shared" / "cifar10"


def tagged(image: np.ndarray, draw: tuple[int, int, int] | None) -> torch.Tensor:
    """A policy that shows what it was called with: the image's first value, then the draw (or -1)."""
    seed, epoch, index = draw or (-1, -1, -1)
    facts = torch.tensor([float(image[0, 0, 0]), float(seed), float(epoch), float(index)])
    return facts.repeat(3 * IMAGE_SIZE * IMAGE_SIZE // 4).reshape(3, IMAGE_SIZE, IMAGE_SIZE)


def epoch_of(loader: TrainLoader, epoch: int, start_batch: int = 0) -> list[Batch]:
    return list(loader.epoch(epoch, start_batch))


def assert_same_batches(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_images_labels_and_draws_of_one_shuffled_epoch(workers: int) -> None:
    split = make_split([12, 10])
    loader = train_loader(split, tagged, 8, seed=5, workers=workers)
    batches = epoch_of(loader, 3)
    assert [len(labels) for _, labels in batches] == [8, 8, 6] and len(loader) == 3 and loader.num_images == 22
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert images.shape == (22, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64
    value, seed, epoch, index = images.flatten(1)[:, :4].long().T
    assert (seed == 5).all() and (epoch == 3).all() and (value == index).all()
    assert sorted(index.tolist()) == list(range(22)) and index.tolist() != list(range(22))
    assert (labels.numpy() == split.labels[index]).all()


def test_workers_and_process_give_the_same_batches_from_any_start() -> None:
    split = make_split([13, 12])
    alone = train_loader(split, tagged, 4, seed=1, workers=0)
    helped = train_loader(split, tagged, 4, seed=1, workers=2)
    whole = epoch_of(alone, 2)
    assert_same_batches(whole, epoch_of(helped, 2))
    assert_same_batches(whole[3:], epoch_of(helped, 2, start_batch=3))
    assert_same_batches(whole[3:], epoch_of(alone, 2, start_batch=3))
    half_way = helped.epoch(4)
    next(half_way)
    assert_same_batches(whole, epoch_of(helped, 2))


def test_a_start_at_the_end_gives_no_batch_and_one_beyond_is_refused() -> None:
    loader = train_loader(make_split([6, 6]), tagged, 4, seed=0, workers=0)
    assert epoch_of(loader, 0, start_batch=3) == []
    with pytest.raises(ValueError, match="start_batch must be between 0 and 3, but got 4"):
        loader.epoch(0, start_batch=4)


def test_order_depends_on_seed_and_epoch() -> None:
    split = make_split([50, 50])

    def order(seed: int, epoch: int) -> list[float]:
        batches = epoch_of(train_loader(split, tagged, 50, seed, workers=0), epoch)
        return torch.cat([images[:, 0, 0, 0] for images, _ in batches]).tolist()

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert order(1, 2) == orders[5]


def test_order_is_not_the_augmentation_stream_of_any_sample() -> None:
    """NumPy pads entropy with zeros: [seed, epoch] is the stream of [seed, epoch, 0]."""
    (images, _), *_ = epoch_of(train_loader(make_split([50, 50]), tagged, 100, seed=3, workers=0), 2)
    order = images[:, 0, 0, 0].long().tolist()
    for entropy in ([3, 2], *([3, 2, index] for index in range(100))):
        assert np.random.default_rng(entropy).permutation(100).tolist() != order


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"),
    [
        (9, 4, [4, 4]),
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (3, 1, [1, 1, 1]),
        (1, 1, [1]),
        (4, 4, [4]),
        (5, 3, [3, 2]),
    ],
)
def test_a_last_batch_of_one_image_is_dropped(images: int, batch_size: int, sizes: list[int]) -> None:
    loader = train_loader(make_split([images]), tagged, batch_size, seed=0, workers=0)
    assert [len(labels) for _, labels in epoch_of(loader, 0)] == sizes
    assert len(loader) == len(loader.loader) == len(sizes) and loader.num_images == sum(sizes)


@pytest.mark.parametrize("batch_size", [0, 13])
def test_a_batch_larger_than_the_data_is_refused(batch_size: int) -> None:
    with pytest.raises(UserError, match=f"but got batch_size={batch_size} with 12 train images"):
        train_loader(make_split([6, 6]), tagged, batch_size, seed=0, workers=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_underlying_loader_goes_through_the_epochs(workers: int) -> None:
    loader = train_loader(make_split([6, 6]), tagged, 4, seed=0, workers=workers)
    epochs = [[images[0, 0, 0, 2].item() for images, _ in loader.loader] for _ in range(3)]
    assert epochs == [[0.0] * 3, [1.0] * 3, [2.0] * 3]
    epoch_of(loader, 7)
    assert [images[0, 0, 0, 2].item() for images, _ in loader.loader] == [8.0] * 3


def test_lr_range_test_runs_over_the_underlying_loader_for_several_epochs() -> None:
    class Watched(torch.nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            epochs.append(images[0, 0, 0, 2].item())
            return super().forward(images.flatten(1))

    epochs: list[float] = []
    model = Watched(3 * 32 * 32, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    finder = LRFinder(model, optimizer, torch.nn.CrossEntropyLoss(), device="cpu")
    loader = train_loader(make_split([6, 6]), tagged, 4, seed=0, workers=0)
    finder.range_test(loader.loader, end_lr=1e-8, num_iter=8)
    assert len(finder.history["loss"]) == 8
    assert epochs == [0.0] * 3 + [1.0] * 3 + [2.0] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_streams_alone(workers: int) -> None:
    split = make_split([6, 6])
    before, numpy_before = torch.get_rng_state(), np.random.get_state(legacy=False)
    epoch_of(train_loader(split, tagged, 4, seed=0, workers=workers), 0)
    list(eval_loader(split, tagged, 4, workers))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_equal(np.random.get_state(legacy=False), numpy_before)


def threads(image: np.ndarray, draw: tuple[int, int, int] | None) -> torch.Tensor:
    return torch.tensor([float(cv2.getNumThreads()), float(torch.get_num_threads()), float(os.getpid())])


def test_workers_use_one_thread_each_and_live_on() -> None:
    loader = train_loader(make_split([6, 6]), threads, 4, seed=0, workers=2)
    facts = torch.cat([images for epoch in range(2) for images, _ in loader.epoch(epoch)]).double()
    assert (facts[:, :2] <= 1).all()
    assert len({*facts[:, 2].tolist()}) == 2 and os.getpid() not in facts[:, 2].tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_shows_every_image_in_order_without_draws(workers: int) -> None:
    split = make_split([7, 6])
    loader = eval_loader(split, tagged, 4, workers)
    for _ in range(2):
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [4, 4, 4, 1]
        facts = torch.cat([images for images, _ in batches]).flatten(1)[:, :4]
        assert facts[:, 0].tolist() == list(range(13)) and (facts[:, 1:] == -1).all()
        assert torch.cat([labels for _, labels in batches]).tolist() == split.labels.tolist()


def test_batches_go_on_when_workers_are_killed(capfd: pytest.CaptureFixture[str]) -> None:
    split = make_split([30, 30])
    alone = train_loader(split, tagged, 4, seed=1, workers=0)
    helped = train_loader(split, tagged, 4, seed=1, workers=2)
    shown = eval_loader(split, tagged, 4, workers=2)

    def disturbed(batches: Iterable[Batch]) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            yield batch
            if number in (2, 9, 14):  # after the last batch too
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, signal.SIGKILL)

    for epoch in (0, 1):
        assert_same_batches(list(disturbed(helped.epoch(epoch))), epoch_of(alone, epoch))
    for batches in (disturbed(shown), shown):
        assert_same_batches(list(batches), list(eval_loader(split, tagged, 4, workers=0)))
    warned = capfd.readouterr().err
    assert warned.count("warning: ") == warned.count("; others go on with batch") >= 3


def test_workers_that_die_again_and_again_end_it_with_a_line() -> None:
    def deadly(image: NDArray[np.uint8], draw: tuple[int, int, int] | None) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    loader = train_loader(make_split([6, 6]), deadly, 4, seed=0, workers=1)
    with pytest.raises(UserError, match=r"data workers die \(.+\); choose fewer --workers"):
        list(loader.epoch(0))


def test_evaluation_of_an_empty_split_has_no_batch() -> None:
    empty = make_split([3, 3]).take(np.zeros(6, bool))
    assert list(eval_loader(empty, tagged, 4, workers=0)) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the default differs beside a GPU")
def test_workers_default_to_none_without_a_gpu() -> None:
    assert train_loader(make_split([6, 6]), tagged, 4, seed=0, workers=None).loader.num_workers == 0
