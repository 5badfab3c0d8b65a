"""The rules of the augmentation policies: pure draws, exact geometry, told mistakes."""

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, Dataset

from eva.config import UserError
from eva.policies import GALLERY_GAP, GALLERY_SCALE, Policy, build_policy, gallery, policy_names

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
FILL = (125, 123, 114)  # 255 * MEAN, rounded, by hand
RANDOM_POLICIES = [name for name in policy_names() if name != "test"]


def make_image(seed: int = 0) -> np.ndarray:
    """Returns noise, uint8 (32, 32, 3), in which no two windows are alike; no pixel is black or the mean."""
    return np.random.default_rng(seed).integers(130, 256, (32, 32, 3), dtype=np.uint8)


def make_policy(name: str, **options: float) -> Policy:
    return build_policy(name, MEAN, STD, options)


# Draws


@pytest.mark.parametrize("name", policy_names())
def test_output_is_float32_and_the_input_stays_unchanged(name: str) -> None:
    image = make_image()
    image.flags.writeable = False
    output = make_policy(name)(image, (0, 0, 0))
    assert output.dtype == torch.float32
    assert output.shape == (3, 32, 32)
    np.testing.assert_array_equal(image, make_image())


@pytest.mark.parametrize("name", RANDOM_POLICIES)
def test_a_draw_is_a_function_of_the_seed_and_the_image(name: str) -> None:
    image, policy = make_image(), make_policy(name)
    first = policy(image, (1, 2, 3))
    for index in range(20):  # whatever is drawn in between
        policy(make_image(index), (7, 8, index))
    assert torch.equal(policy(image, (1, 2, 3)), first)
    assert torch.equal(make_policy(name)(image, (1, 2, 3)), first)


@pytest.mark.parametrize("name", RANDOM_POLICIES)
@pytest.mark.parametrize("position", [0, 1, 2], ids=["run seed", "epoch", "sample index"])
def test_each_part_of_the_seed_changes_the_draws(name: str, position: int) -> None:
    image, policy = make_image(), make_policy(name)
    seeds = [[5, 5, 5] for _ in range(40)]
    for number, seed in enumerate(seeds):
        seed[position] = number
    distinct = {policy.augment(image, seed).tobytes() for seed in seeds}
    assert len(distinct) >= (2 if name == "flip" else 25)  # a flip has two outcomes only


@pytest.mark.parametrize("name", RANDOM_POLICIES)
def test_a_random_policy_refuses_to_draw_without_a_seed(name: str) -> None:
    with pytest.raises(ValueError, match=f"policy '{name}' is random: call it with a seed"):
        make_policy(name)(make_image())


@pytest.mark.parametrize("name", policy_names())
def test_augment_is_the_same_draw_before_normalization(name: str) -> None:
    policy = make_policy(name)
    for index in range(20):
        shown = policy.augment(make_image(), (0, 0, index))
        assert shown.dtype == np.uint8
        torch.testing.assert_close(policy(make_image(), (0, 0, index)), normalized_by_hand(shown))


