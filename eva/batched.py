"""A policy's Albumentations pipeline on whole batches of uint8 images, by tensor operations on their device.

`batched` reads the transforms of a pipeline, wherever it came from, and gives each its equivalent: the same
distribution of draws, and for one draw the same pixels to the bit. A step below draws for a whole epoch at once, on
the host and by image index, so that an image's draw depends on neither batch nor device; then it is applied to any
batch of images. All arithmetic on pixels is of integers, so that every device computes the same.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from numpy.typing import NDArray
from torch import Tensor, nn

from eva.config import UserError
from eva.policies import FLIP_STREAM, SIZE, AlternatingFlip, Policy

# First in the entropy and larger than any seed in use, as for the order of the images.
DRAW_STREAM = int.from_bytes(b"draws")

# OpenCV's names of borders, and NumPy's for how they go on; a constant one is not among them.
BORDERS = {
    cv2.BORDER_REFLECT_101: "reflect",
    cv2.BORDER_REFLECT: "symmetric",
    cv2.BORDER_REPLICATE: "edge",
    cv2.BORDER_WRAP: "wrap",
}

LANES = 1 | 1 << 21 | 1 << 42  # a one in each of three lanes of an int64, see `lanes`

Shape = tuple[int, int]
Draws = tuple[Tensor, ...]


class NoEquivalent(Exception):
    """A transform, or a setting of it, that has no batched equivalent; says which."""


class Step(nn.Module):
    """One transform of a batch: uint8 (B, H, W, 3) and its draws (B, ...) in, uint8 (B, H', W', 3) out.

    Attributes:
        is_random: Whether there is anything to draw.
        alternates: Whether the draws are the same for all epochs, and every other epoch has the opposite of them.
        shape: Height and width of what comes out.
    """

    is_random = True
    alternates = False
    shape: Shape

    def draw(self, generator: np.random.Generator, num_images: int) -> Tensor:
        """Returns a draw for each image, (N, ...) on the host: what `forward` takes for a batch of them."""
        raise NotImplementedError


class Pad(Step):
    """Rows and columns around the image, of one color or continued as the border mode says."""

    is_random = False
    blank: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, transform: A.Pad, shape: Shape) -> None:
        super().__init__()
        sides = transform.get_params_dependent_on_data({}, {})
        self.left, self.right, self.top, self.bottom = (
            sides[f"pad_{side}"] for side in ("left", "right", "top", "bottom")
        )
        self.shape = shape[0] + self.top + self.bottom, shape[1] + self.left + self.right
        self.mode = BORDERS.get(transform.border_mode)
        if self.mode is None:
            # Whatever OpenCV makes of the fill: a lone whole number is that of red, with nothing of green and blue.
            point = transform.apply(np.zeros((1, 1, 3), np.uint8), pad_top=1, pad_bottom=0, pad_left=0, pad_right=0)
            self.register_buffer("blank", torch.from_numpy(np.tile(point[0, 0], self.shape[0] * self.shape[1])))
        else:
            sources = zip(shape, ((self.top, self.bottom), (self.left, self.right)), strict=True)
            rows, columns = (np.pad(np.arange(size), width, mode=self.mode) for size, width in sources)  # type: ignore[call-overload]
            self.register_buffer("rows", torch.from_numpy(rows))
            self.register_buffer("columns", torch.from_numpy(columns))

    def draw(self, generator: np.random.Generator, num_images: int) -> Tensor:
        return torch.empty((num_images, 0))

    def forward(self, images: Tensor, drawn: Tensor) -> Tensor:
        if self.mode is not None:
            return images.index_select(1, self.rows).index_select(2, self.columns)
        count, height, width, _ = images.shape
        padded = self.blank.repeat(count, 1).view(count, self.shape[0], 3 * self.shape[1])
        left = 3 * self.left
        padded[:, self.top : self.top + height, left : left + 3 * width] = images.reshape(count, height, 3 * width)
        return padded.view(count, *self.shape, 3)


class Crop(Step):
    """A window of fixed size at any place in the image; draws its top and left."""

    def __init__(self, transform: A.RandomCrop, shape: Shape) -> None:
        super().__init__()
        self.shape: Shape = transform.height, transform.width
        self.spare = shape[0] - self.shape[0], shape[1] - self.shape[1]
        if min(self.spare) < 0:
            raise NoEquivalent("RandomCrop that is larger than the image")
        if transform.p < 1 and max(self.spare) > 0:
            raise NoEquivalent("RandomCrop with p below 1")

    def draw(self, generator: np.random.Generator, num_images: int) -> Tensor:
        corners = [generator.integers(0, spare, num_images, np.int32, endpoint=True) for spare in self.spare]
        return torch.from_numpy(np.stack(corners, 1))

    def forward(self, images: Tensor, drawn: Tensor) -> Tensor:
        count, full_height, full_width, _ = images.shape
        height, width = self.shape
        # One row of a window is contiguous bytes: all that begin at some pixel, of which the windows' are copied.
        pixels = count * full_height * full_width
        rows = images.contiguous().as_strided((pixels - width + 1, 3 * width), (3, 1))
        image = torch.arange(count, device=images.device)[:, None]
        row = drawn[:, :1] + torch.arange(height, device=images.device)
        starts = (image * full_height + row) * full_width + drawn[:, 1:]  # (B, height)
        return rows.index_select(0, starts.flatten()).view(count, height, width, 3)


class Flip(Step):
    """Left for right; draws 1 or 0 for whether."""

    def __init__(self, transform: A.HorizontalFlip, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.p = transform.p

    def draw(self, generator: np.random.Generator, num_images: int) -> Tensor:
        return torch.from_numpy(applied(generator, num_images, self.p).astype(np.int32))

    def forward(self, images: Tensor, drawn: Tensor) -> Tensor:
        # Copying from both is faster than torch.where, and waits for no count of the flipped as an index of them would.
        both = torch.cat((images, images.flip(2)))
        return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * drawn)


class Alternate(Flip):
    """Left for right in every other epoch; draws 1 or 0 for whether in the even ones."""

    alternates = True

    def __init__(self, transform: AlternatingFlip, shape: Shape) -> None:
        super().__init__(transform, shape)
        if transform.p < 1:
            raise NoEquivalent("AlternatingFlip with p below 1")

    def draw(self, generator: np.random.Generator, num_images: int) -> Tensor:
        return torch.from_numpy(applied(generator, num_images, 0.5).astype(np.int32))


class Cutout(Step):
    """One hole of fixed size, filled with one color; draws its top and left, a top below the image for no hole."""

    kept: Tensor
    filled: Tensor

    def __init__(self, transform: A.CoarseDropout, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.p = transform.p
        if tuple(transform.num_holes_range) != (1, 1):
            raise NoEquivalent("CoarseDropout of more than one hole")
        if isinstance(transform.fill, str):
            raise NoEquivalent(f"CoarseDropout with fill: {transform.fill}")
        self.height, self.width = hole_size(transform, shape)
        point = transform.apply(np.zeros((1, 1, 3), np.uint8), holes=np.array([[0, 0, 1, 1]]), seed=0)
        # What stays of an image's row by the hole's left end, and what comes in its place; last: a row without hole.
        width = shape[1]
        ends = np.arange(width + 1)[:, None]
        hole = (np.arange(width) >= ends) & (np.arange(width) < ends + self.width)  # (width + 1, width)
        hole[-1] = False
        fill = np.where(hole[..., None], point[0, 0], np.uint8(0)).reshape(width + 1, 3 * width)
        self.register_buffer("kept", torch.from_numpy(np.where(hole, 0, 255).astype(np.uint8).repeat(3, axis=1)))
        self.register_buffer("filled", torch.from_numpy(fill))

    def draw(self, generator: np.random.Generator, num_images: int) -> Tensor:
        spare = self.shape[0] - self.height, self.shape[1] - self.width
        corners = np.stack([generator.integers(0, high, num_images, np.int32, endpoint=True) for high in spare], 1)
        corners[~applied(generator, num_images, self.p)] = self.shape[0], 0
        return torch.from_numpy(corners)

    def forward(self, images: Tensor, drawn: Tensor) -> Tensor:
        count, height, width, _ = images.shape
        below = torch.arange(height, device=images.device) - drawn[:, :1]  # (B, H): rows below the hole's top
        inside = (below >= 0) & (below < self.height)
        which = drawn[:, 1:].expand_as(inside).masked_fill(~inside, width).flatten()
        rows = images.reshape(count * height, 3 * width)
        cut = (rows & self.kept.index_select(0, which)).bitwise_or_(self.filled.index_select(0, which))
        return cut.view(count, height, width, 3)


class Affine(Step):
    """Shift, scale, rotation and shear; draws the first two rows of the inverse matrix, (6,) float64.

    By the fixed-point arithmetic of OpenCV's bilinear warpAffine, which rounds source positions to 1/32 of a
    pixel, and the weighted sum of four pixels half up.
    """

    blank: Tensor

    def __init__(self, transform: A.Affine, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.transform = transform
        if transform.interpolation != cv2.INTER_LINEAR or transform.border_mode != cv2.BORDER_CONSTANT:
            raise NoEquivalent("Affine that is not bilinear with a constant border")
        if transform.fit_output or transform.balanced_scale:
            raise NoEquivalent("Affine with fit_output or balanced_scale")
        beyond = np.array([[1, 0, 2], [0, 1, 0], [0, 0, 1.0]])  # shifts all of a pixel out of the picture
        point = transform.apply(np.zeros((1, 1, 3), np.uint8), matrix=beyond, output_shape=(1, 1))
        # Two pixels of border on each side: whatever lies farther out is of the border's color too.
        self.padded_shape = shape[0] + 4, shape[1] + 4
        blank = np.full(self.padded_shape, lanes(torch.from_numpy(point.copy())).item())
        self.register_buffer("blank", torch.from_numpy(blank))

    def draw(self, generator: np.random.Generator, num_images: int) -> Tensor:
        matrices = drawn_matrices(self.transform, self.shape, generator, num_images)
        matrices[~applied(generator, num_images, self.transform.p)] = np.eye(3)
        return torch.from_numpy(inverse(matrices))

    def forward(self, images: Tensor, drawn: Tensor) -> Tensor:
        count, height, width, _ = images.shape
        x, y = (position(drawn[:, part], self.shape) for part in (slice(0, 3), slice(3, 6)))  # (B, H, W), in 1/32
        pixels = self.blank.repeat(count, 1, 1)
        pixels[:, 2:-2, 2:-2] = lanes(images)
        # All in place from here on: for large results memory would be fetched anew, which costs more than arithmetic.
        stride = self.padded_shape[1]
        corner = (y >> 5).clamp_(-2, height).add_(2).mul_(stride).add_((x >> 5).clamp_(-2, width).add_(2))
        corner.add_(torch.arange(0, pixels.numel(), self.blank.numel(), device=images.device)[:, None, None])
        corner, pixels = corner.flatten(), pixels.flatten()
        right, down = x.bitwise_and_(31).flatten().long(), y.bitwise_and_(31).flatten().long()
        left = 32 - right
        above = pixels.index_select(0, corner).mul_(left)
        above.add_(pixels.index_select(0, corner.add_(1)).mul_(right))
        below = pixels.index_select(0, corner.add_(stride)).mul_(right)
        below.add_(pixels.index_select(0, corner.sub_(1)).mul_(left))
        warped = below.mul_(down).add_(above.mul_(down.neg_().add_(32)))
        warped.add_(512 * LANES).bitwise_right_shift_(10)
        green, blue = (warped >> 13).bitwise_and_(0xFF00), (warped >> 26).bitwise_and_(0xFF0000)
        colors = warped.bitwise_and_(255).bitwise_or_(green).bitwise_or_(blue).int()
        return unpacked(colors).view(count, height, width, 3)


class HueSaturationValue(Step):
    """Changes of hue, saturation and value by OpenCV's conversions; draws them as integers, and 1 or 0 for whether."""

    def __init__(self, transform: A.HueSaturationValue, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.p = transform.p
        self.limits = transform.hue_shift_limit, transform.sat_shift_limit, transform.val_shift_limit
        if not any(map(any, self.limits)):
            self.p = 0.0  # Albumentations leaves the image as it is, which a way through HSV does not

    def draw(self, generator: np.random.Generator, num_images: int) -> Tensor:
        hue, saturation, value = (generator.uniform(low, high, num_images) for low, high in self.limits)
        # A hue is rounded down after the sum; the others are truncated before it.
        changes = np.stack([np.floor(hue) % 180, np.trunc(saturation), np.trunc(value), np.ones(num_images)], 1)
        changes[~applied(generator, num_images, self.p)] = 0
        return torch.from_numpy(changes.astype(np.int32))

    def forward(self, images: Tensor, drawn: Tensor) -> Tensor:
        count, height, width, _ = images.shape
        to_hsv, to_rgb = color_tables(images.device)
        colors = packed(images)
        hsv = to_hsv.index_select(0, colors).view(count, height * width)
        hue_change, saturation_change, value_change, whether = drawn[:, :, None].unbind(1)
        # Shifting a sign to the right spreads it over all bits, which costs less than masks and remainders.
        hue = (hsv & 255).add_(hue_change - 180)  # in [-180, 180)
        hue.add_((hue >> 31).bitwise_and_(180))
        saturation = (hsv >> 8).bitwise_and_(255)
        saturation.add_((-saturation >> 31).bitwise_and_(saturation_change)).clamp_(0, 255)  # gray stays gray
        value = (hsv >> 16).add_(value_change).clamp_(0, 255)
        changed = to_rgb.index_select(0, value.mul_(256).add_(saturation).mul_(256).add_(hue).flatten())
        if self.p < 1:
            changed = torch.where(whether == 1, changed.view_as(hsv), colors.view_as(hsv)).flatten()
        return unpacked(changed).view(count, height, width, 3)


class BatchedPolicy(nn.Module):
    """A policy for batches: uint8 (B, H, W, 3) images and their draws in, normalized float32 (B, 3, H, W) out.

    Move it to the images' device with `.to(device)`.
    """

    steps: Sequence[Step]
    mean: Tensor
    factor: Tensor

    def __init__(
        self, name: str, steps: Sequence[Step], mean: NDArray[np.float32], factor: NDArray[np.float32]
    ) -> None:
        super().__init__()
        self.name = name
        self.steps = nn.ModuleList(steps)  # type: ignore[assignment]
        # As wide as a row of an image, which vector instructions get through in few pieces.
        for key, values in (("mean", mean), ("factor", factor)):
            self.register_buffer(key, torch.from_numpy(np.tile(np.broadcast_to(values, 3), SIZE).astype(np.float32)))

    @property
    def is_random(self) -> bool:
        """Whether there is anything to draw."""
        return any(step.is_random for step in self.steps)

    def draw(self, num_images: int, seed: int, epoch: int) -> Draws:
        """Returns the draws of an epoch for each image by index, on the host: a pure function of the arguments."""
        of_epoch = np.random.default_rng([DRAW_STREAM, seed, epoch])

        def drawn(step: Step) -> Tensor:
            if step.alternates:
                return step.draw(np.random.default_rng([FLIP_STREAM, seed]), num_images) ^ (epoch % 2)
            return step.draw(of_epoch, num_images)

        return tuple(map(drawn, self.steps))

    def augment(self, images: Tensor, draws: Draws) -> Tensor:
        """Returns what a call with the same arguments gives, but before Normalize: uint8 (B, H, W, 3).

        Args:
            images: uint8 (B, H, W, 3), RGB. Not changed.
            draws: Those of these images, each (B, ...) on the same device.
        """
        for step, drawn in zip(self.steps, draws, strict=True):
            images = step(images, drawn)
        return images

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """Returns augmented, normalized images, float32 (B, 3, H, W), channels-last in memory."""
        images = self.augment(images, draws)
        count, height, width, _ = images.shape
        rows = images.reshape(count, height, 3 * width)
        normalized = rows.float().sub_(self.mean).mul_(self.factor)
        return normalized.view(count, height, width, 3).permute(0, 3, 1, 2)


def take(draws: Draws, indices: Tensor) -> Draws:
    """Returns the draws of the images at these indices, int64 (B,)."""
    return tuple(drawn.index_select(0, indices) for drawn in draws)


def packed(images: Tensor) -> Tensor:
    """Returns pixels uint8 (..., 3) as int32 (N,), a byte a channel from the lowest."""
    return nn.functional.pad(images, (0, 1)).view(torch.int32).flatten()


def unpacked(pixels: Tensor) -> Tensor:
    """Returns what `packed` made int32 of: uint8 (N, 3)."""
    return pixels.view(torch.uint8).view(-1, 4)[:, :3].contiguous()


def lanes(images: Tensor) -> Tensor:
    """Returns pixels uint8 (..., 3) as int64 (...): 21 bits a channel, so that one product weighs all three."""
    pixels = packed(images).long()
    green, blue = (pixels & 0xFF00).bitwise_left_shift_(13), (pixels & 0xFF0000).bitwise_left_shift_(26)
    return pixels.bitwise_and_(255).bitwise_or_(green).bitwise_or_(blue).view(images.shape[:-1])


STEPS: dict[type, Callable[[Any, Shape], Step]] = {
    A.Pad: Pad,
    A.RandomCrop: Crop,
    A.HorizontalFlip: Flip,
    AlternatingFlip: Alternate,
    A.CoarseDropout: Cutout,
    A.Affine: Affine,
    A.HueSaturationValue: HueSaturationValue,
}


def batched(policy: object) -> BatchedPolicy | None:
    """Returns a policy's equivalent for batches of 32x32 images, or None if a part of it has none."""
    try:
        return require_batched(policy)
    except UserError:
        return None


def require_batched(policy: object) -> BatchedPolicy:
    """Returns a policy's equivalent for batches of 32x32 images.

    Raises:
        UserError: A part of it has none; it is named.
    """
    if not isinstance(policy, Policy):
        raise UserError("augmentation=batched needs a policy of Albumentations' transforms, but got a function")
    try:
        return _equivalent(policy)
    except NoEquivalent as reason:
        raise UserError(
            f"policy {policy.name!r} cannot run on batches, as there is no equivalent of {reason}; "
            "choose augmentation=auto or albumentations"
        ) from None


def _equivalent(policy: Policy) -> BatchedPolicy:
    transforms = list(_flat(policy.pipeline))
    tail = [type(transform) for transform in transforms[-2:]]
    if tail != [A.Normalize, ToTensorV2] or transforms[-2].normalization != "standard":
        raise NoEquivalent("another end than a standard Normalize and ToTensorV2")
    normalize, shape, steps = transforms[-2], (SIZE, SIZE), list[Step]()
    for transform in transforms[:-2]:
        if transform.p <= 0:
            continue
        name = type(transform).__name__
        if type(transform) not in STEPS:
            raise NoEquivalent(name)
        step = STEPS[type(transform)](transform, shape)
        if transform.p < 1 and step.shape != shape:
            raise NoEquivalent(f"{name} with p below 1")
        steps.append(step)
        shape = step.shape
    if shape != (SIZE, SIZE):
        raise NoEquivalent(f"images of {shape[0]}x{shape[1]}")
    return BatchedPolicy(policy.name, steps, normalize.mean_np, normalize.denominator)


def _flat(pipeline: A.Compose) -> Iterator[A.BasicTransform]:
    """Yields the transforms of a pipeline in their order, those of pipelines within it too."""
    if pipeline.p < 1:
        raise NoEquivalent("Compose with p below 1")
    for transform in pipeline.transforms:
        if type(transform) is A.Compose:
            yield from _flat(transform)
        else:
            yield transform


def applied(generator: np.random.Generator, num_images: int, p: float) -> NDArray[np.bool_]:
    """Draws for each image whether a transform of probability `p` is applied."""
    return generator.random(num_images) < p


def hole_size(transform: A.CoarseDropout, shape: Shape) -> Shape:
    """Returns height and width of the hole as Albumentations draws them: pixels, or below 1 shares of the image.

    Raises:
        NoEquivalent: They are not fixed.
    """
    ranges = transform.hole_height_range, transform.hole_width_range
    if ranges[0][1] >= 1:  # by the height, for both
        bounds = [(int(low), int(min(high, size))) for (low, high), size in zip(ranges, shape, strict=True)]
    else:
        bounds = [(int(low * size), int(high * size)) for (low, high), size in zip(ranges, shape, strict=True)]
    (height, most_height), (width, most_width) = bounds
    if (height, width) != (most_height, most_width):
        raise NoEquivalent("CoarseDropout whose hole has no fixed size")
    return height, width


def drawn_matrices(
    transform: A.Affine, shape: Shape, generator: np.random.Generator, num_images: int
) -> NDArray[np.float64]:
    """Draws Affine's matrices (N, 3, 3) from where a pixel is to where it goes: first scaled, about the center."""

    def uniform(limits: Sequence[float]) -> NDArray[np.float64]:
        low, high = limits
        return generator.uniform(low, high, num_images)

    def matrices(rows: Sequence[Sequence[Any]]) -> NDArray[np.float64]:
        made = np.zeros((num_images, 3, 3))
        for (row, column), entry in np.ndenumerate(np.array([*rows, [0, 0, 1]], dtype=object)):
            made[:, row, column] = entry
        return made

    height, width = shape
    if transform.translate_px is not None:
        bounds = [[int(bound) for bound in transform.translate_px[axis]] for axis in "xy"]
        x, y = (generator.integers(low, high, num_images, endpoint=True) for low, high in bounds)
    else:
        x, y = (
            np.trunc(uniform(transform.translate_percent[a]) * s) for a, s in zip("xy", (width, height), strict=True)
        )
    shear_x, shear_y = (np.tan(np.deg2rad(-uniform(transform.shear[axis]))) for axis in "xy")
    scale_x = uniform(transform.scale["x"])
    scale_y = scale_x if transform.keep_ratio else uniform(transform.scale["y"])
    angle = np.deg2rad(uniform(transform.rotate) % 360)
    middle_x, middle_y = width / 2 - 0.5, height / 2 - 0.5
    return (
        matrices([[1, 0, middle_x], [0, 1, middle_y]])
        @ matrices([[1, 0, x], [0, 1, y]])
        @ matrices([[1, shear_x, 0], [shear_y, 1, 0]])
        @ matrices([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0]])
        @ matrices([[scale_x, 0, 0], [0, scale_y, 0]])
        @ matrices([[1, 0, -middle_x], [0, 1, -middle_y]])
    )


