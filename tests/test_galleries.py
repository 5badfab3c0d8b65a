"""Galleries show every image as it is, in order, with what was said about it, whatever the names are."""

import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image

from eva import figures, galleries
from eva.galleries import RIGHT_COLOR, WRONG_COLOR, Tile

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LONG = (
    "Staffordshire bull terrier, brindled",
    "W" * 80,
    "i" * 120,
    "sac à dos en tissu d'été",
    "Ж" * 30,
    "$x^{2}_i$" * 9,
)


def noise(number: int, size: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def some_tiles(count: int, names: tuple[str, ...] = CLASSES, ids: bool = True) -> list[Tile]:
    """Different images; every third is right."""
    return [
        Tile(
            noise(number),
            names[number % len(names)],
            names[(number + (number % 3 > 0)) % len(names)],
            (number + 1) / (count + 1),
            f"test/{names[number % len(names)]}/{number:04}.jpg" if ids else "",
        )
        for number in range(count)
    ]


def drawn(figure: Figure, dpi: float = 100) -> NDArray[np.uint8]:
    """The pixels of a figure, uint8 (H, W, 4). A warning is an error."""
    picture = BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(picture, dpi=dpi)
    with Image.open(picture) as image:
        return np.asarray(image)


def box(artist: Axes | Text) -> Bbox:
    return artist.get_window_extent()


def shown_in(axes: Axes) -> NDArray[np.uint8]:
    """The array of the one image in axes."""
    (image,) = axes.images
    return np.asarray(image.get_array())


def placed(figure: Figure) -> list[NDArray[np.uint8]]:
    """The images of a figure, row by row from the upper left."""
    order = sorted(figure.axes, key=lambda axes: (-round(box(axes).y0), round(box(axes).x0)))
    return [shown_in(axes) for axes in order]


def below(figure: Figure, axes: Axes) -> list[str]:
    """The texts between a picture and what lies below it, line by line, each from left to right."""
    left, right, upper = box(axes).x0, box(axes).x1, box(axes).y0
    column = [box(other).y1 for other in figure.axes if left <= box(other).x0 < right]
    lower = max((y for y in column if y < upper), default=0)
    texts = [text for text in figure.texts if left - 1 <= box(text).x0 < right and lower < box(text).y0 < upper]
    return [text.get_text() for text in sorted(texts, key=lambda text: (-round(box(text).y1, -1), box(text).x0))]


def frame(axes: Axes) -> tuple[float, ...]:
    (color,) = {to_rgba(spine.get_edgecolor()) for spine in axes.spines.values()}
    return color


def assert_nothing_overlaps(figure: Figure) -> None:
    """No text lies over another, over a picture or over the edge of the figure."""
    figure.draw_without_rendering()
    texts = [text for text in figure.texts if text.get_text()]
    boxes = np.array([*(box(text).extents for text in texts), *(box(axes).extents for axes in figure.axes)])
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    shared = np.minimum(high, boxes[None, :, 2:]) - np.maximum(low, boxes[None, :, :2])
    # Boxes of neighbouring lines share a pixel of air.
    overlaps = np.argwhere(np.triu(shared.min(axis=2) > 1.5, 1)[: len(texts)])
    assert not len(overlaps), [(texts[i], (*texts, *figure.axes)[j]) for i, j in overlaps]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= figure.bbox.extents[2:]).all()


def overlays(tiles: list[Tile]) -> list[NDArray[np.uint8]]:
    return [noise(1000 + number, 128) for number in range(len(tiles))]


def pairs(tiles: list[Tile], title: str) -> Figure:
    return galleries.gradcam_grid(tiles, overlays(tiles), title)


def layers(tiles: list[Tile], title: str) -> Figure:
    names, sizes = [tile.truth for tile in tiles[:4]], [(32, 32), (16, 16), (8, 8), (4, 4)][: len(tiles)]
    maps = overlays(tiles[:4])
    return galleries.layers_row(tiles[0], maps, maps[::-1], names, sizes, title)


EVERY_GALLERY = pytest.mark.parametrize("gallery", [galleries.grid, pairs, layers])


# grid


