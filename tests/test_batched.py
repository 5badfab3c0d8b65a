"""Policies on whole batches against Albumentations: the same pixels for the same draws, and draws alike."""

import copy
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from numpy.typing import NDArray
from scipy import stats
from test_data import make_split

from eva.batched import Affine, Crop, Cutout, Flip, HueSaturationValue, Step, batched, inverse, require_batched, take
from eva.config import Layer, UserError, resolve
from eva.data import Split
from eva.experiment import check_names
from eva.loaders import Batch, TrainLoader, eval_loader, train_loader
from eva.policies import AlternatingFlip, Policy, build_policy, policy_names

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
TAIL = [A.Normalize(MEAN, STD), ToTensorV2()]

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]


def pipeline_of(*transforms: A.BasicTransform) -> Policy:
    return Policy("made", A.Compose([*transforms, *TAIL]))


def named(name: str, **options: float) -> Policy:
    return build_policy(name, MEAN, STD, options)


def noise(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def smooth(count: int) -> NDArray[np.uint8]:
    """Returns images whose neighboring pixels are alike, as in photographs, with black, white and gray among them."""
    small = np.random.default_rng(1).integers(-40, 296, (count, 5, 5, 3)).clip(0, 255).astype(np.uint8)
    small[::4] = small[::4, ..., :1]
    return np.stack([cv2.resize(image, (32, 32), interpolation=cv2.INTER_CUBIC) for image in small])


def flat(pipeline: A.Compose) -> Iterator[A.BasicTransform]:
    for transform in pipeline.transforms:
        yield from flat(transform) if isinstance(transform, A.Compose) else [transform]


def draw_of(step: Step, params: dict[str, Any]) -> Sequence[float]:
    """Returns a step's draw for what its transform drew, which is nothing if it was left out."""
    if isinstance(step, Crop):
        left, top, *_ = params["crop_coords"] if params else (0, 0)
        return top, left
    if isinstance(step, Flip):
        return [bool(params)]
    if isinstance(step, Cutout):
        left, top, *_ = params["holes"][0] if params else (0, step.shape[0])
        return top, left
    if isinstance(step, Affine):
        return list(inverse(params["matrix"][None] if params else np.eye(3)[None])[0])
    if isinstance(step, HueSaturationValue):
        hue, saturation, value = (params.get(f"{name}_shift", 0) for name in ("hue", "sat", "val"))
        return np.floor(hue) % 180, np.trunc(saturation), np.trunc(value), any((hue, saturation, value))
    return []


def by_albumentations(
    policy: Policy, images: NDArray[np.uint8]
) -> tuple[tuple[torch.Tensor, ...], NDArray[np.uint8], torch.Tensor]:
    """Returns what Albumentations drew for each image, and what it made of them: uint8 and normalized."""
    equivalent = require_batched(policy)
    transforms = [transform for transform in list(flat(policy.pipeline))[:-2] if transform.p > 0]
    rows: list[list[Sequence[float]]] = [[] for _ in equivalent.steps]
    shown, normalized = [], []
    for index, image in enumerate(images):
        shown.append(policy.augment(image, (1, 2, index)))
        normalized.append(policy(image, (1, 2, index)))
        for row, step, transform in zip(rows, equivalent.steps, transforms, strict=True):
            flips = isinstance(transform, AlternatingFlip)
            row.append([transform.flips] if flips else draw_of(step, transform.params))
    like = equivalent.draw(len(images), 0, 0)
    draws = tuple(torch.tensor(row, dtype=one.dtype).view(one.shape) for row, one in zip(rows, like, strict=True))
    return draws, np.stack(shown), torch.stack(normalized)


# Equality

PIPELINES = {
    **{name: named(name) for name in policy_names()},
    "more of each": named("color", flip=0.3, rotate=180, hue=180, saturation=255, value=255, cutout=3),
    "far away": named("flip_shift_rotate", shift=32, scale=0.9, rotate=180, flip=1),
    "shift only": named("digits", shift=3, scale=0, rotate=0),
    "the whole image cut out": named("flip_cutout", cutout=32),
    "pad, gray": pipeline_of(A.Pad(4, fill=(1.0, 2.6, 300.0)), A.RandomCrop(32, 32)),
    "pad, one number": pipeline_of(A.Pad((1, 2, 3, 4), fill=7), A.RandomCrop(32, 32)),
    "pad, one fraction": pipeline_of(A.Pad((3, 5), fill=9.0), A.RandomCrop(32, 32)),
    **{
        f"pad, border {mode}": pipeline_of(A.Pad((3, 40, 5, 2), border_mode=mode), A.RandomCrop(32, 32))
        for mode in (cv2.BORDER_REFLECT_101, cv2.BORDER_REFLECT, cv2.BORDER_REPLICATE, cv2.BORDER_WRAP)
    },
    "crop, then pad": pipeline_of(A.RandomCrop(24, 20), A.Pad((6, 4), fill=0)),
    "crop of all": pipeline_of(A.RandomCrop(32, 32, p=0.5)),
    "p of each": pipeline_of(
        A.HorizontalFlip(p=0.4),
        A.Affine(
            translate_px=(-3, 4), shear=(-20, 20), scale={"x": (0.5, 1.5), "y": (0.9, 1.1)}, fill=(5, 6, 7), p=0.6
        ),
        A.HueSaturationValue(p=0.5),
        A.CoarseDropout((1, 1), (5, 5), (9, 9), fill=3, p=0.7),
    ),
    "shares of the image": pipeline_of(
        A.Affine(translate_percent=(-0.2, 0.2), fill=11.0, p=1), A.CoarseDropout((1, 1), (0.3, 0.3), (0.2, 0.2), p=1)
    ),
    "no change of color": pipeline_of(A.HueSaturationValue(0, 0, 0, p=1)),
    "left out": pipeline_of(
        A.HorizontalFlip(p=0), A.ElasticTransform(p=0), A.CoarseDropout((1, 1), (4, 4), (4, 4), p=1)
    ),
    "within another": Policy("made", A.Compose([A.Compose([A.Compose([A.HorizontalFlip(p=0.5)])]), *TAIL])),
    "scalar statistics": Policy("made", A.Compose([A.Normalize(0.5, 0.25, max_pixel_value=200.0), ToTensorV2()])),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PIPELINES)
def test_the_same_draws_give_the_same_pixels(name: str, device: str) -> None:
    policy = PIPELINES[name]
    images = np.concatenate([noise(150), smooth(150)])
    draws, shown, normalized = by_albumentations(policy, images)
    equivalent = require_batched(policy).to(device)
    given, on_device = torch.from_numpy(images).to(device), tuple(drawn.to(device) for drawn in draws)
    augmented = equivalent.augment(given, on_device)
    assert augmented.dtype == torch.uint8
    np.testing.assert_array_equal(augmented.cpu().numpy(), shown)
    output = equivalent(given, on_device)
    assert output.dtype == torch.float32 and output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output.cpu(), normalized, rtol=0, atol=1e-6)
    assert torch.equal(given.cpu(), torch.from_numpy(images)), "the images were changed"