def inverse(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the first two rows of the inverses of affine matrices (N, 3, 3) as (N, 6), by warpAffine's arithmetic.

    One that Albumentations takes for the identity, and leaves the image alone for, counts as the identity.
    """
    identity = np.asarray(np.isclose(matrices, np.eye(3))).all((1, 2), keepdims=True)
    (a, b, c), (d, e, f) = np.moveaxis(np.where(identity, np.eye(3), matrices)[:, :2], 0, -1)
    determinant = a * e - b * d
    factor = np.divide(1, determinant, out=np.zeros_like(determinant), where=determinant != 0)
    a, e, b, d = e * factor, a * factor, b * -factor, d * -factor
    return np.stack([a, b, -a * c - b * f, d, e, -d * c - e * f], 1)


def position(row: Tensor, shape: Shape) -> Tensor:
    """Returns where each pixel comes from along one axis, (B, H, W) int32 in 1/32 pixel, by warpAffine's roundings.

    Args:
        row: That of the inverse matrix, (B, 3) float64: the axis' position is row[0] x + row[1] y + row[2].
        shape: Height and width of the images.
    """
    y, x = (torch.arange(size, dtype=torch.float64, device=row.device) for size in shape)
    along = (row[:, :1] * x).mul_(1024).round_().int()  # (B, W)
    across = (row[:, 1:2] * y + row[:, 2:]).mul_(1024).round_().int() + 16  # (B, H)
    return (across[:, :, None] + along[:, None, :]) >> 5


@functools.cache
def color_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns OpenCV's HSV of each RGB color and the other way round: int32 (2**24,) each, bytes from the lowest."""
    colors = np.arange(2**24, dtype="<u4").view(np.uint8).reshape(-1, 4)
    # In rows as long as an image's, should OpenCV treat the ends of a row in another way.
    pixels = np.ascontiguousarray(colors[:, :3]).reshape(-1, SIZE, 3)
    tables = []
    for conversion in (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB):
        table = np.zeros_like(colors)
        table[:, :3] = cv2.cvtColor(pixels, conversion).reshape(-1, 3)
        tables.append(torch.from_numpy(table.view("<i4")[:, 0]).to(device))
    return tables[0], tables[1]
