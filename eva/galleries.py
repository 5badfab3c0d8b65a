"""Galleries of images: what a model said about each, and what it looked at, as matplotlib figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eva.figures import QUIET_COLOR, Picture, literal, shown, wrapped

RIGHT_COLOR, WRONG_COLOR = "#1a7f37", "#c62828"
RIGHT_SIGN, WRONG_SIGN = "✓", "✗"  # colour alone would not tell everyone

# Inches.
PICTURE, GAP, SEAM, LINE, MARGIN = 1.6, 0.2, 0.05, 0.18, 0.1
PAIRED_PICTURE = 128 / 120  # an overlay of 128 pixels stays as sharp as it is in a file of `figures.save`
NARROWEST = 4.0  # so that a title finds room
# Points.
TITLE_SIZE, TEXT_SIZE, ID_SIZE = 13.0, 10.0, 7.5


@dataclass(frozen=True)
class Tile:
    """One image and what a model said about it.

    Attributes:
        image: uint8 RGB, (H, W, 3).
        truth: Name of the label's class; any text at all, as `prediction` and `id` are.
        prediction: Name of the predicted class.
        confidence: Probability of the predicted class, 0 to 1.
        id: Name of the image; it is shown if there is one.
    """

    image: NDArray[np.uint8]
    truth: str
    prediction: str
    confidence: float
    id: str = ""

    @property
    def correct(self) -> bool:
        """Whether the predicted class is the label."""
        return self.prediction == self.truth


def grid(tiles: Sequence[Tile], title: str, columns: int = 5) -> Figure:
    """Returns images in rows, in the given order, each with truth, prediction and confidence below it.

    Args:
        tiles: Any number of images; of none, the figure says so.
        title: Of the figure; it should say how many of how many these are, and in which order.
        columns: Images in a full row.
    """
    return _cells([[tile.image] for tile in tiles], tiles, title, columns, PICTURE)


def gradcam_grid(tiles: Sequence[Tile], overlays: Sequence[NDArray[np.uint8]], title: str, columns: int = 5) -> Figure:
    """Returns images in rows as `grid` does, each with its Grad-CAM overlay at its right.

    Args:
        tiles: Any number of images; of none, the figure says so.
        overlays: uint8 RGB, (H, W, 3), one for each tile, such as `gradcam.overlay` returns.
        title: Of the figure.
        columns: Pairs of images in a full row.

    Raises:
        ValueError: There are not as many overlays as tiles.
    """
    pairs = [[tile.image, overlay] for tile, overlay in zip(tiles, overlays, strict=True)]
    return _cells(pairs, tiles, title, columns, PAIRED_PICTURE)


def layers_row(
    tile: Tile,
    heat_maps: Sequence[NDArray[np.uint8]],
    overlays: Sequence[NDArray[np.uint8]],
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]] = (),
    title: str = "what the network looked at, layer by layer",
) -> Figure:
    """Returns one image beside what several layers looked at: heat maps in one row, overlays in the next.

    Args:
        tile: The image.
        heat_maps: uint8 RGB, (H, W, 3), one for each layer.
        overlays: The same over the image.
        names: Of the layers.
        sizes: Height and width of each layer's own map, to be told beside its name; none to leave them out.
        title: Of the figure.

    Raises:
        ValueError: There are not as many heat maps, overlays, names and sizes.
    """
    step = PICTURE + GAP
    figure, top = _sheet((1 + len(names)) * step - GAP, LINE + 2 * PICTURE + SEAM, title)
    _place(figure, tile.image, MARGIN, top + LINE, PICTURE, _color(tile))
    _caption(figure, tile, MARGIN, top + LINE + PICTURE, PICTURE)
    notes = [f"{height} x {width}" for height, width in sizes] or [""] * len(names)
    layers = zip(heat_maps, overlays, names, notes, strict=True)
    for number, (heat_map, overlay, name, note) in enumerate(layers, start=1):
        left = MARGIN + number * step
        _write(figure, left, top, shown(name, 72 * (PICTURE - 0.7), TEXT_SIZE), TEXT_SIZE)
        _write(figure, left + PICTURE, top, note, TEXT_SIZE, QUIET_COLOR, ha="right")
        _place(figure, heat_map, left, top + LINE, PICTURE, QUIET_COLOR)
        _place(figure, overlay, left, top + LINE + PICTURE + SEAM, PICTURE, QUIET_COLOR)
    return figure


def _cells(
    images: Sequence[Sequence[NDArray[np.uint8]]], tiles: Sequence[Tile], title: str, columns: int, side: float
) -> Figure:
    """Returns a cell for each tile, row by row: its images beside each other, its caption below them."""
    if not tiles:
        figure, _ = _sheet(NARROWEST, 0.5 * PICTURE, title)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.text(0.5, 0.35, "none", size=TITLE_SIZE, color=QUIET_COLOR, ha="center")
        return figure
    columns = min(columns, len(tiles))
    width = len(images[0]) * (side + SEAM) - SEAM
    lines = 3 if any(tile.id for tile in tiles) else 2
    height = side + SEAM + lines * LINE
    rows = math.ceil(len(tiles) / columns)
    figure, top = _sheet(columns * (width + GAP) - GAP, rows * (height + GAP) - GAP, title)
    for number, (tile, pictures) in enumerate(zip(tiles, images, strict=True)):
        left, upper = MARGIN + number % columns * (width + GAP), top + number // columns * (height + GAP)
        for position, picture in enumerate(pictures):
            _place(figure, picture, left + position * (side + SEAM), upper, side, _color(tile))
        _caption(figure, tile, left, upper + side, width)
    return figure


def _sheet(width: float, height: float, title: str) -> tuple[Picture, float]:
    """Returns a figure with a title over room of this size, and where the room begins, in inches from the top."""
    total = max(width, NARROWEST)
    lines = wrapped(title, 72 * total, TITLE_SIZE)
    top = MARGIN + SEAM + 1.35 * (lines.count("\n") + 1) * TITLE_SIZE / 72
    figure = Picture(figsize=(total + 2 * MARGIN, top + height + MARGIN))
    _write(figure, MARGIN, MARGIN, lines, TITLE_SIZE)
    return figure, top


def _color(tile: Tile) -> str:
    return RIGHT_COLOR if tile.correct else WRONG_COLOR


def _write(figure: Picture, left: float, top: float, text: str, size: float, color: str = "black", **how: str) -> None:
    """Writes a text into a figure, its upper edge at inches from the figure's upper left corner."""
    width, height = figure.get_size_inches()
    style = {"size": size, "color": color, "va": "top", **literal(), **how}
    figure.text(left / width, 1 - top / height, text, **style)


