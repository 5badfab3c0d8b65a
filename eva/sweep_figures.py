"""The picture of a search: its objective over the trials, over each parameter, and over both learning rates."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray

from eva.figures import QUIET_COLOR, TITLE_SIZE, Picture, literal, shown, wrapped
from eva.importance import is_number
from eva.ranking import RESULTS, TrialRecord, identity, importance, parameters, rank, short
from eva.text import format_metric, format_setting, is_share, listed

# Colour and marker of each state: Okabe and Ito's colours, which differ for colour-blind readers too.
STATES = {
    "finished": ("#0072b2", "o"),
    "stopped": ("#e69f00", "v"),
    "diverged": ("#d55e00", "D"),
    "failed": ("#000000", "x"),
}
MAX_SLICES, MAX_IN_A_ROW = 8, 4
MAX_COLUMNS = 12  # of a slice; the rarest values share the last one
LR_PLANE = ("lr_min", "lr_max")

# Inches.
PANEL_WIDTH, PANEL_HEIGHT, OVERVIEW_HEIGHT, MIN_WIDTH = 2.9, 2.7, 3.4, 8.5
SMALL = 8  # points, of ticks and of the caption
LEGEND_COLUMNS = 6
LABEL_WIDTH = 90.0  # points
FAR = 10  # times the median distance from the best


def search(trials: Sequence[TrialRecord], goal: str, metric: str, log_parameters: Collection[str]) -> Figure:
    """Returns the picture of a search.

    Above, the objective of each trial by its number, with the best so far as a line; trials without a value are marked
    below the axes' values. Where both were searched, beside it the plane of `lr_min` and `lr_max`, the best
    configuration's trials marked with a star. Below, the objective over each parameter but the seed, the most important
    one first where importance can be told: values that few trials share as points, those of choices as columns with a
    bar at their mean. Axes end near the bulk of the values; the caption tells how many lie outside, and which
    parameters have no room. Repeats are no part of the search and are not drawn.

    Args:
        trials: Those of a sweep; what has not ended is not drawn.
        goal: minimize or maximize.
        metric: Name of the objective; accuracies are drawn in percent.
        log_parameters: Names of parameters whose axis is logarithmic, unless a value is not positive.
    """
    of_search = sorted(
        (trial for trial in trials if trial.repeat_of is None and trial.state in STATES), key=lambda trial: trial.number
    )
    with_value = [trial for trial in of_search if trial.result is not None]
    found, _ = importance(of_search, metric)
    known = found if found is not None and found.explained > 0 else None
    names = parameters(of_search)
    if known is not None:
        names.sort(key=lambda name: -known.shares.get(name, -math.inf))
    drawn = names[:MAX_SLICES] if with_value else []
    plane = _plane_trials(with_value)

    rows = math.ceil(len(drawn) / MAX_IN_A_ROW)
    columns = math.ceil(len(drawn) / max(rows, 1))
    width = max(MIN_WIDTH, PANEL_WIDTH * columns)
    figure = Picture(figsize=(width, OVERVIEW_HEIGHT + PANEL_HEIGHT * rows), layout="constrained")
    outer = figure.add_gridspec(
        1 + (rows > 0), 1, height_ratios=[OVERVIEW_HEIGHT, *([PANEL_HEIGHT * rows] * (rows > 0))]
    )
    upper = outer[0].subgridspec(1, 2 if plane else 1, width_ratios=[1.4, 1] if plane else [1])
    overview = figure.add_subplot(upper[0])
    _draw_overview(overview, of_search, goal, metric)
    if plane:
        _draw_plane(figure.add_subplot(upper[1]), plane, goal, metric)
    if rows:
        lower = outer[1].subgridspec(rows, columns)
        for place, name in enumerate(drawn):
            axes = figure.add_subplot(lower[divmod(place, columns)], sharey=overview)
            axes.tick_params(labelleft=place % columns == 0, labelsize=SMALL)
            if place % columns == 0:
                axes.set_ylabel(_objective_label(metric, 120), size=9, **literal())
            share = None if known is None else known.shares.get(name)
            _draw_slice(axes, name, share, with_value, name in log_parameters, metric, 72 * width / columns - 50)
    _finish(figure, overview, with_value, names[len(drawn) :] if with_value else [], metric, goal)
    return figure


def _scale(metric: str) -> float:
    return 100.0 if is_share(metric) else 1.0


def _objectives(trials: Sequence[TrialRecord], metric: str) -> NDArray[np.float64]:
    """Returns the objectives of trials that have one, as they are drawn, (N,)."""
    return np.array([trial.result for trial in trials if trial.result is not None], float) * _scale(metric)


def _objective_label(metric: str, width: float) -> str:
    return shown(f"{metric}, %" if is_share(metric) else metric, width, 10)


def _scatter(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], trials: Sequence[TrialRecord]) -> None:
    """Draws trials at (x, y), each (N,), a collection a state."""
    for state in RESULTS:
        color, marker = STATES[state]
        mask = np.array([trial.state == state for trial in trials], bool)
        if mask.any():
            axes.scatter(
                *(x[mask], y[mask]),
                c=color,
                marker=marker,
                s=26,
                linewidths=0.5,
                edgecolors="white",
                label=state,
                zorder=3,
            )


def _draw_overview(axes: Axes, trials: Sequence[TrialRecord], goal: str, metric: str) -> None:
    with_value = [trial for trial in trials if trial.result is not None]
    numbers = np.array([trial.number for trial in with_value], float)
    values = _objectives(with_value, metric)
    axes.set_title("objective by trial", size=10)
    axes.set_xlabel("trial", size=9)
    axes.set_ylabel(_objective_label(metric, 180), size=9, **literal())
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    last = max((trial.number for trial in trials), default=0)
    margin = max(0.5, 0.02 * last)
    axes.set_xlim(-margin, last + margin)
    if with_value:
        best = (np.maximum if goal == "maximize" else np.minimum).accumulate(values)
        axes.step(numbers, best, where="post", color=QUIET_COLOR, linewidth=1.2, label="best so far", zorder=2)
        _scatter(axes, numbers, values, with_value)
        axes.set_ylim(*_limits(values, goal, metric, any(trial.result is None for trial in trials)))
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no trial has a result", transform=axes.transAxes, ha="center", va="center", size=10)
    for state in STATES:
        without = [trial.number for trial in trials if trial.state == state and trial.result is None]
        if without:
            color, marker = STATES[state]
            # Nothing to draw at: these stand in a row of their own, below all values.
            (row,) = axes.plot(without, [0.035] * len(without), marker, color=color, markersize=4.5, fillstyle="none")
            row.set_transform(axes.get_xaxis_transform())
            row.set_label(f"{state}, no value")


def _limits(values: NDArray[np.float64], goal: str, metric: str, row_below: bool) -> tuple[float, float]:
    """Returns the lower and upper end of the objective's axis.

    A loss may be a thousand times that of most trials; what is ten times as far from the best as the median lies
    outside. Shares have an end of their own.
    """
    best, worst = (values.max(), values.min()) if goal == "maximize" else (values.min(), values.max())
    middle = float(np.median(np.abs(values - best)))
    reach = float(abs(worst - best))
    if middle and not is_share(metric):
        reach = min(reach, FAR * middle)
    if reach == 0:
        reach = abs(float(best)) * 0.05 or 1.0
        return float(best) - reach, float(best) + reach
    low, high = (best - reach, best) if goal == "maximize" else (best, best + reach)
    return float(low - (0.15 if row_below else 0.06) * reach), float(high + 0.06 * reach)


# --- slices ---


def _draw_slice(
    axes: Axes,
    name: str,
    share: float | None,
    trials: Sequence[TrialRecord],
    log: bool,
    metric: str,
    width: float,
) -> None:
    """Draws the objective over a parameter, into axes that are `width` points wide."""
    having = [trial for trial in trials if name in trial.values]
    values, y = [trial.values[name] for trial in having], _objectives(having, metric)
    title = shown(name, width, 10)
    if share is not None:
        title += f"\nimportance {max(share, 0.0):.2f}"
    axes.set_title(title, size=10, **literal())
    axes.grid(alpha=0.3)
    if _is_continuous(values, log):
        x = np.array(values, float)
        _numbers_axis(axes, "x", x, log)
        _scatter(axes, x, y, having)
        return
    labels, places = _columns(values)
    x = np.empty(len(values))
    for column in range(len(labels)):
        members = np.flatnonzero(places == column)
        # Evenly spread, so that equal values are seen apart.
        spread = np.linspace(-0.25, 0.25, len(members)) if len(members) > 1 else np.zeros(1)
        x[members] = column + spread
        mean = float(y[members].mean())
        axes.plot([column - 0.35, column + 0.35], [mean, mean], color=QUIET_COLOR, linewidth=2, zorder=2)
    _scatter(axes, x, y, having)
    room = width / len(labels) - 4
    flat = all(shown(label, room, SMALL) == label for label in labels)
    axes.set_xticks(range(len(labels)), labels, rotation=0 if flat else 90, fontsize=SMALL, **literal())
    axes.set_xlim(-0.6, len(labels) - 0.4)


def _is_continuous(values: Sequence[Any], log: bool) -> bool:
    """Whether values are drawn where they lie on an axis of numbers, not as columns: choices are taken repeatedly."""
    if not all(is_number(value) and math.isfinite(value) for value in values):
        return False
    return log or len(set(values)) > max(1, len(values) // 2) or len(set(values)) > MAX_COLUMNS


def _columns(values: Sequence[Any]) -> tuple[list[str], NDArray[np.int64]]:
    """Returns the labels of a slice's columns, and the column of each value: numbers rising, then others by name."""
    keys = [identity(value) for value in values]
    by_key = dict(zip(keys, values, strict=True))
    ordered = sorted(by_key, key=lambda key: _place(by_key[key]))
    others: list[str] = []
    if len(ordered) > MAX_COLUMNS:
        frequent = {key for key, _ in Counter(keys).most_common(MAX_COLUMNS - 1)}
        others = [f"{len(ordered) - len(frequent)} others"]
        ordered = [key for key in ordered if key in frequent]
    places = [ordered.index(key) if key in ordered else len(ordered) for key in keys]
    labels = [short(by_key[key]) if is_number(by_key[key]) else format_setting(by_key[key]) for key in ordered]
    return [*_apart(labels), *others], np.array(places)