def test_all_named_policies_run_on_batches() -> None:
    assert all(batched(named(name)) is not None for name in policy_names())


@pytest.mark.parametrize(
    "limits", [(0.0, 0.0, 0.0), (-180.0, -255.0, -255.0), (179.99, 254.99, 254.99), (0.5, -0.5, 0.5)]
)
def test_every_color_changes_as_albumentations_changes_it(limits: tuple[float, float, float]) -> None:
    """Colors a few apart on each axis, 2,744 of them, and all grays."""
    values = np.array([*range(0, 256, 20), 255], dtype=np.uint8)
    colors = np.stack(np.meshgrid(values, values, values), -1).reshape(-1, 3)
    grays = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    images = np.resize(np.concatenate([colors, grays]), (3, 32, 32, 3))
    hue, saturation, value = limits
    if not any(limits):
        hue = 1e-9  # all zero would leave the image alone
    policy = pipeline_of(A.HueSaturationValue((hue, hue), (saturation, saturation), (value, value), p=1))
    draws, shown, _ = by_albumentations(policy, images)
    equivalent = require_batched(policy)
    np.testing.assert_array_equal(equivalent.augment(torch.from_numpy(images), draws).numpy(), shown)
    np.testing.assert_array_equal(equivalent.augment(torch.from_numpy(images), equivalent.draw(3, 0, 0)).numpy(), shown)