def _place(figure: Picture, image: NDArray[np.uint8], left: float, top: float, side: float, color: str) -> None:
    """Places an image in a square of a figure, at inches from its upper left corner, in a frame of a colour."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
    # Whole pixels where an image is much enlarged, and smooth ones where it is not.
    axes.imshow(image, interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=2)


def _caption(figure: Picture, tile: Tile, left: float, top: float, width: float) -> None:
    """Writes a tile's truth, its prediction with confidence, and its id, below a picture of this width in inches.

    Names are texts of their own: one that is written from right to left would turn around what stands beside it.
    """
    color, sign = _color(tile), RIGHT_SIGN if tile.correct else WRONG_SIGN
    first, second, third = (top + SEAM + line * LINE for line in range(3))
    _write(figure, left, first, "truth", TEXT_SIZE, QUIET_COLOR)
    _write(figure, left + 0.45, first, shown(tile.truth, 72 * (width - 0.45), TEXT_SIZE), TEXT_SIZE)
    _write(figure, left, second, sign, TEXT_SIZE, color)
    _write(figure, left + 0.18, second, shown(tile.prediction, 72 * (width - 0.68), TEXT_SIZE), TEXT_SIZE, color)
    _write(figure, left + width, second, f"{100 * tile.confidence:.0f} %", TEXT_SIZE, color, ha="right")
    if tile.id:
        _write(figure, left, third, shown(tile.id, 72 * width, ID_SIZE), ID_SIZE, QUIET_COLOR)