def _place(value: Any) -> tuple[bool, float, str]:
    return (False, float(value), "") if is_number(value) else (True, 0.0, format_setting(value))


def _apart(labels: Sequence[str]) -> list[str]:
    """Returns labels as ticks have room for them; long ones that would look alike lose the beginning they share."""
    texts = [shown(label, LABEL_WIDTH, SMALL) for label in labels]
    if len(set(texts)) == len(set(labels)):
        return texts
    first, last = min(labels), max(labels)  # what these two begin with, all begin with
    common = next((i for i, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), len(first))
    while common and first[common - 1].isalnum():  # words and numbers stay whole
        common -= 1
    return [shown(f"…{label[common:]}", LABEL_WIDTH, SMALL) for label in labels]


def _numbers_axis(axes: Any, name: str, values: NDArray[np.float64], log: bool) -> None:
    """Gives the x or y axis of a panel its scale, its limits and a few ticks; logarithmic only if all are positive."""
    low, high = float(values.min()), float(values.max())
    axis, set_limits = {"x": (axes.xaxis, axes.set_xlim), "y": (axes.yaxis, axes.set_ylim)}[name]
    if log and low > 0:
        {"x": axes.set_xscale, "y": axes.set_yscale}[name]("log")
        margin = (high / low) ** 0.06 if high > low else 2.0
        low, high = low / margin, high * margin
        ticks = _log_ticks(low, high)
    else:
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - margin, high + margin
        ticks = [tick for tick in map(float, MaxNLocator(4).tick_values(low, high)) if low <= tick <= high]
    set_limits(low, high)
    axis.set_minor_locator(NullLocator())
    ticks, labels = _told_apart(ticks)
    axis.set_ticks(ticks, labels, fontsize=SMALL)


