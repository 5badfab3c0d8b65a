"""Augmentation policies: Albumentations pipelines by name or from a file, and a picture of what they do.

A policy is no more than the defaults of the options it has (`POLICIES`); `_transforms` makes the pipeline of
them, in one order for all: crops, flips, shift/scale/rotate, color, cutout. Cutout comes last so that its hole
stays square and filled with exactly the mean of the train images. Whatever else lies outside of the image is
black, as for torchvision's `RandomCrop(32, padding=4)`, which pads before the normalization.
"""

import difflib
import json
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

# Without this, albumentations asks PyPI for a newer version when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.core.serialization import SERIALIZABLE_REGISTRY, serialize_enum, shorten_class_name
from albumentations.pytorch import ToTensorV2
from PIL import Image, ImageDraw, ImageFont
from pydantic import ValidationError

from eva.config import UserError, read_text, read_yaml, unknown_name
from eva.stored_images import Images

SIZE = 32  # height and width of every image that a policy returns, in pixels
FILE_SUFFIXES = (".yaml", ".yml", ".json")
TAIL = (A.Normalize, ToTensorV2)
# First in the entropy of alternating flips, which all epochs share.
FLIP_STREAM = int.from_bytes(b"flips")
RENAMED = {"Cutout": "CoarseDropout"}  # what difflib would not find

# The gallery, in pixels of the picture (`GALLERY_SCALE`: picture pixels in an image pixel).
GALLERY_SCALE = 3
GALLERY_GAP = 4
GALLERY_FONT = 18


