"""Figures show the numbers that they are given, at a readable size."""

import base64
import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.formatters import DisplayFormatter
from IPython.core.pylabtools import select_figure_formats
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from eva import figures, galleries
from eva.lr_range import LrCurve, LrRange, suggest
from eva.schedules import Rates


@pytest.fixture(autouse=True)
def no_figure_is_in_pyplots_care() -> Iterator[None]:
    """Such a figure would stay in memory, and pop up in a window."""
    yield
    assert not plt.get_fignums()


def a_curve() -> LrCurve:
    """A noisy curve whose last losses explode."""
    lrs = np.geomspace(1e-4, 10, 100)
    distance = np.log10(lrs / 0.2)
    losses = 1.5 + np.where(distance < 0, 0.8 * (1 - np.exp(-(distance**2))), 6 * distance**2)
    return LrCurve(tuple(lrs[:90]), tuple(losses[:90] + np.random.default_rng(0).normal(0, 0.04, 90)))


def epochs(count: int, watched: str = "val") -> dict[str, list[float]]:
    number = np.arange(1, count + 1)
    wobble = np.random.default_rng(0).normal(0, 0.01, count)
    return {
        "epoch": number.astype(float).tolist(),
        "train_epoch/loss": (2.2 * np.exp(-number / 8)).tolist(),
        "train_epoch/accuracy": (1 - 0.7 * np.exp(-number / 8)).tolist(),
        f"{watched}/loss": (0.3 + 1.9 * np.exp(-number / 6) + wobble).tolist(),
        f"{watched}/accuracy": (0.92 - 0.6 * np.exp(-number / 6) + wobble).tolist(),
    }