def test_a_file_runs_on_batches_too(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    A.save(A.Compose([A.Pad(3), A.RandomCrop(32, 32), A.HorizontalFlip()]), path, data_format="yaml")
    policy = build_policy(str(path), MEAN, STD)
    draws, shown, _ = by_albumentations(policy, noise(50))
    np.testing.assert_array_equal(require_batched(policy).augment(torch.from_numpy(noise(50)), draws).numpy(), shown)


def test_an_equivalent_survives_pickling_and_deepcopy() -> None:
    equivalent, images = require_batched(named("color")), torch.from_numpy(noise(8))
    draws = equivalent.draw(8, 0, 0)
    for other in (pickle.loads(pickle.dumps(equivalent)), copy.deepcopy(equivalent)):
        assert torch.equal(other(images, draws), equivalent(images, draws))


# What has no equivalent


@pytest.mark.parametrize(
    ("transform", "named_part"),
    [
        (A.GaussianBlur(p=1), "GaussianBlur"),
        (A.PadIfNeeded(40, 40), "PadIfNeeded"),
        (A.Pad(4, p=0.5), "Pad with p below 1"),
        (A.Pad(4), "images of 40x40"),
        (A.RandomCrop(30, 32, p=0.5), "RandomCrop with p below 1"),
        (A.RandomCrop(40, 40, pad_if_needed=True), "RandomCrop that is larger than the image"),
        (A.CoarseDropout((1, 2), (4, 4), (4, 4)), "CoarseDropout of more than one hole"),
        (A.CoarseDropout((1, 1), (4, 5), (4, 4)), "CoarseDropout whose hole has no fixed size"),
        (A.CoarseDropout((1, 1), (4, 4), (4, 4), fill="random"), "CoarseDropout with fill: random"),
        (A.Affine(interpolation=cv2.INTER_CUBIC), "Affine that is not bilinear with a constant border"),
        (A.Affine(border_mode=cv2.BORDER_WRAP), "Affine that is not bilinear with a constant border"),
        (A.Affine(fit_output=True), "Affine with fit_output or balanced_scale"),
        (A.Compose([A.HorizontalFlip()], p=0.5), "Compose with p below 1"),
        (A.OneOf([A.HorizontalFlip()]), "OneOf"),
        (A.Normalize(MEAN, STD), "Normalize"),
    ],
)
def test_what_has_no_equivalent_is_named(transform: A.BasicTransform, named_part: str) -> None:
    policy = pipeline_of(transform)
    assert batched(policy) is None
    with pytest.raises(
        UserError, match=f"policy 'made' cannot run on batches, .* of {named_part}; choose augmentation"
    ):
        require_batched(policy)


@pytest.mark.parametrize(
    "tail",
    [[ToTensorV2()], TAIL[::-1], [A.Normalize(normalization="image"), ToTensorV2()], [*TAIL, A.HorizontalFlip()]],
)
def test_another_end_than_normalize_and_a_tensor_has_no_equivalent(tail: list[A.BasicTransform]) -> None:
    with pytest.raises(UserError, match="no equivalent of another end than a standard Normalize and ToTensorV2"):
        require_batched(Policy("made", A.Compose([A.HorizontalFlip(), *tail])))


def test_a_run_that_asks_for_what_cannot_be_is_refused_before_data_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    A.save(A.Compose([A.HorizontalFlip(), A.GaussianBlur()]), path)
    settings = {"policy": str(path), "model": "resnet9", "data": "folder:nowhere"}
    config, _ = resolve([Layer("test", {**settings, "augmentation": "batched"})])
    with pytest.raises(UserError, match="there is no equivalent of GaussianBlur; choose augmentation=auto or albument"):
        check_names(config)
    check_names(resolve([Layer("test", settings)])[0])


def plain_function(image: NDArray[np.uint8], draw: tuple[int, int, int] | None) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float()


def test_a_function_runs_by_image_unless_batches_are_asked_for() -> None:
    assert batched(plain_function) is None
    split = make_split([6, 6])
    assert train_loader(split, plain_function, 4, 0, 2).loader.num_workers == 2
    with pytest.raises(UserError, match="augmentation=batched needs a policy of Albumentations' transforms"):
        train_loader(split, plain_function, 4, 0, 0, augmentation="batched")


# Distributions. A fixed seed; a true hypothesis would fail once in a thousand seeds, that is at 3.3 sigmas.

LIKELY = 1e-3


def alike(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """Returns the probability that samples of one distribution differ so much: chi-square if they are of few values."""
    values = np.unique(np.concatenate([ours, theirs]))
    if len(values) > 1000:
        return float(stats.ks_2samp(ours, theirs).pvalue)
    table = np.array([[np.sum(sample == value) for value in values] for sample in (ours, theirs)])
    return 1.0 if len(values) == 1 else float(stats.chi2_contingency(table).pvalue)


@pytest.mark.parametrize("name", ["crop_flip_cutout", "color", "flip_shift_rotate", "p of each", "shares of the image"])
def test_draws_have_albumentations_distribution(name: str) -> None:
    policy, count = PIPELINES[name], 3000
    theirs, _, _ = by_albumentations(policy, np.zeros((count, 32, 32, 3), np.uint8))
    ours = require_batched(policy).draw(4 * count, 7, 0)
    compared = 0
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        for a, b in zip(our.view(len(our), -1).T.numpy(), their.view(len(their), -1).T.numpy(), strict=True):
            assert alike(a, b) > LIKELY / 10  # of some twenty columns in all
            compared += 1
    assert compared >= 4


def test_the_comparison_of_distributions_can_fail() -> None:
    generator = np.random.default_rng(0)
    eight, nine = generator.integers(0, 8, 12000), generator.integers(0, 9, 3000)
    assert alike(eight, nine) < 1e-6
    assert alike(generator.uniform(-15, 15, 12000), generator.uniform(-17, 17, 3000)) < LIKELY / 10


def test_every_window_and_every_hole_comes_as_often_as_any_other() -> None:
    _, crops, flips, holes = require_batched(named("crop_flip_cutout")).draw(200_000, 0, 0)
    for places, side in ((crops, 9), (holes, 25)):  # 40 - 32 + 1 and 32 - 8 + 1 places on each axis
        assert places.min() == 0 and places.max() == side - 1
        counts = np.bincount((places[:, 0] * side + places[:, 1]).numpy(), minlength=side * side)
        assert stats.chisquare(counts).pvalue > LIKELY
    assert stats.binomtest(int(flips.sum()), 200_000, 0.5).pvalue > LIKELY


def test_alternating_flips_are_a_fair_half_and_the_other_one_in_every_other_epoch() -> None:
    """By image and on batches; of two seeds not the same half."""
    policy, images = named("speedrun", reflect=0), noise(400)
    by_image = np.array(
        [
            [not np.array_equal(policy.augment(image, (5, epoch, index)), image) for index, image in enumerate(images)]
            for epoch in range(3)
        ]
    )
    equivalent = require_batched(policy)
    on_batches = np.array([equivalent.draw(400, 5, epoch)[0].numpy() for epoch in range(3)])
    for flips in (by_image, on_batches):
        np.testing.assert_array_equal(flips[1], 1 - flips[0].astype(int))
        np.testing.assert_array_equal(flips[2], flips[0])
        assert 150 < flips[0].sum() < 250  # five deviations of a fair coin
    assert 150 < (equivalent.draw(400, 6, 0)[0] != equivalent.draw(400, 5, 0)[0]).sum() < 250


def test_draws_of_seeds_epochs_and_transforms_are_independent() -> None:
    equivalent = require_batched(named("crop_flip_cutout"))
    columns = [
        column
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
        for drawn in equivalent.draw(20_000, seed, epoch)
        for column in drawn.view(20_000, -1).T.double()
    ]
    correlations = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert len(columns) == 20 and correlations.abs().max() < 4.5 / 20_000**0.5


# Purity


def epoch_of(loader: TrainLoader, epoch: int, start_batch: int = 0) -> list[Batch]:
    return list(loader.epoch(epoch, start_batch))


def together(batches: Sequence[Batch]) -> Batch:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images).cpu(), torch.cat(labels).cpu()


def numbered_split(count: int) -> Split:
    """Returns images of noise whose labels are their indices."""
    return Split(noise(count), np.arange(count), np.array([f"{index}" for index in range(count)]))


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_is_the_same_in_batches_of_any_size(device: str) -> None:
    split, policy = numbered_split(60), named("color")
    by_size = {}
    for size in (60, 16, 7, 1):
        loader = train_loader(split, policy, size, 3, 0, torch.device(device))
        images, labels = together(epoch_of(loader, 2))
        by_size[size] = images[labels.argsort()]
    assert all(torch.equal(images, by_size[60]) for images in by_size.values())
    equivalent = require_batched(policy)
    alone = [
        equivalent(torch.from_numpy(split.images[[i]]), take(equivalent.draw(60, 3, 2), torch.tensor([i])))
        for i in (0, 9)
    ]
    assert torch.equal(torch.cat(alone), by_size[60][[0, 9]])


@pytest.mark.parametrize("device", DEVICES)
def test_batches_are_those_of_the_shuffled_order_from_any_start(device: str) -> None:
    split, policy = numbered_split(50), named("crop_flip_cutout")
    loader = train_loader(split, policy, 8, 5, workers=2, device=torch.device(device))
    by_image = train_loader(split, plain_function, 8, 5, workers=0)
    whole = epoch_of(loader, 3)
    assert loader.loader.num_workers == 0 and len(loader) == len(loader.loader) == len(whole) == 7
    assert loader.num_images == 50
    for (images, labels), (_, others) in zip(whole, by_image.epoch(3), strict=True):
        assert labels.tolist() == others.tolist() and labels.dtype == torch.int64
        assert images.device.type == labels.device.type == device
        assert images.is_contiguous(memory_format=torch.channels_last)
    next(loader.epoch(4))  # half-way
    for start in (0, 3, 6):
        (images, labels), (wanted, order) = together(epoch_of(loader, 3, start)), together(whole[start:])
        assert torch.equal(images, wanted) and torch.equal(labels, order)
    assert epoch_of(loader, 3, 7) == []
    with pytest.raises(ValueError, match="start_batch must be between 0 and 7, but got 8"):
        loader.epoch(3, 8)
    assert [len(list(loader.loader)) for _ in range(2)] == [7, 7]


def test_seed_and_epoch_change_the_draws() -> None:
    equivalent = require_batched(named("crop_flip_cutout"))
    different = {
        tuple(equivalent.draw(20, seed, epoch)[1].flatten().tolist()) for seed in range(3) for epoch in range(3)
    }
    assert len(different) == 9


def test_batches_leave_the_global_random_streams_alone() -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state(legacy=False)
    epoch_of(train_loader(numbered_split(20), named("color"), 8, 0, 0), 0)
    list(eval_loader(numbered_split(20), named("test"), 8, 0))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_equal(np.random.get_state(legacy=False), numpy_before)


def test_images_that_only_can_be_read_are_left_alone(tmp_path: Path) -> None:
    split = numbered_split(20)
    np.save(tmp_path / "images.npy", split.images)
    mapped = Split(np.load(tmp_path / "images.npy", mmap_mode="r"), split.labels, split.ids)
    one, other = (together(epoch_of(train_loader(each, named("color"), 8, 0, 0), 0)) for each in (split, mapped))
    assert torch.equal(one[0], other[0])


def test_evaluation_gives_the_same_batches_as_image_by_image() -> None:
    split, policy = numbered_split(21), named("test")
    loaders = [eval_loader(split, policy, 8, 0, augmentation=how) for how in ("batched", "albumentations")]
    assert [len(loader) for loader in loaders] == [3, 3]
    for _ in range(2):
        for (images, labels), (others, other_labels) in zip(*loaders, strict=True):
            torch.testing.assert_close(images, others, rtol=0, atol=1e-6)
            assert torch.equal(labels, other_labels)
    assert list(eval_loader(split.take(np.zeros(21, bool)), policy, 8, 0)) == []


def test_evaluation_does_not_draw() -> None:
    with pytest.raises(ValueError, match="policy 'flip' is random: call it with a seed"):
        list(eval_loader(numbered_split(4), named("flip"), 4, 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_albumentations_goes_image_by_image(workers: int) -> None:
    split, policy = numbered_split(12), named("crop_flip_cutout")
    loader = train_loader(split, policy, 12, 3, workers, augmentation="albumentations")
    ((images, labels),) = epoch_of(loader, 1)
    assert loader.loader.num_workers == workers
    assert all(
        torch.equal(image, policy(split.images[index], (3, 1, index)))
        for image, index in zip(images, labels.tolist(), strict=True)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("share", [1.0, 0.0], ids=["in its memory", "on the host"])
@pytest.mark.parametrize("name", policy_names())
def test_a_gpu_gives_the_batches_of_a_cpu(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eva.loaders.MOST_OF_FREE_MEMORY", share)
    monkeypatch.setattr("eva.loaders.IMAGES_AT_ONCE", 64)
    split, policy = numbered_split(300), named(name)
    of_gpu, of_cpu = (train_loader(split, policy, 32, 1, 0, torch.device(device)) for device in ("cuda", "cpu"))
    for (images, labels), (others, other_labels) in zip(of_gpu.epoch(1, 2), of_cpu.epoch(1, 2), strict=True):
        assert images.device.type == "cuda"
        assert torch.equal(images.cpu(), others) and torch.equal(labels.cpu(), other_labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_is_not_waited_for() -> None:
    loader = train_loader(numbered_split(300), named("color"), 32, 1, 0, torch.device("cuda"))
    epoch_of(loader, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        epoch_of(loader, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