@pytest.mark.parametrize(("count", "columns"), [(1, 5), (2, 5), (5, 5), (6, 5), (25, 5), (25, 4), (7, 1)])
def test_grid_holds_every_image_unchanged_and_in_order(count: int, columns: int) -> None:
    tiles = some_tiles(count)
    figure = galleries.grid(tiles, "title", columns)
    assert len(figure.axes) == count
    for array, tile in zip(placed(figure), tiles, strict=True):
        assert array.dtype == np.uint8
        assert np.array_equal(array, tile.image)
    assert len({round(box(axes).x0) for axes in figure.axes}) == min(count, columns)
    assert len({round(box(axes).y0) for axes in figure.axes}) == -(-count // columns)


def test_each_picture_names_truth_prediction_and_confidence_below_it() -> None:
    tiles = [
        Tile(noise(0), "cat", "dog", 0.973, "test/0000017"),
        Tile(noise(1), "ship", "ship", 0.514, "test/0000018"),
        *some_tiles(7, ids=False),
    ]
    figure = galleries.grid(tiles, "title")
    drawn(figure)
    assert below(figure, figure.axes[0]) == ["truth", "cat", "✗", "dog", "97 %", "test/0000017"]
    assert below(figure, figure.axes[1]) == ["truth", "ship", "✓", "ship", "51 %", "test/0000018"]
    for axes, tile in zip(figure.axes[2:], tiles[2:], strict=True):
        sign = "✓" if tile.truth == tile.prediction else "✗"
        assert below(figure, axes) == ["truth", tile.truth, sign, tile.prediction, f"{100 * tile.confidence:.0f} %"]


def test_right_is_green_and_wrong_is_red_in_frame_and_words() -> None:
    tiles = [Tile(noise(0), "cat", "cat", 0.9), Tile(noise(1), "cat", "dog", 0.8)]
    figure = galleries.grid(tiles, "title")
    for axes, color, words in zip(figure.axes, (RIGHT_COLOR, WRONG_COLOR), (("✓", "90 %"), ("✗", "80 %")), strict=True):
        assert frame(axes) == to_rgba(color)
        for word in words:
            (text,) = [text for text in figure.texts if text.get_text() == word]
            assert text.get_color() == color
    (red, green, _), (more_red, less_green, _) = to_rgba(RIGHT_COLOR)[:3], to_rgba(WRONG_COLOR)[:3]
    assert green > 2 * red and more_red > 2 * less_green


def test_the_class_names_of_cifar10_are_shown_in_full() -> None:
    for figure in (galleries.grid(some_tiles(10), "title"), pairs(some_tiles(10), "title")):
        assert set(CLASSES) <= {text.get_text() for text in figure.texts}


@EVERY_GALLERY
def test_every_gallery_shows_its_title(gallery: Callable[[list[Tile], str], Figure]) -> None:
    title = "25 of 1,025 misclassified, highest loss first"
    assert gallery(some_tiles(25), title).texts[0].get_text() == title


@pytest.mark.parametrize("dpi", [72, 100, 120])
@EVERY_GALLERY
def test_no_text_lies_over_another_or_over_a_picture(gallery: Callable[[list[Tile], str], Figure], dpi: int) -> None:
    figure = gallery(some_tiles(25, LONG), "25 of 1,025 misclassified, highest loss first " * 4)
    figure.dpi = dpi
    assert_nothing_overlaps(figure)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images_leave_room_for_a_title(count: int) -> None:
    figure = galleries.grid(
        some_tiles(count), f"{count} of 1,025 misclassified by a run of a long name, highest loss first"
    )
    assert_nothing_overlaps(figure)


def test_a_gallery_of_none_says_so(tmp_path: Path) -> None:
    for figure in (galleries.grid([], "0 of 0 misclassified"), galleries.gradcam_grid([], [], "0 of 0 misclassified")):
        (axes,) = figure.axes
        assert [text.get_text() for text in (*figure.texts, *axes.texts)] == ["0 of 0 misclassified", "none"]
        assert (drawn(figure)[..., :3] < 100).any()


def test_a_picture_shows_the_pixels_of_its_image() -> None:
    tiles = some_tiles(7)
    figure = galleries.grid(tiles, "title")
    pixels = drawn(figure)
    for axes, tile in zip(figure.axes, tiles, strict=True):
        left, top = box(axes).x0, len(pixels) - box(axes).y1
        centres = np.arange(32) * 5 + 2  # 160 pixels for 32, at 100 dpi
        inside = slice(1, -1)  # the frame covers the edge
        seen = pixels[np.ix_(round(top) + centres[inside], round(left) + centres[inside])][..., :3]
        assert np.array_equal(seen, tile.image[inside, inside])


def test_a_file_shows_what_a_drawn_figure_shows(tmp_path: Path) -> None:
    """Cutting margins off must not move texts against pictures."""

    def content(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        rows, columns = np.nonzero((pixels[..., :3] < 250).any(axis=2))
        return pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1, :3]

    tiles = some_tiles(6)
    with Image.open(figures.save(galleries.grid(tiles, "title"), tmp_path / "grid.png")) as file:
        saved = content(np.asarray(file))
    whole = content(drawn(galleries.grid(tiles, "title"), 120))
    assert np.abs(np.subtract(saved.shape, whole.shape)).max() <= 2
    # The last caption line lies as far below the last picture in both.
    assert np.array_equal(np.flatnonzero((saved[-25:] < 200).any((1, 2)))[-1:], [24])


def test_a_gallery_of_25_is_a_small_file_of_readable_size(tmp_path: Path) -> None:
    path = figures.save(galleries.grid(some_tiles(25), "25 of 1,025 misclassified"), tmp_path / "grid.png")
    assert path.stat().st_size < 400 * 1024  # noise packs worse than any photograph
    with Image.open(path) as image:
        assert 900 < image.width < 1300 and 1200 < image.height < 1600


# names of any kind


@pytest.mark.parametrize(
    "name",
    ["$x_1^2$", "a_b^c", "\\frac{1}{2}", "$", "$$", "100 %", "<script>", "naïve café", "Ωμέγα", "кошка", "חתול", "قطة"],
)
def test_special_characters_are_shown_literally(name: str) -> None:
    figure = galleries.grid([Tile(noise(0), name, "x", 0.5, name)], f"{name} in a title")
    drawn(figure)
    assert below(figure, figure.axes[0]) == ["truth", name, "✗", "x", "50 %", name]
    assert figure.texts[0].get_text() == f"{name} in a title"
    assert not any(text.get_parse_math() for text in figure.texts)


def test_a_dollar_is_drawn_and_not_taken_for_markup() -> None:
    """Rendered: as mathematics, "$aaaa$" would be narrower than its six characters, and in italics."""
    figure = galleries.grid([Tile(noise(0), "$mmmm$", "mmmm", 0.5)], "title")
    drawn(figure)
    (marked,) = [text for text in figure.texts if text.get_text() == "$mmmm$"]
    (plain,) = [text for text in figure.texts if text.get_text() == "mmmm"]
    assert box(marked).width > box(plain).width + 8


def test_a_name_from_right_to_left_leaves_sign_and_confidence_where_they_are() -> None:
    figure = galleries.grid([Tile(noise(0), "cat", "חתול", 0.5), Tile(noise(1), "cat", "bird", 0.5)], "title")
    drawn(figure)
    for word in ("✗", "50 %"):
        first, second = (box(text) for text in figure.texts if text.get_text() == word)
        assert second.x0 - first.x0 == pytest.approx(box(figure.axes[1]).x0 - box(figure.axes[0]).x0, abs=0.5)


@given(st.lists(st.tuples(st.text(), st.text(), st.text(), st.floats(0, 1)), min_size=1, max_size=3), st.text())
@settings(max_examples=25, deadline=None)
def test_any_names_are_drawn_without_a_warning_and_within_their_cells(
    said: list[tuple[str, str, str, float]], title: str
) -> None:
    tiles = [Tile(noise(0), truth, prediction, confidence, id) for truth, prediction, id, confidence in said]
    figure = galleries.grid(tiles, title)
    drawn(figure)
    assert len(figure.axes) == len(tiles)
    for text in figure.texts[1:]:
        cells = [box(axes) for axes in figure.axes if box(axes).x0 - 1 <= box(text).x0 <= box(axes).x1]
        assert any(box(text).x1 <= cell.x1 + 1 for cell in cells) or not text.get_text()


# Grad-CAM


@pytest.mark.parametrize(("count", "columns"), [(1, 5), (7, 3), (8, 5)])
def test_gradcam_grid_shows_each_image_left_of_its_overlay_in_the_order_of_grid(count: int, columns: int) -> None:
    tiles = some_tiles(count)
    maps = overlays(tiles)
    figure = galleries.gradcam_grid(tiles, maps, "title", columns)
    assert all(
        np.array_equal(seen, wanted)
        for seen, wanted in zip(
            placed(figure),
            [array for tile, map in zip(tiles, maps, strict=True) for array in (tile.image, map)],
            strict=True,
        )
    )
    lefts = [box(axes).x0 for axes in figure.axes]
    within, between = lefts[1] - lefts[0], (lefts[2] - lefts[1] if count > 1 else np.inf)
    assert within < between  # a pair is nearer to itself than to the next
    drawn(figure)
    for number, tile in enumerate(tiles):
        assert tile.truth in below(figure, figure.axes[2 * number])
        assert frame(figure.axes[2 * number + 1]) == to_rgba(RIGHT_COLOR if tile.correct else WRONG_COLOR)


def test_gradcam_grid_refuses_overlays_that_are_too_few_or_too_many() -> None:
    tiles = some_tiles(3)
    for wrong in (overlays(tiles)[:2], [*overlays(tiles), noise(0)]):
        with pytest.raises(ValueError, match="zip"):
            galleries.gradcam_grid(tiles, wrong, "title")


def test_layers_row_shows_the_image_then_heat_maps_over_overlays_by_layer() -> None:
    tile, heat_maps, over = (
        some_tiles(2)[1],
        [noise(n, 128) for n in range(10, 14)],
        [noise(n, 96) for n in range(20, 24)],
    )
    names, sizes = ["layer1", "layer2", "layer3", "layer4"], [(32, 32), (16, 16), (8, 8), (4, 2)]
    figure = galleries.layers_row(tile, heat_maps, over, names, sizes, "what the network looked at")
    seen = placed(figure)
    assert all(np.array_equal(*pair) for pair in zip(seen, [tile.image, *heat_maps, *over], strict=True))
    drawn(figure)
    assert below(figure, figure.axes[0])[:5] == ["truth", tile.truth, "✗", tile.prediction, "67 %"]
    for name, size, axes in zip(names, ["32 x 32", "16 x 16", "8 x 8", "4 x 2"], figure.axes[1::2], strict=True):
        (label,) = [text for text in figure.texts if text.get_text() == name]
        (note,) = [text for text in figure.texts if text.get_text() == size]
        assert box(label).x0 == pytest.approx(box(axes).x0, abs=2) and box(note).x1 == pytest.approx(
            box(axes).x1, abs=2
        )
        assert box(label).y0 >= box(axes).y1 and box(note).y0 >= box(axes).y1


def test_layers_row_does_without_sizes_but_not_with_too_few() -> None:
    maps = [noise(n) for n in range(3)]
    figure = galleries.layers_row(some_tiles(1)[0], maps, maps, ["a", "b", "c"])
    assert not any(" x " in text.get_text() for text in figure.texts)
    with pytest.raises(ValueError, match="zip"):
        galleries.layers_row(some_tiles(1)[0], maps, maps, ["a", "b", "c"], [(4, 4)])
    with pytest.raises(ValueError, match="zip"):
        galleries.layers_row(some_tiles(1)[0], maps, maps[:2], ["a", "b", "c"])


def test_images_of_other_sizes_and_shapes_are_shown_in_their_proportions() -> None:
    images = [noise(0, 8), noise(1, 300), noise(2)[:16]]
    figure = galleries.grid([Tile(image, "a", "b", 0.5) for image in images], "title")
    drawn(figure)
    for axes, image in zip(figure.axes, images, strict=True):
        assert np.array_equal(shown_in(axes), image)
        height, width = image.shape[:2]
        assert box(axes).width / box(axes).height == pytest.approx(width / height, rel=0.02)