@dataclass(frozen=True)
class Option:
    """What an option of a policy means, and the values it may take."""

    help: str
    high: float
    whole: bool = False  # only whole numbers

    def problem(self, value: float) -> str | None:
        """Returns the rule that `value` breaks, or None."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and 0 <= value <= self.high and (not self.whole or value == int(value)):
            return None
        kind = "whole number" if self.whole else "number"
        return f"must be a {kind} from 0 to {self.high:g} ({self.help}), but got {value!r}"


# At 0, an option switches off what it is about.
OPTIONS: dict[str, Option] = {
    "pad": Option("pixels of black on each side, before a random crop to 32x32", SIZE, whole=True),
    "reflect": Option("pixels of reflection on each side, before a random crop to 32x32", SIZE - 1, whole=True),
    "flip": Option("probability of a horizontal flip", 1),
    "alternate": Option("1 for a horizontal flip of each image in every other epoch", 1, whole=True),
    "shift": Option("largest shift in pixels, each axis for itself", SIZE, whole=True),
    "scale": Option("largest relative change of size, 0.1 for 0.9 to 1.1", 0.9),
    "rotate": Option("largest angle in degrees, either way", 180),
    "hue": Option("largest change of hue, 180 is the full circle", 180),
    "saturation": Option("largest change of saturation, in steps of 1/255", 255),
    "value": Option("largest change of brightness (value), in steps of 1/255", 255),
    "cutout": Option("side in pixels of one square hole", SIZE, whole=True),
}

POLICIES: dict[str, dict[str, float]] = {
    "test": {},
    "flip": {"flip": 0.5},
    "crop_flip": {"pad": 4, "flip": 0.5},
    "crop_flip_cutout": {"pad": 4, "flip": 0.5, "cutout": 8},
    "flip_cutout": {"flip": 0.5, "cutout": 8},
    "color": {"flip": 0.5, "rotate": 15, "hue": 10, "saturation": 30, "value": 20, "cutout": 8},
    "crop_cutout_rotate": {"pad": 4, "cutout": 16, "rotate": 5},
    "flip_shift_rotate": {"flip": 0.5, "shift": 2, "scale": 0.1, "rotate": 15},
    # Of the CIFAR-10 speed records (arXiv 2404.00498).
    "speedrun": {"reflect": 2, "alternate": 1},
    # No flips: a mirrored digit is another digit, or none.
    "digits": {"shift": 2, "scale": 0.1, "rotate": 10},
}


class AlternatingFlip(A.HorizontalFlip):  # type: ignore[misc]
    """Flips each image in every other epoch, a random half of them in the even ones (arXiv 2404.00498, section 3.6).

    So every two epochs show each image both ways, where independent flips show half of the images twice the same.
    """

    def __init__(self, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.flips = False

    def name_draw(self, seed: Sequence[int]) -> None:
        """Takes the draw that comes next: (run seed, epoch, image index), or any other numbers."""
        run, epoch, *image = (*seed, 0, 0)[: max(len(seed), 2)]
        self.flips = bool(np.random.default_rng([FLIP_STREAM, run, *image]).random() < 0.5) != bool(epoch % 2)

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return cast(np.ndarray, super().apply(img, **params)) if self.flips else img


class Policy:
    """A named Albumentations pipeline: uint8 (H, W, 3) RGB in, normalized float32 (3, H, W) out.

    Whatever state the pipeline holds is replaced before each random draw, so that worker processes, their
    number and what was drawn before never matter.
    """

    def __init__(self, name: str, pipeline: A.Compose) -> None:
        self.name = name
        self.pipeline = pipeline
        # Shares its transforms with `pipeline`. The tail draws nothing, so one seed gives both the same draw.
        self._untailed = A.Compose([t for t in pipeline.transforms if not isinstance(t, TAIL)], p=pipeline.p)
        self._alternating = [transform for transform in _leaves(pipeline) if isinstance(transform, AlternatingFlip)]

    @property
    def is_random(self) -> bool:
        """Whether the policy does more than Normalize and ToTensorV2, and so needs a seed."""
        return bool(self._untailed.transforms)

    def __call__(self, image: np.ndarray, seed: Sequence[int] | None = None) -> torch.Tensor:
        """Returns the augmented, normalized image, float32 (3, H, W): a pure function of `image` and `seed`.

        Args:
            image: uint8 (H, W, 3), RGB. Not changed.
            seed: Integers of at least 0 that name the draw: (run seed, epoch, sample index). Only a policy
                that is not random may go without.

        Raises:
            ValueError: The policy is random and no seed is given.
        """
        return cast(torch.Tensor, self._apply(self.pipeline, image, seed))

    def augment(self, image: np.ndarray, seed: Sequence[int] | None = None) -> np.ndarray:
        """Returns what a call with the same arguments draws, but before Normalize: uint8 (H, W, 3)."""
        return cast(np.ndarray, self._apply(self._untailed, image, seed))

    def describe(self) -> dict[str, Any]:
        """Returns the pipeline as plain values, which `build_policy` takes back from a YAML or JSON file."""
        return cast(dict[str, Any], serialize_enum(A.to_dict(self.pipeline)))

    def _apply(self, pipeline: A.Compose, image: np.ndarray, seed: Sequence[int] | None) -> Any:
        if self.is_random:
            if seed is None:
                raise ValueError(f"policy {self.name!r} is random: call it with a seed")
            generator = np.random.default_rng(seed)
            # set_random_seed would make two new generators for every transform, at four times the cost.
            pipeline.set_random_state(generator, random.Random(int(generator.integers(2**63))))
            for transform in self._alternating:
                transform.name_draw(seed)
        return pipeline(image=image)["image"]


def _leaves(node: Any) -> Iterator[A.BasicTransform]:
    """Yields the transforms of a pipeline, those of pipelines within it too."""
    for transform in node.transforms:
        yield from _leaves(transform) if hasattr(transform, "transforms") else (transform,)


def policy_names() -> tuple[str, ...]:
    """Returns the names of the policies."""
    return tuple(POLICIES)


def build_policy(
    name: str,
    mean: Sequence[float],
    std: Sequence[float],
    options: Mapping[str, float | int | bool] | None = None,
) -> Policy:
    """Returns the policy of a name, or of an Albumentations file.

    A file holds what `A.save` writes. Without Normalize and ToTensorV2 of its own it gets those of the train
    images; with them it is left as it is.

    Args:
        name: A name of `POLICIES`, or the path of a file that ends in .yaml, .yml or .json.
        mean: Of the red, green and blue values of the train images, in [0, 1]. Cutout fills with it.
        std: Their standard deviations, on the same scale.
        options: Values in place of the policy's defaults, by the names in `OPTIONS`.

    Raises:
        UserError: An unknown policy, option or transform, a value out of range, an argument that a transform
            does not have, or a file that cannot be read or does not make float32 (3, 32, 32) of an image.
    """
    tail = [A.Normalize(mean=tuple(map(float, mean)), std=tuple(map(float, std))), ToTensorV2()]
    if name.endswith(FILE_SUFFIXES):
        if options:
            raise UserError(f"policy {name!r} is a file, which has no options, but got {', '.join(options)}")
        return _policy_from_file(name, tail)
    if name not in POLICIES:
        raise UserError(f"{unknown_name('policy', name, POLICIES)}; or a file that ends in .yaml, .yml or .json")
    values = {**POLICIES[name], **_checked(name, options or {})}
    fill = tuple(round(255 * float(channel)) for channel in mean)
    with _problems_told(f"policy {name!r}"):
        return Policy(name, A.Compose([*_transforms(values, fill), *tail]))


def _checked(name: str, options: Mapping[str, float | int | bool]) -> dict[str, float]:
    known = POLICIES[name]
    if options and not known:
        raise UserError(f"policy {name!r} has no options, but got {', '.join(options)}")
    problems = []
    for key, value in options.items():
        if key not in known:
            problems.append(unknown_name(f"option of policy {name!r}:", key, known))
        elif rule := OPTIONS[key].problem(value):
            problems.append(f"option {key!r} of policy {name!r} {rule}")
    if problems:
        raise UserError("\n".join(problems))
    return {key: int(value) if OPTIONS[key].whole else float(value) for key, value in options.items()}


def _transforms(values: Mapping[str, float], fill: tuple[int, ...]) -> list[A.BasicTransform]:
    """Returns the transforms that `values`, named as in `OPTIONS`, ask for; cutout fills with RGB `fill`."""

    def has(*names: str) -> bool:
        return any(values.get(name) for name in names)

    def limits(name: str, middle: float = 0) -> tuple[float, float]:
        return middle - values.get(name, 0), middle + values.get(name, 0)

    transforms: list[A.BasicTransform] = []
    if has("pad"):
        transforms += [A.Pad(padding=values["pad"], fill=0), A.RandomCrop(SIZE, SIZE)]
    if has("reflect"):
        mirror = cv2.BORDER_REFLECT_101
        transforms += [A.Pad(padding=values["reflect"], border_mode=mirror), A.RandomCrop(SIZE, SIZE)]
    if has("flip"):
        transforms.append(A.HorizontalFlip(p=values["flip"]))
    if has("alternate"):
        transforms.append(AlternatingFlip())
    if has("shift", "scale", "rotate"):
        # The shift in pixels, because translate_percent is rounded towards zero.
        transforms.append(
            A.Affine(
                translate_px={"x": limits("shift"), "y": limits("shift")},
                scale=limits("scale", 1.0),
                keep_ratio=True,
                rotate=limits("rotate"),
                fill=0,
                p=1,
            )
        )
    if has("hue", "saturation", "value"):
        transforms.append(A.HueSaturationValue(limits("hue"), limits("saturation"), limits("value"), p=1))
    if has("cutout"):
        side = (values["cutout"], values["cutout"])
        transforms.append(A.CoarseDropout((1, 1), hole_height_range=side, hole_width_range=side, fill=fill, p=1))
    return transforms


@contextmanager
def _problems_told(source: str) -> Iterator[None]:
    """Makes a UserError, one line that begins with `source`, of what building or applying a pipeline raises.

    Albumentations 2.0.8 warns about arguments that a transform does not know (`max_holes` or `fill_value`, of
    older versions) and goes on with the defaults, which trains something else. Warnings count as errors here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's: what is not finite is told by `_check_output`
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # a file may ask for any transform, and each fails in its own way
            raise UserError(f"{source}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    if isinstance(error.__cause__, ValidationError):
        lines = error.__cause__.errors()
        return "; ".join(
            f"{line['loc'][0] if line['loc'] else line['type']}: {line['msg']}, but got {line['input']!r}"
            for line in lines
        )
    return " ".join(str(error).split()) or type(error).__name__


def _policy_from_file(path: str, tail: list[A.BasicTransform]) -> Policy:
    source = f"policy {path!r}"
    values = _read_json(path) if path.endswith(".json") else read_yaml(path)
    with _problems_told(source):
        _check_transforms(source, values.get("transform"))
        # Only classes of Albumentations' own registry, found by name: nothing in the file is imported or run.
        pipeline = A.from_dict(values)
    if not isinstance(pipeline, A.Compose):
        raise UserError(f"{source} must hold a Compose, but got {type(pipeline).__name__}")
    if pipeline.processors:
        raise UserError(f"{source} must not have bbox_params or keypoint_params: there are only images")
    own_tail = [transform for transform in pipeline.transforms if isinstance(transform, TAIL)]
    if not own_tail:
        pipeline = A.Compose([pipeline, *tail])
    elif any(transform.p < 1 for transform in (pipeline, *own_tail)):
        raise UserError(f"{source}: the Compose, Normalize and ToTensorV2 must have p: 1")
    policy = Policy(path, pipeline)
    _check_output(source, policy)
    return policy


def _read_json(path: str) -> dict[str, Any]:
    # Not by read_yaml: PyYAML takes JSON's 1e-05 for text.
    try:
        values = json.loads(read_text(path))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path!r} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path!r} must hold a mapping, but got {type(values).__name__}")
    return values


