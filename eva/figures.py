"""The pictures of a run, as PNG files."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from eva.lr_range import LrCurve, LrRange
from eva.schedules import Rates

matplotlib.use("Agg")  # figures are files: no display is needed

TRAIN_COLOR, WATCHED_COLOR, MARK_COLOR = "tab:blue", "tab:orange", "tab:red"


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG, closes it and returns the path."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, bbox_inches="tight")
    finally:
        plt.close(figure)
    return path


def _axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(figsize=(7, 4.2))
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    if x in ("epoch", "step"):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    return figure, axes


def read_csv(path: Path) -> dict[str, list[float]]:
    """Returns the columns of a run's CSV file as numbers."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else ())}


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


def save_picture(picture: NDArray[np.uint8], path: Path) -> Path:
    """Writes a uint8 (H, W, 3) RGB picture as PNG and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path