def line(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    """The x and y of the line whose label begins so."""
    (found,) = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return np.asarray(found.get_xdata()).tolist(), np.asarray(found.get_ydata()).tolist()


def assert_texts_are_apart_and_inside(figure: Figure) -> None:
    """No text of the axes, the legend's box included, lies over another or outside the axes."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    legend = axes.get_legend()
    if legend is not None:
        boxes.append(legend.get_window_extent())
    inside = axes.get_window_extent()
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1


def test_saving_writes_a_png_of_readable_size(tmp_path: Path) -> None:
    path = figures.save(figures.lr_range(a_curve(), suggest(a_curve())), tmp_path / "new" / "folder" / "figure.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 600 and image.height > 350


def test_drawing_opens_no_window_and_chooses_no_backend(tmp_path: Path) -> None:
    """With a backend that needs a display, where there is none: whoever loaded it would see an error."""
    script = """
import sys
import matplotlib
import numpy as np
from eva import figures, galleries
tile = galleries.Tile(np.zeros((32, 32, 3), np.uint8), "cat", "dog", 0.9)
for figure in (galleries.grid([tile], "title"), figures.per_class(["a"], [0.5], "title")):
    figures.save(figure, figures.Path(sys.argv[1]))
assert matplotlib.rcParams["backend"] == "tkagg", matplotlib.rcParams["backend"]
assert not any(name.startswith("tkinter") for name in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"} | {"MPLBACKEND": "tkagg"}
    path = tmp_path / "figure.png"
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert path.exists()


@pytest.mark.parametrize("inline", [False, True])
def test_a_notebook_shows_a_figure_that_is_a_cells_value(inline: bool) -> None:
    formatter = DisplayFormatter()
    if inline:  # what "%matplotlib inline" does to the formatters
        select_figure_formats(SimpleNamespace(display_formatter=formatter), {"png"})  # type: ignore[no-untyped-call]
    for figure in (
        figures.lr_range(a_curve(), None),
        figures.per_class(["cat"], [0.5], "title"),
        galleries.grid([galleries.Tile(np.zeros((32, 32, 3), np.uint8), "cat", "dog", 0.9)], "title"),
        galleries.grid([], "0 of 0 misclassified"),
    ):
        shown, _ = formatter.format(figure)  # type: ignore[no-untyped-call]
        assert set(shown) == {"text/plain", "image/png"}
        png = shown["image/png"]
        with Image.open(BytesIO(png if isinstance(png, bytes) else base64.b64decode(png))) as image:
            assert image.format == "PNG" and image.width > 150


# curves


@pytest.mark.parametrize(("metric", "scale", "unit"), [("loss", 1, "loss"), ("accuracy", 100, "accuracy, %")])
@pytest.mark.parametrize("watched", ["val", "test"])
def test_curves_show_both_splits_by_epoch(metric: str, scale: int, unit: str, watched: str) -> None:
    given = epochs(24, watched)
    (axes,) = figures.curves(given, watched, metric).axes
    for label, key in (("train", f"train_epoch/{metric}"), (watched, f"{watched}/{metric}")):
        x, y = line(axes, label)
        assert x == given["epoch"]
        assert y == [scale * value for value in given[key]]
    assert axes.get_xlabel() == "epoch" and axes.get_ylabel() == unit


def test_accuracy_marks_the_best_epoch() -> None:
    given = epochs(5)
    given["val/accuracy"] = [0.3, 0.8, 0.75, 0.8, 0.5]
    (axes,) = figures.curves(given, "val", "accuracy").axes
    assert line(axes, "best val: 80 in epoch 2") == ([2.0], [80.0])  # of equal ones the first


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_curves_of_few_and_of_many_epochs_count_in_whole_epochs(metric: str, count: int, tmp_path: Path) -> None:
    figure = figures.curves(epochs(count), "val", metric)
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_xlim()
    ticks = [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high]
    assert ticks and all(tick == round(tick) for tick in ticks)
    assert figures.save(figure, tmp_path / "curves.png").exists()


def test_curves_of_a_diverged_run_are_drawn(tmp_path: Path) -> None:
    given = epochs(3)
    given["train_epoch/loss"][-1] = given["val/loss"][-1] = float("nan")
    assert figures.save(figures.curves(given, "val", "loss"), tmp_path / "loss.png").exists()


# learning rate


def one_cycle(momentum_min: float) -> list[Rates]:
    heights = [*np.linspace(0, 1, 50), *np.linspace(1, 0, 150)]
    return [Rates(0.01 + 0.39 * height, 0.95 - (0.95 - momentum_min) * height) for height in heights]


def test_learning_rate_is_drawn_over_the_steps_and_its_bounds_named() -> None:
    rates = one_cycle(0.95)
    figure = figures.lr_curve(range(200), rates, "one cycle")
    (axes,) = figure.axes
    drawn = axes.lines[0]
    assert np.asarray(drawn.get_xdata()).tolist() == list(range(200))
    assert np.asarray(drawn.get_ydata()).tolist() == [rate.lr for rate in rates]
    assert {text.get_text() for text in axes.texts} == {"highest 0.4", "lowest 0.01"}
    assert axes.get_title() == "one cycle"


def test_momentum_gets_an_axis_of_its_own_where_it_changes() -> None:
    rates = one_cycle(0.85)
    _, second = figures.lr_curve(range(200), rates, "one cycle").axes
    (drawn,) = second.lines
    assert np.asarray(drawn.get_ydata()).tolist() == [rate.momentum for rate in rates]
    assert second.get_ylabel() == "momentum"


@pytest.mark.parametrize(
    "lrs", [[0.1], [0.1, 0.1, 0.1], [0.4, 0.01], [0.01 + 0.39 * (step % 50) / 50 for step in range(200)], [1.0, 0.99]]
)
def test_the_names_of_the_bounds_do_not_overlap(lrs: list[float], tmp_path: Path) -> None:
    figure = figures.lr_curve(range(len(lrs)), [Rates(lr, 0.9) for lr in lrs], "learning rate by step")
    assert_texts_are_apart_and_inside(figure)
    assert figures.save(figure, tmp_path / "lr.png").exists()


# range test


def test_range_test_shows_raw_and_smoothed_losses_and_marks_both_rates() -> None:
    curve = a_curve()
    found = suggest(curve)
    (axes,) = figures.lr_range(curve, found).axes
    assert line(axes, "of each batch") == (list(curve.lrs), list(curve.losses))
    assert line(axes, "smoothed") == (list(curve.lrs), list(curve.smoothed))
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]  # type: ignore[index]
    assert marks == [found.lr_min, found.lr_max]
    texts = [text.get_text() for text in axes.texts]
    assert [f"{found.lr_min:.3g}" in texts[0], f"{found.lr_max:.3g}" in texts[1]] == [True, True]
    assert axes.get_xscale() == "log"


def test_an_exploding_end_does_not_flatten_the_range_tests_curve() -> None:
    curve = a_curve()
    exploding = LrCurve((*curve.lrs, 20.0), (*curve.losses, 1e9))
    low, high = figures.lr_range(exploding, suggest(exploding)).axes[0].get_ylim()
    drop = curve.smoothed[0] - min(curve.smoothed)
    assert drop / (high - low) > 0.4
    assert low < min(curve.smoothed) and high > curve.smoothed[0]


def test_a_curve_without_a_range_is_drawn_without_marks() -> None:
    rising = LrCurve((0.1, 0.2, 0.3), (2.3, 2.4, float("nan")))
    (axes,) = figures.lr_range(rising, None).axes
    assert line(axes, "of each batch")[0] == [0.1, 0.2, 0.3]
    assert not axes.texts


@pytest.mark.parametrize("lowest", [3e-4, 0.02, 8.0])
def test_the_marks_of_the_range_are_readable_wherever_they_lie(lowest: float) -> None:
    lrs = np.geomspace(1e-4, 10, 100)
    losses = 1.5 + 0.8 * np.minimum(1, np.log10(lrs / lowest) ** 2)
    curve = LrCurve(tuple(lrs), tuple(losses))
    assert_texts_are_apart_and_inside(figures.lr_range(curve, LrRange(lowest / 20, lowest / 2)))


# names


@pytest.mark.parametrize("size", [7.5, 10])
@pytest.mark.parametrize("dpi", [72, 100, 120])
@pytest.mark.parametrize(
    "text", ["W" * 99, "i" * 99, "Staffordshire bull terrier, brindled", "Ж" * 40, "f" * 50, "م" * 60]
)
def test_a_long_text_is_cut_in_its_middle_to_the_width_that_it_may_have(text: str, dpi: int, size: float) -> None:
    short = figures.shown(text, 80, size)
    start, end = short.split("…")
    assert start and end and abs(len(start) - len(end)) <= 2
    assert text.startswith(start) and text.endswith(end)

    def width(text: str) -> float:
        figure = Figure(dpi=dpi)
        return 72 / dpi * figure.text(0, 0, text, size=size, **figures.literal()).get_window_extent().width

    assert width(short) <= 84  # rounding is worst for a line of one letter
    longer = text[: len(start) + 3] + "…" + text[len(text) - len(end) - 3 :]
    assert width(longer) > 72  # and no shorter than it must be


def test_a_text_that_fits_stays_as_it_is() -> None:
    assert figures.shown("automobile", 80) == "automobile"
    assert figures.shown("automobile") == "automobile"
    assert figures.shown("two\nlines\tand  gaps ") == "two lines and gaps"
    assert figures.shown("") == ""
    assert figures.shown("automobile", 1) == "…"


@given(st.text(st.characters()))
@settings(max_examples=100, deadline=None)
def test_what_is_shown_differs_from_a_text_only_in_spaces_and_in_characters_without_a_glyph(text: str) -> None:
    shown = figures.shown(text)
    line = " ".join(text.split())
    assert len(shown) == len(line)
    assert all(new in (old, "\ufffd") for new, old in zip(shown, line, strict=True))
    assert not any(new == "\ufffd" for new, old in zip(shown, line, strict=True) if old.isascii() and old.isprintable())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Figure().text(0, 0, shown, **figures.literal()).get_window_extent()


def test_characters_that_no_font_has_are_replaced() -> None:
    assert figures.shown("a\x00\U0010fffe\udcff") == "a\ufffd\ufffd\ufffd"


def test_a_font_for_another_script_is_used_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A font of one syllable, made here, under the name of one that comes with Windows."""
    assert figures.shown("가") == "\ufffd"  # or else this machine has such a font already
    # matplotlib needs fontTools; it ships no types.
    pen = importlib.import_module("fontTools.pens.ttGlyphPen").TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    builder = importlib.import_module("fontTools.fontBuilder").FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "ga"])
    builder.setupCharacterMap({ord("가"): "ga"})
    builder.setupGlyf({".notdef": square, "ga": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "ga": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Malgun Gothic", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "malgun.ttf")
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist])
    fontManager.addfont(tmp_path / "malgun.ttf")
    assert figures.shown("가 a") == "가 a"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = Figure(dpi=72).text(0, 0, "가가", size=10, **figures.literal())
        assert text.get_window_extent().width == pytest.approx(20, abs=2)


def test_a_title_is_wrapped_between_words() -> None:
    title = "25 of 1,025 misclassified, highest loss first"
    lines = figures.wrapped(title, 120, 12).split("\n")
    assert len(lines) > 1 and " ".join(lines) == title
    assert figures.wrapped(title, 1000, 12) == title
    assert figures.wrapped("", 1000, 12) == ""
    (line,) = figures.wrapped("W" * 99, 120, 12).split("\n")
    assert "…" in line


# confusion matrix


def a_confusion(count: int, images: int = 20) -> NDArray[np.int64]:
    """Mostly hits; each class is taken for the next one, less often for the one after."""
    matrix = np.diag(np.full(count, images))
    for distance, errors in ((1, 3), (2, 1)):
        matrix += errors * np.roll(np.eye(count, dtype=int), distance, axis=1)
    return matrix


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure at 100 dpi, uint8 (H, W, 3), from the bottom up as matplotlib counts."""
    picture = BytesIO()
    figure.savefig(picture, dpi=100)
    with Image.open(picture) as image:
        return np.asarray(image)[::-1, :, :3]


def cell_colors(figure: Figure, count: int) -> NDArray[np.int64]:
    """The colour in the upper part of each cell, where no count stands, (rows, columns, 3)."""
    seen, axes = pixels(figure), figure.axes[0]
    grid = np.array([[(column, row - 0.3) for column in range(count)] for row in range(count)]).reshape(-1, 2)
    x, y = axes.transData.transform(grid).astype(int).T
    return np.asarray(seen[y, x].reshape(count, count, 3), np.int64)


def test_confusion_matrix_has_a_row_for_a_true_class_and_a_column_for_a_predicted_one() -> None:
    matrix = np.array([[50, 2, 0], [0, 40, 10], [7, 0, 0]])
    figure = figures.confusion_matrix(matrix, ("cat", "dog", "bird"), "test")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "predicted class" and axes.get_ylabel() == "true class"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["cat", "dog", "bird"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["cat", "dog", "bird"]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "50", (1, 0): "2", (1, 1): "40", (2, 1): "10", (0, 2): "7", (2, 2): "0"}
    pixels(figure)
    ticks = [text.get_window_extent() for text in axes.get_yticklabels()]
    assert ticks[0].y0 > ticks[1].y0 > ticks[2].y0  # the first row is the uppermost


@pytest.mark.parametrize("count", [10, 60])
def test_few_errors_are_seen_beside_many_hits(count: int) -> None:
    matrix = a_confusion(count, 1000)  # errors of 0.3 and 0.1 %
    colors = cell_colors(figures.confusion_matrix(matrix, [str(i) for i in range(count)], "test"), count)
    red, _, blue = np.moveaxis(colors, 2, 0)
    diagonal = np.eye(count, dtype=bool)
    assert (blue[diagonal] - red[diagonal] > 50).all()
    errors = ~diagonal & (matrix > 0)
    assert (red[errors] - blue[errors] > 50).all()
    assert (colors[matrix == 0] == 255).all()
    assert colors[matrix == 3].sum(axis=1).max() < colors[matrix == 1].sum(axis=1).min()  # more errors, darker


def test_colours_are_shares_of_the_true_class() -> None:
    """A class of few images whose errors are as frequent has the same colour."""
    matrix = np.array([[90, 10, 0], [1, 9, 0], [0, 0, 0]])
    figure = figures.confusion_matrix(matrix, "abc", "test")
    colors = cell_colors(figure, 3)
    assert np.array_equal(colors[0, 1], colors[1, 0]) and np.array_equal(colors[0, 0], colors[1, 1])
    assert (colors[2] == 255).all()  # without images
    errors, hits = figure.axes[1:]
    assert errors.get_ylim() == (0, 10) and hits.get_ylim() == (0, 100)
    assert [axes.get_ylabel() for axes in (errors, hits)] == [
        "errors, % of the true class",
        "hits, % of the true class",
    ]


def test_counts_stand_in_up_to_twenty_classes() -> None:
    assert len(figures.confusion_matrix(a_confusion(20), [str(i) for i in range(20)], "test").axes[0].texts) == 60
    assert not figures.confusion_matrix(a_confusion(21), [str(i) for i in range(21)], "test").axes[0].texts


@pytest.mark.parametrize(("count", "largest"), [(2, 12_345_678), (10, 60_000), (20, 60_000), (20, 12_345_678)])
def test_counts_stay_within_their_cells(count: int, largest: int) -> None:
    figure = figures.confusion_matrix(np.full((count, count), largest), [str(i) for i in range(count)], "test")
    pixels(figure)
    axes = figure.axes[0]
    side = axes.get_window_extent().width / count
    assert all(text.get_window_extent().width < side for text in axes.texts)


@pytest.mark.parametrize("count", [1, 10, 20, 21, 200])
def test_class_names_of_a_confusion_matrix_lie_apart_and_inside(count: int) -> None:
    names = [f"{'long name ' * (number % 7)}${number}_" for number in range(count)]
    figure = figures.confusion_matrix(a_confusion(count), names, "a title of many words " * 8)
    pixels(figure)
    axes = figure.axes[0]
    for labels, at in ((axes.get_xticklabels(), 0), (axes.get_yticklabels(), 1)):
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: float(box.min[at]))
        assert len(boxes) >= min(count, 40)
        assert not any(box.overlaps(other) for box, other in pairwise(boxes))
        assert all(box.x0 > 0 and box.y0 > 0 for box in boxes)
        assert all(float(label.get_fontsize()) >= 7 for label in labels)
        shown = [int(label.get_text().split("$")[1].rstrip("_")) for label in labels]
        assert shown == [round(label.get_position()[at]) for label in labels]