def _told_apart(ticks: Sequence[float]) -> tuple[list[float], list[str]]:
    """Returns ticks and labels of as many digits as tell them apart; where that makes them long, only the outer two."""
    for digits in range(4, 18):
        labels = [f"{tick:.{digits}g}" for tick in ticks]
        if len(set(labels)) == len(labels):
            break
    outer = slice(None, None, max(1, len(ticks) - 1) if max(map(len, labels)) > 8 else 1)
    return list(ticks[outer]), labels[outer]


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns two to five round numbers of a logarithmic axis between its ends, evenly far apart where it is long."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits, enough in (((1,), 3), ((1, 3), 3), ((1, 2, 5), 2)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= enough:
            return ticks[:: math.ceil(len(ticks) / 5)]
    return [tick for tick in map(float, MaxNLocator(4).tick_values(low, high)) if low <= tick <= high]


# --- both learning rates ---


def _plane_trials(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Returns the trials that lie in the plane of both learning rates: those with two positive numbers."""

    def positive(value: Any) -> bool:
        return is_number(value) and 0 < value < math.inf

    return [trial for trial in trials if all(positive(trial.values.get(name)) for name in LR_PLANE)]


def _draw_plane(axes: Axes, trials: Sequence[TrialRecord], goal: str, metric: str) -> None:
    x, y = (np.array([trial.values[name] for trial in trials], float) for name in LR_PLANE)
    colors = _objectives(trials, metric)
    low, high = _limits(colors, goal, metric, False)
    low, high = max(low, float(colors.min())), min(high, float(colors.max()))
    best = {trial.number for trial in rank(trials, goal)[0].trials}
    starred = np.array([trial.number in best for trial in trials])
    # Bright is bad and dark is good, so that the good ones stand out on white.
    style: dict[str, Any] = {
        "cmap": "viridis_r" if goal == "maximize" else "viridis",
        "vmin": low,
        "vmax": high,
        "edgecolors": "black",
        "linewidths": 0.5,
    }
    for state in RESULTS:
        mask = np.array([trial.state == state for trial in trials]) & ~starred
        if mask.any():
            axes.scatter(
                x[mask], y[mask], c=colors[mask], marker=STATES[state][1], s=34, label=state, zorder=3, **style
            )
    stars = axes.scatter(x[starred], y[starred], c=colors[starred], marker="*", s=210, label="best", zorder=4, **style)
    for name, values in (("x", x), ("y", y)):
        _numbers_axis(axes, name, values, True)
    axes.set_title("learning rates (star: best)", size=10)
    axes.set_xlabel(LR_PLANE[0], size=9)
    axes.set_ylabel(LR_PLANE[1], size=9)
    axes.grid(alpha=0.3)
    bar = axes.figure.colorbar(stars, ax=axes)
    bar.set_label(_objective_label(metric, 180), size=9, **literal())
    bar.ax.tick_params(labelsize=SMALL)


# --- what is said around the panels ---


def _finish(
    figure: Figure,
    overview: Axes,
    trials: Sequence[TrialRecord],
    left_out: Sequence[str],
    metric: str,
    goal: str,
) -> None:
    """Adds the title, the legend and the caption."""
    width = 72 * float(figure.get_figwidth()) - 40
    title = f"search for the {'highest' if goal == 'maximize' else 'lowest'} {metric}"
    said = []
    if trials:
        best = rank(trials, goal)[0]
        of = best.label if len(best.trials) == 1 else f"mean of trials {best.numbers}"
        title += f": {format_metric(metric, best.mean)} ({of})"
        low, high = overview.get_ylim()
        values = _objectives(trials, metric)
        outside = int(((values < low) | (values > high)).sum())
        if outside:
            said.append(f"{'1 trial lies' if outside == 1 else f'{outside} trials lie'} outside the objective's axis")
    if left_out:
        said.append(f"not drawn: {listed([shown(name, 150, SMALL) for name in left_out], 12)}")
    title, caption = wrapped(title, width, TITLE_SIZE), wrapped("; ".join(said), width, SMALL)
    handles, labels = overview.get_legend_handles_labels()
    # Strips of their own for the legend and the caption, below what the layout engine has to do with.
    legend_height = 0.25 * math.ceil(len(handles) / LEGEND_COLUMNS) + 0.05
    caption_height = 0.16 * (caption.count("\n") + 1) + 0.05 if caption else 0.0
    height = float(figure.get_figheight()) + 0.2 * (title.count("\n") + 1) + legend_height + caption_height
    figure.set_figheight(height)
    below = (legend_height + caption_height) / height
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below), w_pad=0.1)  # type: ignore[union-attr,call-arg]
    figure.suptitle(title, size=TITLE_SIZE, **literal())
    if handles:
        at: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, caption_height / height)}
        figure.legend(handles, labels, ncols=LEGEND_COLUMNS, fontsize=9, frameon=False, borderpad=0.2, **at)
    if caption:
        figure.text(0.5, 0.04 / height, caption, size=SMALL, ha="center", va="bottom", **literal())
