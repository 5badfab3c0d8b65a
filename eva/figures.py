"""The charts of a run, as matplotlib figures and as PNG files.

Nothing here touches pyplot: figures belong to whoever holds them, no window opens, and no backend is chosen.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from eva.files import write_atomically
from eva.lr_range import LrCurve, LrRange
from eva.schedules import Rates

TRAIN_COLOR, WATCHED_COLOR, MARK_COLOR = "tab:blue", "tab:orange", "tab:red"
QUIET_COLOR = "dimgray"
TITLE_SIZE = 12.0  # points

# Fonts with scripts that matplotlib's own lacks, as macOS, Windows and Debian's fonts-noto-cjk bring them.
WORLD_FONTS = (
    *("Arial Unicode MS", "Microsoft YaHei", "Malgun Gothic", "Nirmala UI", "Leelawadee UI"),
    *("Noto Sans CJK JP", "Noto Sans CJK SC"),
)


class Picture(Figure):
    """A figure that a notebook shows where it is a cell's value, whether or not pyplot has ever been imported.

    IPython knows how to show a plain `Figure` only once its inline backend is loaded; then it never asks this one.
    """

    def _repr_png_(self) -> bytes:
        png = BytesIO()
        self.savefig(png, format="png", bbox_inches="tight")
        return png.getvalue()


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, bbox_inches="tight", format="png"))
    return path


def literal() -> dict[str, Any]:
    """Returns the properties of a text that shows a name: no "$" or "_" is markup, and more scripts have a font."""
    installed = font_manager.fontManager.get_font_names()
    world = [name for name in WORLD_FONTS if name in installed]
    return {"parse_math": False, "family": [*matplotlib.rcParams["font.family"], *world, "DejaVu Sans"]}


@lru_cache
def _characters(families: tuple[str, ...]) -> frozenset[int]:
    """Returns the code points that have a glyph in one of the families."""
    found: set[int] = set()
    for family in families:
        try:
            path = font_manager.findfont(FontProperties(family=[family]), fallback_to_default=False)
        except ValueError:  # not installed
            continue
        found.update(font_manager.get_font(path).get_charmap())
    return frozenset(found)


def _width(text: str, size: float) -> float:
    """Returns the width of a text in points, and a tenth: drawing rounds the advance of each glyph to whole pixels."""
    prop = FontProperties(family=literal()["family"], size=size)
    return 1.1 * float(text_to_path.get_text_width_height_descent(text, prop, ismath=False)[0])


def shown(text: str, width: float = math.inf, size: float = 10) -> str:
    """Returns a text as it can be drawn: on one line, its middle an ellipsis where it is wider than `width`.

    A character that no font has becomes a replacement character: matplotlib would warn of it at every drawing.

    Args:
        text: Any text at all.
        width: In points.
        size: Of the font, in points.
    """
    known = _characters(tuple(literal()["family"]))
    line = "".join(character if ord(character) in known else "\ufffd" for character in " ".join(text.split()))
    if width == math.inf or _width(line, size) <= width:
        return line
    # Both ends stay: names of a kind often differ in the last word, and paths in the last part.
    lengths = range(len(line))
    fits = bisect_right(lengths, width, key=lambda kept: _width(_abridged(line, kept), size)) - 1
    return _abridged(line, max(fits, 0))


def _abridged(text: str, kept: int) -> str:
    """Returns the first and the last of a text's characters, so many in all, around an ellipsis."""
    return f"{text[: (kept + 1) // 2].rstrip()}…{text[len(text) - kept // 2 :].lstrip()}"


def wrapped(text: str, width: float, size: float) -> str:
    """Returns a text as it can be drawn, broken between words into lines that are no wider than `width` points."""
    lines: list[str] = []
    for word in text.split():
        longer = shown(f"{lines[-1]} {word}" if lines else word)
        if lines and _width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(shown(word, width, size))
    return "\n".join(lines)


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure = Picture(figsize=(7, 4.2))
    axes = figure.subplots()
    axes.set_title(wrapped(title, 400, TITLE_SIZE), size=TITLE_SIZE, **literal())
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if x in ("epoch", "step"):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    return figure, axes


def curves(epochs: Mapping[str, Sequence[float]], watched: str, metric: str) -> Figure:
    """Returns the train and the watched split's curve of a metric (loss or accuracy) over the epochs."""
    figure, axes = _axes(f"{metric} by epoch", "epoch", "accuracy, %" if metric == "accuracy" else metric)
    scale = 100 if metric == "accuracy" else 1
    for key, color in ((f"train_epoch/{metric}", TRAIN_COLOR), (f"{watched}/{metric}", WATCHED_COLOR)):
        values = [scale * value for value in epochs[key]]
        label = f"{key.split('_')[0].split('/')[0]} (last {values[-1]:.4g})"
        axes.plot(epochs["epoch"], values, color=color, label=label, marker="." if len(values) < 40 else None)
    if metric == "accuracy":
        best = max(range(len(epochs["epoch"])), key=lambda i: epochs[f"{watched}/accuracy"][i])
        value = scale * epochs[f"{watched}/accuracy"][best]
        label = f"best {watched}: {value:.4g} in epoch {int(epochs['epoch'][best])}"
        axes.plot(epochs["epoch"][best], value, "o", color=MARK_COLOR, label=label)
    axes.legend()
    return figure