@pytest.mark.parametrize("matrix", [[[0]], [[5]], [[0, 0], [0, 0]], [[3, 0], [0, 4]]])
def test_a_confusion_matrix_without_errors_or_images_is_drawn(matrix: list[list[int]]) -> None:
    figure = figures.confusion_matrix(np.array(matrix), "ab"[: len(matrix)], "test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels(figure)
    hits = [str(matrix[row][row]) for row in range(len(matrix))]
    assert [text.get_text() for text in figure.axes[0].texts] == hits


# accuracy by class


def bars(axes: Axes) -> dict[str, float]:
    """Length of each bar by the name beside it, from the top."""
    names = [text.get_text() for text in axes.get_yticklabels()]
    found = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    rows = sorted(found, key=lambda bar: bar.get_y(), reverse=not axes.yaxis_inverted())
    return dict(zip(names, (bar.get_width() for bar in rows), strict=True))


def column(axes: Axes, name: str) -> list[str]:
    """The texts of a column from the top, the header first."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    (header,) = [text for text in axes.texts if text.get_text() == name]
    right = header.get_window_extent().x1
    texts = [text for text in axes.texts if abs(text.get_window_extent().x1 - right) < 3]
    return [text.get_text() for text in sorted(texts, key=lambda text: -text.get_window_extent().y0)]


def test_classes_stand_from_worst_to_best_with_their_values() -> None:
    names, recall, precision = ["cat", "dog", "bird", "$x_1$"], [0.75, 0.5, 1.0, 0.75], [0.8, 1.0, 0.625, float("nan")]
    (axes,) = figures.per_class(names, recall, "test", precision).axes
    assert list(bars(axes).items()) == [("dog", 50), ("cat", 75), ("$x_1$", 75), ("bird", 100)]
    assert column(axes, "accuracy") == ["accuracy", "50.0", "75.0", "75.0", "100.0"]
    assert column(axes, "precision") == ["precision", "100.0", "80.0", "none", "62.5"]
    (marks,) = axes.lines
    assert np.array_equal(np.asarray(marks.get_xdata()), [100, 80, np.nan, 62.5], equal_nan=True)
    assert np.asarray(marks.get_ydata()).tolist() == [0, 1, 2, 3]


def test_classes_without_precision_have_one_column() -> None:
    (axes,) = figures.per_class(["cat", "dog"], np.array([0.5, 0.25]), "test").axes
    assert [text.get_text() for text in axes.texts] == ["accuracy", "25.0", "50.0"]
    assert not axes.lines


def test_a_class_without_images_comes_last_and_has_no_value() -> None:
    (axes,) = figures.per_class(["cat", "dog", "bird"], [float("nan"), 1.0, 0.0], "test").axes
    assert list(bars(axes)) == ["bird", "dog", "cat"]
    assert column(axes, "accuracy") == ["accuracy", "0.0", "100.0", "none"]


def test_of_very_many_classes_the_worst_fifty_are_drawn_and_the_title_says_so() -> None:
    recall = np.random.default_rng(0).permutation(120) / 120
    names = [f"class {value:.4f}" for value in recall]
    figure = figures.per_class(names, recall, "test")
    assert list(bars(figure.axes[0])) == [f"class {value:.4f}" for value in np.arange(50) / 120]
    assert figure.get_suptitle() == "test (the worst 50 of 120 classes)"
    assert figures.per_class(names[:50], recall[:50], "test").get_suptitle() == "test"


@pytest.mark.parametrize("count", [1, 2, 10, 50])
def test_texts_beside_the_bars_lie_apart_and_inside(count: int) -> None:
    names = [f"{'long name ' * (number % 9)}{number}" for number in range(count)]
    values = np.linspace(0, 1, count)
    figure = figures.per_class(names, values, "a title of many words " * 8, values[::-1])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    texts = [*axes.texts, *axes.get_yticklabels(), *figure.texts]
    boxes = [text.get_window_extent() for text in texts]
    inside = figure.bbox
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number]), texts[number]
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1, texts[
            number
        ]
    assert axes.get_window_extent().width > 250


# reliability

BINS = {
    "lower": [0, 0.25, 0.5, 0.75],
    "upper": [0.25, 0.5, 0.75, 1.0],
    "confidence": [float("nan"), 0.4, 0.7, 0.9],
    "accuracy": [float("nan"), 0.5, 0.5, 0.85],
    "counts": [0, 10, 30, 60],
}


def rectangles(container: BarContainer) -> list[list[float]]:
    """Left, lower, right and upper bound of each bar."""
    boxes = [bar.get_bbox() for bar in container]
    return [[round(bound, 6) for bound in (box.xmin, box.ymin, box.xmax, box.ymax)] for box in boxes]


def test_reliability_shows_accuracy_gap_and_count_of_every_bin_that_is_not_empty() -> None:
    figure = figures.reliability(**BINS, ece=0.105, title="test")  # type: ignore[arg-type]
    axes, histogram = figure.axes
    accuracy, gap = (bars for bars in axes.containers if isinstance(bars, BarContainer))
    assert rectangles(accuracy) == [[0.25, 0, 0.5, 0.5], [0.5, 0, 0.75, 0.5], [0.75, 0, 1, 0.85]]
    assert rectangles(gap) == [[0.25, 0.4, 0.5, 0.5], [0.5, 0.5, 0.75, 0.7], [0.75, 0.85, 1, 0.9]]
    (counts,) = (bars for bars in histogram.containers if isinstance(bars, BarContainer))
    assert rectangles(counts) == [[0.25, 0, 0.5, 10], [0.5, 0, 0.75, 30], [0.75, 0, 1, 60]]
    assert line(axes, "perfectly calibrated") == ([0, 1], [0, 1])
    assert axes.get_xlim() == axes.get_ylim() == histogram.get_xlim() == (0, 1)
    assert axes.get_title() == "test, ECE 10.50 %"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "perfectly calibrated",
        "accuracy",
        "gap to confidence",
    ]


def test_the_legend_of_a_reliability_diagram_hides_nothing() -> None:
    figure = figures.reliability(**BINS, ece=0.1, title="a title of many words " * 5)  # type: ignore[arg-type]
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    for axes in figure.axes:
        box = axes.get_tightbbox()  # with labels and title
        assert box is not None and not legend.overlaps(box)
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_a_reliability_diagram_of_no_images_is_drawn(tmp_path: Path) -> None:
    empty = {name: [float("nan")] * 4 for name in ("confidence", "accuracy")}
    figure = figures.reliability(**{**BINS, **empty, "counts": [0] * 4}, ece=float("nan"), title="x")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures.save(figure, tmp_path / "reliability.png").exists()
    assert not figure.axes[0].patches


# files


def test_a_picture_is_written_to_the_pixel(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    path = figures.save_picture(picture, tmp_path / "new" / "picture.png")
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), picture)