def normalized_by_hand(image: np.ndarray) -> torch.Tensor:
    values = (image.astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(values.transpose(2, 0, 1)).float()


@pytest.mark.parametrize("seed", [None, (3, 1, 4)])
def test_the_test_policy_only_normalizes(seed: tuple[int, ...] | None) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    output = make_policy("test")(image, seed)
    torch.testing.assert_close(output, normalized_by_hand(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", policy_names())
def test_a_policy_survives_pickling_and_deepcopy(name: str) -> None:
    policy = make_policy(name)
    for other in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        assert torch.equal(other(make_image(), (1, 2, 3)), policy(make_image(), (1, 2, 3)))
        np.testing.assert_array_equal(other.augment(make_image(), (1, 2, 3)), policy.augment(make_image(), (1, 2, 3)))


class Augmented(Dataset[torch.Tensor]):
    """Twenty copies of one image, so that only the draws differ."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.policy = make_policy("crop_flip_cutout")

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.policy(make_image(), (0, self.epoch, index))


def test_workers_change_no_draw_and_repeat_none() -> None:
    def draws(epoch: int, num_workers: int) -> torch.Tensor:
        return torch.cat(list(DataLoader(Augmented(epoch), batch_size=5, num_workers=num_workers)))

    first = draws(epoch=1, num_workers=0)
    assert torch.equal(draws(epoch=1, num_workers=2), first)
    # Two workers share the batches, and two epochs the samples: none of the 40 draws is another one's copy.
    both = torch.cat([first, draws(epoch=2, num_workers=2)])
    assert len({draw.numpy().tobytes() for draw in both}) == 40


# What is drawn


def test_crop_takes_each_of_the_81_windows_of_the_black_padded_image_equally_often() -> None:
    image, policy = make_image(), make_policy("crop_flip", flip=0)
    padded = np.zeros((40, 40, 3), np.uint8)
    padded[4:36, 4:36] = image
    windows = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    counts = np.zeros((9, 9))
    for index in range(8100):
        counts[windows[policy.augment(image, (0, 0, index)).tobytes()]] += 1  # KeyError: not a window
    # 100 expected in each of 81 cells. The 0.9999 quantile of chi-square with 80 degrees of freedom is 134.7.
    assert ((counts - 100) ** 2 / 100).sum() < 134.7


@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_flip_has_its_probability(probability: float) -> None:
    image, policy = make_image(), make_policy("flip", flip=probability)
    outcomes = [policy.augment(image, (0, 0, index)) for index in range(2000)]
    flipped = [np.array_equal(outcome, image[:, ::-1]) for outcome in outcomes]
    kept = [np.array_equal(outcome, image) for outcome in outcomes]
    assert sum(flipped) + sum(kept) == 2000
    sigma = np.sqrt(2000 * probability * (1 - probability))
    assert abs(sum(flipped) - 2000 * probability) < 4 * sigma


@pytest.mark.parametrize("side", [8, 16, 1])
def test_cutout_fills_one_whole_square_with_the_mean(side: int) -> None:
    image, policy = make_image(), make_policy("flip_cutout", flip=0, cutout=side)
    corners = []
    for index in range(2000):
        output = policy.augment(image, (0, 0, index))
        changed = (output != image).any(axis=-1)
        y, x = np.argwhere(changed).min(axis=0)
        square = np.zeros((32, 32), bool)
        square[y : y + side, x : x + side] = True
        np.testing.assert_array_equal(changed, square)
        assert changed.sum() == side**2  # never cut off by the border
        assert (output[changed] == FILL).all()
        corners.append((y, x))
    last = 32 - side
    assert np.min(corners) == 0
    assert np.max(corners) == last
    # Uniform over 0..last on both axes: the mean of 2000 draws, within 4 sigmas of last / 2.
    sigma = np.sqrt(((last + 1) ** 2 - 1) / 12 / 2000)
    np.testing.assert_allclose(np.mean(corners, axis=0), last / 2, rtol=0, atol=4 * sigma)


def test_rotate_is_uniform_within_its_angles() -> None:
    # A slope turns with the image: its direction in the middle, where no black comes in, is the angle.
    slope = np.repeat(np.arange(32, dtype=np.uint8)[None, :, None] * 8, 32, axis=0).repeat(3, axis=2)
    policy = make_policy("crop_cutout_rotate", pad=0, cutout=0)
    angles = []
    for index in range(1000):
        middle = policy.augment(slope, (0, 0, index))[8:24, 8:24, 0].astype(float)
        dy, dx = (gradient.mean() for gradient in np.gradient(middle))
        angles.append(np.degrees(np.arctan2(dy, dx)))
    rounding = 0.3  # of uint8 values
    assert -5 - rounding < min(angles) < -4.7
    assert 4.7 < max(angles) < 5 + rounding
    assert abs(np.mean(angles)) < 4 * (10 / np.sqrt(12)) / np.sqrt(1000)


def test_shift_is_a_whole_number_of_pixels_on_each_axis() -> None:
    image, policy = make_image(), make_policy("digits", rotate=0, scale=0, shift=2)
    padded = np.zeros((36, 36, 3), np.uint8)
    padded[2:34, 2:34] = image
    windows = {padded[y : y + 32, x : x + 32].tobytes() for y in range(5) for x in range(5)}
    drawn = {policy.augment(image, (0, 0, index)).tobytes() for index in range(500)}
    assert drawn == windows


def test_scale_keeps_the_ratio_within_its_limits() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[8:24, 8:24] = 255
    policy = make_policy("digits", rotate=0, shift=0, scale=0.1)
    sides = []
    for index in range(300):
        values = policy.augment(image, (0, 0, index))[..., 0] / 255
        height, width = values.sum(axis=0).max(), values.sum(axis=1).max()
        assert height == pytest.approx(width, abs=0.1)
        sides.append(height)
    assert min(sides) == pytest.approx(16 * 0.9, abs=0.2)
    assert max(sides) == pytest.approx(16 * 1.1, abs=0.2)


def test_color_changes_only_what_its_option_is_about() -> None:
    geometry_off = {"flip": 0, "rotate": 0, "cutout": 0}
    gray = np.full((32, 32, 3), 100, np.uint8)  # has a value, and no hue
    only_hue = make_policy("color", **geometry_off, hue=90, saturation=0, value=0)
    only_value = make_policy("color", **geometry_off, hue=0, saturation=0, value=20)
    values = []
    for index in range(300):
        np.testing.assert_array_equal(only_hue.augment(gray, (0, 0, index)), gray)
        output = only_value.augment(gray, (0, 0, index))
        assert len(np.unique(output)) == 1
        values.append(int(output[0, 0, 0]))
    assert 80 <= min(values) < 83
    assert 117 < max(values) <= 120


def test_digits_are_never_mirrored() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 255
    policy = make_policy("digits")
    for index in range(500):
        output = policy.augment(image, (0, 0, index)).astype(float)
        assert output[:, :16].mean() > output[:, 16:].mean()


@pytest.mark.parametrize("name", RANDOM_POLICIES)
def test_options_at_zero_switch_everything_off(name: str) -> None:
    every = ("pad", "reflect", "flip", "alternate", "shift", "scale", "rotate", "hue", "saturation", "value", "cutout")
    known = [option for option in every if option in options_of(name)]
    policy = make_policy(name, **dict.fromkeys(known, 0))
    assert torch.equal(policy(make_image()), make_policy("test")(make_image()))


def options_of(name: str) -> str:
    """Returns the list of a policy's options, as an error message tells it."""
    with pytest.raises(UserError, match="unknown option") as caught:
        make_policy(name, nonsense=1)
    return str(caught.value).rpartition("known: ")[2]


# Mistakes


def test_an_unknown_policy_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown policy 'crop_flop' \(did you mean 'crop_flip'\?\); known: .*"):
        make_policy("crop_flop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cuttout": 4},
            r"unknown option of policy 'crop_flip_cutout': 'cuttout' \(did you mean 'cutout'\?\)",
        ),
        ({"rotate": 4}, r"unknown option .* 'rotate'.*; known: cutout, flip, pad"),
        ({"flip": 1.5}, r"option 'flip' .* must be a number from 0 to 1 .* but got 1\.5"),
        ({"flip": float("nan")}, r"option 'flip' .* must be a number from 0 to 1 .* but got nan"),
        ({"flip": True}, r"option 'flip' .* must be a number .* but got True"),
        ({"flip": "often"}, r"option 'flip' .* must be a number .* but got 'often'"),
        ({"cutout": 8.5}, r"option 'cutout' .* must be a whole number from 0 to 32 .* but got 8\.5"),
        ({"cutout": 33}, r"option 'cutout' .* must be a whole number from 0 to 32 .* but got 33"),
        ({"pad": -1}, r"option 'pad' .* must be a whole number .* but got -1"),
        ({"pad": float("inf")}, r"option 'pad' .* must be a whole number .* but got inf"),
        ({"pad": -1, "flip": 2}, r"option 'pad' .*\noption 'flip' "),
    ],
)
def test_a_wrong_option_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_policy("crop_flip_cutout", **options)