def lr_curve(steps: Sequence[float], rates: Sequence[Rates], title: str) -> Figure:
    """Returns the learning rate over the steps, and the momentum on a second axis where it changes."""
    figure, axes = _axes(title, "step", "learning rate")
    lrs = [rate.lr for rate in rates]
    axes.plot(steps, lrs, color=TRAIN_COLOR)
    bounds = {min(lrs): "lowest", max(lrs): "highest"} if max(lrs) > min(lrs) else {lrs[0]: "constant"}
    for value, name in bounds.items():
        axes.axhline(value, color=MARK_COLOR, linestyle=":", linewidth=1)
        axes.annotate(f"{name} {value:.3g}", (steps[0], value), textcoords="offset points", xytext=(4, 4), fontsize=8)
    momenta = [rate.momentum for rate in rates]
    if max(momenta) > min(momenta):
        second = axes.twinx()
        second.plot(steps, momenta, color=WATCHED_COLOR, linewidth=1)
        second.set_ylabel("momentum", color=WATCHED_COLOR)
    return figure


def lr_range(curve: LrCurve, found: LrRange | None) -> Figure:
    """Returns the range test's curve, raw and smoothed, with both rates marked if a range was found."""
    figure, axes = _axes("learning rate range test", "learning rate", "loss")
    axes.plot(curve.lrs, curve.losses, color=TRAIN_COLOR, alpha=0.3, label="of each batch")
    axes.plot(curve.lrs, curve.smoothed, color=TRAIN_COLOR, label="smoothed")
    axes.set_xscale("log")
    # The end of a diverging curve would flatten the part that matters.
    low, first = np.nanmin(curve.smoothed), curve.smoothed[0]
    if low < first:
        axes.set_ylim(low - 0.2 * (first - low), first + 0.5 * (first - low))
    for rate, name in ((found.lr_min, "LR min"), (found.lr_max, "LR max")) if found else ():
        axes.axvline(rate, color=MARK_COLOR, linestyle="--", linewidth=1)
        at, offset = (rate, axes.get_ylim()[1]), (-3, -4)
        axes.annotate(f"{name} {rate:.3g}", at, offset, textcoords="offset points", va="top", ha="right", rotation=90)
    axes.legend()
    return figure


def confusion_matrix(matrix: NDArray[np.int64], classes: Sequence[str], title: str) -> Figure:
    """Returns a confusion matrix: a row for each true class, a column for each predicted one.

    Colours are shares of a row. The diagonal has a scale of its own, so that many hits don't hide few errors, and the
    errors' scale ends at the largest of them, by square root. Up to 20 classes the counts stand in the cells (none for
    no errors); of very many classes, evenly spaced ones are named.

    Args:
        matrix: Counts of images, (K, K).
        classes: The K class names.
        title: Of the figure.
    """
    count = len(classes)
    side = float(np.clip(0.55 * count, 3.5, 9))
    size = 9 if count <= 20 else 7
    named = range(0, count, math.ceil(1.2 * size / (72 * side / count)))
    names = [shown(classes[index], 120, size) for index in named]
    # Matrix and scales get their places by hand: layout engines leave gaps around axes that must stay square.
    edge, right = 0.7 + max(_width(name, size) for name in names) / 72, 1.8
    figure = Picture(figsize=(edge + side + right, edge + side + 0.6))
    width, height = figure.get_size_inches()
    axes = figure.add_axes((edge / width, edge / height, side / width, side / height))
    axes.set_title(wrapped(title, 72 * (side + right), TITLE_SIZE), loc="left", size=TITLE_SIZE, **literal())
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    diagonal = np.eye(count, dtype=bool)
    errors, hits = np.ma.masked_array(shares, diagonal), np.ma.masked_array(shares, ~diagonal)
    reds = LinearSegmentedColormap.from_list("errors", ["white", "#fb6a4a", "#8b0d14"])
    blues = LinearSegmentedColormap.from_list("hits", ["white", "#6baed6"])
    largest = shares[~diagonal].max(initial=0) or 1
    wrong = axes.imshow(errors, cmap=reds, norm=PowerNorm(0.5, 0, largest), interpolation="nearest")
    right_ones = axes.imshow(hits, cmap=blues, norm=Normalize(0, 100), interpolation="nearest")
    for number, (image, of) in enumerate(((wrong, "errors"), (right_ones, "hits"))):
        left = edge + side + 0.15 + 0.85 * number
        scale = figure.add_axes((left / width, edge / height, 0.15 / width, side / height))
        figure.colorbar(image, cax=scale, label=f"{of}, % of the true class")
    axes.set_xticks(named, names, rotation=90, fontsize=size, **literal())
    axes.set_yticks(named, names, fontsize=size, **literal())
    axes.set(xlabel="predicted class", ylabel="true class")
    if count <= 20:
        fits = min(10.0, 72 * side / count / (0.85 * len(str(matrix.max()))))
        for row, column in np.argwhere((matrix > 0) | diagonal):
            dark = row != column and shares[row, column] > 0.4 * largest
            style: dict[str, Any] = {"color": "white" if dark else "black", "ha": "center", "va": "center"}
            axes.text(column, row, str(matrix[row, column]), size=fits, **style)
    return figure