def _check_transforms(source: str, node: Any) -> None:
    """Raises a UserError where a serialized transform, or one inside it, has no name or an unknown one."""
    if not isinstance(node, Mapping) or not isinstance(node.get("__class_fullname__"), str):
        rule = "must hold transform: {__class_fullname__: Compose, transforms: [...]}, as A.save writes it"
        raise UserError(f"{source} {rule}, but got {node!r:.60}")
    name = shorten_class_name(node["__class_fullname__"])
    if name not in SERIALIZABLE_REGISTRY:
        # The nearest only: there are more than a hundred.
        nearest = [RENAMED.get(name), *difflib.get_close_matches(name, SERIALIZABLE_REGISTRY, n=1)]
        hint = next((f"; did you mean {other!r}?" for other in nearest if other), "")
        raise UserError(f"{source}: unknown transform {name!r}{hint}")
    for child in node.get("transforms", ()):
        _check_transforms(source, child)


def _check_output(source: str, policy: Policy) -> None:
    """Raises a UserError if the policy fails on an image, or makes anything but float32 (3, 32, 32) of it."""
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    for draw in range(8):  # a transform may be left out of some draws
        with _problems_told(f"{source} fails on an image"):
            output, shown = policy(image, (draw,)), policy.augment(image, (draw,))
        got = f"{type(output).__name__}, {output.dtype}, {tuple(output.shape)}"
        if got != f"Tensor, torch.float32, (3, {SIZE}, {SIZE})":
            raise UserError(f"{source} must make a float32 tensor (3, {SIZE}, {SIZE}) of an image, but got {got}")
        if not torch.isfinite(output).all():
            raise UserError(f"{source} must make finite numbers of an image: is a deviation (std) of Normalize 0?")
        if shown.dtype != np.uint8:
            rule = "must have Normalize at its top level and uint8 before it"
            raise UserError(f"{source} {rule}, but got {shown.dtype}")