def test_a_policy_without_options_takes_none() -> None:
    with pytest.raises(UserError, match="policy 'test' has no options, but got cutout"):
        make_policy("test", cutout=8)


@pytest.mark.parametrize("name", policy_names())
def test_named_policies_raise_no_warning(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = make_policy(name)
        for index in range(10):
            policy(make_image(), (0, 0, index))


# Files


def serialized(*transforms: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """Returns a Compose as Albumentations writes it, of transforms given as {"name": ..., arguments}."""

    def node(name: str, p: float = 1.0, **arguments: Any) -> dict[str, Any]:
        return {"__class_fullname__": name, "p": p, **arguments}

    nodes = [node(**transform) for transform in transforms]
    return {"__version__": "2.0.8", "transform": node("Compose", transforms=nodes, **arguments)}


def policy_of(values: Any, folder: Path, suffix: str = ".yaml") -> Policy:
    path = folder / f"policy{suffix}"
    path.write_text(json.dumps(values) if suffix == ".json" else yaml.safe_dump(values, sort_keys=False))
    return build_policy(str(path), MEAN, STD)


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
@pytest.mark.parametrize("name", policy_names())
def test_a_description_makes_the_same_policy(name: str, suffix: str, tmp_path: Path) -> None:
    policy = make_policy(name)
    path = tmp_path / f"policy{suffix}"
    described = policy.describe()
    path.write_text(json.dumps(described) if suffix == ".json" else yaml.safe_dump(described))
    again = build_policy(str(path), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # its own Normalize stays
    assert again.describe() == described
    for index in range(20):
        assert torch.equal(again(make_image(), (0, 0, index)), policy(make_image(), (0, 0, index)))


def test_a_file_without_normalize_gets_that_of_the_train_images(tmp_path: Path) -> None:
    policy = policy_of(serialized({"name": "VerticalFlip"}, {"name": "HorizontalFlip"}), tmp_path)
    turned = make_image()[::-1, ::-1]
    np.testing.assert_array_equal(policy.augment(make_image(), (0, 0, 0)), turned)
    torch.testing.assert_close(policy(make_image(), (0, 0, 0)), normalized_by_hand(turned))


def test_a_files_own_probability_is_kept_and_never_skips_normalize(tmp_path: Path) -> None:
    policy = policy_of(serialized({"name": "VerticalFlip"}, p=0.5), tmp_path)
    flipped = 0
    for index in range(400):
        shown = policy.augment(make_image(), (0, 0, index))
        torch.testing.assert_close(policy(make_image(), (0, 0, index)), normalized_by_hand(shown))
        flipped += np.array_equal(shown, make_image()[::-1])
    assert abs(flipped - 200) < 4 * np.sqrt(400 * 0.25)


NORMALIZE = {"name": "Normalize", "mean": MEAN, "std": STD}
BBOX = {"format": "yolo", "label_fields": ["labels"]}
OLD_CUTOUT = {"name": "CoarseDropout", "max_holes": 1, "max_height": 8, "max_width": 8, "fill_value": 0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            serialized(OLD_CUTOUT),
            r"Argument\(s\) 'max_holes, max_height, max_width, fill_value' are not valid for .*CoarseDropout",
        ),
        (
            serialized({"name": "OneOf", "transforms": [{"__class_fullname__": "HorizontalFlip", "q": 1}]}),
            "HorizontalFlip has no 'p' parameter",
        ),
        (serialized({"name": "Cutout"}), "unknown transform 'Cutout'; did you mean 'CoarseDropout'"),
        (serialized({"name": "HorizontalFilp"}), "unknown transform 'HorizontalFilp'; did you mean 'Horiz"),
        (
            serialized({"name": "OneOf", "transforms": [{"__class_fullname__": "os.system", "p": 1}]}),
            "unknown transform 'os.system'",
        ),
        (
            serialized({"name": "RandomCrop", "height": "tall", "width": 32}),
            "height: Input should be a valid integer.*, but got 'tall'",
        ),
        (serialized({"name": "HorizontalFlip", "p": 2}), "p: Input should be less than or equal to 1.*got 2"),
        (serialized({"name": "HorizontalFlip"}, colour=1), "unexpected keyword argument 'colour'"),
        (serialized({"name": "HorizontalFlip"}, bbox_params=BBOX), "must not have bbox_params or keypoint_"),
        (serialized({"name": "Resize", "height": 24, "width": 24}), r"but got Tensor, .*\(3, 24, 24\)"),
        (
            serialized({"name": "RandomCrop", "height": 64, "width": 64}),
            "fails on an image: Crop size .*exceeds",
        ),
        (
            serialized(NORMALIZE),
            r"must make a float32 tensor \(3, 32, 32\) .* got ndarray, float32, \(32, 32, 3\)",
        ),
        (serialized({"name": "ToTensorV2"}), r"must make a float32 tensor .* got Tensor, torch.uint8"),
        (serialized({"name": "ToFloat"}), r"must have Normalize at its top level .* but got float32"),
        (
            serialized(NORMALIZE | {"p": 0.9}, {"name": "ToTensorV2"}),
            "Normalize and ToTensorV2 must have p: 1",
        ),
        (serialized(NORMALIZE, {"name": "ToTensorV2"}, p=0.9), "Normalize and ToTensorV2 must have p: 1"),
        (
            {"transform": {"__class_fullname__": "HorizontalFlip", "p": 1}},
            "a Compose, but got HorizontalFlip",
        ),
        ({"transforms": []}, r"must hold transform: \{__class_fullname__: Compose.*but got None"),
        (serialized() | {"transform": {"__class_fullname__": "Compose", "transforms": 5}}, "not iterable"),
        ([{"HorizontalFlip": {"p": 0.5}}], "must hold a mapping.*, but got list"),
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_wrong_file_is_told_on_one_line(values: Any, message: str, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        policy_of(values, tmp_path, suffix)
    assert "policy" + suffix in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".json", "{'p': 1}", "is not JSON: "),
        (".yaml", "a: [1", "is not YAML: "),
        (".yaml", "transform: !!python/object/apply:os.system ['false']", "is not YAML: "),
    ],
)
def test_a_file_that_cannot_be_parsed_is_told(suffix: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / f"policy{suffix}"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        build_policy(str(path), MEAN, STD)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_missing_file_is_told(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot read '.*nothing{suffix}': No such file"):
        build_policy(str(tmp_path / f"nothing{suffix}"), MEAN, STD)


def test_a_file_takes_no_options() -> None:
    with pytest.raises(UserError, match=r"policy 'mine\.yaml' is a file, which has no options, but got cutout"):
        build_policy("mine.yaml", MEAN, STD, {"cutout": 8})


# Import

IMPORT = """
    import os, socket
    tried = []
    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network in this test")
    socket.socket.connect = socket.getaddrinfo = refuse
    import {module}
    print(os.environ["NO_ALBUMENTATIONS_UPDATE"], bool(tried))
"""


@pytest.mark.parametrize(
    ("module", "update", "expected"),
    [
        ("eva.policies", None, ["1", "False"]),
        ("albumentations", "0", ["0", "True"]),  # the net would be seen, were it tried
    ],
)
def test_importing_policies_tries_no_connection(module: str, update: str | None, expected: list[str]) -> None:
    hidden = ("NO_ALBUMENTATIONS_UPDATE", "HTTPS_PROXY", "https_proxy")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    if update is not None:
        environment["NO_ALBUMENTATIONS_UPDATE"] = update
    root = Path(__file__).parents[1]
    code = textwrap.dedent(IMPORT.format(module=module))
    command = [sys.executable, "-W", "ignore", "-c", code]
    output = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    assert output.stdout.split() == expected


# Gallery


def test_the_gallery_shows_originals_and_the_draws_of_the_first_epochs() -> None:
    images = np.stack([make_image(seed) for seed in range(6)])
    labels = np.array([1, 1, 0, 2, 0, 1])
    policy = make_policy("crop_flip_cutout")
    picture = gallery(images, labels, ["ant", "bee", "cat"], policy, per_class=8, seed=3)

    assert picture.dtype == np.uint8
    side = 32 * GALLERY_SCALE
    step = side + GALLERY_GAP
    top, left = picture.shape[0] - 3 * step, picture.shape[1] - 9 * step
    assert 0 < top < step  # headings, and no more
    assert 0 < left < 2 * step
    for row, index in enumerate([2, 0, 3]):  # the first image of each class
        for column in range(9):
            y, x = top + row * step, left + column * step
            cell = picture[y : y + side, x : x + side]
            shown = images[index] if column == 0 else policy.augment(images[index], (3, column - 1, index))
            np.testing.assert_array_equal(cell, np.kron(shown, np.ones((GALLERY_SCALE, GALLERY_SCALE, 1))))
        # The name of the class is written beside its row, on white.
        beside = picture[top + row * step : top + row * step + side, :left]
        assert beside.min() < 50
        assert (beside[0] == 255).all()
    assert picture[:top].min() < 50


def test_the_gallery_tells_of_a_class_without_images() -> None:
    images, labels = make_image()[None], np.array([0])
    with pytest.raises(UserError, match="a gallery needs an image of each class, but got none of 'bee'"):
        gallery(images, labels, ["ant", "bee"], make_policy("flip"))