def per_class(
    names: Sequence[str], recall: ArrayLike, title: str, precision: ArrayLike | None = None, most: int = 50
) -> Figure:
    """Returns a bar for each class's accuracy (recall), the worst class first, and a mark for its precision.

    Args:
        names: The K class names.
        recall: Shares 0 to 1, (K,); NaN for a class without images, which comes last.
        title: Of the figure.
        precision: Shares 0 to 1, (K,); NaN for a class that was never predicted.
        most: With more classes than this, only as many are drawn, and the title says so.
    """
    recalls = 100 * np.asarray(recall, dtype=float)
    order = np.argsort(recalls, kind="stable")[:most]  # NaN sorts last
    if len(order) < len(names):
        title = f"{title} (the worst {len(order)} of {len(names)} classes)"
    rows = np.arange(len(order))
    figure = Picture(figsize=(7.5, 1.5 + 0.24 * len(order)), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(wrapped(title, 500, TITLE_SIZE), size=TITLE_SIZE, **literal())
    axes.barh(rows, np.nan_to_num(recalls[order]), color=TRAIN_COLOR, height=0.7)
    columns = [("accuracy", recalls, TRAIN_COLOR)]
    if precision is not None:
        precisions = 100 * np.asarray(precision, dtype=float)
        axes.plot(precisions[order], rows, "D", color=WATCHED_COLOR, markeredgecolor="white", clip_on=False)
        columns.append(("precision", precisions, WATCHED_COLOR))
    # The values stand in columns right of the bars, where they line up and none lies over a mark.
    for number, (name, values, color) in enumerate(columns):
        at: dict[str, Any] = {"xytext": (48 + 56 * number, 0), "textcoords": "offset points", "ha": "right", "size": 9}
        axes.annotate(name, (1, 1), xycoords="axes fraction", color=color, va="bottom", **at)
        for row, value in enumerate(values[order]):
            text = "none" if np.isnan(value) else f"{value:.1f}"
            axes.annotate(text, (1, row), xycoords=axes.get_yaxis_transform(), va="center", **at)
    axes.set_yticks(rows, [shown(names[index], 130, 9) for index in order], fontsize=9, **literal())
    axes.set(xlim=(0, 100), ylim=(len(order) - 0.5, -0.5), xlabel="%")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def reliability(
    lower: ArrayLike,
    upper: ArrayLike,
    confidence: ArrayLike,
    accuracy: ArrayLike,
    counts: ArrayLike,
    ece: float,
    title: str,
) -> Figure:
    """Returns a reliability diagram over a histogram of the confidences; empty bins are not drawn.

    Bars are the bins' accuracies; the gap from there to the mean confidence is drawn on top, and the expected
    calibration error is their mean, weighted by the counts (Guo et al. 2017, arXiv:1706.04599).

    Args:
        lower: The bins' lower bounds, 0 to 1, (B,).
        upper: The bins' upper bounds, (B,).
        confidence: Mean confidence of each bin's images, (B,); of empty bins anything.
        accuracy: Share of each bin's images that are right, (B,); of empty bins anything.
        counts: Images in each bin, (B,).
        ece: Expected calibration error, 0 to 1.
        title: Of the figure.
    """
    full = np.asarray(counts) > 0
    left, right, mean, right_share, images = (
        np.asarray(values, dtype=float)[full] for values in (lower, upper, confidence, accuracy, counts)
    )
    figure = Picture(figsize=(5.5, 6.5), layout="constrained")
    axes, histogram = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    title = wrapped(f"{title}, ECE {100 * ece:.2f} %", 330, TITLE_SIZE)
    axes.set_title(title, size=TITLE_SIZE, **literal())
    bins = {"width": right - left, "align": "edge", "edgecolor": "white"}
    axes.bar(left, right_share, color=TRAIN_COLOR, label="accuracy", **bins)
    gaps = {**bins, "color": MARK_COLOR, "alpha": 0.35, "hatch": "//", "edgecolor": MARK_COLOR}
    axes.bar(left, mean - right_share, bottom=right_share, label="gap to confidence", **gaps)
    axes.plot([0, 1], [0, 1], "--", color=QUIET_COLOR, linewidth=1, label="perfectly calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    # Below the axes: within them, bars may be anywhere.
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    histogram.bar(left, images, color=QUIET_COLOR, **bins)
    histogram.set(xlabel="confidence", ylabel="images")
    for each in (axes, histogram):
        each.grid(alpha=0.3)
        each.set_axisbelow(True)
    return figure


def save_picture(picture: NDArray[np.uint8], path: Path) -> Path:
    """Writes a uint8 (H, W, 3) RGB picture as PNG and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path
