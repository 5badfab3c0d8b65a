"""Figures show the numbers that they are given, at a readable size."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from eva import figures
from eva.lr_range import LrCurve, LrRange, suggest
from eva.schedules import Rates


@pytest.fixture(autouse=True)
def no_figure_stays_open() -> Iterator[None]:
    yield
    plt.close("all")


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


def test_saving_writes_a_png_of_readable_size_and_closes_the_figure(tmp_path: Path) -> None:
    path = figures.save(figures.lr_range(a_curve(), suggest(a_curve())), tmp_path / "new" / "folder" / "figure.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 600 and image.height > 350
    assert not plt.get_fignums()


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


# files


def test_csv_columns_are_read_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text("trainer/step,train/loss\n0,2.5\n1,nan\n", encoding="utf-8")
    columns = figures.read_csv(path)
    assert columns["trainer/step"] == [0.0, 1.0]
    assert columns["train/loss"][0] == 2.5 and np.isnan(columns["train/loss"][1])
    path.write_text("trainer/step,train/loss\n", encoding="utf-8")
    assert figures.read_csv(path) == {}


def test_a_picture_is_written_to_the_pixel(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    path = figures.save_picture(picture, tmp_path / "new" / "picture.png")
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), picture)


def test_a_figure_that_cannot_be_written_is_closed_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        figures.save(figures.lr_range(a_curve(), None), tmp_path / "file" / "figure.png")
    assert not plt.get_fignums()