def gallery(
    images: Images,
    labels: np.ndarray,
    classes: Sequence[str],
    policy: Policy,
    per_class: int = 8,
    seed: int = 0,
) -> np.ndarray:
    """Returns a picture, uint8 (height, width, 3): for each class its first image and samples of the policy.

    The samples are the draws (seed, epoch, index in `images`) of the first `per_class` epochs.

    Args:
        images: uint8 (N, H, W, 3), RGB.
        labels: Class index of each image, (N,).
        classes: Name of each class.
        policy: What makes the samples.
        per_class: Samples in a row.
        seed: The run's.

    Raises:
        UserError: A class has no image.
    """
    rows = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(np.asarray(labels) == label)
        if not len(members):
            raise UserError(f"a gallery needs an image of each class, but got none of {name!r}")
        index = int(members[0])
        samples = [policy.augment(images[index], (seed, epoch, index)) for epoch in range(per_class)]
        rows.append([images[index], *samples])
    return _with_headings(_grid(np.array(rows)), classes)


def _grid(cells: np.ndarray) -> np.ndarray:
    """Returns cells (rows, columns, H, W, 3) as one picture: pixels upscaled, white after each cell."""
    cells = cells.repeat(GALLERY_SCALE, axis=2).repeat(GALLERY_SCALE, axis=3)
    gaps = ((0, 0), (0, 0), (0, GALLERY_GAP), (0, GALLERY_GAP), (0, 0))
    cells = np.pad(cells, gaps, constant_values=255)
    rows, columns, height, width, channels = cells.shape
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def _with_headings(grid: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Returns the picture with the class beside each row and, above, what the columns show."""
    font = ImageFont.load_default(GALLERY_FONT)
    left = int(max(font.getlength(name) for name in classes)) + 2 * GALLERY_FONT
    top = 2 * GALLERY_FONT
    picture = Image.new("RGB", (left + grid.shape[1], top + grid.shape[0]), "white")
    picture.paste(Image.fromarray(grid), (left, top))
    draw = ImageDraw.Draw(picture)
    cell = grid.shape[0] // len(classes)  # images are square, and so are cells
    draw.text((left, top // 2), "original", "black", font, anchor="lm")
    draw.text((left + cell, top // 2), "augmented", "black", font, anchor="lm")
    for row, name in enumerate(classes):
        draw.text((left - GALLERY_FONT // 2, top + (row + 0.5) * cell), name, "black", font, anchor="rm")
    return np.asarray(picture)
